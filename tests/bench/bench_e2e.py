"""Seconds from one warm-started policy to a target reward: ours against TRL, async against sync.

The protocol, fixed before the runs:

Task. The quickstart: its prompts, reward, model and settings as shipped, read from the experiment.
Start. Per seed one policy after the warm start (`slipstream sft quickstart seed=N`); every arm
    starts from this folder, in float32, on all cores of the machine, alone on it.
Arms, in turn within each seed:
    async       the quickstart as shipped, without its warm start and its own evaluations, with a
                checkpoint every 4 steps
    sequential  the same with mode = "sequential": generate a batch, train on it, and so on
    trl         TRL's GRPOTrainer in an environment of its own: the same prompts in the same order,
                the same P x G, max_new_tokens, advantage scaling, loss aggregation, optimizer,
                warm-up and gradient clipping; one update per batch; generation by transformers
Two differences are the methods': ours releases groups without signal and fills the batch up, TRL
    trains on them as they come; ours is up to S steps stale, TRL is on policy.
Tuning. The same effort for each arm: its learning rate, over 0.5, 1 and 2 times the shipped one on
    development seeds (100 by default), each run like a measured one; the one with the least time to
    the target is taken, and among rates that never reach it the one that ends highest.
Metric. Training seconds to the first evaluated policy whose reward on the 512 held-out prompts, one
    sample each at temperature 1, is at least 0.50. (A dry run of the development seed, which starts
    at 0.12, levels off at 0.6: the target must lie where every start can get to.) The clock starts
    when weights are loaded and training begins: for ours when the learner sets out to take its
    first batch (workers may still be starting: inside our clock), for TRL at `on_train_begin`.
    Evaluations are outside of all clocks: ours after the run, of its checkpoints (`slipstream
    eval`), TRL's between two steps with the clock stopped. A policy counts from when it exists.
Censoring. A run of ours ends after the shipped number of steps, one of TRL at the cap. What has not
    reached the target by then counts as the cap, and is reported as censored: a ratio over
    censored TRL runs is a lower bound, one over censored runs of ours an upper bound.
Report. Medians over seeds; ratio = peer's median / ours, its 95% interval by bootstrap over seeds.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import (
    ROOT,
    command,
    emit,
    new_work_folder,
    numbers,
    ratio_of_medians,
    seconds_at_step,
    slipstream,
    tail,
)
from slipstream.configs.load import load_experiment
from slipstream.configs.schema import Experiment
from slipstream.rollout.prompts import PromptSource
from slipstream.rollout.rewards.pattern import PatternMatch

TARGET = 0.50
EVAL_EVERY = 4
RATE_FACTORS = (0.5, 1.0, 2.0)
ARMS = ("async", "sequential", "trl")
TRL_VERSION = "1.16.0"
NUM_PROMPTS = 20_000
"""Written for TRL, which goes around again: 625 batches of 32."""


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluated policy."""

    step: int
    seconds: float
    """Of training until it existed."""
    reward: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of one arm ended."""

    seconds: float
    """To the target; the cap when censored."""
    censored: bool
    points: tuple[Point, ...]

    @property
    def last_reward(self) -> float:
        """Of the last evaluated policy."""
        return self.points[-1].reward if self.points else 0.0


def outcome(points: list[Point], cap_s: float) -> Outcome | None:
    """What the evaluated policies decide; None while they decide nothing."""
    for number, point in enumerate(points, start=1):
        if point.seconds > cap_s:
            return Outcome(cap_s, True, tuple(points[:number]))
        if point.reward >= TARGET:
            return Outcome(point.seconds, False, tuple(points[:number]))
    return None


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share."""

    work: Path
    cap_s: float
    trl_python: Path
    overrides: tuple[str, ...]
    record: bool

    @property
    def deadline_s(self) -> float:
        """After which a run that decided nothing is an error: evaluations and start-up on top."""
        return 4 * self.cap_s + 600

    def experiment(self) -> Experiment:
        """The quickstart."""
        return load_experiment("quickstart", self.overrides).experiment

    def emit(self, line: dict[str, Any]) -> None:
        """One line of results."""
        emit(
            {"bench": "e2e", **line, "target": TARGET, "cap": self.cap_s}
            | {"overrides": self.overrides},
            record=self.record,
        )


def warm_start(bench: Bench, seed: int) -> Path:
    """The folder of the policy all arms of this seed start from; made once per work folder."""
    run_dir = bench.work / f"warm-{seed}"
    if not (run_dir / "export" / "config.json").is_file():
        slipstream(
            "sft", "quickstart", *bench.overrides, f"seed={seed}", "--output", str(run_dir),
            log=run_dir.with_suffix(".log"),
        )  # fmt: skip
    return run_dir / "export"


def our_points(run_dir: Path) -> list[Point]:
    """The policies of one of our runs, in step order, evaluated after its end."""
    seconds = seconds_at_step(run_dir)
    told = subprocess.run(
        command("eval", str(run_dir), "--every", "--jsonl"),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    steps = [int(row["weights"].removeprefix("step-").partition(".")[0]) for row in rows]
    pairs = zip(steps, rows, strict=True)
    return [Point(step, seconds[step], row["reward_mean"]) for step, row in pairs]


def run_ours(
    bench: Bench, mode: str, rate: float, seed: int, start: Path, run_dir: Path
) -> Outcome:
    """Run ours to its end, then evaluate its checkpoints.

    Raises:
        SystemExit: the run failed.
    """
    slipstream(
        "run", "quickstart", *bench.overrides, f"seed={seed}", f"mode={mode}", f"model={start}",
        "sft=false", "eval.enabled=false", f"learner.optimizer.learning_rate={rate!r}",
        f"learner.checkpoint.every_steps={EVAL_EVERY}",
        f"learner.checkpoint.keep_every_steps={EVAL_EVERY}",
        *(["buffer.max_staleness_steps=0"] if mode == "sequential" else []),
        "--no-export", "--output", str(run_dir),
        log=run_dir.with_suffix(".log"),
    )  # fmt: skip
    points = our_points(run_dir)
    return outcome(points, bench.cap_s) or Outcome(bench.cap_s, True, tuple(points))


def answer_pattern(experiment: Experiment) -> str:
    """The regular expression of the quickstart's reward, which the peer scores by itself."""
    if experiment.reward.name != "pattern":
        raise SystemExit(f"the peer scores by pattern, not by reward {experiment.reward.name!r}")
    default = inspect.signature(PatternMatch).parameters["pattern"].default
    return experiment.reward.arguments.get("pattern", default)


def write_prompts(experiment: Experiment, seed: int, folder: Path) -> tuple[Path, Path]:
    """The stream and the held-out prompts as JSONL: prompt (a chat), answer."""
    source = PromptSource(experiment.prompts, seed)
    files = folder / f"prompts-{seed}.jsonl", folder / f"held-out-{seed}.jsonl"
    streams = (source.prompt(uid) for uid in range(NUM_PROMPTS)), iter(source.held_out())
    for path, stream in zip(files, streams, strict=True):
        with path.open("w") as file:
            for prompt in stream:
                chat = [{"role": m.role, "content": m.content} for m in prompt.messages]
                file.write(json.dumps({"prompt": chat, "answer": prompt.payload["answer"]}) + "\n")
    return files


def trl_settings(experiment: Experiment, rate: float) -> dict[str, Any]:
    """The experiment's settings as options of peers/trl_grpo.py."""
    learner, optimizer = experiment.learner, experiment.learner.optimizer
    objective = learner.objective
    if learner.updates_per_step != 1 or objective.kl_coefficient or objective.entropy_coefficient:
        raise SystemExit("the peer is set up for one update per step, without KL or entropy terms")
    return {
        "pattern": answer_pattern(experiment),
        "learning-rate": rate,
        "prompts-per-step": learner.prompts_per_step,
        "samples-per-prompt": experiment.rollout.samples_per_prompt,
        "max-new-tokens": experiment.rollout.sampling.max_new_tokens,
        "scale-rewards": {"group_mean": "none", "group_std": "group"}[objective.advantage],
        "loss-type": {"token": "dapo", "sequence": "grpo"}[objective.aggregation],
        "warmup-steps": optimizer.warmup_steps,
        "weight-decay": optimizer.weight_decay,
        "max-grad-norm": optimizer.max_grad_norm,
        "beta1": optimizer.betas[0],
        "beta2": optimizer.betas[1],
    }


def run_trl(bench: Bench, rate: float, seed: int, start: Path, run_dir: Path) -> Outcome:
    """Run TRL until an evaluation decides.

    Raises:
        SystemExit: it failed, or decided nothing by the deadline.
    """
    experiment = bench.experiment()
    train, held_out = write_prompts(experiment, seed, bench.work)
    options = trl_settings(experiment, rate) | {
        "model": start, "train": train, "held-out": held_out, "target": TARGET, "seed": seed,
        "max-seconds": bench.cap_s, "eval-every": EVAL_EVERY, "work": run_dir,
    }  # fmt: skip
    argv = [str(bench.trl_python), str(Path(__file__).parent / "peers" / "trl_grpo.py")]
    argv += [f"--{name}={value}" for name, value in options.items()]
    lines, log = run_dir.with_suffix(".jsonl"), run_dir.with_suffix(".log")
    with lines.open("w") as out, log.open("w") as err:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(argv, stdout=out, stderr=err, env=env, timeout=bench.deadline_s)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{run_dir.name} took more than {bench.deadline_s:.0f} s") from None
    points = [Point(row["step"], row["seconds"], row["reward"]) for row in trl_rows(lines)]
    found = outcome(points, bench.cap_s)
    if done.returncode or found is None:
        raise SystemExit(f"{run_dir.name} failed ({done.returncode}):\n{tail(log)}")
    return found


def trl_rows(path: Path) -> list[dict[str, Any]]:
    """What the peer printed, among what its libraries may have printed."""
    return [
        json.loads(line) for line in path.read_text().splitlines() if line.startswith('{"step"')
    ]


def measured(bench: Bench, case: str, arm: str, seed: int, run: Callable[[], Outcome]) -> Outcome:
    """Do one run and report it; `arm` also names what was varied."""
    print(f"{case}: {arm}, seed {seed} ...", file=sys.stderr, flush=True)
    began, found = time.monotonic(), run()
    wall_s = time.monotonic() - began
    bench.emit(
        {"case": case, "arm": arm, "seed": seed, "unit": "s", "wall_seconds": wall_s}
        | asdict(found)
    )
    return found


def run_arm(bench: Bench, case: str, arm: str, rate: float, seed: int) -> Outcome:
    """One run of an arm, from the seed's warm start."""
    start, run_dir = warm_start(bench, seed), bench.work / f"{case}-{arm}-{seed}-{rate:g}"
    if arm == "trl":
        run = partial(run_trl, bench, rate, seed, start, run_dir)
    else:
        run = partial(run_ours, bench, arm, rate, seed, start, run_dir)
    return measured(bench, case, f"{arm} learning_rate={rate:g}", seed, run)


def tune(bench: Bench, arm: str, seeds: list[int]) -> float:
    """The learning rate for an arm: the fastest on the development seeds."""
    shipped = bench.experiment().learner.optimizer.learning_rate
    rates = [factor * shipped for factor in RATE_FACTORS]
    found = {rate: [run_arm(bench, "tuning", arm, rate, seed) for seed in seeds] for rate in rates}
    return min(found, key=lambda rate: _badness(found[rate]))


def _badness(runs: list[Outcome]) -> tuple[float, float]:
    """Less is better: mean seconds, then the reward still missing at the end."""
    return mean(run.seconds for run in runs), -mean(run.last_reward for run in runs)


def summary(case: str, peer: str, found: list[dict[str, Outcome]], notes: str) -> dict[str, Any]:
    """Ours (async) against another arm, over all seeds."""
    arm = "trl" if case == "e2e trl" else "sequential"
    ours_s = [seed["async"].seconds for seed in found]
    peer_s = [seed[arm].seconds for seed in found]
    ratio = ratio_of_medians(peer_s, ours_s)
    return {
        "case": case,
        "ours": median(ours_s),
        "peer": median(peer_s),
        "peer_name": peer,
        "ratio": ratio.value,
        "unit": f"s to reward {TARGET:.2f}",
        "runs": len(found),
        "spread": [ratio.low, ratio.high],
        "censored": {
            "ours": sum(seed["async"].censored for seed in found),
            "peer": sum(seed[arm].censored for seed in found),
        },
        "notes": notes,
    }


def check_trl(python: Path) -> None:
    """Refuse to measure half of it.

    Raises:
        SystemExit: the peer is not installed, or is another version.
    """
    remedy = "`make bench-e2e` installs it; or give --trl-python"
    if not python.is_file():
        raise SystemExit(f"TRL's environment is missing: there is no {python}; {remedy}")
    code = "from importlib.metadata import version; print(version('trl'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if done.stdout.strip() != TRL_VERSION:
        said = done.stdout.strip() or "none"
        raise SystemExit(f"{python} has trl {said}, not {TRL_VERSION}; {remedy}")


def main() -> None:
    """Tune the peer, run all arms of all seeds, and summarise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4", type=numbers)
    parser.add_argument("--tuning-seeds", default="100", type=numbers)
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venvs/trl/bin/python")
    parser.add_argument("--cap", type=float, default=300.0, help="training seconds of one run")
    parser.add_argument("--work", type=Path, default=new_work_folder("e2e"))
    parser.add_argument("--override", action="append", default=[], help="such as sft.examples=320")
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    check_trl(args.trl_python)
    args.work.mkdir(parents=True, exist_ok=True)
    work, overrides = args.work.absolute(), tuple(args.override)
    bench = Bench(work, args.cap, args.trl_python, overrides, record=not args.dry)
    rates = {arm: tune(bench, arm, args.tuning_seeds) for arm in ARMS}
    found = [
        {arm: run_arm(bench, "arm", arm, rate, seed) for arm, rate in rates.items()}
        for seed in args.seeds
    ]
    notes = (
        f"learning rates {rates}, each tuned over {RATE_FACTORS} x the shipped one on development "
        f"seeds {args.tuning_seeds}; all other settings as shipped"
    )
    bench.emit(summary("e2e trl", f"trl {TRL_VERSION} GRPOTrainer", found, notes))
    bench.emit(summary("async-vs-sync", "slipstream, sequential", found, notes))


if __name__ == "__main__":
    main()
