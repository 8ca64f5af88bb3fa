"""The typed door to the buffer service: one method per request.

Safe for concurrent use by many tasks of one event loop. A request is repeated every `RESEND_S`
until it is answered, which is right because every request is idempotent; the service answers the
repeat of a request that it holds parked with "still parked", so that silence always means that it
is gone. After `timeout_s` of silence the call raises `PeerLost`, however long its own wait is.
"""

import asyncio
import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import zmq
import zmq.asyncio

from . import codec, waits
from .curve import protect_client
from .errors import PeerLost, Refused, WireError
from .messages import (
    Accepted,
    AwaitEvaluation,
    AwaitVersion,
    Batch,
    CheckpointSaved,
    Claim,
    Claims,
    ClaimSamples,
    CloseRun,
    Done,
    Envelope,
    EvaluationResults,
    ExtendGroup,
    FinishEvaluation,
    FinishSamples,
    GetStats,
    Heartbeat,
    Hello,
    Newest,
    NotYet,
    Part,
    PublishVersion,
    PutEvaluation,
    PutPrompts,
    RefusedReply,
    ReleaseSamples,
    Reply,
    Request,
    Stats,
    TakeGroups,
    Welcome,
)
from .records import (
    DropReason,
    Prompt,
    SamplingParams,
    Score,
    SizingDecision,
    Ticket,
    Trajectory,
    Version,
    WeightsManifest,
)
from .waits import Wait

T = TypeVar("T")

RESEND_S = 6.0
"""Seconds between repeats of an unanswered request; well above the usual `wait_s` of 2 s, so that
repeats do not cross the answers to requests that were only parked."""
MAX_HAND_IN = 256
"""Trajectories of one message, which bounds its size and how long its commit takes."""


class _Finished(NamedTuple):
    """A trajectory to be handed in."""

    trajectory: Trajectory
    lease_id: str
    told: "asyncio.Future[str]"
    """Why it was refused; empty when it is durable."""


class BufferClient:
    """A connection to the buffer service; use as `async with BufferClient(...) as client`."""

    def __init__(self, endpoint: str, run_id: str, name: str, timeout_s: float = 30.0) -> None:
        """Prepare; nothing happens before `connect`.

        Args:
            endpoint: what the service binds, `ipc://...` or `tcp://...`.
            run_id: the service refuses clients of another run.
            name: `worker-0`, `feeder`, `learner`, `supervisor`: shown to people, owns leases.
            timeout_s: silence after which the service counts as lost.
        """
        self.endpoint, self.run_id, self.name, self.timeout_s = endpoint, run_id, name, timeout_s
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._socket: zmq.asyncio.Socket | None = None
        self._context: zmq.asyncio.Context | None = None
        self._reader: asyncio.Task[None] | None = None
        self._last_heard = 0.0
        self._cut: set[int] = set()
        """Numbers of claims whose call was cancelled."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: list[_Finished] = []
        """Handed in next."""
        self._handing_in = False

    async def connect(self) -> Welcome:
        """Open the connection and say hello; may be called before the service has started.

        Raises:
            Refused: the service belongs to another run.
            PeerLost: nobody answered within `timeout_s`.
        """
        if self._socket is None:
            self._open_socket()
        hello = Hello(run_id=self.run_id, name=self.name, pid=os.getpid())
        return _expect(await self.call(hello), Welcome)

    def _open_socket(self) -> None:
        self._context = zmq.asyncio.Context()
        socket = self._socket = self._context.socket(zmq.DEALER)
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):
            socket.setsockopt(option, 0)
        # An ipc path that does not exist yet is tried again this often, in milliseconds.
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        protect_client(socket, self.endpoint)
        socket.connect(self.endpoint)
        self._reader = asyncio.create_task(self._read(socket), name=f"{self.name} reader")

    async def close(self) -> None:
        """Close; calls in progress raise `PeerLost`. May be called twice."""
        tasks = [*self._tasks, *([self._reader] if self._reader else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for future in self._pending.values():
            if not future.done():
                future.set_exception(PeerLost(f"{self.name} closed its connection"))
        # Left over when the task that hands in was cancelled before its first step.
        for each in self._finished:
            if not each.told.done():
                each.told.set_exception(PeerLost(f"{self.name} closed its connection"))
        self._finished, self._handing_in = [], False
        if self._socket is not None and self._context is not None:
            self._socket.close(linger=0)
            self._context.term()
        self._reader = self._socket = self._context = None

    async def __aenter__(self) -> "BufferClient":
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def call(self, request: Request) -> Reply:
        """Send a request until it is answered.

        Raises:
            Refused: the service said no; nothing changed.
            PeerLost: the service was silent for `timeout_s`, or for longer than its own wait.
            WireError: the reply does not follow the schema.
        """
        if self._socket is None:
            raise PeerLost(f"{self.name} is not connected")
        number = next(self._numbers)
        frames = codec.encode(request, number)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        wait = Wait(
            owner=self.name,
            what=f"the buffer service to answer {type(request).__name__}",
            since_s=time.monotonic(),
            deadline_s=getattr(request, "wait_s", 0.0) + self.timeout_s,
        )
        waits.put(future, wait)
        try:
            reply = await self._exchange(frames, future, wait)
        except asyncio.CancelledError:
            if isinstance(request, ClaimSamples):
                self._cut.add(number)
            raise
        finally:
            waits.put(future)
            del self._pending[number]
        if isinstance(reply, RefusedReply):
            raise Refused(reply.reason)
        return reply

    async def _exchange(
        self, frames: list[codec.Frame], future: "asyncio.Future[Reply]", wait: Wait
    ) -> Reply:
        """Send and repeat; see the module's docstring for when it gives up."""
        patience_s = min(RESEND_S, self.timeout_s / 4)
        while True:
            if self._socket is not None:  # closed meanwhile: the future holds the error
                with contextlib.suppress(TimeoutError):  # a service that lets us in not yet
                    async with asyncio.timeout(patience_s):
                        await self._socket.send_multipart(frames, copy=False)
            await asyncio.wait({future}, timeout=patience_s)
            if future.done():
                return future.result()
            now = time.monotonic()
            silent_s = now - max(self._last_heard, wait.since_s)
            if silent_s > self.timeout_s or now - wait.since_s > wait.deadline_s:
                raise PeerLost(
                    f"{wait.describe(now)}; it was last heard {silent_s:.1f} s ago at "
                    f"{self.endpoint}. See logs/buffer.log of the run folder"
                )

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        """Hand every reply to the call that waits for it."""
        while True:
            frames = [frame.buffer for frame in await socket.recv_multipart(copy=False)]
            self._last_heard = time.monotonic()
            with contextlib.suppress(WireError):  # without a number nobody can be told
                self._deliver(codec.open_envelope(frames), frames)

    def _deliver(self, envelope: Envelope, frames: Sequence[codec.Frame]) -> None:
        """Give a reply to its call; work that was granted to a cancelled call goes back."""
        if bytes(envelope.body) == bytes(codec.PARKED):
            return
        future = self._pending.get(envelope.request_number)
        try:
            reply = codec.decode_body(envelope, frames, Reply)
        except WireError as error:
            if future is not None and not future.done():
                future.set_exception(error)
            return
        if future is not None and not future.done():
            future.set_result(reply)
        elif future is None and isinstance(reply, Claims) and envelope.request_number in self._cut:
            self._cut.discard(envelope.request_number)
            for claim in reply.claims:
                self._background(self._give_back(claim))

    async def _give_back(self, claim: Claim) -> None:
        """Nobody will work on these samples, while heartbeats would keep their lease alive."""
        with contextlib.suppress(Refused, PeerLost):
            await self.release(
                uid=claim.ticket.prompt.uid,
                attempt=claim.attempt,
                indices=claim.indices,
                lease_id=claim.lease_id,
                reason="expired",
                detail="the claim was cancelled",
            )

    def _background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def put_prompts(self, tickets: Sequence[Ticket], wait_s: float = 0.0) -> Accepted:
        """Put WAITING prompts in uid order without gaps; `count` of them were put (a prefix)."""
        return _expect(await self.call(PutPrompts(tickets=tuple(tickets), wait_s=wait_s)), Accepted)

    async def extend(self, uid: int, sizing: SizingDecision) -> Done:
        """Size an open group again: more samples (`num_samples` in all), or none and not staged."""
        return _expect(await self.call(ExtendGroup(uid=uid, sizing=sizing)), Done)

    async def claim(
        self, serving: Version, max_samples: int, *, wait_s: float = 0.0, request_id: str = ""
    ) -> Claims:
        """Ask for up to `max_samples` training samples, and evaluation samples besides.

        Evaluation samples do not count in `max_samples` (they run on another engine): up to
        `EVALUATION_SAMPLES_PER_WORKER` are outstanding per worker, and `max_samples = 0` asks for
        them alone.
        """
        request = ClaimSamples(
            worker=self.name,
            serving=serving,
            max_samples=max_samples,
            request_id=request_id or uuid.uuid4().hex,
            wait_s=wait_s,
        )
        return _expect(await self.call(request), Claims)

    async def finish(self, trajectory: Trajectory, lease_id: str) -> None:
        """Hand in one trajectory; on return it is durable.

        Raises:
            Refused: its lease has ended, or its version is off the live path.
        """
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._finished.append(_Finished(trajectory, lease_id, told))
        if not self._handing_in:
            self._handing_in = True
            self._background(self._hand_in())
        if why := await told:
            raise Refused(why)

    async def _hand_in(self) -> None:
        """Send what is finished; what comes meanwhile shares the next message and its commit."""
        batch: list[_Finished] = []
        error: Exception = PeerLost(f"{self.name} closed its connection")
        try:
            while self._finished:
                batch, self._finished = self._finished[:MAX_HAND_IN], self._finished[MAX_HAND_IN:]
                done = await self.finish_many([each[:2] for each in batch])
                for position, each in enumerate(batch):
                    if not each.told.done():  # else nobody waits any more
                        each.told.set_result(done.refused.get(position, ""))
        except (Refused, PeerLost, WireError) as failure:
            error = failure
        finally:
            self._handing_in = False
            for each in (*batch, *self._finished):
                if not each.told.done():
                    each.told.set_exception(error)
            self._finished = []

    async def finish_many(self, samples: Sequence[tuple[Trajectory, str]]) -> Done:
        """Hand in (trajectory, lease id) pairs in one message; `refused` names those not taken."""
        trajectories, lease_ids = zip(*samples, strict=True)
        request = FinishSamples(trajectories=trajectories, lease_ids=lease_ids)
        return _expect(await self.call(request), Done)

    async def release(
        self,
        *,
        uid: int,
        attempt: int,
        indices: Sequence[int],
        lease_id: str,
        reason: DropReason,
        detail: str = "",
        death: str = "",
    ) -> Done:
        """Give samples back: `expired` issues them again, `quarantined` ends them."""
        request = ReleaseSamples(
            uid=uid,
            attempt=attempt,
            indices=tuple(indices),
            lease_id=lease_id,
            reason=reason,
            detail=detail,
            death=death,
        )
        return _expect(await self.call(request), Done)

    async def heartbeat(self, serving: Version | None, stats: dict[str, float]) -> Done:
        """Renew all of this worker's leases."""
        return _expect(
            await self.call(Heartbeat(worker=self.name, serving=serving, stats=stats)), Done
        )

    async def take(self, step: int, *, wait_s: float, request_id: str = "") -> Batch | NotYet:
        """The batch of one step, durable as TAKEN; pass a `request_id` to be able to repeat it."""
        reply = await self.call(self._take(step, wait_s, request_id, None))
        return reply if isinstance(reply, NotYet) else _expect(reply, Batch)

    async def take_part(
        self, step: int, received: int, *, wait_s: float, request_id: str = ""
    ) -> Part | Batch | NotYet:
        """What is READY of a step's batch besides the groups received; the last ones come in a
        `Batch`."""
        reply = await self.call(self._take(step, wait_s, request_id, received))
        return reply if isinstance(reply, NotYet | Part) else _expect(reply, Batch)

    def _take(self, step: int, wait_s: float, name: str, received: int | None) -> TakeGroups:
        name = name or f"{self.name}/{step}"
        return TakeGroups(step=step, request_id=name, wait_s=wait_s, received=received)

    async def publish(self, manifest: WeightsManifest) -> Done:
        """Announce new weights."""
        return _expect(await self.call(PublishVersion(manifest=manifest)), Done)

    async def await_version(self, after: Version | None = None, wait_s: float = 0.0) -> Newest:
        """The newest manifest once it is newer than `after`; the same as before at the end of the
        wait (None before the first)."""
        return _expect(await self.call(AwaitVersion(after=after, wait_s=wait_s)), Newest)

    async def checkpoint_saved(self, version: Version, resumable_step: int = 0) -> Done:
        """Groups taken at or below this version are TRAINED; no resume starts before a step."""
        saved = CheckpointSaved(version=version, resumable_step=resumable_step)
        return _expect(await self.call(saved), Done)

    async def put_evaluation(
        self,
        *,
        job_id: str,
        version: Version,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParams,
    ) -> Done:
        """Start scoring held-out prompts at a version that the mailbox still holds."""
        request = PutEvaluation(
            job_id=job_id,
            version=version,
            prompts=tuple(prompts),
            samples_per_prompt=samples_per_prompt,
            sampling=sampling,
        )
        return _expect(await self.call(request), Done)

    async def finish_evaluation(
        self, *, job_id: str, uid: int, index: int, text: str, score: Score, num_tokens: int
    ) -> Done:
        """Hand in one held-out sample."""
        request = FinishEvaluation(
            job_id=job_id, uid=uid, index=index, text=text, score=score, num_tokens=num_tokens
        )
        return _expect(await self.call(request), Done)

    async def await_evaluation(self, job_id: str, wait_s: float) -> EvaluationResults | NotYet:
        """The job's results once complete."""
        reply = await self.call(AwaitEvaluation(job_id=job_id, wait_s=wait_s))
        return reply if isinstance(reply, NotYet) else _expect(reply, EvaluationResults)

    async def stats(self) -> Stats:
        """Counts, ages, lags and waits."""
        return _expect(await self.call(GetStats()), Stats)

    async def lost(self, name: str) -> None:
        """Say that a process was lost with its node: what it held is issued again at once."""
        _expect(await self.call(Hello(run_id=self.run_id, name=name, pid=0)), Welcome)

    async def close_run(self, reason: str) -> Done:
        """No more claims; every waiting request returns `closing`."""
        return _expect(await self.call(CloseRun(reason=reason)), Done)


def _expect(reply: Any, reply_type: type[T]) -> T:
    """The reply, if it is of the promised type.

    Raises:
        WireError: it is not.
    """
    if not isinstance(reply, reply_type):
        raise WireError(f"expected {reply_type.__name__}, got {type(reply).__name__}")
    return reply
