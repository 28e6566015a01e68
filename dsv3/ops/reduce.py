"""Sums and maxima over a dim, in the formulation that the compiler at hand makes fast.

XLA on a CPU turns a plain sum into a tree of windows and a maximum into a scalar loop, which breaks fused kernels; there a
sum is a product with ones and a maximum is taken of parts first, or halves the dim. Anywhere else these are the plain
reductions. The values are the same up to the order of summation.

A maximum of floats is taken of their bits, as integers. XLA hands large reductions of floats to YNNPACK, and in TensorFlow
2.21 a kernel with one may end the process when two operations run it at a time: its constants are put in a list that has
no lock (`EmitYnnSubgraph`; later versions of XLA have one). A test looks for such kernels: tests/ops/test_kernels.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import tensorflow as tf

_IN_KERNEL = contextvars.ContextVar("dsv3_in_cpu_kernel", default=False)
_LANES, _PARTS, _SLICES = 32, 8, 16


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
    if _IN_KERNEL.get() and x.shape[-1] is not None:
        return tf.matmul(x, tf.ones([x.shape[-1], 1], x.dtype))
    return tf.reduce_sum(x, -1, keepdims=True)


def row_max(x: tf.Tensor) -> tf.Tensor:
    """Returns the maximum over `x`'s last dim, kept as 1: `[..., 1]`; no gradient is defined.

    In a kernel one that is no number may be passed over: what is computed of the row's own values is none either.
    """
    size = x.shape[-1]
    if _IN_KERNEL.get() and size is not None and size > 2 * _LANES:
        width = -(-size // _SLICES)  # the last slices overlap, which a maximum allows
        starts = [min(i * width, size - width) for i in range(_SLICES)]
        x = functools.reduce(tf.maximum, [x[..., start : start + width] for start in starts])
    return dim_max(x, -1, keepdims=True)


def dim_max(x: tf.Tensor, dim: int, *, keepdims: bool = False) -> tf.Tensor:
    """Returns the maximum of `x` over `dim`, which is gone, or 1 with `keepdims`; see `row_max`."""
    if not _IN_KERNEL.get() or x.dtype != tf.float32:
        return tf.reduce_max(x, dim, keepdims)
    bits = tf.reduce_max(turned(tf.bitcast(x, tf.int32)), dim, keepdims)
    return tf.bitcast(turned(bits), tf.float32)


def turned(bits: tf.Tensor) -> tf.Tensor:
    """Returns a float32's bits as an int32 in the floats' order, and back: below zero all but the sign are turned."""
    return tf.where(bits < 0, tf.bitwise.bitwise_xor(bits, tf.int32.max), bits)


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
        return dim_max(x, dim)
    while x.shape[dim] > 1:
        x = tf.maximum(*tf.split(x, 2, dim))
    return tf.squeeze(x, dim)
