"""Who waits for what, since when and for how long: kept by each process, published for the doctor.

    with waiting("worker-0", "the engine to load version 0.7", 300):   registered
        ...                                                           published every second
                                                                      gone

`run_process` publishes to `processes/NAME.waits.json`, from a thread: a file that stops changing
means that the process is frozen, a `loop_silent_s` that grows that its event loop hangs. The words
of a wait are those of clients' errors and of `Stats.waits`, too, for example
"learner waits 12.1 s of 600 s for the batch of step 3: 30 of 32 groups READY; ...".
"""

import asyncio
import itertools
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from .filesystem import put_text
from .records import Record

PUBLISH_S = 1.0
REMARKS = 16
PEERS = "the other learner ranks"
"""What a rank waits for while the others do their share: it is not the one that hangs."""
PULSE_S = 0.5


class Wait(Record, frozen=True):
    """One wait that has not ended; ending it in time is its owner's duty."""

    owner: str
    """A process, or `group UID sample INDEX`."""
    what: str
    """Naming the process that has to deliver."""
    since_s: float
    """`time.monotonic()` seconds."""
    deadline_s: float = 0.0
    """Seconds after `since_s` at which the owner stops waiting; 0: `cluster.stall_s`."""

    def describe(self, now: float) -> str:
        """Say it in words; `overdue` marks a wait past its deadline."""
        waited = now - self.since_s
        overdue = " (overdue)" if waited > self.deadline_s else ""
        return (
            f"{self.owner} waits {waited:.1f} s of {self.deadline_s:g} s for {self.what}{overdue}"
        )


class PublishedWait(Record, frozen=True):
    """A wait as others read it: ages instead of this machine's monotonic clock."""

    owner: str
    what: str
    waited_s: float
    """Since it began, or since what it waits for last made progress."""
    deadline_s: float


class Published(Record, frozen=True):
    """`processes/NAME.waits.json`."""

    pid: int
    beat: int
    """Grows by one with each writing."""
    loop_silent_s: float
    """Since the event loop last turned."""
    waits: list[PublishedWait]
    host: str = ""
    """Where the pid is."""
    remarks: list[str] = []
    """What it did about its waits by itself, since its start; the last `REMARKS`."""
    num_remarks: int = 0
    """Of all."""


_waits: dict[Hashable, tuple[Wait, ...]] = {}
_progress: dict[str, float] = {}
_pulse_s = [0.0]
_keys = itertools.count()
_remarks: deque[str] = deque(maxlen=REMARKS)
_num_remarks = [0]


def put(key: Hashable, *waits: Wait) -> None:
    """Register waits under a key, in place of those that were there; none: remove them."""
    if waits:
        _waits[key] = waits
    else:
        _waits.pop(key, None)


@contextmanager
def waiting(owner: str, what: str, deadline_s: float = 0.0) -> Iterator[None]:
    """Register a wait while inside."""
    key = next(_keys)
    put(key, Wait(owner=owner, what=what, since_s=time.monotonic(), deadline_s=deadline_s))
    try:
        yield
    finally:
        put(key)


def progressed(what: str) -> None:
    """Who waits for `what` is not stalled: it did something just now."""
    _progress[what] = time.monotonic()


def remark(line: str) -> None:
    """Have the supervisor say what this process did about a wait that would not end."""
    _remarks.append(line)
    _num_remarks[0] += 1


def published(beat: int, now: float) -> Published:
    """What this process waits for."""
    waits = [
        PublishedWait(
            owner=wait.owner,
            what=wait.what,
            waited_s=round(now - max(wait.since_s, _progress.get(wait.what, 0.0)), 1),
            deadline_s=wait.deadline_s,
        )
        for each in list(_waits.values())  # a copy: the event loop goes on beside this thread
        for wait in each
    ]
    silent_s = now - (_pulse_s[0] or now)
    return Published(
        pid=os.getpid(),
        beat=beat,
        loop_silent_s=round(silent_s, 1),
        waits=waits,
        host=platform.node(),
        remarks=list(_remarks),
        num_remarks=_num_remarks[0],
    )


def publish_for_ever(path: Path) -> None:
    """Start the thread that writes the file once a second."""

    def publish() -> None:
        for beat in itertools.count():
            with suppress(OSError):  # a full disk: silence says that something is wrong
                put_text(path, msgspec.json.encode(published(beat, time.monotonic())).decode())
            time.sleep(PUBLISH_S)

    threading.Thread(target=publish, name="waits", daemon=True).start()


async def pulse() -> None:
    """Runs beside a process's work, and shows that its event loop turns."""
    while True:
        _pulse_s[0] = time.monotonic()
        await asyncio.sleep(PULSE_S)


def read_published(path: Path) -> Published | None:
    """What a process published last; None when there is nothing (readable)."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Published)
    return None


def chain(waits: Iterable[PublishedWait], start: str = "learner") -> str:
    """Who waits on whom: `learner <- batch ... <- group 71 sample 3 ... <- reward math, 412 s`.

    From each wait to that of the owner it names; the longest one when an owner has several.
    """
    known = sorted(waits, key=lambda wait: -wait.waited_s)
    links, owner, seen = [start], start, {start}
    waited_s = 0.0
    while own := [wait for wait in known if wait.owner == owner]:
        # The buffer says of the learner's wait what the learner itself does not know.
        link = next((wait for wait in own if wait.what.startswith("the batch of")), own[0])
        links.append(link.what)
        waited_s = link.waited_s
        named = [wait.owner for wait in known if wait.owner in link.what and wait.owner not in seen]
        if link.what.startswith("the batch of") or (not named and owner == "learner"):
            named = ["buffer"]
        if not named:
            break
        owner = max(named, key=len)
        seen.add(owner)
    return f"{' <- '.join(links)}, {waited_s:.0f} s"
