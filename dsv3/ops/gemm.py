"""Products of FP8 matrices: `Σ over blocks of K of s_a·s_b·(Σ_{k in block} q_a·q_b)`, and the three of a linear layer.

A linear layer y = x @ w is trained with three of them, each with the tiles along K that its sum needs:

======== ============ =================================== ==============================
product  formula      left operand, tiles                 right operand, tiles
======== ============ =================================== ==============================
Fprop    x @ w        x `[..., N, D]`, 1×128 along D      w `[D, F]`, 128×128
Dgrad    dy @ wᵀ      dy `[..., N, F]`, 1×128 along F     w `[D, F]`, the same blocks
Wgrad    xᵀ @ dy      x `[N, D]`, 128×1 along tokens      dy `[N, F]`, 128×1 along tokens
======== ============ =================================== ==============================
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from dsv3.checks import check, check_choice
from dsv3.graph import plain
from dsv3.ops.accumulator import check_accumulator, tensor_core_matmul
from dsv3.ops.float8_dot import float8_matmul
from dsv3.ops.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_dequantize
from dsv3.ops.fp8_formats import FORMATS
from dsv3.ops.fuse import fused
from dsv3.ops.products import matmul_transposed

Block = tuple[int, int] | None
DTYPES = tuple(fmt.dtype.name for fmt in FORMATS.values())
ACCUMULATORS = ("float32", "tensor_core")
OPERANDS = ("expanded", "float8")


@plain
def fp8_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    *,
    a_block: Block,
    b_block: Block,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: str = "float32",
    interval: int | None = 128,
    bits: int = 14,
    operands: str = "expanded",
    dtype: tf.DType | str = tf.float32,
    fuse: bool = False,
) -> tf.Tensor:
    """Multiplies two FP8 matrices, `[..., M, K] @ [..., K, N]`.

    `y_mn = Σ_i s_a[m, i]·s_b[i, n]·(Σ_{k in block i} q_a[m, k]·q_b[k, n])`. Blocks at ragged edges have their own size.

    `accumulate="float32"` dequantises both operands and multiplies them once: rounding apart the same sum, since a scale is
    one number within a block. A product per block, scaled and added, rounds a little less (not 2^-24 of each operand), but
    reads and writes `[M, N]` K/128 times: on a CPU it takes 1.9 times as long at 2048³ in plain TensorFlow, 1.4 times when
    compiled, where dequantising as fused kernels costs a tenth of the product.

    `operands="float8"` is the other way, for XLA on GPUs: products of float8 tensors into float32, one for each block of K,
    scaled and added. With one scale for each whole tensor that is one product, which a library has; with blocks the partial
    sums are kept in memory, and their traffic then takes longer than the products (`docs/export.md`).

    `accumulate="tensor_core"` is the model of Hopper's accumulator in `tensor_core_matmul`, for studies: slow.

    Args:
      a: values `[..., M, K]`, `[..., K, M]` with `transpose_a`, E4M3, E5M2 or E5M6 (float16), and a scale for each block.
      b: values `[..., K, N]`, `[..., N, K]` with `transpose_b`. Leading dims are broadcast.
      a_block: (rows, columns) of a block of `a` as it is stored; None: one scale for the whole tensor.
      b_block: the same of `b`.
      transpose_a, transpose_b: the operand is stored transposed, and read so: nothing is copied for it.
      accumulate: `"float32"` or `"tensor_core"`.
      interval: for the model, elements of K between promotions to float32: a multiple of 32 that divides the blocks along K;
        None for never, which wants one scale along K.
      bits: for the model, the accumulator's significant bits.
      operands: `"expanded"` to float32 before the product, or `"float8"`, which wants E4M3 or E5M2 and static shapes.
      dtype: of the result, rounded once.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[..., M, N]`. It has no gradient.

    Raises:
      ValueError: operands that are not FP8 or do not fit, scales that do not fit their blocks, a bad block or interval.

    References: DeepSeek-V3 section 3.3.2.

    >>> x, w = (Fp8Tensor(tf.cast(v, tf.dtypes.experimental.float8_e4m3fn), [[2.0]]) for v in ([[1.0, 3.0]], [[5.0], [7.0]]))
    >>> fp8_gemm(x, w, a_block=(1, 128), b_block=None).numpy().tolist()
    [[104.0]]
    """
    return _product(
        "fp8_gemm", ("a", "b"), (a, b), (a_block, b_block), (transpose_a, transpose_b),
        accumulate=accumulate, interval=interval, bits=bits, operands=operands, dtype=dtype, fuse=fuse,
    )  # fmt: skip


@plain
def fp8_fprop(x: Fp8Tensor, w: Fp8Tensor, **options: Any) -> tf.Tensor:
    """Returns `x @ w`, the forward product of a linear layer.

    Args:
      x: `[..., N, D]` in tiles of 1×128. w: `[D, F]` in blocks of 128×128.
      options: `accumulate`, `interval`, `bits`, `operands`, `dtype` and `fuse` of `fp8_gemm`.

    Returns:
      `[..., N, F]`.

    References: DeepSeek-V3 section 3.3.1, figure 6.
    """
    return _product("fp8_fprop", ("x", "w"), (x, w), (ROW_BLOCK, WEIGHT_BLOCK), (False, False), **options)


@plain
def fp8_dgrad(dy: Fp8Tensor, w: Fp8Tensor, **options: Any) -> tf.Tensor:
    """Returns `dy @ wᵀ`, the gradient of a linear layer's input; the weight is the one that `fp8_fprop` takes.

    Args:
      dy: `[..., N, F]` in tiles of 1×128. w: `[D, F]` in blocks of 128×128.
      options: as of `fp8_fprop`.

    Returns:
      `[..., N, D]`.

    References: DeepSeek-V3 section 3.3.1, figure 6.
    """
    return _product("fp8_dgrad", ("dy", "w"), (dy, w), (ROW_BLOCK, WEIGHT_BLOCK), (False, True), **options)


@plain
def fp8_wgrad(x: Fp8Tensor, dy: Fp8Tensor, **options: Any) -> tf.Tensor:
    """Returns `xᵀ @ dy`, the gradient of a linear layer's weight: a sum over tokens, along which both have their tiles.

    Args:
      x: `[N, D]` in tiles of 128×1. dy: `[N, F]` in tiles of 128×1.
      options: as of `fp8_fprop`.

    Returns:
      `[D, F]`.

    References: DeepSeek-V3 section 3.3.1, figure 6; section 3.5.2 on the transposition that it asks for.
    """
    return _product("fp8_wgrad", ("x", "dy"), (x, dy), (COLUMN_BLOCK, COLUMN_BLOCK), (True, False), **options)


@plain
def fp8_transpose(x: Fp8Tensor) -> Fp8Tensor:
    """Returns `Fp8Tensor` with the last two dims of `x` swapped, in values and scales; its blocks are those of `x`, swapped.

    >>> fp8_transpose(Fp8Tensor(tf.zeros([2, 256]), tf.zeros([2, 2]))).values.shape
    TensorShape([256, 2])
    """
    return Fp8Tensor(*(tf.linalg.matrix_transpose(t) for t in x))


def fp8_operand(function: str, argument: str, x: Fp8Tensor, block: Block) -> Fp8Tensor:
    """Returns an operand's tensors; raises `ValueError` in the name of `function` for a bad block, dtype or shape."""
    check(
        block is None or (len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)),
        f"{function}: `{argument}_block` is {block!r}, want None or two positive integers (rows, columns)",
    )
    values, scale = tf.convert_to_tensor(x[0]), tf.cast(x[1], tf.float32)
    name, rank = values.dtype.name, values.shape.rank
    check(name in DTYPES, f"{function}: `{argument}` has dtype {name}, want {', '.join(DTYPES)}")
    check(
        rank is not None and rank >= 2,
        f"{function}: `{argument}` has values of shape {values.shape}, want two dims at least",
    )
    if block is None and scale.shape.rank == 0:
        scale = tf.reshape(scale, [1] * rank)
    sizes = zip(values.shape[-2:], block or values.shape[-2:])
    want = tf.TensorShape([*values.shape[:-2], *(None if n is None else -(-n // b) if n else 0 for n, b in sizes)])
    if block is None:
        want = tf.TensorShape([None] * (rank - 2) + [1, 1])
    check(
        scale.shape.is_compatible_with(want),
        f"{function}: `{argument}` has scales of shape {scale.shape}, want {want} for values of shape {values.shape}",
    )
    return Fp8Tensor(values, scale)


@fused
def fp8_expand(values: tf.Tensor, scale_inv: tf.Tensor, *, block: Block) -> tf.Tensor:
    """Returns an operand as float32, `[..., M, N]`: like `fp8_dequantize`, with one scale where `block` is None.

    Args:
      values: `[..., M, N]` float8. scale_inv: its scales.
      block: as of `fp8_gemm`.
      fuse: compile as one kernel.
    """
    if block is None:
        return tf.cast(values, tf.float32) * scale_inv
    return fp8_dequantize(values, scale_inv, block=block)


def _product(
    function: str,
    names: tuple[str, str],
    pair: tuple[Fp8Tensor, Fp8Tensor],
    blocks: tuple[Block, Block],
    transpose: tuple[bool, bool],
    *,
    accumulate: str = "float32",
    interval: int | None = 128,
    bits: int = 14,
    operands: str = "expanded",
    dtype: tf.DType | str = tf.float32,
    fuse: bool = False,
) -> tf.Tensor:
    """`fp8_gemm` in the name of a function and its arguments."""
    check_choice(function, "accumulate", accumulate, ACCUMULATORS)
    check_accumulator(function, interval, bits)
    check_choice(function, "operands", operands, OPERANDS)
    check(
        operands == "expanded" or accumulate == "float32",
        f"{function}: `accumulate` is {accumulate!r} with operands='float8', want 'float32': a GPU has its own accumulator",
    )
    a, b = (fp8_operand(function, name, x, block) for name, x, block in zip(names, pair, blocks))
    k, other = a.values.shape[-2 if transpose[0] else -1], b.values.shape[-1 if transpose[1] else -2]
    if k is not None and other is not None:
        check(k == other, f"{function}: `{names[1]}` has K = {other}, want {k}, that of `{names[0]}`")
    if operands == "float8":
        interval = _shared_interval(blocks, transpose)
    elif accumulate == "float32":
        a, b = (fp8_expand(*x, block=block, fuse=fuse) for x, block in zip((a, b), blocks))
        if transpose == (False, True) and a.shape.rank == b.shape.rank == 2:
            return tf.cast(matmul_transposed(a, b, fuse=fuse), dtype)
        return tf.cast(tf.matmul(a, b, transpose_a=transpose[0], transpose_b=transpose[1]), dtype)
    scales = []
    for x, block, along_rows, name in zip((a, b), blocks, (transpose[0], not transpose[1]), names):
        x, block = (fp8_transpose(x), block and block[::-1]) if along_rows else (x, block)  # K last
        scales.append(_interval_scales(function, name, x, block, interval))
    if operands == "float8":
        y = float8_matmul(
            a.values, b.values, *scales, interval=interval, transpose_a=transpose[0], transpose_b=transpose[1],
            function=function, names=names,
        )  # fmt: skip
        return tf.cast(y, dtype)
    left, right = (
        tf.linalg.matrix_transpose(x.values) if turn else x.values for x, turn in zip((a, b), transpose)
    )
    scale_b = tf.linalg.matrix_transpose(scales[1])
    y = tensor_core_matmul(left, right, scales[0], scale_b, interval=interval, bits=bits, fuse=fuse)
    return tf.cast(y, dtype)


def _shared_interval(blocks: tuple[Block, Block], transpose: tuple[bool, bool]) -> int | None:
    """How many elements of K have one pair of scales; None: all."""
    depths = [block[dim] for block, dim in zip(blocks, (0 if transpose[0] else 1, 1 if transpose[1] else 0)) if block]
    return math.gcd(*depths) if depths else None


def _interval_scales(function: str, argument: str, x: Fp8Tensor, block: Block, interval: int | None) -> tf.Tensor:
    """The scales of `[..., M, K]`, one for each row and interval of K: `[..., M or 1, I]`."""
    rows, depth = (tf.shape(x.values)[i] if x.values.shape[i] is None else x.values.shape[i] for i in (-2, -1))
    count = tf.range(1 if interval is None else -(-depth // interval))
    if block is None:
        return tf.gather(x.scale_inv, 0 * count, axis=-1)
    if isinstance(depth, int) and depth <= block[1]:
        count *= 0
    else:
        check(
            interval is not None and block[1] % interval == 0,
            f"{function}: `interval` is {interval}, want a divisor of {block[1]}, as `{argument}` changes its scale along K",
        )
        count = count * interval // block[1]
    scale = tf.gather(x.scale_inv, count, axis=-1)
    return scale if block[0] == 1 else tf.repeat(scale, block[0], axis=-2)[..., :rows, :]
