"""Both loss operations a chunk of tokens at a time: the CPU's path, and the fallback elsewhere.

No [T, V] tensor ever exists. `full` meets each chunk of logits once and takes the gradient there
and then: three matrix products in all, where autograd over a recomputed forward needs four. Within
a chunk, everything that is not a matrix product works on blocks of rows that stay in cache.

Shape suffixes: T tokens, C of one chunk, B of one block, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .definition import (
    REMOVED,
    FullLoss,
    Head,
    KeptSets,
    TokenLoss,
    check_inputs,
    check_losses,
    keep_only,
    result_dtype,
)

CHUNK_TOKENS = 256
"""Fewer read and write the whole head and its gradient too often for too little work."""

CHUNK_ELEMENTS = 2**20
"""With a small vocabulary a chunk holds as many tokens as make 4 MiB of float32 logits."""

BLOCK_ELEMENTS = 2**18
"""1 MiB of float32: two such tensors stay in a core's cache."""


def scores(
    hidden_TD: Tensor, targets_T: Tensor, head: Head, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """`definition.scores`, with gradient to hidden, weight and bias; backward computes the logits
    of a chunk again.

    Args:
        hidden_TD: as in the definition, so are `targets_T` and `head`.
        targets_T: .
        head: .
        chunk: tokens worked on at once; changes memory, not results (to rounding).
    """
    check_inputs(hidden_TD, targets_T, head)
    return _Scores.apply(  # pyright: ignore[reportReturnType]
        hidden_TD, head.weight_VD, head.bias_V, targets_T, head, chunk or chunk_tokens(head)
    )


def full(
    hidden_TD: Tensor,
    targets_T: Tensor,
    head: Head,
    token_loss: TokenLoss,
    chunk: int | None = None,
) -> FullLoss:
    """`definition.full`, its gradient taken in the forward pass."""
    check_inputs(hidden_TD, targets_T, head)
    seen: dict[str, list[Tensor]] = {}
    loss, logprobs_T, entropy_T = _Full.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden_TD,
        head.weight_VD,
        head.bias_V,
        targets_T,
        head,
        token_loss,
        seen,
        torch.is_grad_enabled(),
        chunk or chunk_tokens(head),
    )
    return FullLoss(loss, logprobs_T, entropy_T, {name: torch.cat(v) for name, v in seen.items()})


def chunk_tokens(head: Head) -> int:
    """How many tokens are worked on at once."""
    return max(CHUNK_TOKENS, CHUNK_ELEMENTS // head.weight_VD.shape[0])


class _Inputs(NamedTuple):
    """Detached, the head in the dtype of the sums."""

    hidden_TD: Tensor
    targets_T: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    temperature_T: Tensor | None
    """None where it is 1 everywhere."""
    kept: KeptSets | None

    @classmethod
    def of(cls, hidden_TD: Tensor, targets_T: Tensor, head: Head) -> "_Inputs":
        dtype = result_dtype(hidden_TD)
        return cls(
            hidden_TD.detach(),
            targets_T,
            head.weight_VD.detach().to(dtype),
            None if head.bias_V is None else head.bias_V.detach().to(dtype),
            None if bool((head.temperature_T == 1).all()) else head.temperature_T.to(dtype),
            head.kept,
        )

    def chunks(self, size: int) -> Iterator[slice]:
        """At least one, which is empty where there are no tokens."""
        total = len(self.targets_T)
        return (slice(i, min(i + size, total)) for i in range(0, max(1, total), size))

    def hidden(self, rows: slice) -> Tensor:
        return self.hidden_TD[rows].to(self.weight_VD.dtype)

    def logits(self, rows: slice, out_CV: Tensor) -> None:
        """Before temperature and kept sets, which are applied a block at a time."""
        torch.mm(self.hidden(rows), self.weight_VD.T, out=out_CV)

    def log_softmax(self, logits_BV: Tensor, rows: slice) -> Tensor:
        """[B, V] log-probabilities; may overwrite its argument."""
        if self.bias_V is not None:
            logits_BV.add_(self.bias_V)
        if self.temperature_T is not None:
            logits_BV.div_(self.temperature_T[rows, None])
        if self.bias_V is not None:
            logits_BV.clamp_(min=REMOVED)
        if self.kept is not None:
            logits_BV = keep_only(logits_BV, self.kept, rows)
        return torch.log_softmax(logits_BV, 1)


class _Chunk:
    """The logits of some tokens, turned in place into probabilities, then into their gradient."""

    def __init__(self, inputs: _Inputs, rows: slice, buffer_CV: Tensor) -> None:
        self.inputs, self.rows = inputs, rows
        self.values_CV = buffer_CV[: rows.stop - rows.start]
        inputs.logits(rows, self.values_CV)
        self.logprobs_C = self.values_CV.new_empty(len(self.values_CV))
        self.entropy_C = torch.empty_like(self.logprobs_C)
        for block, of_all in self._blocks():
            logits_BV, targets_B1 = self.values_CV[block], inputs.targets_T[of_all, None]
            logp_BV = inputs.log_softmax(logits_BV, of_all)
            self.logprobs_C[block] = logp_BV.gather(1, targets_B1)[:, 0]
            torch.exp(logp_BV, out=logits_BV)
            self.entropy_C[block] = torch.linalg.vecdot(logits_BV, logp_BV).neg_()

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of this chunk, and the same rows counted from the first token of all."""
        size, start = max(1, BLOCK_ELEMENTS // self.values_CV.shape[1]), self.rows.start
        for i in range(0, len(self.values_CV), size):
            end = min(i + size, len(self.values_CV))
            yield slice(i, end), slice(start + i, start + end)

    def to_gradient(self, by_logprob_C: Tensor, by_entropy_C: Tensor | None) -> Tensor:
        """[C, V] gradient of the logits, with dL/dlogprob and dL/dentropy of each token given."""
        by_logprob_C1 = self._by_logit(by_logprob_C)
        if by_entropy_C is None:
            for block, _ in self._blocks():
                self.values_CV[block].mul_(-by_logprob_C1[block])
        else:
            slope_C1 = -self._by_logit(by_entropy_C)
            factor_C1 = slope_C1 * self.entropy_C[:, None] - by_logprob_C1
            for block, _ in self._blocks():
                # log p from p: its one error is p's rounding, and where p is 0 the product is 0
                logp_BV = torch.log(self.values_CV[block]).clamp_(min=REMOVED)
                torch.addcmul(factor_C1[block], logp_BV, slope_C1[block], out=logp_BV)
                self.values_CV[block].mul_(logp_BV)
        targets_C1 = self.inputs.targets_T[self.rows, None]
        return self.values_CV.scatter_add_(1, targets_C1, by_logprob_C1)

    def _by_logit(self, slope_C: Tensor) -> Tensor:
        """[C, 1]: before the temperature was applied."""
        temperature_T = self.inputs.temperature_T
        return (slope_C if temperature_T is None else slope_C / temperature_T[self.rows])[:, None]


class _Gradients:
    """Of hidden, weight and bias, summed over chunks in the dtype of the sums."""

    def __init__(self, inputs: _Inputs, needs: tuple[bool, ...]) -> None:
        hidden, weight, bias = inputs.hidden_TD, inputs.weight_VD, inputs.bias_V
        self.inputs = inputs
        self.hidden_TD = torch.empty_like(hidden) if needs[0] else None
        self.weight_VD = torch.zeros_like(weight) if needs[1] else None
        self.bias_V = torch.zeros_like(bias) if bias is not None and needs[2] else None

    def add(self, rows: slice, logits_CV: Tensor) -> None:
        """Given the gradient of a chunk's logits."""
        if self.hidden_TD is not None:
            self.hidden_TD[rows] = (logits_CV @ self.inputs.weight_VD).to(self.hidden_TD.dtype)
        if self.weight_VD is not None:
            self.weight_VD.addmm_(logits_CV.T, self.inputs.hidden(rows))
        if self.bias_V is not None:
            self.bias_V += logits_CV.sum(0)

    def as_inputs(self, head: Head) -> tuple[Tensor | None, ...]:
        """In the dtypes of the inputs, as autograd wants them."""
        weight, bias = self.weight_VD, self.bias_V
        return (
            self.hidden_TD,
            None if weight is None else weight.to(head.weight_VD.dtype),
            None if bias is None or head.bias_V is None else bias.to(head.bias_V.dtype),
        )


class _Scores(torch.autograd.Function):
    """`scores`: saves its inputs only."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor,
        head: Head, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T)
        ctx.law, ctx.chunk = (head.temperature_T, head.kept), chunk
        inputs = _Inputs.of(hidden_TD, targets_T, head)
        buffer_CV = _buffer(inputs, chunk)
        parts = [_Chunk(inputs, rows, buffer_CV) for rows in inputs.chunks(chunk)]
        return _joined(parts)

    @staticmethod
    def backward(ctx: Any, *grads_T: Tensor | None) -> tuple[Tensor | None, ...]:
        by_logprob_T, by_entropy_T = grads_T
        hidden_TD, weight_VD, bias_V, targets_T = ctx.saved_tensors
        head = Head(weight_VD, ctx.law[0], bias_V, ctx.law[1])
        inputs = _Inputs.of(hidden_TD, targets_T, head)
        if by_logprob_T is None:
            by_logprob_T = torch.zeros_like(targets_T, dtype=inputs.weight_VD.dtype)
        gradients, buffer_CV = _Gradients(inputs, ctx.needs_input_grad), _buffer(inputs, ctx.chunk)
        for rows in inputs.chunks(ctx.chunk):
            by_entropy_C = None if by_entropy_T is None else by_entropy_T[rows]
            part = _Chunk(inputs, rows, buffer_CV)
            gradients.add(rows, part.to_gradient(by_logprob_T[rows], by_entropy_C))
        return *gradients.as_inputs(head), None, None, None


class _Full(torch.autograd.Function):
    """`full`: holds the gradients from the forward pass until backward scales them."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor,
        head: Head, token_loss: TokenLoss, seen: dict[str, list[Tensor]], training: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        inputs = _Inputs.of(hidden_TD, targets_T, head)
        needs = ctx.needs_input_grad if training else (False,) * 3
        gradients, buffer_CV = _Gradients(inputs, needs), _buffer(inputs, chunk)
        loss, parts = inputs.weight_VD.new_zeros(()), []
        for rows in inputs.chunks(chunk):
            part = _Chunk(inputs, rows, buffer_CV)
            scores_C = part.logprobs_C, part.entropy_C
            loss_C, slopes_C = token_gradients(token_loss, *scores_C, rows, seen)
            loss += loss_C.sum()
            parts.append(part)
            if any(needs[:3]):
                gradients.add(rows, part.to_gradient(*slopes_C))
        ctx.gradients = gradients.as_inputs(head)
        joined = _joined(parts)
        ctx.mark_non_differentiable(*joined)
        return loss, *joined

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("`full` keeps its gradients for one backward pass only")
        if float(grad_loss) != 1:
            gradients = tuple(g if g is None else g.mul_(grad_loss) for g in gradients)
        return *gradients, *(None,) * 6


def token_gradients(
    token_loss: TokenLoss,
    logprobs_C: Tensor,
    entropy_C: Tensor,
    rows: slice,
    seen: dict[str, list[Tensor]],
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """[C] loss of a chunk, and its derivatives by log-probability and by entropy (None: none).

    Args:
        token_loss: the objective.
        logprobs_C: without gradient, as `entropy_C`.
        entropy_C: .
        rows: which tokens they are.
        seen: what the objective reports is appended here.
    """
    with torch.enable_grad():
        leaves = logprobs_C.detach().requires_grad_(), entropy_C.detach().requires_grad_()
        loss_C, seen_C = token_loss(*leaves, rows)
        check_losses(loss_C, seen_C, logprobs_C)
        by_logprob_C, by_entropy_C = torch.autograd.grad(
            loss_C.sum() + 0 * leaves[0].sum(), leaves, allow_unused=True
        )
    for name, values in seen_C.items():
        seen.setdefault(name, []).append(values.detach())
    return loss_C.detach(), (by_logprob_C, by_entropy_C)


def _buffer(inputs: _Inputs, chunk: int) -> Tensor:
    weight = inputs.weight_VD
    return weight.new_empty(min(chunk, len(inputs.targets_T)), weight.shape[0])


def _joined(parts: list[_Chunk]) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([part.logprobs_C for part in parts]),
        torch.cat([part.entropy_C for part in parts]),
    )
