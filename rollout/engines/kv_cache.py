"""Keys and values: of samples in flight, each row indexed by its own length, and of whole prompts.

A row holds what is a sample's own. Its prompt is either part of that or, where many samples have
it, stored once as `PromptKeys` that all of them read.

Shape suffixes: R rows, K key-value heads, C capacity in tokens, P prompt tokens, M stored tokens,
D head dimension, N rows in use.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

if sys.platform == "linux":
    from mmap import MADV_DONTNEED, MADV_NOHUGEPAGE

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, unnamed by `mmap` before Python 3.13: address space is not counted as memory."""


Tokens = TypeVar("Tokens", int, np.ndarray)


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

    @property
    def page_tokens(self) -> int:
        """Tokens of one head that fill whole pages."""
        return PAGESIZE // math.gcd(PAGESIZE, self.head_dim * self.dtype.itemsize)

    def in_pages(self, tokens: Tokens) -> Tokens:
        """Rounded up to whole pages: what a row of so many tokens takes."""
        return -(-tokens // self.page_tokens) * self.page_tokens

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

    R and C are address space. Memory is taken page by page when tokens are first stored, so

    - a row takes what its own tokens take, in whole pages, however long the longest row is;
    - nothing is padded on the left or realigned, and a token that is stored stays where it is, as
      long as no row must grow beyond C;
    - when a sample ends, its pages go back to the system at once (outside Linux to the next sample
      in that row); of the other rows only the last in use is copied, into the gap.

    What lies beyond a row's length is finite garbage that the attention mask hides: zeros, or
    drafts that were wrong. Source: vAttention (arXiv:2405.04437), with the system's own pages.
    """

    def __init__(self, shape: KvShape, num_rows: int) -> None:
        """Of at most so many rows; `reserve` says how long they may grow."""
        self.shape, self._num_rows = shape, num_rows
        self.stored_R = np.zeros(num_rows, dtype=np.int64)
        """[R] tokens of each row whose pages are taken."""
        made = [self._mapped(shape.page_tokens) for _ in range(shape.num_layers)]
        self.layers, self._maps = [layer for layer, _ in made], [pages for _, pages in made]

    @property
    def capacity(self) -> int:
        """C."""
        return self.layers[0].shape[3]

    @property
    def num_tokens(self) -> int:
        """Tokens there is memory for."""
        return int(self.shape.in_pages(self.stored_R).sum())

    def with_lengths(self, lengths_N: np.ndarray) -> np.ndarray:
        """[N] tokens there is memory for in the first rows, once they are at least so long."""
        return self.shape.in_pages(np.maximum(self.stored_R[: len(lengths_N)], lengths_N))

    def reserve(self, num_tokens: int) -> None:
        """Let rows grow to so many tokens; what they hold stays."""
        if num_tokens <= self.capacity:
            return
        capacity = self.shape.in_pages(max(num_tokens, 2 * self.capacity))
        for index, old in enumerate(self.layers):  # one layer at a time: the peak is one layer
            new, pages = self._mapped(capacity)
            for row in np.flatnonzero(self.stored_R).tolist():
                stored = int(self.stored_R[row])
                new[:, row, :, :stored] = old[:, row, :, :stored]
            self.layers[index], self._maps[index] = new, pages

    def _mapped(self, capacity: int) -> tuple[Tensor, mmap]:
        """Address space of one layer for rows of so many tokens, which reads as zeros."""
        shape = self.shape
        sizes = (2, self._num_rows, shape.num_heads, capacity, shape.head_dim)
        num_bytes = math.prod(sizes) * shape.dtype.itemsize
        pages = mmap(-1, num_bytes, MAP_PRIVATE | MAP_ANONYMOUS | _NO_RESERVE)
        if sys.platform == "linux":  # a huge page would hold memory for rows that have ended
            with suppress(OSError):  # a kernel that has none
                pages.madvise(MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=shape.dtype).view(sizes), pages

    def release(self, row: int, last: int) -> None:
        """Give a row's memory back; the last row in use, which may be the same, takes its place:
        over the pages that are there, because fresh ones cost more than the copy."""
        stored = int(self.stored_R[last]) if row != last else 0
        in_pages = self.shape.in_pages(stored)
        for layer in self.layers if stored else ():
            layer[:, row, :, :in_pages] = layer[:, last, :, :in_pages]
        self._give_back(row, in_pages)
        if row != last:
            self._give_back(last)
        self.stored_R[row] = stored

    def _give_back(self, row: int, begin: int = 0) -> None:
        """A row's pages from a token on; it reads as zeros there, also where it held NaN."""
        end = int(self.shape.in_pages(self.stored_R[row]))
        self.stored_R[row] = 0
        if end <= begin:
            return
        heads, token_bytes = self.shape.num_heads, self.layers[0][0, 0, 0, 0].nbytes
        firsts = [
            ((part * heads + head) * self.capacity + begin) * token_bytes
            for part in (row, self._num_rows + row)  # keys, values
            for head in range(heads)
        ]
        for layer, of in zip(self.layers, self._maps, strict=True):
            if sys.platform == "linux":
                for first in firsts:
                    of.madvise(MADV_DONTNEED, first, (end - begin) * token_bytes)
            else:
                layer[:, row, :, begin:end] = 0

    def copy_of(self, row: int, num_tokens: int) -> list[Tensor]:
        """The first tokens of a row, per layer [2, K, num_tokens, D]."""
        return [layer[:, row, :, :num_tokens].clone() for layer in self.layers]

    def put(self, rows: slice, layers: Sequence[Tensor], begin: int = 0) -> None:
        """Store the same keys and values in some rows, those from `begin` on.

        Args:
            rows: to fill.
            layers: per layer [2, K, n, D].
            begin: first of the n tokens to store, at position 0.
        """
        stored = layers[0].shape[2] - begin
        self.stored_R[rows] = np.maximum(self.stored_R[rows], stored)
        for layer, given in zip(self.layers, layers, strict=True):
            layer[:, rows, :, :stored] = given[:, None, :, begin:]

    def places(self, rows_M: np.ndarray, tokens_M: np.ndarray) -> Tensor:
        """[M * K] where `store` puts the token of each row; valid until the next `reserve`."""
        np.maximum.at(self.stored_R, rows_M, tokens_M + 1)
        heads = np.arange(self.shape.num_heads)
        places = (rows_M[:, None] * len(heads) + heads) * self.capacity + tokens_M[:, None]
        return torch.from_numpy(places.ravel())

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
