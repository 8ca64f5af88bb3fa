"""Does the decoupled correction make stale samples as good as fresh ones? Written before the runs.

Claim (arXiv:2505.24298): at a staleness S under which the uncorrected loss fails, the corrected one
ends where synchronous training (S = 0) ends. On the quickstart's task.

Learning rate. Tuned once, at S = 0, on development seeds 0 to 4: the best final held-out reward of
    1e-4, 3e-4, 1e-3. `--rate` gives it to all arms.
S. The smallest of 2, 4, 8, 16 at which the uncorrected arm fails in at least 4 of the development
    seeds 0 to 4: a final held-out reward more than 0.2 below that of S = 0 with the same seed.
    `--find` looks for it. When it fails at none, that is the result.
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

import argparse

from common import emit, numbers
from studies import curves, interval, last, line, listed, smoke

STUDY, LEVEL, MARGIN = "study-decoupled", 0.9, 0.05
CANDIDATES, DEVELOPMENT, FAILED_BY, FAILED_IN = (2, 4, 8, 16), (0, 1, 2, 3, 4), 0.2, 4
SYNCHRONOUS = ["buffer.max_staleness_steps=0"]


def stale(bound: int, high: float) -> list[str]:
    """An arm at S = `bound` whose correction is capped at `high`."""
    return [
        f"buffer.max_staleness_steps={bound}", f"learner.objective.correction_high={high:g}",
        f"rollout.max_concurrent_samples={128 * (bound + 1)}",
    ]  # fmt: skip


def find(rate: list[str]) -> int | None:
    """The smallest S at which the uncorrected loss fails; None when it fails at none."""
    fresh = curves({"synchronous": [*SYNCHRONOUS, *rate]}, DEVELOPMENT)["synchronous"]
    for bound in CANDIDATES:
        found = curves({"uncorrected": [*stale(bound, 1e9), *rate]}, DEVELOPMENT)["uncorrected"]
        losses = [last(one) - last(other) for one, other in zip(fresh, found, strict=True)]
        values = {"staleness": bound, "reward_lost": listed(losses)}
        emit(line(STUDY, "development", values, DEVELOPMENT))
        if sum(loss > FAILED_BY for loss in losses) >= FAILED_IN:
            return bound
    return None


def main() -> None:
    """Run and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=numbers, default=[5, 6, 7, 8, 9])
    parser.add_argument("--rate", default="3e-4")
    parser.add_argument("--staleness", type=int, help="skip looking for S")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    rate = [f"learner.optimizer.learning_rate={given.rate}"]
    bound = given.staleness or (CANDIDATES[0] if given.smoke else find(rate))
    if bound is None:
        values = {"found": "the uncorrected loss fails at no S"}
        emit(line(STUDY, "final", values, DEVELOPMENT))
        return
    arms = {
        "synchronous": [*SYNCHRONOUS, *rate],
        "uncorrected": [*stale(bound, 1e9), *rate],
        "decoupled": [*stale(bound, 2.0), *rate],
    }
    seeds = given.seeds
    if given.smoke:
        arms, seeds = {name: smoke(arm) for name, arm in arms.items()}, given.seeds[:1]
    ends = {name: [last(each) for each in found] for name, found in curves(arms, seeds).items()}
    gaps = [a - b for a, b in zip(ends["decoupled"], ends["synchronous"], strict=True)]
    low, high = interval(gaps, LEVEL)
    values = {f"reward_{name}": listed(of) for name, of in ends.items()}
    equivalent = -MARGIN <= low <= high <= MARGIN
    values |= {"rate": given.rate, "staleness": bound, "interval": [low, high]}
    values |= {"equivalent": equivalent}
    emit(line(STUDY, "final", values, seeds), record=not given.smoke)


if __name__ == "__main__":
    main()
