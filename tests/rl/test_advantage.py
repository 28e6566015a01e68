"""Advantages within a group against NumPy in float64, and what must give zero."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.rl.advantage import STDS, group_advantages, saturated_groups
from tests.compare import SWEEP, assert_close, normal

DDOF = {"population": 0, "sample": 1}


def oracle(rewards, std, eps):
    rewards = rewards.astype(np.float64)
    apart = rewards - rewards.mean(1, keepdims=True)
    return apart if std == "none" else apart / (rewards.std(1, ddof=DDOF[std], keepdims=True) + eps)


@SWEEP
@given(st.integers(1, 5), st.integers(2, 9), st.sampled_from(STDS), st.sampled_from([0.0, 1e-6, 0.1]))
def test_matches_the_formula(groups, size, std, eps):
    rewards = normal(size, groups, size)
    # Rewards of size 1 whose deviation may be small: a few roundings over it.
    assert_close(group_advantages(rewards, std=std, eps=eps), oracle(rewards, std, eps), 1e-5)


def test_cases_by_hand():
    """Two of four samples are right: mean 1/2, deviation 1/2 with ddof 0, sqrt(1/3) with ddof 1."""
    rewards = [[1.0, 0.0, 0.0, 1.0]]
    for std, want in (("population", 1.0), ("sample", 0.5 / np.sqrt(1 / 3)), ("none", 0.5)):
        assert_close(group_advantages(rewards, std=std, eps=0.0), [[want, -want, -want, want]])
    assert_close(group_advantages(rewards, std="sample", eps=1e-4), [[0.5 / (np.sqrt(1 / 3) + 1e-4)] * 4] * np.sign(
        [[1, -1, -1, 1]]))  # fmt: skip


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_rewards_of_any_size_have_a_deviation(size):
    """Also those whose squares float32 does not have."""
    rewards = size * np.array([[3.0, 0.0, 0.0, 1.0]])
    for std in ("population", "sample"):
        assert_close(group_advantages(rewards, std=std, eps=0.0), oracle(rewards, std, 0.0), 1e-6)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_group_of_equal_rewards_gives_exact_zeros(std, eps):
    """Also where the mean of equal numbers is not that number, as of seven times 0.1 in float32."""
    rewards = np.array([[0.1] * 7, [1 / 3] * 7, [1e8] * 7, [1, 0, 1, 0, 1, 0, 1]], np.float32)
    got = group_advantages(rewards, std=std, eps=eps).numpy()
    np.testing.assert_array_equal(got[:3], np.zeros([3, 7]))
    assert np.isfinite(got).all() and (got[3] != 0).all()
    np.testing.assert_array_equal(saturated_groups(rewards), [True, True, True, False])


@pytest.mark.parametrize(
    "rewards, how, message",
    [
        ([[1.0], [2.0]], {}, "`rewards` has groups of 1, want at least 2 samples"),
        ([[1.0, 0.0], [0.0, np.nan]], {}, "`rewards` of group 1, sample 1 is nan, want finite"),
        ([[1.0, np.inf]], {}, "`rewards` of group 0, sample 1 is inf"),
        ([1.0, 0.0], {}, r"`rewards` has shape \(2,\), want \(\?, \?\) \[B, G\]"),
        ([[1.0, 0.0]], {"std": "batch"}, "`std` is 'batch', want one of 'population', 'sample', 'none'"),
        ([[1.0, 0.0]], {"eps": -1.0}, "`eps` is -1.0, want at least 0"),
    ],
)
def test_bad_input_is_one_clear_line(rewards, how, message):
    with pytest.raises(ValueError, match=f"group_advantages: {message}") as caught:
        group_advantages(np.array(rewards, np.float32), **how)
    assert "\n" not in str(caught.value)
