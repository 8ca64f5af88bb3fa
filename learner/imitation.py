"""Demonstrations: earlier successes of prompts of which no sample succeeded lately.

Shape suffix: T policy-written tokens of a micro-batch.
"""

import math
from collections.abc import Sequence

from ..buffer.errors import TrainingFailed
from ..buffer.records import Trajectory, Version
from .batch import Sample, collate, moved, own_share, plan_micro_batches
from .config import LearnerConfig
from .policy import Policy, score


def imitate(
    policy: Policy,
    demonstrations: Sequence[Trajectory],
    config: LearnerConfig,
    *,
    held: Version,
    step: int,
) -> dict[str, float]:
    """Add the gradient of c * mean over demonstrated tokens of -log pi(token).

    Self-imitation (Oh et al. 2018, arXiv:1806.05635) without its value baseline: a success of a
    prompt with pass rate near 0 has an advantage near 1. No ratio and no correction: the sample may
    be of any version, which is why it stands outside the staleness law and has a weight of its own,
    c = `objective.demonstration_coefficient`.

    Args:
        policy: its gradients are added to.
        demonstrations: whole trajectories, each scored at the temperature it was sampled at.
        config: of the learner.
        held: the version the policy is at.
        step: for the words of an error.
    Returns:
        `demonstrations` and `demonstration_loss` (the mean before c); empty without any.
    Raises:
        TrainingFailed: the loss is not finite.
    """
    samples = [
        Sample(trajectory=each, advantage=0.0, first_trained=0, share=0.0)
        for each in demonstrations
        if each.num_policy_tokens
    ]
    total = sum(sample.num_trained for sample in samples)
    value = 0.0
    ranks = policy.ranks
    if not samples:
        return {}
    plan = plan_micro_batches(
        samples, config.micro_batch_tokens, share_prompts=False, num_ranks=ranks.size
    )
    for rows in own_share(plan, ranks.rank, ranks.size):
        batch = moved(collate(rows, held, policy.loss_dtype), ranks.device)
        logprobs_T, _ = score(policy.model, batch)
        loss = -(logprobs_T * batch.weights_T).sum() / total
        (config.objective.demonstration_coefficient * loss).backward()
        value += float(loss.detach())
    value = ranks.total([value])[0]
    if not math.isfinite(value):
        raise TrainingFailed(f"step {step}: the loss of its demonstrations is {value}")
    return {"demonstrations": float(len(samples)), "demonstration_loss": value}
