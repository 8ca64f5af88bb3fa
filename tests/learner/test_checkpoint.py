"""A checkpoint counts when it is whole, and only then; `kill -9` at any moment leaves one."""

import asyncio
import json
import os
import random
import signal
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slipstream.buffer.errors import ConfigError, CorruptData, TrainingFailed
from slipstream.buffer.records import Version
from slipstream.learner import checkpoint as module
from slipstream.learner import shards
from slipstream.learner.checkpoint import (
    complete_folders,
    find_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from slipstream.learner.config import CheckpointConfig
from slipstream.learner.policy import weights_digest
from slipstream.learner.trainer import Trainer

BYTES = {"weights.safetensors": b"w" * 1000, "optimizer.safetensors": b"o" * 500}


def save(root, step, branch=0, keep_last=2, content=BYTES, keep=lambda branch, step: False):
    return save_checkpoint(
        root,
        Version(branch=branch, step=step, digest=f"d{step}"),
        {name: (lambda path, b=b: path.write_bytes(b)) for name, b in content.items()},
        journal_sequence=step,
        info={"run_id": "r"},
        keep_last=keep_last,
        keep=keep,
    )


def test_what_was_saved_is_what_is_read(tmp_path):
    saved = save(tmp_path, 10)
    assert read_checkpoint(tmp_path / "step-000010.b0") == saved
    assert find_checkpoint(tmp_path) == (saved, [])
    assert find_checkpoint(tmp_path, (0, 10))[0].version.digest == "d10"


def test_the_newest_is_of_the_newest_branch_then_step(tmp_path):
    for step, branch in ((10, 0), (20, 0), (12, 1)):
        save(tmp_path, step, branch, keep_last=9)
    names = [folder.name for folder in complete_folders(tmp_path)]
    assert names == ["step-000012.b1", "step-000020.b0", "step-000010.b0"]


def test_the_last_ones_and_the_first_are_kept(tmp_path):
    for step in (0, 2, 4, 6):
        save(tmp_path, step)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "step-000000.b0",
        "step-000004.b0",
        "step-000006.b0",
    ]


def test_no_checkpoint_is_the_users_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "999 bytes of 1000: it was cut short"),
        (lambda f: f.write_bytes(b"x" + f.read_bytes()[1:]), "was altered"),
        (lambda f: f.unlink(), "is missing"),
        (lambda f: (f.parent / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (
            lambda f: (f.parent / "manifest.json").write_text(
                (f.parent / "manifest.json").read_text().replace('"step": 4', '"step": 5')
            ),
            "manifest.json was altered",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, words):
    older, newer = save(tmp_path, 2), save(tmp_path, 4)
    damage(newer.folder / "weights.safetensors")
    found, problems = find_checkpoint(tmp_path)
    assert found == older
    assert len(problems) == 1
    assert words in problems[0]
    with pytest.raises(CorruptData, match="no usable checkpoint"):
        find_checkpoint(tmp_path, (0, 4))


def test_a_checkpoint_of_steps_that_the_ledger_has_not_seen_is_passed_over(tmp_path):
    older, newer = save(tmp_path, 2), save(tmp_path, 4)
    found, problems = find_checkpoint(tmp_path, ledger_sequence=newer.journal_sequence)
    assert (found, problems) == (newer, [])
    found, problems = find_checkpoint(tmp_path, ledger_sequence=newer.journal_sequence - 1)
    assert found == older
    assert "is newer than the ledger beside it" in problems[0]


POINTS = [
    "checkpoint.begun",
    "checkpoint.folder_made",
    "checkpoint.file_written.weights.safetensors",
    "checkpoint.file_synced.weights.safetensors",
    "checkpoint.file_written.optimizer.safetensors",
    "checkpoint.file_synced.optimizer.safetensors",
    "checkpoint.files_synced",
    "checkpoint.manifest_drafted",
    "checkpoint.manifest_written",
    "checkpoint.manifest_renamed",
    "checkpoint.folder_synced",
    "checkpoint.manifest_synced",
    "checkpoint.pruning",
    "checkpoint.pruned",
]


def killed(work, point, monkeypatch):
    """Run `work` in a forked process that is killed at `point`; it must get there."""
    monkeypatch.setenv(module.CRASH_VARIABLE, point)
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    monkeypatch.delenv(module.CRASH_VARIABLE)
    assert os.WIFSIGNALED(status), f"{point} was never reached"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, point):
    for step in (0, 2, 4):
        save(tmp_path, step)
    killed(lambda: save(tmp_path, 6), point, monkeypatch)
    found, problems = find_checkpoint(tmp_path)
    complete = point in POINTS[POINTS.index("checkpoint.manifest_renamed") :]
    assert (found.version.step, problems) == (6 if complete else 4, [])
    saved = save(tmp_path, 6)  # what the crash left is in nobody's way
    assert find_checkpoint(tmp_path)[0] == saved
    assert len(list(tmp_path.iterdir())) == 3


def into_a_full_disk(path):
    path.symlink_to("/dev/full")
    path.write_bytes(b"w")


def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(tmp_path):
    earlier = save(tmp_path, 2)
    with pytest.raises(TrainingFailed, match=r"No space left .* earlier checkpoint: step-000002"):
        save_checkpoint(
            tmp_path, Version(branch=0, step=4, digest="d"),
            {"weights.safetensors": into_a_full_disk}, journal_sequence=7, info={}, keep_last=2,
        )  # fmt: skip
    assert find_checkpoint(tmp_path) == (earlier, [])
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000002.b0"]


def test_whatever_stops_one_process_from_saving_is_told_to_the_others(tmp_path):
    told = []

    def broken(path):
        raise RuntimeError("the device is gone")

    def exchange(value):
        told.append(value)
        return [value]

    with pytest.raises(TrainingFailed, match="cannot be written: the device is gone"):
        save_checkpoint(
            tmp_path, Version(branch=0, step=4, digest="d"), {"weights.safetensors": broken},
            journal_sequence=7, info={}, keep_last=2, exchange=exchange,
        )  # fmt: skip
    assert told == [None, "the device is gone"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file, where the folder should be")
    with pytest.raises(TrainingFailed, match=r"checkpoints.* cannot be written: .*Newest earlier"):
        save(tmp_path / "checkpoints", 2)


def test_a_read_only_folder_is_named_and_the_earlier_checkpoint_is_used():
    """By somebody who is not root, to whom nothing is read-only."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "checkpoints"
        earlier = save(root, 2)
        for path, mode in ((root, 0o555), (Path(place), 0o755)):
            path.chmod(mode)
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.setuid(os.getuid() or 65_534)
                with pytest.raises(TrainingFailed, match=r"denied.*checkpoint: step-000002\.b0"):
                    save(root, 4)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        root.chmod(0o755)
        assert find_checkpoint(root) == (earlier, [])


def test_what_is_to_be_kept_is_kept_beside_the_last(tmp_path):
    for step in (0, 2, 3, 4, 6):
        save(tmp_path, step, keep_last=1, keep=lambda branch, step: step == 3)
    assert [f.name[:11] for f in complete_folders(tmp_path)] == [
        "step-000006",
        "step-000003",
        "step-000000",
    ]


def test_every_nth_and_the_best_checkpoint_are_kept(make_spec, fake_buffer, run_loop):
    spec = make_spec(steps=6)
    kept = CheckpointConfig(every_steps=1, keep_last=1, keep_every_steps=4, keep_best=True)
    spec = spec.model_copy(update={"config": spec.config.model_copy(update={"checkpoint": kept})})
    rows = evaluations({(0, 1): 0.2, (0, 2): 0.9, (0, 3): 0.5})
    (spec.run_dir / "eval.jsonl").write_text(rows + '{"step": 9, "rewa')
    run_loop(spec, fake_buffer())
    assert steps_kept(spec) == [0, 2, 4, 6]


def evaluations(rewards):
    """The lines of eval.jsonl: (branch, step) -> held-out reward."""
    rows = [{"branch": b, "step": s, "reward_mean": r} for (b, s), r in rewards.items()]
    return "".join(json.dumps(row) + "\n" for row in rows)


def steps_kept(spec):
    folders = complete_folders(spec.run_dir / "checkpoints")
    return sorted(int(folder.name[5:11]) for folder in folders)


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ({}, [0, 2, 4, 6]),  # 2, 4 and 6 are still to be scored
        ({(0, 0): 0.1, (0, 2): None}, [0, 4, 6]),
        ({(0, 2): 0.3, (0, 3): 0.9}, [0, 2, 4, 6]),  # no checkpoint of 3 could be kept
        ({(0, 2): 0.3, (0, 4): 0.5}, [0, 4, 6]),
        ({(0, 2): 0.3, (1, 4): 0.5, (0, 6): 0.2}, [0, 2, 6]),  # 4 of another branch
    ],
)
def test_the_best_is_of_what_was_saved_and_nothing_is_removed_before_it_is_scored(
    make_spec, fake_buffer, run_loop, rewards, kept
):
    spec = make_spec(steps=6, eval_every_steps=2)
    saving = CheckpointConfig(every_steps=1, keep_last=1, keep_best=True)
    spec = spec.model_copy(update={"config": spec.config.model_copy(update={"checkpoint": saving})})
    trainer = run_loop(spec, fake_buffer())
    (spec.run_dir / "eval.jsonl").write_text(evaluations(rewards))
    trainer.save()  # once more: the scores that are there now decide what is kept
    assert steps_kept(spec) == kept


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_copied_step(
    make_spec, fake_buffer, run_loop, monkeypatch
):
    spec, buffer, next_step = make_spec(steps=4), fake_buffer(), threading.Event()
    ordinary, waited = shards.write_parts, []
    buffer.on_take = lambda step: next_step.set() if step == 3 else None

    def slow_writer(path, parts):
        if path.parent.name == "step-000002.b0":
            waited.append(next_step.wait(timeout=20))
        ordinary(path, parts)

    monkeypatch.setattr(shards, "write_parts", slow_writer)
    run_loop(spec, buffer)
    assert waited
    assert all(waited), "step 3 was taken only after the checkpoint of step 2 was written"
    assert [v.step for v in buffer.saved] == [0, 2, 4]
    assert buffer.resumable == [0, 2, 2]  # of the two that are kept
    found, _ = find_checkpoint(spec.run_dir / "checkpoints", (0, 2))
    assert weights_digest(load_file(found.folder / "weights.safetensors")) == found.version.digest


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_says_so(
    make_spec, fake_buffer, run_loop, monkeypatch
):
    spec, ordinary = make_spec(steps=6), shards.write_parts

    def writer(path, parts):
        if "000004" in str(path):
            into_a_full_disk(path)
        ordinary(path, parts)

    monkeypatch.setattr(shards, "write_parts", writer)
    with pytest.raises(TrainingFailed, match=r"step-000004.* cannot be written: .*No space"):
        run_loop(spec, fake_buffer())
    assert find_checkpoint(spec.run_dir / "checkpoints")[0].version.step == 2


LOOP_POINTS = [
    "step.taken:2",
    "step.trained:3",
    "publish.file_written:4",
    "publish.announced:2",
    "metrics.written:3",
    "checkpoint.file_made:3",
    "checkpoint.file_synced.optimizer.safetensors:2",
    "checkpoint.manifest_renamed:2",
    "checkpoint.acknowledged:1",
]


def test_resume_after_a_kill_continues_bit_for_bit(
    make_spec, fake_buffer, run_loop, rows_of, monkeypatch
):
    spec = make_spec(steps=5)
    run_loop(spec, fake_buffer())
    want = {step: row["loss"] for step, row in rows_of(spec.run_dir).items()}
    digest = rows_of(spec.run_dir)[5]["digest"]
    for point in LOOP_POINTS:
        run_dir = spec.run_dir.parent / f"run-{point}"
        run_dir.mkdir()
        crashed = spec.model_copy(update={"run_dir": run_dir})
        killed(lambda spec=crashed: run_loop(spec, fake_buffer()), point, monkeypatch)
        found, problems = find_checkpoint(run_dir / "checkpoints")
        assert problems == []
        parent = (0, found.version.step)
        resumed = crashed.model_copy(
            update={"branch": 1, "branch_parents": {1: parent}, "resume_from": parent}
        )
        buffer = fake_buffer()
        torch.manual_seed(99)
        run_loop(resumed, buffer)
        assert str(buffer.published[0].version) == f"1.{found.version.step}"
        assert buffer.published[0].version.digest == found.version.digest
        rows = rows_of(run_dir)
        assert {step: row["loss"] for step, row in rows.items()} == want, point
        assert rows[5]["digest"] == digest


def test_a_checkpoint_holds_what_was_published_and_the_random_state(
    make_spec, fake_buffer, run_loop
):
    spec, buffer = make_spec(steps=2), fake_buffer()
    run_loop(spec, buffer)
    found, _ = find_checkpoint(spec.run_dir / "checkpoints")
    assert found.version == buffer.published[-1].version
    assert found.journal_sequence == 102
    saved = load_file(found.folder / "weights.safetensors")
    sent = load_file(buffer.published[-1].shards[0].path)
    assert saved.keys() == sent.keys()
    assert all(torch.equal(saved[name], sent[name]) for name in saved)
    assert "rng.torch" in load_file(found.folder / "optimizer.safetensors")
    assert [v.step for v in buffer.saved] == [0, 2]


@pytest.mark.slow
def test_of_fifty_saving_processes_killed_at_random_each_leaves_the_newest_complete_checkpoint(
    make_spec, fake_buffer, record_property
):
    """Each resumes from what the one before left, trains and saves without pause, and is killed at
    a moment of a step and its save, however long these take here."""
    spec = make_spec(dtype="float32", max_staleness_steps=10**6)
    rng, newest, reached, cycle_s = random.Random(0), (0, 0), [], 0.1
    Trainer(spec).prepare(threading.Event())
    root = spec.run_dir / "checkpoints"
    parents: dict[int, tuple[int, int]] = {}
    for kill in range(1, 51):
        parents[kill] = newest
        branch = {"branch": kill, "branch_parents": dict(parents), "resume_from": newest}
        resumed = spec.model_copy(update=branch)
        go, told = os.pipe()
        if (child := os.fork()) == 0:
            save_without_pause(resumed, fake_buffer(), told)
        os.close(told)
        assert os.read(go, 1) == b"."  # it is about to train and to save for the first time
        for _ in range(rng.randrange(3)):
            began_s = time.monotonic()
            assert os.read(go, 1) == b"."
            cycle_s = time.monotonic() - began_s
        time.sleep(rng.uniform(0, cycle_s))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        os.close(go)
        whole = [f for f in complete_folders(root) if f.name.endswith(f".b{kill}")]
        found, problems = find_checkpoint(root)
        assert problems == []  # none that counts is damaged
        if whole:
            assert found.folder == whole[0]
        weights = load_file(found.folder / "weights.safetensors")
        assert weights_digest(weights) == found.version.digest
        newest = (found.version.branch, found.version.step)
        reached.append(newest[1])
    assert reached == sorted(reached)  # no checkpoint that was complete is lost
    assert len(set(reached)) > 10
    record_property("steps reached", reached)


def save_without_pause(spec, buffer, told):
    """Never returns; its error would show as an end other than by the kill."""
    try:
        trainer = Trainer(spec)
        trainer.prepare(threading.Event())
        os.write(told, b".")
        while True:
            trainer.train(asyncio.run(buffer.take(trainer.held.step + 1, wait_s=0)))
            trainer.save()
            os.write(told, b".")
    finally:
        os._exit(3)
