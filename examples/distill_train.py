"""The training of `distill.py` on rows: batches with what a teacher says of them, the step, held-out divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import sft_report
import tensorflow as tf
from absl import flags
from distill_setup import LOSS, Distill
from sft_train import Begun, make_evaluate, run

from dsv3 import tree
from dsv3.config import ModelConfig
from dsv3.data import BatchPlan, PackedDocuments, batch_rows, take_rows
from dsv3.nn.model import cast_params
from dsv3.policy import ComputePolicy
from dsv3.pretrained import load_pretrained
from dsv3.train.distill import DistillBatch, Teacher, distill_loss, make_distill_step
from dsv3.train.loop import LoopResult
from dsv3.train.optim import Optimizer
from dsv3.train.state import Limits, TrainState

FLAGS = flags.FLAGS


class Parts(NamedTuple):
    """What a run is made of: the `step` as the loop calls it, and `look`, further held-out numbers of a state."""

    step: Callable[..., Any]
    look: Callable[[TrainState], dict[str, float]]


def make_parts(setup: Distill, begun: Begun, policy: ComputePolicy) -> Parts:
    """Loads the teacher, if it runs here, and makes what the loop calls."""
    teacher = None if setup.teacher_cfg is None else load_teacher(policy)
    cfg = setup.run.cfg
    apart = make_divergence(cfg, setup.teacher_cfg, teacher, policy)
    step = make_step(cfg, begun.optimizer, setup.teacher_cfg, teacher, policy)
    return Parts(step, lambda state: {"divergence": apart(state, heldout(setup, min(8, len(setup.run.held.tokens))))})


def load_teacher(policy: ComputePolicy) -> Teacher:
    """The teacher in the compute dtype."""
    _, params, router = load_pretrained(FLAGS.teacher, dtype=FLAGS.dtype)
    return Teacher(cast_params(params, policy), router)


def make_step(
    cfg: ModelConfig, optimizer: Optimizer, teacher_cfg: ModelConfig | None, teacher: Teacher | None, policy: ComputePolicy
) -> Callable[..., Any]:
    """The step as the loop calls it; the batch has its weights in it."""
    names = (*LOSS, "mtp_weight", "balance_weight", "bias_rate")
    how = {name: FLAGS[name].value for name in names}
    inner = make_distill_step(cfg, optimizer, teacher_cfg=teacher_cfg, policy=policy, **how)

    def step(state: TrainState, batch: DistillBatch, weights: None, limits: Limits):
        return inner(state, batch, teacher, limits)

    return step


def make_divergence(
    cfg: ModelConfig, teacher_cfg: ModelConfig | None, teacher: Teacher | None, policy: ComputePolicy
) -> Callable[[TrainState, Iterable[DistillBatch]], float]:
    """Returns what computes the mean divergence of a state over all targets of some batches, in nats a token."""
    policy = policy.replace(remat="none")
    how = {"cfg": cfg, "teacher_cfg": teacher_cfg, "policy": policy} | {name: FLAGS[name].value for name in LOSS[:3]}
    model = () if teacher is None else (tree.map_leaves(tf.convert_to_tensor, teacher),)

    @tf.function(jit_compile=policy.jit, autograph=False)
    def summed(params, router, batch, *model):
        return distill_loss(params, router, batch, *model, normalizer=1.0, **how)[1].divergence

    def apart(state: TrainState, batches: Iterable[DistillBatch]) -> float:
        params, router = (tree.map_leaves(tf.convert_to_tensor, part) for part in (state.params, state.router))
        total = count = 0.0
        for batch in batches:
            total += float(summed(params, router, tree.map_leaves(tf.constant, batch), *model))
            count += float(batch.weights.sum())
        return total / count

    return apart


def heldout(setup: Distill, size: int) -> Iterator[DistillBatch]:
    """All held-out rows, `size` at a time; the last batch is filled up with rows of weight 0."""
    held = setup.run.held
    for numbers, there in full_parts(len(held.tokens), size):
        batch = with_teacher(setup, held, numbers, offset=len(setup.run.rows.tokens))
        yield batch._replace(weights=batch.weights * there)


def full_parts(count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of `count` rows, `size` at a time, and `[size, 1]`, 0.0 for what fills up the last part."""
    for first in range(0, count, size):
        numbers = np.arange(first, first + size)
        yield np.minimum(numbers, count - 1), (numbers < count)[:, None].astype(np.float32)


def with_teacher(setup: Distill, rows: PackedDocuments, numbers: np.ndarray, offset: int = 0) -> DistillBatch:
    """Rows by their numbers, with what is stored of them."""
    said = () if setup.store is None else setup.store.take(numbers + offset)
    return DistillBatch(*take_rows(rows, numbers), said)


def batch(setup: Distill, number: int) -> tuple[DistillBatch, None]:
    """What a step learns from, in micro-batches."""
    rows = setup.run.rows
    found = with_teacher(setup, rows, batch_rows(BatchPlan(len(rows.tokens), FLAGS.batch_size, FLAGS.seed), number))
    return micro(found), None


def micro(found: DistillBatch) -> DistillBatch:
    """A batch in --accumulate parts."""
    return tree.map_leaves(lambda x: np.reshape(x, [FLAGS.accumulate, -1, *x.shape[1:]]), found)


def show_before(setup: Distill, begun: Begun, parts: Parts, policy: ComputePolicy) -> None:
    """Answers and scores held-out conversations with the student as it comes, once in a run."""
    sft_report.show_before(setup.run, begun, policy, parts.look)


def train(setup: Distill, begun: Begun, parts: Parts, policy: ComputePolicy) -> LoopResult:
    """Trains to the last step or to a signal."""
    evaluate = make_evaluate(setup.run, policy)
    return run(
        setup.run, begun, parts.step, lambda number: batch(setup, number),
        lambda state: evaluate(state) | parts.look(state),
    )  # fmt: skip


def report(setup: Distill, state: TrainState, parts: Parts, policy: ComputePolicy) -> None:
    """Evaluates, answers, plots and exports."""
    sft_report.report(setup.run, state, policy, parts.look, "Distillation")
