"""Rounding without float8 tensors, tiling anew, and counts, against quantising and dequantising."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from tensorflow.experimental import dtensor

from dsv3.ops.fp8 import (
    COLUMN_BLOCK,
    ROW_BLOCK,
    WEIGHT_BLOCK,
    Fp8Tensor,
    fp8_counts,
    fp8_dequantize,
    fp8_fake,
    fp8_quantize,
    fp8_retile,
)
from dsv3.ops.fp8_formats import FORMATS
from dsv3.parallel.mesh import make_layout, make_mesh, place
from tests.compare import SWEEP, gradients, normal
from tests.fp8_oracles import BLOCKS, MODES, NUMPY, assert_bits, quantize_oracle, spread, wide

over_blocks = pytest.mark.parametrize("block", BLOCKS, ids=str)
over_formats = pytest.mark.parametrize("fmt", FORMATS)
over_kinds = pytest.mark.parametrize("kind", ["float32", "power_of_two"])
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 127, 130]), st.sampled_from([1, 7, 128, 260]))


def back(q: Fp8Tensor, block) -> np.ndarray:
    return fp8_dequantize(*q, block=block).numpy()


# Quantising and dequantising at once


@over_blocks
@over_formats
@over_kinds
@SWEEP
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_fake_is_there_and_back(block, fmt, kind, shape, seed):
    x = wide(seed, *shape)
    want = back(fp8_quantize(x, block=block, fmt=fmt, scale_kind=kind), block)
    assert_bits(fp8_fake(x, block=block, fmt=fmt, scale_kind=kind), want)


@over_blocks
@over_formats
def test_fake_is_the_same_in_every_mode(block, fmt):
    x = wide(0, 130, 200).astype(ml_dtypes.bfloat16)
    values, scale = quantize_oracle(x.astype(np.float32), block, fmt=fmt)
    want = values * spread(scale, block, x.shape)

    def fake(x):
        return fp8_fake(x, block=block, fmt=fmt, dtype=tf.float32)

    def kernel(x):
        return fp8_fake(x, block=block, fmt=fmt, dtype=tf.float32, fuse=True)

    unknown = tf.function(kernel, autograph=False, input_signature=[tf.TensorSpec([None, 200], tf.bfloat16)])
    for way in (fake, MODES["graph"](fake), MODES["xla"](fake), kernel, MODES["graph"](kernel), unknown):
        assert_bits(way(tf.constant(x)), want)


@pytest.mark.parametrize("fuse", [False, True])
def test_fake_has_the_inputs_dtype_or_the_one_asked_for(fuse):
    x = tf.constant(wide(1, 3, 130).astype(ml_dtypes.bfloat16))
    exact = fp8_fake(x, dtype="float32")
    assert exact.dtype == tf.float32
    for got in (fp8_fake(x, fuse=fuse), fp8_fake(exact, dtype="bfloat16", fuse=fuse)):
        assert got.dtype == tf.bfloat16
    assert_bits(fp8_fake(x, fuse=fuse), tf.cast(tf.cast(exact, tf.bfloat16), tf.float32).numpy())


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fake_of_what_is_not_finite(bad, fuse):
    x = np.ones((2, 256), np.float32)
    x[0, 130] = bad
    got = np.isnan(fp8_fake(tf.constant(x), fuse=fuse))
    np.testing.assert_array_equal(got, [[False] * 128 + [True] * 128, [False] * 256])


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
def test_gradient_passes_straight_through(compiled, fuse):
    x, r = tf.constant(wide(2, 4, 130).astype(ml_dtypes.bfloat16)), normal(3, 4, 130)

    def gradient(x):
        return gradients(lambda x: tf.sin(fp8_fake(x, dtype=tf.float32, fuse=fuse)) * r, [x])[0]

    got = MODES[compiled](gradient)(x)
    want = tf.cast(tf.cos(fp8_fake(x, dtype=tf.float32)) * r, tf.bfloat16)
    assert got.dtype == tf.bfloat16
    np.testing.assert_allclose(*(tf.cast(t, tf.float32) for t in (got, want)), rtol=2.0**-7)  # one rounding to bfloat16


def test_on_a_mesh():
    """Each device quantises its own rows."""
    mesh, x = make_mesh("data:4"), wide(4, 8, 6, 200)
    layout = make_layout(mesh, ["data", None, None])
    step = tf.function(lambda x: (fp8_fake(x), *fp8_quantize(x, block=WEIGHT_BLOCK)), autograph=False)
    got = step(place(tf.constant(x), layout))
    for g, want in zip(got, step(tf.constant(x))):
        parts = [tf.cast(part, tf.float32).numpy() for part in dtensor.unpack(g)]  # gathered on the mesh, -0 would be 0
        assert_bits(np.concatenate(parts), tf.cast(want, tf.float32).numpy())


# Other tiles


@over_formats
@over_kinds
def test_retile_is_dequantised_and_quantised_again(fmt, kind):
    x = wide(5, 2, 130, 200)
    q = fp8_quantize(x, block=ROW_BLOCK, fmt=fmt, scale_kind=kind)
    values, scale = quantize_oracle(back(q, ROW_BLOCK), COLUMN_BLOCK, kind, fmt)
    for mode in MODES.values():
        got = mode(lambda v, s: fp8_retile(v, s, block=ROW_BLOCK, to=COLUMN_BLOCK, scale_kind=kind))(*q)
        assert got.values.dtype == q.values.dtype
        assert_bits(got.values, values)
        assert_bits(got.scale_inv, scale)


@over_formats
@SWEEP
@given(seed=st.integers(0, 2**31))
def test_retile_under_powers_of_two_only_loses_what_underflows(fmt, seed):
    x = wide(seed, 130, 140) * np.exp(5 * wide(seed, 130, 1).clip(-3, 3))  # rows of unlike size
    q = fp8_quantize(x, block=ROW_BLOCK, fmt=fmt, scale_kind="power_of_two")
    new = fp8_retile(*q, block=ROW_BLOCK, to=COLUMN_BLOCK, scale_kind="power_of_two")
    first, second = back(q, ROW_BLOCK), back(new, COLUMN_BLOCK)
    scale = spread(new.scale_inv.numpy(), COLUMN_BLOCK, first.shape)
    low = np.abs(first) < scale * FORMATS[fmt].min_normal
    assert_bits(second[~low], first[~low])
    assert (np.abs(second - first)[low] <= scale[low] * FORMATS[fmt].smallest / 2).all()  # exact differences
    assert (second != first).any() and low.mean() < 0.95


@over_formats
def test_retile_under_other_scales_rounds_a_second_time(fmt):
    x, of = wide(6, 130, 140), FORMATS[fmt]
    q = fp8_quantize(x, block=ROW_BLOCK, fmt=fmt)
    new = fp8_retile(*q, block=ROW_BLOCK, to=COLUMN_BLOCK)
    first, second = back(q, ROW_BLOCK), back(new, COLUMN_BLOCK)
    scale = spread(new.scale_inv.numpy(), COLUMN_BLOCK, first.shape)
    bound = np.maximum(np.abs(first) * 2.0 ** -(of.mantissa_bits + 1), scale * of.smallest / 2)
    error = np.abs(second - first) / bound
    assert 0.85 < error.max() <= 1 + 2.0**-15  # as in test_fp8.py: float32 roundings beside half a step
    normal = np.abs(first) >= scale * of.min_normal
    assert (second != first)[normal].mean() > 0.5


# Counts


@over_blocks
@over_formats
@over_kinds
@SWEEP
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_own_scales_never_saturate(block, fmt, kind, shape, seed):
    x = wide(seed, *shape)
    x[..., 0] = 0
    q = fp8_quantize(x, block=block, fmt=fmt, scale_kind=kind)
    got = fp8_counts(x, q, block=block)
    lost = (x != 0) & (tf.cast(q.values, tf.float32).numpy() == 0)
    assert [int(n) for n in got] == [0, lost.sum(), 0]
    assert all(n.dtype == tf.int64 and n.shape == () for n in got)


@pytest.mark.parametrize("mode", MODES)
@over_formats
def test_counts_of_given_scales(fmt, mode):
    of, s = FORMATS[fmt], 0.25
    top, least = of.max * s, of.smallest * s / 2  # the largest that fits, and the largest that becomes 0
    x = [top, -top, 1.001 * top, -3e38, least, 1.001 * least, -1e-9 * least, 0.0, -0.0, np.nan, np.inf, -np.inf, 1.0]
    x = tf.constant([x], tf.float32)

    def counts(x):
        return fp8_counts(x, fp8_quantize(x, fmt=fmt, scale_inv=[[s]]))

    assert [int(n) for n in MODES[mode](counts)(x)] == [2, 2, 3]


def test_counts_of_a_block_with_an_infinity():
    """Its scale is infinite: what is finite in it became 0."""
    x = tf.constant([[np.inf, 1.0, 0.0]])
    assert [int(n) for n in fp8_counts(x, fp8_quantize(x))] == [0, 1, 1]


VALUES, SCALES = np.zeros((200, 130), NUMPY["e4m3"]), np.ones((200, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp8_fake(np.ones(3, np.float32)), r"fp8_fake: `x` has shape \(3,\), want \[..., M, N\]"),
        (lambda: fp8_fake([[1.0]], block=(1, 0)), "fp8_fake: `block` is"),
        (lambda: fp8_fake([[1.0]], fmt="e8"), "fp8_fake: `fmt` is 'e8'"),
        (lambda: fp8_fake([[1.0]], scale_kind="e8"), "fp8_fake: `scale_kind` is 'e8'"),
        (lambda: fp8_fake([[1]]), "fp8_fake: `x` has dtype int32"),
        (lambda: fp8_retile(VALUES, SCALES[:9]), r"fp8_retile: `scale_inv` has shape \(9, 2\), want \(200, 2\)"),
        (lambda: fp8_retile(VALUES, SCALES, to=(1,)), r"fp8_retile: `to` is \(1,\), want two positive integers"),
        (lambda: fp8_retile(VALUES, SCALES, scale_kind="e8"), "fp8_retile: `scale_kind` is 'e8'"),
        (lambda: fp8_retile(SCALES, SCALES), "fp8_retile: `values` has dtype float32, want"),
        (
            lambda: fp8_counts(VALUES[:9].astype(np.float32), Fp8Tensor(VALUES, SCALES), block=ROW_BLOCK),
            r"fp8_counts: `x` has shape \(9, 130\), want \(200, 130\)",
        ),
        (lambda: fp8_counts(SCALES, Fp8Tensor(VALUES, SCALES)), r"fp8_counts: `quantized.scale_inv` has shape \(200, 2\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
