"""Products with a matrix that is stored transposed, as every gradient of a linear layer's input is.

oneDNN reads the transposed operand of a float32 product in strides, and where those are powers of two the operand has few
sets of the cache for itself: slower than copying it and multiplying. In bfloat16 it packs operands anyway.
"""

from __future__ import annotations

import tensorflow as tf


def matmul_transposed(x: tf.Tensor, w: tf.Tensor, *, fuse: bool = False, rows: int | None = None) -> tf.Tensor:
    """Returns `x @ wᵀ`.

    Args:
      x: `[M, K]`. w: `[N, K]`.
      fuse: choose what is fastest outside XLA.
      rows: about how many M is, where it is unknown.
    """
    rows = x.shape[0] if rows is None else rows
    if not (fuse and x.dtype == tf.float32 and _copy_pays(rows, *w.shape)):
        return tf.matmul(x, w, transpose_b=True)
    with tf.control_dependencies([x]):  # not before: else the copies of all layers' matrices were made first and waited
        w = tf.identity(w)
    # Three dims: a graph optimiser would put a transposition of two back into the product.
    return tf.matmul(x, tf.squeeze(tf.transpose(tf.expand_dims(w, 0), [0, 2, 1]), 0))


def matmul_linear(x: tf.Tensor, w: tf.Tensor, *, fuse: bool = False) -> tf.Tensor:
    """Returns `x @ w`, `[M, D] @ [D, F]`, whose gradient for `x` is a `matmul_transposed`."""
    if not (fuse and x.dtype == tf.float32):
        return tf.matmul(x, w)

    @tf.custom_gradient
    def run(x, w):
        return tf.matmul(x, w), lambda dy: (matmul_transposed(dy, w, fuse=True), tf.matmul(x, dy, transpose_a=True))

    return run(x, w)


def _copy_pays(rows: int | None, n: int | None, k: int | None) -> bool:
    """As measured for M of 16 to 2,048 and matrices of 2^13 to 2^22 elements."""
    if None in (rows, n, k):
        return False
    return rows >= 1024 or (k % 512 == 0 and (n >= 512 or rows >= 256))
