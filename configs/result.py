"""What a run came to, computed from its folder: `result` in run.json and the closing screen."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Literal

import msgspec

from .feed import Row, latest_by_step, read_rows

Verdict = Literal["rose", "fell", "did not change measurably", "not comparable"]


class Evaluated(msgspec.Struct, kw_only=True, frozen=True):
    """One evaluation on held-out prompts."""

    step: int
    mean: float | None
    """None when no sample could be scored."""
    ci95_low: float | None
    """None, as the other end, when there are too few prompts for an interval."""
    ci95_high: float | None
    prompts: int


class Exported(msgspec.Struct, kw_only=True, frozen=True):
    """The exported folder, and whether its reload equals the live policy."""

    path: str
    ok: bool
    max_logit_difference: float | None = None
    check: str = ""
    """What was compared, the largest difference, and its bound."""
    message: str = ""


class Audited(msgspec.Struct, kw_only=True, frozen=True):
    """Whether issued = trained + dropped + open."""

    ok: bool
    line: str


class Result(msgspec.Struct, kw_only=True, frozen=True):
    """The run in numbers."""

    status: str
    reason: str = ""
    steps: int = 0
    """Finished learner steps."""
    planned_steps: int = 0
    reward_first: Evaluated | None = None
    """The policy before the first step (after the warm start)."""
    reward_final: Evaluated | None = None
    reward_rise: float | None = None
    staleness_violations: int = 0
    """Trained tokens outside the bound; over all steps, lost ones included."""
    orphaned_tokens: int = 0
    max_lag: int = 0
    bound: int = 0
    mixed_fraction: float = 0.0
    """Share of trained trajectories that hold two versions or more."""
    dropped: dict[str, int] = {}
    length_bias: float | None = None
    """Mean tokens trained / issued."""
    logprob_gap_max: float | None = None
    """Largest |behaviour - learner| log-prob over tokens of one and the same version."""
    logprob_certificate: str = ""
    """Why the gap left its band, in the last step in which it did."""
    first_step_seconds: float | None = None
    """From the command to the end of the first learner step."""
    total_seconds: float = 0.0
    tokens_trained: int = 0
    tokens_per_s: float = 0.0
    """Trained tokens over the steps' seconds, waiting included."""
    export: Exported | None = None
    audit: Audited | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What `run`, `resume` and `train` return."""

    run_dir: Path
    seed: int
    status: str
    exit_code: int
    """0 finished, 1 failed (2: for what the user asked), 130 interrupted."""
    result: Result

    @property
    def export_dir(self) -> Path | None:
        """The exported model, when there is one."""
        export = self.result.export
        return Path(export.path) if export is not None and export.ok else None


def summarise(
    run_dir: Path,
    *,
    status: str,
    reason: str,
    planned_steps: int,
    created_s: float,
    seconds: float,
    exported: Exported | None = None,
    audited: Audited | None = None,
) -> Result:
    """Compute a run's result from the lines its processes wrote.

    Args:
        run_dir: the run folder.
        status: `finished`, `failed` or `interrupted`.
        reason: why, when it did not finish.
        planned_steps: what the experiment asked for.
        created_s: when the command was given, seconds since the epoch.
        seconds: how long the run ran, over all its branches.
        exported: what came of the export; None when it was not tried.
        audited: the same of the audit.
    """
    lines = read_rows(run_dir / "metrics.jsonl")
    rows = latest_by_step(lines)
    first, final = _evaluations(read_rows(run_dir / "eval.jsonl"))
    gaps = [row["logprob_gap_max"] for row in rows if row.get("logprob_gap_max") is not None]
    certificates = [row["certificate"] for row in rows if row.get("certificate")]
    trained = _total(rows, "trained_trajectories")
    return Result(
        status=status,
        reason=reason,
        steps=rows[-1]["step"] if rows else 0,
        planned_steps=planned_steps,
        reward_first=first,
        reward_final=final,
        reward_rise=_rise(first, final),
        staleness_violations=_total(lines, "violations"),
        orphaned_tokens=_total(lines, "orphaned_tokens"),
        max_lag=max((_proof(row).get("max_lag", 0) for row in rows), default=0),
        bound=max((_proof(row).get("bound", 0) for row in rows), default=0),
        mixed_fraction=_total(rows, "mixed_trajectories") / trained if trained else 0.0,
        dropped=_dropped(rows),
        length_bias=_proof(rows[-1]).get("length_bias") if rows else None,
        logprob_gap_max=max(gaps, default=None),
        logprob_certificate=certificates[-1] if certificates else "",
        first_step_seconds=_first_step(lines, created_s),
        total_seconds=seconds,
        tokens_trained=_total(rows, "trained_tokens"),
        tokens_per_s=_speed(rows),
        export=exported,
        audit=audited,
    )


def verdict(first: Evaluated, final: Evaluated) -> Verdict:
    """Whether the difference of two evaluations lies beyond its 95% interval.

    The two are taken as independent; on the same prompts that is the cautious side. Without both
    intervals there is nothing to compare.
    """
    halves = [
        (each.ci95_high - each.ci95_low) / 2
        for each in (first, final)
        if each.ci95_low is not None and each.ci95_high is not None
    ]
    difference = _rise(first, final)
    if difference is None or len(halves) < 2:
        return "not comparable"
    if abs(difference) <= hypot(*halves):
        return "did not change measurably"
    return "rose" if difference > 0 else "fell"


def _rise(first: Evaluated | None, final: Evaluated | None) -> float | None:
    if first is None or final is None or first.mean is None or final.mean is None:
        return None
    return final.mean - first.mean


def _evaluations(rows: list[Row]) -> tuple[Evaluated | None, Evaluated | None]:
    """The first and the last policy's evaluations; the last is None when there is only one."""
    done = [
        Evaluated(
            step=row["step"],
            mean=row["reward_mean"],
            ci95_low=row["ci95_low"],
            ci95_high=row["ci95_high"],
            prompts=row["prompts"],
        )
        for row in latest_by_step(rows)
    ]
    return (done[0] if done else None), (done[-1] if len(done) > 1 else None)


def _proof(row: Row) -> Row:
    return row.get("proof") or {}


def _total(rows: Sequence[Row], key: str) -> int:
    return sum(_proof(row).get(key, 0) for row in rows)


def _dropped(rows: list[Row]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        for reason, count in _proof(row).get("dropped", {}).items():
            counts[reason] = counts.get(reason, 0) + count
    return dict(sorted(counts.items()))


def _first_step(lines: list[Row], created_s: float) -> float | None:
    """The first line ever written for step 1, whatever a resume redid later."""
    ends = [row["time"] for row in lines if row.get("step") == 1]
    return ends[0] - created_s if ends else None


def _speed(rows: list[Row]) -> float:
    """Over the steps' own seconds, so that time between branches does not count."""
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    return _total(rows, "trained_tokens") / seconds if seconds > 0 else 0.0
