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


class MeshStats(NamedTuple):
    """What a step on a mesh took.

    Attributes:
      bytes: int64 scalar, what a device sent to other devices' experts in the step: rows, gate values and their gradients;
        of the pipeline rank that sent most.
      padding: float32 scalar, the part of the exchanged buffers that held no token.
      held: `[pipe]` int32, the most forward passes that each pipeline rank held for their backward at one time.
    """

    bytes: tf.Tensor
    padding: tf.Tensor
    held: tf.Tensor


class TrainMetrics(NamedTuple):
    """What one step reports: the loss (float32 scalar), its `parts`, the optimiser's `optim` statistics, and `mesh`, which
    on one device is `()`."""

    loss: tf.Tensor
    parts: LossParts
    optim: OptimStats
    mesh: MeshStats | tuple = ()
