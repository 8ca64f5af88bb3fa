"""The policy's forward over a ragged cache: Llama, Qwen2, Qwen3 and their like.

Tokens of all rows are packed for the matrix products, and laid out by row for attention alone. The
rotary embedding is the loaded model's own; the rest is a page of arithmetic, held against
transformers' forward when the first weights arrive (`check`).

Shape suffixes: M packed tokens, N rows, T most tokens of a row, P longest prompt, L longest row,
E hidden size, V vocabulary, H query heads, K key-value heads, G = H / K, D head dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ...buffer.errors import ConfigError
from ...kernels.models import assign_weights
from .kv_cache import RaggedCache
from .weights import Weights, fuse

_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
_GROWING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings that change for all positions with the length: rows of unequal length and
cached keys would need one per row."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest difference from transformers' logits, relative to their spread, that is rounding."""


class _Attend(Protocol):
    """Stores the keys and values of one layer's tokens and attends; returns [M, H * D]."""

    def __call__(
        self, layer: int, query_MHD: Tensor, key_MKD: Tensor, value_MKD: Tensor
    ) -> Tensor: ...


class PolicyForward:
    """Prefill and decode of one model. Call under `torch.inference_mode()`."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Refuse what this forward would compute wrongly.

        Raises:
            ConfigError: parts are missing, sliding-window layers, or growing rotary embeddings.
        """
        _check_architecture(model)
        self._model = model
        config, first = model.config, _first_layer(model)
        self._heads, self._head_dim = config.num_attention_heads, first.self_attn.head_dim
        self._key_heads = config.num_key_value_heads
        self._activation = first.mlp.act_fn
        self._scale, self._epsilon = first.self_attn.scaling, config.rms_norm_eps
        self._cos_CD = self._sin_CD = torch.empty(0)
        self.weights: Weights | None = None
        """What the next forward computes with; assigning it is a swap."""

    def prepare(self, tensors: Mapping[str, Tensor]) -> Weights:
        """Lay weights out aside; the first ones are also held against transformers' forward.

        Raises:
            ModelError: the tensors do not fit.
            ConfigError: an architecture that this forward does not support.
        """
        weights = fuse(self._model, tensors)
        if self.weights is None:
            self._check(weights, tensors)
        return weights

    def make_cache(self, num_rows: int) -> RaggedCache:
        """An empty cache of the model's shape."""
        return RaggedCache(
            num_layers=self._model.config.num_hidden_layers,
            num_rows=num_rows,
            num_heads=self._key_heads,
            head_dim=self._head_dim,
            dtype=self._model.dtype,
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
            [prompts, E] hidden states after the final norm.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        ids_NP = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids_NP[row, : len(prompt)] = prompt
        targets, origins = torch.from_numpy(slots), torch.from_numpy(sources)

        def attend(layer: int, query_MHD: Tensor, key_MKD: Tensor, value_MKD: Tensor) -> Tensor:
            query, keys, values = (
                x.view(len(prompts), longest, -1, self._head_dim).transpose(1, 2)
                for x in (query_MHD, key_MKD, value_MKD)
            )
            cache.store_prompts(layer, keys, values, targets, origins)
            out = functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=self._scale, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(len(prompts) * longest, -1)

        places_M = torch.arange(longest).repeat(len(prompts))
        hidden_ME = self._layers(torch.from_numpy(ids_NP).flatten(), places_M, longest, attend)
        last = torch.arange(len(prompts)) * longest + lengths - 1
        return self._norm(hidden_ME[last], self._served.norm_E)

    def extend(
        self,
        token_ids: np.ndarray,
        rows: np.ndarray,
        places: np.ndarray,
        cache: RaggedCache,
        slots: np.ndarray | None = None,
    ) -> Tensor:
        """Feed each of N rows one token or several; each sees those before it.

        Args:
            token_ids: [M] int64, row by row.
            rows: [M] int64, ascending; every row from 0 to N - 1 has at least one token.
            places: [M] int64, position of each token in its row; what the cache held there, and
                behind it, is overwritten or hidden.
            cache: with room for the longest row.
            slots: [N] int64, the cache slots of the rows; None: the first N, without a copy.
        Returns:
            [M, E] hidden states after the final norm.
        """
        attend = _CachedAttention(cache, rows, places, slots, self._scale)
        ids_M, places_M = torch.from_numpy(token_ids), torch.from_numpy(places)
        hidden_ME = self._layers(ids_M, places_M, int(places.max()) + 1, attend)
        return self._norm(hidden_ME, self._served.norm_E)

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """[M, V] logits of final hidden states."""
        return self._served.head(hidden_ME)

    @property
    def _served(self) -> Weights:
        assert self.weights is not None, "weights are assigned before the first forward"
        return self.weights

    def _layers(self, ids_M: Tensor, places_M: Tensor, num_places: int, attend: _Attend) -> Tensor:
        """[M, E] before the final norm."""
        cos_CD, sin_CD = self._rotary(num_places)
        cos_M1D, sin_M1D = cos_CD[places_M][:, None], sin_CD[places_M][:, None]
        weights, split = self._served, (self._heads, self._key_heads, self._key_heads)
        hidden_ME = weights.embedding_VE[ids_M]
        for index, layer in enumerate(weights.layers):
            qkv_MF = layer.qkv(self._norm(hidden_ME, layer.attention_norm_E))
            heads = qkv_MF.view(len(ids_M), sum(split), self._head_dim)
            query_MHD, key_MKD, value_MKD = heads.split(split, dim=1)
            if layer.query_norm_D is not None and layer.key_norm_D is not None:
                query_MHD = self._norm(query_MHD, layer.query_norm_D)
                key_MKD = self._norm(key_MKD, layer.key_norm_D)
            query_MHD = _rotate(query_MHD, cos_M1D, sin_M1D)
            key_MKD = _rotate(key_MKD, cos_M1D, sin_M1D)
            hidden_ME = hidden_ME + layer.out(attend(index, query_MHD, key_MKD, value_MKD))
            both = layer.gate_up(self._norm(hidden_ME, layer.mlp_norm_E))
            gate, up = both.chunk(2, dim=1)
            hidden_ME = hidden_ME + layer.down(self._activation(gate) * up)
        return hidden_ME

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm; as transformers computes it, in float32 even where the model is float64, so
        that the engine's law is the learner's."""
        if x.dtype == torch.float32:
            return functional.rms_norm(x, weight.shape, weight, self._epsilon)
        precise = functional.rms_norm(x.float(), weight.shape, None, self._epsilon)
        return precise.to(x.dtype) * weight

    def _rotary(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """[C, D] cosines and sines of positions 0 .. C-1, C >= num_tokens."""
        if len(self._cos_CD) < num_tokens:
            positions = torch.arange(num_tokens * 5 // 4 + 64)[None]
            like = torch.empty(0, dtype=self._model.dtype)
            body: Any = self._model.base_model
            cos, sin = body.rotary_emb(like, positions)
            self._cos_CD, self._sin_CD = cos[0], sin[0]
        return self._cos_CD, self._sin_CD

    def _check(self, weights: Weights, tensors: Mapping[str, Tensor]) -> None:
        """Hold this forward against transformers' own on a short sequence.

        Raises:
            ConfigError: they differ by more than rounding: the architecture is not supported.
        """
        model = self._model
        assign_weights(model, tensors)
        ids = np.random.default_rng(0).integers(len(weights.embedding_VE), size=8)
        expected_V = model(torch.from_numpy(ids)[None]).logits[0, -1]
        self.weights = weights
        cache, row = self.make_cache(1), np.zeros(1, dtype=np.int64)
        cache.reserve(len(ids))
        self.prefill([ids[:-2]], row, row, cache)
        rows, places = np.zeros(2, dtype=np.int64), np.arange(len(ids) - 2, len(ids))
        ours_V = self.logits(self.extend(ids[-2:], rows, places, cache))[-1]
        self.weights = None
        gap = float((ours_V - expected_V).abs().max() / (expected_V.std() + 1e-6))
        if not gap <= _TOLERANCE[model.dtype]:
            raise ConfigError(
                f"the native engine does not support {type(model).__name__}: its logits "
                f"differ from transformers' by {gap:.2g} of their standard deviation"
            )


class _CachedAttention:
    """Attention of new tokens over what the cache holds of their rows, themselves included."""

    def __init__(
        self,
        cache: RaggedCache,
        rows: np.ndarray,
        places: np.ndarray,
        slots: np.ndarray | None,
        scale: float,
    ) -> None:
        """Work out once per forward where tokens go and what each may see."""
        self._cache, self._scale = cache, scale
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
        mask = torch.zeros(hidden_NTL.shape, dtype=cache.layers[0].dtype)
        mask.masked_fill_(hidden_NTL, -torch.inf)
        self._mask_N11TL = mask.view(self._num_rows, 1, 1, self._width, self._num_places)
        self._read = slice(self._num_rows) if slots is None else torch.from_numpy(slots)
        stored = rows if slots is None else slots[rows]
        self._targets = cache.places(torch.from_numpy(stored), torch.from_numpy(places))

    def __call__(self, layer: int, query_MHD: Tensor, key_MKD: Tensor, value_MKD: Tensor) -> Tensor:
        """[M, H * D]; the query heads of a key-value head are folded into one product, so keys are
        not repeated."""
        rows, width, tokens = self._num_rows, self._width, self._num_places
        keys_NKLD, values_NKLD = self._cache.store(
            layer, key_MKD, value_MKD, self._targets, self._read, tokens
        )
        _, heads, head_dim = query_MHD.shape
        key_heads = keys_NKLD.shape[1]
        query = query_MHD * self._scale
        if self._ragged is not None:
            padded = query.new_zeros(rows * width, heads, head_dim)
            query = padded.index_copy_(0, self._ragged, query)
        grouped = query.view(rows, width, key_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
        grouped = grouped.reshape(rows * key_heads, -1, head_dim)
        scores = torch.bmm(grouped, keys_NKLD.flatten(0, 1).transpose(1, 2))
        scores.view(rows, key_heads, -1, width, tokens).add_(self._mask_N11TL)
        precise = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
        shares = scores.softmax(dim=-1, dtype=precise).to(query.dtype)
        out = torch.bmm(shares, values_NKLD.flatten(0, 1))
        out = out.view(rows, key_heads, -1, width, head_dim).permute(0, 3, 1, 2, 4)
        out_MF = out.reshape(rows * width, heads * head_dim)
        return out_MF if self._ragged is None else out_MF[self._ragged]


def _rotate(x_MHD: Tensor, cos_M1D: Tensor, sin_M1D: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Llama."""
    half = x_MHD.shape[-1] // 2
    out = x_MHD * cos_M1D
    out[..., :half].addcmul_(x_MHD[..., half:], sin_M1D[..., :half], value=-1)
    out[..., half:].addcmul_(x_MHD[..., :half], sin_M1D[..., half:])
    return out


def _first_layer(model: PreTrainedModel) -> Any:
    body: Any = model.base_model
    return body.layers[0]


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
