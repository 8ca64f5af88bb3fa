"""The decoupled three-policy objective, in pure functions over tokens.

Who computed a log-probability: behaviour_ the engine when it sampled, proximal_ the policy this
update is anchored to, current_ the policy being trained, reference_ the frozen one.
ratio = current / proximal, correction = proximal / behaviour. Shape suffix T: trained tokens.
"""

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 10.0
"""Clamp |log ratio| before exp(): one token, at most e^10 = 22,026, cannot overflow a sum."""


def log_ratio(upper_T: Tensor, lower_T: Tensor) -> Tensor:
    """[T] log(upper / lower) of two policies' probabilities, clamped; no gradient beyond."""
    return (upper_T - lower_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    current_T: Tensor,
    proximal_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Per-token clipped policy loss, and where the clip acts; the caller weighs and averages.

    Guarantees zero gradient for a token whose ratio left [1 - clip_low, 1 + clip_high] in the
    direction its advantage pushes.

    Args:
        current_T: [T] float, log-probabilities under the policy being trained.
        proximal_T: [T] float, the same under the anchor of the update (no gradient).
        advantages_T: [T] float.
        clip_low: width below ratio 1.
        clip_high: width above ratio 1.
    Returns:
        loss_T to be minimised, clipped_T bool: the clipped branch is the one taken.
    Raises:
        ValueError: shapes differ.
    Source: PPO eq. 7 (arXiv:1707.06347); two widths, DAPO eq. 10 (arXiv:2503.14476). The clamp of
        the log-ratio is ours.
    """
    _same_shape(current=current_T, proximal=proximal_T, advantages=advantages_T)
    ratio_T = log_ratio(current_T, proximal_T.detach()).exp()
    plain_T = ratio_T * advantages_T
    bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    return -torch.minimum(plain_T, bounded_T), (bounded_T < plain_T).detach()


def importance_correction(
    proximal_T: Tensor,
    behaviour_T: Tensor,
    *,
    kind: Literal["truncate", "mask", "none"],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """Weight of each token for having been sampled by the behaviour policy; no gradient.

    Args:
        proximal_T: [T] float, log-probabilities under the anchor of the update.
        behaviour_T: [T] float, as the engine recorded them when it sampled.
        kind: `truncate`: min(proximal / behaviour, high); `mask`: 0 outside [low, high]; `none`: 1.
        low: lower end of the band, for `mask`.
        high: upper end, for both.
    Returns:
        correction_T, limited_T bool: tokens that were truncated or masked.
    Raises:
        ValueError: shapes differ.
    Source: decoupled PPO (arXiv:2110.00641), AReaL (arXiv:2505.24298); truncation as in IMPALA
        (arXiv:1802.01561), the band as in IcePop.
    """
    _same_shape(proximal=proximal_T, behaviour=behaviour_T)
    correction_T = log_ratio(proximal_T.detach(), behaviour_T).exp()
    if kind == "none":
        return torch.ones_like(correction_T), torch.zeros_like(correction_T, dtype=torch.bool)
    if kind == "truncate":
        return correction_T.clamp(max=high), correction_T > high
    outside_T = (correction_T < low) | (correction_T > high)
    return correction_T.masked_fill(outside_T, 0.0), outside_T


def kl_to_reference(current_T: Tensor, reference_T: Tensor) -> Tensor:
    """[T] k3 estimate of KL(current || reference) from tokens of the current policy.

    Never negative: exp(x) - x - 1 with x = reference - current, clamped to +-10.
    Source: Schulman, "Approximating KL divergence" (2020), as in GRPO (arXiv:2402.03300).
    """
    _same_shape(current=current_T, reference=reference_T)
    log_T = log_ratio(reference_T.detach(), current_T)
    return log_T.exp() - log_T - 1


def token_weights(
    lengths: list[int], aggregation: Literal["token", "sequence"]
) -> tuple[list[float], float]:
    """How per-token losses become one number: sum(weight * loss) / denominator.

    The denominator is known before the first micro-batch, so sums can be accumulated as they come.

    Args:
        lengths: trained tokens of each sample of one update; samples with 0 count nowhere.
        aggregation: `token`: every token alike; `sequence`: every sample alike.
    Returns:
        the weight of each sample's tokens, and the denominator (at least 1).
    """
    if aggregation == "token":
        return [1.0] * len(lengths), float(max(1, sum(lengths)))
    return [1.0 / max(1, n) for n in lengths], float(max(1, sum(n > 0 for n in lengths)))


def prompt_weights(
    shares: list[float], num_prompts: int, max_new_tokens: int
) -> tuple[list[float], float]:
    """`aggregation = "prompt"`: sum(weight * loss) / denominator, every prompt by its own weight.

    Nothing in it depends on how the samples turned out (a mean over their tokens would): the
    expected gradient is the weighted mean over prompts of each one's, whatever its group's size.

    Args:
        shares: per sample, the weight of its prompt over the samples that the prompt has.
        num_prompts: of the update, those without a trained sample included.
        max_new_tokens: the largest budget of a sample, the constant of Dr.GRPO (arXiv:2503.20783).
    """
    return shares, float(num_prompts * max_new_tokens)


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")
