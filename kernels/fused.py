"""Both loss operations by Triton kernels. Importing this needs triton.

`scores`: one kernel for LM head, log-probability and entropy; its backward makes the gradient of
the logits for one slice of the vocabulary after the other, each then met by two plain matrix
products. Those are left to the vendor's library: kernels that also hold a [V, D] or [T, D] sum need
atomic additions, whose order, and with it the result, changes from run to run.

Shape suffixes as in `definition`; S splits of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import definition, triton_loss
from .definition import FullLoss, Head, TokenLoss, check_inputs
from .tiles import INTERPRETED, Tile, tile_of

SLICE_ELEMENTS = 2**25
"""Of the logits' gradient that exists at once: 64 MiB in bfloat16, whatever V."""

POLICY_BLOCK = 256
"""Tokens that one program of the elementwise kernel works on."""


def scores(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """`definition.scores` for a head without kept sets.

    Raises:
        ValueError: shapes disagree, or there are kept sets.
    """
    check_inputs(hidden_TD, targets_T, head)
    if head.kept is not None:
        raise ValueError("the Triton kernels know no kept sets: use kernels/chunked.py")
    return _Scores.apply(  # pyright: ignore[reportReturnType]
        hidden_TD, head.weight_VD, head.bias_V, head.temperature_T.float(), targets_T
    )


def full(hidden_TD: Tensor, targets_T: Tensor, head: Head, token_loss: TokenLoss) -> FullLoss:
    """`definition.full`: the objective sees [T] tensors only, and backward follows as in `scores`.

    A gradient taken in the forward pass would save nothing here: the kernels make the logits twice
    rather than write them once.
    """
    return definition.full(hidden_TD, targets_T, head, token_loss, scores)


class _Scores(torch.autograd.Function):
    """`scores`: saves its inputs and two [T] results."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
        temperature_T: Tensor, targets_T: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        inputs = (hidden_TD.contiguous(), weight_VD.contiguous(), bias_V, temperature_T, targets_T)
        largest_T, total_T, moment_T, chosen_T = _merged(_run_forward(*inputs))
        log_total_T = largest_T + total_T.log()
        entropy_T = total_T.log() - moment_T / total_T
        ctx.save_for_backward(*inputs, log_total_T, entropy_T)
        return chosen_T - log_total_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads_T: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, temperature_T, targets_T, *sums = ctx.saved_tensors
        slopes = [torch.zeros_like(sums[0]) if g is None else g.contiguous() for g in grads_T]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        weight_grad_VD, bias_grad_V = torch.empty_like(weight_VD), _empty_like(bias_V)
        for words in _slices(len(targets_T), len(weight_VD)):
            weight, bias = weight_VD[words], None if bias_V is None else bias_V[words]
            inputs = (hidden_TD, weight, bias, temperature_T, targets_T)
            logits_TW = _run_gradient(*inputs, *sums, *slopes, first_word=words.start)
            if needs_hidden:
                hidden_grad_TD += _product(logits_TW, weight)
            if needs_weight:
                weight_grad_VD[words] = _product(logits_TW.T, hidden_TD)
            if bias_grad_V is not None:
                bias_grad_V[words] = logits_TW.sum(0, dtype=torch.float32)
        return (
            hidden_grad_TD.to(hidden_TD.dtype) if needs_hidden else None,
            weight_grad_VD if needs_weight else None,
            bias_grad_V if needs_bias else None,
            None,
            None,
        )


def _empty_like(values: Tensor | None) -> Tensor | None:
    return None if values is None else torch.empty_like(values)


def _slices(num_tokens: int, num_words: int) -> list[slice]:
    size = max(128, SLICE_ELEMENTS // max(1, num_tokens) // 128 * 128)
    return [slice(i, min(i + size, num_words)) for i in range(0, num_words, size)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product summed and returned in float32."""
    if left.dtype == torch.float32 or not left.is_cuda:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def _tile(kernel: str, values: Tensor) -> Tile:
    if not values.is_cuda:
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(values.device)
    return tile_of(kernel, 10 * major + minor, values.element_size())


def _constants(tile: Tile, width: int, bias: Tensor | None) -> dict[str, Any]:
    return {
        "HAS_BIAS": bias is not None,
        "EVEN": width % tile.depth == 0,
        "TOKENS": tile.tokens,
        "WORDS": tile.words,
        "DEPTH": tile.depth,
        # three passes over float32 inputs: as accurate as float32, on tensor cores
        "PRECISION": "interpreted" if tile is INTERPRETED else "tf32x3",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _run_forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature_T: Tensor,
    targets_T: Tensor,
) -> Tensor:
    """[4, S, T]: largest logit, sum, moment and the target's logit of each split."""
    (num_words, width), num_tokens = weight_VD.shape, len(targets_T)
    tile = _tile("forward", hidden_TD)
    blocks, tiles = _cdiv(num_tokens, tile.tokens), _cdiv(num_words, tile.words)
    splits = min(tiles, max(1, _cdiv(2 * _num_processors(hidden_TD), max(1, blocks))))
    per_split = _cdiv(tiles, splits) * tile.words
    splits = _cdiv(num_words, per_split)
    parts = torch.empty(4, splits, num_tokens, dtype=torch.float32, device=hidden_TD.device)
    if num_tokens:
        _launch(
            triton_loss.forward, (blocks, splits),
            hidden_TD, weight_VD, bias_V, temperature_T, targets_T, *parts,
            num_tokens, num_words, width, per_split, **_constants(tile, width, bias_V),
        )  # fmt: skip
    return parts


def _num_processors(values: Tensor) -> int:
    if not values.is_cuda:
        return 4
    return torch.cuda.get_device_properties(values.device).multi_processor_count


def _merged(parts_4ST: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T] each: the splits' numbers about one largest logit."""
    largest_ST, total_ST, moment_ST, chosen_ST = parts_4ST
    largest_T = largest_ST.amax(0)
    step_ST = largest_ST - largest_T
    shrink_ST = step_ST.exp()
    moment_T = (shrink_ST * (moment_ST + total_ST * step_ST)).sum(0)
    return largest_T, (shrink_ST * total_ST).sum(0), moment_T, chosen_ST.sum(0)


def _run_gradient(
    hidden_TD: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None,
    temperature_T: Tensor,
    targets_T: Tensor,
    *sums_and_slopes_T: Tensor,
    first_word: int,
) -> Tensor:
    """[T, W] gradient of the logits of a slice of the vocabulary, in the inputs' dtype."""
    (num_words, width), num_tokens = weight_WD.shape, len(targets_T)
    tile = _tile("gradient", hidden_TD)
    out_TW = hidden_TD.new_empty(num_tokens, num_words)
    if num_tokens:
        grid = (_cdiv(num_tokens, tile.tokens), _cdiv(num_words, tile.words))
        _launch(
            triton_loss.gradient, grid,
            hidden_TD, weight_WD, bias_W, temperature_T, targets_T, *sums_and_slopes_T, out_TW,
            num_tokens, num_words, width, first_word, **_constants(tile, width, bias_W),
        )  # fmt: skip
    return out_TW


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLaw:
    """The closed list of objectives that `policy_loss` knows, as `learner/objective.py` means them
    (tested equal): token ratios, token corrections, k3."""

    surrogate: Literal["ppo", "cispo"]
    clip_low: float
    clip_high: float
    correction: Literal["truncate", "mask", "none"]
    correction_low: float
    correction_high: float
    kl_coefficient: float
    entropy_coefficient: float


def policy_loss(
    current_C: Tensor,
    entropy_C: Tensor,
    law: PolicyLaw,
    *,
    proximal_C: Tensor,
    behaviour_C: Tensor,
    advantages_C: Tensor,
    weights_C: Tensor,
    reference_C: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, differentiable by log-probability and entropy, and what is reported.

    Args:
        current_C: [C] float32 log-probabilities under the policy being trained.
        entropy_C: [C] float32, nats.
        law: the objective.
        proximal_C: [C] float32 log-probabilities, without gradient, as the other two policies'.
        behaviour_C: .
        advantages_C: [C] float32.
        weights_C: [C] float32, of each token in the loss, its denominator included.
        reference_C: None: there is no KL term.
    Returns:
        [C] float32 loss, and [C] tensors by name: `ratio`, `correction`, `kl_behaviour` and, with a
        reference, `kl_reference`, float32; `clipped` and `limited`, bool.
    """
    terms = (proximal_C, behaviour_C, advantages_C, weights_C, reference_C)
    loss_C, *seen = _Policy.apply(  # pyright: ignore[reportGeneralTypeIssues]
        current_C, entropy_C, law, *terms
    )
    return loss_C, dict(zip(SEEN if reference_C is not None else SEEN[:-1], seen, strict=False))


SEEN = ("ratio", "correction", "kl_behaviour", "clipped", "limited", "kl_reference")


class _Policy(torch.autograd.Function):
    """`policy_loss`: the kernel writes the loss and both slopes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, current_C: Tensor, entropy_C: Tensor, law: PolicyLaw, proximal_C: Tensor,
        behaviour_C: Tensor, advantages_C: Tensor, weights_C: Tensor, reference_C: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        reads = (current_C, entropy_C, proximal_C, behaviour_C)
        reads += (behaviour_C if reference_C is None else reference_C, advantages_C, weights_C)
        loss_C, by_logprob_C, by_entropy_C = (torch.empty_like(current_C) for _ in range(3))
        ratio_C, correction_C, behaviour_kl_C, reference_kl_C = (
            torch.empty_like(current_C) for _ in range(4)
        )
        clipped_C, limited_C = (torch.empty_like(current_C, dtype=torch.bool) for _ in range(2))
        if num_tokens := len(current_C):
            _launch(
                triton_loss.policy_loss, (_cdiv(num_tokens, POLICY_BLOCK),),
                *(values.contiguous() for values in reads), loss_C, by_logprob_C, by_entropy_C,
                ratio_C, correction_C, behaviour_kl_C, reference_kl_C, clipped_C, limited_C,
                num_tokens, law.clip_low, law.clip_high, law.correction_low, law.correction_high,
                law.kl_coefficient, law.entropy_coefficient,
                CISPO=law.surrogate == "cispo", CORRECTION=law.correction,
                HAS_REFERENCE=reference_C is not None, BLOCK=POLICY_BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(by_logprob_C, by_entropy_C)
        seen = (ratio_C, correction_C, behaviour_kl_C, clipped_C, limited_C, reference_kl_C)
        ctx.mark_non_differentiable(*seen)
        return loss_C, *seen

    @staticmethod
    def backward(ctx: Any, *grads_C: Any) -> tuple[Tensor | None, ...]:
        by_logprob_C, by_entropy_C = ctx.saved_tensors
        return grads_C[0] * by_logprob_C, grads_C[0] * by_entropy_C, *(None,) * 6
