"""What the studies share: arms by seed, held-out curves, the area between them, and intervals."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import read_lines, slipstream

DRAWS = 10_000
Curve = dict[int, float]
"""Held-out reward by prompts trained."""


def curve(seed: int, overrides: Sequence[str], folder: Path) -> Curve:
    """One run of the quickstart; its evaluations against the prompts trained before each."""
    slipstream(
        "run", "quickstart", f"seed={seed}", *overrides, "--no-export", "--output", str(folder),
        log=folder.with_suffix(".log"),
    )  # fmt: skip
    learner = json.loads((folder / "resolved.json").read_text())["learner"]
    rows = read_lines(folder / "eval.jsonl")
    return {row["step"] * learner["prompts_per_step"]: row["reward_mean"] for row in rows}


def curves(arms: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> dict[str, list[Curve]]:
    """Every arm for every seed, a seed's arms one after the other."""
    found: dict[str, list[Curve]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(prefix="slipstream-study-") as work:
        for seed in seeds:
            for number, (name, overrides) in enumerate(arms.items()):
                found[name].append(curve(seed, overrides, Path(work) / f"arm-{number}-{seed}"))
    return found


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
    sizes = {"learner.steps": 2, "sft.examples": 64, "prompts.held_out": 16, "eval.every_steps": 1}
    return [*overrides, *(f"{key}={value}" for key, value in sizes.items())]


def line(study: str, case: str, values: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """One line of results."""
    return {"bench": study, "case": case, "seeds": list(seeds), **values}
