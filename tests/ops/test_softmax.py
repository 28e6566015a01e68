"""Softmax: float32 inside, whatever kernel computes it."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3.ops import softmax
from dsv3.ops.softmax import kernel_is_float32, row_softmax
from tests.compare import assert_close, normal, to_numpy


def oracle(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [[1], [3, 1], [2, 3, 40], [2, 1500]])
@pytest.mark.parametrize("fuse", [False, True])
def test_matches_the_formula(shape, fuse):
    x = normal(0, *shape, scale=4.0)
    assert_close(row_softmax(tf.constant(x), fuse=fuse), oracle(x.astype(np.float64)))


@pytest.mark.parametrize("usable", [None, False])
@pytest.mark.parametrize("fuse", [False, True])
def test_bfloat16_is_rounded_once(fuse, usable, monkeypatch):
    """1500 equal scores: a sum in bfloat16 would stop growing at 256."""
    if usable is not None:
        monkeypatch.setattr(softmax, "kernel_is_float32", lambda dtype: usable)
    rows = np.stack([np.zeros(1500, np.float32), normal(0, 1500, scale=4.0)])
    x = tf.cast(rows, tf.bfloat16)
    got = tf.function(row_softmax, autograph=False)(x, fuse=fuse)
    assert got.dtype == tf.bfloat16
    np.testing.assert_allclose(to_numpy(got), oracle(to_numpy(x).astype(np.float64)), rtol=1.01 * 2.0**-8)


def test_a_kernel_that_adds_in_bfloat16_is_found_out(monkeypatch):
    def in_bfloat16(x):
        x = tf.exp(x)
        total = tf.scan(tf.add, tf.transpose(x))[-1]
        return x / tf.expand_dims(total, -1)

    kernel = tf.nn.softmax
    monkeypatch.setattr(softmax.tf.nn, "softmax", lambda x: (in_bfloat16 if x.dtype == tf.bfloat16 else kernel)(x))
    kernel_is_float32.cache_clear()
    assert not kernel_is_float32("bfloat16")
    kernel_is_float32.cache_clear()
