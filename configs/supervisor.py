"""Follows the processes of a run to its end: finished, failed or interrupted, with none left.

    RUNNING --learner 0--> EVALUATING --feeder 0--> CLOSING --workers, buffer 0--> finished
    any of them --a process ends that should not--> failed (its reason)
    any of them --Ctrl-C, SIGTERM--> learner saves at its step boundary --> interrupted

On every way out the order is: learner (it may still be saving, and tells the buffer), then feeder
and workers, then the buffer; each with a deadline, then SIGKILL.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from .child import Child

POLL_S = 0.05

Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long each way of ending may take, in seconds."""

    learner_save_s: float = 90.0
    """Ctrl-C: the learner ends its step and saves; a step of a real model takes a while."""
    learner_crash_s: float = 20.0
    """Another process died: time to save, if the buffer still lives."""
    end_s: float = 15.0
    """Workers and feeder after being asked; then the buffer, the same again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How supervision ended."""

    status: Status
    reason: str = ""
    process: str = ""
    """Which one ended the run, when it failed."""
    exit_code: int = 1
    """Of a failed run: what its process recorded; a `ConfigError` is a 2 wherever it shows."""


def failure_of(child: Child) -> Outcome:
    """The end of a run whose child ended badly."""
    error = child.error()
    code = 1 if error is None else error.exit_code
    return Outcome(status="failed", reason=child.why(), process=child.name, exit_code=code)


class StopRequests:
    """Counts how often the user asked to stop: once saves and ends, twice kills."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int = 0, frame: FrameType | None = None) -> None:
        """One more request; has the form of a signal handler."""
        self.count += 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP while inside; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to live on
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.add) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Ended(Exception):
    """Leaves the happy path, whatever phase it is in."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Supervisor:
    """Owns the children of one run, named `buffer`, `feeder`, `worker-0` ... and `learner`.

    Trace of a crash:
        run()                    # all run
        worker-0 dies            # _check raises _Ended(failed, why)
        _end_all                 # learner SIGTERM, saves; feeder, workers; buffer; SIGKILL
        -> Outcome(status="failed", process="worker-0", reason="...")
    """

    def __init__(
        self,
        children: Mapping[str, Child],
        *,
        close_run: Callable[[str], None],
        tick: Callable[[str], None],
        stop: StopRequests,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Take over running children.

        Args:
            children: by name; all are ended when `run` returns.
            close_run: tells the buffer that no more claims are granted; must return quickly.
            tick: called every `POLL_S` with the phase in words; draws displays.
            stop: who asked to stop, and how often.
            deadlines: how long each way of ending may take.
        """
        self._children = children
        self._close_run = close_run
        self._tick = tick
        self._stop = stop
        self._deadlines = deadlines or Deadlines()
        self._closing = False

    def run(self) -> Outcome:
        """Follow the run to its end; afterwards no child is left."""
        try:
            self._follow()
            return Outcome(status="finished")
        except _Ended as ended:
            self._end_gracefully(ended.outcome)
            return ended.outcome
        finally:
            self._kill_all()

    def _follow(self) -> None:
        """The happy path; anything else raises `_Ended`."""
        self._wait_for("learner", phase="training", deadline_s=None)
        # However long it takes: the feeder itself gives up an evaluation that makes no progress.
        self._wait_for("feeder", phase="final evaluation", deadline_s=None)
        self._closing = True
        self._close_run("finished")
        for name in self._workers:
            self._wait_for(name, phase="closing", deadline_s=self._deadlines.end_s)
        self._children["buffer"].terminate()
        self._wait_for("buffer", phase="closing", deadline_s=self._deadlines.end_s)

    @property
    def _workers(self) -> list[str]:
        return [name for name in self._children if name.startswith("worker")]

    def _wait_for(self, name: str, *, phase: str, deadline_s: float | None) -> None:
        """Until this child ended well, or for so long; `run` kills what is left then."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        while self._children[name].poll() is None:
            self._tick(phase)
            self._check()
            if end is not None and time.monotonic() > end:
                return
            time.sleep(POLL_S)
        self._check()

    def _check(self) -> None:
        """Raise when the user asked to stop, or when a child ended that should not have."""
        if self._stop.count:
            raise _Ended(Outcome(status="interrupted", reason="stopped on request"))
        ended = [child for child in self._children.values() if self._ended_badly(child)]
        if ended:
            cause = min(ended, key=_blame)
            raise _Ended(failure_of(cause))

    def _ended_badly(self, child: Child) -> bool:
        code = child.poll()
        if code is None:
            return False
        # The learner and the feeder end by themselves when done; the others only when told.
        may_end = self._closing or child.name in ("learner", "feeder")
        asked = self._closing and code == -signal.SIGTERM
        return not (may_end and (code == 0 or asked))

    def _end_gracefully(self, outcome: Outcome) -> None:
        """Learner first, buffer last; a second request to stop ends all waiting."""
        alive = self._children["buffer"].poll() is None
        save_s = self._deadlines.learner_save_s
        if outcome.status == "failed":
            save_s = self._deadlines.learner_crash_s if alive else 2.0
        self._end(["learner"], save_s, phase="saving")
        if alive:
            self._close_run(outcome.reason.splitlines()[0])
        self._end(["feeder", *self._workers], self._deadlines.end_s, phase="ending")
        self._end(["buffer"], self._deadlines.end_s, phase="ending")

    def _end(self, names: list[str], deadline_s: float, *, phase: str) -> None:
        """SIGTERM, wait, SIGKILL."""
        children = [self._children[name] for name in names]
        for child in children:
            child.terminate()
        end = time.monotonic() + deadline_s
        while any(child.poll() is None for child in children):
            self._tick(phase)
            if time.monotonic() > end or self._stop.count >= 2:
                break
            time.sleep(POLL_S)
        for child in children:
            child.kill()

    def _kill_all(self) -> None:
        for child in self._children.values():
            child.kill()


def _blame(child: Child) -> tuple[bool, bool]:
    """Sorts the cause of a crash first: who only lost a peer suffers from somebody else's end."""
    error = child.error()
    return (error is not None and error.type == "PeerLost", child.poll() == 0)
