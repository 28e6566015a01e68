"""What training changes, and what a step reports."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.compiled import update_leaves
from dsv3.nn.model import ModelParams, RouterState
from dsv3.ops.fuse import fused
from dsv3.ops.router import router_update_bias
from dsv3.train.loss import LossParts
from dsv3.train.optim import Optimizer, OptimStats
from dsv3.typing import Tree


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int64 scalar, optimiser steps done. tokens: int64 scalar, tokens seen.
      params: `ModelParams`. router: `RouterState`. opt: the optimiser's state.
      amax: with delayed FP8 scales the largest values of recent steps, see `nn.fp8_delayed`; else `()`.
      ema: exponential moving average of `params`, float32, a tree like it; `()`: none is kept.
    """

    step: tf.Tensor
    tokens: tf.Tensor
    params: ModelParams
    router: RouterState
    opt: Tree
    amax: Tree = ()
    ema: Tree = ()


class Limits(NamedTuple):
    """The largest `loss` and `grad_norm` (float32 scalars) with which a step is taken; beyond them, and where one of the
    two is not finite, the state stays as it was."""

    loss: Any = float("inf")
    grad_norm: Any = float("inf")


class Taken(NamedTuple):
    """What a step goes by: `norm`, that of all gradients; `take`, a bool scalar, whether it is taken; `load`, tokens that
    each expert got, of the whole batch; `counted`, int64 scalar, tokens of the batch; `rate`, speed γ of the biases."""

    norm: tf.Tensor
    take: tf.Tensor
    load: RouterState
    counted: tf.Tensor
    rate: Any


def within_limits(loss: tf.Tensor, norm: tf.Tensor, limits: Limits) -> tf.Tensor:
    """Returns whether a step with this loss and this norm of its gradient is taken, a bool scalar.

    >>> [bool(within_limits(loss, tf.constant(1.0), Limits(loss=3.0))) for loss in tf.constant([2.0, 4.0, float("nan")])]
    [True, False, False]
    """
    finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
    return finite & (loss <= limits.loss) & (norm <= limits.grad_norm)


def advance_state(
    state: TrainState, grads: Tree, taken: Taken, optimizer: Optimizer, *, ema_decay: float | None = None, fuse: bool = False
) -> tuple[TrainState, OptimStats]:
    """Takes one step: optimiser, selection biases, counters, average of the parameters.

    Args:
      state: see `TrainState`.
      grads: the gradients, a tree like `state.params`.
      taken: see `Taken`.
      optimizer: see `Optimizer`.
      ema_decay: d of `ema ← d·ema + (1 − d)·params`; `None` where the state has no `ema`.
      fuse: compile each leaf's average as one kernel.

    Returns:
      The new state and the optimiser's statistics. Where the step is not taken, the state is the given one.
    """
    seen, take = tf.cast(state.tokens, tf.float64), taken.take
    params, opt, stats = optimizer.update(grads, state.opt, state.params, seen, taken.norm, take)
    router = RouterState(*(_moved(b, n, taken) if b.shape[0] else b for b, n in zip(state.router, taken.load)))
    one = tf.cast(take, tf.int64)
    ema = state.ema
    if ema_decay is not None:
        weight = tf.where(take, 1.0 - ema_decay, 0.0)
        new = [_averaged(e, p, weight, fuse=fuse) for e, p in zip(tree.flatten(ema), tree.flatten(params))]
        ema = tree.unflatten_as(ema, new)
    return TrainState(state.step + one, state.tokens + one * taken.counted, params, router, opt, state.amax, ema), stats


def check_ema(function: str, state: TrainState, ema_decay: float | None) -> None:
    """Raises `ValueError` unless a state has an average of its parameters where the step keeps one, and else none."""
    check(
        bool(state.ema) == (ema_decay is not None),
        f"{function}: `state.ema` is {'filled' if state.ema else 'empty'} and `ema_decay` is {ema_decay}, want both or "
        "neither: `train_init` and `train_state` take `ema=True`",
    )


def _moved(bias: tf.Tensor, load: tf.Tensor, taken: Taken) -> tf.Tensor:
    return tf.where(taken.take, router_update_bias(bias, load, rate=taken.rate), bias)


def _averaged(ema: tf.Tensor, value: tf.Tensor, weight: tf.Tensor, *, fuse: bool) -> tf.Tensor:
    return update_leaves(_average_leaf, (ema,), value, weight)[0] if fuse else _average(ema, value, weight)


def _average_leaf(ema, value, weight):
    return (_average(ema, value, weight, fuse=True),)


@fused
def _average(ema, value, weight):
    return ema + weight * (tf.cast(value, tf.float32) - ema)


class MeshStats(NamedTuple):
    """What a step on a mesh took.

    Attributes:
      bytes: int64 scalar, what a device sent to other devices for experts in the step: rows, gate values and their
        gradients; of the pipeline rank that sent most. node_bytes: the part of it that went to other nodes.
      padding: float32 scalar, the part of the exchanged buffers that held no token.
      token_nodes: float32 scalar, on how many nodes a token's experts were, the mean over tokens and mixtures; 1 if there
        is one node.
      held: `[pipe]` int32, the most forward passes that each pipeline rank held for their backward at one time.
    """

    bytes: tf.Tensor
    node_bytes: tf.Tensor
    padding: tf.Tensor
    token_nodes: tf.Tensor
    held: tf.Tensor


class TrainMetrics(NamedTuple):
    """What one step reports.

    Attributes:
      loss: float32 scalar. parts: what it is made of. optim: the optimiser's statistics.
      taken: bool scalar, whether the step was taken (see `Limits`).
      grad_squares: `[leaves]` float32, `Σ g²` of each parameter, in the tree's order.
      mesh: on one device `()`.
    """

    loss: tf.Tensor
    parts: LossParts
    optim: OptimStats
    taken: tf.Tensor
    grad_squares: tf.Tensor
    mesh: MeshStats | tuple = ()
