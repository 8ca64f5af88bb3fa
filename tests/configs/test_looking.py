"""`slipstream buffer`: what is shown is what the ledger says."""

import json
from pathlib import Path

import pytest
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.errors import ConfigError, CorruptData
from slipstream.buffer.messages import (
    Claims,
    ClaimSamples,
    FinishSamples,
    PublishVersion,
    PutPrompts,
)
from slipstream.configs.load import load_table
from slipstream.configs.looking import look
from slipstream.configs.run_dir import create_run_dir

from ..buffer.make import manifest, ticket, trajectory, version


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose buffer has put 5 prompts of 2 samples, of which worker-0 holds some."""
    given = ["learner.prompts_per_step=2", "rollout.samples_per_prompt=2"]
    place = create_run_dir(load_table({}, given), tmp_path / "run")
    spec = ServiceSpec(
        run_id=json.loads((place / "run.json").read_text())["run_id"],
        run_dir=place, endpoint="ipc://unused", config=BufferConfig(), prompts_per_step=2,
        branch=0, branch_parents={}, resume_from=None,
    )  # fmt: skip
    coordinator = Coordinator(spec, 0.0)
    for request in (
        PutPrompts(tickets=tuple(ticket(uid) for uid in range(5)), wait_s=0.0),
        PublishVersion(manifest=manifest(0)),
    ):
        coordinator.answer(request, 0.0, final=True)
    claims = coordinator.answer(
        ClaimSamples(
            worker="worker-0", serving=version(0), max_samples=6, wait_s=0.0, request_id="a"
        ),
        0.0,
        final=True,
    )
    assert isinstance(claims, Claims)
    first = next(each for each in claims.claims if each.ticket.prompt.uid == 0)
    finished = tuple(trajectory(0, index) for index in first.indices)
    coordinator.answer(
        FinishSamples(trajectories=finished, lease_ids=(first.lease_id,) * len(finished)),
        0.0,
        final=True,
    )
    coordinator.commit()
    coordinator.close()
    return place


def test_states_law_lags_and_leases_are_those_of_the_ledger(run_dir: Path) -> None:
    said = "\n".join(look(run_dir))
    assert "3 WAITING, 1 INFLIGHT, 1 READY" in said or "2 WAITING, 2 INFLIGHT, 1 READY" in said
    assert "READY: 1 at lag 0" in said
    assert "worker-0: " in said
    assert "the oldest under version 0" in said
    assert "samples dropped: none" in said


def test_looking_changes_nothing(run_dir: Path) -> None:
    before = (run_dir / "ledger.sqlite").read_bytes()
    assert look(run_dir) == look(run_dir)
    assert (run_dir / "ledger.sqlite").read_bytes() == before


def test_a_folder_without_a_run_and_a_ledger_that_is_none_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        look(run_dir.parent)
    for file in run_dir.glob("ledger.sqlite*"):
        file.unlink()
    with pytest.raises(CorruptData, match=r"ledger\.sqlite is missing"):
        look(run_dir)
    (run_dir / "ledger.sqlite").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(CorruptData, match="is not a ledger"):
        look(run_dir)
