"""How the paper fine-tunes, as data."""

import math

import pytest

from dsv3.train.schedule import curve_at
from dsv3.train.schedule_paper import PAPER_SFT, FineTuning


def test_the_paper():
    """Section 5.1: two epochs, a cosine from 5e-6 down to 1e-6."""
    assert PAPER_SFT == FineTuning(epochs=2.0, first=5e-6, last=1e-6)
    curve = PAPER_SFT.learning_rate(1000)
    for tokens in (0, 1, 250, 500, 999, 1000, 5000):
        want = 1e-6 + 4e-6 * (1 + math.cos(math.pi * min(tokens, 1000) / 1000)) / 2
        assert curve_at(curve, tokens) == pytest.approx(want, rel=1e-9), tokens


def test_a_warm_up_comes_first():
    curve = FineTuning(1.0, first=4.0, last=1.0).learning_rate(900, warmup_tokens=100)
    found = [curve_at(curve, tokens) for tokens in (0, 25, 100, 500, 900)]
    assert found == pytest.approx([0.0, 1.0, 4.0, 2.5, 1.0], rel=1e-9)
