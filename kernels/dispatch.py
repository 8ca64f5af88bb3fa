"""Which implementation of the loss operations runs for these tensors, and why."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import chunked
from .definition import FullLoss, Head, TokenLoss


class Choice(NamedTuple):
    """An implementation, and the reason for it in words."""

    name: Literal["chunked"]
    reason: str


def choose(hidden_TD: Tensor, head: Head) -> Choice:
    """The implementation for these tensors."""
    return Choice("chunked", f"the tensors are on {hidden_TD.device.type}")


def scores(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """`definition.scores` by the implementation that fits."""
    return chunked.scores(hidden_TD, targets_T, head)


@torch.no_grad()
def frozen_scores(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """`scores` without gradient, for proximal and reference policies: one matrix product.

    Equal to the bit to what `full` and `scores` compute from the same tensors.
    """
    return scores(hidden_TD, targets_T, head)


def full(hidden_TD: Tensor, targets_T: Tensor, head: Head, token_loss: TokenLoss) -> FullLoss:
    """`definition.full` by the implementation that fits."""
    return chunked.full(hidden_TD, targets_T, head, token_loss)
