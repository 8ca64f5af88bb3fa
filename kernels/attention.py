"""Causal attention inside the segments of one packed row: no padding, and no token sees another's
sample.

    a a a b b c c c c      lengths (3, 2, 4), starts (cu_seqlens) 0 3 5 9

Nothing of all pairs of tokens exists: on CUDA torch's varlen kernel (FlashAttention) reads the
starts, elsewhere each segment goes through torch's fused attention by itself.

Shape suffixes: T tokens of the row, H heads, G key-value heads, E head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "slipstream_packed"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
"""What the varlen kernel takes."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where samples lie in a packed row."""

    lengths: tuple[int, ...]
    """Tokens of each, all above 0; known to the host, so that nothing waits for a device."""
    starts: Tensor
    """[len(lengths) + 1] int32, cumulative: cu_seqlens."""

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        """Of samples of these lengths, one after the other."""
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(tuple(lengths), starts)


def packed_attention(
    query_THE: Tensor, key_TGE: Tensor, value_TGE: Tensor, segments: Segments, scale: float
) -> Tensor:
    """[T, H, E] causal attention of each token over its own segment up to itself.

    Args:
        query_THE: [T, H, E] float.
        key_TGE: [T, G, E]; G divides H.
        value_TGE: [T, G, E].
        segments: their lengths sum to T.
        scale: of the scores before softmax.
    Raises:
        ValueError: the segments are not those of the row.
    Source: FlashAttention's variable-length interface (arXiv:2307.08691).
    """
    if sum(segments.lengths) != len(query_THE):
        raise ValueError(f"segments of {sum(segments.lengths)} tokens in {tuple(query_THE.shape)}")
    grouped = query_THE.shape[1] != key_TGE.shape[1]
    if query_THE.is_cuda and query_THE.dtype in FLASH_DTYPES:
        from torch.nn.attention.varlen import varlen_attn

        longest, starts = max(segments.lengths), segments.starts
        mixed = varlen_attn(
            query_THE, key_TGE, value_TGE, starts, starts, longest, longest,
            scale=scale, window_size=(-1, 0), enable_gqa=grouped,
        )  # fmt: skip
        assert isinstance(mixed, Tensor)
        return mixed
    parts = zip(*(t.split(segments.lengths) for t in (query_THE, key_TGE, value_TGE)), strict=True)
    return torch.cat([_alone(q, k, v, scale, grouped) for q, k, v in parts])


def _alone(query: Tensor, key: Tensor, value: Tensor, scale: float, grouped: bool) -> Tensor:
    """Of one segment."""
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    mixed = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return mixed[0].transpose(0, 1)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it, [1, H, T, E] each; without segments its own."""
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    return packed_attention(query, key, value, segments, scale)[None], None


def enable(model: PreTrainedModel) -> None:
    """Let the model take `segments=` in its decoder's forward, in place; other calls are as before,
    but that transformers makes no mask of its own.

    Raises:
        ValueError: some layers attend within a sliding window, or not through transformers'
            attention interface.
    """
    if model.config._attn_implementation == NAME:
        return
    places = (model.config, *model.modules())
    if any(getattr(place, "sliding_window", None) for place in places):
        raise ValueError("layers with sliding-window attention cannot be packed")
    AttentionInterface.register(NAME, _forward)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"the attention of {type(model).__name__} cannot be replaced")
