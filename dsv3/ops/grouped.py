"""Products of rows that are grouped by expert with each expert's own matrix: one product per expert, on exact row counts."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from dsv3.ops.products import matmul_transposed
from dsv3.typing import TensorLike


def grouped_split(buffer: tf.Tensor, rows: TensorLike) -> list[tf.Tensor]:
    """Splits a buffer into the experts' rows and, last, the unused tail: returns E + 1 tensors.

    Args:
      buffer: `[C, ...]`.
      rows: `[E]` int32, an expert's rows; together at most C.
    """
    tail = buffer.shape[0] - tf.reduce_sum(rows)
    return tf.split(buffer, tf.concat([rows, [tail]], 0), num=rows.shape[0] + 1)


def grouped_matmul(
    buffer: tf.Tensor, kernels: Sequence[tf.Tensor], rows: TensorLike, *, transpose: bool = False, fuse: bool = False
) -> tf.Tensor:
    """Multiplies each expert's rows by its matrix; the tail becomes zeros.

    Args:
      buffer: `[C, D]`.
      kernels: E matrices `[D, F]`, `[F, D]` with `transpose`.
      rows: `[E]` int32, an expert's rows.
      transpose: multiply by the matrices' transposes.
      fuse: choose what is fastest outside XLA.

    Returns:
      `[C, F]`.
    """
    parts, share = grouped_split(buffer, rows), buffer.shape[0] // max(len(kernels), 1)
    if transpose:
        out = [matmul_transposed(p, w, fuse=fuse, rows=share) for p, w in zip(parts, kernels)]
    else:
        out = [tf.matmul(p, w) for p, w in zip(parts, kernels)]
    width = kernels[0].shape[0] if transpose else kernels[0].shape[1]
    out.append(tf.zeros([tf.shape(parts[-1])[0], width], buffer.dtype))
    return tf.ensure_shape(tf.concat(out, 0), [buffer.shape[0], width])


def grouped_outer(a: tf.Tensor, b: tf.Tensor, rows: TensorLike) -> tf.Tensor:
    """Returns `[E, D, F]`: for each expert `aᵀ @ b` over its rows.

    Args:
      a: `[C, D]`. b: `[C, F]`.
      rows: `[E]` int32, an expert's rows.
    """
    pairs = zip(grouped_split(a, rows)[:-1], grouped_split(b, rows)[:-1])
    return tf.stack([tf.matmul(p, q, transpose_a=True) for p, q in pairs])


def row_owner(ends: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Returns whose each row is: the number of groups that end at or before it, E for the tail.

    Args:
      ends: `[E]` int32, ascending: the row behind an expert's last.
      rows: `[R]` int32 numbers of rows.
    """
    return tf.reduce_sum(tf.cast(tf.expand_dims(rows, -1) >= ends, tf.int32), -1)
