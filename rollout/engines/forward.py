"""The policy's forward over prompts and rows in flight: Llama, Qwen2, Qwen3 and their like.

Tokens are packed for the matrix products; `attention.py` lays them out for attention alone. The
rotary embedding is the loaded model's own; the rest is a page of arithmetic, held against
transformers' forward when the first weights arrive (`check`).

Shape suffixes: M packed tokens, N rows, P prompts, E hidden size, V vocabulary, H query heads,
K key-value heads, D head dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ...buffer.errors import ConfigError
from ...kernels.models import assign_weights
from .attention import Attend, PromptAttention, RowAttention, Shared
from .kv_cache import KvShape, PromptKeys, RaggedCache
from .weights import Weights, fuse

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
        _check_architecture(model)
        self._model = model
        config, first = model.config, _first_layer(model)
        self._heads, self._head_dim = config.num_attention_heads, first.self_attn.head_dim
        self._key_heads = config.num_key_value_heads
        self._activation = first.mlp.act_fn
        self._is_silu = config.hidden_act in ("silu", "swish")
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

    @property
    def kv_shape(self) -> KvShape:
        """Of this model's keys and values."""
        layers = self._model.config.num_hidden_layers
        return KvShape(layers, self._key_heads, self._head_dim, self._model.dtype)

    def fill(self, parts: Sequence[tuple[PromptKeys, int]]) -> None:
        """Compute the next tokens of some prompts together, packed.

        Args:
            parts: each prompt with how many of its tokens, at least 1; a prompt whose last token is
                computed gets its hidden state.
        """
        ends = [prompt.num_done + count for prompt, count in parts]
        spans = [
            (prompt, end - count, end) for (prompt, count), end in zip(parts, ends, strict=True)
        ]
        ids = np.concatenate([prompt.token_ids[begin:end] for prompt, begin, end in spans])
        places = np.concatenate([np.arange(begin, end) for _, begin, end in spans])
        attend = PromptAttention(parts, self._scale)
        hidden_ME = self._layers(torch.from_numpy(ids), torch.from_numpy(places), max(ends), attend)
        last = torch.tensor([count for _, count in parts]).cumsum(0) - 1
        hidden_PE = self._norm(hidden_ME[last], self._served.norm_E)
        for (prompt, _, end), hidden_E in zip(spans, hidden_PE, strict=True):
            prompt.num_done = end
            prompt.hidden_E = hidden_E if end == len(prompt) else None

    def extend(
        self,
        token_ids: np.ndarray,
        rows: np.ndarray,
        places: np.ndarray,
        cache: RaggedCache,
        begins_N: np.ndarray,
        shared: Sequence[Shared] = (),
    ) -> Tensor:
        """Feed each of N rows one token or several; each sees those before it.

        Args:
            token_ids: [M] int64, row by row.
            rows: [M] int64, ascending; every row from 0 to N - 1 has at least one token.
            places: [M] int64, position of each token in its sample; what the cache held there, and
                behind it, is overwritten or hidden.
            cache: with room for the longest row.
            begins_N: [N] int64, the sample's position at which its row begins: the length of the
                prompt it shares, or 0.
            shared: those prompts, with their rows.
        Returns:
            [M, E] hidden states after the final norm.
        """
        attend = RowAttention(
            cache, rows, places - begins_N[rows], shared, self._heads, self._scale
        )
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

    def _layers(self, ids_M: Tensor, places_M: Tensor, num_places: int, attend: Attend) -> Tensor:
        """[M, E] before the final norm."""
        cos_CD, sin_CD = self._rotary(num_places)
        cos_M1D, sin_M1D = cos_CD[places_M][:, None], sin_CD[places_M][:, None]
        weights, split = self._served, (self._heads, self._key_heads, self._key_heads)
        hidden_ME = weights.embedding_VE[ids_M]
        for index, layer in enumerate(weights.layers):
            qkv_MF = layer.qkv(self._norm(hidden_ME, layer.attention_norm_E))
            heads = qkv_MF.view(len(ids_M), sum(split), self._head_dim)
            turned, value_MKD = heads.split((sum(split[:2]), split[2]), dim=1)
            if layer.query_norm_D is not None and layer.key_norm_D is not None:
                query_MHD, key_MKD = turned.split(split[:2], dim=1)
                query_MHD = self._norm(query_MHD, layer.query_norm_D)
                turned = torch.cat([query_MHD, self._norm(key_MKD, layer.key_norm_D)], dim=1)
            if layer.rotates:
                turned = _rotate(turned, cos_M1D, sin_M1D)
            query_MHD, key_MKD = turned.split(split[:2], dim=1)
            mixed_MF = attend(index, query_MHD, key_MKD, value_MKD)
            hidden_ME = layer.out.plus(mixed_MF, hidden_ME)
            x_ME = self._norm(hidden_ME, layer.mlp_norm_E)
            gate_MF = layer.gate.silu(x_ME) if self._is_silu else self._activation(layer.gate(x_ME))
            hidden_ME = layer.down.plus(layer.up.times(x_ME, gate_MF), hidden_ME)
        return hidden_ME

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm; as transformers computes it, in float32 even where the model is float64, so
        that the engine's law is the learner's. By the norm of each row: torch takes nine passes for
        `rms_norm`, a fortieth of a step of SmolLM2's 64 rows more."""
        if x.dtype == torch.float32:
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
            scale = square.div_(x.shape[-1]).add_(self._epsilon).rsqrt_()
            return (x * scale).mul_(weight)
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
        prompt = PromptKeys(ids[:-2], self.kv_shape.zeros(6), 0)
        self.fill([(prompt, 3)])
        self.fill([(prompt, 3)])
        cache, rows, places = RaggedCache(self.kv_shape, 1), np.zeros(2, np.int64), np.arange(6, 8)
        cache.reserve(2)
        both = Shared(prompt, torch.zeros(1, dtype=torch.int64))
        hidden_ME = self.extend(ids[-2:], rows, places, cache, np.array([6]), [both])
        ours_V = self.logits(hidden_ME)[-1]
        self.weights = None
        gap = float((ours_V - expected_V).abs().max() / (expected_V.std() + 1e-6))
        if not gap <= _TOLERANCE[model.dtype]:
            raise ConfigError(
                f"the native engine does not support {type(model).__name__}: its logits "
                f"differ from transformers' by {gap:.2g} of their standard deviation"
            )


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
    layer = _first_layer(model)
    for part, field in ((layer.self_attn, "head_dim"), (layer.mlp, "act_fn")):
        if not hasattr(part, field):
            raise ConfigError(
                f"the native engine does not support {name}: {type(part).__name__} has no {field}; "
                "use a Llama-like model (Llama, Qwen2, Qwen3, SmolLM)"
            )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"the native engine does not support {name} with layers of {sorted(kinds)}: only full "
            "attention"
        )
    window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    slides = getattr(config, "use_sliding_window", True) and not getattr(config, "layer_types", 0)
    if slides and window and window < context:  # Mistral: all layers, and none says so
        raise ConfigError(
            f"the native engine does not support {name} with sliding_window = {window}: only full "
            f"attention. In config.json, set max_position_embeddings (now {context}) to at most "
            f"{window}: samples that short see no difference"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _GROWING_ROPE:
        raise ConfigError(
            f"the native engine does not support {name} with rope_type {rope!r}: its rotations "
            "change with the length of a sample"
        )
