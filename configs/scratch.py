"""What a run needs outside its folder: a short socket path and fast memory for weights."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..buffer.errors import ConfigError
from ..buffer.weight_fetch import remove_unused
from .claim import process_start_time
from .sizes import MAILBOX_VERSIONS

TMPFS = Path("/dev/shm")

MAX_SOCKET_PATH = 100
"""A Unix socket's path may have 107 bytes; a few are kept for the socket's name."""

SPARE_BYTES = 256 * 2**20
"""Left free on tmpfs, because filling it takes memory away from everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Places that the supervisor owns and removes."""

    endpoint: str
    """`ipc://...`, in a folder only this user can enter."""
    weights_dir: Path
    fetched_dir: Path | None = None
    """Where each host keeps the weights that it fetched in chunks; None: files are seen by all."""
    ranks_apart: bool = False
    """Whether the learner's ranks are on several hosts."""


@contextmanager
def scratch(
    run_dir: Path, run_id: str, bytes_per_version: int, *, fetch: bool = False
) -> Iterator[Scratch]:
    """Make the places, and remove them whatever happens inside.

    Args:
        run_dir: where weights go when tmpfs is too small.
        run_id: names the tmpfs folder.
        bytes_per_version: size of one published version.
        fetch: weights go in chunks even on this machine.
    """
    fetched = host_dir(run_id, "fetched")
    sweep(TMPFS, Path(tempfile.gettempdir()))
    socket_dir = _socket_dir()
    weights_dir = _weights_dir(run_dir, run_id, MAILBOX_VERSIONS * bytes_per_version)
    try:
        yield Scratch(
            endpoint=f"ipc://{socket_dir}/buffer",
            weights_dir=weights_dir,
            fetched_dir=fetched if fetch else None,
        )
    finally:
        shutil.rmtree(socket_dir, ignore_errors=True)
        shutil.rmtree(weights_dir, ignore_errors=True)
        remove_unused(fetched)


def host_dir(run_id: str, kind: str) -> Path:
    """A folder of one run on whichever host, removed with its last user (`weight_fetch.use`)."""
    place = TMPFS if TMPFS.is_dir() else Path(tempfile.gettempdir())
    return place / f"{_prefix()}{run_id}-{kind}"


def _socket_dir() -> Path:
    """A private folder whose path leaves room for a socket's name."""
    for place in (tempfile.gettempdir(), "/tmp"):
        made = Path(tempfile.mkdtemp(prefix=_prefix(), dir=place))
        if len(os.fsencode(made)) <= MAX_SOCKET_PATH - len("/buffer"):
            _own(made)
            return made
        made.rmdir()
    raise ConfigError(f"/tmp gives paths over {MAX_SOCKET_PATH} bytes, too long for a socket")


def _weights_dir(run_dir: Path, run_id: str, needed_bytes: int) -> Path:
    """A folder on tmpfs when `needed_bytes` fit there, else in the run folder."""
    fits = TMPFS.is_dir() and shutil.disk_usage(TMPFS).free > needed_bytes + SPARE_BYTES
    folder = TMPFS / f"{_prefix()}{run_id}" if fits else run_dir / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    _own(folder)
    return folder


def _prefix() -> str:
    return f"slipstream-{os.getuid()}-"


def _own(folder: Path) -> None:
    (folder / "owner").write_text(f"{os.getpid()} {process_start_time(os.getpid())}")


def sweep(*places: Path) -> None:
    """Remove what a supervisor left that was killed too hard to do it: its weights hold memory."""
    for left in (folder for place in places for folder in place.glob(f"{_prefix()}*")):
        if (left / "users").exists() and not (left / "owner").exists():
            remove_unused(left)
            continue
        try:
            pid, started = (left / "owner").read_text().split()
        except (OSError, ValueError):
            continue  # just being made, or not ours
        if process_start_time(int(pid)) != started:
            shutil.rmtree(left, ignore_errors=True)
