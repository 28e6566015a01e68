"""Softmax over the last dim, in float32 inside, by the kernel that is fastest where it runs."""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf

from dsv3.graph import plain


@plain
def row_softmax(x: tf.Tensor, *, fuse: bool = False) -> tf.Tensor:
    """Returns `softmax(x)` over the last dim, computed in float32 and rounded once.

    Args:
      x: `[..., S]`, float32 or bfloat16.
      fuse: use TensorFlow's kernel on `x` as it is where that computes in float32 (not under XLA).

    Returns:
      The same shape and dtype.
    """
    x = tf.convert_to_tensor(x)
    if x.dtype == tf.float32 or (fuse and kernel_is_float32(x.dtype.name)):
        return tf.nn.softmax(x)
    return tf.cast(tf.nn.softmax(tf.cast(x, tf.float32)), x.dtype)


@functools.cache
def kernel_is_float32(dtype: str) -> bool:
    """Returns whether TensorFlow's softmax of a dtype, such as `"bfloat16"`, adds and exponentiates in float32 here.

    With oneDNN it does. Other builds add in the dtype itself, where 1024 equal probabilities come out as 1/256.
    """
    rows = np.stack([np.zeros(1024, np.float32), np.linspace(-8.0, 0.0, 1024, dtype=np.float32)])
    with tf.init_scope():
        x = tf.cast(tf.constant(rows), dtype)
        got = tf.cast(tf.function(tf.nn.softmax, autograph=False)(x), tf.float32)
        want = tf.nn.softmax(tf.cast(x, tf.float32))
        return bool(tf.reduce_max(tf.abs(got - want) / want) < 1.01 * 2.0**-8)  # rounded once
