"""What the studies share: arms by seed, held-out curves, the area between them, and intervals.

Start. All arms of a seed start from one policy, of the quickstart's warm start.
Learning rate. One for all arms of all studies, tuned at S = 0 on the quickstart as it is otherwise
    shipped (32 prompts an update): of 1e-4, 3e-4, 1e-3 the one with the best final held-out reward,
    mean over development seeds 0 to 4. `--rate` gives it instead.
Runs are kept in `--work`: a study that was ended begins again with the run that was not done, and
what two studies need is run once.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common import ROOT, numbers, read_lines, slipstream
from slipstream.configs.claim import running_supervisor
from slipstream.configs.launch import stop

DRAWS = 10_000
RATES = ("1e-4", "3e-4", "1e-3")
DEVELOPMENT, SMOKE_RATE = (0, 1, 2, 3, 4), "3e-4"
SYNCHRONOUS = ["buffer.max_staleness_steps=0"]
Curve = dict[int, float]
"""Held-out reward by prompts trained."""


def options(study: str, text: str | None) -> argparse.ArgumentParser:
    """What all of them are asked with."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=numbers, default=[5, 6, 7, 8, 9])
    parser.add_argument("--rate", help="learning rate of all arms; else it is tuned first")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "studies", help="keeps the runs"
    )
    parser.add_argument("--smoke", action="store_true")
    return parser


def once(folder: Path, *arguments: str) -> None:
    """`slipstream ARGUMENTS --output FOLDER`, unless that is done."""
    done = folder.with_suffix(".done")
    if not done.exists():
        if running_supervisor(folder):  # of a study that was killed
            stop(folder)
        shutil.rmtree(folder, ignore_errors=True)
        slipstream(*arguments, "--output", str(folder), log=folder.with_suffix(".log"))
        done.touch()


def curve(seed: int, overrides: Sequence[str], work: Path) -> Curve:
    """One run of the quickstart from its seed's warm start; its evaluations against the prompts
    trained before each."""
    work = work.absolute()
    settings = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]
    warm, folder = work / f"warm-{seed}", work / f"{settings}-{seed}"
    once(warm, "sft", "quickstart", f"seed={seed}")
    once(
        folder, "run", "quickstart", f"seed={seed}", f"model={warm / 'export'}", "sft=false",
        *overrides, "--no-export",
    )  # fmt: skip
    learner = json.loads((folder / "resolved.json").read_text())["learner"]
    rows = read_lines(folder / "eval.jsonl")
    return {row["step"] * learner["prompts_per_step"]: row["reward_mean"] for row in rows}


def curves(
    arms: Mapping[str, Sequence[str]], seeds: Sequence[int], work: Path
) -> dict[str, list[Curve]]:
    """Every arm for every seed, a seed's arms one after the other."""
    found: dict[str, list[Curve]] = {name: [] for name in arms}
    for seed in seeds:
        for name, overrides in arms.items():
            found[name].append(curve(seed, overrides, work))
    return found


def at_rate(arm: Sequence[str], rate: str) -> list[str]:
    """An arm at a learning rate."""
    return [*arm, f"learner.optimizer.learning_rate={rate}"]


def tuned(study: str, work: Path) -> tuple[str, dict[str, Any]]:
    """The learning rate under which synchronous training ends best, over the development seeds, and
    the line of results that says so."""
    found = curves({rate: at_rate(SYNCHRONOUS, rate) for rate in RATES}, DEVELOPMENT, work)
    ends = {rate: [last(each) for each in found[rate]] for rate in RATES}
    best = max(RATES, key=lambda rate: mean(ends[rate]))
    values = {"best": best, "rewards": {rate: listed(of) for rate, of in ends.items()}}
    return best, line(study, "learning rate", values, DEVELOPMENT)


def area_between(one: Curve, other: Curve) -> float:
    """Mean absolute difference over the prompts that both cover, by trapezoids: reward."""
    places = sorted({*one, *other})
    low, high = max(min(one), min(other)), min(max(one), max(other))
    places = [x for x in places if low <= x <= high]
    gap = np.abs(_at(one, places) - _at(other, places))
    return float(np.trapezoid(gap, places) / max(1, places[-1] - places[0]))


def _at(values: Curve, places: Sequence[int]) -> np.ndarray:
    known = sorted(values)
    return np.interp(places, known, [values[x] for x in known])


def interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over seeds."""
    rng = np.random.default_rng(0)
    draws = rng.choice(np.array(values), (DRAWS, len(values))).mean(1)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def last(values: Curve) -> float:
    """The reward of the last evaluation."""
    return values[max(values)]


def listed(values: Sequence[float]) -> list[float]:
    """Rounded, for a line of results."""
    return [round(value, 4) for value in values]


def smoke(overrides: Sequence[str]) -> list[str]:
    """The same arm in a few steps of a few prompts: shows that it runs, and says nothing else."""
    sizes = {
        "learner.steps": 2, "prompts.held_out": 16, "eval.every_steps": 1,
        "buffer.drop_no_signal": "false",  # so early there may be none
    }  # fmt: skip
    return [*overrides, *(f"{key}={value}" for key, value in sizes.items())]


def line(study: str, case: str, values: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """One line of results."""
    return {"bench": study, "case": case, "seeds": list(seeds), **values}
