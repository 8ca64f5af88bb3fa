"""Samples in flight follow the memory for keys: an engine that preempts gets fewer, one with room
more. The engine here is a paged cache with vLLM's rule: out of blocks, the newest starts again."""

from collections import deque

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from slipstream.rollout.load import FIRST, InFlight

MOST = 256
BLOCKS = 2000
BLOCK_TOKENS = 16
OBSERVE_STEPS = 25
PREFILL_TOKENS = 64
"""Computed in the time of one decoded token: what a preempted sample costs to bring back."""


class Paged:
    """Samples hold ceil(length / 16) blocks; each step every running one grows by a token."""

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = deque(lengths.tolist())
        self.running: list[list[int]] = []  # [length now, length in the end], the oldest first
        self.waiting: deque[list[int]] = deque()
        self.preemptions = self.finished_tokens = self.finished = 0
        self.time = 0.0

    def used(self) -> int:
        return sum(-(-length // BLOCK_TOKENS) for length, _ in self.running)

    def step(self, limit: int) -> None:
        while len(self.running) + len(self.waiting) < limit:
            self.waiting.append([1, self._lengths.popleft()])
        computed = 0
        while self.waiting and self.used() + -(-self.waiting[0][0] // BLOCK_TOKENS) < BLOCKS:
            computed += self.waiting[0][0]
            self.running.append(self.waiting.popleft())
        for sample in self.running:
            sample[0] += 1
        while self.used() > BLOCKS:
            self.waiting.appendleft(self.running.pop())
            self.preemptions += 1
        self.time += 1 + computed / PREFILL_TOKENS
        ended = [end for now, end in self.running if now >= end]
        self.finished += len(ended)
        self.finished_tokens += sum(ended)
        self.running = [sample for sample in self.running if sample[0] < sample[1]]


def drive(lengths: np.ndarray, steps: int, static: int = 0) -> tuple[Paged, list[int]]:
    """An engine under the controller, or under a limit that does not move; the limits."""
    engine, control, limits = Paged(lengths), InFlight(MOST), []
    for step in range(steps):
        engine.step(static or control.limit)
        if step % OBSERVE_STEPS == 0:
            control.observe(
                kv_share=engine.used() / BLOCKS, preemptions=engine.preemptions,
                running=len(engine.running), queued=len(engine.waiting), finished=engine.finished,
            )  # fmt: skip
            limits.append(control.limit)
    return engine, limits


@pytest.mark.parametrize("mean_tokens", [200, 800])
def test_an_engine_is_full_and_does_not_thrash(mean_tokens):
    """Against the best of the limits that do not move, found afterwards, and against none."""
    lengths = 1 + np.random.default_rng(0).exponential(mean_tokens, 20_000).astype(int)
    ours, unlimited, *others = (
        drive(lengths, 8000, static=n)[0] for n in (0, MOST, 24, 32, 40, 96, 128, 160)
    )

    def rate(engine: Paged) -> float:
        return engine.finished_tokens / engine.time

    assert rate(ours) > 0.9 * max(map(rate, others))
    assert rate(ours) > rate(unlimited)
    assert 0 < 2 * ours.preemptions < unlimited.preemptions


def test_with_room_for_all_the_limit_goes_to_the_most_and_stays():
    lengths = 1 + np.random.default_rng(0).exponential(60, 40_000).astype(int)
    engine, limits = drive(lengths, 3000)
    assert engine.preemptions == 0
    assert FIRST <= limits[0] < FIRST + 8
    assert set(limits[20:]) == {MOST}


def test_the_limit_follows_lengths_that_grow_and_shrink_again():
    random = np.random.default_rng(1)
    phases = [1 + random.exponential(mean, n).astype(int)
              for mean, n in ((60, 4000), (1500, 200), (60, 90_000))]  # fmt: skip
    _, limits = drive(np.concatenate(phases), 24_000)
    highest, lowest = limits.index(MOST), limits.index(min(limits))
    assert highest < lowest
    assert min(limits) < MOST / 4
    assert max(limits[lowest:]) > 4 * min(limits)


@given(
    st.integers(1, 300),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 3), st.integers(0, 400), st.integers(0, 90)),
        max_size=80,
    ),
)
@example(48, [(0.0, 1, 0, 0), (0.0, 0, 0, 1)])  # from one sample in flight
def test_the_limit_stays_between_one_and_the_most_and_falls_once_for_one_overload(most, seen):
    control, preemptions, finished = InFlight(most), 0, 0
    for kv_share, more, running, done in seen:
        before, preemptions, finished = control.limit, preemptions + more, finished + done
        observed = {"kv_share": kv_share, "running": running, "queued": 0, "finished": finished}
        control.observe(preemptions=preemptions, **observed)
        assert 1 <= control.limit <= most
        assert control.limit - before <= done + 1
        low = control.limit
        if more and running > low:
            preemptions += 1
            control.observe(preemptions=preemptions, **observed)
            assert control.limit == low, "they are still on their way out"


def test_an_engine_that_reports_no_memory_has_all_its_rows_after_one_generation():
    control = InFlight(128)
    control.observe(kv_share=0.0, preemptions=0, running=64, queued=0, finished=64)
    assert control.limit == 128
    assert InFlight(48).limit == 48
