"""The number formats of low-precision training, and rounding to them by arithmetic.

E4M3 and E5M2 are float8 dtypes. E5M6 has twelve bits and no dtype: it is stored as those float16 numbers that need no more
than six bits of mantissa. (TensorFlow's graph optimiser does not know E5M2: it warns and leaves a graph with it as it is.)
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from dsv3.checks import check_choice
from dsv3.graph import plain
from dsv3.typing import TensorLike

_MANTISSA = 23  # of float32
_EXPONENT = 0x7F800000
_BIAS = 127


@dataclasses.dataclass(frozen=True)
class Fp8Format:
    """A format of one sign bit, exponent and mantissa, with subnormal numbers.

    Attributes:
      name: key in `FORMATS`.
      exponent_bits, mantissa_bits: stored bits of each.
      max: the largest finite value.
      min_normal: the smallest value with all bits of mantissa.
      smallest: the smallest value above zero, and the step between subnormal ones.
      dtype: in which values are stored.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    min_normal: float
    smallest: float
    dtype: tf.DType


FORMATS = {
    "e4m3": Fp8Format("e4m3", 4, 3, 448.0, 2.0**-6, 2.0**-9, tf.dtypes.experimental.float8_e4m3fn),
    "e5m2": Fp8Format("e5m2", 5, 2, 57344.0, 2.0**-14, 2.0**-16, tf.dtypes.experimental.float8_e5m2),
    "e5m6": Fp8Format("e5m6", 5, 6, 65024.0, 2.0**-14, 2.0**-20, tf.float16),
}


@plain
def fp8_round(x: TensorLike, *, fmt: str = "e4m3") -> tf.Tensor:
    """Rounds to the nearest value of a format, in float32: what a cast there and back would give, but faster.

    `round(x / step) · step` with the step of x's binade, a power of two that is made from the exponent's bits. So every
    product is exact and only `round` rounds; no compiler has anything to rearrange.

    Args:
      x: any shape and floating dtype; cast to float32.
      fmt: `"e4m3"`, `"e5m2"` or `"e5m6"`.

    Returns:
      float32 like `x`; ties go to the even mantissa, what is beyond ±max becomes ±max, NaN stays NaN.

    Raises:
      ValueError: an unknown format.

    References: arXiv:2209.05433, section 3 (E4M3 and E5M2).

    >>> fp8_round([3.1, 1.0625, 1e-3, -500.0]).numpy().tolist()
    [3.0, 1.0, 0.001953125, -448.0]
    """
    check_choice("fp8_round", "fmt", fmt, tuple(FORMATS))
    of = FORMATS[fmt]
    x = tf.clip_by_value(tf.cast(x, tf.float32), -of.max, of.max)
    exponent = tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), _EXPONENT)
    # Exponents are compared and shifted in place: 1 in the exponent is 2^23 in the bits.
    exponent = tf.maximum(exponent, _power_bits(of.min_normal)) - (of.mantissa_bits << _MANTISSA)
    step, inverse = tf.bitcast(exponent, tf.float32), tf.bitcast((2 * _BIAS << _MANTISSA) - exponent, tf.float32)
    return tf.round(x * inverse) * step


def _power_bits(value: float) -> int:
    """The bits of a power of two in float32."""
    mantissa, exponent = float(value).hex().split("p")
    assert mantissa == "0x1.0000000000000", value
    return int(exponent) + _BIAS << _MANTISSA
