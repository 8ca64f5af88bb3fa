"""Advantages: how much better a sample did than its siblings."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

AdvantageKind = Literal["group_std", "group_mean", "leave_one_out"]

EPS = 1e-6
"""Added to the standard deviation, in units of reward."""


def group_advantages(rewards_G: Sequence[float | None], kind: AdvantageKind) -> np.ndarray:
    """Group-relative advantages.

    Every scored sample counts in the baseline, also those that carry no gradient; a sample without
    a reward (its reward failed) counts nowhere and gets 0.

    Args:
        rewards_G: [G] reward of each sample of one prompt; None where there is none.
        kind: `group_std`: (reward - mean) / (std + 1e-6), with the population's standard deviation
            (divided by G, not G - 1); `group_mean`: reward - mean; `leave_one_out`: reward - mean
            of the others, which is G/(G - 1) times that: the one whose expected update does not
            depend on G.
    Returns:
        [G] float64. All zeros for a group with fewer than two rewards.
    Source: GRPO (arXiv:2402.03300); without the division, Dr.GRPO (arXiv:2503.20783);
        leave one out, RLOO (arXiv:2402.14740).
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
    advantages_G[scored_G] = centred
    return advantages_G
