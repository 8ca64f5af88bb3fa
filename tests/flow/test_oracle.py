"""At S = 0 the distributed system equals the one-file oracle: samples, rewards and losses.

The system runs as a user runs it, with all its processes; the oracle runs beside it on the same
model folder and prompts. Planted errors show that the comparison can fail.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from slipstream.configs.rollouts import read_rollouts

HERE = Path(__file__).parent


def load_oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle", HERE / "oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def run_system(system: Any, plant: str = "") -> Path:
    """Run the experiment in processes of its own, with an error planted in the learner."""
    system.start("run", "experiment.toml", "--output", "run", "--no-export", plant=plant).ended()
    return system.folder / "run"


def run_oracle(
    system: Any, *, steps: int, dtype: torch.dtype, truncated: bool = False, refill: bool = False,
    recorded: dict[tuple[int, int], list[int]] | None = None,
):  # fmt: skip
    return oracle.run(
        oracle.OracleConfig(
            model_dir=system.folder / "model",
            prompts_file=system.folder / "prompts.jsonl",
            dtype=dtype,
            seed=3,
            steps=steps,
            prompts_per_step=system.prompts_per_step,
            samples_per_prompt=system.samples_per_prompt,
            max_new_tokens=system.max_new_tokens,
            temperature=0.9,
            top_k=12 if truncated else 0,
            top_p=0.9 if truncated else 1.0,
            learning_rate=1e-3,
            warmup_steps=4,
            max_grad_norm=0.3,
            drop_no_signal=refill,
            recorded=recorded,
        )
    )


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_equal(run_dir: Path, expected: list[dict], tolerance: float) -> None:
    assert losses(run_dir) == pytest.approx([e["loss"] for e in expected], abs=tolerance, rel=0)
    for entry in expected:
        taken = [
            rollout
            for rollout in read_rollouts(run_dir, entry["step"], "all")
            if rollout.entry.decision is not None
        ]
        wanted = [
            (group["uid"], index, tokens, reward)
            for group in entry["groups"]
            for index, (tokens, reward) in enumerate(
                zip(group["tokens"], group["rewards"], strict=True)
            )
        ]
        assert [(r.trajectory.uid, r.trajectory.index) for r in taken] == [w[:2] for w in wanted]
        for rollout, (_, _, tokens, reward) in zip(taken, wanted, strict=True):
            trajectory = rollout.trajectory
            assert trajectory.token_ids[trajectory.policy_mask].tolist() == tokens
            assert trajectory.score.value == pytest.approx(reward, abs=tolerance, rel=0)


@pytest.mark.parametrize(
    ("workers", "truncated"),
    [
        pytest.param(1, False, id="one-whole", marks=pytest.mark.slow),
        pytest.param(2, True, id="two-truncated"),
        pytest.param(1, True, id="one-truncated", marks=pytest.mark.slow),
        pytest.param(2, False, id="two-whole", marks=pytest.mark.slow),
    ],
)
def test_thirty_steps_in_float64_equal_the_oracle(system, workers, truncated):
    system.make_inputs(torch.float64)
    refill = truncated  # the truncated arm also refills groups without signal
    system.experiment(
        steps=30, dtype="float64", workers=workers, truncated=truncated, refill=refill
    )
    run_dir = run_system(system)
    expected = run_oracle(system, steps=30, dtype=torch.float64, truncated=truncated, refill=refill)
    assert_equal(run_dir, expected, 1e-9)


def test_first_five_steps_in_float32_equal_the_oracle(system):
    system.make_inputs(torch.float32)
    system.experiment(steps=5, dtype="float32", workers=2)
    run_dir = run_system(system)
    expected = run_oracle(system, steps=5, dtype=torch.float32)
    assert_equal(run_dir, expected, 1e-5)


PLANTS = {
    "advantage": """
import slipstream.learner.advantage as module
module.EPS = 0.05
""",
    "mask shift": """
import dataclasses, slipstream.learner.batch as module
lay_out = module.lay_out
def shifted(rows):
    layout = lay_out(rows)
    return dataclasses.replace(layout, positions_T=(layout.positions_T - 1).clamp(min=0))
module.lay_out = shifted
""",
    "loss scaling": """
import slipstream.learner.objective as module
token_weights = module.token_weights
def scaled(counts, aggregation):
    weights, denominator = token_weights(counts, aggregation)
    return weights, denominator + 1
module.token_weights = scaled
""",
    "optimizer order": """
from slipstream.learner.policy import Policy
update = Policy.update
def with_the_rate_of_the_step_before(self, rate, norm):
    update(self, self.__dict__.setdefault("late", rate), norm)
    self.late = rate
Policy.update = with_the_rate_of_the_step_before
""",
}
REST = ("advantage", "loss scaling", "optimizer order")
"""In `make test-long`: 20 s each."""


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(plant, id=name, marks=[pytest.mark.slow] if name in REST else [])
        for name, plant in PLANTS.items()
    ],
)
def test_a_planted_error_in_the_learner_differs_from_the_oracle(system, plant):
    system.make_inputs(torch.float64)
    system.experiment(steps=4, dtype="float64")
    run_dir = run_system(system, plant)
    expected = run_oracle(system, steps=4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_equal(run_dir, expected, 1e-9)
