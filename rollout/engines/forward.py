"""The policy's forward over a ragged cache, with transformers' own modules.

The decoder layers, norms and rotary embedding are those of the loaded model (Llama, Qwen2, Qwen3
and their like); only the loop over layers is ours, because the models' own builds attention masks
we do not need, and the attention function, because ours reads rows of unequal length.

Shape suffixes: M prompts, N rows, P longest prompt, L longest row, E hidden size, V vocabulary,
K key-value heads, Q query heads of one key-value head, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from ...buffer.errors import ConfigError
from .kv_cache import DecodeView, PrefillView, RaggedCache

_ATTENTION = "slipstream_ragged"
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
_GROWING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change for all positions with the length: rows of unequal length and
cached keys would need one per row."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest difference from transformers' logits, relative to their spread, that is rounding."""


class PolicyForward:
    """Prefill and decode of one model. Call under `torch.inference_mode()`."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Refuse what this forward would compute wrongly.

        Raises:
            ConfigError: parts are missing, sliding-window layers, or growing rotary embeddings.
        """
        self.model = model
        self._body: Any = model.base_model
        self._head: Any = model.get_output_embeddings()
        _check_architecture(model)
        AttentionInterface.register(_ATTENTION, ragged_attention)
        self._layers: list[Any] = list(self._body.layers)
        self._cos_CD = self._sin_CD = torch.empty(0)
        self.use_ragged_attention()

    def use_ragged_attention(self) -> None:
        """Let the model's attention modules call ours."""
        self.model.config._attn_implementation = _ATTENTION

    def make_cache(self, num_rows: int) -> RaggedCache:
        """An empty cache of the model's shape."""
        attention = self._layers[0].self_attn
        return RaggedCache(
            num_layers=len(self._layers),
            num_rows=num_rows,
            num_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            dtype=self.model.dtype,
        )

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        slots: np.ndarray,
        sources: np.ndarray,
        cache: RaggedCache,
    ) -> Tensor:
        """Compute prompts together, store their keys and values, return their last hidden state.

        Prompts are padded on the right; causal attention keeps the padding out of what counts.

        Args:
            prompts: M arrays of token ids.
            slots: cache slots to fill.
            sources: which prompt goes into each of the slots.
            cache: with room for the longest prompt.
        Returns:
            [M, E] hidden states after the final norm.
        """
        lengths_M = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths_M.max())
        ids_MP = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids_MP[row, : len(prompt)] = prompt
        view = PrefillView(cache, torch.from_numpy(slots), torch.from_numpy(sources))
        cos_CD, sin_CD = self._rotary(longest)
        rotary = (cos_CD[None, :longest], sin_CD[None, :longest])
        hidden_MPE = self._run(torch.from_numpy(ids_MP), rotary, view, None)
        last_ME = hidden_MPE[torch.arange(len(prompts)), lengths_M - 1]
        return self._body.norm(last_ME)

    def decode(self, token_ids: np.ndarray, lengths: np.ndarray, cache: RaggedCache) -> Tensor:
        """Feed one token to each of the first N rows.

        Args:
            token_ids: [N] int64, the token each row wrote last.
            lengths: [N] int64, tokens each row holds already: the position of the new one.
            cache: with room for the longest row and its new token.
        Returns:
            [N, V] logits of the next token.
        """
        lengths_N = torch.from_numpy(lengths)
        longest = int(lengths.max()) + 1
        cos_CD, sin_CD = self._rotary(longest)
        rotary = (cos_CD[lengths_N][:, None], sin_CD[lengths_N][:, None])
        mask_N1L = torch.zeros(len(lengths), 1, longest, dtype=self.model.dtype)
        hidden_after = torch.arange(longest) > lengths_N[:, None, None]
        mask_N1L.masked_fill_(hidden_after, -torch.inf)
        view = DecodeView(cache, lengths_N, longest)
        hidden_N1E = self._run(torch.from_numpy(token_ids)[:, None], rotary, view, mask_N1L)
        return self.logits(self._body.norm(hidden_N1E[:, 0]))

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """[M, V] logits of final hidden states."""
        return self._head(hidden_ME)

    def check(self) -> None:
        """Hold this forward against transformers' own on a short sequence.

        Raises:
            ConfigError: they differ by more than rounding: the architecture is not supported.
        """
        vocabulary = self._body.embed_tokens.num_embeddings
        ids = np.random.default_rng(0).integers(vocabulary, size=8)
        self.model.config._attn_implementation = "sdpa"
        expected_V = self.model(torch.from_numpy(ids)[None]).logits[0, -1]
        self.use_ragged_attention()
        cache = self.make_cache(1)
        cache.reserve(len(ids))
        row = np.zeros(1, dtype=np.int64)
        self.prefill([ids[:-1]], row, row, cache)
        ours_V = self.decode(ids[-1:], np.array([len(ids) - 1]), cache)[0]
        gap = float((ours_V - expected_V).abs().max() / (expected_V.std() + 1e-6))
        if gap > _TOLERANCE[self.model.dtype]:
            raise ConfigError(
                f"the native engine does not support {type(self.model).__name__}: its logits "
                f"differ from transformers' by {gap:.2g} of their standard deviation"
            )

    def _run(self, ids: Tensor, rotary: tuple[Tensor, Tensor], view: Any, mask: Any) -> Tensor:
        """[rows, tokens] ids -> [rows, tokens, E] before the final norm."""
        hidden = self._body.embed_tokens(ids)
        for layer in self._layers:
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=view
            )
        return hidden

    def _rotary(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """[C, D] cosines and sines of positions 0 .. C-1, C >= num_tokens."""
        if len(self._cos_CD) < num_tokens:
            positions = torch.arange(num_tokens * 5 // 4 + 64)[None]
            like = torch.empty(0, dtype=self.model.dtype)
            cos, sin = self._body.rotary_emb(like, positions)
            self._cos_CD, self._sin_CD = cos[0], sin[0]
        return self._cos_CD, self._sin_CD


def ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form of transformers' AttentionInterface.

    Without a mask: causal, over whole prompts. With one: one query per row against that row's
    keys; the query heads of a key-value head are folded into one product, so keys are not repeated.

    Args:
        module: the attention module that calls.
        query: [N, K * Q, 1 or P, D].
        key: [N, K, L or P, D].
        value: of the same shape.
        attention_mask: None or [N, 1, L], 0 or -inf, added to the scores.
        scaling: of the scores.
    Returns:
        [N, 1 or P, K * Q, D] and None (no attention weights).
    """
    if attention_mask is None:
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None
    rows, heads, _one, head_dim = query.shape
    key_heads, tokens = key.shape[1], key.shape[2]
    query = (query * scaling).view(rows * key_heads, heads // key_heads, head_dim)
    scores = torch.bmm(query, key.flatten(0, 1).transpose(1, 2)).view(rows, heads, tokens)
    precise = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
    shares = scores.add_(attention_mask).softmax(dim=-1, dtype=precise).to(query.dtype)
    shares = shares.view(rows * key_heads, heads // key_heads, tokens)
    return torch.bmm(shares, value.flatten(0, 1)).view(rows, 1, heads, head_dim), None


def _check_architecture(model: PreTrainedModel) -> None:
    name, config, body = type(model).__name__, model.config, model.base_model
    if missing := [part for part in _PARTS if not hasattr(body, part)]:
        raise ConfigError(
            f"the native engine does not support {name}: it has no {', '.join(missing)}; use a "
            "Llama-like model (Llama, Qwen2, Qwen3, SmolLM)"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"the native engine does not support {name} with layers of {sorted(kinds)}: only full "
            "attention"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _GROWING_ROPE:
        raise ConfigError(
            f"the native engine does not support {name} with rope_type {rope!r}: its rotations "
            "change with the length of a sample"
        )
