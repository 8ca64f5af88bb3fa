"""Append-only files of checksummed payloads, addressed by (segment, offset, length, digest).

    segments/000001.seg    [magic, length, xxh3-64][payload] [magic, length, xxh3-64][payload] ...

A process never appends to a file of an earlier one: what a crash tore stays where it is, and
nothing refers to it.
"""

import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import xxhash

from .codec import Frame
from .errors import CorruptData
from .events import Ref

SEGMENT_BYTES = 256 << 20
"""A new file is begun after so many bytes."""
WRITE_BYTES = 1 << 20
"""So much is gathered before it is written: one call for the usual turn of the service."""
OPEN_FILES = 64
"""Descriptors kept for reading."""
_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"SLP1"


class Segments:
    """The payloads of one run folder: append, sync, read."""

    def __init__(self, folder: Path, *, writable: bool = True) -> None:
        """Open the folder; files are made on the first append.

        Args:
            folder: `segments/` of the run folder.
            writable: False for readers of a run that may be alive.
        """
        self.folder, self.writable = folder, writable
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem) for path in folder.glob("*.seg") if path.stem.isdecimal()]
        self._number = max(numbers, default=0)
        self._write_fd = -1
        self._size = 0
        self._dirty = False
        self._unwritten = bytearray()
        self._read_fds: dict[int, int] = {}
        self.synced: dict[int, int] = {}
        """segment -> bytes of it that survive a power loss."""

    def append(self, chunks: Sequence[Frame]) -> Ref:
        """Write a payload, given in pieces; it is durable after the next `sync`."""
        assert self.writable
        payload = b"".join(chunks)
        digest = xxhash.xxh3_64_intdigest(payload)
        if self._write_fd < 0 or self._size >= SEGMENT_BYTES:
            self._begin_file()
        ref = Ref(segment=self._number, offset=self._size, length=len(payload), digest=digest)
        self._unwritten += _HEADER.pack(_MAGIC, len(payload), digest)
        self._unwritten += payload
        self._size += _HEADER.size + len(payload)
        if len(self._unwritten) > WRITE_BYTES:
            self._write()
        self._dirty = True
        return ref

    def _write(self) -> None:
        """Hand what was appended to the system; after an error the segment is not used again."""
        record = memoryview(bytes(self._unwritten))
        self._unwritten.clear()
        while record:
            record = record[os.write(self._write_fd, record) :]

    def _begin_file(self) -> None:
        """Start the next segment; its name is durable before anything in it can be."""
        self.sync()
        if self._write_fd >= 0:
            os.close(self._write_fd)
        self._number += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._write_fd = os.open(self._path(self._number), flags, 0o644)
        self._size = 0
        folder_fd = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder_fd)
        os.close(folder_fd)

    def sync(self) -> None:
        """Make everything appended so far durable."""
        if self._dirty:
            self._write()
            os.fdatasync(self._write_fd)
            self._dirty = False
            self.synced[self._number] = self._size

    def seal(self) -> int:
        """Write no more to the present file; the number below which none changes any more."""
        self.sync()
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1
        return self._number + 1

    def sizes(self) -> dict[int, int]:
        """Bytes of every file, the first one first."""
        paths = sorted(path for path in self.folder.glob("*.seg") if path.stem.isdecimal())
        return {int(path.stem): path.stat().st_size for path in paths}

    def remove_before(self, number: int) -> None:
        """Delete the files below a segment; the one being written stays whatever is asked."""
        for old in [old for old in self.sizes() if old < min(number, self._number)]:
            if (fd := self._read_fds.pop(old, -1)) >= 0:
                os.close(fd)
            self._path(old).unlink(missing_ok=True)

    def read(self, ref: Ref) -> memoryview:
        """Return a payload, as a view of what was read.

        Raises:
            CorruptData: the file is missing or short, or the bytes are not those written.
        """
        try:
            fd = self._reading(ref.segment)
            if ref.segment == self._number and self._unwritten:
                self._write()
            record = os.pread(fd, _HEADER.size + ref.length, ref.offset)
        except FileNotFoundError as error:
            raise CorruptData(
                f"{self._where(ref)} is not there (any more): old rollouts are removed above "
                "buffer.keep_rollouts_gb"
            ) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # says nothing of the payload
            raise CorruptData(f"{self._where(ref)} cannot be read: {error}") from error
        payload = memoryview(record)[_HEADER.size :]
        if record[: _HEADER.size] != _HEADER.pack(_MAGIC, ref.length, ref.digest):
            raise CorruptData(
                f"{self._where(ref)}: the record's header is not the one that was written"
            )
        if len(payload) != ref.length or xxhash.xxh3_64_intdigest(payload) != ref.digest:
            raise CorruptData(f"{self._where(ref)}: the payload's checksum does not match")
        return payload

    def _where(self, ref: Ref) -> str:
        return f"{self._path(ref.segment)} at {ref.offset}"

    def _reading(self, number: int) -> int:
        """A descriptor of a file; those that were opened last stay open."""
        if number not in self._read_fds:
            while len(self._read_fds) >= OPEN_FILES:
                os.close(self._read_fds.pop(next(iter(self._read_fds))))
            self._read_fds[number] = os.open(self._path(number), os.O_RDONLY)
        return self._read_fds[number]

    def close(self) -> None:
        """Let go of the files; what is not synced is not kept."""
        self._unwritten.clear()
        self._dirty = False
        for fd in [*self._read_fds.values(), self._write_fd]:
            if fd >= 0:
                os.close(fd)
        self._read_fds.clear()
        self._write_fd = -1

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.seg"
