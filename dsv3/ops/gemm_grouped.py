"""FP8 products of the routed experts: rows sorted by expert, one weight matrix an expert, dropless.

Fprop and Dgrad multiply an expert's rows, in tiles of 1×128, by its matrix in blocks of 128×128: their tiles know nothing of
the grouping. Wgrad sums over an expert's rows, so its tiles of 128 rows start anew at each expert's first row, and the last
of an expert is ragged: tile t of expert e holds the rows from `starts[e] + 128·t` on. Tiles are numbered through over the
experts, those without rows have none, and the unused rows behind all are tiled as one more group.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.checks import Dims, check, check_choice
from dsv3.graph import plain
from dsv3.ops.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_quantize
from dsv3.ops.fuse import fused
from dsv3.ops.gemm import fp8_expand, fp8_gemm, fp8_operand, fp8_wgrad
from dsv3.ops.grouped import grouped_matmul, grouped_outer, grouped_split, row_owner
from dsv3.typing import TensorLike

TILE = COLUMN_BLOCK[0]
KERNELS = ("sorted", "blocks")


@plain
def fp8_grouped_gemm(
    a: Fp8Tensor,
    b: Fp8Tensor,
    rows: TensorLike,
    *,
    transpose_b: bool = False,
    kernel: str = "sorted",
    multiple: int = 128,
    scaling: str = "block",
    dtype: tf.DType | str = tf.float32,
    fuse: bool = False,
    **options: Any,
) -> tf.Tensor:
    """Multiplies each expert's rows by its matrix: Fprop of the experts, and with `transpose_b` Dgrad.

    Args:
      a: `[C, K]` in tiles of 1×128, static C: the experts' rows one after the other, then unused ones.
      b: `[E, K, N]` in blocks of 128×128; `[E, N, K]` with `transpose_b`.
      rows: `[E]` int32, an expert's rows (`Dispatch.rows`), together at most C.
      transpose_b: the matrices are stored transposed, and read so.
      kernel: `"sorted"`, a product for each expert, fastest on a CPU; `"blocks"`, batched products with gathered matrices,
        whose static shapes XLA compiles.
      multiple: for `blocks`, a number that divides C and all of `rows`.
      scaling: `"block"`, or, for `blocks`, `"tensor"`: one scale for each of `a`, `[1, 1]`, and `b`, `[1, 1, 1]`.
      dtype: of the result.
      fuse: compile the element-wise parts as kernels (not under XLA).
      options: `accumulate`, `interval`, `bits` and `operands` of `fp8_gemm`.

    Returns:
      `[C, N]`, zeros in unused rows.

    Raises:
      ValueError: operands that do not fit, or a bad kernel or option.

    References: DeepSeek-V3 section 3.3.
    """
    _check_kernel("fp8_grouped_gemm", kernel, options)
    check_choice("fp8_grouped_gemm", "scaling", scaling, ("block", "tensor"))
    whole = scaling == "tensor"
    check(not whole or kernel == "blocks", f"fp8_grouped_gemm: `kernel` is {kernel!r} with scaling='tensor', want 'blocks'")
    a_block, b_block = (None, None) if whole else (ROW_BLOCK, WEIGHT_BLOCK)
    a, b = fp8_operand("fp8_grouped_gemm", "a", a, a_block), fp8_operand("fp8_grouped_gemm", "b", b, b_block)
    dims = Dims("fp8_grouped_gemm")
    dims("a", a.values, "C K")
    dims("b", b.values, "E N K" if transpose_b else "E K N")
    dims("rows", rows, "E")
    rows = tf.cast(rows, tf.int32)
    options |= {"a_block": a_block, "b_block": b_block, "transpose_b": transpose_b}
    if kernel == "blocks":
        check(dims.C % multiple == 0, f"fp8_grouped_gemm: `multiple` is {multiple}, want a divisor of C = {dims.C}")
        y = _gemm_blocks(a, b, rows, multiple, options | {"fuse": fuse})
    elif options.get("accumulate", "float32") == "float32":
        kernels = [fp8_expand(*w, block=WEIGHT_BLOCK, fuse=fuse) for w in zip(*map(tf.unstack, b))]
        y = grouped_matmul(fp8_expand(*a, block=ROW_BLOCK, fuse=fuse), kernels, rows, transpose=transpose_b, fuse=fuse)
    else:
        *parts, tail = zip(*(grouped_split(t, rows) for t in a))
        matrices = zip(*map(tf.unstack, b))
        out = [fp8_gemm(Fp8Tensor(*p), Fp8Tensor(*w), **options) for p, w in zip(parts, matrices)]
        y = tf.ensure_shape(tf.concat([*out, tf.zeros([tf.shape(tail[0])[0], dims.N])], 0), [dims.C, dims.N])
    return tf.cast(y, dtype)


@plain
def fp8_quantize_groups(x: TensorLike, rows: TensorLike, **options: Any) -> Fp8Tensor:
    """Quantises rows that are sorted by expert in tiles of 128×1 that start anew at each expert's first row.

    Args:
      x: `[C, D]`, static C, any floating dtype.
      rows: `[E]` int32, an expert's rows, together at most C.
      options: of `fp8_quantize`, but `block`.

    Returns:
      `Fp8Tensor`: values `[C, D]`, scales `[S, D]` with `S = ⌊(C + 127·(E + 1)) / 128⌋`, the tiles that any distribution of
      the rows may need.
    """
    dims = Dims("fp8_quantize_groups")
    dims("x", x, "C D")
    dims("rows", rows, "E")
    places, size = _places(rows, dims.C), _tile_count(dims.C, dims.E) * TILE
    aligned = tf.scatter_nd(tf.expand_dims(places, -1), tf.cast(x, tf.float32), [size, dims.D])
    q = fp8_quantize(aligned, block=COLUMN_BLOCK, **options)
    return Fp8Tensor(tf.gather(q.values, places), q.scale_inv)


@plain
def fp8_grouped_wgrad(
    x: Fp8Tensor,
    dy: Fp8Tensor,
    rows: TensorLike,
    *,
    kernel: str = "sorted",
    dtype: tf.DType | str = tf.float32,
    fuse: bool = False,
    **options: Any,
) -> tf.Tensor:
    """Returns `[E, D, F]`: for each expert `xᵀ @ dy` over its rows, zeros where it has none.

    Args:
      x: values `[C, D]` and scales `[S, D]` as `fp8_quantize_groups` makes them.
      dy: values `[C, F]` and scales `[S, F]`, the same.
      rows: `[E]` int32, an expert's rows, those of the quantisation.
      kernel: `"sorted"`, a product for each expert; `"blocks"`, a loop over tiles with static shapes, for XLA.
      dtype: of the result.
      fuse: compile the element-wise parts as kernels (not under XLA).
      options: `accumulate`, `interval`, `bits` and `operands` of `fp8_gemm`.

    Raises:
      ValueError: operands that do not fit, or a bad kernel or option.

    References: DeepSeek-V3 section 3.3.1, figure 6.
    """
    _check_kernel("fp8_grouped_wgrad", kernel, options)
    dims = Dims("fp8_grouped_wgrad")
    dims("rows", rows, "E")
    dims("x", x[0], "C D")
    dims("dy", dy[0], "C F")
    known = Dims("fp8_grouped_wgrad", S=_tile_count(dims.C, dims.E), D=dims.D, F=dims.F)
    known("x", x[1], "S D")  # scales
    known("dy", dy[1], "S F")
    rows = tf.cast(rows, tf.int32)
    x, dy = (Fp8Tensor(tf.convert_to_tensor(t[0]), tf.cast(t[1], tf.float32)) for t in (x, dy))
    if kernel == "blocks":
        return tf.cast(_wgrad_tiles(x, dy, rows, options | {"fuse": fuse}), dtype)
    if options.get("accumulate", "float32") == "float32":
        return tf.cast(grouped_outer(*(_expand_groups(*t, rows, fuse=fuse) for t in (x, dy)), rows), dtype)
    tiles = -(-rows // TILE)
    parts = [zip(grouped_split(t.values, rows)[:-1], grouped_split(t.scale_inv, tiles)[:-1]) for t in (x, dy)]
    return tf.stack([fp8_wgrad(Fp8Tensor(*p), Fp8Tensor(*q), dtype=dtype, **options) for p, q in zip(*parts)])


def _check_kernel(function: str, kernel: str, options: dict[str, Any]) -> None:
    check_choice(function, "kernel", kernel, KERNELS)
    check(
        kernel == "blocks" or options.get("operands", "expanded") == "expanded",
        f"{function}: `kernel` is {kernel!r} with operands='float8', want 'blocks', whose shapes are static",
    )


def _gemm_blocks(a: Fp8Tensor, b: Fp8Tensor, rows: tf.Tensor, multiple: int, options: dict[str, Any]) -> tf.Tensor:
    """`[C, N]` float32: a product for each block of rows, all of one expert, with its gathered matrix."""
    size, experts = a.values.shape[0], b.values.shape[0]
    owner = row_owner(tf.cumsum(rows), tf.range(size // multiple) * multiple)
    number = tf.minimum(owner, experts - 1)
    scale_a, scale_b = tf.expand_dims(a.scale_inv, 0), b.scale_inv
    if options["a_block"] is not None:
        scale_a = tf.reshape(scale_a, [size // multiple, multiple, scale_a.shape[-1]])
        scale_b = tf.gather(scale_b, number)
    blocks = Fp8Tensor(tf.reshape(a.values, [size // multiple, multiple, a.values.shape[-1]]), scale_a)
    matrices = Fp8Tensor(tf.gather(b.values, number), scale_b)
    y = fp8_gemm(blocks, matrices, **options)
    y = tf.where(tf.reshape(owner < experts, [-1, 1, 1]), y, 0.0)
    return tf.reshape(y, [size, y.shape[-1]])


def _tile_count(size: int, experts: int) -> int:
    """The tiles that hold `size` rows in any distribution over the experts and the tail."""
    return (size + (experts + 1) * (TILE - 1)) // TILE


def _places(rows: TensorLike, size: int) -> tf.Tensor:
    """`[C]` int32: where each row stands when every group is padded to whole tiles; divided by 128, its tile."""
    rows = tf.cast(rows, tf.int32)
    ends = tf.cumsum(rows)
    padding = tf.concat([[0], tf.cumsum(-rows % TILE)], 0)  # before each group, the tail included
    number = tf.range(size)
    return number + tf.gather(padding, row_owner(ends, number))


@fused
def _expand_groups(values: tf.Tensor, scale_inv: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """`[C, D]` float32: values times the scales of their tiles."""
    tile = _places(rows, values.shape[0]) // TILE
    return tf.cast(values, tf.float32) * tf.gather(scale_inv, tile)


def _wgrad_tiles(x: Fp8Tensor, dy: Fp8Tensor, rows: tf.Tensor, options: dict[str, Any]) -> tf.Tensor:
    """`[E, D, F]` float32: the product of each tile, added to its expert's."""
    count, experts = x.scale_inv.shape[0], rows.shape[0]
    places = tf.expand_dims(_places(rows, x.values.shape[0]), -1)
    owner = row_owner(tf.cumsum(-(-rows // TILE)), tf.range(count))  # E for the tail and for tiles that are not needed

    def align(t):  # as bfloat16, which has every value of FP8: TensorFlow neither scatters float8 nor takes it into a loop
        aligned = tf.scatter_nd(places, tf.cast(t.values, tf.bfloat16), [count * TILE, t.values.shape[1]])
        return tf.reshape(aligned, [count, TILE, t.values.shape[1]])

    left, right = align(x), align(dy)

    def add(i, dw):
        # Not `[i : i + 1]`, which would be of unknown size to XLA, and no program for others.
        p = Fp8Tensor(tf.cast(left[i], x.values.dtype), tf.expand_dims(x.scale_inv[i], 0))
        q = Fp8Tensor(tf.cast(right[i], dy.values.dtype), tf.expand_dims(dy.scale_inv[i], 0))
        return i + 1, tf.tensor_scatter_nd_add(dw, [[owner[i]]], tf.expand_dims(fp8_wgrad(p, q, **options), 0))

    zero = tf.zeros([experts + 1, x.values.shape[1], dy.values.shape[1]])
    return tf.while_loop(lambda i, _: i < count, add, [0, zero], parallel_iterations=1)[1][:experts]
