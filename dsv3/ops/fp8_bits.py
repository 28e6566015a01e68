"""E4M3 as `uint8` bits, which every TensorFlow operation takes, and back by exact arithmetic.

Graphs outside XLA can neither loop over, branch on, pad, scatter nor bitcast a float8 tensor; `uint8` they can. E4M3 is a
cut of float16: sign, four bits of exponent and three of mantissa stand in the places of float16's, with a bias that is less
by 8. So a value is the float16 with the same bits times 2^8, subnormal ones included.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import check
from dsv3.graph import plain
from dsv3.ops.fp8_formats import fp8_round
from dsv3.ops.fuse import fused
from dsv3.typing import TensorLike

BITS_SCALE = 256.0
"""What `half_bits` must be multiplied by: float16's bias is 15, that of E4M3 is 7."""

_SIGN, _REST = 0x80, 0x7F


@plain
def fp8_encode(x: TensorLike) -> tf.Tensor:
    """Returns the bits of `x` rounded to E4M3, as `uint8` of its shape.

    Args:
      x: any shape, floating; rounded as `fp8_round` does: ties to even, ±448 for what is beyond. NaN stays NaN.

    Raises:
      ValueError: `x` of an integer dtype.

    References: arXiv:2209.05433, section 3.

    >>> fp8_encode([0.0, 1.0, -448.0, 2.0**-9]).numpy().tolist()
    [0, 56, 254, 1]
    """
    x = tf.convert_to_tensor(x)
    check(x.dtype.is_floating, f"fp8_encode: `x` has dtype {x.dtype.name}, want a floating dtype")
    rounded = fp8_round(tf.cast(x, tf.float32))
    half = tf.cast(tf.bitcast(tf.cast(rounded / BITS_SCALE, tf.float16), tf.uint16), tf.int32)
    shift = tf.bitwise.right_shift
    sign, rest = (tf.bitwise.bitwise_and(shift(half, by), mask) for by, mask in ((8, _SIGN), (7, _REST)))
    rest = tf.where(tf.math.is_nan(rounded), _REST, rest)
    return tf.cast(tf.bitwise.bitwise_or(sign, rest), tf.uint8)


@plain
def fp8_decode(bits: TensorLike) -> tf.Tensor:
    """Returns the values of E4M3 bits: float32 of the same shape.

    Args:
      bits: any shape, `uint8`, as `fp8_encode` returns them. 0x7f and 0xff are NaN.

    Raises:
      ValueError: another dtype.

    >>> fp8_decode(fp8_encode([3.1, -1e9])).numpy().tolist()
    [3.0, -448.0]
    """
    bits = tf.convert_to_tensor(bits)
    check(bits.dtype == tf.uint8, f"fp8_decode: `bits` has dtype {bits.dtype.name}, want uint8")
    nan = tf.equal(tf.bitwise.bitwise_and(bits, tf.constant(_REST, tf.uint8)), tf.constant(_REST, tf.uint8))
    return tf.where(nan, float("nan"), half_bits(bits) * BITS_SCALE)


@fused
def fp8_to_bits(values: tf.Tensor) -> tf.Tensor:
    """Returns float8 E4M3 values as `uint8` bits; `fuse` compiles it as one kernel."""
    return fp8_encode(tf.cast(values, tf.float32))


def half_bits(bits: tf.Tensor) -> tf.Tensor:
    """Returns E4M3 `bits` as float32 values divided by `BITS_SCALE`, which goes into a scale; NaN is not looked for."""
    wide = tf.cast(bits, tf.int16)
    sign = tf.bitwise.left_shift(tf.bitwise.bitwise_and(wide, tf.constant(_SIGN, tf.int16)), tf.constant(8, tf.int16))
    rest = tf.bitwise.left_shift(tf.bitwise.bitwise_and(wide, tf.constant(_REST, tf.int16)), tf.constant(7, tf.int16))
    return tf.cast(tf.bitcast(tf.bitwise.bitwise_or(sign, rest), tf.float16), tf.float32)


def to_bytes(x: tf.Tensor) -> tf.Tensor:
    """`[..., n]` to `[..., n·size]` `uint8`."""
    shape = tf.concat([tf.shape(x)[:-1], [x.shape[-1] * x.dtype.size]], 0)
    return tf.ensure_shape(tf.reshape(tf.bitcast(x, tf.uint8), shape), [*x.shape[:-1], x.shape[-1] * x.dtype.size])


def from_bytes(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The inverse of `to_bytes`."""
    count = x.shape[-1] // dtype.size
    shape = tf.concat([tf.shape(x)[:-1], [count, dtype.size]], 0)
    return tf.ensure_shape(tf.bitcast(tf.reshape(x, shape), dtype), [*x.shape[:-1], count])
