"""kill -9 and SIGSTOP of each process of a real run: it goes on, and says what it did."""

import json
import random
import re
import shutil
import signal
import time
from collections import Counter

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 200])
def test_after_every_kill_and_resume_the_books_are_exact(run: Run, kills: int) -> None:
    """At a random moment of the run, of a process chosen at random; nobody restarts it but us. In
    the end the run gets a last step, and finishes."""
    choice, killed = random.Random(kills), Counter()
    run.start("run", "chaos.toml", "cluster.restarts=0", "learner.steps=100000",
              "--output", "run", "--no-export")  # fmt: skip
    for _ in range(kills):
        before = run.lines()
        wait_until(lambda before=before: run.lines() > before, START_DEADLINE_S)
        time.sleep(choice.uniform(0.0, 2.0))
        name = choice.choice(("buffer", "feeder", "worker-0", "learner"))
        run.kill(name)
        assert run.wait(START_DEADLINE_S) == 1, run.output.read_text()
        run.start_also("audit", "run")  # raises unless it is exact
        killed[name] += 1
        run.start("resume", "run", "--no-export")
    run.record_property("killed", dict(killed))
    before = run.lines()
    wait_until(lambda: run.lines() > before, START_DEADLINE_S)
    run.kill("supervisor", signal.SIGTERM)
    assert run.wait(START_DEADLINE_S) == 130, run.output.read_text()
    run.start_also("audit", "run")
    resolved = run.run_dir / "resolved.json"
    settings = json.loads(resolved.read_text())
    settings["learner"]["steps"] = run.step() + STEPS_PER_LIFE
    resolved.write_text(json.dumps(settings))
    run.start("resume", "run", "--no-export")
    assert run.wait(2 * START_DEADLINE_S) == 0, run.output.read_text()
    assert run.step() == settings["learner"]["steps"]
    run.start_also("audit", "run")
    assert "0 staleness violations, 0 orphaned tokens" in run.output.read_text()
    run.record_property("steps trained", run.lines())


@pytest.mark.slow
def test_a_run_whose_machine_is_lost_goes_on_from_its_copy(run: Run) -> None:
    copy = run.folder / "elsewhere"
    run.start("run", "chaos.toml", f"buffer.copy_to={copy}", "--output", "run", "--no-export")
    run.wait_for_step(6)
    assert run.supervisor is not None
    run.supervisor.kill()
    run.supervisor.wait()
    for process in run.processes():
        process.kill()
    wait_until(lambda: run.processes() == [], END_DEADLINE_S)
    shutil.rmtree(run.run_dir)
    shutil.copytree(copy, run.run_dir)
    run.start_also("audit", "run")  # raises unless it is exact
    run.start("resume", "run", "--no-export")
    assert run.wait(START_DEADLINE_S) == 0, run.output.read_text()
    assert run.step() == STEPS
    assert "audit: ok, issued" in run.output.read_text()
    assert "0 staleness violations, 0 orphaned tokens" in run.output.read_text()
