"""kill -9 and SIGSTOP of each process of a real run: it goes on, and says what it did."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

PYTHON = [sys.executable, "-P"]
RESUME_WITHOUT_EXPORT = """
import sys
from pathlib import Path
from slipstream.configs.launch import resume
sys.exit(resume(Path("run"), export=False).exit_code)
"""
STEPS = 60
STEPS_PER_LIFE = 3
START_DEADLINE_S = 150.0
"""Four processes import torch on two cores, which other tests may use, too."""
END_DEADLINE_S = 60.0

EXPERIMENT = """
name = "chaos"
[prompts]
source = "dataset"
path = "prompts.jsonl"
held_out = 4
[reward]
name = "reward.py:slow"
[rollout]
workers = 1
samples_per_prompt = 2
max_concurrent_samples = 8
[rollout.sampling]
max_new_tokens = 4
[buffer]
drop_no_signal = false
[learner]
steps = {steps}
prompts_per_step = 2
[learner.checkpoint]
every_steps = 2
[eval]
enabled = false
[track]
tensorboard = false
"""

REWARD = """
import time, zlib

def slow(completion, prompt):
    time.sleep(0.05)  # paces the run, so that it lives long enough to be killed
    return (zlib.crc32(completion.text.encode()) % 100) / 100
"""


class Run:
    """A run driven by the command line, as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.output = folder / "output.txt"
        self.supervisor: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        self.spawn([*PYTHON, "-m", "slipstream.configs.cli", *arguments])

    def spawn(self, command: list[str]) -> None:
        with self.output.open("wb") as output:
            self.supervisor = subprocess.Popen(
                command, cwd=self.folder, stdout=output, stderr=output
            )

    def step(self) -> int:
        """The newest step in the metrics; 0 before the first."""
        with suppress(FileNotFoundError):
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(line)["step"] for line in lines), default=0)
        return 0

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.supervisor is not None
            assert self.supervisor.poll() is None, self.output.read_text()
            return self.step() >= step

        wait_until(reached, START_DEADLINE_S)

    def pid(self, name: str) -> int:
        return int((self.run_dir / "processes" / f"{name}.pid").read_text())

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)

    def wait(self, deadline_s: float = END_DEADLINE_S) -> int:
        assert self.supervisor is not None
        return self.supervisor.wait(timeout=deadline_s)

    def processes(self) -> list[psutil.Process]:
        """Whatever runs for this run, wherever it hangs in the process tree."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd", "status"]):
            info = process.info
            ours = str(self.run_dir) in " ".join(info["cmdline"] or ())
            ours |= (info["cwd"] or "").startswith(str(self.run_dir))
            if ours and info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


def wait_until(condition: Callable[[], bool], deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"did not come true within {deadline_s:.0f} s"
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    (tmp_path / "chaos.toml").write_text(EXPERIMENT.format(steps=STEPS))
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(500)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(tmp_path)
    yield run
    if run.supervisor is not None and run.supervisor.poll() is None:
        run.supervisor.kill()
        run.supervisor.wait()
    for process in run.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()


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
