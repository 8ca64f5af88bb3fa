"""The registry of waits: what is published, and the chain it spells."""

import time
from contextlib import suppress
from pathlib import Path

from slipstream.buffer import waits
from slipstream.buffer.waits import PublishedWait, chain


def entry(owner: str, what: str, waited_s: float) -> PublishedWait:
    return PublishedWait(owner=owner, what=what, waited_s=waited_s, deadline_s=0.0)


def test_the_chain_goes_from_the_learner_to_whoever_everybody_waits_for():
    told = chain(
        [
            entry("learner", "the buffer service to answer TakeGroups", 3),
            entry("learner", "the batch of step 3: 125 of 128 groups READY", 400),
            entry("buffer", "group 71 sample 3 at worker-0", 412),
            entry("buffer", "group 72 sample 0 at worker-1", 5),
            entry("group 72 sample 0", "the engine of worker-1", 5),
            entry("group 71 sample 3", "reward math, pid 913", 412),
        ]
    )
    assert told == (
        "learner <- the batch of step 3: 125 of 128 groups READY <- group 71 sample 3 at worker-0 "
        "<- reward math, pid 913, 412 s"
    )


def test_a_chain_that_goes_in_a_circle_ends():
    circle = [entry("learner", "worker-0", 2), entry("worker-0", "learner", 3)]
    assert chain(circle) == "learner <- worker-0 <- learner, 3 s"


def test_a_wait_is_registered_while_it_lasts_and_however_it_ends():
    before = len(waits.published(0, time.monotonic()).waits)
    during = 0
    with suppress(ZeroDivisionError), waits.waiting("a", "b", 5.0):
        during = len(waits.published(0, time.monotonic()).waits)
        raise ZeroDivisionError
    assert during == before + 1
    assert len(waits.published(0, time.monotonic()).waits) == before


def test_progress_of_what_is_waited_for_starts_the_clock_again():
    waits.put("k", waits.Wait(owner="o", what="engine", since_s=time.monotonic() - 100))
    waits.progressed("engine")
    (found,) = [w for w in waits.published(0, time.monotonic()).waits if w.owner == "o"]
    waits.put("k")
    assert found.waited_s < 10


def test_a_file_that_is_missing_or_cut_is_no_report(tmp_path: Path):
    assert waits.read_published(tmp_path / "none") is None
    (tmp_path / "cut").write_bytes(b'{"pid": 1, "be')
    assert waits.read_published(tmp_path / "cut") is None
