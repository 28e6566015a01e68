"""Lines through measurements, and what is still called linear."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.eval.growth import LINEAR, Line, fit_line
from tests.compare import SWEEP

LENGTHS = [16, 32, 64, 128]


@SWEEP
@given(
    x=st.lists(st.integers(1, 10**6), min_size=3, max_size=6, unique=True), slope=st.integers(-99, 99).filter(bool),
    start=st.integers(-(10**9), 10**9),
)  # fmt: skip
def test_points_of_a_line(x, slope, start):
    line = fit_line(x, [start + slope * a for a in x])
    # Float64 keeps 2^-53 of the largest value, which a slope over a short range multiplies.
    room = 1e-12 * (abs(start) + abs(slope) * max(x))
    assert abs(line.slope - slope) <= 10 * room / np.ptp(x) and line.deviation <= 10 * room / abs(slope * np.ptp(x))
    assert line.linear


def test_least_squares_of_noise():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9)
    slope, start = np.polyfit(x, y, 1)
    line = fit_line(x, y)
    off = np.abs(y - start - slope * x).max() / (abs(slope) * np.ptp(x))
    np.testing.assert_allclose(line, (slope, start, off), rtol=1e-9)
    assert not line.linear


@pytest.mark.parametrize("power, linear", [(1.0, True), (1.1, True), (1.5, False), (2.0, False), (0.5, False)])
def test_what_is_linear(power, linear):
    """Memory that grows a little faster than the length passes; a square, or a root, does not."""
    assert fit_line(LENGTHS, np.power(LENGTHS, power)).linear == linear


def test_one_point_off_the_line():
    y = np.array([100.0, 200.0, 400.0, 800.0])
    y[2] += 100
    assert 0.08 < fit_line(LENGTHS, y).deviation < 0.14 and LINEAR == 0.05


def test_nothing_that_grows():
    assert fit_line([1, 2, 3], [7, 7, 7]) == Line(0.0, 7.0, 0.0)
    assert fit_line([1, 2, 3], [7, 8, 7]).deviation == float("inf")


def test_refusals():
    for x, y, message in [
        ([1, 2], [1, 2], "fit_line: 2 measurements, want 3 or more"),
        ([1, 2, 3], [1, 2], r"fit_line: `x` has shape \(3,\) and `y` \(2,\), want the same \[N\]"),
        ([5, 5, 5], [1, 2, 3], "fit_line: all of `x` are 5, want different ones"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_line(x, y)
