"""Keys and values: of samples in flight, each row indexed by its own length, and of whole prompts.

A row holds what is a sample's own. Its prompt is either part of that or, where many samples have
it, stored once as `PromptKeys` that all of them read.

Shape suffixes: R rows, K key-value heads, C capacity in tokens, P prompt tokens, M stored tokens,
D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK_TOKENS, BLOCK_ROWS = 64, 8
"""Capacity grows in such steps: fewer reallocations than one by one, little waste."""


class KvShape(NamedTuple):
    """What the keys and values of one token are."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values over all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.dtype.itemsize

    def zeros(self, *sizes: int) -> list[Tensor]:
        """Per layer [2, *sizes[:-1], K, sizes[-1], D]."""
        *rows, tokens = sizes
        shape = (2, *rows, self.num_heads, tokens, self.head_dim)
        # Zeros and not uninitialised memory: a NaN there would survive the mask as 0 * NaN.
        return [torch.zeros(shape, dtype=self.dtype) for _ in range(self.num_layers)]


class PromptKeys:
    """One prompt's keys and values, computed from its start on; then its last hidden state.

    Trace of 5 tokens, computed 3 at a time: num_done 0 -> 3 -> 5, hidden_E set. What a conversation
    kept of an earlier turn is the same thing, and `goes_on`.
    """

    def __init__(
        self, token_ids: np.ndarray, layers: list[Tensor], kv_version: int, num_done: int = 0
    ) -> None:
        """Of P tokens, some of them computed already.

        Args:
            token_ids: [P] int64.
            layers: per layer [2, K, P, D], to be filled.
            kv_version: index of the oldest weights among those that compute it.
            num_done: tokens whose keys and values `layers` holds.
        """
        self.token_ids, self.layers = token_ids, layers
        self.kv_version, self.num_done = kv_version, num_done
        self.hidden_E: Tensor | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens that are still to be computed."""
        return len(self) - self.num_done

    def goes_on(self, token_ids: np.ndarray, shape: KvShape) -> "PromptKeys":
        """A longer prompt that begins with this one."""
        longer = PromptKeys(token_ids, shape.zeros(len(token_ids)), self.kv_version, len(self))
        for theirs, mine in zip(longer.layers, self.layers, strict=True):
            theirs[:, :, : len(self)] = mine
        return longer


class RaggedCache:
    """One [2, R, K, C, D] tensor (keys, values) per layer; token t of a row sits at position t.

    Nothing is padded on the left or realigned. What lies beyond a row's length is finite garbage
    that the attention mask hides. When it must grow, it is made anew for the rows in use and the
    longest of them, so what rows that ended had taken is given back.
    """

    def __init__(self, shape: KvShape) -> None:
        """Reserve nothing yet; `reserve` does."""
        self.shape = shape
        self.layers = shape.zeros(0, 0)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.layers[0].shape[1]

    @property
    def capacity(self) -> int:
        """C."""
        return self.layers[0].shape[3]

    @property
    def num_tokens(self) -> int:
        """Tokens there is memory for."""
        return self.num_rows * self.capacity

    def reserve(self, num_rows: int, num_tokens: int, limit: float) -> None:
        """Make room for `num_rows` of `num_tokens`; what the first rows hold stays.

        Args:
            num_rows: in use, those to come included.
            num_tokens: of the longest of them.
            limit: of tokens over all rows, unless more are asked for; memory beyond it is given
                back.
        """
        fits = num_rows <= self.num_rows and num_tokens <= self.capacity
        if fits and self.num_tokens <= limit:
            return
        rows = -(-num_rows // BLOCK_ROWS) * BLOCK_ROWS
        wanted = max(num_tokens, min(self.capacity * 5 // 4, 2 * num_tokens))
        tokens = -(-wanted // BLOCK_TOKENS) * BLOCK_TOKENS
        if rows * tokens > limit:
            rows, tokens = num_rows, max(num_tokens, int(min(tokens, limit // max(1, num_rows))))
        kept_rows, kept_tokens = min(rows, self.num_rows), min(tokens, self.capacity)
        for index, old in enumerate(self.layers):  # one layer at a time: the peak is one layer
            new = old.new_zeros((2, rows, old.shape[2], tokens, old.shape[4]))
            new[:, :kept_rows, :, :kept_tokens] = old[:, :kept_rows, :, :kept_tokens]
            self.layers[index] = new

    def clear(self) -> None:
        """Give all memory back."""
        self.layers = self.shape.zeros(0, 0)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row to another one."""
        for layer in self.layers:
            layer[:, target, :, :num_tokens] = layer[:, source, :, :num_tokens]

    def copy_of(self, row: int, num_tokens: int) -> list[Tensor]:
        """The first tokens of a row, per layer [2, K, num_tokens, D]."""
        return [layer[:, row, :, :num_tokens].clone() for layer in self.layers]

    def put(self, rows: slice, layers: Sequence[Tensor], begin: int = 0) -> None:
        """Store the same keys and values in some rows, those from `begin` on; there must be room.

        Args:
            rows: to fill.
            layers: per layer [2, K, n, D].
            begin: first of the n tokens to store, at position 0.
        """
        for layer, given in zip(self.layers, layers, strict=True):
            layer[:, rows, :, : given.shape[2] - begin] = given[:, None, :, begin:]

    def wipe(self, row: int) -> None:
        """Zero a row that may hold NaN, before another sample uses it."""
        for layer in self.layers:
            layer[:, row] = 0

    def places(self, rows_M: Tensor, tokens_M: Tensor) -> Tensor:
        """[M * K] where `store` puts the token of each row; valid until the next `reserve`."""
        heads = torch.arange(self.shape.num_heads)
        return (
            (rows_M[:, None] * len(heads) + heads) * self.capacity + tokens_M[:, None]
        ).flatten()

    def store(
        self, layer: int, keys: Tensor, values: Tensor, places: Tensor, num_rows: int, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Store single tokens, and return the first rows as [num_rows, K, tokens, D].

        Args:
            layer: its index.
            keys: [M, K, D].
            values: of the same shape.
            places: [M * K], from `places`.
            num_rows: how many rows to return, as views.
            tokens: how many of their first tokens.
        """
        stored_keys, stored_values = self.layers[layer]
        head_dim = keys.shape[2]
        stored_keys.view(-1, head_dim).index_copy_(0, places, keys.reshape(-1, head_dim))
        stored_values.view(-1, head_dim).index_copy_(0, places, values.reshape(-1, head_dim))
        return stored_keys[:num_rows, :, :tokens], stored_values[:num_rows, :, :tokens]
