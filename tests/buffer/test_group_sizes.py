"""Groups of any size in the buffer: none at all (skipped), and hundreds across workers."""

from pathlib import Path

import numpy as np
import pytest
from slipstream.buffer.audit import audit
from slipstream.buffer.client import BufferClient
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.events import Finished
from slipstream.buffer.journal import Journal
from slipstream.buffer.messages import (
    Batch,
    CheckpointSaved,
    PublishVersion,
    PutPrompts,
    TakeGroups,
)

from .conftest import SpecMaker, running
from .make import manifest, ticket, trajectory, version
from .test_journal import ask, run_step


def test_a_skipped_prompt_is_accounted_for_and_stays_skipped_in_every_lineage(
    make_spec: SpecMaker, tmp_path: Path
) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    run_step(coordinator, 1)
    ask(coordinator, CheckpointSaved(version=version(1)))
    ask(coordinator, PutPrompts(tickets=(ticket(2, num_samples=0),)))
    assert run_step(coordinator, 2) == [3, 4]
    coordinator.close()
    resumed = Coordinator(make_spec(branch=1, resume_from=(0, 1)), 0.0)
    assert resumed.replay.state.groups[2].drop_reason == "skipped"
    assert not resumed.replay.state.counts["WAITING"]
    ask(resumed, PublishVersion(manifest=manifest(1, branch=1)))
    ask(resumed, TakeGroups(step=2, request_id="again", wait_s=0))
    resumed.close()
    report = audit(tmp_path, range(5))
    assert report.ok, report.faults
    assert report.lines()[0] == "issued 5 = 2 trained + 2 TAKEN + 1 dropped(skipped)"


async def test_a_group_of_hundreds_is_assembled_across_workers(make_spec: SpecMaker) -> None:
    spec, size = make_spec(prompts_per_step=1), 300
    async with (
        running(spec) as client,
        BufferClient(spec.endpoint, spec.run_id, "worker-1", timeout_s=10) as other,
    ):
        assert (await client.put_prompts([ticket(0, num_samples=size)])).count == 1
        await client.publish(manifest(0))
        seen: list[int] = []
        for number in range(10):
            worker = other if number % 2 else client
            claims = await worker.claim(version(0), 37)
            for claim in claims.claims:
                seen += claim.indices
                for index in claim.indices:
                    await worker.finish(trajectory(0, index), claim.lease_id)
        assert sorted(seen) == list(range(size))
        batch = await client.take(1, wait_s=5)
        assert isinstance(batch, Batch)
        assert [s.trajectory.index for s in batch.groups[0].samples] == list(range(size))


def test_the_ledger_keeps_the_gradient_norm_proxy_of_each_sample(
    make_spec: SpecMaker, tmp_path: Path
) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    run_step(coordinator, 1)
    coordinator.close()
    journal = Journal(tmp_path, writable=False)
    norms = [event.facts.score_norm for event in journal.events() if isinstance(event, Finished)]
    journal.close()
    logprobs = trajectory(0, 0).behaviour_logprobs
    assert norms == pytest.approx([float((1 - np.exp(logprobs)).sum())] * 4)
