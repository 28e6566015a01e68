"""Sums and maxima over a dim, in the formulation that the compiler at hand makes fast.

XLA on a CPU turns a plain sum into a tree of windows and a maximum into a scalar loop, which breaks fused kernels; there a
sum is a product with ones and a maximum takes two steps, or halves the dim. Anywhere else these are the plain reductions.
The values are the same up to the order of summation.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import tensorflow as tf

_IN_KERNEL = contextvars.ContextVar("dsv3_in_cpu_kernel", default=False)
_LANES, _PARTS = 32, 8


@contextlib.contextmanager
def cpu_kernel() -> Iterator[None]:
    """While this is open, reductions are traced in the form that is fast in a kernel compiled for a CPU."""
    token = _IN_KERNEL.set(True)
    try:
        yield
    finally:
        _IN_KERNEL.reset(token)


def row_sum(x: tf.Tensor) -> tf.Tensor:
    """Returns the sum over the last dim, kept as 1: `[..., 1]`; `x` is float32."""
    if _IN_KERNEL.get() and x.shape[-1] is not None and x.shape[-1] > _LANES:
        return tf.matmul(x, tf.ones([x.shape[-1], 1], x.dtype))
    return tf.reduce_sum(x, -1, keepdims=True)


def row_max(x: tf.Tensor) -> tf.Tensor:
    """Returns the maximum over `x`'s last dim, kept as 1: `[..., 1]`; no gradient is defined for the fast form's ties."""
    size = x.shape[-1]
    if _IN_KERNEL.get() and size is not None and size > _LANES and size % _LANES == 0:
        lead = [s if s is not None else tf.shape(x)[i] for i, s in enumerate(x.shape[:-1])]
        return tf.expand_dims(tf.reduce_max(tf.reduce_max(tf.reshape(x, [*lead, size // _LANES, _LANES]), -1), -1), -1)
    return tf.reduce_max(x, -1, keepdims=True)


def row_parts(x: tf.Tensor) -> list[tf.Tensor]:
    """Cuts the last dim into parts, for sums and maxima of costly values: of the parts first, then of what is left.

    A product with ones would have a kernel store exponentials before it adds them up; the sum of a few parts is one pass.
    """
    size = x.shape[-1]
    whole = not _IN_KERNEL.get() or size is None or size % (_PARTS * _LANES)
    return [x] if whole else tf.split(x, _PARTS, -1)


def halving_max(x: tf.Tensor, dim: int) -> tf.Tensor:
    """Returns the maximum of `x` over `dim`, counted from the end; the dim is gone.

    One half against the other, until one is left: fastest where the dim is a power of two and results are many.
    """
    size = x.shape[dim]
    if not _IN_KERNEL.get() or size is None or size & (size - 1):
        return tf.reduce_max(x, dim)
    while x.shape[dim] > 1:
        x = tf.maximum(*tf.split(x, 2, dim))
    return tf.squeeze(x, dim)
