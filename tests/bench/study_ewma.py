"""Does PPO-EWMA make PPO invariant to the batch size? On the quickstart's task, before the runs.

Claim (arXiv:2110.00641): with a quarter of the batch, the learning rate divided by 2, Adam's betas
to the power 1/4 and the average's centre of mass times 4, PPO-EWMA follows the curve of the full
batch more closely than PPO with the same rate and betas, its proximal policy as old as its step.

Start and learning rate. As tests/bench/studies.py says; an update has as many prompts as those of
    the reference.
Arms, each S = 2, correction "none", 4 updates a step at the full batch:
    reference   128 prompts a step, 4 updates of 32, proximal "ewma", decay 0.889 (centre of mass 8)
    ewma        32 prompts a step, 4 updates of 8, `optimizer.tuned_at = 32`: the rules above
    ppo         the same, proximal "recomputed": what they do without the average
All train the same number of prompts, 3,840, and are evaluated every 384.
Seeds 5 to 9.
Measure. Area between an arm's held-out curve and the reference's of the same seed: mean absolute
    difference of reward over prompts trained. The claim holds here when the 90% bootstrap
    interval (percentiles of 10,000 draws over seeds) of area(ppo) - area(ewma) lies above 0; it
    is recorded whichever way it falls.
`--smoke` runs each arm for two steps and records nothing.
"""

from common import emit
from studies import (
    SMOKE_RATE,
    area_between,
    at_rate,
    curves,
    interval,
    line,
    listed,
    options,
    smoke,
    tuned,
)

STUDY, LEVEL = "study-ewma", 0.9
COMMON = [
    "learner.objective.correction=none", "learner.updates_per_step=4",
    "learner.optimizer.tuned_at=32", "learner.objective.proximal_decay=0.889",
]  # fmt: skip
FULL = ["learner.prompts_per_step=128", "learner.steps=30", "eval.every_steps=3"]
QUARTER = ["learner.prompts_per_step=32", "learner.steps=120", "eval.every_steps=12"]
ARMS = {
    "reference": [*COMMON, *FULL, "learner.objective.proximal=ewma"],
    "ewma": [*COMMON, *QUARTER, "learner.objective.proximal=ewma"],
    "ppo": [*COMMON, *QUARTER, "learner.objective.proximal=recomputed"],
}


def main() -> None:
    """Run and print one line per arm and the comparison."""
    given = options(STUDY, __doc__).parse_args()
    rate, lines = given.rate or SMOKE_RATE, []
    if not given.rate and not given.smoke:
        rate, row = tuned(STUDY, given.work)
        lines.append(row)
    arms, seeds = {name: at_rate(arm, rate) for name, arm in ARMS.items()}, given.seeds
    if given.smoke:
        arms, seeds = {name: smoke(arm) for name, arm in arms.items()}, seeds[:1]
    found = curves(arms, seeds, given.work)
    areas = {
        name: [area_between(*pair) for pair in zip(found[name], found["reference"], strict=True)]
        for name in ("ewma", "ppo")
    }
    gains = [ppo - ewma for ppo, ewma in zip(areas["ppo"], areas["ewma"], strict=True)]
    low, high = interval(gains, LEVEL)
    values = {f"area_{name}": listed(of) for name, of in areas.items()}
    values |= {"rate": rate, "interval": [low, high], "holds": low > 0}
    for each in (*lines, line(STUDY, "batch / 4", values, seeds)):
        emit(each, record=not given.smoke)


if __name__ == "__main__":
    main()
