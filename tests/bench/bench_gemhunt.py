"""Does multi-turn training with GiGPO raise held-out reward by at least 0.3?

The protocol, fixed before the runs: `slipstream run gemhunt seed=N` as shipped, for seeds 0, 1 and
2; reward over the 128 held-out worlds before the first step (after the warm start) and after the
last, with the run's own sampling. Held: the rise is at least 0.3, for each seed.
"""

import argparse
from pathlib import Path

from common import before_and_after, emit, new_work_folder, numbers, slipstream

RISE = 0.3


def main() -> None:
    """One run a seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", type=numbers)
    parser.add_argument("--work", type=Path, default=new_work_folder("gemhunt"))
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        run_dir = args.work / f"seed{seed}"
        slipstream(
            "run", "gemhunt", f"seed={seed}", "--output", str(run_dir),
            log=run_dir.with_suffix(".log"),
        )  # fmt: skip
        line = before_and_after("gemhunt", run_dir)
        held = line["result"]["reward_rise"] >= RISE
        emit(line | {"case": f"seed {seed}", "held": held, "target": RISE}, record=not args.dry)


if __name__ == "__main__":
    main()
