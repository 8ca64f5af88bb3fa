"""One supervisor per run: who runs it, told apart from a later process with the same number."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ..buffer.errors import ConfigError


@contextmanager
def supervising(run_dir: Path) -> Iterator[None]:
    """Be the process that runs the run, while inside.

    Raises:
        ConfigError: another living process is.
    """
    path = _path(run_dir)
    if running_supervisor(run_dir) is None:
        path.unlink(missing_ok=True)  # of one that was killed
    mine = {"pid": os.getpid(), "started": process_start_time(os.getpid())}
    try:
        with path.open("xb") as file:  # of two at once, only one can make it
            file.write(msgspec.json.encode(mine))
    except FileExistsError:
        raise ConfigError(
            f"{run_dir} is running (process {running_supervisor(run_dir)}); "
            f"`slipstream stop {run_dir}` ends it"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def running_supervisor(run_dir: Path) -> int | None:
    """The living process that runs this run, or None."""
    try:
        owner = msgspec.json.decode(_path(run_dir).read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    alive = process_start_time(owner["pid"]) == owner["started"] is not None
    return owner["pid"] if alive else None


def process_start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; with the pid it names a process for good.

    None when there is no such process (or it is a zombie).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The program's name is in parentheses and may itself hold spaces; state is the field after it.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _path(run_dir: Path) -> Path:
    return run_dir / "processes" / "supervisor.pid"
