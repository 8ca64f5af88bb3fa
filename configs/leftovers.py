"""What a supervisor that was killed has left: its processes, which end by themselves in seconds.

Until then they may still write to the ledger and the checkpoints, so nobody goes on with the run.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..buffer.errors import SlipstreamError
from ..buffer.process import ORPHAN_GRACE_S, PARENT_POLL_S

PATIENCE_S = ORPHAN_GRACE_S + PARENT_POLL_S + 2.0
"""After this one that is left is frozen."""
KILL_S = 10.0


def end_leftovers(run_dir: Path, say: Callable[[str], None]) -> None:
    """Wait until no process of an earlier supervisor is left on this machine; kill who stays.

    On other nodes none writes what the next branch reads: the buffer and the feeder are here.

    Raises:
        SlipstreamError: one cannot be killed, names it.
    """
    left = leftovers(run_dir)
    if not left:
        return
    say(f"waiting for what a killed supervisor left: {_named(left)}")
    if left := _wait(run_dir, PATIENCE_S):
        say(f"killed, as it did not end in {PATIENCE_S:.0f} s: {_named(left)}")
        for pid in left.values():
            with suppress(ProcessLookupError, PermissionError):  # of another user: named below
                os.kill(pid, signal.SIGKILL)
        if left := _wait(run_dir, KILL_S):
            raise SlipstreamError(f"{run_dir} cannot go on: not even SIGKILL ends {_named(left)}")


def leftovers(run_dir: Path) -> dict[str, int]:
    """The living processes of a run without a supervisor: name -> pid (where there is a /proc)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            *_, module, spec = ["", "", *os.fsdecode(path.read_bytes()).rstrip("\0").split("\0")]
            folder = Path(spec).parent
            ours = module.startswith("slipstream.") and folder.name == "processes"
            if ours and folder.samefile(run_dir / "processes"):
                found[Path(spec).stem] = int(path.parent.name)
    return found


def _wait(run_dir: Path, deadline_s: float) -> dict[str, int]:
    end = time.monotonic() + deadline_s
    while (left := leftovers(run_dir)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _named(left: dict[str, int]) -> str:
    return ", ".join(f"{name} (pid {pid})" for name, pid in sorted(left.items()))
