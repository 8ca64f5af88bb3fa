"""Attention of the tokens of one forward: over prompts being computed, or over rows in flight.

Shape suffixes: M packed tokens, N rows, T most tokens of a row, L longest row, P prompt tokens,
H query heads, K key-value heads, G = H / K, D head dimension, B = N * K, Q = G * T.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .kv_cache import PromptKeys, RaggedCache

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What `scaled_dot_product_attention` calls; it also returns the log of the sum of exponentials."""


class Attend(Protocol):
    """Stores the keys and values of one layer's tokens and attends; returns [M, H * D]."""

    def __call__(
        self, layer: int, query_MHD: Tensor, key_MKD: Tensor, value_MKD: Tensor
    ) -> Tensor: ...


class PromptAttention:
    """Causal attention of the next tokens of some prompts."""

    def __init__(self, parts: Sequence[tuple[PromptKeys, int]], scale: float) -> None:
        """Each prompt with how many of its tokens are fed; they lie one prompt after another."""
        self._scale = scale
        self._parts: list[tuple[PromptKeys, int, int, Tensor | None]] = []
        for prompt, count in parts:
            begin, end = prompt.num_done, prompt.num_done + count
            mask = torch.ones(count, end, dtype=torch.bool).tril(begin) if begin else None
            self._parts.append((prompt, begin, end, mask))
        self._counts = [count for _, count in parts]

    def __call__(self, layer: int, query_MHD: Tensor, key_MKD: Tensor, value_MKD: Tensor) -> Tensor:
        """See `Attend`."""
        packed = (
            x.transpose(0, 1).split(self._counts, dim=1) for x in (query_MHD, key_MKD, value_MKD)
        )
        outs = []
        for (prompt, begin, end, mask), query, key, value in zip(self._parts, *packed, strict=True):
            keys, values = prompt.layers[layer]
            keys[:, begin:end], values[:, begin:end] = key, value
            out = functional.scaled_dot_product_attention(
                query[None], keys[None, :, :end], values[None, :, :end],
                mask, is_causal=mask is None, scale=self._scale, enable_gqa=True,
            )  # fmt: skip
            outs.append(out[0].transpose(0, 1).reshape(end - begin, -1))
        return torch.cat(outs)


class Shared(NamedTuple):
    """A prompt that some rows of a forward have in common."""

    prompt: PromptKeys
    rows: Tensor | slice
    """[n] int64, or where they follow one another a slice, which gathers nothing."""


class RowAttention:
    """Attention of new tokens over what their rows hold, themselves included, and over the prompts
    that rows share.

    A shared prompt is read once for all its rows, as one matrix product; both parts are then merged
    by the log of their sums of exponentials. Source: Hydragen (arXiv:2402.05099), section 3.
    """

    def __init__(
        self,
        cache: RaggedCache,
        rows: np.ndarray,
        places: np.ndarray,
        shared: Sequence[Shared],
        heads: int,
        scale: float,
    ) -> None:
        """Work out once per forward where tokens go and what each may see.

        Args:
            cache: with room for the longest row.
            rows: [M] int64, ascending; every row from 0 to N - 1 has at least one token.
            places: [M] int64, where in its row each token goes.
            shared: prompts before position 0 of some rows; no row is named twice.
            heads: H.
            scale: of scores.
        """
        self._cache, self._shared, self._scale = cache, shared, scale
        counts = np.bincount(rows)
        self._num_rows, self._width = len(counts), int(counts.max())
        self._num_places = int(places.max()) + 1
        starts = np.cumsum(counts) - counts
        cells = rows * self._width + np.arange(len(rows)) - starts[rows]
        padded = len(counts) * self._width > len(rows)
        self._ragged = torch.from_numpy(cells) if padded else None
        last_NT = np.zeros(self._num_rows * self._width, dtype=np.int64)
        last_NT[cells] = places
        hidden_NTL = torch.arange(self._num_places) > torch.from_numpy(last_NT)[:, None]
        mask = torch.zeros(hidden_NTL.shape, dtype=cache.shape.dtype)
        mask.masked_fill_(hidden_NTL, -torch.inf)
        key_heads = cache.shape.num_heads
        copies = heads // key_heads if self._width > 1 else 1  # a mask of one query is broadcast
        by_head = mask.view(self._num_rows, 1, self._width, self._num_places)
        by_head = by_head.expand(-1, key_heads * copies, -1, -1)
        self._mask_BQL = by_head.reshape(self._num_rows * key_heads, -1, self._num_places)
        self._targets = cache.places(rows, places)

    def __call__(self, layer: int, query_MHD: Tensor, key_MKD: Tensor, value_MKD: Tensor) -> Tensor:
        """See `Attend`; the query heads of a key-value head are folded into one product, so keys
        are not repeated."""
        rows, width, tokens = self._num_rows, self._width, self._num_places
        keys_NKLD, values_NKLD = self._cache.store(
            layer, key_MKD, value_MKD, self._targets, rows, tokens
        )
        query, (_, heads, head_dim) = query_MHD, query_MHD.shape
        key_heads = keys_NKLD.shape[1]
        if self._ragged is not None:
            padded = query.new_zeros(rows * width, heads, head_dim)
            query = padded.index_copy_(0, self._ragged, query)
        grouped = query.view(rows, width, key_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
        grouped = grouped.reshape(rows * key_heads, -1, head_dim)
        keys = keys_NKLD.flatten(0, 1).transpose(1, 2)
        scores = torch.baddbmm(self._mask_BQL, grouped, keys, alpha=self._scale)
        values = values_NKLD.flatten(0, 1)
        if self._shared:
            out = self._merged(layer, grouped.view(rows, key_heads, -1, head_dim), scores, values)
        else:
            precise = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
            out = torch.bmm(scores.softmax(dim=-1, dtype=precise).to(query.dtype), values)
        out = out.view(rows, key_heads, -1, width, head_dim).permute(0, 3, 1, 2, 4)
        out_MF = out.reshape(rows * width, heads * head_dim)
        return out_MF if self._ragged is None else out_MF[self._ragged]

    def _merged(self, layer: int, query_NKQD: Tensor, scores: Tensor, values: Tensor) -> Tensor:
        """[N, K, G * T, D]: attention over both parts, for rows that share a prompt."""
        own, own_mass = _attention(scores, values)
        own, own_mass = own.view(query_NKQD.shape), own_mass.view(*query_NKQD.shape[:3], 1)
        for prompt, rows in self._shared:
            keys_KPD, values_KPD = prompt.layers[layer]
            query_nKQD = query_NKQD[rows]
            query_KQD = query_nKQD.transpose(0, 1).reshape(len(keys_KPD), -1, keys_KPD.shape[2])
            out, mass = _flash(query_KQD[None], keys_KPD[None], values_KPD[None], scale=self._scale)
            by_row = (len(keys_KPD), len(query_nKQD), query_nKQD.shape[2], -1)
            out, mass = (x.reshape(by_row).transpose(0, 1) for x in (out, mass))
            share = torch.sigmoid(own_mass[rows] - mass).to(own.dtype)
            own[rows] = torch.lerp(out, own[rows], share)
        return own


def _attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values weighed by softmax, and the log of the sum of exponentials (one per query, kept as a
    last dimension of 1; float32 at least), which the largest score and its share tell without
    another exponential each."""
    precise = scores.float() if scores.dtype == torch.bfloat16 else scores
    shares = precise.softmax(-1)
    mass = precise.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()
    return torch.bmm(shares.to(values.dtype), values), mass
