"""Which implementation of the loss operations runs for these tensors, and why."""

import importlib.util
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import chunked
from .definition import FullLoss, Head, TokenLoss

OLDEST_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """An implementation, and the reason for it in words."""

    name: Literal["chunked", "triton"]
    reason: str


def choose(hidden_TD: Tensor, head: Head) -> Choice:
    """The implementation for these tensors; imports nothing."""
    if reason := why_not_triton(hidden_TD):
        return Choice("chunked", reason)
    if head.kept is not None:
        return Choice("chunked", "the ratio law is kept_set, which the Triton kernels do not know")
    if hidden_TD.dtype != head.weight_VD.dtype or hidden_TD.element_size() > 4:
        dtypes = f"{hidden_TD.dtype} and {head.weight_VD.dtype}"
        return Choice("chunked", f"the Triton kernels take one dtype of 2 or 4 bytes, not {dtypes}")
    capability = torch.cuda.get_device_capability(hidden_TD.device)
    return Choice("triton", f"CUDA tensors, compute capability {capability}")


def why_not_triton(values: Tensor) -> str:
    """Why no Triton kernel can run where the values are; empty: one can."""
    if not values.is_cuda:
        return f"the tensors are on {values.device.type}, not on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (the extra `triton`)"
    capability = torch.cuda.get_device_capability(values.device)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability} is below {OLDEST_CAPABILITY}"
    return ""


def scores(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """`definition.scores` by the implementation that fits."""
    return _chosen(hidden_TD, head).scores(hidden_TD, targets_T, head)


@torch.no_grad()
def frozen_scores(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """`scores` without gradient, for proximal and reference policies: one matrix product.

    Equal to the bit to what `full` and `scores` compute from the same tensors.
    """
    return scores(hidden_TD, targets_T, head)


def full(hidden_TD: Tensor, targets_T: Tensor, head: Head, token_loss: TokenLoss) -> FullLoss:
    """`definition.full` by the implementation that fits."""
    return _chosen(hidden_TD, head).full(hidden_TD, targets_T, head, token_loss)


def _chosen(hidden_TD: Tensor, head: Head) -> ModuleType:
    if choose(hidden_TD, head).name == "chunked":
        return chunked
    from . import fused  # imports triton

    return fused
