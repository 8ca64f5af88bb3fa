"""A run that is killed and resumed is the run that was not: the same samples, the same losses.

At S = 0 in float64, with one worker that decodes one sample at a time, nothing depends on time, so
equal means equal to the last bit. (Samples decoded together share matrix products: their
log-probabilities would differ in rounding by who happens to be in the batch.)
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from slipstream.configs.rollouts import read_rollouts

STEPS, KILL_AT = 12, 5
START_DEADLINE_S = 150.0


def losses(run_dir: Path) -> dict[int, float]:
    """By step; of a step that was trained twice, the later line is of the final lineage."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row := json.loads(line))["step"]: row["loss"] for line in lines}


def sampled(run_dir: Path, step: int) -> list[tuple[Any, ...]]:
    """Whose samples a step trained on, and what the policy wrote in them."""
    return [
        (t.uid, t.attempt, t.index, t.token_ids.tolist())
        for r in read_rollouts(run_dir, step, "all")
        if r.entry.decision is not None and (t := r.trajectory)
    ]


def run_file(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def kill_learner_at(run_dir: Path, step: int, supervisor: Any, name: str = "learner") -> None:
    """kill -9 as soon as the metrics show the step."""
    deadline = time.monotonic() + START_DEADLINE_S
    while max(losses(run_dir), default=0) < step:
        assert supervisor.process.poll() is None, supervisor.output.read_text()
        assert time.monotonic() < deadline, f"no step {step} within {START_DEADLINE_S:.0f} s"
        time.sleep(0.02)
    os.kill(int((run_dir / "processes" / f"{name}.pid").read_text()), signal.SIGKILL)


def test_a_run_whose_learner_is_killed_repeats_the_losses_of_an_uninterrupted_one(
    system,
):
    system.make_inputs(torch.float64)
    system.experiment(steps=STEPS, dtype="float64", max_concurrent=1, checkpoint_every=3)
    whole, killed = system.folder / "whole", system.folder / "killed"
    # The slow reward gives the same values; it paces the run, so that the kill lands inside it.
    supervisor = system.start(
        "run", "experiment.toml", "reward.name=reward.py:slow", "--output", "killed", "--no-export"
    )
    uninterrupted = system.start("run", "experiment.toml", "--output", "whole", "--no-export")
    kill_learner_at(killed, KILL_AT, supervisor)
    assert "learner: was killed by SIGKILL" in supervisor.ended()
    uninterrupted.ended()
    assert run_file(killed)["branches"][1]["parent"][1] in (3, 6, 9)
    assert losses(killed) == losses(whole)
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        assert sampled(killed, step) == sampled(whole, step), f"step {step}"
    assert all(run_file(run_dir)["result"]["audit"]["ok"] for run_dir in (whole, killed))


@pytest.mark.slow
def test_a_run_of_two_ranks_that_loses_one_repeats_the_losses_of_one_that_did_not(system):
    system.make_inputs(torch.float64)
    system.experiment(steps=6, dtype="float64", max_concurrent=1, checkpoint_every=2)
    whole, killed = system.folder / "whole", system.folder / "killed"
    ranks = "cluster.learner_ranks=2"
    system.start("run", "experiment.toml", ranks, "--output", "whole", "--no-export").ended()
    supervisor = system.start(
        "run", "experiment.toml", ranks, "reward.name=reward.py:slow", "--output", "killed"
    )
    kill_learner_at(killed, 3, supervisor, "learner-1")
    assert "learner-1: was killed by SIGKILL" in supervisor.ended()
    assert losses(killed) == losses(whole)
    assert list(losses(whole)) == list(range(1, 7))
    result = run_file(killed)["result"]
    assert result["audit"]["ok"]
    assert result["export"]["ok"]  # a checkpoint of two ranks, as one model
