"""10,000 maths answers scored by our reward processes, and as TRL and verl score theirs.

The protocol, fixed before the runs:

Workload. 10,000 distinct completions, drawn from seed 0: a line or two of working, then an answer
    in a box: whole numbers, fractions, decimals, powers, roots, polynomials; about half are right.
Arms. ours: `math_answer` in two reward processes, all samples handed over at once. in process: the
    same class called one by one in this process. trl: `trl.rewards.accuracy_reward` on the whole
    list. verl: `verl.utils.reward_score.math_verify.compute_score` one by one. The peers run in
    environments of their own, with the same math-verify. Nothing is cached: no two texts are equal.
Order. `--runs` rounds, each arm once a round; a warm-up of 64 samples in each. Medians; the ratio
    with its 95% interval by bootstrap over rounds.
Overhead. 20,000 samples of a reward of TRL's form that returns 1.0 at once (`batch_size = 256`),
    through one reward process: seconds per sample, everything included.
Equal. The share of samples on which an arm agrees with ours; the libraries' extraction settings
    differ, so it need not be 1.
"""

import argparse
import asyncio
import json
import random
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, emit, new_work_folder, ratio_of_medians, versions
from slipstream.buffer.records import Completion, Message, Prompt
from slipstream.rollout.config import RewardConfig
from slipstream.rollout.rewards.math_answer import MathAnswer
from slipstream.rollout.rewards.pool import RewardPool

COUNT = 10_000
WARM_UP = 64
TRIVIAL = 20_000
PROCESSES = 2
PEERS = {"trl": (".venvs/trl", "1.16.0"), "verl": (".venvs/loss", "0.9.1")}
TARGET_RATIO, TARGET_OVERHEAD_US = 1.8, 50.0
NOTHING = """
def reward(completions, **columns):
    return [1.0] * len(completions)

reward.batch_size = 256
"""

Sample = tuple[Completion, Prompt]


def answer(chance: random.Random) -> tuple[str, str]:
    """A gold answer, and another way to write it."""
    a, b, c = (chance.randint(2, 97) for _ in range(3))
    return chance.choice(
        [
            (str(a * b), f"{a * b}"),
            (f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a * c}}}{{{b * c}}}"),
            (f"{a}.{b}", f"{a}.{b}0"),
            (f"{a}^{{{b % 4 + 2}}}", f"{a ** (b % 4 + 2)}"),
            (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}} \\cdot {a}"),
            (f"x^2+{a}x+{b}", f"{b}+{a}x+x^2"),
        ]
    )


def workload(count: int) -> list[dict[str, str]]:
    """Distinct completions and their gold answers."""
    chance, rows = random.Random(0), []
    for number in range(count):
        gold, same = answer(chance)
        given = same if chance.random() < 0.5 else answer(chance)[1]
        steps = f"Attempt {number}: we have {chance.randint(1, 999)} of them.\n" * chance.randint(
            1, 2
        )
        rows.append({"text": f"{steps}So the answer is $\\boxed{{{given}}}$.", "answer": gold})
    assert len({row["text"] for row in rows}) == count
    return rows


def sample(row: dict[str, str]) -> Sample:
    """As a reward of ours sees it."""
    asked = (Message(role="user", content="?"),)
    prompt = Prompt(uid=0, source_id="bench/0", task="bench", messages=asked, payload=row)
    return Completion(text=row["text"]), prompt


async def pooled(config: RewardConfig, samples: list[Sample]) -> tuple[float, list[float | None]]:
    """Seconds and scores through the reward processes."""
    async with RewardPool(config) as pool:
        await asyncio.gather(*(pool.score(*each) for each in samples[-WARM_UP:]))
        began = time.perf_counter()
        scores = await asyncio.gather(*(pool.score(*each) for each in samples))
        return time.perf_counter() - began, [score.value for score in scores]


def in_process(samples: list[Sample]) -> tuple[float, list[float | None]]:
    """The same class, one call after another."""
    reward = MathAnswer()
    for each in samples[:WARM_UP]:
        reward.score(*each)
    began = time.perf_counter()
    scores = [reward.score(*each).value for each in samples]
    return time.perf_counter() - began, scores


def peer(name: str, rows: Path, work: Path) -> tuple[float, list[float | None]]:
    """A peer's reward in its own environment.

    Raises:
        SystemExit: it is not installed, or failed.
    """
    folder, version = PEERS[name]
    python, out = ROOT / folder / "bin" / "python", work / f"{name}.json"
    if not python.is_file():
        raise SystemExit(f"{name} is missing: no {python}; `make bench-rewards` installs it")
    code = (
        f"from importlib.metadata import version; version('math-verify'); print(version('{name}'))"
    )
    said = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if said.stdout.strip() != version:
        raise SystemExit(f"{python} has {name} {said.stdout.strip() or said.stderr}, not {version}")
    script = Path(__file__).parent / "peers" / "reward_peers.py"
    with (work / f"{name}.log").open("w") as log:
        subprocess.run(
            [python, script, name, rows, out], check=True, stdout=log, stderr=log, timeout=1800
        )
    done = json.loads(out.read_text())
    return done["seconds"], done["scores"]


def main() -> None:
    """All rounds, then a line per peer and one for the overhead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--work", type=Path, default=new_work_folder("rewards"))
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work, rows = args.work.absolute(), workload(args.count)
    file = work / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [sample(row) for row in rows]
    ours = RewardConfig(name="math_answer", processes=PROCESSES)
    arms = {
        "ours": lambda: asyncio.run(pooled(ours, samples)),
        "in process": lambda: in_process(samples),
        "trl": lambda: peer("trl", file, work),
        "verl": lambda: peer("verl", file, work),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    scores: dict[str, list[float | None]] = {}
    for _ in range(args.runs):
        for name, arm in arms.items():
            took, scores[name] = arm()
            seconds[name].append(took)
    for name in [each for each in arms if each != "ours"]:
        agreed = sum(a == b for a, b in zip(scores["ours"], scores[name], strict=True))
        _report(args, name, seconds, agreed / args.count)
    (work / "nothing.py").write_text(NOTHING)
    nothing = RewardConfig(name=f"{work / 'nothing.py'}:reward")
    plain = [sample({"text": str(n), "answer": "1"}) for n in range(TRIVIAL)]
    took = [asyncio.run(pooled(nothing, plain))[0] for _ in range(args.runs)]
    overhead_us = 1e6 * median(took) / TRIVIAL
    line: dict[str, Any] = {
        "bench": "rewards", "case": "overhead of a trivial reward", "ours": overhead_us,
        "unit": "microseconds", "runs": args.runs,
        "spread": [1e6 * seconds / TRIVIAL for seconds in sorted(took)],
        "held": overhead_us < TARGET_OVERHEAD_US, "target": TARGET_OVERHEAD_US,
    }  # fmt: skip
    emit(line, record=not args.dry)


def _report(
    args: argparse.Namespace, name: str, seconds: dict[str, list[float]], agreed: float
) -> None:
    ratio = ratio_of_medians(seconds[name], seconds["ours"])
    line = {
        "bench": "rewards", "case": f"math answers against {name}", "ours": median(seconds["ours"]),
        "peer": median(seconds[name]), "peer_name": name, "ratio": ratio.value, "unit": "s",
        "runs": args.runs, "spread": [ratio.low, ratio.high], "count": args.count,
        "processes": PROCESSES, "agreed": agreed, "held": ratio.value >= TARGET_RATIO,
        "target": TARGET_RATIO, "peer_version": PEERS[name][1] if name in PEERS else "",
        "math_verify": versions(["math-verify"])["math-verify"],
    }  # fmt: skip
    emit(line, record=not args.dry)


if __name__ == "__main__":
    main()
