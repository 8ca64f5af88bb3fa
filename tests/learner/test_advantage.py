"""Advantages, by hand."""

import numpy as np
import pytest
from slipstream.learner.advantage import gigpo_advantages, group_advantages


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
