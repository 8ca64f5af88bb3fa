"""Keys and values of many samples, each row indexed by its own length.

Rows are slots 0 .. R-1; token t of a row sits at position t, whatever the other rows do, so nothing
is ever padded on the left or realigned. What lies beyond a row's length is finite garbage that the
attention mask hides.

Shape suffixes: R slots, N rows in use, H key-value heads, C capacity in tokens, P prompt tokens,
D head dimension.
"""

import torch
from torch import Tensor

BLOCK_TOKENS = 64
"""Capacity grows in such steps: fewer reallocations than token by token, little waste."""


class RaggedCache:
    """One [2, R, H, C, D] tensor (keys, values) per layer.

    Transformers' attention modules call `update` of the view handed to them: a `PrefillView` or a
    `DecodeView`, made for one forward.
    """

    def __init__(
        self, *, num_layers: int, num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        """Reserve nothing yet; `reserve` does."""
        shape = (2, num_rows, num_heads, 0, head_dim)
        # Zeros and not uninitialised memory: a NaN there would survive the mask as 0 * NaN.
        self.layers = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]

    @property
    def capacity(self) -> int:
        """C."""
        return self.layers[0].shape[3]

    def reserve(self, num_tokens: int) -> None:
        """Make room for rows of `num_tokens`; what is stored stays."""
        if num_tokens <= self.capacity:
            return
        wanted = max(num_tokens, self.capacity * 5 // 4)
        capacity = -(-wanted // BLOCK_TOKENS) * BLOCK_TOKENS
        for index, old in enumerate(self.layers):  # one layer at a time: the peak is one layer
            new = old.new_zeros((*old.shape[:3], capacity, old.shape[4]))
            new[:, :, :, : old.shape[3]] = old
            self.layers[index] = new

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row to another slot."""
        for layer in self.layers:
            layer[:, target, :, :num_tokens] = layer[:, source, :, :num_tokens]

    def wipe(self, row: int) -> None:
        """Zero a slot that may hold NaN, before another sample uses it."""
        for layer in self.layers:
            layer[:, row] = 0


class PrefillView:
    """Stores the keys and values of whole prompts, each into one slot or several.

    Args:
        cache: with room for the longest prompt.
        slots: [M] int64, the slots to fill.
        prompts: [M] int64, which prompt of the forward goes there; siblings name the same one.
    """

    def __init__(self, cache: RaggedCache, slots: Tensor, prompts: Tensor) -> None:
        self._cache, self._slots, self._prompts = cache, slots, prompts

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store [M', H, P, D] keys and values; attention goes on with them as they are."""
        layer = self._cache.layers[layer_idx][:, :, :, : keys.shape[2]]
        layer[0].index_copy_(0, self._slots, keys[self._prompts])
        layer[1].index_copy_(0, self._slots, values[self._prompts])
        return keys, values


class DecodeView:
    """Appends one token to each of the first N slots.

    Args:
        cache: with room for the longest row and its new token.
        lengths: [N] int64, tokens each row holds: where its new one goes.
        num_tokens: the longest row with its new token.
    """

    def __init__(self, cache: RaggedCache, lengths: Tensor, num_tokens: int) -> None:
        self._cache, self._num_tokens = cache, num_tokens
        self._rows = lengths.shape[0]
        heads = cache.layers[0].shape[2]
        first = torch.arange(self._rows * heads) * cache.capacity
        self._places = first + lengths.repeat_interleave(heads)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store [N, H, 1, D] keys and values; return all of each row as [N, H, L, D] views."""
        layer = self._cache.layers[layer_idx]
        stored_keys, stored_values = layer[0], layer[1]
        head_dim = keys.shape[3]
        stored_keys.view(-1, head_dim).index_copy_(0, self._places, keys.reshape(-1, head_dim))
        stored_values.view(-1, head_dim).index_copy_(0, self._places, values.reshape(-1, head_dim))
        rows, tokens = self._rows, self._num_tokens
        return stored_keys[:rows, :, :tokens], stored_values[:rows, :, :tokens]
