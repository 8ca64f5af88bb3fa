"""Everything a run has reported so far, folded from its events and the buffer's stats."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..buffer.messages import Stats
from .feed import Event, Row

BLOCKS = "▁▂▃▄▅▆▇█"

LONG_POLLS = ("AwaitVersion", "PutPrompts", "ClaimSamples", "AwaitEvaluation")
"""Requests that wait by design, whenever there is nothing to do."""
POLL_SLACK_S = 2.0
"""The service answers a long poll at its deadline, or a turn later."""
PATIENCE_S = 5.0
"""A learner that waits longer for its batch is held up."""
_WAIT = re.compile(
    r".+? waits (?P<waited>[0-9.]+) s of (?P<deadline>[0-9.e+]+) s for (?P<what>.+)",
    re.DOTALL,
)
"""A line of `buffer/waits.py`."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """What displays show. Rows of steps are kept by step: a redone step replaces the lost one."""

    name: str
    total_steps: int
    bound: int
    """ceil(S)."""
    capacity_groups: int = 1
    """(S + 1) P: how many groups may be INFLIGHT, READY or TAKEN at once."""
    started_s: float = field(default_factory=time.time)
    phase: str = "starting"
    steps: dict[int, Row] = field(default_factory=dict)
    evaluations: dict[int, Row] = field(default_factory=dict)
    sft: Row = field(default_factory=dict)
    """The newest line of the warm start."""
    stats: Stats | None = None
    lines: int = 0
    """Reported so far: steps, evaluations, updates of the warm start."""

    evaluated: dict[str, int] = field(default_factory=dict)
    """Version -> its held-out samples that were finished at once, at the most."""

    def see(self, stats: Stats) -> None:
        """Take the buffer's newest answer in."""
        self.stats = stats
        version, _, counted = stats.evaluation.partition(": ")
        if counted:
            finished = int(counted.split()[0])
            self.evaluated[version] = max(finished, self.evaluated.get(version, 0))

    def fold(self, event: Event) -> None:
        """Take one reported line in."""
        self.lines += 1
        if event.kind == "sft":
            self.sft = event.row
        else:
            rows = self.steps if event.kind == "step" else self.evaluations
            rows[int(event.row["step"])] = event.row

    @property
    def step(self) -> int:
        """The newest finished step; 0 before the first."""
        return max(self.steps, default=0)

    @property
    def latest(self) -> Row:
        """The newest step's line; empty before the first."""
        return self.steps.get(self.step, {})

    @property
    def waits(self) -> list[str]:
        """Who holds the run up, in the buffer's words; empty when all goes its usual way."""
        return [line for line in self.stats.waits if _holds_up(line)] if self.stats else []

    @property
    def reached(self) -> tuple[int, int, int]:
        """How far the run is: lines reported; groups whose samples are all there and held-out
        samples, since a step of a large model, or an evaluation, may take longer than workers
        live on borrowed nodes. What an engine that dies is left with is no progress: prompts
        that are quarantined, and an evaluation that begins anew."""
        complete = 0
        if self.stats is not None:
            counts = self.stats.counts
            complete = sum(n for word, n in counts.items() if word not in ("WAITING", "INFLIGHT"))
            complete -= len(self.stats.quarantined)
        return self.lines, complete, sum(self.evaluated.values())

    @property
    def violations(self) -> int:
        """Trained tokens outside the bound or off the live path, over the whole run."""
        return sum(_proof(row, "violations") + _proof(row, "orphaned_tokens") for row in self.rows)

    @property
    def rows(self) -> list[Row]:
        """The lines of all steps, in order."""
        return [self.steps[step] for step in sorted(self.steps)]

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace of the last ten; None before two steps."""
        recent = self.rows[-10:]
        if len(recent) < 2 or "time" not in recent[0]:
            return None
        pace = (recent[-1]["time"] - recent[0]["time"]) / (len(recent) - 1)
        return pace * (self.total_steps - self.step)

    @property
    def generated_per_s(self) -> float:
        """Tokens that all engines together write in a second."""
        workers = self.stats.workers.values() if self.stats else ()
        return sum(worker.get("tokens_per_s", 0.0) for worker in workers)

    def rewards_until(self, step: int) -> list[float]:
        """Mean training reward of the steps up to this one, in order."""
        rows = (row for row in self.rows if row["step"] <= step)
        return [float(row["reward_mean"]) for row in rows if row.get("reward_mean") is not None]

    def lag_shares(self, rows: Sequence[Row]) -> dict[int, float]:
        """Share of these steps' trained tokens by lag; all lags up to the bound are there."""
        counts = dict.fromkeys(range(self.bound + 1), 0)
        for row in rows:
            for lag, count in row.get("proof", {}).get("lag_counts", {}).items():
                counts[int(lag)] = counts.get(int(lag), 0) + count
        total = sum(counts.values()) or 1
        return {lag: count / total for lag, count in sorted(counts.items())}


def _proof(row: Row, key: str) -> int:
    return int(row.get("proof", {}).get(key, 0))


def _holds_up(line: str) -> bool:
    """Whether a wait means something: the learner's batch, or what is past its deadline.

    The other requests are long polls, which end at their deadline and are asked again.
    """
    wait = _WAIT.fullmatch(line)
    if wait is None:  # another thing that the buffer says
        return True
    waited_s, deadline_s = float(wait["waited"]), float(wait["deadline"])
    if wait["what"].split()[0] in LONG_POLLS:
        return waited_s > deadline_s + POLL_SLACK_S
    return waited_s > PATIENCE_S


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """A trend in `width` characters at most, each the mean of its share of the values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    means = _bucket_means(finite, min(width, len(finite)))
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


def _bucket_means(values: Sequence[float], buckets: int) -> list[float]:
    edges = [len(values) * i // buckets for i in range(buckets + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges) if b > a]


def clock(seconds: float) -> str:
    """`1:05` or `2:03:09`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
