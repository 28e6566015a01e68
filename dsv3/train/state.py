"""What training changes, and what a step reports."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.nn.model import ModelParams, RouterState
from dsv3.train.loss import LossParts
from dsv3.train.optim import OptimStats
from dsv3.typing import Tree


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int64 scalar, optimiser steps done. tokens: int64 scalar, tokens seen.
      params: `ModelParams`. router: `RouterState`. opt: the optimiser's state.
    """

    step: tf.Tensor
    tokens: tf.Tensor
    params: ModelParams
    router: RouterState
    opt: Tree


class DispatchStats(NamedTuple):
    """What exchanging rows with other devices' experts took.

    Attributes:
      bytes: int64 scalar, bytes that each device sent to others in the step, rows, gate values and their gradients.
      padding: float32 scalar, the part of the exchanged buffers that held no token.
    """

    bytes: tf.Tensor
    padding: tf.Tensor


class TrainMetrics(NamedTuple):
    """What one step reports: the loss (float32 scalar), its `parts`, the optimiser's `optim` statistics, and on a mesh
    `dispatch`, else `()`."""

    loss: tf.Tensor
    parts: LossParts
    optim: OptimStats
    dispatch: DispatchStats | tuple = ()
