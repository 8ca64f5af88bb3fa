"""Groups of different sizes in one update: under `aggregation = "prompt"` and the leave-one-out
advantage its expectation is each prompt's true gradient times the prompt's weight, exactly."""

import itertools
import math

import msgspec
import numpy as np
import pytest
from slipstream.learner import objective
from slipstream.learner.batch import samples_of
from slipstream.learner.config import LearnerConfig, ObjectiveConfig
from slipstream.learner.step import _part

SIZES = (2, 3, 5)
WEIGHTS = (1.0, 3.0, 0.5)
RATES = (0.05, 0.4, 0.7)


def config(advantage: str, aggregation: str) -> LearnerConfig:
    chosen = ObjectiveConfig(advantage=advantage, aggregation=aggregation)  # type: ignore[arg-type]
    return LearnerConfig(objective=chosen)


def expected_factors(make, learner: LearnerConfig) -> np.ndarray:
    """[prompts] expected update along g over |g|^2, of the learner's own weights and advantages.

    Exact: every outcome of one prompt's group by its probability, the other groups fixed. A score
    averages g / p for a passing sample and -g / (1 - p) for a failing one.
    """
    rng = np.random.default_rng(0)

    def group(uid: int, rewards):
        made = make.group(
            uid, [make.trajectory(uid, i, rng, reward=r, num_written=1 + i % 2)
                  for i, r in enumerate(rewards)],
        )  # fmt: skip
        weight = msgspec.structs.replace(made.sizing, weight=WEIGHTS[uid])
        return msgspec.structs.replace(made, sizing=weight)

    factors = []
    for uid, (size, p) in enumerate(zip(SIZES, RATES, strict=True)):
        total = 0.0
        for outcome in itertools.product((0.0, 1.0), repeat=size):
            groups = [group(other, [0.0, 1.0] * n if other != uid else outcome)
                      for other, n in enumerate(SIZES)]  # fmt: skip
            samples = samples_of(groups, learner.objective)
            part = _part(samples, len(groups), learner, lambda rows: rows)  # type: ignore
            chance = math.prod(p if r else 1 - p for r in outcome)
            total += chance * sum(
                s.weight * s.advantage / part.denominator
                * (1 / p if s.trajectory.score.value else -1 / (1 - p))
                for s in part.samples if s.trajectory.uid == uid
            )  # fmt: skip
        factors.append(total)
    return np.array(factors)


def test_the_expected_update_is_each_true_gradient_by_its_weight_whatever_the_sizes(make):
    factors = expected_factors(make, config("leave_one_out", "prompt"))
    assert factors / factors[0] == pytest.approx(np.array(WEIGHTS), rel=1e-12)
    assert factors[0] == pytest.approx(1 / (len(SIZES) * 256))


@pytest.mark.parametrize(
    ("advantage", "aggregation"),
    [("group_mean", "prompt"), ("leave_one_out", "token"), ("leave_one_out", "sequence"),
     ("group_std", "prompt")],
)  # fmt: skip
def test_every_other_combination_is_seen_to_be_off(make, advantage, aggregation):
    factors = expected_factors(make, config(advantage, aggregation))
    assert np.abs(factors / factors[0] / np.array(WEIGHTS) - 1).max() > 0.05


def test_samples_without_gradient_leave_the_shares_of_the_others_as_they_are(make):
    group = make.group(
        0, [make.trajectory(0, i, np.random.default_rng(0), reward=r)
            for i, r in enumerate((1.0, 0.0, 0.0, None))],
        s1={"trained": False, "drop_reason": "stale"},
    )  # fmt: skip
    assert [
        (s.trajectory.index, s.share)
        for s in samples_of([group], ObjectiveConfig(advantage="leave_one_out"))
    ] == [
        (0, 1 / 3),
        (2, 1 / 3),
    ]


def test_prompt_weights_divide_by_what_was_decided_before_sampling():
    assert objective.prompt_weights([0.5, 0.5, 0.25], 2, 64) == ([0.5, 0.5, 0.25], 128.0)
