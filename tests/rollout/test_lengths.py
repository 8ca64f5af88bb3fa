"""What cutting and shaping long answers does to the update, exactly, on a softmax over answers of
known lengths: without bias for the objective that it names, and so far from the uncut one."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from slipstream.buffer.records import Completion
from slipstream.learner.advantage import group_advantages, spare_advantages
from slipstream.rollout.rewards.shaping import Length

LENGTH_K = np.array([2, 2, 6, 6, 12, 12])
CORRECT_K = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
PI_K = np.array([0.15, 0.25, 0.15, 0.15, 0.2, 0.1])
"""Longer answers are right more often: what cutting takes away."""
G = 4
SHAPING = Length(target=6, limit=12)

Rewards = Callable[[], np.ndarray]


def uncut() -> np.ndarray:
    return CORRECT_K


def cut() -> np.ndarray:
    """`length_quantile`, `length_schedule`: the answers of 12 end at 6, and have no answer then."""
    return CORRECT_K * (LENGTH_K <= 6)


def shaped() -> np.ndarray:
    """DAPO's overlong punishment: `length` minus 1 beside the reward."""
    made = [SHAPING.score(Completion(text="", token_ids=(0,) * int(n))) for n in LENGTH_K]
    return CORRECT_K + np.array(made) - 1.0


def gradient(values_K: np.ndarray) -> np.ndarray:
    """Of E value, in the logits: pi (value - E value)."""
    return PI_K * (values_K - PI_K @ values_K)


def expected_update(rewards_K: np.ndarray) -> np.ndarray:
    """Of a group of G by `leave_one_out`, over every outcome."""
    total = np.zeros(len(PI_K))
    scores_KK = np.eye(len(PI_K)) - PI_K
    for outcome in itertools.product(range(len(PI_K)), repeat=G):
        chosen = list(outcome)
        advantages_G = group_advantages(rewards_K[chosen].tolist(), "leave_one_out")
        total += PI_K[chosen].prod() * advantages_G @ scores_KK[chosen] / G
    return total


RULES: dict[str, Rewards] = {"neither": uncut, "cut": cut, "shaped": shaped}


@pytest.mark.parametrize("rule", RULES)
def test_the_update_is_the_gradient_of_the_objective_that_the_rule_names(rule):
    rewards_K = RULES[rule]()
    assert expected_update(rewards_K) == pytest.approx(gradient(rewards_K), abs=1e-12)


def test_the_documented_biases_of_cutting_and_shaping_are_the_exact_ones():
    page = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text()
    rows = {row[1].strip(): [float(cell) for cell in row[2:4]] for line in page.splitlines()
            if len(row := line.split("|")) == 5 and row[1].strip() in RULES}  # fmt: skip
    true_K, length_K = gradient(CORRECT_K), gradient(LENGTH_K.astype(float))
    exact = {
        rule: [update @ true_K / (true_K @ true_K), update @ length_K]
        for rule, rewards in RULES.items()
        for update in [expected_update(rewards())]
    }
    assert {rule: [round(value, 2) for value in values] for rule, values in exact.items()} == rows
    assert exact["neither"][0] == pytest.approx(1)
    assert exact["cut"][1] < exact["neither"][1], "cutting teaches short answers"


M, SPARES = 5, 1


def spared(chosen: list[int], weight: float) -> np.ndarray:
    """[samples] weights on the scores of a group whose first M - SPARES samples to finish are
    needed: the shortest, equal ones by index. Without a `weight` the others are cut."""
    fast = sorted(range(M), key=lambda i: (LENGTH_K[chosen[i]], i))
    needed = np.isin(range(M), fast[: M - SPARES])
    kept = needed | (weight > 0)
    rewards = CORRECT_K[chosen][kept].tolist()
    made = np.zeros(M)
    made[kept] = spare_advantages(rewards, needed[kept], M, weight) / M
    return np.where(needed, 1.0, weight) * made


def first_alone(chosen: list[int]) -> np.ndarray:
    """The first to finish as if they were the group."""
    return spared(chosen, 0.0) * M * (M - 1) / ((M - SPARES) * (M - SPARES - 1))


def fewer(chosen: list[int]) -> np.ndarray:
    """A group that has no spare samples, and is as small as the needed ones."""
    needed = chosen[: M - SPARES]
    made = group_advantages(CORRECT_K[needed].tolist(), "leave_one_out") / len(needed)
    return np.append(made, np.zeros(SPARES))


def moments(rule: Callable[[list[int]], np.ndarray]) -> tuple[np.ndarray, float]:
    """Expectation of a rule's update over every outcome, and of its square."""
    mean, square, scores_KK = np.zeros(len(PI_K)), 0.0, np.eye(len(PI_K)) - PI_K
    for outcome in itertools.product(range(len(PI_K)), repeat=M):
        chosen = list(outcome)
        update = rule(chosen) @ scores_KK[chosen]
        mean += PI_K[chosen].prod() * update
        square += PI_K[chosen].prod() * update @ update
    return mean, square


def test_cutting_stragglers_is_biased_by_as_much_as_documented_and_waiting_at_times_is_not():
    page = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text()
    (row,) = [line.split("|") for line in page.splitlines() if line.startswith("| the last of 5")]
    true_K, length_K = gradient(CORRECT_K), gradient(LENGTH_K.astype(float))
    biased, _ = moments(first_alone)
    found = [biased @ true_K / (true_K @ true_K), biased @ length_K]
    assert [round(value, 2) for value in found] == [float(cell) for cell in row[2:4]]
    assert found[1] < 0.9 * true_K @ length_K, "it teaches short answers"
    whole, square = moments(lambda chosen: spared(chosen, 1.0))
    assert whole == pytest.approx(true_K, abs=1e-12)
    noise = square - true_K @ true_K
    told = re.findall(r"([\d.]+) times at `wait_share = ([\d.]+)`", page)
    for factor, share in told:
        share = float(share)
        ways = [moments(lambda chosen, w=w: spared(chosen, w)) for w in (1 / share, 0.0)]
        mean, square = (
            share * waits + (1 - share) * cuts for waits, cuts in zip(*ways, strict=True)
        )
        assert mean == pytest.approx(true_K, abs=1e-12)
        assert f"{(square - true_K @ true_K) / noise:.1f}" == factor
    assert len(told) == 2
    mean, square = moments(fewer)
    (factor,) = re.findall(r"a group of 4\s+has ([\d.]+) times", page)
    assert f"{(square - mean @ mean) / noise:.1f}" == factor
