"""Allocations against brute force, the equations behind them against enumeration."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.rollout.allocation import (
    BUDGET_UNITS,
    advantage_mass,
    allocate,
    mixed_probability,
    policy_gradient_loss,
    rejection_variance,
    treatment_sizes,
)

COSTS = st.integers(1, 9).map(float)


def enumerate_sizes(low: int, high: int, costs, budget: float):
    for sizes in itertools.product(range(low, high + 1), repeat=len(costs)):
        if sum(n * cost for n, cost in zip(sizes, costs, strict=True)) <= budget:
            yield sizes


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.01, 5), COSTS), min_size=1, max_size=4),
    st.integers(2, 3),
    st.integers(0, 120),
    st.booleans(),
)
def test_least_variance_under_a_budget_equals_brute_force(prompts, low, budget, rejection):
    variances, costs = np.array([v for v, _ in prompts]), np.array([c for _, c in prompts])
    sizes_N = np.arange(low, low + 4)
    simple = variances[:, None] / sizes_N
    losses = simple if rejection else policy_gradient_loss(variances, sizes_N)
    found = allocate(losses, sizes_N, costs, budget, [0] * len(prompts))
    assert (found * costs).sum() <= budget
    feasible = list(enumerate_sizes(low, low + 3, costs, budget))
    if not feasible:
        assert 0 in found
        return
    best = min(sum(losses[i, n - low] for i, n in enumerate(sizes)) for sizes in feasible)
    assert sum(losses[i, n - low] for i, n in enumerate(found)) == pytest.approx(best, rel=1e-12)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.02, 0.98), COSTS), min_size=1, max_size=4),
    st.integers(0, 120),
    st.booleans(),
    st.booleans(),
)
def test_treatment_under_a_budget_is_max_min_as_brute_force(prompts, budget, by_std, hard):
    low, high = 2, 6
    costs = [c for _, c in prompts]
    masses = [advantage_mass(p, by_std=by_std) for p, _ in prompts]
    targets = [4 * advantage_mass(0.5, by_std=by_std) * (2 * (1 - p) if hard else 1)
               for p, _ in prompts]  # fmt: skip
    found = treatment_sizes(masses, targets, costs, budget, (low, high), [0] * len(prompts))
    assert sum(n * c for n, c in zip(found, costs, strict=True)) <= budget
    feasible = list(enumerate_sizes(low, high, costs, budget))
    if not feasible:
        assert 0 in found
        return

    def worst(sizes) -> float:
        shares = [1.0 if n == high else min(1.0, n * m / t)
                  for n, m, t in zip(sizes, masses, targets, strict=True)]  # fmt: skip
        return min(shares)

    assert worst(found) == max(worst(sizes) for sizes in feasible)
    unlimited = treatment_sizes(masses, targets, costs, math.inf, (low, high), [0] * len(prompts))
    for n, mass, target in zip(unlimited, masses, targets, strict=True):
        enough = [size for size in range(low, high + 1) if size * mass >= target]
        assert n == min(enough, default=high)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 3), st.floats(0.5, 4000)), min_size=1, max_size=12),
    st.floats(0, 1e6),
)
def test_no_budget_is_ever_exceeded_whatever_its_size(prompts, budget):
    variances, costs = np.array([v for v, _ in prompts]), np.array([c for _, c in prompts])
    sizes_N = np.arange(2, 33)
    losses = policy_gradient_loss(variances, sizes_N)
    skips = [0] * len(prompts)
    found = allocate(losses, sizes_N, costs, budget, skips)
    assert (found * costs).sum() <= budget * (1 + 1e-12)
    treated = treatment_sizes(
        list(variances), [9.0] * len(costs), list(costs), budget, (2, 32), skips
    )
    assert (np.array(treated) * costs).sum() <= budget * (1 + 1e-12)


def test_a_prompt_left_out_by_the_budget_comes_first_the_next_time():
    values, skips, served = [0.9, 0.5, 0.1, 0.01], [0] * 4, [0] * 4
    for _ in range(8):
        sizes = treatment_sizes(values, [1.0] * 4, [1.0] * 4, 2.0, (2, 4), skips)
        assert sum(sizes) == 2
        for i, n in enumerate(sizes):
            skips[i], served[i] = (0, served[i] + 1) if n else (skips[i] + 1, served[i])
        assert max(skips) < 4
    assert served == [2, 2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 3), st.floats(0.5, 9)), min_size=1, max_size=8),
    st.floats(0, 30),
    st.booleans(),
)
def test_every_prompt_is_issued_within_as_many_visits_as_there_are_prompts(prompts, more, treated):
    """Whatever the budget, once it is enough for the least group of the dearest prompt."""
    values, costs = ([p[i] for p in prompts] for i in (0, 1))
    budget, skips = 2 * max(costs) + more, [0] * len(prompts)
    sizes_N = np.arange(2, 9)
    losses = policy_gradient_loss(np.array(values), sizes_N)
    for _ in range(4 * len(prompts)):
        if treated:
            sizes = treatment_sizes(values, [2.0] * len(values), costs, budget, (2, 8), skips)
        else:
            sizes = allocate(losses, sizes_N, np.array(costs), budget, skips).tolist()
        skips = [0 if n else skipped + 1 for n, skipped in zip(sizes, skips, strict=True)]
        assert max(skips) < len(prompts)


def test_neyman_allocation_is_the_limit_of_equal_and_of_unequal_costs():
    deviations, sizes_N = np.array([1.0, 2.0, 4.0]), np.arange(2, 400)
    losses = (deviations**2)[:, None] / sizes_N
    assert list(allocate(losses, sizes_N, np.ones(3), 210, [0] * 3)) == [30, 60, 120]
    # sqrt(V / c): 1, 1, 1 with costs in proportion to the variances.
    assert list(allocate(losses, sizes_N, deviations**2, 2100, [0] * 3)) == [100, 100, 100]
    assert BUDGET_UNITS > 2100


def test_gvm_gives_nothing_more_to_the_hopeless_than_to_the_solved():
    alpha, beta = 1e-3, 2.0
    rates = np.array([1e-3, 0.02, 0.3, 0.99])
    weights = np.sqrt([rejection_variance(p, alpha, beta) for p in rates])
    expected = 1 / np.sqrt(rates + alpha / rates ** (beta - 1))
    assert weights == pytest.approx(expected)
    assert weights[1] == max(weights)
    assert weights[0] < weights[3]


@given(st.floats(0.01, 300), st.floats(0.01, 300), st.integers(2, 300))
def test_mixed_probability_is_the_beta_binomials(passes, fails, n):
    def all_of(a: float, b: float) -> float:  # Polya's urn: each success makes the next likelier
        return math.prod((a + i) / (a + b + i) for i in range(n))

    direct = 1 - all_of(passes, fails) - all_of(fails, passes)
    assert mixed_probability(passes, fails, n) == pytest.approx(direct, abs=1e-9)


@pytest.mark.parametrize("by_std", [False, True])
def test_advantage_mass_is_the_sum_of_absolute_advantages(by_std):
    rewards = np.repeat([1.0, 0.0], [30, 70])
    advantages = rewards - rewards.mean()
    if by_std:
        advantages /= rewards.std()
    assert np.abs(advantages).sum() == pytest.approx(100 * advantage_mass(0.3, by_std=by_std))


def bias_factor(
    pass_rate: float, probe: int, full: int, commit: Callable[[int], float], *, pooled: bool
) -> float:
    """Expected update over true gradient of a probe that decides whether more samples are drawn.

    Exact, by summing over counts: of n samples with k passes, sum_i A_i s_i / n averages
    g k(n - k) / (n(n - 1) p(1 - p)).

    Args:
        pass_rate: p in (0, 1).
        probe: samples of the first stage.
        full: samples of both.
        commit: passes of the probe -> probability that the second stage is drawn; above 0 unless
            `pooled`.
        pooled: one group of all samples, whatever was drawn; otherwise each stage has its own
            baseline, and they are combined by fixed weights, the second over its probability.
    """

    def signal(k: int, n: int) -> float:
        return k * (n - k) / (n * (n - 1) * pass_rate * (1 - pass_rate))

    def chance(k: int, n: int) -> float:
        return math.comb(n, k) * pass_rate**k * (1 - pass_rate) ** (n - k)

    rest = full - probe
    total = 0.0
    for k in range(probe + 1):
        q = commit(k)
        stopped = signal(k, probe)
        if pooled:
            drawn = sum(chance(j, rest) * signal(k + j, full) for j in range(rest + 1))
            update = (1 - q) * stopped + q * drawn
        else:
            again = sum(chance(j, rest) * signal(j, rest) for j in range(rest + 1))
            update = probe / full * stopped + q * (rest / full / q) * again
        total += chance(k, probe) * update
    return total


def enumerated_factor(p: float, update) -> float:
    """sum over outcomes of P(outcomes) sum_i w_i A_i (r_i/p - (1 - r_i)/(1 - p)), by brute force.

    `update(outcomes)` gives (number used, weighted advantages) of a rule that may use a prefix.
    """
    total = 0.0
    for outcomes in itertools.product((0, 1), repeat=8):
        chance = math.prod(p if r else 1 - p for r in outcomes)
        weighted = update(np.array(outcomes, dtype=float))
        scores = [1 / p if r else -1 / (1 - p) for r in outcomes]
        total += chance * float(np.dot(weighted, scores[: len(weighted)]))
    return total


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    n = len(rewards)
    return (rewards - rewards.mean()) * n / (n - 1)


def stop_when_mixed(outcomes: np.ndarray) -> np.ndarray:
    changes = np.flatnonzero(np.diff(outcomes))
    used = outcomes[: changes[0] + 2] if len(changes) else outcomes
    return leave_one_out(used) / len(used)


def probe_and_top_up(outcomes: np.ndarray) -> np.ndarray:
    used = outcomes[:4] if 0 < outcomes[:4].sum() < 4 else outcomes
    return leave_one_out(used) / len(used)


def probe_and_top_up_if_mixed(outcomes: np.ndarray) -> np.ndarray:
    used = outcomes if 0 < outcomes[:4].sum() < 4 else outcomes[:4]
    return leave_one_out(used) / len(used)


RULES = {
    "stop when mixed": stop_when_mixed,
    "probe, top up": probe_and_top_up,
    "probe, top up if mixed": probe_and_top_up_if_mixed,
}


def test_the_documented_biases_of_stopping_by_outcomes_are_the_exact_ones():
    page = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text()
    lines = {row[1].strip(): row[2:-1] for line in page.splitlines()
             if len(row := line.split("|")) == 9 + 1}  # fmt: skip
    rates = [float(cell) for cell in lines["p"]]
    for name, rule in RULES.items():
        exact = [f"{enumerated_factor(p, rule):.2f}" for p in rates]
        assert [cell.strip() for cell in lines[name]] == exact


@pytest.mark.parametrize("p", [0.05, 0.3, 0.7, 0.95])
def test_bias_factors_equal_enumeration_and_the_planted_bias_is_seen(p):
    commit = lambda k: 0.0 if 0 < k < 4 else 1.0  # noqa: E731
    exact = bias_factor(p, 4, 8, commit, pooled=True)
    assert exact == pytest.approx(enumerated_factor(p, probe_and_top_up))
    assert abs(exact - 1) > 0.05, "stopping on what the update is made of is biased"
    always = bias_factor(p, 4, 8, lambda k: 1.0, pooled=True)
    assert always == pytest.approx(1)
    assert bias_factor(p, 4, 8, lambda k: 1.0 if 0 < k < 4 else 0.25, pooled=False) == (
        pytest.approx(1)
    )
