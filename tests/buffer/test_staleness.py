"""The law's arithmetic, against numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slipstream.buffer.records import TrainingSample, Version, VersionSpan
from slipstream.buffer.staleness import (
    LivePath,
    admits,
    capacity,
    first_late,
    judge,
    lag,
    proof_line,
    token_bound,
    would_exceed,
)

from .make import trajectory, version


def spans(*parts: tuple[int, int]) -> list[VersionSpan]:
    """(step, length) pairs as spans."""
    return [VersionSpan(version=version(step), length=length) for step, length in parts]


@pytest.mark.parametrize(
    ("step", "bound", "prompts", "expected"),
    [
        (0, 0, 32, 32),  # synchronous: the first batch and no more
        (0, 1, 32, 64),
        (4, 1, 32, 192),
        (0, 0.5, 32, 48),
        (2, 0.5, 3, 10),  # floor(3.5 * 3)
        (0, 0.1, 10, 11),
        (0, 0.3, 10, 13),  # exactly, though 0.3 is a little less than that in binary
        (6, 2.25, 4, 37),
    ],
)
def test_capacity_is_the_floor_of_the_product(
    step: int, bound: float, prompts: int, expected: int
) -> None:
    assert capacity(step, bound, prompts) == expected
    assert admits(expected - 1, step, bound, prompts)
    assert not admits(expected, step, bound, prompts)


@pytest.mark.parametrize(("bound", "expected"), [(0, 0), (0.5, 1), (1, 1), (1.5, 2), (4, 4)])
def test_a_fraction_of_the_bound_counts_whole_per_token(bound: float, expected: int) -> None:
    assert token_bound(bound) == expected


def test_would_exceed_looks_at_the_step_after() -> None:
    assert not would_exceed(oldest_step=3, step=4, max_staleness_steps=1)  # lag 1 at step 5
    assert would_exceed(oldest_step=3, step=5, max_staleness_steps=1)  # lag 2 at step 6
    assert would_exceed(oldest_step=3, step=4, max_staleness_steps=0)


@pytest.mark.parametrize(
    ("remaining", "expected"),
    [
        ({}, None),
        ({4: 2}, None),  # v = 4, S = 1: step 6 is the last, and step 5 is being taken
        ({4: 3}, 4),  # three of them, but one step of two
        ({3: 1}, 3),  # no step is left for v = 3
        ({4: 2, 5: 2}, None),
        ({4: 2, 5: 3}, 5),  # v <= 5: five groups, steps 6 and 7 train four
    ],
)
def test_first_late_counts_what_the_steps_to_come_can_train(
    remaining: dict[int, int], expected: int | None
) -> None:
    assert first_late(remaining, step=5, max_staleness_steps=1, prompts_per_step=2) == expected


PARENTS = {1: (0, 10), 2: (1, 12), 3: (0, 5)}


@pytest.mark.parametrize(
    ("branch", "name", "expected"),
    [
        (0, (0, 99), True),
        (1, (0, 10), True),
        (1, (0, 11), False),
        (1, (1, 11), True),
        (2, (1, 12), True),
        (2, (1, 13), False),
        (2, (0, 10), True),
        (2, (0, 11), False),
        (3, (0, 5), True),
        (3, (0, 6), False),
        (3, (1, 11), False),  # a sibling
    ],
)
def test_the_path_is_what_the_branch_descends_from(
    branch: int, name: tuple[int, int], expected: bool
) -> None:
    assert (Version(branch=name[0], step=name[1]) in LivePath(branch, PARENTS)) is expected


def test_a_branch_that_left_before_its_parent_began_cuts_the_grandparent_too() -> None:
    path = LivePath(2, {1: (0, 10), 2: (1, 7)})
    assert Version(branch=0, step=7) in path
    assert Version(branch=0, step=8) not in path


def test_an_orphan_with_an_equal_digest_is_on_the_path() -> None:
    path = LivePath(1, PARENTS)
    orphan = Version(branch=0, step=11, digest="same weights")
    assert lag(orphan, 12, path) is None
    path.publish(Version(branch=1, step=11, digest="same weights"))
    assert lag(orphan, 12, path) == 0
    assert Version(branch=0, step=11, digest="other weights") not in path
    assert Version(branch=0, step=11) not in path


def test_a_name_with_a_wrong_digest_is_off_the_path() -> None:
    path = LivePath(0)
    path.publish(Version(branch=0, step=3, digest="published"))
    assert Version(branch=0, step=3, digest="half updated") not in path
    assert Version(branch=0, step=3, digest="published") in path


def test_an_ancestry_with_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="ancestor"):
        LivePath(1, {1: (2, 3), 2: (1, 3)})


@pytest.mark.parametrize(
    ("parts", "stale_prefix", "max_lag", "stale_tokens"),
    [
        ([(4, 5)], 0, 1, 0),  # step 6 holds version 5
        ([(3, 5)], 5, 2, 5),
        ([(3, 5), (4, 2)], 5, 2, 5),
        ([(4, 2), (3, 1), (5, 4)], 3, 2, 1),  # up to and including the last stale one
        ([(6, 2)], 2, 0, 2),  # a version from the future is as wrong as an old one
        ([], 0, 0, 0),
        ([(0, 0), (5, 3)], 0, 0, 0),  # an empty span wrote nothing
    ],
)
def test_judge_finds_the_stale_prefix(
    parts: list[tuple[int, int]], stale_prefix: int, max_lag: int, stale_tokens: int
) -> None:
    verdict = judge(spans(*parts), 6, 1, LivePath(0))
    assert verdict.stale_prefix == stale_prefix
    assert verdict.max_lag == max_lag
    assert verdict.stale_tokens == stale_tokens
    assert verdict.orphaned_tokens == 0
    assert verdict.all_stale == (0 < stale_prefix == sum(length for _, length in parts))


def test_judge_counts_orphans_as_stale_prefix() -> None:
    orphan = VersionSpan(version=version(11, 0), length=3)
    live = VersionSpan(version=version(11, 1), length=2)
    verdict = judge([orphan, live], 12, 1, LivePath(1, PARENTS))
    assert (verdict.stale_prefix, verdict.orphaned_tokens) == (3, 3)


def test_the_proof_line_counts_tokens_with_weight() -> None:
    samples = [
        TrainingSample(trajectory=trajectory(0, 0, (3, 3, 4, 5)), trained=True, stale_prefix=2),
        TrainingSample(trajectory=trajectory(0, 1, (5, 5)), trained=True),
        TrainingSample(trajectory=trajectory(1, 0, (1, 1)), trained=False, drop_reason="stale"),
    ]
    proof = proof_line(samples, step=6, max_staleness_steps=1, path=LivePath(0))
    assert proof.lag_counts == {0: 3, 1: 1}
    assert (proof.max_lag, proof.violations, proof.orphaned_tokens) == (1, 0, 0)
    assert (proof.trained_tokens, proof.trimmed_tokens) == (4, 2)
    assert (proof.trained_trajectories, proof.mixed_trajectories) == (2, 1)


def test_the_proof_line_reports_what_judge_would_have_stopped() -> None:
    samples = [
        TrainingSample(trajectory=trajectory(0, 0, (3, 5)), trained=True),
        TrainingSample(trajectory=trajectory(0, 1, (11, 6), branch=7), trained=True),
    ]
    proof = proof_line(samples, step=6, max_staleness_steps=1, path=LivePath(0))
    assert proof.max_lag == 2
    assert proof.orphaned_tokens == 2
    assert proof.violations == 3


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6),
    st.integers(1, 10),
    st.integers(0, 3),
)
def test_after_the_stale_prefix_every_token_obeys_the_law(
    parts: list[tuple[int, int]], step: int, bound: int
) -> None:
    prefix = judge(spans(*parts), step, bound, LivePath(0)).stale_prefix
    lags = [step - 1 - v for v, length in parts for _ in range(length)]
    assert all(0 <= age <= bound for age in lags[prefix:])
    assert not prefix or not 0 <= lags[prefix - 1] <= bound  # and it is the shortest such prefix
