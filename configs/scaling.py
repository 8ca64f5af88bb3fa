"""How many rollout workers a run should have: asked for, measured, or left alone.

slipstream scale RUN --rollout-workers 12     request -> processes/scale.json -> Scaling.wanted
[cluster] min_workers, max_workers            balance -> Scaling.wanted, at most every PACE_S
"""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..buffer.errors import ConfigError, SlipstreamError
from ..buffer.messages import Stats
from .claim import running_supervisor
from .cluster import ClusterConfig
from .feed import Row
from .run_dir import read_run

MEASURED_STEPS = 10
MIN_STEPS = 3
WAITS, BUSY = 0.25, 0.10
"""One side waits for more than this share of its time while the other waits for less than that."""
PACE_S = 60.0
"""Between two changes of our own: a new worker has to load and to show what it does."""
MAX_WORKERS = 4096


class Balance(NamedTuple):
    """Shares of time in which each side had nothing to do, over the last steps."""

    learner: float
    rollout: float
    advised: int
    """Rollout workers that would make both small."""

    def line(self, workers: int) -> str:
        """The measurement and what to do about it."""
        told = (
            f"the learner waits {self.learner:.0%} of its time, rollout workers {self.rollout:.0%}"
        )
        if self.advised == workers:
            return f"{told}: {workers} rollout workers are balanced"
        return f"{told}: {self.advised} rollout workers instead of {workers} would balance them"


def balance(rows: list[Row], stats: Stats | None, workers: int) -> Balance | None:
    """Measure idle fractions; None before there are `MIN_STEPS` steps and workers' reports.

    Generation is taken to be proportional to workers (measured: `make bench-scale`).
    """
    recent = rows[-MEASURED_STEPS:]
    seconds = sum(float(row.get("seconds", 0.0)) for row in recent)
    idle = (
        [worker["idle"] for worker in stats.workers.values() if "idle" in worker] if stats else []
    )
    if len(recent) < MIN_STEPS or seconds <= 0 or not idle:
        return None
    learner = min(1.0, sum(float(row.get("wait_seconds", 0.0)) for row in recent) / seconds)
    rollout, advised = sum(idle) / len(idle), workers
    working = min(workers, len(idle))  # others may still wait for a node to be on
    if learner > WAITS and rollout < BUSY:
        advised = math.ceil(working / max(0.1, 1 - learner))
    elif rollout > WAITS and learner < BUSY:
        advised = max(1, math.ceil(working * (1 - rollout)))
    return Balance(learner, rollout, advised)


class Scaling:
    """Answers how many workers there should be; the newest request counts."""

    def __init__(self, run_dir: Path, config: ClusterConfig) -> None:
        self._path, self._config = _path(run_dir), config
        self._read: tuple[int, int] | None = None
        self._asked: int | None = None
        self._changed_s = time.monotonic()

    def wanted(self, now: int, measure: Callable[[], Balance | None]) -> int:
        """From `now` workers to so many."""
        try:
            stat = self._path.stat()
        except OSError:
            return self._automatic(now, measure)
        if (stamp := (stat.st_mtime_ns, stat.st_ino)) != self._read:
            self._read = stamp
            self._asked = asked(self._path.parents[1])
        return now if self._asked is None else self._asked

    def _automatic(self, now: int, measure: Callable[[], Balance | None]) -> int:
        low, high = self._config.min_workers, self._config.max_workers
        if not high or time.monotonic() - self._changed_s < PACE_S:
            return now
        if (measured := measure()) is None:
            return now
        wanted = min(high, max(low, 1, measured.advised))
        if wanted != now:
            self._changed_s = time.monotonic()
        return wanted


def asked(run_dir: Path) -> int | None:
    """How many workers `slipstream scale` asked for since the run was started or resumed."""
    with suppress(FileNotFoundError):
        return int(json.loads(_path(run_dir).read_text())["rollout_workers"])
    return None


def forget(run_dir: Path) -> None:
    """Discard what was asked of a run before it was started or resumed."""
    _path(run_dir).unlink(missing_ok=True)


def request(run_dir: Path, workers: int) -> str:
    """Ask a running run for so many rollout workers.

    Returns:
        A line that says what was asked.
    Raises:
        ConfigError: it is not running, or the number makes no sense.
        SlipstreamError: the request cannot be written.
    """
    run_dir = run_dir.expanduser().absolute()
    read_run(run_dir)
    if not 1 <= workers <= MAX_WORKERS:
        raise ConfigError(f"--rollout-workers {workers} must lie in 1 to {MAX_WORKERS}")
    if running_supervisor(run_dir) is None:
        raise ConfigError(
            f"{run_dir} is not running; `slipstream resume {run_dir} rollout.workers={workers}` "
            "continues it with so many"
        )
    new = _path(run_dir).with_suffix(f".{os.getpid()}.new")
    try:
        new.write_text(json.dumps({"rollout_workers": workers}))
        new.replace(_path(run_dir))
    except OSError as error:
        raise SlipstreamError(f"{new} cannot be written: {error.strerror}") from None
    return f"{run_dir.name}: asked for {workers} rollout workers; they join and leave while it runs"


def _path(run_dir: Path) -> Path:
    return run_dir / "processes" / "scale.json"
