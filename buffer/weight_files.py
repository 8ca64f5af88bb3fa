"""Publishing weights as files: copied and digested in one pass, into memory that is used again.

    publish(0.1) -> weights-0.1.safetensors       new pages: costs several times the copying
    publish(0.2) -> weights-0.2.safetensors       new pages
    retire(0.1)  -> weights.spare                 its path is gone, its pages are kept
    publish(0.3) -> weights-0.3.safetensors       over the pages of 0.1

A version's path is used once, and is gone before its pages are written again. So a reader that has
verified a file, has copied what it wants and then finds the path still there (`mailbox.confirm`)
has copied what was published.
"""

import json
import mmap
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from .filesystem import naming_a_full_disk
from .records import Shard, Version, WeightsManifest
from .weight_holder import Holder, Offer

PIECE_BYTES = 1 << 18
"""Copied, then digested while it is still in the processor's cache."""
ALIGNMENT = 8
"""Of the first tensor's bytes, as safetensors wants it."""


class Piece(NamedTuple):
    """One tensor's part of a file."""

    dtype: str
    """safetensors' name: F32, BF16 ..."""
    shape: tuple[int, ...]
    bytes_N: np.ndarray
    """[N] uint8."""


class Written(NamedTuple):
    """The digests of a file, xxh3-128 hex."""

    file: str
    """Of its bytes: a shard's."""
    tensors: str
    """Of what it holds, in whatever order and by whatever header: a version's."""


def retire(path: Path) -> None:
    """Make a version's file unreadable by its name; the newest of those is kept as a spare."""
    if path.suffix == ".safetensors":  # a manifest cannot make us touch other things
        spare = path.with_name(f"{path.name.rpartition('-')[0]}.spare")
        with suppress(FileNotFoundError):  # retired by its publisher, or on another machine
            os.replace(path, spare)


class Outbox:
    """The files of one publisher; the folder is the supervisor's."""

    def __init__(
        self,
        directory: Path,
        name: str = "weights",
        holder: Holder | None = None,
        *,
        reuse: bool = True,
    ) -> None:
        """Remove what an earlier process of that name left, published or not (`.held`); the folder
        is made when missing.

        Args:
            directory: on tmpfs when the weights fit.
            name: of this publisher, unique in the folder.
            holder: who serves them to other hosts.
            reuse: keep a spare, for `write`; others do not use it.
        """
        self.holder, self._reuse = holder, reuse
        self._directory, self._name = directory.resolve(), name
        self._mappings = Mappings()
        self.base: Shard | None = None
        """What the adapters that are published belong to."""
        self._shards: dict[Version, Shard] = {}
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = re.escape(name)
        kinds = r"-(base|checkpoint|\d+\.\d+)\.(safetensors|held)|\.(partial|spare)"
        ours = re.compile(f"{stem}({kinds})")
        for path in self._directory.iterdir():
            if ours.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def publish(self, version: Version, pieces: Mapping[str, Piece]) -> WeightsManifest:
        """Write one shard and rename it into place.

        Args:
            version: its digest is the tensors' own, the shard's is of the file's bytes.
            pieces: by name.
        Raises:
            DiskFull: it does not fit.
        """
        temporary = self._directory / f"{self._name}.partial"
        return self.announce(version, temporary, self.write(temporary, pieces).file)

    def write(self, path: Path, pieces: Mapping[str, Piece], *, fresh: bool = False) -> Written:
        """Write a shard that is not published yet.

        Args:
            path: in the folder.
            pieces: by name.
            fresh: into new pages; the spare's are still being read.
        Raises:
            DiskFull: it does not fit.
        """
        head = _header(pieces)
        num_bytes = len(head) + sum(piece.bytes_N.nbytes for piece in pieces.values())
        target_N = self._take_spare(path, num_bytes, fresh=fresh)
        target_N[: len(head)] = np.frombuffer(head, np.uint8)
        hasher, start, digests = xxhash.xxh3_128(head), len(head), {}
        for name, piece in pieces.items():
            target = target_N[start : start + piece.bytes_N.nbytes]
            copy_digested(target, piece.bytes_N, hasher, own := xxhash.xxh3_128())
            digests[name] = own.hexdigest()
            start += piece.bytes_N.nbytes
        return Written(hasher.hexdigest(), tensors_digest(pieces, digests))

    def announce(self, version: Version, written: Path, digest: str) -> WeightsManifest:
        """Rename a written shard to where a version is looked for.

        Args:
            version: its digest is the tensors' own.
            written: by `write`, or by others.
            digest: of the file's bytes.
        """
        path = self._directory / f"{self._name}-{version.branch}.{version.step}.safetensors"
        os.replace(written, path)
        shard = Shard(path=str(path), num_bytes=path.stat().st_size, digest=digest)
        return self.adopt(WeightsManifest(version=version, shards=(shard,)))

    def keep(self, held: Collection[Version]) -> None:
        """Retire all versions but these."""
        for version in [version for version in self._shards if version not in held]:
            shard = self._shards.pop(version)
            if self.holder and shard.digest not in {own.digest for own in self._shards.values()}:
                self.holder.offers.pop(shard.digest, None)
            retire(Path(shard.path))
        if not self._reuse:  # the service retires, too
            (self._directory / f"{self._name}.spare").unlink(missing_ok=True)

    @property
    def files(self) -> dict[Version, Path]:
        """Where the versions lie that are not retired; the service may have retired more."""
        paths = {version: Path(shard.path) for version, shard in self._shards.items()}
        return {version: path for version, path in paths.items() if path.exists()}

    @property
    def receiving(self) -> int:
        """How many hosts have fetched from us, and do not have all of the newest version."""
        if self.holder is None or not self._shards:
            return 0
        newest = list(self._shards.values())[-1].digest
        hosts = {d: o.tracker.hosts() for d, o in self.holder.offers.items() if o.tracker}
        whole = {host for host, has_all in hosts[newest].items() if has_all}
        return len({host for asked in hosts.values() for host in asked} - whole)

    def adopt(self, manifest: WeightsManifest) -> WeightsManifest:
        """Hold a version of one file, whoever wrote it, and serve it."""
        (shard,) = manifest.shards
        self._shards[manifest.version] = shard = self._offered(shard)
        return msgspec.structs.replace(manifest, shards=(shard,), base=self.base)

    def hold_base(self, written: Path, digest: str) -> None:
        """Announce a written shard as the base of every version from now on; it is not retired.

        Args:
            written: by `write`, or by others.
            digest: of the file's bytes.
        """
        path = self._directory / f"{self._name}-base.safetensors"
        os.replace(written, path)
        shard = Shard(path=str(path), num_bytes=path.stat().st_size, digest=digest)
        self.base = self._offered(shard)

    def _offered(self, shard: Shard) -> Shard:
        if self.holder is None:
            return shard
        self.holder.offers[shard.digest] = Offer(np.memmap(shard.path, np.uint8, "r"))
        return msgspec.structs.replace(shard, holder=self.holder.address)

    def _take_spare(self, path: Path, num_bytes: int, *, fresh: bool) -> np.ndarray:
        """[num_bytes] uint8, shared with the file at `path`: the spare's pages, or new ones."""
        spare = self._directory / f"{self._name}.spare"
        if fresh:
            spare.unlink(missing_ok=True)
        try:
            os.replace(spare, path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
        return self._mappings.of(path, num_bytes)


class Mappings:
    """Files that stay mapped while they are in their folder: mapping one again costs more than
    writing it."""

    def __init__(self) -> None:
        """None is mapped."""
        self._maps: dict[int, np.ndarray] = {}
        """By inode, which no other file gets while it is mapped."""

    def of(self, path: Path, num_bytes: int) -> np.ndarray:
        """[num_bytes] uint8, see `map_file`."""
        path.touch(0o600)
        told = path.stat()
        kept_N = self._maps.get(told.st_ino)
        # One of another size now was cut by another process, and the pages behind its end are gone.
        if kept_N is None or not kept_N.nbytes == num_bytes == told.st_size:
            kept_N = map_file(path, num_bytes)
        with os.scandir(path.parent) as files:
            known = {file.inode() for file in files}
        self._maps = {key: own_N for key, own_N in self._maps.items() if key in known}
        self._maps[told.st_ino] = kept_N
        return kept_N


def copy_digested(target_N: np.ndarray, source_N: np.ndarray, *hashers: xxhash.xxh3_128) -> None:
    """Copy bytes, and digest what was written while it is in the processor's cache."""
    for begin in range(0, source_N.nbytes, PIECE_BYTES):
        piece_N = target_N[begin : begin + PIECE_BYTES]
        piece_N[:] = source_N[begin : begin + PIECE_BYTES]
        for hasher in hashers:
            hasher.update(piece_N.data)


def tensors_digest(pieces: Mapping[str, Piece], digests: Mapping[str, str] | None = None) -> str:
    """xxh3-128 hex of names, dtypes, shapes and the digests of the bytes, in name order.

    Args:
        pieces: by name.
        digests: xxh3-128 hex of the bytes of each, when they are known.
    """
    hasher = xxhash.xxh3_128()
    for name, piece in sorted(pieces.items()):
        own = digests[name] if digests else xxhash.xxh3_128_hexdigest(piece.bytes_N.data)
        hasher.update(f"{name} {piece.dtype} {tuple(piece.shape)} {own}\n".encode())
    return hasher.hexdigest()


def digest_file(path: Path) -> Written:
    """Of a safetensors file that others wrote, read once."""
    bytes_N = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(bytes_N[:8].tobytes(), "little")
    header = json.loads(bytes_N[8:start].tobytes())
    header.pop("__metadata__", None)
    hasher, pieces, digests = xxhash.xxh3_128(bytes_N[:start].data), {}, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        piece_N, own = bytes_N[start + first : start + end], xxhash.xxh3_128()
        for begin in range(0, piece_N.nbytes, PIECE_BYTES):
            for each in (hasher, own):
                each.update(piece_N[begin : begin + PIECE_BYTES].data)
        pieces[name] = Piece(entry["dtype"], tuple(entry["shape"]), piece_N)
        digests[name] = own.hexdigest()
    return Written(hasher.hexdigest(), tensors_digest(pieces, digests))


def map_file(path: Path, num_bytes: int) -> np.ndarray:
    """[num_bytes] uint8, shared with a file, which is made when missing, and allocated.

    Raises:
        DiskFull: it does not fit.
    """
    path.touch(0o600)
    with naming_a_full_disk(path), path.open("r+b") as file:
        os.ftruncate(file.fileno(), num_bytes)
        if hasattr(os, "posix_fallocate"):  # else a full tmpfs kills us as we write
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), np.uint8)


def _header(pieces: Mapping[str, Piece]) -> bytes:
    """What a safetensors file begins with: its length, then names, dtypes, shapes and places."""
    table, start = {}, 0
    for name, piece in pieces.items():
        end = start + piece.bytes_N.nbytes
        table[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
