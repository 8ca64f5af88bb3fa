"""The audit finds what was planted, and nothing where nothing was."""

import contextlib
import sqlite3
from pathlib import Path

import pytest
from slipstream.buffer import segments
from slipstream.buffer.audit import audit
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.errors import CorruptData
from slipstream.buffer.journal import Journal
from slipstream.buffer.messages import CheckpointSaved, PublishVersion

from .conftest import SpecMaker
from .make import manifest, version
from .test_journal import ask, run_step


@pytest.fixture
def run_dir(make_spec: SpecMaker, tmp_path: Path) -> Path:
    """A run of three steps with a checkpoint after the second."""
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    for step in (1, 2, 3):
        run_step(coordinator, step)
        if step == 2:
            ask(coordinator, CheckpointSaved(version=version(2)))
    coordinator.close()
    return tmp_path


def alter(run_dir: Path, statement: str) -> None:
    """Plant a fault in the ledger."""
    with contextlib.closing(sqlite3.connect(run_dir / "ledger.sqlite")) as database:
        assert database.execute(statement).rowcount == 1
        database.commit()


def test_a_sound_run_adds_up(run_dir: Path) -> None:
    report = audit(run_dir, range(6), max_staleness_steps=1)
    assert report.ok, report.faults
    assert report.lines() == [
        "issued 6 = 4 trained + 2 TAKEN",
        "3 steps, largest lag 0, 0 violations",
        "ok",
    ]


def test_of_a_run_that_is_alive_what_comes_meanwhile_is_not_looked_at(
    run_dir: Path, make_spec: SpecMaker
) -> None:
    journal = Journal(run_dir, writable=False)
    until = journal.sequence
    journal.close()
    resumed = Coordinator(make_spec(branch=1, resume_from=(0, 2)), 0.0)
    ask(resumed, PublishVersion(manifest=manifest(2, branch=1)))
    run_step(resumed, 3, branch=1)
    resumed.close()
    assert audit(run_dir, range(6), until=until).line == "issued 6 = 4 trained + 2 TAKEN"
    assert not audit(run_dir, range(6)).ok


def test_a_resumed_run_adds_up_along_the_surviving_lineage(
    run_dir: Path, make_spec: SpecMaker
) -> None:
    resumed = Coordinator(make_spec(branch=1, resume_from=(0, 2)), 0.0)
    ask(resumed, PublishVersion(manifest=manifest(2, branch=1)))
    run_step(resumed, 3, branch=1)
    resumed.close()
    report = audit(run_dir, range(8))
    assert report.ok, report.faults
    assert (report.trained, report.taken, report.open) == (4, 2, {"READY": 2})


@pytest.mark.parametrize("kind", ["put", "claim", "finish", "take", "step", "publish"])
def test_a_deleted_row_is_found(run_dir: Path, kind: str) -> None:
    alter(
        run_dir,
        "DELETE FROM events WHERE sequence = "
        f"(SELECT MIN(sequence) FROM events WHERE kind = '{kind}')",
    )
    report = audit(run_dir, range(6))
    assert any("rows are missing" in fault for fault in report.faults)


def test_a_deleted_take_is_found_even_when_the_rows_are_renumbered(run_dir: Path) -> None:
    alter(run_dir, "DELETE FROM events WHERE kind = 'take' AND uid = 2")
    with contextlib.closing(sqlite3.connect(run_dir / "ledger.sqlite")) as database:
        rows = database.execute("SELECT sequence FROM events ORDER BY sequence").fetchall()
        for new, (old,) in enumerate(rows, start=1):
            database.execute("UPDATE events SET sequence = ? WHERE sequence = ?", (new, old))
        database.commit()
    report = audit(run_dir, range(6))
    assert not report.ok
    assert report.trained == 3


def test_a_prompt_taken_twice_is_found(run_dir: Path) -> None:
    alter(
        run_dir,
        "INSERT INTO events SELECT (SELECT MAX(sequence) + 1 FROM events), branch, kind, uid, "
        "step, body FROM events WHERE kind = 'take' AND uid = 1",
    )
    report = audit(run_dir, range(6))
    assert "uid 1 is step 1 and step 1" in report.faults


def test_a_skipped_uid_is_found(run_dir: Path) -> None:
    assert "uid 6 is in the stream, put 0 times" in audit(run_dir, range(7)).faults
    assert "uid 5 is not in the stream, put 1 times" in audit(run_dir, range(5)).faults


def test_tokens_over_the_bound_are_found(run_dir: Path) -> None:
    # Version 0's samples trained at step 1 hold lag 0; no bound is below that, so move the step.
    with contextlib.closing(sqlite3.connect(run_dir / "ledger.sqlite")) as database:
        from slipstream.buffer import events

        rows = database.execute("SELECT sequence, body FROM events WHERE kind = 'finish'")
        for sequence, body in rows.fetchall():
            event = events.decode_event(body)
            assert isinstance(event, events.Finished)
            if event.uid == 4:  # its trajectory becomes one that version 0 wrote
                first = database.execute(
                    "SELECT body FROM events WHERE kind = 'finish' AND uid = 0"
                ).fetchone()[0]
                other = events.decode_event(first)
                assert isinstance(other, events.Finished)
                planted = events.Finished(
                    uid=4, index=event.index, payload=other.payload, facts=event.facts
                )
                database.execute(
                    "UPDATE events SET body = ? WHERE sequence = ?",
                    (events.encode_event(planted), sequence),
                )
        database.commit()
    report = audit(run_dir, range(6), max_staleness_steps=1)
    assert report.max_lag == 2
    assert any("step 3 trained" in fault for fault in report.faults)


def test_a_damaged_trajectory_is_found(run_dir: Path) -> None:
    path = run_dir / "segments" / "000001.seg"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert any("step 3: a trained trajectory" in fault for fault in audit(run_dir, range(6)).faults)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match=r"ledger\.sqlite is missing"):
        audit(tmp_path, range(3))


def test_what_no_resume_can_need_is_removed_and_the_books_stay_exact(
    make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 2000)
    coordinator = Coordinator(make_spec({"keep_rollouts_gb": 1e-6}), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    for step in range(1, 9):
        run_step(coordinator, step)
        if step in (4, 6):
            ask(coordinator, CheckpointSaved(version=version(step), resumable_step=4))
            coordinator.commit()
    kept = sorted(path.name for path in (tmp_path / "segments").iterdir())
    coordinator.close()
    assert "000001.seg" not in kept
    report = audit(tmp_path, range(16), max_staleness_steps=1)
    assert report.ok, report.faults
    assert 0 < report.compacted_steps <= 4
    assert (report.trained, report.taken, report.max_lag) == (12, 4, 0)

    last = tmp_path / "segments" / kept[-1]
    last.rename(tmp_path / "away")
    assert "unreadable" in audit(tmp_path, range(16)).line
    (tmp_path / "away").rename(last)
    with pytest.raises(CorruptData, match=r"from step 3 needs rollouts that were removed"):
        Coordinator(make_spec(branch=1, resume_from=(0, 3)), 0.0)
    resumed = Coordinator(make_spec(branch=1, resume_from=(0, 4)), 0.0)
    counts, dropped = resumed.replay.state.counts, resumed.replay.state.dropped
    assert (counts["READY"], counts["WAITING"], dropped["lost"]) == (2, 6, 0)
    resumed.close()
