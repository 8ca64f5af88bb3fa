"""Advantages, by hand."""

import numpy as np
import pytest
from slipstream.learner.advantage import (
    generalised_advantages,
    gigpo_advantages,
    group_advantages,
    token_whitened,
    whitened,
)


def test_group_std_divides_by_the_population_deviation_plus_eps():
    # mean 0.25, population std sqrt(3) / 4 = 0.4330127
    got = group_advantages([1.0, 0.0, 0.0, 0.0], "group_std")
    std = 3**0.5 / 4
    np.testing.assert_allclose(got, [0.75 / (std + 1e-6), *[-0.25 / (std + 1e-6)] * 3], rtol=1e-15)


def test_group_mean_only_centres():
    np.testing.assert_array_equal(group_advantages([3.0, 1.0], "group_mean"), [1.0, -1.0])


def test_a_failed_reward_counts_nowhere_and_gets_zero():
    got = group_advantages([1.0, None, 0.0], "group_mean")
    np.testing.assert_array_equal(got, [0.5, 0.0, -0.5])


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, None], [None, None], [2.0, 2.0]])
def test_without_two_different_rewards_there_is_no_signal(rewards):
    assert not group_advantages(rewards, "group_std").any()


def test_rewards_are_whitened_over_the_tokens_they_are_of():
    # 8 tokens of scored samples: 1, 0, 0, 0, 2, 2, 2, 4; mean 11 / 8, squares 13.875, over 7
    rewards, tokens = [[1.0, 0.0, 0.0], [2.0, None, 4.0]], [[1, 2, 1], [3, 9, 1]]
    first, second = token_whitened(rewards, tokens)
    std = (13.875 / 7) ** 0.5  # 1.408
    np.testing.assert_allclose(first, np.array([-3, -11, -11]) / 8 / std, rtol=1e-8)
    np.testing.assert_allclose(second, np.array([5, 0, 21]) / 8 / std, rtol=1e-8)
    # The same as PPO's advantages of a critic that expects nothing.
    scored = [(1.0, 1), (0.0, 2), (0.0, 1), (2.0, 3), (4.0, 1)]
    raw = [generalised_advantages(r, np.zeros(n), discount=1, decay=1) for r, n in scored]
    white = whitened(raw, [np.ones(n, dtype=bool) for _, n in scored])
    np.testing.assert_allclose([*first, second[0], second[2]], [w[0] for w in white], rtol=1e-12)


@pytest.mark.parametrize("rewards", [[[]], [[None, None]], [[1.0, None]], [[2.0, 2.0]]])
def test_rewards_without_a_difference_are_whitened_to_nothing(rewards):
    tokens = [[1] * len(rewards_G) for rewards_G in rewards]
    assert not np.any(token_whitened(rewards, tokens))


def gigpo(returns, rewards, anchors, discount=0.5, step_weight=2.0):
    return gigpo_advantages(
        returns, rewards, anchors, kind="group_mean", discount=discount, step_weight=step_weight
    )


def test_gigpo_adds_to_the_episode_what_a_turn_is_better_than_its_siblings_in_the_same_state():
    # Returns to go at state a: 0 + 1/2 and 0; at b one alone; "" is like no other state.
    first, second = gigpo([1.0, 0.0], [[0.0, 1.0], [0.0, 0.0]], [["a", "b"], ["a", ""]])
    np.testing.assert_array_equal(first, [0.5 + 2 * 0.25, 0.5])
    np.testing.assert_array_equal(second, [-0.5 - 2 * 0.25, -0.5])


def test_gigpo_counts_a_state_met_twice_in_one_episode_and_no_episode_without_a_score():
    anchors = [["a", "a"], ["a"], ["a"]]
    first, second, lost = gigpo([1.0, 0.0, None], [[0, 1.0], [0.0], [9.0]], anchors)
    mean = (0.5 + 1.0 + 0.0) / 3
    np.testing.assert_allclose(first, [0.5 + 2 * (0.5 - mean), 0.5 + 2 * (1.0 - mean)])
    np.testing.assert_allclose(second, [-0.5 - 2 * mean])
    np.testing.assert_array_equal(lost, [0.0])
    plain = gigpo([1.0, 0.0], [[1.0], [0.0]], [["x"], ["x"]], step_weight=0.0)
    np.testing.assert_array_equal(plain, [[0.5], [-0.5]])
