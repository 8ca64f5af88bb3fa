"""Follows the processes of a run to its end: finished, failed or interrupted, with none left.

    RUNNING --learner 0--> EVALUATING --feeder 0--> CLOSING --workers, buffer 0--> finished
    any of them --a process fails--> what `policy.POLICY` says: restarted, back to the checkpoint,
                                     or failed (its reason)
    any of them --Ctrl-C, SIGTERM--> learner saves at its step boundary --> interrupted

On every way out the order is: learner (it may still be saving, and tells the buffer), then feeder
and workers, then the buffer; each with a deadline, then SIGKILL.
"""

import signal
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Protocol

from .child import Child, at_once, kill_all
from .doctor import Stall, dump_stacks
from .policy import NO_SPACE, Budget, failure_of, kind_of, rule_for

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
    go_back: bool = False
    """Whether the policy is to continue from the newest checkpoint."""


def outcome_of(child: Child, why: str = "", *, go_back: bool = False) -> Outcome:
    """The end of a run whose child ended badly."""
    error = child.error()
    code = 1 if error is None else error.exit_code
    return Outcome(
        status="failed",
        reason=why or child.why(),
        process=child.name,
        exit_code=code,
        go_back=go_back,
    )


class Stopped(Exception):
    """The user asked to stop before there was anything to end."""


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


class Surroundings(Protocol):
    """What a supervisor needs of the rest of a session."""

    def start(self, name: str, /) -> Child:
        """Start the process of this name."""
        ...

    def close_run(self, reason: str, /) -> None:
        """Tell the buffer that no more claims are granted; returns quickly."""

    def tick(self, phase: str, /) -> None:
        """Called every `POLL_S` with the phase in words; draws displays."""

    def say(self, line: str, /) -> None:
        """Tell the user, and the run's log."""

    def stalled(self, children: dict[str, Child], /) -> list[Stall]:
        """Which children hang."""
        ...

    def chain(self) -> str:
        """Who waits on whom."""
        ...

    def wanted_workers(self, now: int, /) -> int:
        """How many rollout workers there should be."""
        ...

    def progress(self) -> Hashable:
        """How far the run is: another value whenever it has got further."""
        ...

    def lost(self, name: str, /) -> None:
        """Tell the buffer that a process went with its node; returns at once."""


class Supervisor:
    """Owns the children of one run, named `buffer`, `feeder`, `worker-0` ... and `learner`.

    Trace of crashes, one restart allowed:
        run()                    # all run
        worker-0 dies            # _recover: started again
        worker-0 dies            # _recover: raises _Ended(failed, why)
        _end_all                 # learner SIGTERM, saves; feeder, workers; buffer; SIGKILL
        -> Outcome(status="failed", process="worker-0", reason="...")
    """

    def __init__(
        self,
        children: dict[str, Child],
        around: Surroundings,
        stop: StopRequests,
        *,
        restarts: int = 0,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Take over running children.

        Args:
            children: by name; all are ended when `run` returns, those started later included.
            around: starts processes, shows what happens.
            stop: who asked to stop, and how often.
            restarts: of each kind of process, within ten minutes or without progress.
            deadlines: how long each way of ending may take.
        """
        self._children, self._around, self._stop = children, around, stop
        self._budget = Budget(restarts)
        self._deadlines = deadlines or Deadlines()
        self._closing = False
        self._leaving: set[str] = set()
        self._stalled: dict[str, str] = {}
        self._unplaced: dict[str, str] = {}
        """Who waits for a place, and what was said of it."""

    def run(self) -> Outcome:
        """Follow the run to its end; afterwards no child is left."""
        try:
            self._follow()
            return Outcome(status="finished")
        except _Ended as ended:
            self._end_gracefully(ended.outcome)
            return ended.outcome
        finally:
            kill_all(self._children.values())

    def _follow(self) -> None:
        """The happy path; anything else raises `_Ended`."""
        self._wait_for("learner", phase="training", deadline_s=None)
        # However long it takes: the feeder itself gives up an evaluation that makes no progress.
        self._wait_for("feeder", phase="final evaluation", deadline_s=None)
        self._closing = True
        self._around.close_run("finished")
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
            self._around.tick(phase)
            self._check()
            if end is not None and time.monotonic() > end:
                return
            time.sleep(POLL_S)
        self._check()
        if self._children[name].poll() is None:  # it failed at last, and is restarted
            self._wait_for(name, phase=phase, deadline_s=deadline_s)

    def _check(self) -> None:
        """Raise when the user asked to stop; see to children that hang, ended, or are to come."""
        if self._stop.count:
            raise _Ended(Outcome(status="interrupted", reason="stopped on request"))
        if self._closing:
            return  # all is trained and evaluated; what a process loses now nobody needs
        stalls = self._around.stalled(self._children)
        for stall in stalls:
            if stall.over:
                self._around.say(f"{stall.name}: {stall.why}")
        if hung := [stall for stall in stalls if not stall.over]:
            self._end_stalled(hung)
        ended = [child for child in self._children.values() if self._ended_badly(child)]
        if ended:
            self._recover(min(ended, key=_blame))
        self._scale()
        self._tell_unplaced()

    def _ended_badly(self, child: Child) -> bool:
        # The learner and the feeder end by themselves when done; the others only when told.
        code = child.poll()
        done = code == 0 and kind_of(child.name) in ("learner", "feeder")
        return code is not None and not done and child.name not in self._leaving

    def _end_stalled(self, stalls: list[Stall]) -> None:
        """Show the chain of waits and the stacks of hung processes, then kill them."""
        self._around.say(f"stalled: {self._around.chain()}")
        children = [self._children[stall.name] for stall in stalls]
        dumped = at_once(dump_stacks, children)
        for stall, child, stacks in zip(stalls, children, dumped, strict=True):
            self._around.say(f"{stall.name} (pid {child.pid}) {stall.why}; {stacks}")
            self._stalled[stall.name] = f"hung: {stall.why}"
        kill_all(children)

    def _recover(self, child: Child) -> None:
        """Do what the policy says of a process that failed.

        Raises:
            _Ended: the run ends, or goes back to its checkpoint.
        """
        why = self._stalled.pop(child.name, "")
        failure = failure_of(child, stalled=bool(why))
        rule = rule_for(child.name, failure)
        if failure == "no space" and child.error() is None:
            why = f"{NO_SPACE}: {child.run_dir}; {child.why()}"
        kind, first = kind_of(child.name), (why or child.why()).splitlines()[0].rstrip(":;")
        if rule.action == "go back" and self._budget.allowed:
            raise _Ended(outcome_of(child, why, go_back=True))
        if rule.action != "restart":
            raise _Ended(outcome_of(child, why))
        if not self._budget.spend(kind, self._around.progress(), child.place):
            raise _Ended(outcome_of(child, self._budget.exhausted(kind) + (why or child.why())))
        if child.place:
            self._around.lost(child.name)
        count = f"{self._budget.used(kind)} of {self._budget.allowed}"
        self._around.say(f"{child.name}: {first}; {rule.words} ({kind} restart {count})")
        self._children[child.name] = self._around.start(child.name)

    def _scale(self) -> None:
        """Start or end rollout workers until there are as many as wanted."""
        for name in [name for name in self._leaving if self._children[name].poll() is not None]:
            self._leaving.discard(name)
            self._stalled.pop(name, None)  # another may take its name
            self._children.pop(name).forget()
        staying = [name for name in self._workers if name not in self._leaving]
        wanted = self._around.wanted_workers(len(staying))
        if wanted == len(staying):
            return
        if wanted < len(staying):
            for name in sorted(staying, key=_number)[wanted:]:
                self._leaving.add(name)
                self._children[name].terminate()  # it gives back what it holds
        taken = {_number(name) for name in self._workers}
        free = [number for number in range(wanted + len(taken)) if number not in taken]
        for number in free[: max(0, wanted - len(staying))]:
            self._children[f"worker-{number}"] = self._around.start(f"worker-{number}")
        self._around.say(f"rollout workers: {len(staying)} -> {wanted}")

    def _tell_unplaced(self) -> None:
        """Say once of each process what it waits for."""
        waiting = {name: what for name, c in self._children.items() if (what := c.waits_for)}
        for name, what in waiting.items() - self._unplaced.items():
            self._around.say(f"{name} waits for {what}")
        self._unplaced = waiting

    def _end_gracefully(self, outcome: Outcome) -> None:
        """Learner first, buffer last; a second request to stop ends all waiting."""
        alive = self._children["buffer"].poll() is None
        save_s = self._deadlines.learner_save_s
        if outcome.status == "failed":
            save_s = self._deadlines.learner_crash_s if alive else 2.0
        learners = [name for name in self._children if kind_of(name) == "learner"]
        self._end(learners, save_s, phase="saving")  # rank 0 lets the others go
        if alive:
            self._around.close_run(outcome.reason.splitlines()[0])
        self._end(["feeder", *self._workers], self._deadlines.end_s, phase="ending")
        self._end(["buffer"], self._deadlines.end_s, phase="ending")

    def _end(self, names: list[str], deadline_s: float, *, phase: str) -> None:
        """SIGTERM, wait, SIGKILL."""
        children = [self._children[name] for name in names]
        for child in children:
            child.terminate()
        end = time.monotonic() + deadline_s
        while any(child.poll() is None for child in children):
            self._around.tick(phase)
            if time.monotonic() > end or self._stop.count >= 2:
                break
            time.sleep(POLL_S)
        kill_all(children)


def _number(name: str) -> int:
    return int(name.partition("-")[2])


def _blame(child: Child) -> tuple[bool, bool]:
    """Sorts the cause of a crash first: who only lost a peer suffers from somebody else's end."""
    error = child.error()
    return (error is not None and error.type == "PeerLost", child.poll() == 0)
