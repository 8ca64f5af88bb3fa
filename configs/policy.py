"""What is done about a process that fails: one table for every kind of process and of failure.

    kind(process) x failure(how it ended) -> Rule(action, words)

Each action may be taken `cluster.restarts` times within `WINDOW_S`, and as often without progress
of the run, however long that takes; then the run ends, with the words of the last failure and the
command that resumes it.
"""

import errno
import os
import shutil
import time
from collections import deque
from collections.abc import Hashable
from typing import Literal, NamedTuple

from .child import Child

WINDOW_S = 600.0
SAME_NODE_S = 30.0
"""The processes of a lost node are found dead within so long of one another, and count once."""

Kind = Literal["learner", "buffer", "feeder", "worker"]
Failure = Literal[
    "died", "lost a peer", "raised", "stalled", "starved", "refused", "left", "no space"
]  # fmt: skip
"""`died`: killed, or gone without a word. `lost a peer`: another process did not answer. `raised`:
an error nobody foresaw. `stalled`: found hung and killed by us. `starved`: the learner got no batch
in time. `refused`: said why it cannot go on, which a restart does not change. `left`: ended by
itself, too early. `no space`: the disk of the run is full, which a restart does not change."""

Action = Literal["restart", "go back", "give up"]
"""`restart`: this process alone; the ledger gives its work to it again. `go back`: all processes,
on a new branch from the newest checkpoint. `give up`: end the run, which can be resumed."""


class Rule(NamedTuple):
    """What to do, and how to say it."""

    action: Action
    words: str


_RESTART = Rule("restart", "is restarted; what it held is issued again")
_GO_BACK = Rule("go back", "the run goes back to its newest checkpoint")
_GIVE_UP = Rule("give up", "a restart would not change it")

POLICY: dict[tuple[Kind, Failure], Rule] = {
    **{("worker", how): _RESTART for how in ("died", "lost a peer", "raised", "stalled", "left")},
    **{("feeder", how): Rule("restart", "is restarted where the ledger says")
       for how in ("died", "lost a peer", "raised", "stalled")},
    **{("buffer", how): Rule("restart", "is restarted from its ledger")
       for how in ("died", "raised", "stalled")},
    **{("learner", how): _GO_BACK
       for how in ("died", "lost a peer", "raised", "stalled", "starved")},
}  # fmt: skip
"""Every other pair is given up: see `rule_for`."""

FINAL_ERRORS = ("ConfigError", "TrainingFailed", "CorruptData")
NO_SPACE = os.strerror(errno.ENOSPC)
"""In the message of any error of a full disk, whoever wrote."""
FULL_BYTES = 2**20
"""A disk with less free: who died on it may not have been able to say why."""
STARVED = "got no batch within"
"""What the learner says of a batch that did not come (`learner/loop.py`)."""


def kind_of(name: str) -> Kind:
    """`worker-3` is a worker."""
    kind = name.partition("-")[0]
    assert kind in ("learner", "buffer", "feeder", "worker"), name
    return kind


def failure_of(child: Child, stalled: bool = False) -> Failure:
    """How an ended child failed."""
    if stalled:
        return "stalled"
    error = child.error()
    if error is None and shutil.disk_usage(child.run_dir).free < FULL_BYTES:
        return "no space"
    if error is None:
        return "left" if child.poll() == 0 else "died"
    if error.type == "DiskFull" or NO_SPACE in error.message:
        return "no space"
    if STARVED in error.message:
        return "starved"
    if error.type in ("PeerLost", "Refused", "WireError"):
        return "lost a peer"
    return "refused" if error.type in FINAL_ERRORS else "raised"


def rule_for(name: str, failure: Failure) -> Rule:
    """The table's rule; a pair that is not in it is given up."""
    return POLICY.get((kind_of(name), failure), _GIVE_UP)


class Budget:
    """Counts actions; `spend` says whether one more is allowed."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self._times: dict[str, deque[tuple[float, Hashable]]] = {}
        """what -> when, and how far the run was then."""
        self._nodes: dict[tuple[str, str], float] = {}
        """(what, node) -> when its loss was counted."""

    def spend(self, what: str, progress: Hashable, node: str = "") -> bool:
        """Note one action now; False when there were too many within the window, or too many since
        the run made progress: what takes longer than the window to fail must not go on for ever.

        Args:
            what: the kind of process.
            progress: how far the run is; another value is progress.
            node: with which it was lost; all that is lost with it is one failure.
        """
        now, times = time.monotonic(), self._times.setdefault(what, deque())
        if node and now - self._nodes.get((what, node), -SAME_NODE_S) < SAME_NODE_S:
            return True
        while times and now - times[0][0] > WINDOW_S and times[0][1] != progress:
            times.popleft()
        if len(times) >= self.allowed:
            return False
        times.append((now, progress))
        self._nodes[what, node] = now
        return True

    def used(self, what: str) -> int:
        """How many count."""
        return len(self._times.get(what, ()))

    def exhausted(self, what: str) -> str:
        """Why nothing more is done, to go before what happened last."""
        if not self.allowed:
            return ""
        old = time.monotonic() - self._times[what][0][0] > WINDOW_S
        where = "without progress of the run" if old else f"in {WINDOW_S:.0f} s"
        return f"{self.allowed} {what} restarts {where} (cluster.restarts), then: "
