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
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self, cast

import msgspec

from ...buffer.errors import ConfigError
from ...buffer.records import Score
from ..config import RewardConfig
from .base import failed
from .process import (
    LENGTH,
    MAX_REPLY_BYTES,
    ChildMessage,
    Ready,
    ScoreReply,
    ScoreRequest,
    Unusable,
    frame,
)

START_TIMEOUT_S = 120.0
"""Importing a reward's libraries on a busy machine is slow; longer than this is a hang."""
STOP_TIMEOUT_S = 2.0
START_ATTEMPTS = 3
"""Of a process that is killed while it loads."""
DRAIN_S = 0.5
"""How long a dead child's pipe may stay open in the hands of a process it left behind."""
MAX_LOG_BYTES = 1 << 20
"""Of what one process prints; the rest is left out."""
MARK = "SLIPSTREAM_REWARD"
"""In the environment of a reward's processes, so that those which left its session are found."""
KILL_ROUNDS = 20
"""A process that is being killed may have forked meanwhile: look again until none is left."""
ENVELOPE_BYTES = 1024
"""More than a reply's frame adds to its score."""


class Job(NamedTuple):
    """One encoded sample and who waits for its score."""

    sample: bytes
    future: asyncio.Future[Score]
    alone: bool = False
    """It was in a call of several that took its process down: not to be mixed with others again."""

    def resolve(self, score: Score) -> None:
        """Answer, unless the asker has gone."""
        if not self.future.done():
            self.future.set_result(score)


class Call(NamedTuple):
    """The samples that the child scores together."""

    number: int
    jobs: list[Job]


class RewardChild(asyncio.SubprocessProtocol):
    """One reward process, started by `RewardChild.start`.

    child.send(a); child.send(b)    in flight: a (its clock runs), b
    reply to a                      in flight: b (its clock runs)
    b's time is up                  killed with its whole process group; b is recorded as failed,
                                    or, when it is a call of several, its jobs go back to be tried
                                    alone; jobs behind b go back through `on_lost`
    """

    def __init__(
        self,
        config: RewardConfig,
        on_answer: Callable[[], None],
        on_lost: Callable[["RewardChild", list[Job]], None],
        mark: str,
    ) -> None:
        self._config, self._mark = config, mark
        self._on_answer, self._on_lost = on_answer, on_lost
        self._loop = asyncio.get_running_loop()
        self._decode = msgspec.msgpack.Decoder(ChildMessage).decode
        self._received = bytearray()
        self._inflight: deque[Call] = deque()
        self.declared = Ready(batch_size=1, cacheable=False)
        self._logged = 0
        self._number = 0
        self._encode = msgspec.msgpack.Encoder().encode
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

        One that is killed from outside meanwhile (an operator, the system short of memory) says
        nothing about the reward: it is started again, `START_ATTEMPTS` times in all.

        Args:
            config: the reward.
            on_answer: called after each answer: there is room for another job.
            on_lost: called when the process has ended, with the jobs it had not begun.
        Raises:
            ConfigError: the reward cannot be loaded, with the child's message.
        """
        attempts_left = START_ATTEMPTS
        while True:
            child = await cls._spawn(config, on_answer, on_lost)
            attempts_left -= 1
            try:
                await child._ready
                return child
            except BaseException as error:
                again = isinstance(error, ConfigError) and child._killed and attempts_left > 0
                await child.stop()
                if not again:
                    raise

    @classmethod
    async def _spawn(
        cls,
        config: RewardConfig,
        on_answer: Callable[[], None],
        on_lost: Callable[["RewardChild", list[Job]], None],
    ) -> Self:
        mark = uuid.uuid4().hex
        started = asyncio.ensure_future(
            asyncio.get_running_loop().subprocess_exec(
                lambda: cls(config, on_answer, on_lost, mark),
                *(sys.executable, "-m", "slipstream.rollout.rewards.process", str(os.getpid())),
                start_new_session=True,
                # One sample at a time: more threads would only take cores from the engines.
                env={"OMP_NUM_THREADS": "1", **os.environ, MARK: mark},
            )
        )
        try:
            return (await asyncio.shield(started))[1]
        except asyncio.CancelledError:
            # Cancelled half-way, asyncio of Python 3.11 may wait for the process's end for ever.
            await (await started)[1].stop()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._pid

    @property
    def _killed(self) -> bool:
        """Whether it ended by a SIGKILL that was not ours."""
        return self._verdict is None and self._transport.get_returncode() == -signal.SIGKILL

    @property
    def load(self) -> int:
        """Calls sent and not answered."""
        return len(self._inflight)

    @property
    def usable(self) -> bool:
        """Whether jobs may be sent."""
        return not (self._stopping or self._verdict or self._gone.done())

    def send(self, jobs: list[Job]) -> None:
        """Hand a call over; its clock starts now when the child is idle."""
        if not self._inflight:
            self._clock_s = self._loop.time()
        self._number += 1
        self._inflight.append(Call(self._number, jobs))
        samples = tuple(msgspec.Raw(job.sample) for job in jobs)
        self._stdin.write(frame(self._encode(ScoreRequest(number=self._number, samples=samples))))
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
        """Bytes of replies, or of what the reward prints, arrived."""
        if fd == 2:
            self._log(data)
            return
        if self._verdict:
            return
        self._received += data
        try:
            for body in self._take_frames():
                self._handle(self._decode(body))
        except msgspec.MsgspecError as error:
            reason = f"the reward process wrote something that is not a reply ({error})"
            self._kill(failed(reason))

    def _log(self, data: bytes) -> None:
        """Pass on what the reward prints, up to a bound: a full disk would end the run."""
        sys.stderr.write(data[: max(0, MAX_LOG_BYTES - self._logged)].decode(errors="replace"))
        if self._logged < MAX_LOG_BYTES <= self._logged + len(data):
            sys.stderr.write("\n(the reward prints too much: the rest is left out)\n")
        self._logged += len(data)

    def _take_frames(self) -> Iterator[bytes]:
        """The complete bodies received so far, one by one: good ones may precede a bad one.

        Raises:
            msgspec.DecodeError: a length above what a child may send.
        """
        while len(self._received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._received)
            if length > (MAX_REPLY_BYTES + ENVELOPE_BYTES) * self.declared.batch_size:
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
            case ScoreReply(number=number, scores=scores):
                if not self._inflight or self._inflight[0].number != number:
                    raise msgspec.DecodeError(f"an answer to request {number} out of order")
                jobs = self._inflight[0].jobs
                if len(scores) != len(jobs):
                    raise msgspec.DecodeError(f"{len(scores)} answers to {len(jobs)} samples")
                self._inflight.popleft()
                for job, score in zip(jobs, scores, strict=True):
                    job.resolve(score)
                self._clock_s = self._loop.time()
                self._on_answer()
            case Ready() if not self._ready.done():
                self._stop_timer()
                self.declared = message
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
        kill_marked(self._mark)
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
        jobs: list[Job] = []
        if self._inflight:
            running = self._inflight.popleft().jobs
            if len(running) == 1 or self._stopping:
                for job in running:
                    job.resolve(verdict)
            else:  # which of them did it shows when each is tried alone
                jobs = [job._replace(alone=True) for job in running]
        jobs += [job for call in self._inflight for job in call.jobs]
        self._inflight.clear()
        self._gone.set_result(None)
        self._on_lost(self, jobs)


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return f"died from {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def kill_marked(mark: str) -> None:
    """Kill what a reward process started and moved out of its session (Linux); a process that was
    also given an environment without our mark is not found."""
    needle = f"{MARK}={mark}".encode()
    for _ in range(KILL_ROUNDS):
        found = False
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if needle in place.read_bytes():
                    os.kill(int(place.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            return
