"""Does the decoupled correction make stale samples as good as fresh ones? Written before the runs.

Claim (arXiv:2505.24298): at a staleness S under which the uncorrected loss fails, the corrected one
ends where synchronous training (S = 0) ends. On the quickstart's task.

Start and learning rate. As tests/bench/studies.py says.
S. The smallest of 2, 4, 8, 16, 32 at which the uncorrected arm fails in at least 4 of the
    development seeds 0 to 4: a final held-out reward more than 0.2 below that of S = 0 with the
    same seed. A candidate is left as soon as two seeds have not failed. The script looks for S
    unless `--staleness` gives it. When the arm fails at none, that is the result.
Arms, 60 steps of 32 prompts, engines fast enough to reach the bound (`stale = "wait"`):
    synchronous   S = 0, proximal "first_pass"
    uncorrected   S, proximal "first_pass", correction "none": refused by our own check, so the
                  correction is "truncate" at 1e9, which acts on no token
    decoupled     S, correction "truncate" at 2, the default
Seeds 5 to 9.
Measure. Final held-out reward, decoupled - synchronous, by seed. Equivalent when the 90% percentile
    bootstrap interval (10,000 draws over seeds) lies within +-0.05; recorded whichever way it
    falls.
`--smoke` runs each arm for two steps and records nothing.
"""

from pathlib import Path
from typing import Any

from common import emit
from studies import (
    DEVELOPMENT,
    SMOKE_RATE,
    SYNCHRONOUS,
    at_rate,
    curve,
    curves,
    interval,
    last,
    line,
    listed,
    options,
    smoke,
    tuned,
)

STUDY, LEVEL, MARGIN = "study-decoupled", 0.9, 0.05
CANDIDATES, FAILED_BY, FAILED_IN = (2, 4, 8, 16, 32), 0.2, 4


def stale(bound: int, high: float) -> list[str]:
    """An arm at S = `bound` whose correction is capped at `high`."""
    return [
        f"buffer.max_staleness_steps={bound}", f"learner.objective.correction_high={high:g}",
        f"rollout.max_concurrent_samples={128 * (bound + 1)}",
    ]  # fmt: skip


def find(rate: str, work: Path, lines: list[dict[str, Any]]) -> int | None:
    """The smallest S at which the uncorrected loss fails; None when it fails at none."""

    def lost(bound: int, seed: int) -> float:
        arms = SYNCHRONOUS, stale(bound, 1e9)
        fresh, old = (last(curve(seed, at_rate(arm, rate), work)) for arm in arms)
        return fresh - old

    for bound in CANDIDATES:
        losses: list[float] = []
        for seed in DEVELOPMENT:
            losses.append(lost(bound, seed))
            if sum(loss <= FAILED_BY for loss in losses) > len(DEVELOPMENT) - FAILED_IN:
                break
        values = {"staleness": bound, "reward_lost": listed(losses)}
        lines.append(line(STUDY, "development", values, DEVELOPMENT[: len(losses)]))
        if sum(loss > FAILED_BY for loss in losses) >= FAILED_IN:
            return bound
    return None


def main() -> None:
    """Run and print the comparison."""
    parser = options(STUDY, __doc__)
    parser.add_argument("--staleness", type=int, help="S; else it is looked for")
    given = parser.parse_args()
    rate, bound, lines = given.rate or SMOKE_RATE, given.staleness or CANDIDATES[0], []
    if not given.rate and not given.smoke:
        rate, row = tuned(STUDY, given.work)
        lines.append(row)
    if not given.staleness and not given.smoke:
        bound = find(rate, given.work, lines)
    lines.append(compare(rate, bound, given))
    for each in lines:
        emit(each, record=not given.smoke)


def compare(rate: str, bound: int | None, given: Any) -> dict[str, Any]:
    """The line of the final comparison."""
    if bound is None:
        values = {"rate": rate, "found": "the uncorrected loss fails at no S"}
        return line(STUDY, "final", values, DEVELOPMENT)
    plain = {
        "synchronous": SYNCHRONOUS,
        "uncorrected": stale(bound, 1e9),
        "decoupled": stale(bound, 2.0),
    }
    arms, seeds = {name: at_rate(arm, rate) for name, arm in plain.items()}, given.seeds
    if given.smoke:
        arms, seeds = {name: smoke(arm) for name, arm in arms.items()}, seeds[:1]
    found = curves(arms, seeds, given.work)
    ends = {name: [last(each) for each in of] for name, of in found.items()}
    gaps = [a - b for a, b in zip(ends["decoupled"], ends["synchronous"], strict=True)]
    low, high = interval(gaps, LEVEL)
    values = {f"reward_{name}": listed(of) for name, of in ends.items()}
    values |= {"rate": rate, "staleness": bound, "interval": [low, high]}
    values |= {"equivalent": -MARGIN <= low <= high <= MARGIN}
    return line(STUDY, "final", values, seeds)


if __name__ == "__main__":
    main()
