"""Delayed scaling: a scale for each tensor, from the largest values that it had in the steps before.

What a tensor's largest values were is state of the training. A step puts it beside the weights (`delayed_attach`): a
`DelayedWeight` has a history for the layer's input, its weight and its output's gradient. The values of the present step
come out as the history's "gradient", which needs no other way through remat, loops and stacks; `delayed_detach` separates
them from the gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.ops.fp8 import Fp8Tensor, fp8_quantize
from dsv3.ops.fp8_formats import FORMATS
from dsv3.ops.fuse import fused
from dsv3.ops.gemm import fp8_gemm
from dsv3.recipe import Fp8Recipe
from dsv3.typing import Tree

INPUT, WEIGHT, GRADIENT = range(3)
MATRICES = ("q_a", "q_b", "kv_a", "kv_b", "o", "gate_up", "down")
"""By the last name of its path, what is computed in FP8."""


class DelayedWeight(NamedTuple):
    """A weight, and `amax` `[..., 3, history]` float32: the largest values of input, weight and gradient, newest first."""

    weight: tf.Tensor
    amax: tf.Tensor

    @property
    def shape(self) -> tf.TensorShape:
        return self.weight.shape


def delayed_specs(specs: Tree, recipe: Fp8Recipe | None) -> dict[str, tf.TensorSpec] | tuple:
    """Returns the histories of a model: by a parameter's path `[X, 3, history]` for X layers; `()` for other recipes.

    Args:
      specs: the model's parameters or their `ParamSpec`s.
      recipe: see `Fp8Recipe`.
    """
    if recipe is None or recipe.scaling != "delayed":
        return ()
    layers = {path: spec.shape[0] for path, spec in tree.items(specs) if _is_matrix(path)}
    return {path: tf.TensorSpec([count, 3, recipe.history], tf.float32) for path, count in layers.items()}


def delayed_attach(params: Tree, amax: dict[str, tf.Tensor]) -> Tree:
    """Returns the parameters with a `DelayedWeight` for each matrix that `amax` has a history of."""
    return tree.graft(params, {path: DelayedWeight(tree.subtree(params, path), history) for path, history in amax.items()})


def delayed_detach(grads: Tree, paths: Iterable[str]) -> tuple[Tree, dict[str, tf.Tensor]]:
    """Takes gradients of attached parameters apart: those of the plain ones, and by path what was seen, `[X, 3]`."""
    attached = {path: tree.subtree(grads, path) for path in paths}
    plain = tree.graft(grads, {path: d.weight for path, d in attached.items()})
    return plain, {path: d.amax[..., 0] for path, d in attached.items()}


def delayed_update(amax: dict[str, tf.Tensor], seen: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns the histories after a step: what it has seen comes first, the oldest values fall out."""
    return {path: tf.concat([seen[path][..., None], old[..., :-1]], -1) for path, old in amax.items()}


@fused
def largest(x: tf.Tensor) -> tf.Tensor:
    """The largest absolute value, float32: NaN if one is NaN, 0 of nothing."""
    bits = tf.bitwise.bitwise_and(tf.bitcast(tf.cast(x, tf.float32), tf.int32), 0x7FFFFFFF)
    # Numbers without a sign are ordered as their bits are, NaN last: alike everywhere, where maxima of floats are not.
    return tf.bitcast(tf.maximum(tf.reduce_max(bits), 0), tf.float32)


def delayed_quantize(
    x: tf.Tensor, history: tf.Tensor, *, fmt: str, fuse: bool = False
) -> tuple[Fp8Tensor, tf.Tensor]:
    """Quantises a tensor with the scale of its history; what is larger than before saturates.

    Args:
      x: `[..., M, N]`, floating.
      history: `[history]` float32; where it is empty, as at the first step, the present largest value counts.
      fmt: the format.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `Fp8Tensor` with one scale, and the present largest value.
    """
    now, before = largest(x, fuse=fuse), tf.reduce_max(history)
    amax = tf.maximum(tf.where(before > 0, before, now), tf.constant(2.0**-100))
    rank = max(x.shape.rank, 2)
    scale = tf.reshape(amax / FORMATS[fmt].max, [1] * rank)
    return fp8_quantize(x, block=None, fmt=fmt, scale_inv=scale, fuse=fuse), now


def observed(amax: tf.Tensor, *now: tf.Tensor) -> tf.Tensor:
    """The "gradient" of a history `[3, history]`: the largest values of input, weight and gradient, in its first column.

    What is not finite is left out: it would be every tensor's scale for as long as the history is.
    """
    now = tf.stack(now)
    now = tf.where(tf.math.is_finite(now), now, 0.0)
    return tf.concat([now[:, None], tf.zeros_like(amax[:, 1:])], 1)


def delayed_linear(x: tf.Tensor, weight: DelayedWeight, *, recipe: Fp8Recipe, fuse: bool = False) -> tf.Tensor:
    """`nn.fp8.fp8_linear` with delayed scales.

    Args:
      x: `[N, D]`. weight: of `[D, F]` and `[3, history]`.
      recipe: see `Fp8Recipe`.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[N, F]` in `x`'s dtype.

    References: arXiv:2209.05433, section 5, compares ways to scale; Transformer Engine's `DelayedScaling`.
    """
    sums = {name: getattr(recipe, name) for name in ("accumulate", "interval", "bits", "operands")}
    how = {"a_block": None, "b_block": None, "fuse": fuse, **sums}

    @tf.custom_gradient
    def apply(x, weight, amax):
        q, seen_x = delayed_quantize(x, amax[INPUT], fmt=recipe.forward, fuse=fuse)
        w, seen_w = delayed_quantize(weight, amax[WEIGHT], fmt=recipe.forward, fuse=fuse)

        def grad(dy):
            d, seen_d = delayed_quantize(dy, amax[GRADIENT], fmt=recipe.backward, fuse=fuse)
            dx = fp8_gemm(d, w, transpose_b=True, dtype=x.dtype, **how)
            dw = fp8_gemm(q, d, transpose_a=True, dtype=weight.dtype, **how)
            return dx, dw, observed(amax, seen_x, seen_w, seen_d)

        return fp8_gemm(q, w, dtype=x.dtype, **how), grad

    return apply(x, weight.weight, weight.amax)


def check_attached(function: str, weight: object, recipe: Fp8Recipe) -> None:
    """Raises `ValueError` in the name of `function` where a weight lacks the history that the recipe needs, or has one."""
    has, needs = isinstance(weight, DelayedWeight), recipe.scaling == "delayed"
    check(has or not needs, f"{function}: a weight has no history, want one of `delayed_attach` with scaling='delayed'")
    check(needs or not has, f"{function}: a weight has a history, want a plain one with scaling={recipe.scaling!r}")


def _is_matrix(path: str) -> bool:
    return path.rpartition(".")[2] in MATRICES
