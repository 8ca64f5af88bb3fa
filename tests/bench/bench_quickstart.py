"""The quickstart's promises, seed by seed, and the same wall time of further SFT beside it.

Per seed N:
1. `slipstream run quickstart seed=N`; run.json's result is what is reported.
2. Further SFT: the policy of step 0 (after the warm start) is exported and trained further by
   `slipstream sft` on new demonstrations (another seed), as many as fit the RL phase's wall time,
   from the learner's first take to its last step, at the speed that the warm start had. Rate,
   warm-up and decay are the warm start's.
3. Its held-out reward: the same prompts, sampling and sample seeds as the run's own evaluations,
   read from the evaluation of step 0 of a run of one step that starts from it.

Prints one JSON object per seed and a summary, and draws docs/results/quickstart.svg.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    RESULTS,
    emit,
    new_work_folder,
    numbers,
    ratio_of_medians,
    read_lines,
    seconds_at_step,
    slipstream,
)
from slipstream.configs.load import load_experiment

FURTHER_SEED = 1000
"""Added to the seed for further demonstrations: other items than the warm start's."""

PROMISES = {
    "reward_start_at_least": 0.1,
    "reward_rise_at_least": 0.4,
    "total_seconds_below": 180,
    "first_step_seconds_at_most": 60,
    "mixed_fraction_at_least": 0.05,
    "logit_difference_at_most": 1e-5,
}
"""What a run of the quickstart must hold."""


def run_quickstart(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run it; returns run.json's result."""
    arguments = ["run", "quickstart", f"seed={seed}", *overrides, "--output", str(folder)]
    slipstream(*arguments, log=folder.with_suffix(".log"))
    return json.loads((folder / "run.json").read_text())["result"]


def further_sft(seed: int, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Train the policy of step 0 further for the RL phase's wall time, and measure it.

    Returns:
        examples, the seconds planned and taken, and the evaluation's line.
    """
    budget_s = max(seconds_at_step(run_dir).values())
    examples = _examples_that_fit(run_dir, budget_s)
    start, trained, measured = (run_dir.with_name(f"{run_dir.name}-{name}") for name in NAMES)
    first = next(folder.name for folder in (run_dir / "checkpoints").glob("step-000000.*"))
    slipstream(
        "export", str(run_dir), str(start), "--checkpoint", first, log=start.with_suffix(".log")
    )
    slipstream(
        "sft", "quickstart", *overrides, f"seed={seed + FURTHER_SEED}", f"model={start}",
        f"sft.examples={examples}", "--output", str(trained), log=trained.with_suffix(".log"),
    )  # fmt: skip
    slipstream(
        "run", "quickstart", *overrides, f"seed={seed}", f"model={trained / 'export'}",
        "sft=false", "learner.steps=1", "--output", str(measured), log=measured.with_suffix(".log"),
    )  # fmt: skip
    return {
        "examples": examples,
        "budget_seconds": budget_s,
        "seconds": read_lines(trained / "sft_metrics.jsonl")[-1]["seconds"],
        "evaluation": read_lines(measured / "eval.jsonl")[0],
    }


NAMES = ("step0", "further", "measured")


def _examples_that_fit(run_dir: Path, budget_s: float) -> int:
    """Whole batches of demonstrations for so many seconds, at the warm start's speed."""
    sft = load_experiment(run_dir / "resolved.toml").experiment.sft
    if sft is None:
        raise SystemExit("the quickstart has no warm start to compare with")
    last = read_lines(run_dir / "sft_metrics.jsonl")[-1]
    batches = int(budget_s * last["updates"] / last["seconds"])
    return max(1, batches) * sft.batch_size


def held(result: dict[str, Any]) -> dict[str, bool]:
    """Which promises the run kept."""
    limit = PROMISES
    return {
        "reward_start": result["reward_first"]["mean"] >= limit["reward_start_at_least"],
        "reward_rise": result["reward_rise"] >= limit["reward_rise_at_least"],
        "total_seconds": result["total_seconds"] < limit["total_seconds_below"],
        "first_step_seconds": result["first_step_seconds"] <= limit["first_step_seconds_at_most"],
        "mixed_fraction": result["mixed_fraction"] >= limit["mixed_fraction_at_least"],
        "violations": result["staleness_violations"] == 0,
        "orphaned_tokens": result["orphaned_tokens"] == 0,
        "export": result["export"]["max_logit_difference"] <= limit["logit_difference_at_most"],
        "audit": result["audit"]["ok"],
    }


def seed_line(seed: int, result: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    """What is reported of one seed."""
    names = (
        "reward_first", "reward_final", "reward_rise", "first_step_seconds", "total_seconds",
        "mixed_fraction", "staleness_violations", "orphaned_tokens", "max_lag", "dropped",
        "length_bias", "logprob_gap_max", "tokens_per_s", "audit",
    )  # fmt: skip
    ours, peer = result["reward_final"]["mean"], further["evaluation"]["reward_mean"]
    return {
        "bench": "quickstart",
        "case": f"seed {seed}",
        "ours": ours,
        "peer": peer,
        "peer_name": "further SFT of the same wall time",
        "ratio": ours / peer if peer else None,
        "unit": "held-out reward",
        "runs": 1,
        "spread": [result["reward_final"]["ci95_low"], result["reward_final"]["ci95_high"]],
        "notes": "spread: 95% interval of ours over held-out prompts",
        **{name: result[name] for name in names},
        "logit_difference": result["export"]["max_logit_difference"],
        "further_sft": further,
        "held": held(result),
    }


def summary_line(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds; what held, held for each."""
    ours, peer = [line["ours"] for line in lines], [line["peer"] for line in lines]
    ratio = ratio_of_medians(ours, peer) if min(peer) > 0 else None
    return {
        "bench": "quickstart",
        "case": "summary",
        "ours": median(ours),
        "peer": median(peer),
        "peer_name": lines[0]["peer_name"],
        "ratio": ratio and ratio.value,
        "unit": "held-out reward",
        "runs": len(lines),
        "spread": ratio and [ratio.low, ratio.high],
        "notes": "medians over seeds; spread: bootstrap 95% interval of the ratio of medians",
        "reward_rise": [line["reward_rise"] for line in lines],
        "total_seconds": [line["total_seconds"] for line in lines],
        "first_step_seconds": [line["first_step_seconds"] for line in lines],
        "mixed_fraction": [line["mixed_fraction"] for line in lines],
        "held": {name: all(line["held"][name] for line in lines) for name in lines[0]["held"]},
    }


def draw(runs: dict[int, Path], lines: list[dict[str, Any]], path: Path) -> None:
    """Held-out reward against steps for every seed; further SFT as dashed lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "slipstream"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for number, (line, (seed, run_dir)) in enumerate(zip(lines, runs.items(), strict=True)):
        rows = read_lines(run_dir / "eval.jsonl")
        mean = [row["reward_mean"] for row in rows]
        errors = (
            [row["reward_mean"] - row["ci95_low"] for row in rows],
            [row["ci95_high"] - row["reward_mean"] for row in rows],
        )
        style = {"color": f"C{number}", "capsize": 3, "marker": "o"}
        axes.errorbar(
            [row["step"] for row in rows], mean, yerr=errors, label=f"seed {seed}", **style
        )
        axes.axhline(line["peer"], color=f"C{number}", linestyle="--", linewidth=1)
    axes.set(xlabel="learner step", ylabel="held-out reward", ylim=(0, 1))
    axes.set_title("quickstart; dashed: further SFT for the same wall time", fontsize=10)
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Run all seeds, one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", type=numbers)
    parser.add_argument("--work", type=Path, default=new_work_folder("quickstart"))
    parser.add_argument("--override", action="append", default=[], help="such as learner.steps=5")
    parser.add_argument("--dry", action="store_true", help="print, but record and draw nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    runs, lines = {}, []
    for seed in args.seeds:
        runs[seed] = args.work / f"seed{seed}"
        result = run_quickstart(seed, runs[seed], args.override)
        further = further_sft(seed, runs[seed], args.override)
        lines.append(seed_line(seed, result, further) | {"overrides": args.override})
        emit(lines[-1], record=not args.dry)
    emit(summary_line(lines) | {"overrides": args.override}, record=not args.dry)
    draw(runs, lines, (args.work if args.dry else RESULTS) / "quickstart.svg")


if __name__ == "__main__":
    main()
