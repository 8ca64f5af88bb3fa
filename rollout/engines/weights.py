"""Weights as the native engine reads them: verified, fused, and laid out for small batches.

Shape suffixes: E hidden size, F fused outputs, I intermediate size, V vocabulary.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from ...buffer.errors import ConfigError, CorruptData
from ...buffer.mailbox import check_shard, file_digest
from ...buffer.records import Shard, Version, WeightsManifest
from ...kernels.adapters import base_of
from ...kernels.models import DTYPE_NAMES, check_fit
from .linear import Linear

_bases: dict[tuple[Shard, int, int], dict[str, Tensor]] = {}
"""The base of adapters that this process has verified, mapped, by its shard, inode and time of
change: every version is merged onto it, and its file is as large as all weights."""


def read_verified(manifest: WeightsManifest) -> dict[str, Tensor]:
    """The tensors of a manifest by name, memory-mapped: copy what is wanted, then `confirm`. Of an
    adapter those of its base, too: `kernels.adapters.merged` yields weights.

    The bytes are verified through the very mapping that the tensors are views of; a base once.

    Raises:
        CorruptData: a shard is missing, or its size, digest or contents are not what was published;
            or an adapter belongs to another base than the manifest names.
    """
    tensors: dict[str, Tensor] = {}
    for shard in manifest.files:
        try:
            if shard == manifest.base:
                tensors |= _kept(shard, manifest.version)
            else:
                tensors |= _views(_mapped(shard, manifest.version))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CorruptData(
                f"weights of version {manifest.version}: {shard.path}: {error}"
            ) from error
    base = manifest.base.digest if manifest.base else ""
    if base_of(tensors) != base:
        raise CorruptData(
            f"weights of version {manifest.version}: an adapter of base {base_of(tensors) or None} "
            f"came with base {base or None}"
        )
    return tensors


def _kept(base: Shard, version: Version) -> dict[str, Tensor]:
    told = Path(base.path).stat()
    key = base, told.st_ino, told.st_mtime_ns
    if key not in _bases:
        found = _views(_mapped(base, version))
        _bases.clear()
        _bases[key] = found
    return _bases[key]


def _mapped(shard: Shard, version: Version) -> Tensor:
    """[num_bytes] uint8, verified."""
    path = Path(shard.path)
    num_bytes = path.stat().st_size if path.is_file() else -1
    if num_bytes != shard.num_bytes:  # what is empty or missing cannot be mapped
        check_shard(shard, *file_digest(path), version)
    bytes_N = torch.from_file(shard.path, shared=False, size=num_bytes, dtype=torch.uint8)
    check_shard(shard, num_bytes, xxhash.xxh3_128(bytes_N.numpy().data).hexdigest(), version)
    return bytes_N


def _views(bytes_N: Tensor) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as its header names them."""
    start = 8 + int.from_bytes(bytes_N[:8].numpy().tobytes(), "little")
    header = json.loads(bytes_N[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    tensors = {}
    for name, entry in header.items():
        first, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = bytes_N[first:end].view(dtypes[entry["dtype"]]).view(entry["shape"])
    return tensors


class Layer(NamedTuple):
    """One decoder layer; the norms of queries and keys are Qwen3's, layers that do not rotate are
    SmolLM3's."""

    attention_norm_E: Tensor
    qkv: Linear
    query_norm_D: Tensor | None
    key_norm_D: Tensor | None
    rotates: bool
    out: Linear
    mlp_norm_E: Tensor
    gate: Linear
    up: Linear
    down: Linear


class Weights(NamedTuple):
    """All weights of one version; made aside, so that a swap is one assignment."""

    embedding_VE: Tensor
    layers: tuple[Layer, ...]
    norm_E: Tensor
    head: Linear


def fuse(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Weights:
    """Lay the weights of one version out.

    Args:
        model: gives the names, shapes and dtype; its own weights are not read.
        tensors: name -> weight, as in `kernels.models.policy_weights`.
    Raises:
        ModelError: the tensors do not fit the model.
        ConfigError: the model has weights that this engine would leave out.
    """
    check_fit(model, tensors)
    left = {name: tensor.to(model.dtype) for name, tensor in tensors.items()}
    body, modules = model.base_model_prefix, cast(Any, model.base_model).layers

    def take(name: str) -> Tensor:
        return left.pop(f"{body}.{name}").clone()  # out of the mapped file: it is removed one day

    def maybe(name: str) -> Tensor | None:
        return take(name) if f"{body}.{name}" in left else None

    def linear(prefix: str, *names: str) -> Linear:
        weights = [left.pop(f"{body}.{prefix}.{name}.weight") for name in names]
        biases = [left.pop(f"{body}.{prefix}.{name}.bias", None) for name in names]
        bias = [b for b in biases if b is not None]
        if bias and len(bias) < len(names):
            raise ConfigError(f"only some of {prefix}'s {names} have a bias: not supported")
        return Linear.pack(torch.cat(weights), torch.cat(bias) if bias else None)

    try:
        layers = tuple(
            Layer(
                attention_norm_E=take(f"layers.{i}.input_layernorm.weight"),
                qkv=linear(f"layers.{i}.self_attn", "q_proj", "k_proj", "v_proj"),
                query_norm_D=maybe(f"layers.{i}.self_attn.q_norm.weight"),
                key_norm_D=maybe(f"layers.{i}.self_attn.k_norm.weight"),
                rotates=bool(getattr(modules[i].self_attn, "use_rope", True)),
                out=linear(f"layers.{i}.self_attn", "o_proj"),
                mlp_norm_E=take(f"layers.{i}.post_attention_layernorm.weight"),
                gate=linear(f"layers.{i}.mlp", "gate_proj"),
                up=linear(f"layers.{i}.mlp", "up_proj"),
                down=linear(f"layers.{i}.mlp", "down_proj"),
            )
            for i in range(model.config.num_hidden_layers)
        )
        embedding, norm = take("embed_tokens.weight"), take("norm.weight")
    except KeyError as error:
        raise ConfigError(
            f"the native engine does not support {type(model).__name__}: it has no weight {error}; "
            "use a Llama-like model (Llama, Qwen2, Qwen3, SmolLM)"
        ) from error
    head, bias = left.pop("lm_head.weight", embedding), left.pop("lm_head.bias", None)
    head_bias = None if bias is None else bias.clone()
    weights = Weights(embedding, layers, norm, Linear.pack(head, head_bias))
    if left:
        raise ConfigError(
            f"the native engine does not support {type(model).__name__}: it would leave out "
            f"{', '.join(sorted(left)[:3])}"
        )
    return weights
