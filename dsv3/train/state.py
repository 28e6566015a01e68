"""What training changes, and what a step reports."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from dsv3.nn.model import ModelParams, RouterState
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
    """

    step: tf.Tensor
    tokens: tf.Tensor
    params: ModelParams
    router: RouterState
    opt: Tree
    amax: Tree = ()


def advance_state(
    state: TrainState, grads: Tree, norm: tf.Tensor, load: RouterState, counted: tf.Tensor, rate: Any, optimizer: Optimizer
) -> tuple[TrainState, OptimStats]:
    """Takes one step: optimiser, selection biases, counters.

    Args:
      state: see `TrainState`.
      grads: the gradients, a tree like `state.params`; `norm`: of all of them, see `Optimizer`.
      load: tokens that each expert got, of the whole batch.
      counted: int64 scalar, tokens of the batch.
      rate: speed γ of the biases.
      optimizer: see `Optimizer`.

    Returns:
      The new state and the optimiser's statistics.
    """
    seen = tf.cast(state.tokens, tf.float64)
    params, opt, stats = optimizer.update(grads, state.opt, state.params, seen, norm)
    router = RouterState(
        *(router_update_bias(b, n, rate=rate) if b.shape[0] else b for b, n in zip(state.router, load))
    )
    return TrainState(state.step + 1, state.tokens + counted, params, router, opt, state.amax), stats


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
    """What one step reports: the loss (float32 scalar), its `parts`, the optimiser's `optim` statistics, and `mesh`, which
    on one device is `()`."""

    loss: tf.Tensor
    parts: LossParts
    optim: OptimStats
    mesh: MeshStats | tuple = ()
