"""Weights that stay in one byte a value in memory: products decode them strip by strip.

    kind   values                       scale_inv of `[D, P·F]`     a scale is for
    fp8    E4M3 bits in `uint8`         `[⌈D/128⌉, P, ⌈F/128⌉]`     128×128 values: the published checkpoint's own
    int8   integers from −127 to 127    `[⌈D/128⌉, 1, P·F]`         128 rows of one column

P parts lie side by side in a matrix (gate and up, P = 2), and each has blocks of its own, as each is a tensor of its own in
a checkpoint. A weight is `values · scale_inv`; both kinds are read in the same way, the second with columns of one.

E4M3 is held as bits since float8 can enter neither a loop nor a branch of a graph outside XLA (see `ops.fp8_bits`). INT8 has
a scale for 128 rows of a column and not for the whole column: 3% more memory, and with normal weights of 2048 rows an error
of 0.65% instead of 0.83%; FP8 has 2.6%.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import check, check_choice
from dsv3.graph import plain
from dsv3.ops.fp8 import WEIGHT_BLOCK, fp8_quantize
from dsv3.ops.fp8_bits import BITS_SCALE, fp8_to_bits, half_bits
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import dim_max
from dsv3.typing import TensorLike

KINDS = ("fp8", "int8")
GROUP = WEIGHT_BLOCK[0]
STRIP = 1 << 21
"""Decoded values that exist at one time in a product: 4 MB in bfloat16."""

_SMALL = 1 << 12  # values that are not worth a kernel of their own
_LEVELS = 127.0
_MIN_AMAX = 2.0**-100


class QuantizedWeight(NamedTuple):
    """`values` `[..., D, F]` (`uint8` for FP8, `int8`), `scale_inv` `[..., ⌈D/128⌉, P, n]` float32; see the module.

    D and F may be several dims, as in the parameter that it stands for: its scales are those of the matrix.
    """

    values: tf.Tensor
    scale_inv: tf.Tensor

    @property
    def shape(self) -> tf.TensorShape:
        """The shape of the parameter that it stands for."""
        return self.values.shape

    @property
    def kind(self) -> str:
        """`"fp8"` or `"int8"`."""
        return "fp8" if self.values.dtype == tf.uint8 else "int8"


@plain
def quantized_encode(weight: TensorLike, *, kind: str = "fp8", parts: int = 1, fuse: bool = False) -> QuantizedWeight:
    """Quantises matrices.

    `fp8`: as `fp8_quantize` in blocks of 128×128. `int8`: `s = amax / 127`, `round(w / s)` over 128 rows of a column.

    Args:
      weight: `[..., D, F]`, floating, finite.
      kind: `"fp8"` or `"int8"`.
      parts: matrices that lie side by side in `weight`.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `QuantizedWeight`. What is not finite makes its scale NaN or infinite.

    Raises:
      ValueError: fewer than two dims, an integer dtype, a bad kind, or columns that are not `parts` equal parts.

    References: DeepSeek-V3 section 3.3.2; arXiv:2208.07339, section 2.1 (absmax quantisation to INT8).

    >>> q = quantized_encode([[254.0, -127.0]], kind="int8")
    >>> q.values.numpy().tolist(), q.scale_inv.numpy().tolist()
    ([[127, -127]], [[[2.0, 1.0]]])
    """
    check_choice("quantized_encode", "kind", kind, KINDS)
    weight = tf.convert_to_tensor(weight)
    rank = weight.shape.rank
    check(rank is not None and rank >= 2, f"quantized_encode: `weight` has shape {weight.shape}, want [..., D, F]")
    check(weight.dtype.is_floating, f"quantized_encode: `weight` has dtype {weight.dtype.name}, want a floating dtype")
    *lead, rows, columns = weight.shape
    check(columns % parts == 0, f"quantized_encode: `weight` has {columns} columns, want {parts} equal parts")
    if kind == "int8":
        return QuantizedWeight(*_encode_int8(tf.cast(weight, tf.float32), fuse=fuse))
    if parts > 1:
        weight = _swap(tf.reshape(weight, [*lead, rows, parts, columns // parts]))
    q = fp8_quantize(weight, fuse=fuse)
    values, scale = fp8_to_bits(q.values, fuse=fuse), q.scale_inv
    if parts == 1:
        return QuantizedWeight(values, tf.expand_dims(scale, -2))
    return QuantizedWeight(tf.reshape(_swap(values), [*lead, rows, columns]), _swap(scale))


@plain
def quantized_decode(
    weight: QuantizedWeight, *, dtype: tf.DType | str = tf.float32, fuse: bool = False
) -> tf.Tensor:
    """Returns `values · scale_inv`, multiplied in float32 and rounded once to `dtype`: whole matrices.

    Args:
      weight: `QuantizedWeight` of `[..., D, F]`.
      dtype: of the result.
      fuse: compile as one kernel (not under XLA).

    Returns:
      `[..., D, F]`.

    Raises:
      ValueError: values of another dtype, or scales that do not fit them.
    """
    weight = check_quantized("quantized_decode", "weight", weight)
    return _decode(*weight, dtype=tf.as_dtype(dtype), fuse=fuse)


@plain
def quantized_matmul(
    x: TensorLike, weight: QuantizedWeight, *, transpose: bool = False, strip: int = STRIP, fuse: bool = True
) -> tf.Tensor:
    """Returns `x @ weight`, which is decoded in strips of its columns, each of at most `strip` values, one after the other.

    The result is that of a product with the decoded matrix: each column has one sum.

    Args:
      x: `[..., N, D]`, floating; the decoded strips are rounded to its dtype.
      weight: `QuantizedWeight` of `[D, F]`, or of `[H, D, F]` for H products with `x` `[H, N, D]`.
      transpose: multiply by the transposes: `x` is `[..., N, F]`, the result `[..., N, D]`. Stacked matrices only.
      strip: values of the weight that are decoded at one time; of one column, or one matrix of a stack, at least.
      fuse: decode by a compiled kernel. Outside XLA it is seven times as fast on a CPU; tiny weights have none.

    Returns:
      `[..., N, F]` in `x`'s dtype.

    Raises:
      ValueError: operands that do not fit, values of another dtype, scales that do not fit them.

    References: DeepSeek-V3 section 3.3.2 (blocks of weights); arXiv:2208.07339 (weights in INT8).

    >>> w = quantized_encode([[1.0, 2.0], [0.0, 448.0]])
    >>> quantized_matmul([[1.0, 1.0]], w).numpy().tolist()
    [[1.0, 450.0]]
    """
    weight = check_quantized("quantized_matmul", "weight", weight)
    x, rank = tf.convert_to_tensor(x), weight.shape.rank
    check(rank in (2, 3), f"quantized_matmul: `weight` has shape {weight.shape}, want [D, F] or [H, D, F]")
    check(rank == 3 or not transpose, "quantized_matmul: `transpose` is for stacked matrices [H, D, F]")
    want = [*weight.shape[:-2], None, weight.shape[-1 if transpose else -2]]
    check(
        x.shape.rank == rank and x.shape.is_compatible_with(want),
        f"quantized_matmul: `x` has shape {x.shape}, want {tf.TensorShape(want)} [..., N, D]",
    )
    dim = 0 if rank == 3 else 1  # what is cut: the stack, or columns
    total = weight.shape[dim]
    step = max(strip * total // max(weight.shape.num_elements(), 1), 1)
    if step >= total:
        starts, step = [0], total
    else:
        step = step // GROUP * GROUP if dim and step > GROUP else step
        starts = range(0, total, step)
    out, before = [], x
    fuse = fuse and weight.shape.num_elements() > _SMALL
    for start in starts:
        size = min(step, total - start)
        # A strip waits for the one before it and for x, or a graph would decode all of them, and all layers, at once.
        with tf.control_dependencies([] if tf.executing_eagerly() else [before]):
            part = _decode_strip(*weight, tf.constant(start), size=size, dim=dim, dtype=x.dtype, fuse=fuse)
        rows = x[start : start + size] if dim == 0 else x
        before = tf.matmul(rows, part, transpose_b=transpose)
        out.append(before)
    return out[0] if len(out) == 1 else tf.concat(out, dim)


def check_quantized(function: str, argument: str, weight: QuantizedWeight) -> QuantizedWeight:
    """Returns a `weight`'s tensors; raises `ValueError` in the name of `function` for a bad dtype or scales."""
    values, scale = tf.convert_to_tensor(weight[0]), tf.cast(weight[1], tf.float32)
    name, rank = values.dtype.name, values.shape.rank
    check(name in ("uint8", "int8"), f"{function}: `{argument}` has dtype {name}, want uint8 (E4M3 bits) or int8")
    check(rank is not None and rank >= 2, f"{function}: `{argument}` has shape {values.shape}, want [..., D, F]")
    *lead, rows, columns = values.shape
    parts = scale.shape[-2] if scale.shape.rank == rank + 1 else None
    fits = parts and columns is not None and columns % parts == 0
    width = columns // parts if fits else 0
    counts = [columns] if name == "int8" and parts == 1 else [width, -(-width // GROUP)]  # fp8: also by column
    wanted = [tf.TensorShape([*lead, None if rows is None else -(-rows // GROUP), parts, n]) for n in counts]
    check(
        fits and any(scale.shape.is_compatible_with(want) for want in wanted),
        f"{function}: `{argument}` has scales of shape {scale.shape}, want [..., ⌈D/128⌉, P, n] for {values.shape}",
    )
    return QuantizedWeight(values, scale)


def column_scales(scale: tf.Tensor, columns: int) -> tf.Tensor:
    """Returns scales `[..., m, P, n]` as one for each of all `columns`: `[..., m, P·F]`."""
    *lead, m, parts, n = scale.shape
    width = columns // parts
    if n != width:
        scale = tf.repeat(scale, GROUP, axis=-1)[..., :width]
    return tf.reshape(scale, [*(tf.shape(scale)[i] if s is None else s for i, s in enumerate(lead)), m, columns])


def _values(values: tf.Tensor, scale: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Numbers and what they are to be multiplied by, float32."""
    if values.dtype == tf.int8:
        return tf.cast(values, tf.float32), scale
    return half_bits(values), scale * BITS_SCALE


def _scaled(values: tf.Tensor, scale: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`[..., D, F]` times scales `[..., m, F]` of 128 rows each."""
    numbers, scale = _values(values, scale)
    *lead, rows, columns = values.shape
    lead = [tf.shape(values)[i] if s is None else s for i, s in enumerate(lead)]
    if rows <= GROUP:
        return tf.cast(numbers * scale, dtype)
    if rows % GROUP:
        return tf.cast(numbers * tf.repeat(scale, GROUP, axis=-2)[..., :rows, :], dtype)
    tiles = tf.reshape(numbers, [*lead, rows // GROUP, GROUP, columns]) * tf.expand_dims(scale, -2)
    return tf.cast(tf.reshape(tiles, [*lead, rows, columns]), dtype)


@fused
def _decode(values, scale, *, dtype):
    return _scaled(values, column_scales(scale, values.shape[-1]), dtype)


@fused
def _decode_strip(values, scale, start, *, size, dim, dtype):
    """`size` columns (`dim` 1) or matrices (`dim` 0) from `start` on."""
    if size == values.shape[dim]:
        return _scaled(values, column_scales(scale, values.shape[-1]), dtype)
    if dim == 0:
        values, scale = (_cut(t, start, size, 0) for t in (values, scale))
        return _scaled(values, column_scales(scale, values.shape[-1]), dtype)
    scale = column_scales(scale, values.shape[-1])
    return _scaled(_cut(values, start, size, 1), _cut(scale, start, size, 1), dtype)


def _cut(x: tf.Tensor, start: tf.Tensor, size: int, dim: int) -> tf.Tensor:
    begin, sizes = [0] * x.shape.rank, x.shape.as_list()
    begin[dim], sizes[dim] = start, size
    return tf.slice(x, tf.stack(begin), sizes)


@fused
def _encode_int8(weight):
    rows = weight.shape[-2]
    pads = [[0, 0]] * (weight.shape.rank - 2) + [[0, -rows % GROUP], [0, 0]]
    lead = [tf.shape(weight)[i] if s is None else s for i, s in enumerate(weight.shape[:-2])]
    tiles = tf.reshape(tf.pad(weight, pads), [*lead, -(-rows // GROUP), GROUP, weight.shape[-1]])
    scale = tf.maximum(dim_max(tf.abs(tiles), -2), _MIN_AMAX) / _LEVELS
    scaled = tf.clip_by_value(tf.round(tiles / tf.expand_dims(scale, -2)), -_LEVELS, _LEVELS)
    flat = tf.reshape(scaled, [*lead, -(-rows // GROUP) * GROUP, weight.shape[-1]])
    return tf.cast(flat[..., :rows, :], tf.int8), tf.expand_dims(scale, -2)


def _swap(x: tf.Tensor) -> tf.Tensor:
    """Swaps the third and second last dims."""
    rank = x.shape.rank
    return tf.transpose(x, [*range(rank - 3), rank - 2, rank - 3, rank - 1])
