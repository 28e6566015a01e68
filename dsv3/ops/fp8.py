"""FP8 E4M3 with one scale for each block: quantise and dequantise.

A block is 128×128 for weights, 1×128 for activations along their last dim and 128×1 along the one before it.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_choice
from dsv3.graph import plain
from dsv3.typing import TensorLike

E4M3 = tf.dtypes.experimental.float8_e4m3fn
E4M3_MAX = 448.0
MIN_AMAX = 1e-4  # a block of zeros must have a scale, too
WEIGHT_BLOCK = (128, 128)
ROW_BLOCK = (1, 128)
COLUMN_BLOCK = (128, 1)


class Fp8Tensor(NamedTuple):
    """`values` `[..., M, N]` float8_e4m3fn, and `scale_inv` `[..., ⌈M/m⌉, ⌈N/n⌉]` float32, by which they are multiplied."""

    values: tf.Tensor
    scale_inv: tf.Tensor


@plain
def fp8_quantize(
    x: TensorLike, *, block: tuple[int, int] = WEIGHT_BLOCK, scale_kind: str = "float32"
) -> Fp8Tensor:
    """Quantises a tensor in blocks of its last two dims.

    `s = max(amax, 1e-4) / 448` for each block, `values = e4m3(clip(x / s, ±448))`, ties to even. (Unclipped, TensorFlow's
    cast would turn what is too large into NaN.)

    Args:
      x: `[..., M, N]`, any floating dtype; computed in float32. Ragged edges are blocks of their own size.
      block: (m, n), rows and columns of a block.
      scale_kind: `"float32"`, or `"power_of_two"`, which rounds s up to one (ue8m0, as in DeepSeek-V3.1).

    Returns:
      `Fp8Tensor`. A value that is not finite becomes NaN, and may take its block along.

    Raises:
      ValueError: `x` with fewer than two dims, or a bad block or kind.

    References: DeepSeek-V3 section 3.3.2.

    >>> q = fp8_quantize([[896.0, -3.0]], block=(1, 128))
    >>> q.scale_inv.numpy().tolist(), q.values.numpy().astype(float).tolist()
    ([[2.0]], [[448.0, -1.5]])
    """
    _check_block("fp8_quantize", block)
    check_choice("fp8_quantize", "scale_kind", scale_kind, ("float32", "power_of_two"))
    x = tf.convert_to_tensor(x)
    check(x.dtype.is_floating, f"fp8_quantize: `x` has dtype {x.dtype.name}, want a floating dtype")
    _check_rank("fp8_quantize", "x", x)
    tiles = _tile(tf.cast(x, tf.float32), block)
    amax = tf.reduce_max(tf.abs(tiles), [-3, -1])
    scale = _divide_by_max(tf.maximum(amax, MIN_AMAX))
    if scale_kind == "power_of_two":
        scale = _power_of_two_above(scale)
    scaled = tf.clip_by_value(tiles / _spread(scale), -E4M3_MAX, E4M3_MAX)
    return Fp8Tensor(tf.cast(_untile(scaled, x), E4M3), scale)


@plain
def fp8_dequantize(
    values: TensorLike, scale_inv: TensorLike, *, block: tuple[int, int] = WEIGHT_BLOCK, dtype: tf.DType | str = tf.float32
) -> tf.Tensor:
    """Returns `values[i, j] · scale_inv[⌊i/m⌋, ⌊j/n⌋]`, multiplied in float32 and rounded once.

    Args:
      values: `[..., M, N]` float8_e4m3fn.
      scale_inv: `[..., ⌈M/m⌉, ⌈N/n⌉]`; cast to float32.
      block: (m, n), rows and columns of a block.
      dtype: of the result.

    Returns:
      `[..., M, N]`.

    Raises:
      ValueError: `values` that are not E4M3, or scales that do not fit them.
    """
    _check_block("fp8_dequantize", block)
    values = tf.convert_to_tensor(values)
    check(values.dtype == E4M3, f"fp8_dequantize: `values` has dtype {values.dtype.name}, want float8_e4m3fn")
    _check_rank("fp8_dequantize", "values", values)
    scale_inv = tf.cast(scale_inv, tf.float32)
    lead = values.shape.rank - 2
    known = {f"d{i}": size for i, size in enumerate(values.shape[:-2])}
    known |= {n: None if size is None else -(-size // b) for n, size, b in zip("MN", values.shape[-2:], block)}
    Dims("fp8_dequantize", **known)("scale_inv", scale_inv, " ".join([*(f"d{i}" for i in range(lead)), "M", "N"]))
    tiles = _tile(tf.cast(values, tf.float32), block) * _spread(scale_inv)
    return tf.cast(_untile(tiles, values), dtype)


def _check_block(function: str, block: tuple[int, int]) -> None:
    check(
        len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block),
        f"{function}: `block` is {block!r}, want two positive integers (rows, columns)",
    )


def _check_rank(function: str, argument: str, x: tf.Tensor) -> None:
    rank = x.shape.rank
    check(rank is not None and rank >= 2, f"{function}: `{argument}` has shape {x.shape}, want [..., M, N]")


def _size(x: tf.Tensor, dim: int) -> int | tf.Tensor:
    """A dim's size, as a Python integer where it is known."""
    return tf.shape(x)[dim] if x.shape[dim] is None else x.shape[dim]


def _tile(x: tf.Tensor, block: tuple[int, int]) -> tf.Tensor:
    """`[..., M, N]` → `[..., ⌈M/m⌉, m, ⌈N/n⌉, n]`, zeros where blocks are ragged."""
    rows, cols = _size(x, -2), _size(x, -1)
    pad_rows, pad_cols = -rows % block[0], -cols % block[1]
    if not (isinstance(pad_rows, int) and isinstance(pad_cols, int) and pad_rows == pad_cols == 0):
        x = tf.pad(x, [[0, 0]] * (x.shape.rank - 2) + [[0, pad_rows], [0, pad_cols]])
    inner = [(rows + pad_rows) // block[0], block[0], (cols + pad_cols) // block[1], block[1]]
    return tf.reshape(x, [*(_size(x, i) for i in range(x.shape.rank - 2)), *inner])


def _untile(tiles: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """The inverse of `_tile`, cut to the shape of `like`."""
    padded = [_size(tiles, -4) * tiles.shape[-3], _size(tiles, -2) * tiles.shape[-1]]
    x = tf.reshape(tiles, [*(_size(like, i) for i in range(like.shape.rank - 2)), *padded])
    return tf.ensure_shape(x[..., : _size(like, -2), : _size(like, -1)], like.shape)


def _spread(scale: tf.Tensor) -> tf.Tensor:
    """`[..., m, n]` → `[..., m, 1, n, 1]`, to go with tiles."""
    return tf.expand_dims(tf.expand_dims(scale, -1), -3)


def _divide_by_max(amax: tf.Tensor) -> tf.Tensor:
    """amax / 448, rounded to float32 alike everywhere: a compiler makes `amax / 448.0` a product, which rounds otherwise."""
    return tf.cast(tf.cast(amax, tf.float64) / E4M3_MAX, tf.float32)


def _power_of_two_above(scale: tf.Tensor) -> tf.Tensor:
    """The smallest power of two that is not below a positive normal number: adds one to the exponent unless exact."""
    bits = tf.bitcast(scale, tf.int32)
    rounded = tf.bitcast(tf.bitwise.bitwise_and(bits + 0x7FFFFF, 0x7F800000), tf.float32)
    return tf.where(tf.math.is_finite(scale), rounded, scale)
