"""What every benchmark needs: who measured, one JSON object a line, intervals, our command line."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PACKAGES = ("slipstream", "torch", "transformers", "numpy", "pyzmq", "reasoning-gym")


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
    }


def _processor() -> str:
    """The model's name where the system tells it (Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's version and those of the packages."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def commit() -> str:
    """The commit, with `-dirty` when files differ from it; results themselves do not count."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", ":!docs/results"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def emit(line: dict[str, Any], *, record: bool = True) -> None:
    """Print one JSON object, and append it to `docs/results/BENCH.jsonl`.

    Args:
        line: with `bench`, the file's name; time, commit, machine and versions are added.
        record: whether to append; a dry run does not.
    """
    text = json.dumps(
        {
            **line,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
        }
    )
    print(text, flush=True)
    if record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / f"{line['bench']}.jsonl").open("a") as file:
            file.write(text + "\n")


class Interval(NamedTuple):
    """A ratio and its bootstrap 95% interval."""

    value: float
    low: float
    high: float


def ratio_of_medians(
    above: Sequence[float], below: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """median(above) / median(below), with the percentile bootstrap's 95% interval.

    Args:
        above: one number per run.
        below: the same of the other side; position i of both is the same seed, and such pairs are
            resampled together.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    Raises:
        ValueError: lengths differ or are 0.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} runs are no pairs")
    above_N, below_N = np.asarray(above, float), np.asarray(below, float)
    picks_RN = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
    ratios_R = np.median(above_N[picks_RN], axis=1) / np.median(below_N[picks_RN], axis=1)
    low, high = np.quantile(ratios_R, [0.025, 0.975])
    return Interval(float(np.median(above_N) / np.median(below_N)), float(low), float(high))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that may still be written to; none when it is not there."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def seconds_at_step(run_dir: Path) -> dict[int, float]:
    """Training seconds after which each step's policy was there; step 0 at 0.

    The clock starts when the learner, its weights loaded, sets out to take its first batch.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_lines(run_dir / "metrics.jsonl"):
        rows.setdefault(row["step"], row)  # a stopped run repeats its last line
    if 1 not in rows:
        return {0: 0.0}
    start = rows[1]["time"] - rows[1]["seconds"]
    return {0: 0.0} | {step: row["time"] - start for step, row in rows.items()}


def before_and_after(experiment: str, run_dir: Path) -> dict[str, Any]:
    """A line of results on what run.json says of a finished run of an experiment: its held-out
    reward against that of the policy before the first step."""
    text = (run_dir / "run.json").read_text()
    run = json.loads(text.replace(str(run_dir.absolute()), "RUN"))
    result = run["result"]
    first, final = result["reward_first"], result["reward_final"]
    return {
        "bench": experiment,
        "case": "held-out reward",
        "ours": final["mean"],
        "peer": first["mean"],
        "peer_name": "the policy before the first step",
        "ratio": final["mean"] / first["mean"] if first["mean"] else None,
        "unit": "held-out reward",
        "runs": 1,
        "spread": {
            "before": [first["ci95_low"], first["ci95_high"]],
            "after": [final["ci95_low"], final["ci95_high"]],
        },
        "command": f"slipstream run {experiment}",
        "run_commit": run["commit"],
        "result": result,
    }


def command(*arguments: str) -> list[str]:
    """`slipstream ARGUMENTS` in this environment."""
    return [sys.executable, "-m", "slipstream.configs.cli", *arguments]


def slipstream(*arguments: str, log: Path) -> None:
    """Run `slipstream ARGUMENTS` to its end.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command(*arguments), stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"slipstream {' '.join(arguments)} failed:\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def numbers(text: str) -> list[int]:
    """`0,1,2` of an option."""
    return [int(part) for part in text.split(",") if part.strip()]


def new_work_folder(name: str) -> Path:
    """Where the runs of one benchmark go: `runs/bench-NAME-TIME`."""
    return ROOT / "runs" / f"bench-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
