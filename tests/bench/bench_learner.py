"""Tokens per second of an update on a long-tailed batch, against TRL's update of the same batch.

The protocol, fixed before the runs:

Model. A Llama of 2 layers, width 128, 2,048 tokens of vocabulary, random weights from seed 0, in
    float32, the same folder for both.
Batches. 8 prompts x 8 samples. `long tail`: lengths of `traces/long_tail.json`, checked in, mean
    150, longest 768. `equal`: the same prompts, every sample as long as the mean. Token ids are
    drawn from seed 0, rewards are 0 and 1 in turn; advantages are those of `group_mean`.
Arms. ours: `train_step` with the shipped settings (token budget, shared prompts, fused loss).
    trl: GRPOTrainer's own training loop with generation and scoring replaced by the batch, in
    micro-batches of 8; loss "dapo", no KL. Both: the same AdamW, rate and clipping, all cores.
Ranks. `growth with ranks`: ours on the long tail with 1, 2, 4 ... learner ranks (FSDP2, gloo), as
    many as there are cores, one thread each, against one rank; all sizes in turn in each round.
Metric. Trained tokens per second of an update: forward, loss, backward, clipping, optimizer; the
    median of `--updates` updates after 2 to warm up, one process per rank, arm and round, arms in
    turn.
Equal. Both minimise the same loss: the gradient norms of the first update are printed beside.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import ROOT, emit, new_work_folder, ratio_of_medians
from slipstream.buffer.records import (
    Message,
    Prompt,
    SamplingParams,
    Score,
    SizingDecision,
    Timings,
    TrainingSample,
    Trajectory,
    TrajectoryGroup,
    Version,
    VersionSpan,
)
from slipstream.buffer.staleness import LivePath
from slipstream.kernels.models import load_policy
from slipstream.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from slipstream.learner.policy import Policy
from slipstream.learner.ranks import Ranks, shard
from slipstream.learner.step import train_step
from transformers import AutoTokenizer, LlamaConfig

TINY = ROOT / "kernels" / "tiny"
VOCABULARY = 2048
RATE = 1e-5
MICRO_BATCH = 8
WARM_UP = 2
THREADS = os.cpu_count() or 1
TARGET_RATIO, TARGET_PADDING = 3.0, 0.05
HELD = Version(branch=0, step=0)

Rows = list[tuple[list[int], list[list[int]], list[float]]]
"""(prompt, completions, rewards) of each group."""


def save_model(folder: Path) -> None:
    """The policy, and a tokenizer which TRL wants to see."""
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=344, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(str(folder))  # fmt: skip
    model = load_policy(folder, "float32", seed=0)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(TINY)).save_pretrained(str(folder))


def rows_of(case: str) -> Rows:
    """The batch."""
    groups = json.loads((Path(__file__).parent / "traces" / "long_tail.json").read_text())["groups"]
    chance = np.random.default_rng(0)
    mean = round(float(np.mean([n for group in groups for n in group["written"]])))
    rows: Rows = []
    for group in groups:
        written = group["written"] if case == "long tail" else [mean] * len(group["written"])
        completions = [chance.integers(3, VOCABULARY, n).tolist() for n in written]
        rewards = (np.arange(len(written)) % 2).astype(float).tolist()
        rows.append(
            (chance.integers(3, VOCABULARY, group["prompt"]).tolist(), completions, rewards)
        )
    return rows


def groups_of(rows: Rows) -> list[TrajectoryGroup]:
    """The batch as the buffer hands it out."""
    found = []
    for uid, (prompt, completions, rewards) in enumerate(rows):
        pairs = zip(completions, rewards, strict=True)
        samples = tuple(
            TrainingSample(trajectory=_trajectory(uid, i, prompt, text, reward), trained=True)
            for i, (text, reward) in enumerate(pairs)
        )
        asked = (Message(role="user", content="?"),)
        sizing = SizingDecision(
            sizer="fixed", num_samples=len(samples), max_new_tokens=1024, reason=""
        )
        found.append(
            TrajectoryGroup(
                prompt=Prompt(uid=uid, source_id=f"b/{uid}", task="b", messages=asked),
                attempt=0, sizing=sizing, samples=samples,
            )
        )  # fmt: skip
    return found


def _trajectory(
    uid: int, index: int, prompt: list[int], text: list[int], reward: float
) -> Trajectory:
    span = (VersionSpan(version=HELD, length=len(text)),)
    return Trajectory(
        uid=uid, attempt=0, index=index,
        token_ids=np.array([*prompt, *text], np.int32),
        policy_mask=np.arange(len(prompt) + len(text)) >= len(prompt),
        behaviour_logprobs=np.full(len(text), -9.0, np.float32), versions=span,
        kv_version_min=span, sampling=SamplingParams(), finish_reason="stop", text="",
        score=Score(value=reward), turns=(),
        timings=Timings(claimed_s=0, first_token_s=0, generated_s=0, scored_s=0), engine_id="b",
    )  # fmt: skip


def ours(model_dir: Path, case: str, updates: int, threads: int, ranks: Ranks) -> dict[str, Any]:
    """Seconds of each update, gradient norms, padding."""
    torch.set_num_threads(threads)
    config = LearnerConfig(
        objective=ObjectiveConfig(advantage="group_mean", aggregation="token", correction="none"),
        optimizer=OptimizerConfig(learning_rate=RATE, warmup_steps=0),
    )
    model = load_policy(model_dir, "float32", seed=0)
    shard(model, ranks)
    policy = Policy(model, config.optimizer, ranks=ranks)
    groups, found = groups_of(rows_of(case)), {"seconds": [], "grad_norms": [], "padding": 0.0}
    for step in range(1, updates + WARM_UP + 1):
        metrics = train_step(
            policy, groups, step=step, held=HELD, config=config, path=LivePath(0),
            max_staleness_steps=1e9,
        ).metrics  # fmt: skip
        found["seconds"].append(metrics["train_seconds"])
        found["grad_norms"].append(metrics["grad_norm"])
        found["padding"] = metrics["padding"]
    return found


def run_ours(args: argparse.Namespace, case: str, threads: int, size: int = 1) -> dict[str, Any]:
    """One run of ours, each rank a process; what rank 0 found.

    Raises:
        SystemExit: a rank failed.
    """
    work = args.work.absolute()
    for left in ("meeting", "ours.json"):
        (work / left).unlink(missing_ok=True)
    argv = [sys.executable, __file__, "--updates", str(args.updates), "--work", str(work)]
    argv += ["--arm", case, str(threads), str(size)]
    children = [subprocess.Popen([*argv, str(rank)]) for rank in range(size)]
    try:
        codes = [child.wait(timeout=1800) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    if any(codes):
        raise SystemExit(f"ranks of ours ended with {codes}")
    return json.loads((work / "ours.json").read_text())


def arm(work: Path, updates: int, case: str, threads: int, size: int, rank: int) -> None:
    """One rank of `run_ours`."""
    ranks = Ranks.join(rank, size, work / "meeting", "")
    found = ours(work / "model", case, updates, threads, ranks)
    ranks.exchange(None)  # none leaves while another computes
    if ranks.first:
        (work / "ours.json").write_text(json.dumps(found))


def trl(python: Path, model_dir: Path, case: str, updates: int, work: Path) -> dict[str, Any]:
    """The same by TRL.

    Raises:
        SystemExit: it is not installed, or failed.
    """
    if not python.is_file():
        raise SystemExit(
            f"TRL's environment is missing: no {python}; `make bench-learner` makes it"
        )
    prompts, completions, advantages = [], [], []
    for prompt, texts, rewards in rows_of(case):
        prompts += [prompt] * len(texts)
        completions += texts
        advantages += (np.array(rewards) - np.mean(rewards)).tolist()
    batch, out = work / f"{case.replace(' ', '-')}.json", work / "trl.json"
    given = {"prompts": prompts, "completions": completions, "advantages": advantages}
    batch.write_text(json.dumps(given))
    argv = [python, Path(__file__).parent / "peers" / "trl_update.py", model_dir, batch, out, RATE]
    argv += [MICRO_BATCH, updates + WARM_UP, THREADS]
    with (work / "trl.log").open("w") as log:
        subprocess.run(list(map(str, argv)), check=True, stdout=log, stderr=log, timeout=1800)
    return json.loads(out.read_text())


def main() -> None:
    """Both batches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venvs/trl/bin/python")
    parser.add_argument("--work", type=Path, default=new_work_folder("learner"))
    parser.add_argument("--arm", nargs=4, metavar=("CASE", "THREADS", "RANKS", "RANK"))
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    work = args.work.absolute()
    if args.arm:
        case, *numbers = args.arm
        arm(work, args.updates, case, *map(int, numbers))
        return
    save_model(work / "model")
    for case in ("long tail", "equal"):
        measure(args, case, work)
    grow(args)


def tokens_of(case: str) -> int:
    """That are trained."""
    return sum(len(text) for _, texts, _ in rows_of(case) for text in texts)


def seconds_of(found: dict[str, Any]) -> float:
    """Of the median update."""
    return median(found["seconds"][WARM_UP:])


def grow(args: argparse.Namespace) -> None:
    """The same batch on more and more ranks, and a line of results."""
    case, cores = "long tail", os.cpu_count() or 1
    sizes = [2**n for n in range(cores.bit_length()) if 2**n <= cores]
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for _ in range(args.rounds):
        for size in sizes:
            found[size].append(run_ours(args, case, 1, size))
    rates = {n: [tokens_of(case) / seconds_of(each) for each in runs] for n, runs in found.items()}
    ratios = {n: ratio_of_medians(rates[n], rates[1]) for n in sizes}
    emit(
        {
            "bench": "learner", "case": "growth with ranks", "unit": "trained tokens/s",
            "runs": args.rounds, "ranks": {n: median(rates[n]) for n in sizes},
            "ratio": {n: ratio.value for n, ratio in ratios.items()},
            "spread": {n: [ratio.low, ratio.high] for n, ratio in ratios.items()},
            "padding": {n: runs[0]["padding"] for n, runs in found.items()},
            "first_grad_norm": {n: runs[0]["grad_norms"][0] for n, runs in found.items()},
        },
        record=not args.dry,
    )  # fmt: skip


def measure(args: argparse.Namespace, case: str, work: Path) -> None:
    """Some rounds of both arms, and a line of results."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(args.rounds):
        found["ours"].append(run_ours(args, case, THREADS))
        found["trl"].append(trl(args.trl_python, work / "model", case, args.updates, work))
    tokens = tokens_of(case)
    rates = {arm: [tokens / seconds_of(each) for each in runs] for arm, runs in found.items()}
    ratio = ratio_of_medians(rates["ours"], rates["trl"])
    padding = found["ours"][0]["padding"]
    emit(
        {
            "bench": "learner", "case": case, "ours": median(rates["ours"]),
            "peer": median(rates["trl"]), "peer_name": "trl 1.16.0 GRPOTrainer",
            "ratio": ratio.value, "unit": "trained tokens/s", "runs": args.rounds,
            "spread": [ratio.low, ratio.high], "tokens": tokens, "padding": padding,
            "first_grad_norm": {arm: runs[0]["grad_norms"][0] for arm, runs in found.items()},
            "held": {
                "padding": padding < TARGET_PADDING,
                **({"ratio": ratio.value >= TARGET_RATIO} if case == "long tail" else {}),
            },
            "target": {"ratio": TARGET_RATIO, "padding": TARGET_PADDING},
        },
        record=not args.dry,
    )  # fmt: skip


if __name__ == "__main__":
    main()
