"""Held-out evaluation of a run: when it is due, what a line of `eval.jsonl` says.

Evaluations are outside the buffer's states, the staleness law and the audit.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..buffer.errors import CorruptData
from ..buffer.messages import EvaluationResults, FinishEvaluation

Z_95 = 1.959963984540054
"""97.5th percentile of the normal distribution."""


class EvaluationSchedule:
    """Which versions to evaluate: the first, every so many steps, the final one.

    schedule = EvaluationSchedule(every_steps=20, final_step=50, last_step=None)
    is_due(0) -> True       the first policy; then done(0)
    is_due(19) -> False
    is_due(21) -> True      20 was not seen (the newest version was already 21); then done(21)
    is_due(50) -> True      the final policy
    """

    def __init__(self, every_steps: int, final_step: int, last_step: int | None) -> None:
        """Set up.

        Args:
            every_steps: 0 means only the first and the final policy.
            final_step: the step that ends the run.
            last_step: the newest step evaluated before a resume, or None.
        """
        self._every_steps = every_steps
        self._final_step = final_step
        self._last_step = last_step

    def is_due(self, step: int) -> bool:
        """Whether the version of this step should be evaluated now."""
        if self._last_step is None or step <= self._last_step:
            return self._last_step is None
        if step >= self._final_step:
            return True
        every = self._every_steps
        return every > 0 and step // every > self._last_step // every

    def done(self, step: int) -> None:
        """The version of this step has been evaluated."""
        self._last_step = step


def last_evaluated_step(file: Path, first_step: int) -> int | None:
    """The newest step that `eval.jsonl` holds at or below the step this run starts from.

    Whichever branch evaluated it: up to there the branches share their versions. Later lines belong
    to a branch that was left, whose steps are trained, and so evaluated, again.
    """
    steps = [line["step"] for line in read_lines(file) if line["step"] <= first_step]
    return max(steps, default=None)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of `eval.jsonl`; a last line that a crash cut short is left out.

    Raises:
        CorruptData: another line is not what was written.
    """
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptData(f"line {number} of {file} is not an evaluation: {error}") from error
    return found


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Add one line, durable on return; what a crash left after the last full line is removed."""
    with file.open("ab+") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def summary(results: EvaluationResults, seconds: float) -> dict[str, Any]:
    """The line of one finished evaluation; failed samples count in `failed` and nowhere else."""
    rewards: dict[int, list[float]] = {}
    for sample in results.results:
        rewards.setdefault(sample.uid, [])
        if sample.score.value is not None:
            rewards[sample.uid].append(sample.score.value)
    scored = [values for values in rewards.values() if values]
    mean, low, high = mean_interval(scored)
    num_scored = sum(map(len, scored))
    return {
        "version": str(results.version),
        "branch": results.version.branch,
        "step": results.version.step,
        "prompts": len(rewards),
        "samples": len(results.results),
        "reward_mean": mean,
        "ci95_low": low,
        "ci95_high": high,
        "failed": len(results.results) - num_scored,
        "mean_tokens": _mean_tokens(results.results),
        "seconds": round(seconds, 3),
    }


def mean_interval(
    rewards: Sequence[Sequence[float]],
) -> tuple[float | None, float | None, float | None]:
    """The mean reward and its 95% confidence interval over prompts.

    Wilson's interval for rewards of 0 and 1 with one sample a prompt; else the normal approximation
    over the prompts' means, because samples of one prompt are not independent.

    Args:
        rewards: per prompt, the rewards of its samples (at least one).
    Returns:
        (mean, low, high); low and high are None for a single prompt, all are None for none.
    Source: E. B. Wilson (1927), "Probable inference, the law of succession, and statistical
        inference", in the form (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    if not rewards:
        return None, None, None
    means = np.array([np.mean(values) for values in rewards], dtype=np.float64)
    mean, n = float(means.mean()), len(means)
    if all(len(values) == 1 and values[0] in (0.0, 1.0) for values in rewards):
        return mean, *_wilson(mean, n)
    if n == 1:
        return mean, None, None
    half = Z_95 * float(means.std(ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def _wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    shrink = 1 + Z_95**2 / n
    centre = (mean + Z_95**2 / (2 * n)) / shrink
    half = Z_95 * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n**2)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at(
    samples: Sequence[FinishEvaluation], passing: float = 1.0
) -> dict[int, tuple[float, float | None, float | None]]:
    """pass@k with its 95% interval over prompts, k = 1, 2, 4 ... up to the samples of a prompt.

    Per prompt 1 - C(n - c, k) / C(n, k), of n scored samples with c whose reward is at least
    `passing`: unbiased for the probability that one of k samples passes. Prompts with fewer than k
    scored samples are left out of that k.
    Source: Chen et al. (2021), "Evaluating large language models trained on code", equation 1.
    """
    passed: dict[int, list[bool]] = {}
    for sample in samples:
        if sample.score.value is not None:
            passed.setdefault(sample.uid, []).append(sample.score.value >= passing)
    most, found, k = max(map(len, passed.values()), default=0), {}, 1
    while k <= most:
        chances = [
            [1.0 - math.comb(len(each) - sum(each), k) / math.comb(len(each), k)]
            for each in passed.values()
            if len(each) >= k
        ]
        mean, low, high = mean_interval(chances)
        assert mean is not None
        found[k] = (mean, low, high)
        k *= 2
    return found


def _mean_tokens(samples: Sequence[FinishEvaluation]) -> float:
    return sum(sample.num_tokens for sample in samples) / max(1, len(samples))
