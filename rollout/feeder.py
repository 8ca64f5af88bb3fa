"""The feeder process: keeps the buffer supplied with prompts, and has versions evaluated.

It holds no state of its own: where the stream goes on, and what is known of each prompt, is told
by the buffer's journal, which evaluations are done by `eval.jsonl`.
"""

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path

from ..buffer.client import BufferClient
from ..buffer.errors import PeerLost, Refused
from ..buffer.messages import EvaluationResults
from ..buffer.process import run_process
from ..buffer.records import Ticket, Version
from .config import TICKETS_AT_ONCE, FeederSpec
from .evaluation import EvaluationSchedule, append_line, last_evaluated_step, summary
from .prompts import PromptSource
from .tickets import TicketMaker

COMMIT_POLL_S = 0.1
"""How long a finished probe waits for its decision, at most: other groups are in flight then."""
WAIT_S = 10.0
"""How long one request waits before it is repeated."""
EVALUATION_STALL_S = 900.0
"""An evaluation without progress for so long ends the run and says who was waited on."""


async def feed(spec: FeederSpec) -> None:
    """Put prompts and evaluate versions until the final version is evaluated or the run closes.

    Raises:
        ConfigError: the prompts cannot be opened.
        PeerLost: the buffer service is gone, or an evaluation made no progress.
    """
    source = await asyncio.to_thread(PromptSource, spec.prompts, spec.seed)
    client = BufferClient(spec.endpoint, spec.run_id, "feeder")
    try:
        welcome = await client.connect()
        maker = TicketMaker(spec, source)
        putting = asyncio.create_task(put_prompts(client, maker, welcome.next_uid))
        committing = asyncio.create_task(commit_groups(client, spec, maker))
        evaluating = asyncio.create_task(follow_versions(client, spec, source))
        await _until_first_ends(putting, evaluating, committing)
    finally:
        await client.close()


async def _until_first_ends(*tasks: asyncio.Task[None]) -> None:
    """They end when the run closes; only the evaluations end by themselves, and then all is done.

    Whatever one raises is raised here; the others are cancelled, and so are all with us.
    """
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def put_prompts(client: BufferClient, maker: TicketMaker, next_uid: int) -> None:
    """Put tickets in uid order from `next_uid` on; the buffer's full queue holds us back."""
    tickets: list[Ticket] = []
    try:
        while True:
            if not tickets:
                uids = range(next_uid, next_uid + TICKETS_AT_ONCE)
                tickets = await asyncio.to_thread(maker.tickets, uids)
                next_uid = uids.stop
            reply = await client.put_prompts(tickets, wait_s=WAIT_S)
            del tickets[: reply.count]
            if reply.closing:
                return
    finally:
        maker.save()


async def commit_groups(client: BufferClient, spec: FeederSpec, maker: TicketMaker) -> None:
    """Decide on each group whose first stage is finished: its second one, or none."""
    while spec.rollout.sizing.staged:
        for uid, sizing in (await asyncio.to_thread(maker.commits)).items():
            with suppress(Refused):  # it was quarantined meanwhile
                await client.extend(uid, sizing)
        await asyncio.sleep(COMMIT_POLL_S)
    await asyncio.Event().wait()


async def follow_versions(client: BufferClient, spec: FeederSpec, source: PromptSource) -> None:
    """Evaluate each version that is due; return after the final one, or when the run closes."""
    file = spec.run_dir / "eval.jsonl"
    schedule: EvaluationSchedule | None = None
    seen: Version | None = None
    while True:
        newest = await client.await_version(after=seen, wait_s=WAIT_S)
        if newest.closing:
            return
        if newest.manifest is None or newest.manifest.version == seen:
            continue
        seen = newest.manifest.version
        if schedule is None:
            last_step = last_evaluated_step(file, seen.step)
            schedule = EvaluationSchedule(spec.eval.every_steps, spec.steps, last_step)
        if spec.eval.enabled and schedule.is_due(seen.step):
            line = await evaluate(client, spec, source, seen)
            if line is None:
                continue  # retired meanwhile, or closing: the next reply says which
            append_line(file, line)
            schedule.done(seen.step)
        if seen.step >= spec.steps:
            return


async def evaluate(
    client: BufferClient, spec: FeederSpec, source: PromptSource, version: Version
) -> dict | None:
    """Have the held-out prompts scored at one version.

    Returns:
        The line for `eval.jsonl`; None when the run closes, or when a newer version has replaced
        this one before its weights could be pinned.
    """
    job_id = f"eval-{version}"
    started_s = time.monotonic()
    try:
        await client.put_evaluation(
            job_id=job_id,
            version=version,
            prompts=source.held_out(),
            samples_per_prompt=spec.eval.samples_per_prompt,
            sampling=spec.eval.sampling(spec.rollout.sampling),
        )
    except Refused:
        newest = await client.await_version(after=version)
        if newest.manifest is None or newest.manifest.version == version:
            raise  # refused for another reason than being retired
        return None
    results = await _results(client, job_id)
    return results and summary(results, time.monotonic() - started_s)


async def _results(client: BufferClient, job_id: str) -> EvaluationResults | None:
    """Wait for a job as long as it makes progress; None when the run closes."""
    waiting_on, progress_s = "", time.monotonic()
    while True:
        reply = await client.await_evaluation(job_id, wait_s=WAIT_S)
        if isinstance(reply, EvaluationResults):
            return reply
        if reply.closing:
            return None
        if reply.waiting_on != waiting_on:
            waiting_on, progress_s = reply.waiting_on, time.monotonic()
        if time.monotonic() - progress_s > EVALUATION_STALL_S:
            raise PeerLost(
                f"evaluation {job_id} made no progress for {EVALUATION_STALL_S:g} s; the feeder "
                f"waited on {waiting_on}"
            )


def main() -> None:
    """`python -m slipstream.rollout.feeder SPEC.json`."""
    spec = FeederSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    run_process("feeder", spec.run_dir, feed(spec))


if __name__ == "__main__":
    main()
