"""Advantages, by hand."""

import numpy as np
import pytest
from slipstream.learner.advantage import group_advantages


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
