"""Liger's and verl's loss on given inputs, in an environment of their own.

    python loss_peers.py liger|verl IN.pt OUT.pt [REPEATS]

IN.pt: hidden [B, L, D], weight [V, D], targets and mask [B, L], advantages [B], old and reference
[B, L], temperature, clip_low, clip_high, kl, entropy. OUT.pt: loss, both gradients, seconds.
"""

import sys
import time

import torch


def liger(given, hidden, weight):
    """Liger's chunked GRPO loss, as its defaults chunk it; it has no entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=given["kl"],
        compiled=False,  # compiling takes a C++ tool chain and minutes, and changes no result
        use_ref_model=True,
        epsilon_low=given["clip_low"],
        epsilon_high=given["clip_high"],
        loss_type="dapo",
        temperature=given["temperature"],
    )
    return loss(
        hidden,
        weight,
        given["targets"],
        given["mask"],
        given["advantages"],
        ref_per_token_logps=given["reference"],
        old_per_token_logps=given["old"],
        num_items_in_batch=given["mask"].sum(),
    )[0]


def verl(given, hidden, weight):
    """verl's fused linear with log-prob and entropy, its PPO loss, k3 KL and entropy bonus."""
    from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla, kl_penalty
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=given["clip_low"],
        clip_ratio_low=given["clip_low"],
        clip_ratio_high=given["clip_high"],
        clip_ratio_c=1e6,  # the third clip, which only verl has, out of the way
    )
    logprobs, entropy = FusedLinearForPPO(chunk_size=64)(
        hidden, weight, given["targets"], given["temperature"]
    )
    mask = given["mask"].float()
    advantages = given["advantages"][:, None].expand_as(mask)
    loss, _ = compute_policy_loss_vanilla(
        given["old"], logprobs, advantages, mask, "token-mean", config
    )
    kl = kl_penalty(logprobs, given["reference"], "low_var_kl")
    extra = given["kl"] * kl - given["entropy"] * entropy
    return loss + agg_loss(extra, mask, "token-mean")


def main() -> None:
    peer, source, target = sys.argv[1:4]
    repeats = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    given, seconds = torch.load(source), []
    torch.set_num_threads(given["threads"])
    for _ in range(repeats):
        hidden = given["hidden"].clone().requires_grad_()
        weight = given["weight"].clone().requires_grad_()
        started = time.perf_counter()
        loss = {"liger": liger, "verl": verl}[peer](given, hidden, weight)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    torch.save(
        {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad, "seconds": seconds},
        target,
    )


if __name__ == "__main__":
    main()
