"""Tensors in safetensors files: each rank writes its rows where they belong, any reads any rows.

    parts_of(tensors)                     this rank's rows of each tensor, and where they begin
    make_file, then fill_file per rank    one file of whole tensors (published weights)
    write_parts                           one file per rank of its rows alone (optimizer state)
    load_into                             both, for any number of ranks: torch's DCP reads them

The files are what `torch.distributed.checkpoint` writes with its HuggingFaceStorageWriter. We write
them ourselves because it first builds a second copy of everything in memory, holding the
interpreter's lock, which the training thread needs.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .checkpoint import crash_point

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT = 8
_DCP_KEY, _DCP_OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where DCP's reader looks for where the rows of a file belong."""


class Part(NamedTuple):
    """One rank's rows of a tensor; of a tensor that is not sharded all of them."""

    rows: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    first: int
    """Index of the first row."""


class Stored(NamedTuple):
    """What a checkpoint's files say of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's rows, without a copy; of a plain tensor the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks when it is sharded: for small ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> Part:
    """This rank's rows of a tensor, without a copy; merged adapters may be sharded otherwise, and
    are then moved."""
    first = 0
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, (Shard(0),)
        tensor = tensor.redistribute(placements=placements)
        offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)[1]
        first = offsets[0] if offsets else 0
    return Part(local(tensor), tuple(tensor.shape), first)


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """`part_of` each."""
    return {name: part_of(tensor) for name, tensor in tensors.items()}


def make_file(path: Path, parts: Mapping[str, Part], extra: Mapping[str, str] = {}) -> None:
    """Make the file of the whole tensors, its rows still empty; `extra` goes into its metadata."""
    header, starts = _layout(parts, extra)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + starts[""])


def fill_file(path: Path, parts: Mapping[str, Part], extra: Mapping[str, str] = {}) -> None:
    """Write this rank's rows into a file that `make_file` made of the same."""
    header, starts = _layout(parts, extra)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for name, part in parts.items():
            row_bytes = part.rows.element_size() * math.prod(part.shape[1:])
            at = len(header) + starts[name] + part.first * row_bytes
            left = as_bytes(part.rows)
            while len(left):  # pwrite needs no copy, and lets go of the interpreter's lock
                written = os.pwrite(descriptor, left, at)
                at, left = at + written, left[written:]
    finally:
        os.close(descriptor)


def write_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """Write this rank's rows alone, and where they belong."""
    parts = {n: p for n, p in parts.items() if p.rows.numel()}
    offsets = {
        name: {_DCP_OFFSETS: [part.first, *[0] * (len(part.shape) - 1)] if part.shape else []}
        for name, part in parts.items()
    }
    alone = {n: p._replace(shape=tuple(p.rows.shape), first=0) for n, p in parts.items()}
    make_file(path, alone, {_DCP_KEY: json.dumps(offsets)})
    crash_point("checkpoint.file_made")
    fill_file(path, alone, {_DCP_KEY: json.dumps(offsets)})


def _layout(parts: Mapping[str, Part], extra: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where each tensor begins behind it; "" is the end."""
    starts, end = {}, 0
    entries: dict[str, Any] = {"__metadata__": dict(extra)} if extra else {}
    # The widest dtype first: then each tensor is aligned.
    for name, part in sorted(parts.items(), key=lambda i: (-i[1].rows.element_size(), i[0])):
        starts[name], end = end, end + part.rows.element_size() * math.prod(part.shape)
        entries[name] = {
            "dtype": _NAMES[part.rows.dtype],
            "shape": part.shape,
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, starts | {"": end}


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in C order; from the host without a copy."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def stored_in(folder: Path) -> dict[str, Stored]:
    """What the files of a checkpoint hold, by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {n: Stored(tuple(m.size), m.properties.dtype) for n, m in found.items()}  # pyright: ignore


def room_for(stored: Stored, like: Tensor | None) -> Tensor:
    """An empty tensor for what is stored: sharded as `like`, when that has the same shape."""
    if like is not None and tuple(like.shape) == stored.shape:
        return torch.empty_like(like, dtype=stored.dtype, requires_grad=False)
    return torch.empty(stored.shape, dtype=stored.dtype)


def load_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read each tensor, or this rank's rows of it, into the memory it has.

    Args:
        folder: of a checkpoint, written by any number of ranks.
        tensors: by name, with the stored shapes; a DTensor gets its own rows.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():  # each rank reads by itself, and DCP says so
        warnings.simplefilter("ignore", UserWarning)
        load(dict(tensors), storage_reader=reader, no_dist=True)
