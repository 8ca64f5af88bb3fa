"""The chaos matrix: a run that lives on through one fault after another.

harm(Fault("kill -9", "buffer"))
    a seeded moment -> the fault -> whoever replaces the victim is up -> three more steps
    -> seconds recorded -> the books audited -> no wait outlived its deadline unsaid
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil
from slipstream.configs.audit import audit_run
from slipstream.configs.doctor import SILENT_S, SLACK_S, process_state, published_by

from .conftest import Run, wait_until
from .disks import SLOW_BYTES_PER_S, Disk

MOMENT_S = 1.0
"""A fault comes at a random moment within so long."""
STEPS_AFTER = 3
"""What may be READY when a process dies is two steps' worth: with the third, all work again."""
LATE_S = 30.0
"""The doctor acts after a deadline and its slack; on a busy machine so much later still."""
STALL_S = 45.0
"""`cluster.stall_s`: below a run's deadline; a busy machine loads a model in less."""
SLOW_BYTES = 1 << 20
"""Written to a slow disk, to feel that it is."""
FULL = "No space left|disk is full|disk I/O|cannot grow"

SETTINGS = (
    "cluster.restarts=100",
    f"cluster.stall_s={STALL_S:g}",
    "cluster.learner_ranks=2",
    "learner.steps=100000",
    "reward.processes=1",
    "reward.timeout_s=5",
    "reward.max_failure_rate=1.0",
)
"""Of a run with two learner ranks, that goes on until it is told to stop."""

Replaced = Callable[[], bool]


class Fault(NamedTuple):
    """What is done, and to whom."""

    how: str
    victim: str

    def __str__(self) -> str:
        return f"{self.how}: {self.victim}" if self.victim else self.how


def on_a_disk(disk: Disk | None, *faults: Fault) -> list[Fault]:
    """Those of the faults that the sandbox lets us do to it."""
    if disk is None:
        return []
    return [fault for fault in faults if not (fault.how == "slow disk" and disk.refused)]


class Matrix:
    """A run that is harmed; use as a context around its life."""

    def __init__(
        self,
        run: Run,
        seed: int,
        *,
        launcher: str = "local",
        stall_s: float = STALL_S,
        disk: Disk | None = None,
        clock: Path | None = None,
    ) -> None:
        """Take over a run that was started.

        Args:
            run: it.
            seed: of the moments.
            launcher: for the record.
            stall_s: its `cluster.stall_s`.
            disk: what its folder is on, when that can be filled and slowed.
            clock: the file whose presence puts its clock ahead.
        """
        self.run, self.choice, self.launcher = run, random.Random(seed), launcher
        self.stall_s, self.disk, self.clock = stall_s, disk, clock
        self._ways: dict[str, Callable[[str], Replaced]] = {
            "kill -9": self._kill,
            "SIGSTOP": self._stop,
            "slow disk": self._slow_disk,
            "full disk": self._full_disk,
            "clock jump": self._clock_jump,
        }
        self._began_s = 0.0

    def add(self, how: str, way: Callable[[str], Replaced]) -> None:
        """One more way of harming: takes the victim, returns whether it is replaced."""
        self._ways[how] = way

    def __enter__(self) -> Self:
        self.run.wait_for_step(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._ends_well()

    def harm(self, fault: Fault) -> None:
        """One fault, and all that must hold after it."""
        time.sleep(self.choice.uniform(0.0, MOMENT_S))
        self._began_s = time.monotonic()
        replaced = self._ways[fault.how](fault.victim)
        self._wait_until(replaced)
        before = self.run.lines()
        self._wait_until(lambda: self.run.lines() >= before + STEPS_AFTER)
        seconds = round(time.monotonic() - self._began_s, 1)
        self.run.record_property(f"recovered from {fault} ({self.launcher})", seconds)
        self._books_are_exact()

    def _wait_until(self, condition: Replaced) -> None:
        """While the run lives, and says of each wait past its deadline that it is."""

        def holds() -> bool:
            run = self.run
            assert run.supervisor is not None
            assert run.supervisor.poll() is None, run.output.read_text()
            self._no_silent_wait()
            with suppress(OSError, psutil.Error, StopIteration):  # being replaced this very moment
                return condition()
            return False

        wait_until(holds, self.run.deadline_s)

    def _no_silent_wait(self) -> None:
        for name, said in published_by(self.run.run_dir / "processes"):
            if process_state(said.pid) in ("gone", "dead"):
                continue
            path = self.run.run_dir / "processes" / f"{name}.waits.json"
            silent_s = 0.0
            with suppress(FileNotFoundError):  # removed this very moment
                silent_s = time.time() - path.stat().st_mtime
            late = ["silence"] if silent_s > SILENT_S + LATE_S else []
            late += [
                wait.what
                for wait in said.waits
                if name != "buffer"  # publishes the waits of others
                and wait.waited_s > (wait.deadline_s or self.stall_s) + SLACK_S + LATE_S
            ]
            told = f"{name} (pid {said.pid})"
            assert not late or told in self.run.output.read_text(), f"{told} waits unsaid: {late}"

    def _books_are_exact(self) -> None:
        report = audit_run(self.run.run_dir)
        assert report.ok, report.faults
        assert report.violations == 0

    def _ends_well(self) -> None:
        """Asked to, the run stops with its books balanced and nobody left."""
        run = self.run
        run.kill("supervisor", signal.SIGTERM)
        assert run.wait(run.deadline_s) == 130, run.output.read_text()
        told = run.output.read_text().rpartition("What happened")[2]
        assert "0 staleness violations, 0 orphaned tokens" in told, run.output.read_text()
        assert "audit: ok, issued" in told
        assert run.processes() == []

    def _kill(self, victim: str) -> Replaced:
        if victim == "supervisor":
            return self._kill_supervisor()
        old = self.run.kill(victim)
        return lambda: self.run.pid(victim) != old

    def _kill_supervisor(self) -> Replaced:
        """The others are left; `slipstream resume` at once is all that is done."""
        run = self.run
        old = run.pid("learner")
        assert run.supervisor is not None
        run.supervisor.kill()
        run.supervisor.wait()
        run.start("resume", str(run.run_dir), "--no-export")
        return lambda: run.pid("learner") != old

    def _stop(self, victim: str) -> Replaced:
        old = self.run.kill(victim, signal.SIGSTOP)
        if victim != "supervisor":
            return lambda: self.run.pid(victim) != old
        time.sleep(self.choice.uniform(1.0, 5.0))  # nobody would find it; it goes on
        os.kill(old, signal.SIGCONT)
        return lambda: True

    def _slow_disk(self, victim: str) -> Replaced:
        assert self.disk is not None
        self.disk.slow()
        seconds = self.disk.seconds_of(SLOW_BYTES)
        assert seconds > 0.5 * SLOW_BYTES / SLOW_BYTES_PER_S, f"it is not slow: {seconds:.2f} s"
        time.sleep(self.choice.uniform(2.0, 6.0))
        self.disk.mend()
        return lambda: True

    def _full_disk(self, victim: str) -> Replaced:
        """The run ends and says why; the time to recover is counted from when there is room."""
        assert self.disk is not None
        run, before = self.run, len(self.run.output.read_text())
        self.disk.fill()
        code = run.wait(run.deadline_s)
        told = run.output.read_text()[before:]
        assert code == 1, told
        assert run.matches(FULL), told
        assert "slipstream resume" in told
        self.disk.free()
        self._began_s = time.monotonic()
        run.start("resume", str(run.run_dir), "--no-export")
        return lambda: True

    def _clock_jump(self, victim: str) -> Replaced:
        """A day forth, or back."""
        assert self.clock is not None
        self.clock.unlink() if self.clock.exists() else self.clock.touch()
        return lambda: True
