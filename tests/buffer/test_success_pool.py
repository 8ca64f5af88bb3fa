"""Demonstrations: an earlier success of a prompt whose group had none."""

import contextlib
import sqlite3
from pathlib import Path

import msgspec
import pytest
from slipstream.buffer.audit import audit
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.events import decode_event, encode_event
from slipstream.buffer.messages import (
    Batch,
    CheckpointSaved,
    Claims,
    ClaimSamples,
    FinishSamples,
    PublishVersion,
    PutPrompts,
    TakeGroups,
)
from slipstream.buffer.records import Ticket

from .conftest import SpecMaker
from .make import manifest, prompt, ticket, trajectory, version
from .test_journal import ask

POOL = {"demonstrations_per_step": 1, "max_staleness_steps": 8}


class Run:
    """A run of one group a step, whose prompts come round again: uid u is prompt u % 2."""

    def __init__(self, spec, branch: int = 0, at: int = 0) -> None:
        self.branch = branch
        self.coordinator = Coordinator(spec, 0.0)
        ask(self.coordinator, PublishVersion(manifest=manifest(at, branch)))

    def finish(self, uid: int, rewards: tuple[float, float]) -> None:
        """Put, claim and hand in one group; without a signal it is dropped."""
        base = msgspec.structs.replace(prompt(uid), source_id=f"p/{uid % 2}")
        ask(self.coordinator, PutPrompts(tickets=(Ticket(prompt=base, sizing=ticket(0).sizing),)))
        newest = self.coordinator.replay.state.newest
        assert newest is not None
        claims = ask(
            self.coordinator,
            ClaimSamples(worker="w", serving=newest, max_samples=2, request_id=f"{uid}"),
        )
        assert isinstance(claims, Claims)
        (claim,) = claims.claims
        assert claim.ticket.prompt.uid == uid
        samples = [
            trajectory(
                uid, i, (newest.step,) * 3, attempt=claim.attempt, branch=newest.branch, value=r
            )
            for i, r in enumerate(rewards)
        ]
        ask(
            self.coordinator,
            FinishSamples(trajectories=tuple(samples), lease_ids=(claim.lease_id,) * 2),
        )

    def take(self, step: int) -> list[tuple[int, int]]:
        """Take and publish; (uid, index) of the demonstrations."""
        request = TakeGroups(step=step, request_id="a", wait_s=0)
        batch, again = ask(self.coordinator, request), ask(self.coordinator, request)
        assert isinstance(batch, Batch)
        assert isinstance(again, Batch)
        shown = [(each.uid, each.index) for each in batch.demonstrations]
        assert shown == [(each.uid, each.index) for each in again.demonstrations]
        ask(self.coordinator, PublishVersion(manifest=manifest(step, self.branch)))
        return shown


@pytest.fixture
def history(make_spec: SpecMaker) -> Run:
    """Prompt 0 succeeds in step 1, then fails twice while prompt 1 is trained."""
    run = Run(make_spec(POOL, prompts_per_step=1))
    run.finish(0, (1.0, 0.0))
    assert run.take(1) == []
    ask(run.coordinator, CheckpointSaved(version=version(1)))
    run.finish(1, (0.0, 0.5))
    run.finish(2, (0.0, 0.0))
    return run


def test_a_prompt_without_a_success_is_shown_its_earlier_one_once(history: Run) -> None:
    assert history.take(2) == [(0, 0)]
    history.finish(3, (0.5, 0.0))  # of prompt 1, which never succeeded
    assert history.take(3) == []
    history.finish(4, (0.1, 0.0))  # taken, and still without a success
    assert history.take(4) == []
    history.finish(5, (1.0, 0.0))
    assert history.take(5) == [(0, 0)], "wanted since step 4"


def test_no_step_gets_more_demonstrations_than_its_cap_and_none_is_lost(history: Run) -> None:
    history.finish(3, (0.2, 0.0))
    history.finish(4, (0.0, 0.0))
    assert [history.take(2), history.take(3)] == [[(0, 0)], [(0, 0)]]


def test_a_resume_shows_again_what_the_lost_steps_showed(
    history: Run, make_spec: SpecMaker
) -> None:
    first = history.take(2)
    history.coordinator.close()
    spec = make_spec(POOL, prompts_per_step=1, branch=1, resume_from=(0, 1))
    resumed = Run(spec, branch=1, at=1)
    assert resumed.coordinator.replay.state.groups[2].state == "DROPPED"
    assert resumed.take(2) == first == [(0, 0)]
    resumed.coordinator.close()


def test_demonstrations_have_their_own_row_in_the_audit(history: Run, tmp_path: Path) -> None:
    history.take(2)
    history.coordinator.close()
    report = audit(tmp_path, range(3))
    assert report.ok, report.faults
    assert (report.demonstrations, report.trained + report.taken) == (1, 2)
    assert "1 demonstrations" in report.lines()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        where = "FROM events WHERE kind = 'show'"
        ((sequence, body),) = database.execute(f"SELECT sequence, body {where}").fetchall()
        other = msgspec.structs.replace(decode_event(body), success=(1, 1))  # of another prompt
        database.execute(
            "UPDATE events SET body = ? WHERE sequence = ?", (encode_event(other), sequence)
        )
        database.commit()
    assert "is not a success of the same prompt" in audit(tmp_path, range(3)).line


def test_without_a_cap_nothing_is_remembered(make_spec: SpecMaker) -> None:
    run = Run(make_spec(prompts_per_step=1))
    run.finish(0, (1.0, 0.0))
    run.take(1)
    assert not run.coordinator.replay.state.successes
    run.coordinator.close()
