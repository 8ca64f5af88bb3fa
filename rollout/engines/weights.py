"""Published weights from the mailbox's files, verified before anything uses them."""

import mmap
from collections.abc import Mapping
from pathlib import Path

import xxhash
from torch import Tensor

from ...buffer.errors import CorruptData
from ...buffer.records import Shard, WeightsManifest
from ...kernels.models import ModelError, read_weights


def read_verified(manifest: WeightsManifest) -> Mapping[str, Tensor]:
    """The tensors of a manifest by name, memory-mapped.

    Raises:
        CorruptData: a shard is missing, or its size, digest or contents are not what was published.
    """
    for shard in manifest.shards:
        _verify(shard, manifest)
    try:
        return read_weights([shard.path for shard in manifest.shards])
    except ModelError as error:
        raise CorruptData(f"weights of version {manifest.version}: {error}") from error


def _verify(shard: Shard, manifest: WeightsManifest) -> None:
    of = f"{shard.path} of version {manifest.version}"
    path = Path(shard.path)
    if not path.is_file():
        raise CorruptData(f"{of} does not exist")
    with path.open("rb") as file:
        num_bytes = path.stat().st_size
        if num_bytes != shard.num_bytes or not num_bytes:
            raise CorruptData(f"{of} has {num_bytes} bytes, published were {shard.num_bytes}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            digest = xxhash.xxh3_128_hexdigest(mapped)
    if digest != shard.digest:
        raise CorruptData(f"{of} has digest {digest}, published was {shard.digest}")
