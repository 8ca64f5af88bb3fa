"""TRL's and verl's maths reward on given answers, called as they call it, in an environment of
their own.

    python reward_peers.py trl|verl IN.jsonl OUT.json

IN.jsonl: text, answer. OUT.json: seconds, scores. TRL's trainer calls `accuracy_reward` once per
batch; it goes through the batch one by one. verl's reward manager calls `compute_score` one by one.
"""

import json
import sys
import time
from pathlib import Path

WARM_UP = 64


def trl(rows):
    from trl.rewards import accuracy_reward

    completions = [[{"role": "assistant", "content": row["text"]}] for row in rows]
    return accuracy_reward(completions, [f"\\boxed{{{row['answer']}}}" for row in rows])


def verl(rows):
    from verl.utils.reward_score.math_verify import compute_score

    return [float(compute_score(row["text"], row["answer"])) for row in rows]


def main() -> None:
    score = {"trl": trl, "verl": verl}[sys.argv[1]]
    rows = [json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines()]
    score(rows[:WARM_UP])
    began = time.perf_counter()
    scores = score(rows)
    seconds = time.perf_counter() - began
    Path(sys.argv[3]).write_text(json.dumps({"seconds": seconds, "scores": scores}))


if __name__ == "__main__":  # verl starts processes that import this file
    main()
