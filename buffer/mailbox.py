"""Published weights: written once, digested, verified by whoever loads them, retired when old.

The learner publishes (`weight_files.py`), sends the manifest to the buffer service, and engines map
the files, verify them, copy what they want and `confirm`. The service keeps the two newest versions
and those pinned by evaluations.
"""

import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from .errors import CorruptData, Refused
from .records import Shard, Version, WeightsManifest
from .weight_files import retire

KEPT_VERSIONS = 2
"""The newest, and the one before: an engine may be loading it right now."""
_CHUNK_BYTES = 1 << 22
_SLOWEST_BYTES_PER_S = 1 << 28
"""Of reading or sending weights where nothing is wrong: a disk, not a device."""


def file_digest(path: Path) -> tuple[int, str]:
    """(bytes, xxh3-128 hex digest) of a file.

    Raises:
        CorruptData: it does not exist or cannot be read.
    """
    hasher = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
            return file.tell(), hasher.hexdigest()
    except FileNotFoundError as error:
        raise CorruptData(f"weights {path}: the file does not exist") from error
    except OSError as error:
        raise CorruptData(f"weights {path} cannot be read: {error}") from error


def publish_file(
    directory: Path, version: Version, write: Callable[[Path], object]
) -> WeightsManifest:
    """Write one shard under a temporary name, digest it, rename it into place.

    Args:
        directory: on tmpfs when the weights fit; made when missing.
        version: its digest is the tensors' own, the shard's is of the file's bytes.
        write: writes a safetensors file to the path it is given.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / f"weights-{version.branch}.{version.step}.safetensors"
    temporary = path.with_suffix(".partial")
    write(temporary)
    num_bytes, digest = file_digest(temporary)
    os.replace(temporary, path)
    shard = Shard(path=str(path), num_bytes=num_bytes, digest=digest)
    return WeightsManifest(version=version, shards=(shard,))


def verify(manifest: WeightsManifest) -> None:
    """Compare every shard with its digest.

    Raises:
        CorruptData: a shard is missing or its bytes differ.
    """
    for shard in manifest.files:
        check_shard(shard, *file_digest(Path(shard.path)), manifest.version)


def check_shard(shard: Shard, num_bytes: int, digest: str, version: Version) -> None:
    """Compare what was found of a shard with what was published.

    Raises:
        CorruptData: they differ.
    """
    if (num_bytes, digest) != (shard.num_bytes, shard.digest):
        raise CorruptData(
            f"weights {version}: {shard.path} has {num_bytes} bytes, digest {digest}; published "
            f"were {shard.num_bytes} bytes, {shard.digest}"
        )


def confirm(manifest: WeightsManifest) -> None:
    """To be called once what was verified has been copied, too: until now no byte was overwritten.

    Raises:
        CorruptData: a shard was retired meanwhile.
    """
    for shard in manifest.shards:
        if not Path(shard.path).exists():
            raise CorruptData(f"weights {manifest.version}: {shard.path} was retired while read")


def moving_s(manifest: WeightsManifest) -> float:
    """What deadlines of a version allow for its bytes, besides what they allow for the rest."""
    return sum(shard.num_bytes for shard in manifest.files) / _SLOWEST_BYTES_PER_S


class Mailbox:
    """The manifests that can still be loaded, and the end of the others."""

    def __init__(self) -> None:
        self._held: dict[Version, WeightsManifest] = {}
        self._pins: dict[str, Version] = {}

    def add(self, manifest: WeightsManifest) -> None:
        """Hold a new version, and retire what it makes old."""
        self._held[manifest.version] = manifest
        self._retire()

    def find(self, version: Version) -> WeightsManifest:
        """The manifest of a version by (branch, step).

        Raises:
            Refused: the version is unknown or retired.
        """
        for held, manifest in self._held.items():
            if (held.branch, held.step) == (version.branch, version.step):
                return manifest
        names = ", ".join(str(held) for held in self._held) or "none"
        raise Refused(f"version {version} is not held (any more); held: {names}")

    def pin(self, owner: str, version: Version) -> WeightsManifest:
        """Keep a version until `unpin`, however old it gets.

        Raises:
            Refused: the version is unknown or retired.
        """
        manifest = self.find(version)
        self._pins[owner] = manifest.version
        return manifest

    def unpin(self, owner: str) -> None:
        """Let a pinned version go."""
        self._pins.pop(owner, None)
        self._retire()

    def _retire(self) -> None:
        kept = set(list(self._held)[-KEPT_VERSIONS:]) | set(self._pins.values())
        for version in [held for held in self._held if held not in kept]:
            for shard in self._held.pop(version).shards:
                retire(Path(shard.path))

    @property
    def held(self) -> tuple[Version, ...]:
        """What can still be loaded."""
        return tuple(self._held)


def check_present(manifest: WeightsManifest) -> None:
    """Refuse a manifest whose files are not there; digests are the loader's business, and what is
    served by somebody need not be visible here.

    Raises:
        Refused: a shard is missing or has another size.
    """
    for shard in (each for each in manifest.files if not each.holder):
        path = Path(shard.path)
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            raise Refused(f"weights {manifest.version}: {shard.path} is missing or incomplete")
