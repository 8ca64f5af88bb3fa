"""Keys and values of many samples, each row indexed by its own length.

Rows are slots 0 .. R-1; token t of a row sits at position t, whatever the other rows do, so nothing
is ever padded on the left or realigned. What lies beyond a row's length is finite garbage that the
attention mask hides.

Shape suffixes: R slots, H key-value heads, C capacity in tokens, P prompt tokens,
M stored tokens, D head dimension.
"""

import torch
from torch import Tensor

BLOCK_TOKENS = 64
"""Capacity grows in such steps: fewer reallocations than token by token, little waste."""


class RaggedCache:
    """One [2, R, H, C, D] tensor (keys, values) per layer.

    Grows with its longest row, and never frees: rows are as many as the engine runs at once.
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

    def copy_of(self, row: int, num_tokens: int) -> list[Tensor]:
        """The first tokens of a row, per layer [2, H, num_tokens, D]."""
        return [layer[:, row, :, :num_tokens].clone() for layer in self.layers]

    def put_back(self, row: int, copies: list[Tensor]) -> None:
        """Store what `copy_of` returned, in any row; there must be room."""
        for layer, copy in zip(self.layers, copies, strict=True):
            layer[:, row, :, : copy.shape[2]] = copy

    def wipe(self, row: int) -> None:
        """Zero a slot that may hold NaN, before another sample uses it."""
        for layer in self.layers:
            layer[:, row] = 0

    def store_prompts(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor, prompts: Tensor
    ) -> None:
        """Store whole prompts, each into one slot or several.

        Args:
            layer: its index.
            keys: [prompts, H, P, D].
            values: of the same shape.
            slots: [M] int64, the slots to fill.
            prompts: [M] int64, which prompt goes there; siblings name the same one.
        """
        stored = self.layers[layer][:, :, :, : keys.shape[2]]
        stored[0].index_copy_(0, slots, keys[prompts])
        stored[1].index_copy_(0, slots, values[prompts])

    def places(self, rows_M: Tensor, tokens_M: Tensor) -> Tensor:
        """[M * H] where `store` puts the token of each row; valid until the capacity grows."""
        heads = torch.arange(self.layers[0].shape[2])
        return (
            (rows_M[:, None] * len(heads) + heads) * self.capacity + tokens_M[:, None]
        ).flatten()

    def store(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        rows: slice | Tensor,
        tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """Store single tokens, and return some rows as [rows, H, tokens, D].

        Args:
            layer: its index.
            keys: [M, H, D].
            values: of the same shape.
            places: [M * H], from `places`.
            rows: which rows to return: of a slice a view, of indices a copy.
            tokens: how many of their first tokens.
        """
        stored_keys, stored_values = self.layers[layer]
        head_dim = keys.shape[2]
        stored_keys.view(-1, head_dim).index_copy_(0, places, keys.reshape(-1, head_dim))
        stored_values.view(-1, head_dim).index_copy_(0, places, values.reshape(-1, head_dim))
        return stored_keys[rows, :, :tokens], stored_values[rows, :, :tokens]
