"""The best of a few values, for many rows at once, as compiled kernels.

TensorFlow's `top_k` goes through each row by itself. Here a value and its place are one integer, and a maximum over all
columns, vectorised over the rows, is repeated among what is below the last one. The result is the same, ties included: the
lower place is the better one. (Only a zero with a sign is below one without, and what is no number is somewhere.)

Each maximum is a kernel of its own: within one kernel XLA would compute a maximum anew for each value compared with it.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.ops.fuse import fused
from dsv3.ops.reduce import halving_max, turned

LIMIT = 128
"""Columns up to which this is faster than `tf.math.top_k`, which reads a row once whatever K is."""
_LOWEST, _MANY = tf.int64.min, 256


def many_rows(rows: int | None) -> bool:
    """Whether so many rows are worth the start of a kernel for each maximum; `None`: as many as there will be."""
    return rows is None or rows >= _MANY


def place_keys(values: tf.Tensor) -> tf.Tensor:
    """Returns int64 keys in the order of float32 `values` `[X, ...]`; of equal values, the lower place along X is above."""
    size = values.shape[0]
    places = tf.reshape(tf.range(size - 1, -1, -1, dtype=tf.int64), [size] + [1] * (values.shape.rank - 1))
    ordered = tf.cast(turned(tf.bitcast(values, tf.int32)), tf.int64)
    return tf.bitwise.bitwise_or(tf.bitwise.left_shift(ordered, _shift()), places)


def key_values(keys: tf.Tensor) -> tf.Tensor:
    """Returns the float32 values of keys."""
    return tf.bitcast(turned(tf.cast(tf.bitwise.right_shift(keys, _shift()), tf.int32)), tf.float32)


def key_places(keys: tf.Tensor, size: int) -> tf.Tensor:
    """Returns the int32 places of keys among `size`."""
    return size - 1 - tf.cast(tf.bitwise.bitwise_and(keys, tf.constant(0xFFFFFFFF, tf.int64)), tf.int32)


def best_keys(keys: tf.Tensor, count: int) -> list[tf.Tensor]:
    """Returns the `count` largest along the dim before the last, best first, each `[..., N]`.

    Args:
      keys: `[..., X, N]` int64, along X no two alike.
      count: at most X.
    """
    found = [_largest(keys, fuse=True)]
    while len(found) < count:
        found.append(_largest_below(keys, found[-1], fuse=True))
    return found


@fused
def _largest(keys):
    return halving_max(keys, -2)


@fused
def _largest_below(keys, bound):
    return halving_max(tf.where(keys < tf.expand_dims(bound, -2), keys, _LOWEST), -2)


def _shift() -> tf.Tensor:
    return tf.constant(32, tf.int64)
