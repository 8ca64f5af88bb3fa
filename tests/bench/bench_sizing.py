"""Generated tokens until a target held-out reward: adaptive sizes against fixed ones.

PROTOCOL (committed before any run that is recorded; its numbers were set on seeds from 100 on; the
targets again before the first recorded run, on 100 and 101, when the system had changed)

Cases. `task-a`: chain_sum of 2 to 5 one-digit terms; `task-b`: basic_arithmetic (+, -) of 2 to 5
terms; 128 prompts that come again every epoch, so difficulty is mixed and there is a past to learn
from. `none`: chain_sum of exactly 3 terms, 100,000 prompts: one difficulty, nobody is seen twice;
sizing is not expected to help.

Policy. The built-in tiny model after one warm start per case (seed 0, `chain_sum_mixed`, 16,000
examples), shared by all arms and seeds. A seed decides prompts, their order and all samples.

Training. `sizing_loop.Loop` (synchronous, the system's own parts). As many samples a step for every
arm: 128 / n prompts of n samples. Leave-one-out advantage, `aggregation = "prompt"`, AdamW 5e-4
(Adam takes away the scale of the update). At most MAX_TOKENS training tokens; all that were
generated count: probes, dropped groups and masked tokens included.

Measure. Held-out reward of 192 prompts x 1 sample, temperature 1, the same random numbers each
time, every EVALUATE_TOKENS. Tokens to the target: where the mean of two successive evaluations
first reaches the case's TARGETS, linearly between them; a run that never does counts MAX_TOKENS (a
lower bound, reported as `censored`). Beside it pass@1 and pass@4 of the last policy, from 4 samples
a prompt, so that no gain is bought by collapse.

Arms. fixed-4, fixed-8, fixed-16 (every group counts); filter_refill-4, filter_refill-8 (DAPO). Four
adaptive rules, refilled as the system does by default (`buffer.drop_no_signal`):
probe_then_commit-4 (a probe of 2), and with settled prompts skipped (`skip_below = 0.3`)
min_variance-skip-4, equal_treatment-skip-4, fixed-skip-4.

Choice. Seeds 0-4 on task-a and task-b: of the adaptive rules, of the fixed sizes and of the
refilled ones, the arm with the least sum over the two tasks of the medians of tokens. Confirmation.
Seeds 5-9, all three cases: the chosen rule against the chosen fixed size and the chosen refilled
one; ratio of medians (peer / ours) with the paired bootstrap's 95% interval. Goal: 2 or more
against fixed, above 1 against filter_refill. What comes out is recorded as it is.

Stopped, it goes on with `--work` and the folder that it made under runs/.
`--smoke`: two seeds in place of ten and few tokens, to see that it works; recorded nowhere.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, repeat
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

MAX_TOKENS = 100_000
EVALUATE_TOKENS = 8_000
TARGETS = {"task-a": 0.42, "task-b": 0.55, "none": 0.65}
EPOCH = 128
SAMPLES_PER_STEP = 128
DIGITS = {"min_digits": 1, "max_digits": 1}
PROMPTS = {
    "task-a": PromptsConfig(
        task="chain_sum", task_config={"min_terms": 2, "max_terms": 5, **DIGITS}, size=EPOCH,
        held_out=192,
    ),
    "task-b": PromptsConfig(
        task="basic_arithmetic", size=EPOCH, held_out=192,
        task_config={
            "min_terms": 2, "max_terms": 5, "operators": ["+", "-"], "allow_parentheses": False,
            **DIGITS,
        },
    ),
    "none": PromptsConfig(
        task="chain_sum", task_config={"min_terms": 3, "max_terms": 3, **DIGITS}, size=100_000,
        held_out=192,
    ),
}  # fmt: skip
TASKS = ("task-a", "task-b")
SFT = SftConfig(demonstration="chain_sum_mixed", examples=16_000, batch_size=32, learning_rate=3e-3)
FIXED = ("fixed-4", "fixed-8", "fixed-16")
REFILLED = ("filter_refill-4", "filter_refill-8")
ADAPTIVE = (
    "probe_then_commit-4", "min_variance-skip-4", "equal_treatment-skip-4", "fixed-skip-4"
)  # fmt: skip


def rollout(arm: str) -> RolloutConfig:
    """`SIZER[-skip]-N` as settings."""
    name, _, size = arm.rpartition("-")
    sizer, skip, _ = name.partition("-skip")
    return RolloutConfig(
        samples_per_prompt=int(size),
        max_concurrent_samples=256,
        sampling=SamplingConfig(max_new_tokens=48),
        sizing=SizingConfig(
            sizer=sizer,  # type: ignore[arg-type]
            skip_below=0.3 if skip else 0.0,
            probe_samples=2,
        ),
    )


async def run(
    case: str, arm: str, seed: int, start: dict[str, torch.Tensor], max_tokens: int
) -> dict[str, Any]:
    """One run to the target, or `max_tokens`; its curve and what is left of diversity."""
    settings, target = rollout(arm), TARGETS[case]
    learner = LearnerConfig(
        prompts_per_step=SAMPLES_PER_STEP // settings.samples_per_prompt,
        objective=ObjectiveConfig(advantage="leave_one_out", aggregation="prompt"),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5),
    )
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            PROMPTS[case], settings, learner, PatternMatch().score, start, seed,
            refill=arm not in FIXED, folder=Path(folder),
        )  # fmt: skip
        await loop.publish()
        curve = [(0, float((await loop.evaluate(1)).mean()))]
        while loop.tokens < max_tokens and tokens_to(curve, target) is None:
            await loop.train()
            if loop.tokens >= curve[-1][0] + EVALUATE_TOKENS:
                curve.append((loop.tokens, float((await loop.evaluate(1)).mean())))
        last = await loop.evaluate(4)
        await loop.engine.close()
    reached = tokens_to(curve, target)
    return {
        "case": case, "arm": arm, "seed": seed, "tokens": reached or max_tokens,
        "censored": reached is None, "steps": loop.step, "curve": curve,
        "pass@1": float(last.mean()), "pass@4": float(last.max(axis=1).mean()),
        "issued": np.bincount(loop.issued).tolist(),
    }  # fmt: skip


def tokens_to(curve: list[tuple[int, float]], target: float) -> float | None:
    """Tokens at which a curve, each two neighbours averaged, first reaches a target; or None."""
    middles = [((a + b) / 2, (low + high) / 2) for (a, low), (b, high) in pairwise(curve)]
    for number, (tokens, reward) in enumerate(middles):
        if reward >= target:
            before, low = middles[number - 1] if number else (tokens, reward)
            share = (target - low) / (reward - low) if reward > low else 0.0
            return before + share * (tokens - before)
    return None


Key = tuple[str, str, int]
"""Case, arm, seed."""


def run_file(key: Key, folder: Path, max_tokens: int) -> dict[str, Any]:
    """One run in a process of its own."""
    start = torch.load(folder / f"start-{key[0]}.pt")
    return asyncio.run(run(*key, start, max_tokens))


class Runs:
    """The runs of one folder, each done once: the bench may be stopped and called again."""

    def __init__(self, folder: Path, jobs: int, max_tokens: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._file, self._jobs = folder, folder / "runs.jsonl", jobs
        self._max_tokens = max_tokens
        self._done = {(r["case"], r["arm"], r["seed"]): r for r in read_lines(self._file)}

    def make(self, keys: Sequence[Key], examples: int) -> None:
        """Do all of some runs that are not done, `jobs` at a time."""
        for case in PROMPTS:
            self._start(case, examples)
        missing = [key for key in keys if key not in self._done]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._jobs, mp_context=context) as pool:
            for result in pool.map(
                run_file, missing, repeat(self._folder), repeat(self._max_tokens)
            ):
                self._done[result["case"], result["arm"], result["seed"]] = result
                with self._file.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)

    def get(self, case: str, arm: str, seed: int) -> dict[str, Any]:
        """The result of a run that was made."""
        return self._done[case, arm, seed]

    def _start(self, case: str, examples: int) -> None:
        path = self._folder / f"start-{case}.pt"
        if not path.exists():
            prompts = PROMPTS[case].model_copy(update={"size": 100_000})
            sft = SFT.model_copy(update={"examples": examples})
            torch.save(warm_start(prompts, sft, seed=0), path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)  # whole, or not there

    def median_tokens(self, case: str, arm: str, seeds: list[int]) -> float:
        """Over seeds."""
        return median(self.get(case, arm, seed)["tokens"] for seed in seeds)


def choose(runs: Runs, arms: tuple[str, ...], seeds: list[int]) -> tuple[str, dict[str, float]]:
    """The arm with the least sum of medians over the two tasks, and all the sums."""
    sums = {arm: sum(runs.median_tokens(case, arm, seeds) for case in TASKS) for arm in arms}
    return min(sums, key=lambda arm: sums[arm]), sums


def confirm(runs: Runs, case: str, ours: str, peer: str, seeds: list[int]) -> dict[str, Any]:
    """The line of one comparison."""
    mine = [runs.get(case, ours, seed) for seed in seeds]
    theirs = [runs.get(case, peer, seed) for seed in seeds]
    interval = ratio_of_medians([r["tokens"] for r in theirs], [r["tokens"] for r in mine])
    return {
        "bench": "sizing", "case": case, "ours": median(r["tokens"] for r in mine),
        "peer": median(r["tokens"] for r in theirs), "peer_name": peer, "ratio": interval.value,
        "unit": f"generated tokens to held-out reward {TARGETS[case]}", "runs": len(seeds),
        "spread": [interval.low, interval.high],
        "notes": "synchronous loop in one process; spread: bootstrap 95% interval of the ratio",
        "ours_name": ours, "seeds": seeds,
        "censored": [sum(r["censored"] for r in mine), sum(r["censored"] for r in theirs)],
        "pass@1": [median(r["pass@1"] for r in side) for side in (mine, theirs)],
        "pass@4": [median(r["pass@4"] for r in side) for side in (mine, theirs)],
    }  # fmt: skip


def main() -> None:
    """Choose, confirm, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--choose", default="0,1,2,3,4", type=numbers)
    parser.add_argument("--confirm", default="5,6,7,8,9", type=numbers)
    work = new_work_folder("sizing")
    parser.add_argument("--work", type=Path, default=work, help="of a stopped one: goes on there")
    parser.add_argument("--jobs", default=2, type=int, help="runs at the same time, a core each")
    parser.add_argument("--smoke", action="store_true", help="one seed each, few tokens")
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    chosen, confirmed, max_tokens, examples = args.choose, args.confirm, MAX_TOKENS, SFT.examples
    if args.smoke:
        chosen, confirmed, max_tokens, examples = [100], [101], 4_000, 6_000
    runs = Runs(args.work, args.jobs, max_tokens)
    arms = (*ADAPTIVE, *FIXED, *REFILLED)
    runs.make([(case, arm, seed) for seed in chosen for arm in arms for case in TASKS], examples)
    ours, sums = choose(runs, ADAPTIVE, chosen)
    peers = []
    for group in (FIXED, REFILLED):
        peer, of_peers = choose(runs, group, chosen)
        peers.append(peer)
        sums |= of_peers
    runs.make([(case, arm, seed) for seed in confirmed for arm in (ours, *peers)
               for case in PROMPTS], examples)  # fmt: skip
    for case in PROMPTS:
        for peer in peers:
            line = confirm(runs, case, ours, peer, confirmed)
            emit(line | {"choice": sums}, record=not (args.dry or args.smoke))


if __name__ == "__main__":
    main()
