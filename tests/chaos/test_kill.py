"""kill -9 and SIGSTOP of each process of a real run: it goes on, and says what it did."""

import json
import re
import signal

from .conftest import END_DEADLINE_S, PYTHON, START_DEADLINE_S, STEPS, Run, wait_until

STEPS_PER_LIFE = 3
RESUME_WITHOUT_EXPORT = """
import sys
from pathlib import Path
from slipstream.configs.launch import resume
sys.exit(resume(Path("run"), export=False).exit_code)
"""


def test_every_process_can_be_killed_or_stopped_and_the_run_finishes_by_itself(run: Run) -> None:
    """With the supervisor killed, too: then one command goes on."""
    run.start("run", "chaos.toml", "--output", "run", "--no-export")
    for name in ("worker-0", "buffer", "feeder", "learner"):
        run.wait_for_step(run.step() + STEPS_PER_LIFE)
        run.kill(name)
    run.wait_for_step(run.step() + STEPS_PER_LIFE)
    run.kill("worker-0", signal.SIGSTOP)
    run.wait_for_step(run.step() + STEPS_PER_LIFE)
    told = run.output.read_text()
    for name in ("worker-0", "buffer", "feeder"):
        assert re.search(rf"{name}: was killed by SIGKILL .*; is restarted", told), told
    assert "learner: was killed by SIGKILL" in told
    assert re.search(r"stalled: learner <- .*", told), told
    assert re.search(r"worker-0 \(pid \d+\) has been silent for 2\d s \(stopped", told), told

    assert run.supervisor is not None
    run.supervisor.kill()  # nobody is left to end the others: they do it themselves
    run.supervisor.wait()
    wait_until(lambda: run.processes() == [], END_DEADLINE_S)
    run.spawn([*PYTHON, "-c", RESUME_WITHOUT_EXPORT])

    assert run.wait(START_DEADLINE_S) == 0, run.output.read_text()
    told = run.output.read_text()
    assert run.step() == STEPS
    assert "0 staleness violations, 0 orphaned tokens" in told
    assert "audit: ok, issued" in told
    branches = json.loads((run.run_dir / "run.json").read_text())["branches"]
    assert [branch["status"] for branch in branches] == ["failed", "running", "finished"]


def test_without_restarts_a_kill_ends_the_run_with_its_name_and_the_line_that_resumes_it(
    run: Run,
) -> None:
    run.start("run", "chaos.toml", "cluster.restarts=0", "--output", "run")
    run.wait_for_step(STEPS_PER_LIFE)
    run.kill("worker-0")
    assert run.wait() == 1
    told = run.output.read_text()
    assert re.search(r"reason: worker-0: was killed by SIGKILL", told), told
    assert "slipstream resume run" in told
    assert run.processes() == []
