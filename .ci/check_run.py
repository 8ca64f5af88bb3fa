"""Holds a finished quickstart against what the project promises: `check_run.py RUN_DIR`.

Times are printed and not judged: a machine with other work to do would fail for no fault of ours.
Timed runs are recorded by `make bench-quickstart`.
"""

import json
import sys
from pathlib import Path

MIN_REWARD_RISE = 0.4
MIN_MIXED_FRACTION = 0.05
MAX_LOGIT_DIFFERENCE = 1e-5


def broken_promises(run: dict) -> list[str]:
    """What the run's `run.json` does not fulfil."""
    result = run["result"] or {}
    export, audit = result.get("export") or {}, result.get("audit") or {}
    promises = {
        "status finished": run["status"] == "finished",
        "no staleness violation": result.get("staleness_violations") == 0,
        "no orphaned token": result.get("orphaned_tokens") == 0,
        f"reward rise >= {MIN_REWARD_RISE}": (result.get("reward_rise") or 0) >= MIN_REWARD_RISE,
        f"trained trajectories with two versions >= {MIN_MIXED_FRACTION}": (
            result.get("mixed_fraction", 0) >= MIN_MIXED_FRACTION
        ),
        "export verified": export.get("ok") is True
        and (export.get("max_logit_difference") or 0) <= MAX_LOGIT_DIFFERENCE,
        "audit ok": audit.get("ok") is True,
    }
    return [promise for promise, kept in promises.items() if not kept]


if __name__ == "__main__":
    path = Path(sys.argv[1]) / "run.json"
    run = json.loads(path.read_text())
    broken = broken_promises(run)
    if (result := run["result"]) and result["first_step_seconds"]:
        print(f"first step after {result['first_step_seconds']:.0f} s, ", end="")
        print(f"everything after {result['total_seconds']:.0f} s")
    for promise in broken:
        print(f"{path}: not kept: {promise}", file=sys.stderr)
    print(f"{path}: {'not as promised' if broken else 'as promised'}")
    sys.exit(1 if broken else 0)
