"""FP8 with one scale for each block: quantise, dequantise, both at once by arithmetic, tile anew, count what was lost.

A block is 128×128 for weights, 1×128 for activations along their last dim, 128×1 along the one before it, or `None`: the
whole tensor with its leading dims.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import check, check_choice, is_concrete
from dsv3.graph import plain
from dsv3.ops.fp8_formats import FORMATS, Fp8Format, fp8_round
from dsv3.ops.fp8_tiles import MIN_AMAX, Block, block_scale, check_block, check_matrix, check_scales, spread, tile, untile
from dsv3.ops.fuse import fused
from dsv3.typing import TensorLike

E4M3 = FORMATS["e4m3"].dtype
WEIGHT_BLOCK = (128, 128)
ROW_BLOCK = (1, 128)
COLUMN_BLOCK = (128, 1)
SCALE_KINDS = ("float32", "power_of_two")


class Fp8Tensor(NamedTuple):
    """`values` `[..., M, N]` in a format's dtype, and `scale_inv` `[..., ⌈M/m⌉, ⌈N/n⌉]` float32, which multiplies them.

    With one block for the whole tensor `scale_inv` is `[1, ..., 1]`, of the same rank.
    """

    values: tf.Tensor
    scale_inv: tf.Tensor


class Fp8Counts(NamedTuple):
    """What quantising lost, int64 scalars: elements beyond the largest value, others that became 0, those not finite."""

    saturated: tf.Tensor
    underflowed: tf.Tensor
    nonfinite: tf.Tensor


@plain
def fp8_quantize(
    x: TensorLike, *, block: Block = WEIGHT_BLOCK, fmt: str = "e4m3", scale_kind: str = "float32",
    scale_inv: TensorLike | None = None, min_amax: float = MIN_AMAX, nonfinite: str = "propagate", fuse: bool = False,
) -> Fp8Tensor:  # fmt: skip
    """Quantises a tensor in blocks of its last two dims.

    `s = max(amax, min_amax) / max` for each block, `values = cast(clip(x / s, ±max))`, ties to even; max is 448 for E4M3.
    (Unclipped, TensorFlow's cast would turn what is too large into NaN.)

    Args:
      x: `[..., M, N]`, any floating dtype; computed in float32. Ragged edges are blocks of their own size.
      block: (m, n), rows and columns of a block, or `None` for one scale for all of `x`.
      fmt: `"e4m3"`, `"e5m2"`, or `"e5m6"`, which float16 stores.
      scale_kind: `"float32"`, or `"power_of_two"`, which rounds s up to one (ue8m0, as in DeepSeek-V3.1).
      scale_inv: positive scales to use instead of s, as of an earlier step; then values may saturate.
      min_amax: a block of zeros must have a scale, too. The published 1e-4 is for activations and weights; gradients of a
        mean over many tokens are far below it, and would underflow.
      nonfinite: `"propagate"` turns what is not finite into NaN, and its block with it where s is computed; `"refuse"`
        raises, in a graph when it runs. XLA drops assertions: a function that is compiled as a whole refuses nothing.
      fuse: compile as one kernel (see `ops.fuse`).

    Returns:
      `Fp8Tensor`.

    Raises:
      ValueError: `x` with fewer than two dims, scales that do not fit it, a bad block or name, or `x` is refused.

    References: DeepSeek-V3 section 3.3.2; its inference/kernel.py, act_quant (without the clamp at 1e-4 at first).

    >>> q = fp8_quantize([[896.0, -3.0]], block=(1, 128))
    >>> q.scale_inv.numpy().tolist(), q.values.numpy().astype(float).tolist()
    ([[2.0]], [[448.0, -1.5]])
    """
    x = _checked("fp8_quantize", x, block, fmt, scale_kind)
    check_choice("fp8_quantize", "nonfinite", nonfinite, ("propagate", "refuse"))
    given = ()
    if scale_inv is not None:
        given = (tf.cast(scale_inv, tf.float32),)
        check_scales("fp8_quantize", "scale_inv", given[0], x, block)
    q = _quantize(x, *given, block=_key(block), fmt=fmt, scale_kind=scale_kind, min_amax=min_amax, fuse=fuse)
    return _refuse(q, x if given else q.scale_inv) if nonfinite == "refuse" else q


@plain
def fp8_dequantize(
    values: TensorLike, scale_inv: TensorLike, *, block: Block = WEIGHT_BLOCK, dtype: tf.DType | str = tf.float32
) -> tf.Tensor:
    """Returns `values[i, j] · scale_inv[⌊i/m⌋, ⌊j/n⌋]`, multiplied in float32 and rounded once.

    Args:
      values: `[..., M, N]` float8_e4m3fn, float8_e5m2, or float16 for E5M6.
      scale_inv: `[..., ⌈M/m⌉, ⌈N/n⌉]`; cast to float32.
      block: (m, n), rows and columns of a block, or `None` for one scale `[1, ..., 1]`.
      dtype: of the result.

    Returns:
      `[..., M, N]`.

    Raises:
      ValueError: `values` of another dtype, or scales that do not fit them.
    """
    values, scale_inv, _ = _checked_quantized("fp8_dequantize", values, scale_inv, block)
    tiles = tile(tf.cast(values, tf.float32), block) * spread(scale_inv, block)
    return tf.cast(untile(tiles, values, block), dtype)


@plain
def fp8_fake(
    x: TensorLike, *, block: Block = ROW_BLOCK, fmt: str = "e4m3", scale_kind: str = "float32",
    min_amax: float = MIN_AMAX, dtype: tf.DType | str | None = None, fuse: bool = False,
) -> tf.Tensor:  # fmt: skip
    """Rounds a tensor to what FP8 keeps of it: `fp8_dequantize(fp8_quantize(x))` to the bit, without a float8 tensor.

    The gradient is the identity ("straight through"): neither the rounding nor the scale is differentiated.

    Args:
      x: `[..., M, N]`, any floating dtype; computed in float32.
      block, fmt, scale_kind, min_amax: as of `fp8_quantize`.
      dtype: of the result, rounded to once from float32; by default `x`'s.
      fuse: compile as one kernel (see `ops.fuse`).

    Returns:
      `[..., M, N]`; a block that holds a value that is not finite becomes NaN.

    Raises:
      ValueError: `x` with fewer than two dims, or a bad block or name.

    References: DeepSeek-V3 section 3.3.2; arXiv:1308.3432 (straight through).

    >>> fp8_fake([[896.0, -3.1]]).numpy().tolist()
    [[896.0, -3.0]]
    """
    x = _checked("fp8_fake", x, block, fmt, scale_kind)
    source, target = x.dtype, tf.as_dtype(dtype or x.dtype)

    @tf.custom_gradient
    def straight_through(x):
        y = _fake(x, block=_key(block), fmt=fmt, scale_kind=scale_kind, min_amax=min_amax, dtype=target, fuse=fuse)
        return y, lambda d_y: tf.cast(d_y, source)

    return straight_through(x)


@plain
def fp8_retile(
    values: TensorLike, scale_inv: TensorLike, *, block: Block = ROW_BLOCK, to: Block = COLUMN_BLOCK,
    scale_kind: str = "float32",
) -> Fp8Tensor:  # fmt: skip
    """Quantises a quantised tensor anew in other blocks, such as 1×128 → 128×1 for the gradient of weights.

    Each element is rounded a second time, by at most `2^-(b+1)` of itself with b bits of mantissa, or by half the smallest
    step of its new block where that is more. When old and new scales are powers of two, elements only change their
    exponent: exact, but for those that fall below the smallest normal value of their new block.

    Args:
      values, scale_inv: as `fp8_quantize` returned them; the format is the same again.
      block: of `scale_inv`.
      to: the new block.
      scale_kind: of the new scales.

    Returns:
      `Fp8Tensor` in blocks of `to`.

    Raises:
      ValueError: as `fp8_dequantize` and `fp8_quantize`.

    References: DeepSeek-V3 sections 3.3.2 and 3.5.2.
    """
    values, scale_inv, fmt = _checked_quantized("fp8_retile", values, scale_inv, block)
    check_block("fp8_retile", "to", to)
    check_choice("fp8_retile", "scale_kind", scale_kind, SCALE_KINDS)
    x = fp8_dequantize(values, scale_inv, block=block)
    return fp8_quantize(x, block=to, fmt=fmt.name, scale_kind=scale_kind)


@plain
def fp8_counts(x: TensorLike, quantized: Fp8Tensor, *, block: Block = WEIGHT_BLOCK) -> Fp8Counts:
    """Counts the elements that quantising could not keep.

    Args:
      x: `[..., M, N]`, what was quantised.
      quantized: what became of it.
      block: of its scales.

    Returns:
      `Fp8Counts`. `saturated`: `|x| / s` is above the format's largest value by more than scale and quotient are rounded, so
      that a block's own largest element never is. `underflowed`: `x` is not 0, its value is. Elements that are not finite
      are counted as `nonfinite` only.

    Raises:
      ValueError: shapes that do not fit, or `quantized` in another dtype.

    >>> x = tf.constant([[1e6, 1e-6, 0.0]])
    >>> [int(n) for n in fp8_counts(x, fp8_quantize(x, scale_inv=[[1.0]]))]
    [1, 1, 0]
    """
    x = tf.cast(x, tf.float32)
    values, scale_inv, fmt = _checked_quantized("fp8_counts", *quantized, block, prefix="quantized.")
    same = x.shape.rank == values.shape.rank and x.shape.is_compatible_with(values.shape)
    check(same, f"fp8_counts: `x` has shape {x.shape}, want {values.shape}")
    ratio = untile(tile(tf.abs(x), block) / spread(scale_inv, block), x, block)
    finite = tf.math.is_finite(x)
    masks = (
        finite & (ratio > fmt.max * (1 + 2.0**-22)),  # scale and quotient are each off by 2^-24 at most
        (x != 0) & (tf.cast(values, tf.float32) == 0),
        ~finite,
    )
    return Fp8Counts(*(tf.reduce_sum(tf.cast(mask, tf.int64)) for mask in masks))


@fused
def _quantize(x, *given, block, fmt, scale_kind, min_amax):
    tiles = tile(tf.cast(x, tf.float32), block)
    scale = given[0] if given else block_scale(tiles, block, FORMATS[fmt], scale_kind, min_amax)
    scaled = tiles / spread(scale, block)
    if given:  # an infinity must not pass for something large; with a scale of its own it is ∞ / ∞
        scaled = tf.where(tf.math.is_inf(tiles), float("nan"), scaled)
    return Fp8Tensor(_encode(untile(scaled, x, block), FORMATS[fmt]), scale)


@fused
def _fake(x, *, block, fmt, scale_kind, min_amax, dtype):
    tiles = tile(tf.cast(x, tf.float32), block)
    scale = spread(block_scale(tiles, block, FORMATS[fmt], scale_kind, min_amax), block)
    return tf.cast(untile(fp8_round(tiles / scale, fmt=fmt) * scale, x, block), dtype)


def _encode(x: tf.Tensor, fmt: Fp8Format) -> tf.Tensor:
    """float32 → the format's dtype, saturated; a cast that rounds to a float8 is faster than arithmetic before it."""
    emulated = fmt.dtype == tf.float16
    return tf.cast(fp8_round(x, fmt=fmt.name) if emulated else tf.clip_by_value(x, -fmt.max, fmt.max), fmt.dtype)


def _refuse(q: Fp8Tensor, witness: tf.Tensor) -> Fp8Tensor:
    """`q`, if `witness` is finite: a block's scale is finite when all its elements are."""
    message = "fp8_quantize: `x` is not finite everywhere, want finite values"
    finite = tf.reduce_all(tf.math.is_finite(witness))
    if is_concrete(finite):
        check(bool(finite), message)
        return q
    with tf.control_dependencies([tf.debugging.Assert(finite, [message])]):
        return Fp8Tensor(*map(tf.identity, q))


def _checked(function: str, x: TensorLike, block: Block, fmt: str, scale_kind: str) -> tf.Tensor:
    check_block(function, "block", block)
    check_choice(function, "fmt", fmt, tuple(FORMATS))
    check_choice(function, "scale_kind", scale_kind, SCALE_KINDS)
    x = tf.convert_to_tensor(x)
    check(x.dtype.is_floating, f"{function}: `x` has dtype {x.dtype.name}, want a floating dtype")
    check_matrix(function, "x", x)
    return x


def _checked_quantized(
    function: str, values: TensorLike, scale_inv: TensorLike, block: Block, prefix: str = ""
) -> tuple[tf.Tensor, tf.Tensor, Fp8Format]:
    """Returns the tensors, scales as float32, and the format that the values' dtype tells."""
    check_block(function, "block", block)
    values = tf.convert_to_tensor(values)
    formats = {fmt.dtype: fmt for fmt in FORMATS.values()}
    want = " or ".join(dtype.name for dtype in formats)
    check(values.dtype in formats, f"{function}: `{prefix}values` has dtype {values.dtype.name}, want {want}")
    check_matrix(function, f"{prefix}values", values)
    scale_inv = tf.cast(scale_inv, tf.float32)
    check_scales(function, f"{prefix}scale_inv", scale_inv, values, block)
    return values, scale_inv, formats[values.dtype]


def _key(block: Block) -> Block:
    """A block as a kernel's key: lists are no keys."""
    return None if block is None else tuple(block)
