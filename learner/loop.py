"""The learner process: take -> train -> publish -> metrics -> checkpoint, until the last step.

    main -> Trainer.prepare      warm start or resume, checkpoint of step 0
         -> LearnerLoop.run      publish what is held, then for every step
              take               long poll; the wait is named, bounded, and shown
              train_step         in a thread, so that the connection stays alive
              publish            first thing after the update: engines wait for it
              metrics.jsonl      one line
              checkpoint         every so many steps: copied, then written while training goes
                                 on; once it is durable the buffer is told

A crash anywhere is recoverable: what was published but not saved is on a branch that the resumed
run leaves behind. SIGTERM ends the run after the step being trained, with a checkpoint.
"""

import os

# Before torch loads OpenMP, whose threads spin while they wait: on cores shared with workers the
# warm start took 25 times as long on two threads as with threads that sleep (measured).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from ..buffer import codec
from ..buffer.client import BufferClient
from ..buffer.errors import PeerLost, Refused, TrainingFailed
from ..buffer.messages import Batch, Done, NotYet, Part
from ..buffer.process import run_process
from ..buffer.records import Version, WeightsManifest
from ..buffer.waits import waiting
from .checkpoint import crash_point
from .config import LearnerSpec
from .ranks import process_name
from .step import StepResult
from .trainer import DISK_S, Trainer, append_line

R = TypeVar("R")

POLL_S = 5.0
"""The service answers a take at the latest after so long, and says on whom it waits."""

SERVE_S = 30.0
"""How long a learner at its end stays for the hosts that fetch the last version from it."""

STOP_PATIENCE_S = 5.0
"""After SIGTERM: how long to try to tell a buffer service that may be gone already."""


async def main(spec: LearnerSpec) -> None:
    """Run the learner to its end or to SIGTERM."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="train") as pool:
        trainer = Trainer(spec)
        prepared = asyncio.get_running_loop().run_in_executor(pool, trainer.prepare, stop)
        try:
            await asyncio.shield(prepared)
        except asyncio.CancelledError:
            stop.set()  # the warm start ends at its next update; there is nothing to save yet
            await _to_the_end(prepared)
        if spec.rank:
            await _to_the_end(asyncio.get_running_loop().run_in_executor(pool, follow, trainer))
            return
        if not stop.is_set():
            async with BufferClient(spec.endpoint, spec.run_id, "learner") as client:
                await (loop := LearnerLoop(spec, trainer, client, pool)).run()
                if not loop.stopping:
                    await _served(trainer)
        trainer.end()


async def _served(trainer: Trainer) -> None:
    """Stay until who fetches from us has the last version; not for ever, nor after SIGTERM."""
    with contextlib.suppress(asyncio.CancelledError, TimeoutError):
        async with asyncio.timeout(SERVE_S):
            while trainer.receiving:
                await asyncio.sleep(0.05)


def follow(trainer: Trainer) -> None:
    """Do what rank 0 does, until it ends; a checkpoint is written beside, as there.

    Raises:
        PeerLost: rank 0 is gone.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="save") as saving:
        while True:
            what, frames = trainer.ranks.hear()
            if what == "add":
                part = codec.decode(frames, Part)
                with _at_work(trainer):
                    trainer.add(part.step, part.groups)
            elif what == "train":
                batch = codec.decode(frames, Batch)
                with _at_work(trainer):
                    trainer.train(batch)
            elif what == "snapshot":
                with _at_work(trainer):
                    write = trainer.snapshot()
                saving.submit(_saved, trainer, write)  # what stops it, rank 0 reports
            else:
                return


def _at_work(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    what = f"its training thread at step {trainer.held.step + 1}"
    return waiting(trainer.ranks.name, what)


def _saved(trainer: Trainer, write: Callable[[], object]) -> None:
    with waiting(trainer.ranks.name, "its checkpoint to be written", DISK_S):
        write()


async def _to_the_end(work: Awaitable[None]) -> None:
    """Wait for it whatever comes: rank 0 knows when to stop, and tells."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


class Buffer(Protocol):
    """What the loop needs of the buffer service; `BufferClient` is one."""

    async def take(self, step: int, *, wait_s: float) -> Batch | NotYet: ...

    async def take_part(
        self, step: int, received: int, *, wait_s: float
    ) -> Part | Batch | NotYet: ...

    async def publish(self, manifest: WeightsManifest) -> Done: ...

    async def checkpoint_saved(self, version: Version, resumable_step: int = 0) -> object: ...


class LearnerLoop:
    """Drives a trainer by what the buffer service hands out."""

    def __init__(
        self, spec: LearnerSpec, trainer: Trainer, client: Buffer, pool: ThreadPoolExecutor
    ) -> None:
        """Wire the parts; `trainer` is prepared and `client` connected."""
        self.spec, self.trainer, self.client, self.pool = spec, trainer, client, pool
        self.stopping = False
        self._writing: asyncio.Task[None] | None = None
        """The checkpoint on its way to the disk."""
        self._last_row: dict[str, Any] = {}
        self._step_began_s = time.monotonic()
        self._part_s = 0.0
        """Spent on training parts of the batch that is being taken."""
        self._published_bytes = 0

    async def run(self) -> None:
        """All steps.

        Raises:
            TrainingFailed: a batch did not come in time, the step failed, or a checkpoint could not
                be written.
        """
        try:
            await self._steps()
        finally:  # a step that failed does not take the checkpoint before it with it
            await self._to_boundary(self._written())

    async def _steps(self) -> None:
        await self._publish()
        if self.trainer.saved:
            await self.client.checkpoint_saved(self.trainer.held, self.trainer.resumable_step)
        try:
            while self.trainer.held.step < self.spec.config.steps and not self.stopping:
                if self._writing is not None and self._writing.done():
                    await self._written()
                began_s, self._part_s = time.monotonic(), 0.0
                batch = await self._take_or_save(self.trainer.held.step + 1)
                if batch is None:
                    break
                wait_s = time.monotonic() - began_s - self._part_s
                await self._to_boundary(self._step(batch, wait_s))
        except asyncio.CancelledError:  # SIGTERM while waiting for a batch
            self.stopping = True
        if self.trainer.held.step < self.spec.config.steps:
            await self._stop()

    async def _to_boundary(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a step to its end even when SIGTERM comes in the middle of it, or twice."""
        task = asyncio.ensure_future(work)
        while True:
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.cancelled():
                    raise
                self.stopping = True

    async def _take_or_save(self, step: int) -> Batch | None:
        """`_take`; when nothing comes any more, what was trained so far is not lost."""
        try:
            return await self._take(step)
        except (PeerLost, TrainingFailed):
            await self._written()
            if not self.trainer.saved:
                await self._in_thread(self.trainer.save)
            raise

    async def _take(self, step: int) -> Batch | None:
        """The batch of a step; None when the run is being closed.

        Raises:
            TrainingFailed: `take_deadline_s` passed; says on whom it waited.
        """
        deadline = time.monotonic() + self.spec.take_deadline_s
        waiting_on, received = "the buffer service", 0
        reply: Part | Batch | NotYet | None = None
        while (left_s := deadline - time.monotonic()) > 0:
            wait_s = min(POLL_S, left_s)
            if isinstance(reply, Part):
                received += len(reply.groups)
                reply = await self._train_part(reply, received)
                deadline = time.monotonic() + self.spec.take_deadline_s
            elif self.spec.config.stream:
                reply = await self.client.take_part(step, received, wait_s=wait_s)
            else:
                reply = await self.client.take(step, wait_s=wait_s)
            if isinstance(reply, Part):
                continue
            if isinstance(reply, Batch):
                return reply
            if reply.closing:
                return None
            self.trainer.keep_sender()
            waiting_on = reply.waiting_on
        raise TrainingFailed(
            f"step {step} got no batch within buffer.take_deadline_s = "
            f"{self.spec.take_deadline_s:g} s; waiting on {waiting_on}"
        )

    async def _train_part(self, part: Part, received: int) -> Part | Batch | NotYet:
        """Train some groups of a step; meanwhile the next ones come, and are returned."""
        step, began_s = part.step, time.monotonic()
        after = asyncio.create_task(self.client.take_part(step, received, wait_s=POLL_S))
        try:
            await self._in_thread(lambda: self.trainer.add(step, part.groups))
            self._part_s += time.monotonic() - began_s
            return await after
        finally:
            after.cancel()

    async def _step(self, batch: Batch, wait_s: float) -> None:
        """Train one batch and make it known."""
        crash_point("step.taken")
        result = await self._in_thread(lambda: self.trainer.train(batch))
        crash_point("step.trained")
        await self._publish()
        crash_point("publish.announced")
        self._write_metrics(batch, result, wait_s)
        crash_point("metrics.written")
        if self.trainer.checkpoint_due:
            await self._checkpoint()

    async def _publish(self) -> None:
        manifest = await self._in_thread(self.trainer.write_weights)
        async with self._patience():
            self.trainer.outbox.keep((await self.client.publish(manifest)).held)
        self._published_bytes = sum(shard.num_bytes for shard in manifest.shards)

    async def _checkpoint(self) -> None:
        """Copy the held version, and write it beside training; one at a time."""
        await self._written()
        write = await self._in_thread(self.trainer.snapshot)
        self._writing = asyncio.create_task(self._write(write, self.trainer.held))

    async def _write(self, write: Callable[[], object], version: Version) -> None:
        await asyncio.to_thread(_saved, self.trainer, write)
        async with self._patience():
            await self.client.checkpoint_saved(version, self.trainer.resumable_step)
        crash_point("checkpoint.acknowledged")

    async def _written(self) -> None:
        """Wait for the checkpoint being written; raises what stopped it."""
        task, self._writing = self._writing, None
        if task is not None:
            await task

    async def _stop(self) -> None:
        """Leave a checkpoint of the last finished step, and say so."""
        self.stopping = True
        if not self.trainer.saved:
            await self._checkpoint()
        if self._last_row:
            append_line(
                self.spec.run_dir / "metrics.jsonl", {**self._last_row, "status": "stopped"}
            )

    @contextlib.asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """While the run is being stopped, the service may be gone before us: that is no error,
        because a resume goes by the checkpoint."""
        if not self.stopping:
            yield
            return
        with contextlib.suppress(PeerLost, Refused, TimeoutError):
            async with asyncio.timeout(STOP_PATIENCE_S):
                yield

    def _write_metrics(self, batch: Batch, result: StepResult, wait_s: float) -> None:
        """Append the step's line: ours, with what only the buffer knows of drops and lengths."""
        now_s = time.monotonic()
        seconds, self._step_began_s = now_s - self._step_began_s, now_s
        proof = msgspec.structs.replace(
            result.proof,
            dropped=batch.proof.dropped,
            length_bias=batch.proof.length_bias,
            finished_samples=batch.proof.finished_samples,
            finished_reward_mean=batch.proof.finished_reward_mean,
        )
        # Of all samples finished since the last batch: that of the batch alone leaves out the
        # groups dropped as all right or all wrong. None have when it was READY before that.
        reward_mean = proof.finished_reward_mean
        if reward_mean is None:
            reward_mean = result.metrics["reward_trained_mean"]
        self._last_row = {
            "step": batch.step,
            "version": str(self.trainer.held),
            "branch": self.trainer.held.branch,
            "digest": self.trainer.held.digest,
            "time": time.time(),
            "seconds": seconds,
            "wait_seconds": wait_s,
            "published_bytes": self._published_bytes,
            "tokens_per_s": result.metrics["tokens_trained"] / seconds,
            "reward_mean": reward_mean,
            **result.metrics,
            "proof": {
                **msgspec.to_builtins(proof),
                "lag_counts": {str(lag): n for lag, n in proof.lag_counts.items()},
            },
            "drops": proof.dropped,
            **({"drafts": batch.drafts} if batch.drafts else {}),
        }
        append_line(self.spec.run_dir / "metrics.jsonl", self._last_row)

    async def _in_thread(self, work: Callable[[], R]) -> R:
        """Run blocking work in the one training thread."""
        with _at_work(self.trainer):
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)


if __name__ == "__main__":
    arguments = LearnerSpec.model_validate_json(Path(sys.argv[1]).read_text())
    run_process(process_name(arguments.rank), arguments.run_dir, main(arguments))
