"""What the two loss operations mean, in eager PyTorch; the others are tested against this.

`scores` is what every objective needs of the policy, `full` a whole objective. Both apply the LM
head themselves, because its output, [T, V], is the largest tensor of a training step.

Shape suffixes: T scored tokens, C the tokens of one chunk, D hidden size, V vocabulary, M kept ids.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

REMOVED = -1e30
"""Logit of a token that cannot be sampled, in the place of -inf: its probability is exactly 0, and
0 * REMOVED is still 0 where 0 * -inf would be NaN."""


class KeptSets(NamedTuple):
    """The ids each token was sampled among: token t owns `ids[offsets[t]:offsets[t + 1]]`."""

    ids_M: Tensor
    offsets_T1: Tensor


class Head(NamedTuple):
    """The last linear layer, and the law that the sampler made of its output."""

    weight_VD: Tensor
    """[V, D] any float dtype; may be the input embedding (a tied head)."""
    temperature_T: Tensor
    """[T] above 0, by which the sampler divided; no gradient."""
    bias_V: Tensor | None = None
    kept: KeptSets | None = None
    """The law is renormalised over these ids; each target must be among its own."""


TokenLoss = Callable[[Tensor, Tensor, slice], tuple[Tensor, Mapping[str, Tensor]]]
"""A token-separable objective: the loss of a token depends on no other token.

From logprobs_C and entropy_C of the tokens `rows` to their [C] loss, weights included, and [C]
values to be reported. Called with one chunk after another; gradient goes through both arguments.
"""


class FullLoss(NamedTuple):
    """What `full` returns; only `loss` carries gradient."""

    loss: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor
    seen_T: dict[str, Tensor]
    """[T] of each value that the objective reported."""


def scores(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of what it was drawn from.

        z_tv = (hidden_t . weight_v + bias_v) / temperature_t     REMOVED where v is not kept
        logprobs_t = z_t,target - log sum_v exp z_tv
        entropy_t = - sum_v p_tv log p_tv                         p = softmax(z)

    so d logprobs_t / d z_tv = [v = target] - p_tv and d entropy_t / d z_tv = -p_tv (log p_tv +
    entropy_t): the second is what an entropy bonus needs, and both reach hidden, weight and bias.

    Args:
        hidden_TD: [T, D] any float dtype; the last hidden states that predict the targets.
        targets_T: [T] int64.
        head: what makes them a distribution.
    Returns:
        logprobs_T, entropy_T: [T] float32 (float64 for float64 inputs), nats.
    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check_inputs(hidden_TD, targets_T, head)
    dtype = result_dtype(hidden_TD)
    bias = None if head.bias_V is None else head.bias_V.to(dtype)
    logits_TV = linear(hidden_TD.to(dtype), head.weight_VD.to(dtype), bias)
    logits_TV = logits_TV / head.temperature_T[:, None]
    if bias is not None:  # the one source of -inf
        logits_TV = logits_TV.clamp(min=REMOVED)
    if head.kept is not None:
        logits_TV = keep_only(logits_TV, head.kept, slice(0, len(targets_T)))
    logp_TV = torch.log_softmax(logits_TV, 1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
    return logp_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def full(hidden_TD: Tensor, targets_T: Tensor, head: Head, token_loss: TokenLoss) -> FullLoss:
    """The loss sum_t token_loss(logprobs_t, entropy_t) over `scores`, and what it saw.

    Args:
        hidden_TD: as in `scores`.
        targets_T: as in `scores`.
        head: as in `scores`.
        token_loss: the objective, e.g. all terms of the three-policy loss.
    Raises:
        ValueError: shapes disagree, the objective's results included.
    """
    logprobs_T, entropy_T = scores(hidden_TD, targets_T, head)
    loss_T, seen_T = token_loss(logprobs_T, entropy_T, slice(0, len(targets_T)))
    check_losses(loss_T, seen_T, logprobs_T)
    seen = {name: values.detach() for name, values in seen_T.items()}
    return FullLoss(loss_T.sum(), logprobs_T.detach(), entropy_T.detach(), seen)


def keep_only(logits_CV: Tensor, kept: KeptSets, rows: slice) -> Tensor:
    """[C, V] with `REMOVED` outside the kept sets of the tokens `rows`."""
    offsets = kept.offsets_T1[rows.start : rows.stop + 1]
    owner_M = torch.repeat_interleave(offsets.diff())
    index = (owner_M, kept.ids_M[offsets[0] : offsets[-1]].long())
    return torch.full_like(logits_CV, REMOVED).index_put(index, logits_CV[index])


def result_dtype(hidden_TD: Tensor) -> torch.dtype:
    """In which sums are taken: float64 for float64 inputs, else float32."""
    return torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32


def check_inputs(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> None:
    """Raise ValueError where shapes or dtypes do not fit together, naming both."""
    hidden, weight = tuple(hidden_TD.shape), tuple(head.weight_VD.shape)
    if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1]:
        raise ValueError(f"hidden {hidden} and weight {weight} must be [T, D] and [V, D]")
    for name, values in (("targets", targets_T), ("temperature", head.temperature_T)):
        if values.shape != hidden[:1]:
            raise ValueError(f"{name} {tuple(values.shape)} must be [{hidden[0]}], as hidden is")
    if targets_T.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets_T.dtype}")
    if head.bias_V is not None and head.bias_V.shape != weight[:1]:
        raise ValueError(f"bias {tuple(head.bias_V.shape)} must be [{weight[0]}], as weight is")
    if head.kept is not None and head.kept.offsets_T1.shape != (hidden[0] + 1,):
        offsets = tuple(head.kept.offsets_T1.shape)
        raise ValueError(f"kept offsets {offsets} must be [{hidden[0] + 1}]")


def check_losses(loss_C: Tensor, seen_C: Mapping[str, Tensor], logprobs_C: Tensor) -> None:
    """Raise ValueError where an objective did not return one value for every token."""
    for name, values in {"loss": loss_C, **seen_C}.items():
        if values.shape != logprobs_C.shape:
            raise ValueError(
                f"the objective's {name} {tuple(values.shape)} must be one value per token, "
                f"{tuple(logprobs_C.shape)}; an objective over whole samples goes through `scores`"
            )
