"""Token rows that a policy is run over: right-padded, the samples of one prompt side by side.

    one sample a row     p p p a a a .             causal, no mask
    shared prefix        p p p a a a b b c c c .   each of a, b, c sees the prompt and itself
    packed               p p p a a a p p p b b     all samples in one row, no padding, see
                                                   kernels/attention.py

Samples of a group differ only behind their prompt, so the prompt is computed once: with eight short
answers to a long question most of the work is saved, and no log-probability or gradient changes
(tested). Published for inference as Hydragen (arXiv:2402.05099); here it is a mask.

Shape suffixes: B rows, L padded inputs of a row, T scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.attention import Segments

MAX_SHARED_INPUTS = 512
"""Longest row with a shared prefix. Its attention is computed over all pairs of tokens, those that
the mask removes included, which in longer rows costs more than the shared prompt saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Padded token ids, and how each token is placed."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    """[B or 1, L] int64."""
    mask_BLL: Tensor | None
    """[B, L, L] bool, True where a token attends; None: plain causal attention."""
    positions_T: Tensor
    """Where, in [B * L], the hidden state lies that predicts each scored token."""
    targets_T: Tensor
    segments: Segments | None = None
    """Of a packed row: its samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One sample as rows see it."""

    token_ids: np.ndarray
    """The last token predicts nothing and is not fed."""
    places: np.ndarray
    """Positions of the tokens to be scored; none of them 0."""
    num_prefix: int = 0
    """Leading tokens shared with its neighbours in a row; ignored when it is alone."""


def row_width(pieces: Sequence[Piece]) -> int:
    """Inputs of a row that holds these samples."""
    if len(pieces) == 1:
        return len(pieces[0].token_ids) - 1
    shared = pieces[0].num_prefix
    return shared + sum(len(piece.token_ids) - 1 - shared for piece in pieces)


def lay_out(rows: Sequence[Sequence[Piece]]) -> Layout:
    """Line rows up at the left and zero-pad them on the right.

    Padding of unshared rows needs no mask: under causal attention no real token attends to a later
    one.

    Args:
        rows: samples by row; those of one row agree in their first `num_prefix` >= 1 tokens.
    """
    width = max(map(row_width, rows))
    inputs_BL = np.zeros((len(rows), width), dtype=np.int64)
    position_ids_BL = np.tile(np.arange(width), (len(rows), 1))
    segments_BL = np.full((len(rows), width), -1)
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for row, pieces in enumerate(rows):
        shared = pieces[0].num_prefix if len(pieces) > 1 else 0
        inputs_BL[row, :shared] = pieces[0].token_ids[:shared]
        segments_BL[row, :shared] = 0
        start = shared
        for number, piece in enumerate(pieces, start=1):
            end = start + len(piece.token_ids) - 1 - shared
            inputs_BL[row, start:end] = piece.token_ids[shared:-1]
            position_ids_BL[row, start:end] = np.arange(shared, len(piece.token_ids) - 1)
            segments_BL[row, start:end] = number
            predictors = piece.places - 1
            inside = np.where(predictors < shared, predictors, predictors - shared + start)
            positions.append(inside + row * width)
            targets.append(piece.token_ids[piece.places])
            start = end
    sharing = any(len(pieces) > 1 for pieces in rows)
    return Layout(
        input_ids_BL=torch.from_numpy(inputs_BL),
        position_ids_BL=torch.from_numpy(position_ids_BL if sharing else position_ids_BL[:1]),
        mask_BLL=_mask(torch.from_numpy(segments_BL)) if sharing else None,
        positions_T=torch.from_numpy(np.concatenate(positions)),
        targets_T=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
    )


def pack(pieces: Sequence[Piece]) -> Layout:
    """All samples in one row, one behind the other, positions counted anew in each.

    Args:
        pieces: their `num_prefix` is ignored.
    """
    lengths = [len(piece.token_ids) - 1 for piece in pieces]
    starts = np.cumsum([0, *lengths])
    inputs = np.concatenate([piece.token_ids[:-1] for piece in pieces]).astype(np.int64)
    positions = [p.places - 1 + at for p, at in zip(pieces, starts[:-1], strict=True)]
    targets = np.concatenate([piece.token_ids[piece.places] for piece in pieces])
    return Layout(
        input_ids_BL=torch.from_numpy(inputs)[None],
        position_ids_BL=torch.cat([torch.arange(n) for n in lengths])[None],
        mask_BLL=None,
        positions_T=torch.from_numpy(np.concatenate(positions)),
        targets_T=torch.from_numpy(targets.astype(np.int64)),
        segments=Segments.of(lengths),
    )


def _mask(segments_BL: Tensor) -> Tensor:
    """Causal, within a sample or from a sample to the shared prefix (segment 0)."""
    causal_LL = torch.ones(segments_BL.shape[1], segments_BL.shape[1], dtype=torch.bool).tril()
    keys_BL = segments_BL[:, None, :]
    return causal_LL & ((keys_BL == 0) | (keys_BL == segments_BL[:, :, None]))
