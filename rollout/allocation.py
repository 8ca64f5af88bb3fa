"""The arithmetic of sizing: how much a group of n samples tells, and who gets how many of them.

Notation: p a prompt's pass rate, g = grad p its true gradient, s_i = grad log pi(y_i) the score of
a sample, G^2 = E |s|^2, n the samples of a group. The estimate of g is (1/n) sum_i A_i s_i with the
leave-one-out advantage A_i = r_i - mean of the others.

Shape suffixes: P prompts of a window, N sizes.
"""

import math
from collections.abc import Sequence

import numpy as np

BUDGET_UNITS = 8192
"""Resolution of a token budget in `allocate`; exact up to so many tokens, and never over it."""


def mixed_probability(passes: float, fails: float, n: int) -> float:
    """The probability that n samples do not all get one reward, under p ~ Beta(passes, fails).

    1 - E p^n - E (1 - p)^n, the beta-binomial's two ends: what a group without signal is not.
    """

    def all_of(a: float, b: float) -> float:
        return math.exp(
            math.lgamma(a + n) - math.lgamma(a) + math.lgamma(a + b) - math.lgamma(a + b + n)
        )

    return max(0.0, 1.0 - all_of(passes, fails) - all_of(fails, passes))


def advantage_mass(pass_rate: float, *, by_std: bool) -> float:
    """Expected sum of |A_i| of a large group, per sample.

    k of n passed, u = k/n. Around the mean, passing samples have 1 - u and failing ones -u:
    u (1 - u) + (1 - u) u = 2u(1 - u) a sample; divided by the standard deviation sqrt(u(1 - u)) it
    is 2 sqrt(u(1 - u)), which is DARS's 2N sqrt(u(1 - u)) for a group (arXiv:2508.13755).
    """
    spread = pass_rate * (1.0 - pass_rate)
    return 2.0 * (math.sqrt(spread) if by_std else spread)


def treatment_sizes(
    masses: Sequence[float],
    targets: Sequence[float],
    costs: Sequence[float],
    budget: float,
    bounds: tuple[int, int],
    skips: Sequence[int],
) -> list[int]:
    """The fewest samples that bring each prompt's advantage mass to its target, within a budget.

    When the budget does not reach, the least treated prompt is treated best (max-min): samples go
    one by one to the prompt with the smallest share of its target, until the next does not fit.

    Args:
        masses: [P] advantage mass of one sample, see `advantage_mass`.
        targets: [P] what a group's should be.
        costs: [P] expected tokens of one sample.
        budget: tokens for all of them; infinity for none.
        bounds: fewest and most samples of one prompt.
        skips: [P] visits at which each was left out before: it goes before those with fewer.
    Returns:
        [P] samples; 0 for prompts that the budget leaves out even at the lower bound.
    """
    low, high = bounds
    values = [mass / cost for mass, cost in zip(masses, costs, strict=True)]
    sizes, left = _all_at_least(low, values, costs, budget, skips)
    wanting = [i for i, n in enumerate(sizes) if 0 < n < high and n * masses[i] < targets[i]]
    while wanting:
        least = min(wanting, key=lambda i: (sizes[i] * masses[i] / targets[i], i))
        if costs[least] > left:
            break
        sizes[least] += 1
        left -= costs[least]
        if sizes[least] == high or sizes[least] * masses[least] >= targets[least]:
            wanting.remove(least)
    return sizes


def _all_at_least(
    low: int,
    values: Sequence[float],
    costs: Sequence[float],
    budget: float,
    skips: Sequence[int],
) -> tuple[list[int], float]:
    """`low` samples for each prompt, and what is left. If need be some go without: the least
    valuable, but first those that were not left out before, so that nobody starves."""
    sizes, left = [0] * len(costs), budget
    for i in sorted(range(len(costs)), key=lambda i: (-skips[i], -values[i], i)):
        if low * costs[i] <= left:
            sizes[i] = low
            left -= low * costs[i]
    return sizes, left


def policy_gradient_loss(variances_P: np.ndarray, sizes_N: np.ndarray) -> np.ndarray:
    """[P, N] variance of each prompt's estimate of g by n samples: V / (n - 1).

    V = G^2 p(1 - p). Derived for the leave-one-out baseline: E A_i^2 |s_i|^2 = V n/(n - 1), so the
    n diagonal terms give V / (n - 1); pairs add |g|^2 (1/(n(n - 1)) - 1/n), which is left out.
    """
    return variances_P[:, None] / (sizes_N[None, :] - 1)


def rejection_variance(pass_rate: float, alpha: float, beta: float) -> float:
    """V / G^2 for training on passing samples alone (RAFT), where n samples give a variance V / n.

    About n p of them pass, so the variance of their mean is G^2 / (n p); weighing a prompt by
    1 / (1 + alpha / p^beta), so that hopeless ones do not take everything, gives
    G^2 / (n (p + alpha / p^(beta - 1))). Its minimum under a budget is n proportional to
    G / sqrt(p + alpha / p^(beta - 1)).
    Source: GVM (arXiv:2505.02391); derived here from the equation's form, the paper not copied.
    """
    return 1.0 / (pass_rate + alpha / pass_rate ** (beta - 1.0))


def allocate(
    losses_PN: np.ndarray,
    sizes_N: np.ndarray,
    costs_P: np.ndarray,
    budget: float,
    skips: Sequence[int],
) -> np.ndarray:
    """The sizes with the least total loss whose cost stays within the budget.

    A multiple-choice knapsack, solved exactly by dynamic programming over the budget in at most
    `BUDGET_UNITS` units (costs rounded up to units: never over the budget). With equal costs and a
    loss V / n it is Neyman's allocation, n proportional to sqrt(V); with unequal ones sqrt(V / c).

    Args:
        losses_PN: [P, N] float, loss of prompt i at size `sizes_N[j]`.
        sizes_N: [N] int, ascending.
        costs_P: [P] float, expected tokens of one sample.
        budget: tokens for all.
        skips: [P] as in `treatment_sizes`.
    Returns:
        [P] int; 0 for the prompts that the budget leaves out even at the smallest size.
    """
    values = (losses_PN[:, 0] - losses_PN[:, -1]) / costs_P
    kept, _ = _all_at_least(int(sizes_N[0]), list(values), list(costs_P), budget, skips)
    rows = [i for i, n in enumerate(kept) if n]
    unit = 1.0 if budget <= BUDGET_UNITS else budget / BUDGET_UNITS
    units_PN = np.ceil(costs_P[rows, None] * sizes_N[None, :] / unit - 1e-9).astype(int)
    total = math.floor(budget / unit + 1e-9)
    if units_PN[:, 0].sum() > total:  # rounded up they no longer fit: all at the smallest size do
        return np.array(kept)
    best, choices = np.zeros(total + 1), []
    for losses_N, units_N in zip(losses_PN[rows], units_PN, strict=True):
        trials = np.full((len(sizes_N), total + 1), np.inf)
        for j, used in enumerate(units_N[units_N <= total]):
            trials[j, used:] = best[: total + 1 - used] + losses_N[j]
        choices.append(trials.argmin(axis=0))
        best = trials.min(axis=0)
    places, at = dict.fromkeys(rows, 0), total
    for row, choice, units_N in reversed(list(zip(rows, choices, units_PN, strict=True))):
        places[row] = int(choice[at])
        at -= units_N[places[row]]
    _spend_rest(places, losses_PN, np.outer(costs_P, sizes_N), budget)
    result = np.zeros(len(costs_P), dtype=int)
    for row, place in places.items():
        result[row] = sizes_N[place]
    return result


def _spend_rest(
    places: dict[int, int], losses_PN: np.ndarray, costs_PN: np.ndarray, budget: float
) -> None:
    """Spend what rounding left of the budget: the next size of whoever gains most by it."""
    left = budget - sum(costs_PN[row, place] for row, place in places.items())
    while True:
        gains = {
            row: losses_PN[row, place] - losses_PN[row, place + 1]
            for row, place in places.items()
            if place + 1 < costs_PN.shape[1]
            and costs_PN[row, place + 1] - costs_PN[row, place] <= left
        }
        if not gains:
            return
        row = max(gains, key=lambda row: gains[row])
        left -= costs_PN[row, places[row] + 1] - costs_PN[row, places[row]]
        places[row] += 1
