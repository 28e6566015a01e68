"""Rotary positions and YaRN."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.rope import RopeTable, rope_apply, rope_frequencies, rope_table, yarn_mscale, yarn_range
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, error, normal, to_numpy

ORDERS = ("interleaved", "halves")
# An angle of up to 100 radians is rounded to float32 before its cosine is taken: 100·2^-24 = 6e-6 in cos and sin.
ANGLE_TOLERANCE = 1e-5


@SWEEP
@given(
    batch=st.integers(1, 3), length=st.integers(1, 5), heads=st.sampled_from([0, 1, 3]), half=st.integers(1, 5),
    pairs=st.sampled_from(ORDERS), output=st.sampled_from(ORDERS), shared=st.booleans(), start=st.integers(0, 90),
)  # fmt: skip
def test_matches_complex_rotation(batch, length, heads, half, pairs, output, shared, start):
    x = normal(0, batch, length, *([heads] if heads else []), 2 * half)
    positions = start + np.arange(length)
    if not shared:
        positions = positions + np.arange(batch)[:, None]
    freqs = oracles.frequencies(2 * half, 100.0)
    want = oracles.rope(x.astype(np.float64), positions, freqs, pairs=pairs, output=output, factor=1.5)
    table = rope_table(positions, rope_frequencies(2 * half, 100.0), factor=1.5)
    assert table.cos.shape[0] == (1 if shared else batch)
    assert_close(rope_apply(x, table, pairs=pairs, output=output), want, ANGLE_TOLERANCE)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("pairs", ORDERS)
@pytest.mark.parametrize("output", ORDERS)
def test_gradient(pairs, output, fuse):
    table = rope_table(tf.range(3), rope_frequencies(6))
    check_gradient(
        lambda x: rope_apply(x, table, pairs=pairs, output=output, fuse=fuse),
        lambda x: oracles.rope(x, np.arange(3), oracles.frequencies(6, 1e4), pairs=pairs, output=output),
        [normal(0, 2, 3, 2, 6)],
    )


@SWEEP
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 50), st.sampled_from(ORDERS), st.sampled_from(ORDERS))
def test_scores_depend_on_distance_only(m, n, shift, pairs, output):
    q, k = normal(0, 1, 1, 8), normal(1, 1, 1, 8)
    freqs = rope_frequencies(8, 50.0)

    def score(q_at, k_at):
        rotated = [rope_apply(x, rope_table([p], freqs), pairs=pairs, output=output) for x, p in ((q, q_at), (k, k_at))]
        return float(tf.reduce_sum(rotated[0] * rotated[1]))

    # Both angles are rounded, each to 90·2^-24, and |q|·|k| is about 8.
    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=2e-4)


def test_orders_are_permutations_of_each_other():
    x, table = normal(0, 2, 3, 8), rope_table(tf.range(3), rope_frequencies(8))
    evens_odds = [0, 2, 4, 6, 1, 3, 5, 7]
    plain = to_numpy(rope_apply(x, table))
    np.testing.assert_array_equal(rope_apply(x, table, output="halves"), plain[..., evens_odds])
    np.testing.assert_array_equal(rope_apply(x[..., evens_odds], table, pairs="halves"), plain)


def test_position_zero_and_norms_are_kept():
    x = normal(0, 1, 4, 8)
    y = to_numpy(rope_apply(x, rope_table(tf.range(4), rope_frequencies(8))))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    assert_close(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1))


@SWEEP
@given(
    half=st.integers(1, 40),
    theta=st.sampled_from([100.0, 10_000.0, 1e6]),
    factor=st.sampled_from([0.5, 1.0, 4.0, 40.0]),
    original=st.sampled_from([16, 4096, 32_768]),
    betas=st.sampled_from([(32.0, 1.0), (4.0, 2.0), (1000.0, 0.5)]),
)
def test_yarn_frequencies(half, theta, factor, original, betas):
    got = rope_frequencies(
        2 * half, theta, factor=factor, original_length=original, beta_fast=betas[0], beta_slow=betas[1]
    )
    want = oracles.yarn_frequencies(2 * half, theta, factor, original, *betas)
    np.testing.assert_allclose(got, want, rtol=1.2e-6)  # float32 steps as torch's: (ln θ + 5) · 2⁻²⁴, ln θ ≤ 13.9


def test_published_yarn_settings():
    assert yarn_range(64, 10_000.0, 4096) == (10, 23)
    plain, stretched = rope_frequencies(64), rope_frequencies(64, factor=40.0)
    np.testing.assert_array_equal(stretched[:11], plain[:11])
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40.0, rtol=2e-7)  # each was rounded once
    assert (np.diff(stretched / plain) <= 1e-8).all()
    assert yarn_mscale(40.0) == pytest.approx(0.1 * math.log(40.0) + 1)
    assert yarn_mscale(1.0) == yarn_mscale(0.5) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.0707 * math.log(40.0) + 1)


def test_bfloat16_rounds_cosine_and_sine_first():
    x, table = tf.cast(normal(0, 1, 5, 4), tf.bfloat16), rope_table(tf.range(5), rope_frequencies(4))
    got = rope_apply(x, table)
    rounded = RopeTable(*(tf.cast(tf.cast(t, tf.bfloat16), tf.float32) for t in table))
    assert got.dtype == tf.bfloat16
    assert_close(got, rope_apply(tf.cast(x, tf.float32), rounded), 2**-6)  # three roundings to 2^-9
    exact = rope_apply(tf.cast(x, tf.float32), table)
    assert error(got, exact) > error(rope_apply(tf.cast(x, tf.float32), rounded), exact) > 1e-3


def test_wrong_input_is_named():
    freqs = rope_frequencies(4)
    table = rope_table(tf.range(3), freqs)
    for shape, message in [
        ([2, 3], r"rope_apply: `x` has rank 2, want 3 \[B, T, R\] or 4 \[B, T, H, R\]"),
        ([2, 3, 6], r"rope_apply: `x` has last dim 6, want 4 \[R\]"),
        ([2, 5, 4], r"rope_apply: `table` is of 1 rows and 3 positions, want 2 or 1 and 5 \[B or 1, T\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            rope_apply(tf.zeros(shape), table)
    one = rope_table(tf.range(1), freqs)
    with pytest.raises(ValueError, match="rope_apply: `table` is of 1 rows and 1 positions"):
        rope_apply(tf.zeros([2, 3, 4]), one)
    with pytest.raises(ValueError, match="rope_frequencies: `dim` is 5, want an even number > 0"):
        rope_frequencies(5)
    with pytest.raises(ValueError, match="rope_apply: `pairs` is 'odd', want one of"):
        rope_apply(tf.zeros([2, 3, 4]), table, pairs="odd")
