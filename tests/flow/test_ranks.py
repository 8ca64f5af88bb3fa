"""The quickstart on two learner ranks: it learns, and what it leaves is as ever."""

import json

import pytest


@pytest.mark.slow
def test_the_quickstart_learns_on_two_learner_ranks(system, record_property):
    system.start(
        "run", "quickstart", "cluster.learner_ranks=2", "learner.steps=20", "eval.every_steps=10",
        "--output", "r",
    ).ended(timeout_s=900)  # fmt: skip
    result = json.loads((system.folder / "r" / "run.json").read_text())["result"]
    record_property("held-out reward", [result["reward_first"], result["reward_final"]])
    assert result["reward_rise"] > 0.2
    assert result["reward_final"]["ci95_low"] > result["reward_first"]["ci95_high"]
    assert result["staleness_violations"] == 0
    assert result["logprob_gap_max"] < 1e-4
    assert result["audit"]["ok"]
    assert result["export"]["ok"]
