"""One supervisor per run: a lock on a file that stays, which the system frees when it dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..buffer.errors import ConfigError

LOOK_S = 0.2
"""To ask whether a run is locked takes the lock for a moment, which is not to run it."""


@contextmanager
def supervising(run_dir: Path) -> Iterator[None]:
    """Be the process that runs the run, while inside.

    Raises:
        ConfigError: another living process is.
    """
    with _path(run_dir).open("ab") as file:
        end = time.monotonic() + LOOK_S
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise ConfigError(
                    f"{run_dir} is running (process {running_supervisor(run_dir)}); "
                    f"`slipstream stop {run_dir}` ends it"
                )
            time.sleep(0.01)
        file.truncate(0)
        file.write(b"%d\n" % os.getpid())
        file.flush()
        yield


def _lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def running_supervisor(run_dir: Path) -> int | None:
    """The living process that runs this run, or None."""
    try:
        with _path(run_dir).open("rb") as file:
            return None if _lock(file, fcntl.LOCK_SH) else int(file.read())
    except (OSError, ValueError):  # never run, or taken this very moment
        return None


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
