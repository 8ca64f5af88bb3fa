"""What each operation means, in eager PyTorch; also the path taken on CPUs.

Shape suffixes: T scored tokens, C tokens of one chunk, D hidden size, V vocabulary, M kept ids.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK_ELEMENTS = 2**20
"""Logits held at once: 4 MiB in float32, which stays in cache while a chunk is worked on."""

MIN_CHUNK_TOKENS = 64
"""Fewer rows would read the whole LM head for too little work."""

REMOVED = -1e30
"""Logit of a token outside the kept set: its probability is exactly 0, and 0 * REMOVED is still 0
where 0 * -inf would be NaN."""


class KeptSets(NamedTuple):
    """The ids each token was sampled among: token t owns `ids[offsets[t]:offsets[t + 1]]`."""

    ids_M: Tensor
    offsets_T1: Tensor


def scores(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor,
    bias_V: Tensor | None = None,
    kept: KeptSets | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax((hidden @ head) / temperature), and the entropy.

    Guarantees that no [T, V] tensor outlives a chunk: backward computes the logits again. Both
    results carry gradient to hidden, weight and bias.

    Args:
        hidden_TD: [T, D] any float dtype; the last hidden states that predict the targets.
        weight_VD: [V, D], the LM head.
        targets_T: [T] int64.
        temperature_T: [T], above 0; no gradient.
        bias_V: [V], bias of the LM head.
        kept: the law is renormalised over these ids; each target must be among its own.
        chunk: tokens worked on at once; changes memory, not results (to rounding).
    Returns:
        logprobs_T, entropy_T: [T] float32 (float64 for float64 inputs), nats.
    Raises:
        ValueError: shapes disagree.
    Source: d entropy / d logit_j = -p_j (log p_j + entropy), derived; checked by gradcheck.
    """
    _check_shapes(hidden_TD, weight_VD, targets_T, temperature_T, kept)
    chunk = chunk or max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // weight_VD.shape[0])
    ids, offsets = kept if kept is not None else (None, None)
    return _Scores.apply(  # pyright: ignore[reportReturnType]
        hidden_TD, weight_VD, bias_V, targets_T, temperature_T, ids, offsets, chunk
    )


def _check_shapes(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature_T: Tensor, kept: Any
) -> None:
    num_tokens = hidden_TD.shape[0]
    if hidden_TD.ndim != 2 or hidden_TD.shape[1:] != weight_VD.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)} must be "
            "[T, D] and [V, D]"
        )
    for name, values in (("targets", targets_T), ("temperature", temperature_T)):
        if values.shape != (num_tokens,):
            raise ValueError(f"{name} {tuple(values.shape)} must be [{num_tokens}], as hidden is")
    if kept is not None and kept.offsets_T1.shape != (num_tokens + 1,):
        raise ValueError(f"kept offsets {tuple(kept.offsets_T1.shape)} must be [{num_tokens + 1}]")


class _Scores(torch.autograd.Function):
    """`scores`: saves its inputs and [T] results only."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature_T: Tensor,
        ids_M: Tensor | None,
        offsets_T1: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.chunk = chunk
        dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        logprobs_T = hidden_TD.new_empty(len(targets_T), dtype=dtype)
        entropy_T = torch.empty_like(logprobs_T)
        inputs = (hidden_TD, weight_VD, bias_V, temperature_T, ids_M, offsets_T1)
        for rows in _chunks(len(targets_T), chunk):
            logp_CV = _log_softmax(dtype, rows, *inputs)
            logprobs_T[rows] = logp_CV.gather(1, targets_T[rows, None])[:, 0]
            entropy_T[rows] = logp_CV.exp().mul_(logp_CV).sum(1).neg_()
        ctx.save_for_backward(*inputs, targets_T, entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads_T: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs_T, grad_entropy_T = grads_T
        *inputs, targets_T, entropy_T = ctx.saved_tensors
        hidden_TD, weight_VD, bias_V, temperature_T = inputs[:4]
        weight = weight_VD.to(entropy_T.dtype)
        grad_hidden_TD = torch.zeros_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=weight.dtype)
        for rows in _chunks(len(targets_T), ctx.chunk):
            logp_CV = _log_softmax(entropy_T.dtype, rows, *inputs)
            grad_CV = _logit_gradient(
                logp_CV, targets_T[rows], entropy_T[rows], _at(grad_logprobs_T, rows),
                _at(grad_entropy_T, rows),
            ).div_(temperature_T[rows, None])  # fmt: skip
            grad_hidden_TD[rows] = (grad_CV @ weight).to(hidden_TD.dtype)
            grad_weight_VD.addmm_(grad_CV.T, hidden_TD[rows].to(weight.dtype))
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
        grad_weight = grad_weight_VD.to(weight_VD.dtype)
        grad_bias = None if bias_V is None or grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_TD, grad_weight, grad_bias, None, None, None, None, None


def _chunks(num_tokens: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, num_tokens)) for i in range(0, num_tokens, chunk)]


def _at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _log_softmax(
    dtype: torch.dtype,
    rows: slice,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature_T: Tensor,
    ids_M: Tensor | None,
    offsets_T1: Tensor | None,
) -> Tensor:
    """[C, V] log-probabilities of a chunk, `REMOVED` (nearly) where the kept set excludes."""
    bias = None if bias_V is None else bias_V.to(dtype)
    logits_CV = linear(hidden_TD[rows].to(dtype), weight_VD.to(dtype), bias)
    logits_CV /= temperature_T[rows, None]
    if ids_M is not None and offsets_T1 is not None:
        offsets = offsets_T1[rows.start : rows.stop + 1]
        owner_M = torch.repeat_interleave(offsets.diff())
        kept_CV = torch.full_like(logits_CV, REMOVED)
        index = (owner_M, ids_M[offsets[0] : offsets[-1]].long())
        kept_CV[index] = logits_CV[index]
        logits_CV = kept_CV
    return torch.log_softmax(logits_CV, 1)


def _logit_gradient(
    logp_CV: Tensor,
    targets_C: Tensor,
    entropy_C: Tensor,
    grad_logprobs_C: Tensor | None,
    grad_entropy_C: Tensor | None,
) -> Tensor:
    """[C, V] gradient of the scaled logits; overwrites nothing but its own buffers."""
    probs_CV = logp_CV.exp()
    if grad_entropy_C is None:
        grad_CV = probs_CV
        if grad_logprobs_C is None:
            return grad_CV.zero_()
        grad_CV.mul_(grad_logprobs_C.neg()[:, None])
    else:
        factor_CV = logp_CV.add_(entropy_C[:, None]).mul_(grad_entropy_C.neg()[:, None])
        if grad_logprobs_C is not None:
            factor_CV.sub_(grad_logprobs_C[:, None])
        grad_CV = probs_CV.mul_(factor_CV)
    if grad_logprobs_C is not None:
        rows_C = torch.arange(len(targets_C), device=targets_C.device)
        grad_CV[rows_C, targets_C] += grad_logprobs_C
    return grad_CV
