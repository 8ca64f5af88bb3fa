"""The copy of a run elsewhere: whole at any moment, and enough to go on from."""

import asyncio
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from slipstream.buffer import copies
from slipstream.buffer.audit import audit
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.copies import copy_run
from slipstream.buffer.journal import Journal
from slipstream.buffer.messages import CheckpointSaved, PublishVersion
from slipstream.buffer.service import BufferService

from .conftest import SpecMaker, running
from .make import manifest, version
from .test_journal import ask, run_step


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder beside which there is room for the copy."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "run.json").write_text("{}")
    (folder / "logs").mkdir()
    return folder


def save(coordinator: Coordinator, run_dir: Path, step: int) -> tuple[int, int]:
    """A checkpoint of a step; what is sealed, and the sequence of the ledger then."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}.b0"
    folder.mkdir(parents=True)
    manifest = {"step": step, "journal_sequence": coordinator.journal.sequence}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ask(coordinator, CheckpointSaved(version=version(step)))
    return coordinator.journal.segments.seal(), coordinator.journal.sequence


def test_a_run_goes_on_from_its_copy_when_the_original_is_lost(
    make_spec: SpecMaker, run_dir: Path, tmp_path: Path
) -> None:
    copy, coordinator = tmp_path / "copy", Coordinator(make_spec(run_dir=run_dir), 0.0)
    at: list[tuple[int, int]] = []
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    for step in (1, 2, 3):
        run_step(coordinator, step)
        at.append(save(coordinator, run_dir, step))
        if step == 1:
            copy_run(run_dir, copy, *at[0])
    copy_run(run_dir, copy, *at[1])  # the run has gone on meanwhile, to a later checkpoint even
    shutil.rmtree(run_dir)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [
        "step-000001.b0", "step-000002.b0",
    ]  # fmt: skip
    assert sorted(path.name for path in copy.iterdir()) == [
        "checkpoints", "ledger.sqlite", "model", "proof.jsonl", "run.json", "segments",
    ]  # fmt: skip
    assert audit(copy, range(4)).ok
    resumed = Coordinator(make_spec(run_dir=copy, branch=1, resume_from=(0, 2)), 0.0)
    ask(resumed, PublishVersion(manifest=manifest(2, branch=1)))
    assert run_step(resumed, 3, branch=1) == [4, 5]
    resumed.close()
    report = audit(copy, range(6))
    assert report.ok, report.faults
    assert (report.trained, report.taken) == (4, 2)


def test_a_copy_that_is_cut_short_leaves_the_one_before_it_usable(
    make_spec: SpecMaker, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, coordinator = tmp_path / "copy", Coordinator(make_spec(run_dir=run_dir), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    run_step(coordinator, 1)
    copy_run(run_dir, copy, *save(coordinator, run_dir, 1))
    run_step(coordinator, 2)
    shutil.rmtree(run_dir / "checkpoints" / "step-000001.b0")
    at = save(coordinator, run_dir, 2)
    coordinator.close()
    calls, sync = 0, copies._sync

    for cut in range(20):
        calls = 0

        def dying(path: Path, cut: int = cut) -> None:
            nonlocal calls
            calls += 1
            if calls > cut:
                raise OSError("the machine is gone")
            sync(path)

        monkeypatch.setattr(copies, "_sync", dying)
        trial = tmp_path / f"trial-{cut}"
        shutil.copytree(copy, trial)
        try:
            copy_run(run_dir, trial, *at)
            done = True
        except OSError:
            done = False
        manifests = trial.glob("checkpoints/*/manifest.json")
        saved = sorted(json.loads(path.read_text())["step"] for path in manifests)
        assert saved == [2] if done else 1 in saved
        assert audit(trial, range(4 if done else 2)).ok
        journal = Journal(trial, writable=False)
        assert (journal.sequence >= at[1]) == done, "old with old: never a new checkpoint alone"
        journal.close()
        if done:
            break
    else:
        pytest.fail("never got to the end")
    assert cut >= 4, "a segment, a checkpoint, run.json's siblings and the ledger"


async def test_the_service_copies_with_each_checkpoint_and_tells_of_failure(
    make_spec: SpecMaker, run_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    target.write_text("a file is in the way")
    spec = make_spec({"copy_to": str(target)}, run_dir=run_dir)
    async with running(spec) as client:
        await client.publish(manifest(0))
        await client.checkpoint_saved(version(0))
        told: list[str] = []
        for _ in range(100):
            await asyncio.sleep(0.02)
            if told := (await client.stats()).waits:
                break
        assert any("buffer.copy_to) failed" in line for line in told)
        target.unlink()
        await client.checkpoint_saved(version(0))
        for _ in range(100):
            await asyncio.sleep(0.02)
            if not (await client.stats()).waits:
                break
        assert (target / "ledger.sqlite").exists()
    with sqlite3.connect(target / "ledger.sqlite") as ledger:
        assert ledger.execute("SELECT count(*) FROM events").fetchone()[0] >= 2


def test_a_damaged_checkpoint_is_told_and_does_not_end_the_service(
    make_spec: SpecMaker, run_dir: Path, tmp_path: Path
) -> None:
    service = BufferService(make_spec({"copy_to": str(tmp_path / "copy")}, run_dir=run_dir))
    folder = run_dir / "checkpoints" / "step-000001.b0"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    service._copy(sealed_before=1, sequence=service.coordinator.journal.sequence)
    assert "buffer.copy_to) failed" in service.coordinator.copy_problem
    service.coordinator.close()
