"""Blocks of a matrix's last two dims and their scales, as `ops.fp8` needs them.

`block` is (rows, columns), or `None` for one block that is the whole tensor; tiles are then the tensor itself.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.checks import Dims, check
from dsv3.ops.fp8_formats import Fp8Format
from dsv3.ops.reduce import halving_max

Block = tuple[int, int] | None
MIN_AMAX = 1e-4  # of a block; one of zeros must have a scale, too
_STRIP = (1, 128)


def check_block(function: str, argument: str, block: Any) -> None:
    """Raises `ValueError` unless `block` is two positive integers or `None`."""
    two = isinstance(block, (tuple, list)) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)
    want = "two positive integers (rows, columns), or None"
    check(two or block is None, f"{function}: `{argument}` is {block!r}, want {want}")


def check_matrix(function: str, argument: str, x: tf.Tensor) -> None:
    """Raises `ValueError` unless the tensor has two dims at least."""
    rank = x.shape.rank
    check(rank is not None and rank >= 2, f"{function}: `{argument}` has shape {x.shape}, want [..., M, N]")


def check_scales(function: str, argument: str, scale: tf.Tensor, x: tf.Tensor, block: Block) -> None:
    """Raises `ValueError` unless there is one scale for each block of `x`."""
    if block is None:
        Dims(function)(argument, scale, " ".join(["1"] * x.shape.rank))
        return
    lead = {f"d{i}": size for i, size in enumerate(x.shape[:-2])}
    tiled = {n: None if size is None else -(-size // b) for n, size, b in zip("MN", x.shape[-2:], block)}
    Dims(function, **lead, **tiled)(argument, scale, " ".join([*lead, *tiled]))


def tile(x: tf.Tensor, block: Block) -> tf.Tensor:
    """`[..., M, N]` → `[..., ⌈M/m⌉, m, ⌈N/n⌉, n]`, zeros where blocks are ragged."""
    if block is None:
        return x
    rows, cols = _size(x, -2), _size(x, -1)
    pad_rows, pad_cols = -rows % block[0], -cols % block[1]
    if not (isinstance(pad_rows, int) and isinstance(pad_cols, int) and pad_rows == pad_cols == 0):
        x = tf.pad(x, [[0, 0]] * (x.shape.rank - 2) + [[0, pad_rows], [0, pad_cols]])
    inner = [(rows + pad_rows) // block[0], block[0], (cols + pad_cols) // block[1], block[1]]
    return tf.reshape(x, [*(_size(x, i) for i in range(x.shape.rank - 2)), *inner])


def untile(tiles: tf.Tensor, like: tf.Tensor, block: Block) -> tf.Tensor:
    """The inverse of `tile`, cut to the shape of `like`."""
    if block is None:
        return tiles
    padded = [_size(tiles, -4) * block[0], _size(tiles, -2) * block[1]]
    x = tf.reshape(tiles, [*(_size(like, i) for i in range(like.shape.rank - 2)), *padded])
    return tf.ensure_shape(x[..., : _size(like, -2), : _size(like, -1)], like.shape)


def spread(scale: tf.Tensor, block: Block) -> tf.Tensor:
    """`[..., m, n]` → `[..., m, 1, n, 1]`, to go with tiles."""
    return scale if block is None else tf.expand_dims(tf.expand_dims(scale, -1), -3)


def block_scale(tiles: tf.Tensor, block: Block, fmt: Fp8Format, kind: str, min_amax: float) -> tf.Tensor:
    """`max(amax, min_amax) / fmt.max` for each block of float32 tiles; NaN or infinite where amax is, in this order."""
    bits = tf.bitwise.bitwise_and(tf.bitcast(tiles, tf.int32), 0x7FFFFFFF)
    # The bits of numbers without a sign are ordered as the numbers are, NaN last: alike everywhere, where a maximum of
    # floats heeds NaN in some compilers and not in others.
    amax = tf.bitcast(tf.maximum(_block_max(bits, block), tf.bitcast(tf.constant(min_amax), tf.int32)), tf.float32)
    # A compiler makes `amax / 448.0` a product, which rounds otherwise; what divides here is no constant to it. Nor does it
    # compute a quotient again for each element of the block.
    scale = amax / tf.where(tf.equal(amax, amax), fmt.max, float("nan"))
    return _power_of_two_above(scale) if kind == "power_of_two" else scale


def _block_max(x: tf.Tensor, block: Block) -> tf.Tensor:
    if block is None:
        strips = halving_max(tile(x, _STRIP), -1)
        return tf.reshape(tf.reduce_max(strips), [1] * x.shape.rank)
    # One dim by halves, which leaves little for a plain reduction.
    x = halving_max(x, -1) if block[1] > 1 else tf.squeeze(x, -1)
    if block[0] == 1:
        return tf.squeeze(x, -2)
    return halving_max(x, -2) if block[1] == 1 else tf.reduce_max(x, -2)


def _power_of_two_above(scale: tf.Tensor) -> tf.Tensor:
    """The smallest power of two that is not below a positive normal number: adds one to the exponent unless exact."""
    bits = tf.bitcast(scale, tf.int32)
    rounded = tf.bitcast(tf.bitwise.bitwise_and(bits + 0x7FFFFF, 0x7F800000), tf.float32)
    return tf.where(tf.math.is_finite(scale), rounded, scale)


def _size(x: tf.Tensor, dim: int) -> int | tf.Tensor:
    """A dim's size, as a Python integer where it is known."""
    return tf.shape(x)[dim] if x.shape[dim] is None else x.shape[dim]
