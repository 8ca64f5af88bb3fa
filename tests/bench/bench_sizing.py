"""Generated tokens until a target held-out reward: adaptive sizes against fixed ones.

PROTOCOL (committed before any run that is recorded)

Cases. `task-a`: chain_sum of 2 to 5 one-digit terms; `task-b`: basic_arithmetic (+, -) of 2 to 5
terms; 256 prompts that come again every epoch, so difficulty is mixed and there is a past to learn
from. `none`: chain_sum of exactly 3 terms, 100,000 prompts: one difficulty, nobody is seen twice;
sizing is not expected to help.

Policy. The built-in tiny model after one warm start per case (seed 0, `chain_sum_mixed`, 16,000
examples), shared by all arms and seeds. A seed decides prompts, their order and all samples.

Training. `sizing_loop.Loop` (synchronous, the system's own parts). 32 prompts a step, leave-one-out
advantage, `aggregation = "prompt"`, AdamW 6e-4 for every arm (Adam takes away the scale of the
update). At most MAX_TOKENS training tokens; all that were generated count.

Measure. Held-out reward of 256 prompts x 2 samples, temperature 1, every EVALUATE_TOKENS. Tokens to
the target: where the curve first reaches TARGET, linearly between evaluations; a run that never
does counts MAX_TOKENS (a lower bound, reported as `censored`). Beside it pass@1 and pass@8 of the
last policy, from 8 samples a prompt, so that no gain is bought by collapse.

Arms. fixed-4, fixed-8, fixed-16 (every group counts); filter_refill-8 (DAPO); and four adaptive
rules: min_variance-8, and with settled prompts skipped (`skip_below = 0.3`) min_variance-skip-8,
equal_treatment-skip-8, fixed-skip-8.

Choice. Seeds 0-4 on task-a and task-b: the adaptive rule and the fixed size with the least sum,
over the two tasks, of the medians of tokens. Confirmation. Seeds 5-9, all three cases: the chosen
rule against the chosen fixed size and against filter_refill; ratio of medians (peer / ours) with
the paired bootstrap's 95% interval. Goal: 2 or more against fixed, above 1 against filter_refill.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import emit, new_work_folder, numbers, ratio_of_medians, read_lines
from sizing_loop import Loop, warm_start
from slipstream.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig, SftConfig
from slipstream.rollout.config import (
    PromptsConfig,
    RolloutConfig,
    SamplingConfig,
    SizingConfig,
)
from slipstream.rollout.rewards.pattern import PatternMatch

MAX_TOKENS = 400_000
EVALUATE_TOKENS = 10_000
TARGET = 0.8
EPOCH = 256
DIGITS = {"min_digits": 1, "max_digits": 1}
PROMPTS = {
    "task-a": PromptsConfig(
        task="chain_sum", task_config={"min_terms": 2, "max_terms": 5, **DIGITS}, size=EPOCH,
        held_out=256,
    ),
    "task-b": PromptsConfig(
        task="basic_arithmetic", size=EPOCH, held_out=256,
        task_config={
            "min_terms": 2, "max_terms": 5, "operators": ["+", "-"], "allow_parentheses": False,
            **DIGITS,
        },
    ),
    "none": PromptsConfig(
        task="chain_sum", task_config={"min_terms": 3, "max_terms": 3, **DIGITS}, size=100_000,
        held_out=256,
    ),
}  # fmt: skip
SFT = SftConfig(demonstration="chain_sum_mixed", examples=16_000, batch_size=32, learning_rate=3e-3)
FIXED = ("fixed-4", "fixed-8", "fixed-16")
ADAPTIVE = ("min_variance-8", "min_variance-skip-8", "equal_treatment-skip-8", "fixed-skip-8")
REFILL = "filter_refill-8"


def rollout(arm: str) -> RolloutConfig:
    """`SIZER[-skip]-N` as settings."""
    name, _, size = arm.rpartition("-")
    sizer, skip, _ = name.partition("-skip")
    return RolloutConfig(
        samples_per_prompt=int(size),
        max_concurrent_samples=256,
        sampling=SamplingConfig(max_new_tokens=48),
        sizing=SizingConfig(sizer=sizer, skip_below=0.3 if skip else 0.0),  # type: ignore[arg-type]
    )


async def run(case: str, arm: str, seed: int, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One run to MAX_TOKENS; its curve and what is left of diversity."""
    learner = LearnerConfig(
        prompts_per_step=32,
        objective=ObjectiveConfig(advantage="leave_one_out", aggregation="prompt"),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=5),
    )
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            PROMPTS[case], rollout(arm), learner, PatternMatch().score, start, seed,
            refill=arm == REFILL, folder=Path(folder),
        )  # fmt: skip
        await loop.publish()
        curve = [(0, float((await loop.evaluate(2)).mean()))]
        while loop.tokens < MAX_TOKENS and tokens_to(curve) is None:
            await loop.train()
            if loop.tokens >= curve[-1][0] + EVALUATE_TOKENS:
                curve.append((loop.tokens, float((await loop.evaluate(2)).mean())))
        last = await loop.evaluate(8)
        await loop.engine.close()
    reached = tokens_to(curve)
    return {
        "case": case, "arm": arm, "seed": seed, "tokens": reached or MAX_TOKENS,
        "censored": reached is None, "steps": loop.step, "curve": curve,
        "pass@1": float(last.mean()), "pass@8": float(last.max(axis=1).mean()),
        "issued": np.bincount(loop.issued).tolist(),
    }  # fmt: skip


def tokens_to(curve: list[tuple[int, float]]) -> float | None:
    """Tokens at which a curve first reaches TARGET; None when it does not."""
    for number, (tokens, reward) in enumerate(curve):
        if reward >= TARGET:
            before, low = curve[number - 1] if number else (tokens, reward)
            share = (TARGET - low) / (reward - low) if reward > low else 0.0
            return before + share * (tokens - before)
    return None


class Runs:
    """The runs of one folder, each done once: the bench may be stopped and called again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._file = folder, folder / "runs.jsonl"
        self._done = {(r["case"], r["arm"], r["seed"]): r for r in read_lines(self._file)}

    def get(self, case: str, arm: str, seed: int) -> dict[str, Any]:
        """The result of a run, from the folder or made now."""
        key = (case, arm, seed)
        if key not in self._done:
            self._done[key] = asyncio.run(run(case, arm, seed, self._start(case)))
            with self._file.open("a") as file:
                file.write(json.dumps(self._done[key]) + "\n")
            print(json.dumps(self._done[key]), flush=True)
        return self._done[key]

    def _start(self, case: str) -> dict[str, torch.Tensor]:
        path = self._folder / f"start-{case}.pt"
        if not path.exists():
            prompts = PROMPTS[case].model_copy(update={"size": 100_000})
            torch.save(warm_start(prompts, SFT, seed=0), path)
        return torch.load(path)

    def median_tokens(self, case: str, arm: str, seeds: list[int]) -> float:
        """Over seeds."""
        return median(self.get(case, arm, seed)["tokens"] for seed in seeds)


def choose(runs: Runs, arms: tuple[str, ...], seeds: list[int]) -> tuple[str, dict[str, float]]:
    """The arm with the least sum of medians over the two tasks, and all the sums."""
    sums = {arm: sum(runs.median_tokens(case, arm, seeds) for case in ("task-a", "task-b"))
            for arm in arms}  # fmt: skip
    return min(sums, key=lambda arm: sums[arm]), sums


def confirm(runs: Runs, case: str, ours: str, peer: str, seeds: list[int]) -> dict[str, Any]:
    """The line of one comparison."""
    mine = [runs.get(case, ours, seed) for seed in seeds]
    theirs = [runs.get(case, peer, seed) for seed in seeds]
    interval = ratio_of_medians([r["tokens"] for r in theirs], [r["tokens"] for r in mine])
    return {
        "bench": "sizing", "case": case, "ours": median(r["tokens"] for r in mine),
        "peer": median(r["tokens"] for r in theirs), "peer_name": peer, "ratio": interval.value,
        "unit": f"generated tokens to held-out reward {TARGET}", "runs": len(seeds),
        "spread": [interval.low, interval.high],
        "notes": "synchronous loop in one process; spread: bootstrap 95% interval of the ratio",
        "ours_name": ours, "seeds": seeds,
        "censored": [sum(r["censored"] for r in mine), sum(r["censored"] for r in theirs)],
        "pass@1": [median(r["pass@1"] for r in side) for side in (mine, theirs)],
        "pass@8": [median(r["pass@8"] for r in side) for side in (mine, theirs)],
    }  # fmt: skip


def main() -> None:
    """Choose, confirm, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--choose", default="0,1,2,3,4", type=numbers)
    parser.add_argument("--confirm", default="5,6,7,8,9", type=numbers)
    parser.add_argument("--work", type=Path, default=new_work_folder("sizing"))
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    runs = Runs(args.work)
    adaptive, adaptive_sums = choose(runs, ADAPTIVE, args.choose)
    fixed, fixed_sums = choose(runs, FIXED, args.choose)
    for case in PROMPTS:
        for peer in (fixed, REFILL):
            line = confirm(runs, case, adaptive, peer, args.confirm)
            emit(line | {"choice": adaptive_sums | fixed_sums}, record=not args.dry)


if __name__ == "__main__":
    main()
