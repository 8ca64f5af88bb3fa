"""Advantages: how much better a sample did than its siblings."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from .config import BatchAdvantage

EPS = 1e-6
"""Added to the standard deviation, in units of reward."""

WHITE_EPS = 1e-8
"""Added to a variance."""


def group_advantages(
    rewards_G: Sequence[float | None],
    kind: Literal["group_std", "group_mean", "leave_one_out", "best"],
) -> np.ndarray:
    """Group-relative advantages.

    Every scored sample counts in the baseline, also those that carry no gradient; a sample without
    a reward (its reward failed) counts nowhere and gets 0.

    Args:
        rewards_G: [G] reward of each sample of one prompt; None where there is none.
        kind: `group_std`: (reward - mean) / (std + 1e-6), with the population's standard deviation
            (divided by G, not G - 1); `group_mean`: reward - mean; `leave_one_out`: reward - mean
            of the others, which is G/(G - 1) times that: the one whose expected update does not
            depend on G; `best`: 1 for the highest reward, ties included, 0 for the others.
    Returns:
        [G] float64. All zeros for a group with fewer than two rewards.
    Source: GRPO (arXiv:2402.03300); without the division, Dr.GRPO (arXiv:2503.20783);
        leave one out, RLOO (arXiv:2402.14740); best, RAFT (arXiv:2304.06767), where a group of
        equal rewards is 0 here: it prefers nothing.
    """
    scored_G = np.array([reward is not None for reward in rewards_G], dtype=bool)
    advantages_G = np.zeros(len(rewards_G))
    rewards = np.array([reward for reward in rewards_G if reward is not None], dtype=np.float64)
    if len(rewards) < 2:
        return advantages_G
    centred = rewards - rewards.mean()
    if kind == "group_std":
        centred /= rewards.std() + EPS
    elif kind == "leave_one_out":
        centred *= len(rewards) / (len(rewards) - 1)
    elif kind == "best":
        centred = (rewards == rewards.max()) * float(rewards.min() < rewards.max())
    advantages_G[scored_G] = centred
    return advantages_G


def staged_advantages(rewards_G: Sequence[float | None], sizes: Sequence[int]) -> np.ndarray:
    """`leave_one_out` of a group that was sized in stages: [G] float64.

    The others of a sample are those of its stage and of earlier ones, never of a later one: whether
    that was drawn depends on the sample, and a baseline that depends on it would bias the update.

    Args:
        rewards_G: as in `group_advantages`, in order of stage.
        sizes: samples of each stage; of one stage it is `leave_one_out` as ever.
    Source: RLOO (arXiv:2402.14740) within what was drawn; the stages are ours.
    """
    advantages_G, start = np.zeros(len(rewards_G)), 0
    for end in np.cumsum(sizes).tolist():
        so_far = group_advantages(rewards_G[:end], "leave_one_out")
        advantages_G[start:end] = so_far[start:]
        start = end
    return advantages_G


def spare_advantages(
    rewards_G: Sequence[float | None], needed_G: np.ndarray, num_samples: int, weight: float
) -> np.ndarray:
    """`leave_one_out` of a group with spare samples: [G] float64.

    Sum over j of c_ij (r_i - r_j) / (`num_samples` - 1), where c_ij is `weight` between a needed
    sample i and a spare one j, else 1; the share of a spare sample has `weight`, too. Where that is
    0 in some groups and 1 over their share in the others, the mean is the update of whole groups:
    see `rollout/spares.py`.

    Args:
        rewards_G: as in `group_advantages`; without those that were cut.
        needed_G: [G] bool, False for spare samples.
        num_samples: of the group, those that were cut included.
        weight: as `SizingDecision.spare_weight`.
    """
    scored_G = np.array([reward is not None for reward in rewards_G], dtype=bool)
    filled_G = np.array([reward or 0.0 for reward in rewards_G])
    weights_GG = np.where(needed_G[:, None] & ~needed_G, weight, 1.0) * (
        scored_G[:, None] & scored_G
    )
    return (weights_GG * (filled_G[:, None] - filled_G)).sum(axis=1) / (num_samples - 1)


def batch_advantages(
    rewards_PG: Sequence[Sequence[float | None]], kind: BatchAdvantage
) -> list[np.ndarray]:
    """Advantages of all samples of a batch, for the kinds that look beyond the group, too.

    Args:
        rewards_PG: per group, as in `group_advantages`.
        kind: as there, or `group_mean_batch_std`: `group_mean` divided by its root mean square over
            the batch (+ 1e-6).
    Returns:
        Per group, [G] float64.
    Source: ScaleRL (arXiv:2510.13786) is `group_mean_batch_std`.
    """
    if kind != "group_mean_batch_std":
        return [group_advantages(rewards_G, kind) for rewards_G in rewards_PG]
    num_scored = sum(r is not None for rewards_G in rewards_PG for r in rewards_G)
    centred = [group_advantages(rewards_G, "group_mean") for rewards_G in rewards_PG]
    rms = (sum(float((c**2).sum()) for c in centred) / max(1, num_scored)) ** 0.5
    return [c / (rms + EPS) for c in centred]


def token_whitened(
    rewards_PG: Sequence[Sequence[float | None]], tokens_PG: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """`batch_std`: (reward - mean) / sqrt(variance + 1e-8), over all tokens of the batch that the
    policy wrote, each with its sample's reward; the variance divides by their number - 1.

    Args:
        rewards_PG: per group, as in `group_advantages`.
        tokens_PG: per group, how many tokens the policy wrote in each sample.
    Returns:
        Per group, [G] float64.
    Source: REINFORCE++ (arXiv:2501.03262) as OpenRLHF and verl write it, without its token-level KL
        in the reward: a token's return is then its sample's reward.
    """
    pairs = zip(rewards_PG, tokens_PG, strict=True)
    scored = [(r, n) for both in pairs for r, n in zip(*both, strict=True) if r is not None]
    rewards, tokens = np.array(scored, dtype=np.float64).reshape(-1, 2).T
    if tokens.sum() < 2:
        return [np.zeros(len(rewards_G)) for rewards_G in rewards_PG]
    mean = (tokens * rewards).sum() / tokens.sum()
    variance = (tokens * (rewards - mean) ** 2).sum() / (tokens.sum() - 1)
    scale = np.sqrt(variance + WHITE_EPS)
    return [
        np.array([0.0 if r is None else (r - mean) / scale for r in rewards_G])
        for rewards_G in rewards_PG
    ]


def generalised_advantages(
    reward: float, values_N: np.ndarray, *, discount: float, decay: float
) -> np.ndarray:
    """[N] float64 generalised advantage of each token of one sample, whose reward comes at its end.

    A_t = sum over l of (discount x decay)^l (r_{t+l} + discount V_{t+l+1} - V_{t+l}), V = 0 behind
    the last token, also when it was cut off by the token limit. A_t + V_t is the critic's target.

    Args:
        reward: of the sample.
        values_N: [N] float64, what the critic expects before each token that the policy wrote;
            tokens of others between them count as no step.
        discount: gamma.
        decay: lambda; at 1 a token's advantage is its discounted reward - V_t.
    Source: GAE eq. 16 (arXiv:1506.02438).
    """
    deltas_N = discount * np.append(values_N[1:], 0.0) - values_N
    deltas_N[-1] += reward
    advantages_N, to_go = np.empty(len(values_N)), 0.0
    for t in reversed(range(len(values_N))):
        to_go = deltas_N[t] + discount * decay * to_go
        advantages_N[t] = to_go
    return advantages_N


Total = Callable[[Sequence[float]], list[float]]
"""Sums over the learner's ranks."""


def whitened(
    values: Sequence[np.ndarray], counted: Sequence[np.ndarray], total: Total = list
) -> list[np.ndarray]:
    """(value - mean) / sqrt(variance + 1e-8), both over what counts in all arrays together; the
    variance is the sample's (divided by n - 1), and with fewer than two values nothing is changed.

    Args:
        values: float64 each.
        counted: bool each: which of the values are in mean and variance.
        total: where the arrays are those of one rank of several.
    Source: PPO's usual advantage normalisation, as verl and TRL write it.
    """
    pool = np.concatenate([v[c] for v, c in zip(values, counted, strict=True)])
    number, summed = total([len(pool), pool.sum()])
    if number < 2:
        return list(values)
    mean = summed / number
    (squares,) = total([((pool - mean) ** 2).sum()])
    return [(v - mean) / np.sqrt(squares / (number - 1) + WHITE_EPS) for v in values]


def gigpo_advantages(
    returns_G: Sequence[float | None],
    step_rewards: Sequence[Sequence[float]],
    anchors: Sequence[Sequence[str]],
    *,
    kind: Literal["group_std", "group_mean"],
    discount: float,
    step_weight: float,
) -> list[np.ndarray]:
    """Two-level advantages of episodes: against the sibling episodes, plus, for each turn, against
    all turns of the group that were taken in the same state.

    Args:
        returns_G: [G] score of each episode of one prompt; None where there is none.
        step_rewards: per episode, the reward of each of its policy turns.
        anchors: per episode, the hash of the state each turn was taken in; "" is like no other.
        kind: how both levels are normalised, as in `group_advantages`.
        discount: gamma; a turn's return is the discounted sum of its and all later rewards.
        step_weight: omega, of the turn's level.
    Returns:
        Per episode a [turns] float64; zeros for an episode without a score.
    Source: GiGPO (arXiv:2505.10978), eq. 3, 6-8. A state met once has a turn advantage of 0.
    """
    episode_G = group_advantages(returns_G, kind)
    advantages = [np.full(len(a), e) for a, e in zip(anchors, episode_G, strict=True)]
    met: dict[str, list[tuple[int, int, float]]] = {}
    for episode, (rewards, states) in enumerate(zip(step_rewards, anchors, strict=True)):
        if returns_G[episode] is None:
            continue
        to_go = 0.0
        for turn in reversed(range(len(states))):
            to_go = rewards[turn] + discount * to_go
            if states[turn]:
                met.setdefault(states[turn], []).append((episode, turn, to_go))
    for places in met.values():
        values = group_advantages([to_go for _, _, to_go in places], kind)
        for (episode, turn, _), value in zip(places, values, strict=True):
            advantages[episode][turn] += step_weight * value
    return advantages
