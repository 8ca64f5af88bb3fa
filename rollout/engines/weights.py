"""Weights as the native engine reads them: verified, fused, and laid out for small batches.

Shape suffixes: E hidden size, F fused outputs, I intermediate size, V vocabulary.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import local
from typing import Any, NamedTuple, TypeVar, cast

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# torch asks for huge pages: new weights are new memory, whose pages cost more than the copying.

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from ...buffer.errors import ConfigError, CorruptData
from ...buffer.mailbox import check_shard, file_digest
from ...buffer.records import Shard, Version, WeightsManifest
from ...kernels.adapters import base_of
from ...kernels.models import DTYPE_NAMES, check_fit
from ...kernels.threads import compute_on
from .linear import Linear

LAYOUT_THREADS = 2
"""Besides the one that verifies: oneDNN reorders at a third of a memory's speed."""

T = TypeVar("T")

_bases: dict[tuple[Shard, int, int], dict[str, Tensor]] = {}
"""The base of adapters that this process has verified, mapped, by its shard, inode and time of
change: every version is merged onto it, and its file is as large as all weights."""

_maps: dict[tuple[Path, int, int], Tensor] = {}
"""Files by folder, inode and size, mapped while they are there: mapping costs twice the digest, and
a publisher writes into the same pages again, which Linux shows in an old mapping, too. No other
file gets an inode that is mapped."""


def read_verified(manifest: WeightsManifest) -> dict[str, Tensor]:
    """The tensors of a manifest by name, memory-mapped: copy what is wanted, then `confirm`. Of an
    adapter those of its base, too: `kernels.adapters.merged` yields weights.

    The bytes are verified through the very mapping that the tensors are views of; a base once.

    Raises:
        CorruptData: a shard is missing, or its size, digest or contents are not what was published;
            or an adapter belongs to another base than the manifest names.
    """
    return verified_beside(manifest, lambda tensors: tensors)


def verified_beside(manifest: WeightsManifest, use: Callable[[dict[str, Tensor]], T]) -> T:
    """What `use` makes of the tensors, which another thread verifies meanwhile: what was made of
    wrong bytes is not returned.

    Raises:
        CorruptData: see `read_verified`; whatever `use` raised because of it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        checks: list[Future[None]] = []
        try:
            made = use(_read(manifest, lambda *read: checks.append(pool.submit(_check, *read))))
        finally:
            for check in checks:
                check.result()
    return made


def _read(
    manifest: WeightsManifest, check: Callable[[Shard, Tensor, Version], object]
) -> dict[str, Tensor]:
    """All tensors; `check` is called with the bytes that they are views of."""
    tensors: dict[str, Tensor] = {}
    for shard in manifest.files:
        try:
            if shard == manifest.base:
                tensors |= _kept(shard, manifest.version)
            else:
                bytes_N = _mapped(shard, manifest.version)
                check(shard, bytes_N, manifest.version)
                tensors |= _views(bytes_N)
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
        _check(base, bytes_N := _mapped(base, version), version)
        found = _views(bytes_N)
        _bases.clear()
        _bases[key] = found
    return _bases[key]


def _mapped(shard: Shard, version: Version) -> Tensor:
    """[num_bytes] uint8, not verified yet."""
    path = Path(shard.path)
    told = path.stat() if path.is_file() else None
    if told is None or told.st_size != shard.num_bytes:  # nothing cannot be mapped
        check_shard(shard, *file_digest(path), version)
    assert told is not None
    with os.scandir(path.parent) as files:
        present = {file.inode() for file in files}
    key = path.parent, told.st_ino, told.st_size
    for other in list(_maps):  # another thread's engine maps, too
        if other[0] == path.parent and other[1] not in present:
            _maps.pop(other, None)
    if (bytes_N := _maps.get(key)) is None:
        bytes_N = torch.from_file(shard.path, shared=False, size=told.st_size, dtype=torch.uint8)
        _maps[key] = bytes_N
    return bytes_N


def _check(shard: Shard, bytes_N: Tensor, version: Version) -> None:
    digest = xxhash.xxh3_128_hexdigest(bytes_N.numpy().data)
    check_shard(shard, bytes_N.numel(), digest, version)


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


def _neighbours(weights: Sequence[Tensor]) -> bool:
    """Whether they lie one behind the other, in one piece of memory."""
    return (
        all(weight.is_contiguous() for weight in weights)
        and len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(weights))
    )


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
    inference, own = torch.is_inference_mode_enabled(), local()

    def take(name: str) -> Tensor:
        return left.pop(f"{body}.{name}").clone()  # out of the mapped file: it is removed one day

    def maybe(name: str) -> Tensor | None:
        return take(name) if f"{body}.{name}" in left else None

    def stacked(weights: list[Tensor]) -> Tensor:
        """[F, E], as they lie in the file when they are neighbours there; else in memory that the
        next ones use again: fresh pages cost more than the copying."""
        rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
        if _neighbours(weights):
            return weights[0].as_strided((rows, columns), (columns, 1))
        room = getattr(own, "room", None)
        if room is None or room.numel() < rows * columns:
            own.room = room = torch.empty(rows * columns, dtype=model.dtype)
        return torch.cat(weights, out=room[: rows * columns].view(rows, columns))

    def linear(prefix: str, *names: str) -> Linear:
        weights = [left.pop(f"{body}.{prefix}.{name}.weight") for name in names]
        biases = [left.pop(f"{body}.{prefix}.{name}.bias", None) for name in names]
        bias = [b for b in biases if b is not None]
        if bias and len(bias) < len(names):
            raise ConfigError(f"only some of {prefix}'s {names} have a bias: not supported")
        return Linear.pack(stacked(weights), torch.cat(bias) if bias else None)

    def layer(i: int) -> Layer:
        return Layer(
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

    def ours(work: Callable[..., T], *arguments: Any) -> T:
        with torch.inference_mode(inference):  # a mode is one thread's
            return work(*arguments)

    try:
        embedding_VE = left.pop(f"{body}.embed_tokens.weight")
        head_VE, bias = left.pop("lm_head.weight", embedding_VE), left.pop("lm_head.bias", None)
        with ThreadPoolExecutor(LAYOUT_THREADS, "layout", compute_on, initargs=(1,)) as pool:
            head = pool.submit(ours, Linear.pack, head_VE, None if bias is None else bias.clone())
            embedding = pool.submit(ours, embedding_VE.clone)
            numbers = range(model.config.num_hidden_layers)
            layers = tuple(pool.map(lambda i: ours(layer, i), numbers))
        weights = Weights(embedding.result(), layers, take("norm.weight"), head.result())
    except KeyError as error:
        raise ConfigError(
            f"the native engine does not support {type(model).__name__}: it has no weight {error}; "
            "use a Llama-like model (Llama, Qwen2, Qwen3, SmolLM)"
        ) from error
    if left:
        raise ConfigError(
            f"the native engine does not support {type(model).__name__}: it would leave out "
            f"{', '.join(sorted(left)[:3])}"
        )
    return weights
