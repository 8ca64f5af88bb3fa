"""Heads of a size that vLLM's attention on processors does not know, made wider with zeros.

Its kernels know head sizes 32, 64, ...; the built-in tiny model has 24. Zeros behind either half of
a head change no score and no output: rotation pairs number i of one half with that of the other, at
the angle theta^(-2i / d), which is theta'^(-2i / D) for theta' = theta^(D / d); queries are scaled
by sqrt(D / d), because the softmax divides by sqrt(D). Exact up to the rounding of those two. (A
rotation of the first d numbers alone, vLLM's own partial one, ends its process in bfloat16 where
d / 2 is no multiple of 8: its stores are aligned.)

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
        "rope_parameters": {**rope, "rope_theta": rope["rope_theta"] ** (fitting[0] / own)},
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
            halves = weight.unflatten(1, (-1, old // 2))
            yield name, pad(halves, (0, (new - old) // 2)).flatten(1)
        else:  # [H d, ...] -> [H D, ...]
            scale = math.sqrt(new / old) if part == "q_proj" else 1.0
            halves = weight.unflatten(0, (-1, old // 2)) * scale
            wide = pad(halves.movedim(1, -1), (0, (new - old) // 2))
            yield name, wide.movedim(-1, 1).flatten(0, 1)
