"""`slipstream doctor`: a run alive or dead, and a machine."""

import json
import os
from pathlib import Path

import pytest
from slipstream.configs.claim import supervising
from slipstream.configs.doctor import machine_report, run_report
from slipstream.configs.load import load_table
from slipstream.configs.run_dir import create_run_dir, end_branch


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    table = {"runs_dir": str(tmp_path), "learner": {"steps": 2}}
    return create_run_dir(load_table(table, name="ill"), None)


def publish(run_dir: Path, name: str, *waits: tuple[str, str, float, float]) -> None:
    keys = ("owner", "what", "waited_s", "deadline_s")
    said = {
        "pid": os.getpid(),
        "beat": 3,
        "loop_silent_s": 0.1,
        "waits": [dict(zip(keys, wait, strict=True)) for wait in waits],
    }
    (run_dir / "processes" / f"{name}.waits.json").write_text(json.dumps(said))


def test_of_a_dead_run_the_last_waits_and_the_resume_line_are_shown(run_dir: Path) -> None:
    publish(run_dir, "learner", ("learner", "the batch of step 3: 1 of 2 READY", 9.0, 600.0))
    end_branch(run_dir, "failed", "learner: was killed", None)
    ok, lines = run_report(run_dir)
    told = "\n".join(lines)
    assert not ok
    assert "not running (failed)" in told
    assert "reason: learner: was killed" in told
    assert "chain: learner <- the batch of step 3: 1 of 2 READY, 9 s" in told
    assert f"slipstream resume {run_dir}" in told


def test_of_a_live_run_who_hangs_is_named(run_dir: Path) -> None:
    publish(run_dir, "worker-0", ("group 7 sample 3", "the engine of worker-0", 412.0, 0.0))
    publish(run_dir, "feeder", ("feeder", "the buffer service to answer PutPrompts", 8.0, 40.0))
    with supervising(run_dir):
        ok, lines = run_report(run_dir)
    assert not ok
    (stalled,) = [line for line in lines if "STALLED" in line]
    assert stalled.startswith("worker-0: ")
    assert "group 7 sample 3 has waited 412 s for the engine of worker-0" in stalled


def test_a_machine_is_looked_at_in_all_that_a_run_needs(tmp_path: Path) -> None:
    ok, lines = machine_report(tmp_path)
    told = "\n".join(lines)
    for word in ("python", "torch", "transformers", "vllm", "shared memory", "disk", "clock",
                 "loopback", "GPU"):  # fmt: skip
        assert word in told
    assert ok == ("BAD" not in told)
