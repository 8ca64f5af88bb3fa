"""Advantages: how much better a sample did than its siblings."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .config import AdvantageKind

EPS = 1e-6
"""Added to the standard deviation, in units of reward."""


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


def batch_advantages(
    rewards_PG: Sequence[Sequence[float | None]], kind: AdvantageKind
) -> list[np.ndarray]:
    """Advantages of all samples of a batch, for the kinds that look beyond the group, too.

    Args:
        rewards_PG: per group, as in `group_advantages`.
        kind: as there, or `group_mean_batch_std`: `group_mean` divided by its root mean square over
            the batch (+ 1e-6); `batch_std`: (reward - mean) / (std + 1e-6), both of the batch.
    Returns:
        Per group, [G] float64.
    Source: REINFORCE++ (arXiv:2501.03262) is `batch_std`, its baseline variant and ScaleRL
        (arXiv:2510.13786) are `group_mean_batch_std`; without their token-level KL in the reward.
    """
    if kind not in ("group_mean_batch_std", "batch_std"):
        return [group_advantages(rewards_G, kind) for rewards_G in rewards_PG]
    scored = np.array([r for rewards_G in rewards_PG for r in rewards_G if r is not None])
    if kind == "batch_std":
        mean, std = (scored.mean(), scored.std()) if len(scored) else (0.0, 0.0)
        return [
            np.array([0.0 if r is None else (r - mean) / (std + EPS) for r in rewards_G])
            for rewards_G in rewards_PG
        ]
    centred = [group_advantages(rewards_G, "group_mean") for rewards_G in rewards_PG]
    rms = (sum(float((c**2).sum()) for c in centred) / max(1, len(scored))) ** 0.5
    return [c / (rms + EPS) for c in centred]
