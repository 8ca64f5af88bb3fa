"""One supervisor per run: who runs it, told apart from a later process with the same number."""

import os
from pathlib import Path

import msgspec

from ..buffer.errors import ConfigError


def claim_supervision(run_dir: Path) -> None:
    """Say that this process runs the run.

    Raises:
        ConfigError: another living process does.
    """
    pid = running_supervisor(run_dir)
    if pid is not None:
        raise ConfigError(
            f"{run_dir} is being run by process {pid}; end it with `slipstream stop {run_dir}`"
        )
    mine = {"pid": os.getpid(), "started": process_start_time(os.getpid())}
    (run_dir / "processes" / "supervisor.pid").write_bytes(msgspec.json.encode(mine))


def leave_supervision(run_dir: Path) -> None:
    """The opposite of `claim_supervision`."""
    (run_dir / "processes" / "supervisor.pid").unlink(missing_ok=True)


def running_supervisor(run_dir: Path) -> int | None:
    """The living process that runs this run, or None."""
    try:
        owner = msgspec.json.decode((run_dir / "processes" / "supervisor.pid").read_bytes())
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
