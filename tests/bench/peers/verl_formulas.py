"""verl's own formulas on numbers given as JSON on stdin; results and gradients on stdout.

Runs in verl's environment. Everything that is compared is verl's code.
"""

import json
import sys

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig


def tensor(values):
    """In float64."""
    return torch.tensor(values, dtype=torch.float64)


def advantage(case, mask):
    """A [B, L] advantage by verl's estimator `case["estimator"]`."""
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(mask)), mask.sum(1).long() - 1] = tensor(case["rewards"])
    if case["estimator"] == "gae":
        gamma, decay = case["discount"], case["decay"]
        both = core_algos.compute_gae_advantage_return(
            rewards, tensor(case["values"]), mask, gamma, decay
        )
        return [each.tolist() for each in both]
    estimator = core_algos.get_adv_estimator_fn(case["estimator"])
    by_std = case.get("by_std", False)
    options = {"norm_adv_by_std_in_grpo": by_std} if case["estimator"] == "grpo" else {}
    index = np.array(case["uids"])
    config = AlgoConfig(gamma=1.0)
    if case["estimator"] == "reinforce_plus_plus":
        return [estimator(rewards, mask, config=config)[0].tolist()]
    return [estimator(rewards, mask, index=index, config=config, **options)[0].tolist()]


def policy_loss(case, mask):
    """Loss and gradient of one of verl's policy losses, with its rollout correction."""
    current = tensor(case["current"]).requires_grad_()
    proximal, behaviour = tensor(case["proximal"]), tensor(case["behaviour"])
    weights = None
    if case["correction"]:
        level, threshold = case["correction"]
        weights, _ = compute_rollout_correction_weights(
            proximal - behaviour, mask, rollout_is=level, rollout_is_threshold=threshold
        )
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2,
        clip_ratio_low=case["clip_low"], clip_ratio_high=case["clip_high"], clip_ratio_c=1e6,
    )  # fmt: skip
    config.global_batch_info.update(case["batch_info"])
    loss, _ = core_algos.get_policy_loss_fn(case["loss"])(
        proximal, current, tensor(case["advantages"])[:, None].expand_as(mask), mask,
        loss_agg_mode=case["aggregation"], config=config, rollout_is_weights=weights,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, current)
    return [loss.item(), gradient.tolist()]


def value_loss(case, mask):
    """Loss and gradient of verl's critic loss."""
    values = tensor(case["values"]).requires_grad_()
    loss, _ = core_algos.compute_value_loss(
        values, tensor(case["returns"]), tensor(case["held"]), mask, case["clip"]
    )
    (gradient,) = torch.autograd.grad(loss, values)
    return [loss.item(), gradient.tolist()]


def kl(case, mask):
    """Estimate and gradient, by token."""
    current = tensor(case["current"]).requires_grad_()
    estimate = core_algos.kl_penalty(current, tensor(case["reference"]), case["estimator"])
    (gradient,) = torch.autograd.grad((estimate * mask).sum(), current)
    return [(estimate * mask).tolist(), gradient.tolist()]


KINDS = {"advantage": advantage, "policy": policy_loss, "value": value_loss, "kl": kl}
print(json.dumps([KINDS[c["kind"]](c, tensor(c["mask"])) for c in json.load(sys.stdin)]))
