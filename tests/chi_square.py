"""Whether counts follow a distribution: Pearson's test, with the keys of all draws fixed, so that a test never wavers."""

from __future__ import annotations

import numpy as np

_Z = 4.0  # one right test in 30,000 would fail, were the keys not fixed


def assert_follows(counts, probs) -> None:
    """Asserts that counts `[..., n]` were drawn from probabilities `[..., n]`, with at least one draw in each row."""
    counts, probs = np.asarray(counts, np.float64), np.asarray(probs, np.float64)
    assert counts.shape == probs.shape
    assert not counts[probs == 0].any(), "an outcome of probability 0 was drawn"
    expected = probs * counts.sum(-1, keepdims=True)
    likely = expected >= 5
    rest, rest_expected = (np.where(likely, 0, x).sum() for x in (counts, expected))
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    if rest_expected >= 5:
        statistic += (rest - rest_expected) ** 2 / rest_expected
    freedom = max(int(likely.sum()) - counts[..., 0].size, 1)
    # Wilson and Hilferty: the cube root of a chi-square variable is nearly normal.
    limit = freedom * (1 - 2 / (9 * freedom) + _Z * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic <= limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, at most {limit:.1f}"
