"""Whether something grows in proportion: a line through measurements, and how far they are from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3.checks import check

LINEAR = 0.05


class Line(NamedTuple):
    """`y ≈ start + slope·x`.

    Attributes:
      slope: growth of y for one of x.
      start: y at x = 0.
      deviation: the most that a measurement is off the line, as a part of the line's growth from the least x to the largest.
    """

    slope: float
    start: float
    deviation: float

    @property
    def linear(self) -> bool:
        """Whether no measurement is off by more than `LINEAR`: 5%. A square, measured at 1, 2, 4 and 8, is off by 12%."""
        return self.deviation <= LINEAR


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fits a line by least squares.

    Args:
      x, y: three measurements or more, of two values of x or more; two points are always on a line.

    Raises:
      ValueError: fewer, or other numbers of x and y.

    >>> fit_line([1, 2, 4], [5, 7, 11])
    Line(slope=2.0, start=3.0, deviation=0.0)
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    check(x.ndim == 1 and x.shape == y.shape, f"fit_line: `x` has shape {x.shape} and `y` {y.shape}, want the same [N]")
    check(x.size >= 3, f"fit_line: {x.size} measurements, want 3 or more")
    check(np.ptp(x) > 0, f"fit_line: all of `x` are {x[0]:g}, want different ones")
    middle = x - x.mean()
    slope = float(middle @ (y - y.mean()) / (middle @ middle))
    start = float(y.mean() - slope * x.mean())
    off = np.max(np.abs(y - (start + slope * x)))
    growth = abs(slope) * float(np.ptp(x))
    noise = 1e-12 * float(np.max(np.abs(y)))
    return Line(slope, start, 0.0 if off <= noise else float(off / growth) if growth > 0 else float("inf"))
