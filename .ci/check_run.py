"""Holds a finished quickstart against what the project promises: `check_run.py RUN_DIR`."""

import json
import sys
from pathlib import Path

MIN_REWARD_RISE = 0.4
MIN_MIXED_FRACTION = 0.05
MAX_FIRST_STEP_S = 60.0
MAX_TOTAL_S = 180.0
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
        f"first step within {MAX_FIRST_STEP_S:.0f} s": (
            (result.get("first_step_seconds") or MAX_FIRST_STEP_S + 1) <= MAX_FIRST_STEP_S
        ),
        f"end within {MAX_TOTAL_S:.0f} s": result.get("total_seconds", 0) <= MAX_TOTAL_S,
        "export verified": export.get("ok") is True
        and (export.get("max_logit_difference") or 0) <= MAX_LOGIT_DIFFERENCE,
        "audit ok": audit.get("ok") is True,
    }
    return [promise for promise, kept in promises.items() if not kept]


if __name__ == "__main__":
    path = Path(sys.argv[1]) / "run.json"
    broken = broken_promises(json.loads(path.read_text()))
    for promise in broken:
        print(f"{path}: not kept: {promise}", file=sys.stderr)
    print(f"{path}: {'not as promised' if broken else 'as promised'}")
    sys.exit(1 if broken else 0)
