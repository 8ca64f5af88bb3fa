"""SmolLM2-135M-Instruct on sums: does held-out reward improve beyond its 95% interval?

Runs `slipstream run smollm2` as shipped (or reads a finished run given by `--run`), prints one JSON
object and draws docs/results/smollm2.svg: held-out reward with intervals, and the mean reward of
all samples finished before each step. One run, one seed; the interval is over prompts.
"""

import argparse
from pathlib import Path

from common import RESULTS, before_and_after, emit, new_work_folder, read_lines, slipstream


def draw(run_dir: Path, path: Path) -> None:
    """Held-out reward with its intervals over the reward of finished samples."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "slipstream"  # the same figures give the same file
    from matplotlib import pyplot

    steps, held_out = read_lines(run_dir / "metrics.jsonl"), read_lines(run_dir / "eval.jsonl")
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(
        [row["step"] for row in steps],
        [row["reward_mean"] for row in steps],
        color="C1",
        linewidth=1,
        label="finished samples",
    )
    mean = [row["reward_mean"] for row in held_out]
    errors = (
        [row["reward_mean"] - row["ci95_low"] for row in held_out],
        [row["ci95_high"] - row["reward_mean"] for row in held_out],
    )
    axes.errorbar(
        [row["step"] for row in held_out],
        mean,
        yerr=errors,
        capsize=3,
        marker="o",
        label="held out",
    )
    axes.set(xlabel="learner step", ylabel="reward", ylim=(0, 1))
    axes.set_title("SmolLM2-135M-Instruct, sums of two one-digit numbers", fontsize=10)
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Run or read, record, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run of smollm2; else one is made")
    args = parser.parse_args()
    run_dir = args.run or new_work_folder("smollm2")
    if args.run is None:
        slipstream("run", "smollm2", "--output", str(run_dir), log=run_dir.with_suffix(".log"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    line = before_and_after("smollm2", run_dir)
    final, first = line["spread"]["after"], line["spread"]["before"]
    held = final[0] > first[1] and line["result"]["steps"] >= 30
    notes = "held: the two intervals do not overlap, after at least 30 steps"
    emit(line | {"held": held, "notes": notes})
    draw(run_dir, RESULTS / "smollm2.svg")


if __name__ == "__main__":
    main()
