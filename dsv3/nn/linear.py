"""Linear maps and the dense SwiGLU feed-forward layer."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check
from dsv3.graph import plain
from dsv3.nn.fp8 import fp8_linear, fp8_swiglu_linear
from dsv3.nn.fp8_delayed import DelayedWeight, check_attached, delayed_linear
from dsv3.ops.activation import swiglu
from dsv3.ops.products import matmul_linear
from dsv3.ops.quantized import QuantizedWeight, quantized_matmul
from dsv3.recipe import Fp8Recipe
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike


@plain
def linear_apply(
    x: TensorLike,
    weight: TensorLike | QuantizedWeight | DelayedWeight,
    bias: TensorLike | tuple = (),
    *,
    fp8: Fp8Recipe | None = None,
    after_attention: bool = False,
    fuse: bool = False,
) -> tf.Tensor:
    """Returns `x @ weight (+ bias)` over the last dim, as one two-dimensional product.

    Args:
      x: `[..., D]`.
      weight: `[D, F]`, or `[D, H, F]` for one matrix per head; cast to `x`'s dtype. A `QuantizedWeight` is decoded strip by
        strip, and not with `fp8`; a `DelayedWeight` is what `fp8` with delayed scaling wants.
      bias: `[F]`, or `()` for none.
      fp8: compute it, and its gradients, in FP8: see `nn.fp8.fp8_linear`. The weight is then quantised as it is.
      after_attention, fuse: see there.

    Returns:
      `[..., F]`, or `[..., H·F]` for a three-dimensional weight.
    """
    x = tf.convert_to_tensor(x)
    width = x.shape[-1]
    Dims("linear_apply", D=width)("weight", weight, "D F" if len(weight.shape) == 2 else "D H F")
    rows, weight = tf.reshape(x, [-1, width]), weight_matrix(weight, width)
    if isinstance(weight, QuantizedWeight):
        check(fp8 is None, "linear_apply: `weight` is quantised, want fp8=None: FP8 products quantise weights of training")
        y = quantized_matmul(rows, weight)
    elif fp8 is None:
        y = matmul_linear(rows, tf.cast(weight, x.dtype), fuse=fuse)
    else:
        check_attached("linear_apply", weight, fp8)
        if isinstance(weight, DelayedWeight):
            y = delayed_linear(rows, weight, recipe=fp8, fuse=fuse)
        else:
            y = fp8_linear(rows, weight, recipe=fp8, after_attention=after_attention, fuse=fuse)
    if not isinstance(bias, tuple):
        y += tf.cast(bias, x.dtype)
    shape = tf.concat([tf.shape(x)[:-1], [weight.shape[1]]], 0)
    return tf.ensure_shape(tf.reshape(y, shape), [*x.shape[:-1], weight.shape[1]])


def weight_matrix(
    weight: TensorLike | QuantizedWeight | DelayedWeight, inputs: int
) -> tf.Tensor | QuantizedWeight | DelayedWeight:
    """Returns a weight of any kind whose first dims make up `inputs`, as the matrix `[inputs, outputs]`."""
    if isinstance(weight, DelayedWeight):
        return weight._replace(weight=tf.reshape(weight.weight, [inputs, -1]))
    if isinstance(weight, QuantizedWeight):
        return weight._replace(values=tf.reshape(weight.values, [inputs, -1]))
    return tf.reshape(weight, [inputs, -1])


class MLPParams(NamedTuple):
    """SwiGLU feed-forward: `gate_up` `[D, 2F]` (gate, then up), `down` `[F, D]`."""

    gate_up: tf.Tensor
    down: tf.Tensor


def mlp_specs(hidden_size: int, intermediate_size: int, *, std: float) -> MLPParams:
    """Returns the `ParamSpec`s of a feed-forward layer."""
    return MLPParams(
        gate_up=ParamSpec((hidden_size, 2 * intermediate_size), ("embed", "mlp"), std=std),
        down=ParamSpec((intermediate_size, hidden_size), ("mlp", "embed"), std=std),
    )


@plain
def mlp_apply(params: MLPParams, x: TensorLike, *, fp8: Fp8Recipe | None = None, fuse: bool = False) -> tf.Tensor:
    """Returns `(silu(x @ gate)·(x @ up)) @ down`.

    Args:
      params: see `MLPParams`.
      x: `[..., D]`.
      fp8: compute the products in FP8. If the recipe says so, of SwiGLU only the input is kept, in FP8.
      fuse: compile the element-wise parts as kernels.

    Returns:
      `[..., D]`.

    References: arXiv:2002.05202.
    """
    how = {"fp8": fp8, "fuse": fuse}
    h = linear_apply(x, params.gate_up, **how)
    if fp8 is None or not fp8.keep_swiglu:
        return linear_apply(swiglu(h, fuse=fuse), params.down, **how)
    check_attached("mlp_apply", params.down, fp8)
    y = fp8_swiglu_linear(tf.reshape(h, [-1, h.shape[-1]]), params.down, recipe=fp8, fuse=fuse)
    shape = tf.concat([tf.shape(h)[:-1], [params.down.shape[1]]], 0)
    return tf.ensure_shape(tf.reshape(y, shape), [*h.shape[:-1], params.down.shape[1]])
