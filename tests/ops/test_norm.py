"""RMSNorm."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.norm import rms_norm
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, gradients, normal, to_numpy

ROUNDINGS = ("before_weight", "after_weight")


@SWEEP
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    width=st.sampled_from([1, 2, 7, 33, 64]),
    eps=st.sampled_from([1e-6, 1e-2]),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_matches_the_formula(lead, width, eps, scale):
    x, weight = normal(0, *lead, width, scale=scale), normal(1, width)
    want = oracles.rms_norm(x.astype(np.float64), weight, eps)
    for rounding in ROUNDINGS:
        assert_close(rms_norm(x, weight, eps=eps, rounding=rounding), want)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gradient(rounding):
    check_gradient(
        lambda x, w: rms_norm(x, w, eps=1e-3, rounding=rounding),
        lambda x, w: oracles.rms_norm(x, w, 1e-3),
        [normal(0, 2, 3, 9), normal(1, 9)],
    )


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (3, 9), (8, 33), (12, 64), (16, 64)])
def test_fused_kernel_is_the_same(rows, width, rounding):
    x, weight, how = normal(0, 2, rows, width), normal(1, width), {"eps": 1e-3, "rounding": rounding}
    assert_close(rms_norm(x, tf.constant(weight), fuse=True, **how), oracles.rms_norm(x, weight, 1e-3))
    check_gradient(lambda x, w: rms_norm(x, w, fuse=True, **how), lambda x, w: oracles.rms_norm(x, w, 1e-3), [x, weight])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_fused_gradient_of_bfloat16(rounding):
    """Within the rounding of inputs and result; weights in float32 get theirs in float32, summed in float32."""
    x, dy, weight = tf.cast(normal(0, 16, 64), tf.bfloat16), tf.cast(normal(2, 16, 64), tf.bfloat16), normal(1, 64)
    with tf.GradientTape() as tape:
        given = [x, tf.constant(weight)]
        tape.watch(given)
        y = rms_norm(*given, rounding=rounding, fuse=True)
    d_x, d_weight = tape.gradient(y, given, dy)
    want = gradients(lambda x, w: rms_norm(x, w), [tf.cast(x, tf.float32), weight], tf.cast(dy, tf.float32))
    assert d_x.dtype == tf.bfloat16 and d_weight.dtype == tf.float32
    assert_close(d_x, want[0], 2**-8)
    assert_close(d_weight, want[1], 2e-6)


def test_fused_gradient_with_unknown_dims():
    def grads(x, w):
        return gradients(lambda *t: rms_norm(*t, fuse=True), [x, w])

    x, weight = normal(0, 4, 5), normal(1, 5)
    for shapes in (([None, 5], [5]), ([4, None], [None])):
        fn = tf.function(grads, input_signature=list(map(tf.TensorSpec, shapes)), autograph=False)
        for got, want in zip(fn(x, weight), gradients(rms_norm, [x, weight])):
            assert_close(got, want, 1e-5)


def test_zeros_stay_zeros():
    x = tf.zeros([2, 5])
    assert_close(rms_norm(x, tf.ones([5])), np.zeros([2, 5]))
    assert np.isfinite(gradients(lambda x: rms_norm(x, tf.ones([5])), [x])[0]).all()


def test_bfloat16_is_rounded_where_the_option_says():
    bf16 = ml_dtypes.bfloat16
    x, weight = normal(0, 8, 32).astype(bf16), (1 + normal(1, 32, scale=0.2)).astype(bf16)
    y = oracles.rms_norm(x.astype(np.float64), np.ones(32))
    w = weight.astype(np.float32)
    before = (y.astype(np.float32).astype(bf16).astype(np.float32) * w).astype(bf16)
    after = (y * w).astype(np.float32).astype(bf16)
    assert (before != after).any()
    for rounding, want in zip(ROUNDINGS, (before, after)):
        got = rms_norm(x, weight, rounding=rounding)
        assert got.dtype == tf.bfloat16
        np.testing.assert_array_equal(to_numpy(got), want.astype(np.float32))


def test_float32_weight_of_bfloat16_values():
    got = rms_norm(tf.cast(normal(0, 2, 8), tf.bfloat16), tf.ones([8]), rounding="after_weight")
    assert got.dtype == tf.bfloat16


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"rms_norm: `weight` has shape \(3,\), want \(4,\) \[D\]"):
        rms_norm(tf.zeros([2, 4]), tf.ones([3]))
    with pytest.raises(ValueError, match="rms_norm: `x` is a scalar"):
        rms_norm(tf.constant(1.0), tf.ones([1]))
    with pytest.raises(ValueError, match="rms_norm: `rounding` is 'never', want one of"):
        rms_norm(tf.zeros([2, 4]), tf.ones([4]), rounding="never")
