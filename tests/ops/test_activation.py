"""SwiGLU."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.activation import swiglu
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, normal, to_numpy


def oracle(gate_up):
    return oracles.swiglu(*np.split(gate_up, 2, axis=-1))


@SWEEP
@given(lead=st.lists(st.integers(0, 4), max_size=3), half=st.integers(1, 33), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_matches_the_formula(lead, half, scale):
    x = normal(0, *lead, 2 * half, scale=scale)
    assert_close(swiglu(x), oracle(x.astype(np.float64)))


@pytest.mark.parametrize("fuse", [False, True])
def test_gradient(fuse):
    check_gradient(lambda x: swiglu(x, fuse=fuse), oracle, [normal(0, 3, 10)])


def test_far_out_is_finite():
    x = np.array([-1e4, -50.0, 0.0, 50.0, 1e4], np.float32)
    assert_close(swiglu(tf.concat([x, tf.ones(5)], 0)), np.array([0.0, 0.0, 0.0, 50.0, 1e4]))


@pytest.mark.parametrize("fuse", [False, True])
def test_bfloat16_is_computed_in_float32_and_rounded_once(fuse):
    x = tf.cast(normal(0, 4, 128), tf.bfloat16)
    want = tf.cast(oracle(to_numpy(x).astype(np.float64)), tf.bfloat16)
    assert swiglu(x, fuse=fuse).dtype == tf.bfloat16
    np.testing.assert_array_equal(to_numpy(swiglu(x, fuse=fuse)), to_numpy(want))


@pytest.mark.parametrize("shape", [[2, 5], []])
def test_odd_width_is_refused(shape):
    with pytest.raises(ValueError, match=r"swiglu: `gate_up` has last dim .*, want an even number \[2F\]"):
        swiglu(tf.zeros(shape))
