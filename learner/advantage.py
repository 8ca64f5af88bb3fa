"""Advantages: how much better a sample did than its siblings."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

EPS = 1e-6
"""Added to the standard deviation, in units of reward."""


def group_advantages(
    rewards_G: Sequence[float | None], kind: Literal["group_std", "group_mean"]
) -> np.ndarray:
    """Group-relative advantages.

    Every scored sample counts in the baseline, also those that carry no gradient; a sample without
    a reward (its reward failed) counts nowhere and gets 0.

    Args:
        rewards_G: [G] reward of each sample of one prompt; None where there is none.
        kind: `group_std`: (reward - mean) / (std + 1e-6), with the population's standard deviation
            (divided by G, not G - 1); `group_mean`: reward - mean.
    Returns:
        [G] float64. All zeros for a group with fewer than two rewards.
    Source: GRPO (arXiv:2402.03300); without the division, Dr.GRPO (arXiv:2503.20783).
    """
    scored_G = np.array([reward is not None for reward in rewards_G], dtype=bool)
    advantages_G = np.zeros(len(rewards_G))
    rewards = np.array([reward for reward in rewards_G if reward is not None], dtype=np.float64)
    if len(rewards) < 2:
        return advantages_G
    centred = rewards - rewards.mean()
    if kind == "group_std":
        centred /= rewards.std() + EPS
    advantages_G[scored_G] = centred
    return advantages_G


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
