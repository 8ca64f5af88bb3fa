"""The decoupled three-policy objective, in pure functions over tokens, composed by `step.py`.

    loss = correction(proximal, behaviour) * surrogate(ratio, advantage) + KL - entropy

Who computed a log-probability: behaviour_ the engine when it sampled, proximal_ the policy this
update is anchored to, current_ the policy being trained, reference_ the frozen one.
ratio = current / proximal, correction = proximal / behaviour. Shape suffix T: trained tokens.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Literal, cast

import torch
from torch import Tensor

from ..buffer.errors import ConfigError

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


def cispo_surrogate(
    current_T: Tensor,
    proximal_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """REINFORCE weighed by the ratio, which carries no gradient and is capped at 1 + clip_high.

    Unlike under `clipped_surrogate` no token loses its gradient. Arguments and results as there;
    `clip_low` does nothing (the paper sets no lower bound either).
    Source: CISPO eq. 4 (arXiv:2506.13585); the form ScaleRL uses (arXiv:2510.13786).
    """
    _same_shape(current=current_T, proximal=proximal_T, advantages=advantages_T)
    ratio_T = log_ratio(current_T.detach(), proximal_T.detach()).exp()
    capped_T = ratio_T > 1 + clip_high
    return -ratio_T.clamp(max=1 + clip_high) * advantages_T * current_T, capped_T


def likelihood_surrogate(
    current_T: Tensor,
    proximal_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """-advantage * log-probability: supervised learning on accepted samples, no ratio, no clip.

    Arguments and results as in `clipped_surrogate`; the widths do nothing.
    Source: RAFT (arXiv:2304.06767), with the advantage `best`.
    """
    _same_shape(current=current_T, proximal=proximal_T, advantages=advantages_T)
    return -advantages_T * current_T, torch.zeros_like(current_T, dtype=torch.bool)


def clipped_value_loss(
    values_T: Tensor, held_values_T: Tensor, returns_T: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic, the worse of two: as it is, and kept near where it was.

    Args:
        values_T: [T] float, of the critic being trained.
        held_values_T: [T] float, at the start of the step (no gradient).
        returns_T: [T] float, the targets.
        clip: how far from `held_values_T` a value still gets a gradient, in units of reward.
    Returns:
        loss_T to be minimised, clipped_T bool: the bounded error is the one taken.
    Raises:
        ValueError: shapes differ.
    Source: PPO's reference implementation (openai/baselines, ppo2), as TRL and verl have it.
    """
    _same_shape(values=values_T, held_values=held_values_T, returns=returns_T)
    bounded_T = values_T.clamp(held_values_T - clip, held_values_T + clip)
    plain_T, bounded_T = (values_T - returns_T).square(), (bounded_T - returns_T).square()
    return torch.maximum(plain_T, bounded_T) / 2, (bounded_T > plain_T).detach()


Surrogate = Callable[..., tuple[Tensor, Tensor]]

SURROGATES: dict[str, Surrogate] = {
    "ppo": clipped_surrogate,
    "cispo": cispo_surrogate,
    "raft": likelihood_surrogate,
}


ENTRY_POINT_GROUP = "slipstream.surrogates"


@cache
def find_surrogate(name: str) -> Surrogate:
    """A surrogate by its name, entry point or `module:function`.

    Raises:
        ConfigError: there is none, or its module cannot be imported; says why.
    """
    if name in SURROGATES:
        return SURROGATES[name]
    points = entry_points(group=ENTRY_POINT_GROUP)
    path = points[name].value if name in points.names else name
    module, _, function = path.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'learner.objective.surrogate = "{name}" cannot be used: {error}. It must be one of '
            f"{', '.join([*SURROGATES, *points.names])}, or module:function of a module that can "
            "be imported"
        ) from error
    if not callable(found):
        raise ConfigError(f'learner.objective.surrogate = "{name}" is not a function')
    return cast(Surrogate, found)


def sequence_proximal(current_T: Tensor, proximal_T: Tensor, owner_T: Tensor) -> Tensor:
    """[T] proximal log-probabilities under which every token of a sample has the sample's ratio.

    The ratio of a sample is the geometric mean of those of its tokens. Given to `clipped_surrogate`
    with the mean over a sample's tokens, the gradient is that of GSPO.

    Args:
        current_T: [T] float, of whole samples.
        proximal_T: [T] float.
        owner_T: [T] int64, the sample of each token.
    Source: GSPO-token eq. 14, with GSPO's ratio, eq. 7 (arXiv:2507.18071).
    """
    now_T = current_T.detach()
    return now_T - _of_sample(now_T - proximal_T.detach(), owner_T, mean=True)


def sequence_log_ratio(upper_T: Tensor, lower_T: Tensor, owner_T: Tensor) -> Tensor:
    """[T] log of the ratio of the whole sample (the product over its tokens), at each token.

    Source: the importance weight of a trajectory; TRL's `sequence_truncate` and `sequence_mask`.
    """
    return _of_sample((upper_T - lower_T).detach(), owner_T, mean=False)


def _of_sample(values_T: Tensor, owner_T: Tensor, *, mean: bool) -> Tensor:
    """[T] the sum or mean over each token's sample."""
    sums = values_T.new_zeros(int(owner_T.max()) + 1).index_add(0, owner_T, values_T)
    counts = torch.bincount(owner_T).to(sums.dtype) if mean else 1.0
    return (sums / counts)[owner_T]


def interpolated_proximal(current_T: Tensor, behaviour_T: Tensor, lag_T: Tensor) -> Tensor:
    """[T] the log-probability at version k - 1, on a line between those of two other versions.

    A token of version w has lag d = k - 1 - w; the update makes version k out of k - 1, so k - 1
    lies d / (d + 1) of the way from w to k. Saves the forward of a recomputed proximal policy.

    Args:
        current_T: [T] float, log-probabilities under the policy being trained.
        behaviour_T: [T] float, as recorded.
        lag_T: [T], steps, at least 0; at 0 the result is `behaviour_T`.
    Source: A-3PO (arXiv:2512.06547), log-linear interpolation by version, as AReaL implements it.
    """
    _same_shape(current=current_T, behaviour=behaviour_T, lag=lag_T)
    lag = lag_T.to(behaviour_T.dtype)
    return torch.lerp(behaviour_T, current_T.detach(), lag / (lag + 1))


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


def kl_to_reference(
    current_T: Tensor, reference_T: Tensor, kind: Literal["k1", "k2", "k3"] = "k3"
) -> Tensor:
    """[T] estimate of KL(current || reference) from tokens of the current policy.

    With x = reference - current, clamped to +-10: k1 = -x, unbiased, of either sign; k2 = x^2 / 2;
    k3 = exp(x) - x - 1, unbiased, never negative. As a loss k1's own gradient, that of log current,
    has mean 0 and would do nothing: it gets k2's, whose mean is the gradient of the KL.
    Source: Schulman, "Approximating KL divergence" (2020); k3 as in GRPO (arXiv:2402.03300).
    """
    _same_shape(current=current_T, reference=reference_T)
    log_T = log_ratio(reference_T.detach(), current_T)
    if kind == "k3":
        return log_T.exp() - log_T - 1
    k2_T = log_T.square() / 2
    return k2_T if kind == "k2" else k2_T - k2_T.detach() - log_T.detach()


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
    Source: the token mean of DAPO eq. 8 (arXiv:2503.14476); the mean over samples of GRPO eq. 3
        (arXiv:2402.03300).
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


def prompt_token_weights(lengths: Sequence[int], uids: Sequence[int]) -> tuple[list[float], float]:
    """`aggregation = "prompt_token"`: the mean over prompts of the mean over each one's tokens.

    Args:
        lengths: trained tokens of each sample of one update.
        uids: the prompt of each.
    Source: ScaleRL's prompt-level aggregation (arXiv:2510.13786).
    """
    tokens: dict[int, int] = {}
    for uid, length in zip(uids, lengths, strict=True):
        tokens[uid] = tokens.get(uid, 0) + length
    return [1.0 / max(1, tokens[uid]) for uid in uids], float(max(1, len(tokens)))


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")
