"""Rows on their way to another device: FP8 values and their scales as one int32 tensor, which exchanges know.

TensorFlow's collectives take no float8, and it has no bitcast of it. E4M3's bits are made by `ops.fp8_bits`; E5M2 is the
upper half of float16.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import check, check_choice
from dsv3.graph import plain
from dsv3.ops.fp8 import ROW_BLOCK, fp8_quantize
from dsv3.ops.fp8_bits import BITS_SCALE, fp8_to_bits, from_bytes, half_bits, to_bytes
from dsv3.ops.fp8_tiles import MIN_AMAX
from dsv3.ops.fuse import fused
from dsv3.typing import TensorLike

_WORD = 4  # values of one int32
_WIRE_FORMATS = ("e4m3", "e5m2")


def wire_width(width: int) -> int:
    """Returns the int32 numbers that a row of `width` values takes: a byte each, and a float32 scale for each 128.

    >>> wire_width(7168) * 4 / 7168  # bytes a value
    1.03125
    """
    return -(-width // _WORD) - (-width // ROW_BLOCK[1])


@plain
def fp8_pack(x: TensorLike, *, fmt: str = "e4m3", min_amax: float = MIN_AMAX, fuse: bool = False) -> tf.Tensor:
    """Quantises rows in tiles of 1×128 with power-of-two scales, and packs them.

    Args:
      x: `[..., N, D]`, any floating dtype.
      fmt: `"e4m3"` or `"e5m2"`.
      min_amax: see `fp8_quantize`.
      fuse: compile as one kernel.

    Returns:
      `[..., N, wire_width(D)]` int32.

    References: DeepSeek-V3 section 3.3.3 (low-precision communication).
    """
    check_choice("fp8_pack", "fmt", fmt, _WIRE_FORMATS)
    x = tf.convert_to_tensor(x)
    rank = x.shape.rank
    known = rank is not None and rank >= 2 and x.shape[-1] is not None
    check(known, f"fp8_pack: `x` has shape {x.shape}, want [..., N, D] with known D")
    return _pack(x, fmt=fmt, min_amax=min_amax, fuse=fuse)


@plain
def fp8_unpack(
    packed: TensorLike, width: int, *, fmt: str = "e4m3", dtype: tf.DType | str = tf.float32, fuse: bool = False
) -> tf.Tensor:
    """Returns what `fp8_pack` has kept of its rows; with power-of-two scales that is exact in bfloat16, too.

    Args:
      packed: `[..., N, W]` int32.
      width: D; W is `wire_width(D)`.
      fmt: as packed.
      dtype: of the result. A value of a tile that was not finite is NaN.
      fuse: compile as one kernel.

    Returns:
      `[..., N, D]`.

    >>> fp8_unpack(fp8_pack([[1.0, -1.1, 300.0]]), 3).numpy().tolist()
    [[1.0, -1.125, 288.0]]
    """
    check_choice("fp8_unpack", "fmt", fmt, _WIRE_FORMATS)
    packed = tf.convert_to_tensor(packed)
    fits = packed.dtype == tf.int32 and packed.shape.rank is not None and packed.shape[-1] == wire_width(width)
    check(fits, f"fp8_unpack: `packed` is {packed.dtype.name} {packed.shape}, want int32 [..., {wire_width(width)}]")
    return _unpack(packed, width=width, fmt=fmt, dtype=tf.as_dtype(dtype), fuse=fuse)


@fused
def _pack(x, *, fmt, min_amax):
    q = fp8_quantize(x, block=ROW_BLOCK, fmt=fmt, scale_kind="power_of_two", min_amax=min_amax)
    width = x.shape[-1]
    if fmt == "e4m3":
        bits = fp8_to_bits(q.values)
    else:
        half = tf.cast(tf.cast(q.values, tf.float32), tf.float16)
        bits = tf.cast(tf.cast(tf.bitcast(half, tf.uint16), tf.int32) // 256, tf.uint8)
    bits = tf.pad(bits, [[0, 0]] * (x.shape.rank - 1) + [[0, -width % _WORD]])
    scale = tf.where(tf.math.is_finite(q.scale_inv), q.scale_inv, float("nan"))  # the values' bits have no NaN
    return tf.concat([from_bytes(bits, tf.int32), tf.bitcast(scale, tf.int32)], -1)


@fused
def _unpack(packed, *, width, fmt, dtype):
    words, scale = tf.split(packed, [-(-width // _WORD), -(-width // ROW_BLOCK[1])], -1)
    bits = to_bytes(words)[..., :width]
    if fmt == "e4m3":
        values = half_bits(bits) * BITS_SCALE
    else:
        values = tf.cast(tf.bitcast(tf.cast(tf.cast(bits, tf.int32) * 256, tf.uint16), tf.float16), tf.float32)
    scale = tf.repeat(tf.bitcast(scale, tf.float32), ROW_BLOCK[1], axis=-1)[..., :width]
    return tf.cast(values * scale, dtype)
