"""The chaos matrix: every kind of process killed, stopped or starved at seeded moments.

After each fault the run goes on by itself, or by `slipstream resume` when its supervisor was the
victim; at the end the audit holds. Recovery is the time to the next trained step.
"""

import json
import os
import random
import signal
import subprocess
import time

import pytest

from .conftest import START_DEADLINE_S, Run, wait_until

KINDS = ("worker-0", "reward", "buffer", "feeder", "learner", "supervisor")
FAULTS = [(kind, "kill -9") for kind in KINDS] + [(kind, "SIGSTOP") for kind in KINDS[:-1]]
"""Every pair once in a run; 19 seeds make 209 faults."""

JUMP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <stdlib.h>
static long jump(void) {
    const char *file = getenv("JUMP_FILE");
    return file && !access(file, F_OK) ? 86400 : 0;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += jump();
    return code;
}
time_t time(time_t *out) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
int gettimeofday(struct timeval *v, void *zone) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    v->tv_sec = t.tv_sec; v->tv_usec = t.tv_nsec / 1000;
    return 0;
}
"""


def harm(run: Run, kind: str, fault: str, choice: random.Random) -> None:
    """One fault at a random moment; return once another step is trained."""
    time.sleep(choice.uniform(0.0, 3.0))
    before, began = run.lines(), time.monotonic()
    run.kill(kind, signal.SIGKILL if fault == "kill -9" else signal.SIGSTOP)
    if kind == "supervisor":
        assert run.supervisor is not None
        run.supervisor.wait()
        wait_until(lambda: run.processes() == [], 60)
        run.start("resume", "run", "--no-export")
    told = run.output

    def recovered() -> bool:
        assert run.supervisor is not None
        assert run.supervisor.poll() is None, told.read_text()
        return run.lines() > before + 1  # one step may have been on its way

    wait_until(recovered, START_DEADLINE_S)
    run.record_property(f"{fault} {kind}, seconds to recover", round(time.monotonic() - began, 2))


def ends_well(run: Run) -> None:
    """Asked to, the run stops with its books balanced and nobody left."""
    run.kill("supervisor", signal.SIGTERM)
    assert run.wait(120) == 130, run.output.read_text()
    told = run.output.read_text().rpartition("What happened")[2]
    assert "0 staleness violations, 0 orphaned tokens" in told
    assert "audit: ok, issued" in told
    assert run.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(19))
def test_a_run_survives_every_fault_at_seeded_moments(run: Run, seed: int) -> None:
    choice = random.Random(seed)
    faults = choice.sample(FAULTS, len(FAULTS))
    run.start("run", "chaos.toml", "cluster.restarts=100", "learner.steps=5000",
              "--output", "run", "--no-export")  # fmt: skip
    run.wait_for_step(1)
    for kind, fault in faults:
        harm(run, kind, fault, choice)
    ends_well(run)


def test_a_full_disk_ends_the_run_with_the_reason_and_room_lets_it_go_on(run: Run) -> None:
    place = run.folder / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("a limited mount needs root; this sandbox refuses it")
    try:
        run.run_dir = place / "run"
        run.start("run", "chaos.toml", "cluster.restarts=1", "learner.steps=5000",
                  "--output", "small/run", "--no-export")  # fmt: skip
        run.wait_for_step(2)
        filler = place / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k", "count=700"], check=False)
        assert run.wait(START_DEADLINE_S) == 1
        told = run.output.read_text()
        assert "No space left" in told or "disk is full" in told or "disk I/O" in told, told
        assert "slipstream resume small/run" in told
        filler.unlink()
        run.start("resume", "small/run", "--no-export")
        before = run.lines()
        wait_until(lambda: run.lines() > before + 2, START_DEADLINE_S)
        ends_well(run)
    finally:
        run.end()
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.slow
def test_a_clock_that_jumps_a_day_and_back_changes_nothing(run: Run) -> None:
    source, library, now = run.folder / "jump.c", run.folder / "jump.so", run.folder / "now"
    source.write_text(JUMP)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    run.environment = {"LD_PRELOAD": str(library), "JUMP_FILE": str(now)}
    run.start("run", "chaos.toml", "learner.steps=5000", "--output", "run", "--no-export")
    for step in (2, 6, 10, 14):
        run.wait_for_step(step)
        now.unlink() if now.exists() else now.touch()
    lines = (run.run_dir / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    times = [json.loads(line)["time"] for line in lines]
    assert max(times) - min(times) > 80_000, "the clock did jump"
    ends_well(run)
    assert "stalled" not in run.output.read_text()
    assert "restart" not in run.output.read_text()


@pytest.mark.slow
def test_workers_join_and_leave_a_running_run_and_no_prompt_is_lost(run: Run) -> None:
    run.start("run", "chaos.toml", "learner.steps=5000", "--output", "run", "--no-export")
    run.wait_for_step(2)
    for wanted in (3, 1):
        run.start_also("scale", "run", "--rollout-workers", str(wanted))
        wait_until(lambda wanted=wanted: run.num_workers() == wanted, START_DEADLINE_S)
        run.wait_for_step(run.step() + 10)
    assert run.matches("rollout workers: 1 -> 3")
    assert run.matches("rollout workers: 3 -> 1")
    ends_well(run)
    assert run.matches(r"the learner waits \d+% of its time")
