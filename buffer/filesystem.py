"""What the ledger needs of the disk: local, because SQLite's locks and syncs are not kept by
network file systems, and not full."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError, DiskFull

NETWORK = frozenset(
    [
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph",
        "lustre", "gpfs", "beegfs", "glusterfs", "orangefs", "pvfs2", "ocfs2",
        "gfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse",
        "fuse.juicefs",
        "fuse.rclone", "fuse.goofys", "fuse.blobfuse2",
    ]
)  # fmt: skip
"""Types of /proc/mounts that are not on this machine, or not like a disk."""


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that holds a path; empty when it is not listed.

    Args:
        path: need not exist.
        mounts: text in the form of /proc/mounts.
    """
    folders = {str(folder) for folder in (path.absolute(), *path.absolute().parents)}
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) >= 3:
            place = fields[1].replace("\\040", " ")  # how spaces are written there
            if place in folders and len(place) >= len(best):
                best, kind = place, fields[2]
    return kind


def require_local(path: Path, mounts: str | None = None) -> None:
    """Refuse a ledger on a network file system.

    Raises:
        ConfigError: naming the file system and the remedy.
    """
    if mounts is None:
        listed = Path("/proc/mounts")
        mounts = listed.read_text() if listed.exists() else ""
    kind = file_system_of(path.resolve(), mounts)
    if kind in NETWORK:
        raise ConfigError(
            f"{path} is on {kind}, where SQLite's locks and syncs do not hold: the ledger could "
            "lose what it acknowledged. Put the run folder on a local disk (--output), and set "
            "buffer.copy_to to a folder there, which gets a copy with every checkpoint"
        )


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Say what a failed write means.

    Raises:
        DiskFull: no space, quota or file size left.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full |= any(words in str(error) for words in ("disk is full", "disk I/O error"))
        if not full:
            raise
        raise DiskFull(
            f"{path} cannot grow: {error}. Everything acknowledged is kept; make room and "
            "`slipstream resume` the run"
        ) from error


def put_text(path: Path, text: str) -> None:
    """Write a small file that others read meanwhile: they find the one before, or all of this one.

    Raises:
        OSError: it cannot be written; the one before stays.
    """
    partial = path.with_suffix(".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
