"""Who waits for what, since when and for how long: the register behind "nothing hangs silently".

Each process keeps its own; the buffer service adds its clients' parked requests to its own and
shows them in `Stats.waits`. Example of a line: "learner waits 12.1 s of 600 s for 32 groups".
"""

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .records import Record

_register: dict[int, "Wait"] = {}
_numbers = itertools.count()


class Wait(Record, frozen=True):
    """One wait that has not ended."""

    owner: str
    what: str
    since_s: float
    """`time.monotonic()` seconds."""
    deadline_s: float
    """Seconds after `since_s` at which the owner stops waiting."""

    def describe(self, now: float) -> str:
        """Say it in words; `overdue` marks a wait past its deadline."""
        waited = now - self.since_s
        overdue = " (overdue)" if waited > self.deadline_s else ""
        return (
            f"{self.owner} waits {waited:.1f} s of {self.deadline_s:g} s for {self.what}{overdue}"
        )


@asynccontextmanager
async def waiting(owner: str, what: str, deadline_s: float) -> AsyncIterator[Wait]:
    """Register a wait for as long as the body runs; ending it in time is the body's duty.

    Args:
        owner: the process or task that waits, as a display should name it.
        what: what it waits for, naming the process that has to deliver.
        deadline_s: seconds after which the body gives up.
    """
    number = next(_numbers)
    wait = Wait(owner=owner, what=what, since_s=time.monotonic(), deadline_s=deadline_s)
    _register[number] = wait
    try:
        yield wait
    finally:
        del _register[number]


def current() -> list[Wait]:
    """All waits of this process, the longest first."""
    return sorted(_register.values(), key=lambda wait: wait.since_s)


def describe(now: float | None = None) -> list[str]:
    """The same in words."""
    moment = time.monotonic() if now is None else now
    return [wait.describe(moment) for wait in current()]
