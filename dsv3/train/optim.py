"""AdamW with clipping by global norm, in the `init` / `update` form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_choice, check_same_tree
from dsv3.compiled import update_leaves
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_sum
from dsv3.typing import Tree

Schedule = Callable[[tf.Tensor], tf.Tensor]
"""A scalar as a function of the tokens seen so far, or of the updates done (`SCHEDULE_UNITS`), a float64 scalar: exact up to
2⁵³, where float32 ends at 2²⁴."""
SCHEDULE_UNITS = ("tokens", "updates")


class AdamState(NamedTuple):
    """`count` int32 scalar, updates done; `mu` and `nu`: trees of first and second moments like the parameters."""

    count: tf.Tensor
    mu: Tree
    nu: Tree


class OptimStats(NamedTuple):
    """`grad_norm`, the global norm before clipping, and `learning_rate`: float32 scalars."""

    grad_norm: tf.Tensor
    learning_rate: tf.Tensor


class Optimizer(NamedTuple):
    """A pair of pure functions.

    `init(params) -> state`; `update(grads, state, params, tokens, norm, take) -> (params, state, OptimStats)`, where
    `tokens` is the number of tokens seen so far (float64), which schedules are functions of unless they count updates,
    `norm` that of all gradients (`global_norm`), and `take` a bool scalar: where it is false, as for a loss that is not
    finite, parameters and state come back as they were.

    `last_update(params, state, learning_rate) -> list` gives what the last update has taken from each parameter, up to
    rounding, from what is there after it; `None` where an optimiser cannot tell.

    On a mesh `update` gets each device's parts of the trees, so it must treat every scalar alike: what it needs of the whole
    is in `norm` and `take`.
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree, OptimStats]]
    last_update: Callable[..., list[tf.Tensor]] | None = None


def decays(path: str) -> bool:
    """Whether weight decay applies to a parameter: not to norms and biases."""
    name = path.rsplit(".", 1)[-1]
    return not name.endswith(("norm", "bias"))


def adamw(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    decay_mask: Callable[[str], bool] = decays,
    moment_dtype: tf.DType | str = tf.float32,
    schedule_unit: str = "tokens",
    fuse: bool = True,
) -> Optimizer:
    """AdamW with decoupled weight decay; the defaults are the paper's.

    `m ← b1·m + (1−b1)·g`, `v ← b2·v + (1−b2)·g²`, `p ← p − lr·(m̂/(√v̂ + eps) + wd·p)`, with `g` scaled by
    `min(1, clip_norm/‖g‖)` over all parameters.

    Args:
      learning_rate: a float, or a schedule of what `schedule_unit` says.
      b1, b2, eps, weight_decay: see the formula.
      clip_norm: largest global gradient norm, or `None`.
      decay_mask: from a parameter's path to whether it decays; default: all but norms and biases.
      moment_dtype: storage dtype of the moments, float32 or bfloat16 (the paper's); the step is taken from them as they are
        stored.
      schedule_unit: `"tokens"` seen, or `"updates"` done: for losses on samples, whose tokens nobody knows before.
      fuse: compile each leaf's update as two kernels (not under XLA).

    Returns:
      `Optimizer`.

    References: arXiv:1711.05101 algorithm 2; DeepSeek-V3 section 4.2.
    """
    check(0 <= b1 < 1 and 0 <= b2 < 1, f"adamw: b1={b1} and b2={b2}, want both in [0, 1)")
    check(clip_norm is None or clip_norm > 0, f"adamw: `clip_norm` is {clip_norm}, want > 0 or None")
    check_choice("adamw", "schedule_unit", schedule_unit, SCHEDULE_UNITS)
    # In float16 squares of small gradients would be zero, and the step as large as one divided by eps.
    check_choice("adamw", "moment_dtype", tf.as_dtype(moment_dtype).name, ("float32", "bfloat16"))

    # Three functions, for all leaves and steps.
    moments = functools.partial(_moments_leaf, b1=b1, b2=b2, fuse=fuse)
    param_of = [functools.partial(_param_leaf, eps=eps, wd=wd, fuse=fuse) for wd in (0.0, weight_decay)]

    def init(params: Tree) -> AdamState:
        zeros = tree.map_leaves(lambda p: tf.zeros(p.shape, moment_dtype), params)
        return AdamState(tf.constant(0), zeros, tree.map_leaves(tf.identity, zeros))

    @plain
    def update(
        grads: Tree, state: AdamState, params: Tree, tokens: tf.Tensor, norm: tf.Tensor, take: tf.Tensor
    ) -> tuple[Tree, AdamState, OptimStats]:
        want = tree.to_dict(params)
        check_same_tree("adamw.update", "grads", tree.to_dict(grads), want)
        seen = tokens if schedule_unit == "tokens" else tf.cast(state.count, tf.float64)
        lr = tf.cast(learning_rate(seen) if callable(learning_rate) else learning_rate, tf.float32)
        scale = tf.constant(1.0) if clip_norm is None else tf.minimum(1.0, clip_norm / (norm + 1e-12))
        count = state.count + tf.cast(take, state.count.dtype)
        steps = tf.cast(state.count + 1, tf.float32)
        scalars = tf.stack([scale, lr, 1.0 - b1**steps, 1.0 - b2**steps, tf.cast(take, tf.float32)])
        write = update_leaves if fuse else lambda fn, leaves, *args: fn(*leaves, *args)
        new = []
        for (path, p), g, m, v in zip(want.items(), *map(tree.flatten, (grads, state.mu, state.nu))):
            m, v = write(moments, (m, v), g, scalars)
            (p,) = write(param_of[bool(decay_mask(path))], (p,), m, v, scalars)
            new.append((p, m, v))
        params, mu, nu = (tree.unflatten_as(params, leaves) for leaves in zip(*new))
        return params, AdamState(count, mu, nu), OptimStats(norm, lr)

    def last_update(params: Tree, state: AdamState, rate: tf.Tensor) -> list[tf.Tensor]:
        steps, found = tf.cast(state.count, tf.float32), []
        for (path, p), m, v in zip(tree.items(params), *map(tree.flatten, (state.mu, state.nu))):
            m, v = (tf.cast(x, tf.float32) / (1.0 - b**steps) for x, b in ((m, b1), (v, b2)))
            step, wd = m / (tf.sqrt(v) + eps), weight_decay if decay_mask(path) else 0.0
            # p = q − lr·(step + wd·q), where q is the parameter before it
            before = (tf.cast(p, tf.float32) + rate * step) / (1.0 - rate * wd)
            found.append(rate * (step + wd * before))
        return found

    return Optimizer(init, update, last_update)


# Two kernels a leaf: one that writes all three copies the old moments first, which its parts read one after the other.


@fused
def _moments_leaf(m, v, g, scalars, *, b1, b2):
    scale, _, _, _, take = tf.unstack(scalars)
    g = tf.cast(g, tf.float32) * scale
    new = b1 * tf.cast(m, tf.float32) + (1 - b1) * g, b2 * tf.cast(v, tf.float32) + (1 - b2) * g * g
    return tuple(tf.where(take > 0, tf.cast(value, old.dtype), old) for value, old in zip(new, (m, v)))


@fused
def _param_leaf(p, m, v, scalars, *, eps, wd):
    _, lr, c1, c2, take = tf.unstack(scalars)
    m, v, p32 = (tf.cast(x, tf.float32) for x in (m, v, p))
    delta = lr * ((m / c1) / (tf.sqrt(v / c2) + eps) + wd * p32)
    return (tf.where(take > 0, tf.cast(p32 - delta, p.dtype), p),)


def global_norm(grads: Tree, *, fuse: bool = False) -> tf.Tensor:
    """Returns the Euclidean norm over all leaves, float32; `fuse` compiles each leaf's sum as one kernel."""
    return tf.sqrt(tf.reduce_sum(square_sums(grads, fuse=fuse)))


def square_sums(grads: Tree, *, fuse: bool = False) -> tf.Tensor:
    """Returns `Σ g²` of each leaf, `[leaves]` float32, in the tree's order; `fuse` compiles each as one kernel."""
    return tf.stack([square_sum(g, fuse=fuse) for g in tree.flatten(grads)])


def square_sum(g: tf.Tensor, *, fuse: bool) -> tf.Tensor:
    """Returns `Σ g²`, float32; `fuse` compiles it as one kernel."""
    # For float32 TensorFlow's own kernel is faster than a compiled one; for bfloat16 it adds in bfloat16.
    size = g.shape.num_elements()
    if fuse and g.dtype == tf.float32:
        return 2.0 * tf.nn.l2_loss(g)
    if fuse and g.dtype == tf.bfloat16 and size and size % 2 == 0:
        rows = tf.reshape(g, [-1, math.gcd(size // 2, 128), 2])
        return tf.reduce_sum(_pair_squares(tf.bitcast(rows, tf.uint32), fuse=True))
    return tf.reduce_sum(tf.square(tf.cast(g, tf.float32)))


@fused
def _pair_squares(pairs):
    """The `Σ g²` of short rows of bfloat16 pairs' bits, `[rows]` float32: a product with ones, which stores no squares.

    A bfloat16 is the upper half of a float32. XLA vectorises shifts here, but no conversions.
    """
    low = tf.bitcast(tf.bitwise.left_shift(pairs, tf.constant(16, tf.uint32)), tf.float32)
    high = tf.bitcast(tf.bitwise.bitwise_and(pairs, tf.constant(0xFFFF0000, tf.uint32)), tf.float32)
    return row_sum(low * low + high * high)[:, 0]
