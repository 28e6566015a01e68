"""A model of a tensor core's narrow accumulator, for studying what it does to FP8 products; it is no fast product.

Hopper adds FP8 products in fixed point: of one instruction's 32 products and the accumulator, all shifted to the largest
exponent, only about 14 bits take part in the sum, and the sum keeps as many (a float of 8 exponent and 13 mantissa bits).
DeepSeek-V3 therefore takes the sum out every 128 elements of K and goes on adding in float32.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import check
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import dim_max
from dsv3.typing import TensorLike

DEPTH = 32  # elements of K that one instruction multiplies
MAX_BITS = 24


@plain
def tensor_core_matmul(
    a: TensorLike,
    b: TensorLike,
    scale_a: TensorLike,
    scale_b: TensorLike,
    *,
    interval: int | None = 128,
    bits: int = 14,
    fuse: bool = False,
) -> tf.Tensor:
    """Multiplies matrices of FP8 values with a narrow accumulator that is emptied into float32 every `interval` elements.

    An instruction adds 32 products p_k = a_k·b_k to the accumulator c. With e the largest of the exponents e(a_k) + e(b_k)
    and e(c), and the unit u = 2^(e + 1 − bits), `c ← keep(trunc(c/u) + Σ_k trunc(p_k/u))·u`: each term loses what is below
    the unit, towards zero; the sum of integers is exact; `keep` cuts it to its `bits` highest bits. After the elements of
    interval i, `y ← y + c·(scale_a_i·scale_b_i)` in float32, and c is zero again. An exponent is that of the value, also
    below FP8's normal numbers. Each step is exact but the promotion, so that results are reproducible to the bit.

    It costs 15 to 100 times a float32 product and holds a few tensors of 32·M·N numbers.

    Args:
      a: `[..., M, K]` values of at most 11 significant bits, so that products are exact: FP8 has 4, E5M6 7.
      b: `[..., K, N]`, the same; leading dims are broadcast.
      scale_a: `[..., M or 1, I]` float32, for the I intervals of K. scale_b: `[..., I, N or 1]` float32.
      interval: elements of K between promotions, a multiple of 32; None: one promotion, at the end.
      bits: significant bits of the accumulator, 2 to 24.
      fuse: compile an instruction as one kernel (not under XLA).

    Returns:
      `[..., M, N]` float32. A row or column with a value that is not finite is NaN.

    Raises:
      ValueError: dims that differ, or a bad `interval` or `bits`.

    References: DeepSeek-V3 sections 3.3.2 ("Increasing Accumulation Precision") and 3.5.2.
    """
    check_accumulator("tensor_core_matmul", interval, bits)
    a, b, scale_a, scale_b = (tf.cast(x, tf.float32) for x in (a, b, scale_a, scale_b))
    for name, x in (("a", a), ("b", b), ("scale_a", scale_a), ("scale_b", scale_b)):
        check(x.shape.rank >= 2, f"tensor_core_matmul: `{name}` has shape {x.shape}, want two dims at least")
    depth, rank = _depth(a, b), max(a.shape.rank, b.shape.rank)
    per = -(-depth // DEPTH) if interval is None else interval // DEPTH
    spans = 1 if interval is None else -(-depth // interval)
    for name, count in (("scale_a", scale_a.shape[-1]), ("scale_b", scale_b.shape[-2])):
        known = isinstance(spans, int) and count is not None
        check(not known or count == spans, f"tensor_core_matmul: `{name}` has {count} intervals of K, want {spans}")
    rows, columns = (_steps(_first(x, rank), spans, per) for x in (tf.linalg.matrix_transpose(a), b))
    rows, columns = tf.expand_dims(rows, -1), tf.expand_dims(columns, -2)
    scale_a, scale_b = _first(tf.linalg.matrix_transpose(scale_a), rank), _first(scale_b, rank)
    scales = tf.expand_dims(scale_a, -1) * tf.expand_dims(scale_b, -2)
    zero = _zeros(rows, columns)

    def instruction(i, j, c):
        return i, j + 1, _instruction(c, rows[i, j], columns[i, j], bits=bits, fuse=fuse)

    def span(i, y):
        c = tf.while_loop(lambda i, j, c: j < per, instruction, [i, 0, zero], parallel_iterations=1)[2]
        return i + 1, y + c * scales[i]

    y = tf.while_loop(lambda i, y: i < spans, span, [0, zero], parallel_iterations=1)[1]
    bad = [tf.reduce_any(~tf.math.is_finite(x), dim, keepdims=True) for x, dim in ((a, -1), (b, -2))]
    return tf.where(bad[0] | bad[1], float("nan"), y)


def check_accumulator(function: str, interval: int | None, bits: int) -> None:
    """Raises `ValueError` in the name of `function` unless `interval` and `bits` describe an accumulator."""
    check(
        interval is None or (isinstance(interval, int) and interval > 0 and interval % DEPTH == 0),
        f"{function}: `interval` is {interval!r}, want None or a positive multiple of {DEPTH}",
    )
    check(isinstance(bits, int) and 2 <= bits <= MAX_BITS, f"{function}: `bits` is {bits!r}, want 2 to {MAX_BITS}")


def _depth(a: tf.Tensor, b: tf.Tensor) -> int | tf.Tensor:
    """K, as a Python integer where it is known."""
    k, other = a.shape[-1], b.shape[-2]
    check(
        k is None or other is None or k == other,
        f"tensor_core_matmul: `b` has {other} rows, want {k} [K], as `a` has columns",
    )
    return tf.shape(a)[-1] if k is None else k


def _first(x: tf.Tensor, rank: int) -> tf.Tensor:
    """`[..., K, M]` → `[K, ..., M]` with as many dims as `rank` says."""
    for _ in range(rank - x.shape.rank):
        x = tf.expand_dims(x, 0)
    return tf.transpose(x, [rank - 2, *range(rank - 2), rank - 1])


def _steps(x: tf.Tensor, spans: int | tf.Tensor, per: int | tf.Tensor) -> tf.Tensor:
    """`[K, ...]` → `[intervals, instructions of one, 32, ...]`, zeros where K is ragged."""
    sizes = [tf.shape(x)[i] if n is None else n for i, n in enumerate(x.shape)]
    x = tf.pad(x, [[0, spans * per * DEPTH - sizes[0]]] + [[0, 0]] * (x.shape.rank - 1))
    return tf.reshape(x, [spans, per, DEPTH, *sizes[1:]])


def _zeros(rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    """An empty accumulator for all results."""
    shape = tf.broadcast_static_shape(rows.shape[3:], columns.shape[3:])
    if not shape.is_fully_defined():
        return tf.ensure_shape(tf.zeros(tf.broadcast_dynamic_shape(tf.shape(rows)[3:], tf.shape(columns)[3:])), shape)
    return tf.zeros(shape)


@fused
def _instruction(c: tf.Tensor, a: tf.Tensor, b: tf.Tensor, *, bits: int) -> tf.Tensor:
    """The accumulator c `[..., M, N]` after the products of a `[32, ..., M, 1]` and b `[32, ..., 1, N]`.

    As integers the terms are below 2^(bits + 1), their sum below 2^(bits + 7), which fits int32.
    """
    top = tf.maximum(dim_max(_power(a) * _power(b), 0), _power(c))
    unit = tf.where(top > 0, top * 2.0 ** (1 - bits), 1.0)
    terms = tf.reduce_sum(tf.cast(a * b / unit, tf.int32), 0) + tf.cast(c / unit, tf.int32)
    wide = tf.bitcast(tf.cast(terms, tf.float64), tf.int64)
    kept = tf.bitcast(tf.bitwise.bitwise_and(wide, -(1 << (53 - bits))), tf.float64)
    return tf.cast(kept, tf.float32) * unit


def _power(x: tf.Tensor) -> tf.Tensor:
    """The largest power of two that is not above |x|: the bits of its exponent alone. Zero has none and stays zero."""
    return tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), 0x7F800000), tf.float32)
