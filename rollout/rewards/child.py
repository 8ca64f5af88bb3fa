"""The parent's side of one reward process: sends jobs, reads scores, and holds the clock.

The child works through its jobs in order, a few sent ahead so that it need not wait for us. A
job's clock runs from when the child could start on it: when it was sent to an idle child, else when
the job before it was answered.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self, cast

import msgspec

from ...buffer.errors import ConfigError
from ...buffer.records import Score
from ..config import RewardConfig
from .base import failed
from .process import LENGTH, MAX_REPLY_BYTES, ChildMessage, Ready, ScoreReply, Unusable, frame

START_TIMEOUT_S = 120.0
"""Importing a reward's libraries on a busy machine is slow; longer than this is a hang."""
STOP_TIMEOUT_S = 2.0
DRAIN_S = 0.5
"""How long a dead child's pipe may stay open in the hands of a process it left behind."""
ENVELOPE_BYTES = 1024
"""More than a reply's frame adds to its score."""


class Job(NamedTuple):
    """One encoded score request and who waits for its answer."""

    number: int
    body: bytes
    future: asyncio.Future[Score]

    def resolve(self, score: Score) -> None:
        """Answer, unless the asker has gone."""
        if not self.future.done():
            self.future.set_result(score)


class RewardChild(asyncio.SubprocessProtocol):
    """One reward process, started by `RewardChild.start`.

    child.send(a); child.send(b)    in flight: a (its clock runs), b
    reply to a                      in flight: b (its clock runs)
    b's time is up                  killed with its whole process group; b is recorded as
                                    failed; jobs behind b go back through `on_lost`
    """

    def __init__(
        self,
        config: RewardConfig,
        on_answer: Callable[[], None],
        on_lost: Callable[["RewardChild", list[Job]], None],
    ) -> None:
        self._config = config
        self._on_answer, self._on_lost = on_answer, on_lost
        self._loop = asyncio.get_running_loop()
        self._decode = msgspec.msgpack.Decoder(ChildMessage).decode
        self._received = bytearray()
        self._inflight: deque[Job] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._clock_s = 0.0
        self._stopping = False
        self._verdict: Score | None = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def start(
        cls,
        config: RewardConfig,
        on_answer: Callable[[], None],
        on_lost: Callable[["RewardChild", list[Job]], None],
    ) -> Self:
        """Start a process and wait until its reward is loaded.

        Args:
            config: the reward.
            on_answer: called after each answer: there is room for another job.
            on_lost: called when the process has ended, with the jobs it had not begun.
        Raises:
            ConfigError: the reward cannot be loaded, with the child's message.
        """
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(config, on_answer, on_lost),
            *(sys.executable, "-m", "slipstream.rollout.rewards.process", str(os.getpid())),
            stderr=None,
            start_new_session=True,
            # One sample at a time: more threads would only take cores from the engines.
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        try:
            await child._ready
        except BaseException:
            await child.stop()
            raise
        return child

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._pid

    @property
    def load(self) -> int:
        """Jobs sent and not answered."""
        return len(self._inflight)

    @property
    def usable(self) -> bool:
        """Whether jobs may be sent."""
        return not (self._stopping or self._verdict or self._gone.done())

    def send(self, job: Job) -> None:
        """Hand a job over; its clock starts now when the child is idle."""
        if not self._inflight:
            self._clock_s = self._loop.time()
        self._inflight.append(job)
        self._stdin.write(frame(job.body))
        if self._timer is None:
            self._timer = self._loop.call_later(self._config.timeout_s, self._check_clock)

    async def stop(self) -> None:
        """Let the process end by itself, soon; else kill it. Nothing of its session is left."""
        self._stopping = True
        self._stdin.close()
        await asyncio.wait({self._gone}, timeout=STOP_TIMEOUT_S)
        if not self._gone.done():
            self._kill(failed("the reward pool was closed", "infrastructure_failed"))
            await asyncio.wait({self._gone}, timeout=STOP_TIMEOUT_S)

    def _kill(self, verdict: Score) -> None:
        """Kill the process and everything it started in its session.

        The verdict is for the job it was at. What it still writes is not read, lest an answer that
        comes too late pass the verdict on to the next job.
        """
        self._verdict = self._verdict or verdict
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def _check_clock(self) -> None:
        """Kill when the first job's time is up, else look again when it would be.

        One timer serves many jobs: to cancel and arm one for each costs more than a trivial
        reward. The last look comes one turn of the event loop later, when answers that were in the
        pipe have been read: a loop that was busy must not kill a reward that was in time.
        """
        self._timer = None
        if not self._inflight or self._verdict:
            return
        left_s = self._clock_s + self._config.timeout_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_clock)
        else:
            self._timer = self._loop.call_later(0, self._expire, self._inflight[0].number)

    def _expire(self, number: int) -> None:
        """Kill, unless that job has been answered meanwhile."""
        self._timer = None
        if not self._inflight or self._inflight[0].number != number:
            self._check_clock()
            return
        limit = f"reward.timeout_s = {self._config.timeout_s:g} s"
        self._kill(failed(f"the reward took longer than {limit} and was killed"))

    def _start_expired(self) -> None:
        limit = f"{START_TIMEOUT_S:g} s"
        self._kill(failed(f"the reward did not load within {limit} and was killed"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The process was started: tell it which reward to load."""
        self._transport = cast(asyncio.SubprocessTransport, transport)
        self._pid = cast(int, self._transport.get_pid())
        self._stdin = cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))
        self._stdin.write(frame(self._config.model_dump_json().encode()))
        self._timer = self._loop.call_later(START_TIMEOUT_S, self._start_expired)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Bytes of replies arrived."""
        if self._verdict:
            return
        self._received += data
        try:
            for body in self._take_frames():
                self._handle(self._decode(body))
        except msgspec.MsgspecError as error:
            reason = f"the reward process wrote something that is not a reply ({error})"
            self._kill(failed(reason))

    def _take_frames(self) -> Iterator[bytes]:
        """The complete bodies received so far, one by one: good ones may precede a bad one.

        Raises:
            msgspec.DecodeError: a length above what a child may send.
        """
        while len(self._received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._received)
            if length > MAX_REPLY_BYTES + ENVELOPE_BYTES:
                raise msgspec.DecodeError(f"a frame of {length} bytes")
            end = LENGTH.size + length
            if len(self._received) < end:
                return
            body = bytes(self._received[LENGTH.size : end])
            del self._received[:end]
            yield body

    def _handle(self, message: ChildMessage) -> None:
        """Act on one message of the child."""
        match message:
            case ScoreReply(number=number, score=score):
                if not self._inflight or self._inflight[0].number != number:
                    raise msgspec.DecodeError(f"an answer to request {number} out of order")
                self._inflight.popleft().resolve(score)
                self._clock_s = self._loop.time()
                self._on_answer()
            case Ready() if not self._ready.done():
                self._stop_timer()
                self._ready.set_result(None)
            case Unusable(message=text) if not self._ready.done():
                self._ready.set_exception(ConfigError(text))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def process_exited(self) -> None:
        """Its last replies may still be in the pipe; what it left running must not be."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        self._loop.call_later(DRAIN_S, self._transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has ended and its pipes are empty: settle what was in flight."""
        self._stop_timer()
        self._transport.close()
        ending = _ending(self._transport.get_returncode())
        verdict = self._verdict or failed(f"the reward process {ending}")
        if not self._ready.done():
            text = f"{verdict.reason} while it was loading; see the log"
            self._ready.set_exception(ConfigError(text))
            self._ready.exception()  # nobody waits for a start that was cancelled
        if self._inflight:
            self._inflight.popleft().resolve(verdict)
        jobs = list(self._inflight)
        self._inflight.clear()
        self._gone.set_result(None)
        self._on_lost(self, jobs)


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return f"died from {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
