"""LoRA: low-rank adapters beside frozen weights, by `peft`.

    y = x W^T + (alpha / rank) (x A^T) B^T      A random, B zero: at first the model is unchanged

Only A and B are trained, have optimizer state and are published: engines are sent W once, and serve
W + (alpha / rank) B A. That sum is also what is checkpointed as weights and exported.
Source: LoRA (arXiv:2106.09685).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..buffer.errors import ConfigError, CorruptData
from ..kernels.adapters import adapter_tensors, with_adapter
from ..kernels.models import policy_weights
from .config import LoraConfig

_NAME = "default"
_PEFT_PREFIX = "base_model.model."
"""What peft's own files put before a parameter's name."""


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Put adapters into the model, in place, and freeze everything else.

    The adapters of a bfloat16 model are float32: their updates are too small for it.

    Args:
        model: the policy.
        config: `[learner.lora]`.
        seed: of A.
    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"learner.lora needs the package peft ({error}): pip install 'slipstream[lora]'"
        ) from error
    wanted = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",  # pyright: ignore
        target_modules=list(config.targets) or linear_layers(model),
    )  # fmt: skip
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(wanted, model, adapter_name=_NAME)
        except ValueError as error:
            raise ConfigError(
                f"learner.lora.targets = {list(config.targets)}: {error}. The model's linear "
                f"layers are {', '.join(linear_layers(model))}"
            ) from error
    for parameter in adapters(model).values():
        parameter.requires_grad_()
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear layers but the LM head."""
    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
    }
    return sorted(found - {"base_layer"})


def adapters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters, by name; empty for a model without."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights as engines hold them, by their transformers names, the adapters merged in: new
    tensors where they are, none for a model without adapters."""
    changed = {f"{name}.weight": _sum(layer) for name, layer in _layers(model).items()}
    return base_weights(model) | changed


def base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The frozen weights, named as those of the model without adapters; no copies."""
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in policy_weights(model).items()
        if ".lora_" not in name
    }


def published_adapter(model: PreTrainedModel, base_digest: str) -> dict[str, Tensor]:
    """What engines merge onto the base whose file has this digest; no copies of A and B."""
    layers = _layers(model)
    scale = next(iter(layers.values())).scaling[_NAME]
    pairs = {name: _pair(layer) for name, layer in layers.items()}
    return adapter_tensors(pairs, scale, base_digest)


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B."""
    return layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach()


def _sum(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight.detach()
    return with_adapter(weight, *_pair(layer), layer.scaling[_NAME])


@contextmanager
@torch.no_grad()
def merged(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model computes with the adapters merged in, as it is served."""
    layers = _layers(model)
    own = {name: _kept(layer.get_base_layer().weight) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            _put(layer.get_base_layer().weight, _sum(layer))
            layer.enable_adapters(False)
        yield
    finally:
        for name, layer in layers.items():
            _put(layer.get_base_layer().weight, own[name])
            layer.enable_adapters(True)


def _kept(weight: Tensor) -> Tensor:
    """A weight as it is now, to be put back."""
    return weight.detach().clone() if isinstance(weight, DTensor) else weight.data


def _put(weight: Tensor, value: Tensor) -> None:
    """Change a weight; of a sharded one the contents, which are what is gathered for a forward."""
    if isinstance(weight, DTensor):
        weight.copy_(value)
    else:
        weight.data = value


def adapter_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """A and B of every layer, named as peft's `adapter_model.safetensors` names them."""
    return {
        _PEFT_PREFIX + name.replace(f".{_NAME}", ""): parameter.detach()
        for name, parameter in adapters(model).items()
    }


@torch.no_grad()
def load_adapters(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Continue from `adapter_state`.

    Raises:
        CorruptData: it is another model's, or of another rank.
    """
    own = adapter_state(model)
    if own.keys() != state.keys() or any(own[n].shape != state[n].shape for n in own):
        raise CorruptData(
            "the checkpoint's adapters do not fit learner.lora: they were saved with another rank "
            "or other targets; resume with the run's own"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def adapter_config(config: LoraConfig, model_name: str, targets: list[str]) -> dict[str, Any]:
    """`adapter_config.json` for peft: with `adapter_state`'s file, all it needs to load."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
