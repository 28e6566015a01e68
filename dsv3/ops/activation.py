"""SwiGLU."""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import check
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.typing import TensorLike


@plain
def swiglu(gate_up: TensorLike, *, fuse: bool = False) -> tf.Tensor:
    """Returns `silu(gate)·up` of a fused projection, `silu(z) = z·sigmoid(z)`.

    Args:
      gate_up: `[..., 2F]`, the gate in the first half of the last dim, up in the second.
      fuse: compile as one kernel.

    Returns:
      `[..., F]` in the input's dtype.

    References: arXiv:2002.05202.
    """
    gate_up = tf.convert_to_tensor(gate_up)
    width = gate_up.shape[-1] if gate_up.shape.rank else None
    check(width is not None and width % 2 == 0, f"swiglu: `gate_up` has last dim {width}, want an even number [2F]")
    return _swiglu(gate_up, fuse=fuse)


@fused
def _halves_grad(gate_up, d):
    return tuple(tf.cast(half, gate_up.dtype) for half in swiglu_grad_float32(gate_up, tf.cast(d, tf.float32)))


def _swiglu_gradient(gate_up, d):
    # Put together outside the kernel, which would choose between the halves at each element.
    return [tf.concat(_halves_grad(gate_up, d, fuse=True), -1)]


@fused(gradient=_swiglu_gradient)
def _swiglu(gate_up):
    return tf.cast(swiglu_float32(gate_up), gate_up.dtype)


def swiglu_float32(gate_up: tf.Tensor) -> tf.Tensor:
    """Returns `gate·up·sigmoid(gate)`, not yet rounded to `gate_up`'s dtype.

    In this order: TensorFlow would rewrite `gate·sigmoid(gate)` to a kernel that is slow for a few rows.
    """
    gate, up = tf.split(gate_up, 2, axis=-1)
    gate = tf.cast(gate, tf.float32)
    return gate * tf.cast(up, tf.float32) * tf.sigmoid(gate)


def swiglu_grad_float32(gate_up: tf.Tensor, d: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the gradients of gate and up, not yet rounded, of the activation's `d` in float32."""
    gate, up = tf.split(tf.cast(gate_up, tf.float32), 2, axis=-1)
    sig = tf.sigmoid(gate)
    return d * up * sig * (1.0 + gate * (1.0 - sig)), d * gate * sig
