"""RMSNorm."""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import Dims, check, check_choice
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_sum
from dsv3.typing import TensorLike


@plain
def rms_norm(
    x: TensorLike, weight: TensorLike, *, eps: float = 1e-6, rounding: str = "before_weight", fuse: bool = False
) -> tf.Tensor:
    """Root-mean-square normalisation of the last dim, computed in float32.

    `y = x / sqrt(mean(x²) + eps) · weight`

    Args:
      x: `[..., D]`, float32 or bfloat16.
      weight: `[D]`.
      eps: added to the mean square.
      rounding: `"before_weight"` rounds to `x`'s dtype before multiplying by the weight (HF), `"after_weight"` multiplies
        in float32 and rounds once (official code). Equal in float32.
      fuse: compile as one kernel (see `ops.fuse`).

    Returns:
      `[..., D]` in `x`'s dtype.

    References: arXiv:1910.07467.

    >>> [round(float(y), 4) for y in rms_norm(tf.constant([3.0, 4.0]), tf.ones([2]), eps=0.0)]
    [0.8485, 1.1314]
    """
    check_choice("rms_norm", "rounding", rounding, ("before_weight", "after_weight"))
    x = tf.convert_to_tensor(x)
    check(x.shape.rank != 0, "rms_norm: `x` is a scalar, want [..., D]")
    Dims("rms_norm", D=x.shape[-1])("weight", weight, "D")
    return _rms_norm(x, weight, eps=eps, rounding=rounding, fuse=fuse)


@fused
def _input_grad(x, weight, dy, *, eps):
    """`dx = s·(g − x̂·mean(g·x̂))` with `g = dy·weight`, `x̂ = s·x` and s one over the root mean square, in float32."""
    x_hat, s = _normalized(x, eps)
    g = tf.cast(dy, tf.float32) * tf.cast(weight, tf.float32)
    return tf.cast(s * (g - x_hat * (row_sum(g * x_hat) / tf.cast(tf.shape(x)[-1], tf.float32))), x.dtype)


@fused
def _weight_terms(x, dy, *, eps, rows):
    """`dy·x̂`, `[..., D]` float32, summed over so many neighbouring rows: the rest is left to TensorFlow's own sum."""
    width = tf.shape(x)[-1] if x.shape[-1] is None else x.shape[-1]
    terms = tf.reshape(tf.cast(dy, tf.float32) * _normalized(x, eps)[0], [-1, rows, width])
    return tf.add_n(tf.unstack(terms, axis=1))


def _rms_norm_gradient(x, weight, dy, *, eps, rounding):
    size = x.shape.num_elements()
    rows = 8 if size and size // x.shape[-1] % 8 == 0 else 1
    d_weight = tf.reduce_sum(_weight_terms(x, dy, eps=eps, rows=rows, fuse=True), 0)
    return _input_grad(x, weight, dy, eps=eps, fuse=True), tf.cast(d_weight, weight.dtype)


def _normalized(x, eps):
    x = tf.cast(x, tf.float32)
    s = tf.math.rsqrt(row_sum(tf.square(x)) / tf.cast(tf.shape(x)[-1], tf.float32) + eps)
    return x * s, s


@fused(gradient=_rms_norm_gradient)
def _rms_norm(x, weight, *, eps, rounding):
    y, _ = _normalized(x, eps)
    if rounding == "before_weight":
        return tf.cast(y, x.dtype) * tf.cast(weight, x.dtype)
    return tf.cast(y * tf.cast(weight, tf.float32), x.dtype)
