"""What a supervisor that was killed has left: its processes, which end by themselves in seconds.

    on this machine    seen in /proc; waited for, then killed
    on other nodes     the learner's ranks, seen by what they publish; waited for

Until then they may still write to the ledger and the checkpoints, so nobody goes on with the run.
"""

import os
import platform
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..buffer.errors import SlipstreamError
from ..buffer.process import ORPHAN_GRACE_S, PARENT_POLL_S
from ..buffer.waits import PUBLISH_S, read_published

PATIENCE_S = ORPHAN_GRACE_S + PARENT_POLL_S + 2.0
"""After this one that is left is frozen."""
KILL_S = 10.0
POLL_S = 0.05
QUIET_S = 4 * PUBLISH_S
"""A rank on another node that publishes nothing for so long is gone, or frozen and writes nothing
either. Longer than a file system of several hosts takes to show what was written."""
RECENT_S = 300.0
"""Who said nothing for so long ended with an earlier day; clocks may differ by less."""


def end_leftovers(run_dir: Path, say: Callable[[str], None]) -> None:
    """Wait until no process of an earlier supervisor is left that writes to the run; kill who stays
    on this machine.

    Raises:
        SlipstreamError: one cannot be killed, or goes on on another node; names it.
    """
    if left := leftovers(run_dir):
        _end_here(run_dir, left, say)
    _outwait_far_ranks(run_dir, say)


def _end_here(run_dir: Path, left: dict[str, int], say: Callable[[str], None]) -> None:
    say(f"waiting for what a killed supervisor left: {_named(left)}")
    if left := _wait(run_dir, PATIENCE_S):
        say(f"killed, as it did not end in {PATIENCE_S:.0f} s: {_named(left)}")
        for pid in left.values():
            with suppress(ProcessLookupError, PermissionError):  # of another user: named below
                os.kill(pid, signal.SIGKILL)
        if left := _wait(run_dir, KILL_S):
            raise SlipstreamError(f"{run_dir} cannot go on: not even SIGKILL ends {_named(left)}")


def _outwait_far_ranks(run_dir: Path, say: Callable[[str], None]) -> None:
    """Wait until the learner's ranks on other nodes are silent: they save as they end."""
    known, began = _far_ranks(run_dir), time.monotonic()
    if not known:
        return
    say(f"waiting until learner ranks on other nodes are silent: {', '.join(sorted(known))}")
    changed_s = began
    while time.monotonic() - changed_s < QUIET_S:
        time.sleep(POLL_S)
        # Of a file that cannot be read just now the last beat stands: that is no silence.
        if (now := known | _far_ranks(run_dir)) != known:
            known, changed_s = now, time.monotonic()
        if changed_s - began > PATIENCE_S + QUIET_S:
            raise SlipstreamError(
                f"{run_dir} cannot go on: its learner still runs on another node "
                f"({', '.join(sorted(known))}); end it there, then resume again"
            )


def _far_ranks(run_dir: Path) -> dict[str, int]:
    """Learner ranks elsewhere that spoke not long ago: who and where -> its beat."""
    found = {}
    for path in (run_dir / "processes").glob("learner*.waits.json"):
        said = read_published(path)
        if said is None or said.host in ("", platform.node()):
            continue
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < RECENT_S:
                name = path.name.removesuffix(".waits.json")
                found[f"{name} (pid {said.pid} on {said.host})"] = said.beat
    return found


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
        time.sleep(POLL_S)
    return left


def _named(left: dict[str, int]) -> str:
    return ", ".join(f"{name} (pid {pid})" for name, pid in sorted(left.items()))
