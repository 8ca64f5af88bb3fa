"""A run to be harmed: started by the command line, watched by its files."""

import contextlib
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

from .disks import Disk, Refused, jumping_clock, limited_disk
from .networks import Link, joined

PYTHON = [sys.executable, "-P"]
STEPS = 60
START_DEADLINE_S = 150.0
"""Four processes import torch on two cores, which other tests may use, too."""
END_DEADLINE_S = 60.0
STARTED_BY_WORKERS = {"reward": "rewards.process", "core": "EngineCore"}
"""Of a process, and what its command line holds."""

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


QUICK = """
import sys
if "slipstream.configs.cli" in sys.orig_argv:
    from slipstream.configs import doctor
    doctor.SILENT_S = 8.0
"""
"""So that who is frozen is found in 8 s; `test_kill` waits for the doctor's own time."""


class Run:
    """A run driven by the command line, as a user would."""

    python = PYTHON
    deadline_s = START_DEADLINE_S

    def __init__(self, folder: Path, record_property: Callable[[str, object], None]) -> None:
        self.record_property = record_property
        self.folder, self.run_dir = folder, folder / "run"
        self.output = folder / "output.txt"
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}

    def start(self, *arguments: str) -> None:
        self.spawn([*self.python, "-m", "slipstream.configs.cli", *arguments])

    def begin(self, *settings: str) -> None:
        """The run itself, in its folder."""
        self.start("run", "chaos.toml", *settings, "--output", str(self.run_dir), "--no-export")

    def find_quickly(self) -> None:
        """See `QUICK`."""
        (self.folder / "plant").mkdir()
        (self.folder / "plant" / "sitecustomize.py").write_text(QUICK)
        self.add_path(self.folder / "plant")

    def spawn(self, command: list[str]) -> None:
        with self.output.open("ab") as output:
            self.supervisor = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=output,
                stderr=output,
                env=os.environ | self.environment,
            )

    def start_also(self, *arguments: str) -> None:
        """A command beside the run."""
        command = [*PYTHON, "-m", "slipstream.configs.cli", *arguments]
        subprocess.run(command, cwd=self.folder, check=True, timeout=60)

    def num_workers(self) -> int:
        """Rollout workers that are alive."""
        lines = [" ".join(process.cmdline()) for process in self.processes()]
        return sum("slipstream.rollout.worker" in line for line in lines)

    def add_path(self, folder: Path) -> None:
        """Put a folder before the others that its processes import from."""
        old = os.environ.get("PYTHONPATH", "")
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), old]))

    def matches(self, pattern: str) -> bool:
        """Whether it said so."""
        return re.search(pattern, self.output.read_text()) is not None

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

        wait_until(reached, self.deadline_s)

    def pid(self, name: str) -> int:
        """Of a process of the run; `reward` and `core` are those that a rollout worker started."""
        if name == "supervisor":
            assert self.supervisor is not None
            return self.supervisor.pid
        if name in STARTED_BY_WORKERS:
            children = psutil.Process(self.pid("worker-0")).children(recursive=True)
            mark = STARTED_BY_WORKERS[name]
            return next(c.pid for c in children if mark in " ".join((c.name(), *c.cmdline())))
        return int((self.run_dir / "processes" / f"{name}.pid").read_text())

    def lines(self) -> int:
        """Steps trained so far, redone ones included: what grows while a run is alive."""
        with suppress(FileNotFoundError):
            return (self.run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def times(self) -> list[float]:
        """The wall clock at each step."""
        whole = (self.run_dir / "metrics.jsonl").read_text().rpartition("\n")[0]
        return [json.loads(line)["time"] for line in whole.splitlines()]

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signal a process; one that is just being restarted is waited for. Its pid."""
        sent: list[int] = []

        def done() -> bool:
            with suppress(OSError, psutil.NoSuchProcess, StopIteration):
                os.kill(pid := self.pid(name), number)
                sent.append(pid)
            return bool(sent)

        wait_until(done, self.deadline_s)
        return sent[0]

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

    def end(self) -> None:
        """Whatever is left, stopped processes included."""
        if self.supervisor is not None and self.supervisor.poll() is None:
            self.supervisor.kill()
            self.supervisor.wait()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def wait_until(condition: Callable[[], bool], deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"did not come true within {deadline_s:.0f} s"
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path, record_property: Callable[[str, object], None]) -> Iterator[Run]:
    (tmp_path / "chaos.toml").write_text(EXPERIMENT.format(steps=STEPS))
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(500)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(tmp_path, record_property)
    yield run
    run.end()


@pytest.fixture
def disk(run: Run) -> Iterator[Disk | None]:
    """A disk for the run; None where the sandbox refuses it, and what it said is recorded."""
    with contextlib.ExitStack() as stack:
        made = None
        try:
            made = stack.enter_context(limited_disk(run.folder))
            run.run_dir = made.place / "run"
            if made.refused:
                run.record_property("refused", made.refused)
        except Refused as error:
            run.record_property("refused", str(error))
        yield made
        run.end()


@pytest.fixture
def clock(run: Run) -> Path | None:
    """The file that puts the run's clock ahead; None where there is no compiler."""
    try:
        environment, ahead = jumping_clock(run.folder)
    except Refused as error:
        run.record_property("refused", str(error))
        return None
    run.environment |= environment
    return ahead


@pytest.fixture
def link() -> Iterator[Link]:
    """A network to be cut."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(joined())
        except Refused as error:
            pytest.skip(f"this sandbox refuses a second network: {error}")
        yield made
