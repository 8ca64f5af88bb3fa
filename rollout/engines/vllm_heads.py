"""Heads of a size that vLLM's attention on processors does not know, made wider with zeros.

Its kernels know head sizes 32, 64, ...; the built-in tiny model has 24. A head of d numbers beside
D - d zeros has the same scores and outputs, when the rotation covers the first d only
(`partial_rotary_factor`) and queries are scaled by sqrt(D / d), because the softmax divides by
sqrt(D). Exact up to that factor's rounding.

Shape suffixes: H heads, d head size, D the wider one.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig

from ...buffer.errors import ConfigError


def head_dim(config: PretrainedConfig) -> int:
    """The model's own head size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def wider_heads(config: PretrainedConfig, known: Sequence[int]) -> dict[str, Any]:
    """Changes to a model's config that give it the next head size of `known`; none when its own is
    known.

    Raises:
        ConfigError: it has norms or rotations under which zeros would change the result.
    """
    own = head_dim(config)
    if own in known:
        return {}
    rope = dict(getattr(config, "rope_parameters", None) or {})
    fitting = [size for size in sorted(known) if size > own]
    if (
        config.model_type not in ("llama", "qwen2")
        or rope.get("rope_type") != "default"
        or rope.get("partial_rotary_factor", 1.0) != 1.0
        or not fitting
    ):
        raise ConfigError(
            f'rollout.engine = "vllm": the model ({config.model_type}) has heads of {own} numbers, '
            f"vLLM on this machine computes {', '.join(map(str, known))}; use "
            'rollout.engine = "native", or a GPU'
        )
    return {
        "head_dim": fitting[0],
        "rope_parameters": {**rope, "partial_rotary_factor": own / fitting[0]},
    }


def widen_heads(
    weights: Iterable[tuple[str, Tensor]], old: int, new: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights by their transformers names, those of attention with heads of `new` numbers."""
    for name, weight in weights:
        part = name.split(".")[-2] if "." in name else ""
        if old == new or part not in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield name, weight
        elif part == "o_proj":  # [hidden, H d] -> [hidden, H D]
            yield name, pad(weight.unflatten(1, (-1, old)), (0, new - old)).flatten(1)
        else:  # [H d, ...] -> [H D, ...]
            scale = math.sqrt(new / old) if part == "q_proj" else 1.0
            heads = weight.unflatten(0, (-1, old)) * scale
            yield name, pad(heads.movedim(1, -1), (0, new - old)).movedim(-1, 1).flatten(0, 1)
