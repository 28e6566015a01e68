"""The training of `sft.py`, and the loop of `distill.py`: from a checkpoint or from the model to the last step."""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from command import what_failed
from pretrain_setup import last_checkpoint
from sft_setup import Setup, say

from dsv3.compiled import place
from dsv3.config import ModelConfig
from dsv3.data import batch_at
from dsv3.eval.packed import AnswerEvaluator, make_answer_evaluator
from dsv3.parallel.mesh import whole
from dsv3.policy import ComputePolicy, default_policy
from dsv3.pretrained import load_pretrained
from dsv3.train.checkpoint import Keep, restore_checkpoint
from dsv3.train.loop import Actions, LoopResult, Row, index_feed, train_loop
from dsv3.train.optim import Optimizer, adamw
from dsv3.train.progress import Progress, stop_on_signals
from dsv3.train.records import RunLog
from dsv3.train.saving import BackgroundSaver
from dsv3.train.schedule import Curve, curve_schedule
from dsv3.train.schedule_paper import FineTuning
from dsv3.train.state import TrainState
from dsv3.train.step import make_train_step, train_specs, train_state
from dsv3.train.trouble import Cursor

FLAGS = flags.FLAGS


class Begun(NamedTuple):
    """Where the training begins: `state`, `cursor`, the `optimizer` that the state is of, and the step of a checkpoint."""

    state: TrainState
    cursor: Cursor
    optimizer: Optimizer
    saved: int | None  # None: there was none


def run_program(
    fail: Callable[[object, int], int],
    prepare: Callable[[], Any],
    learn: Callable[[Any, ComputePolicy], tuple[LoopResult, Callable[[TrainState], None]]],
    run_of: Callable[[Any], Any] = lambda setup: setup,
) -> int:
    """Runs a fine-tuning or a distillation to its report.

    Args:
      fail: says what is wrong, and returns the exit code.
      prepare: checks everything and returns the setup; what it raises is bad input.
      learn: takes the setup and how to compute, trains, and returns the loop's result and what reports on a state.
      run_of: the part of a setup that has `out` and `steps`.

    Returns:
      The exit code: 2 for bad input, 1 for what fails later, 128 + n after signal n.
    """
    try:
        setup = prepare()
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    run = run_of(setup)
    same = [arg for arg in sys.argv if arg.lstrip("-").partition("=")[0] != "fresh"]
    again = f"run the same command again: {shlex.join([sys.executable, *same])}"
    policy = default_policy().replace(dtype=None if FLAGS.dtype == "float32" else FLAGS.dtype, remat=FLAGS.remat)
    try:
        result, report = learn(setup, policy)
        if result.step < run.steps:
            say(f"{result.stopped.name}: saved at step {result.step} of {run.steps}; to go on, {again}")
            return 128 + result.stopped
        report(result.state)
    except FloatingPointError as error:
        return fail(f"{error}; {last_checkpoint(run.out)}; a lower --lr may help, with --fresh or another --out", 1)
    except (ValueError, OSError) as error:
        return fail(f"{what_failed(error, run.out)}; once that is put right, {again}", 1)
    except KeyboardInterrupt:  # outside of the training
        return fail(f"interrupted; to go on, {again}", 130)
    return 0


@functools.cache
def make_score(cfg: ModelConfig, rows: int, policy: ComputePolicy) -> AnswerEvaluator:
    """The evaluation of held-out answers, compiled once for the curve and the report."""
    return make_answer_evaluator(cfg, batch_size=rows, policy=policy)


def learning_rate(setup: Any) -> Curve:
    """Linear warm-up, then a cosine down to --lr_end."""
    plan = FineTuning(FLAGS.epochs, FLAGS.lr, FLAGS.lr_end)
    return plan.learning_rate(setup.steps * setup.step_tokens, FLAGS.warmup_steps * setup.step_tokens)


def start(setup: Any) -> Begun:
    """The state of the latest checkpoint of the run, or of the model that is fine-tuned."""
    rate = curve_schedule(learning_rate(setup))
    optimizer = adamw(rate, weight_decay=FLAGS.weight_decay, clip_norm=FLAGS.clip or None)
    like = train_specs(setup.cfg, optimizer)
    try:
        found = restore_checkpoint(setup.out / "checkpoints", like, settings=setup.settings, on_skip=say)
    except ValueError as error:
        raise ValueError(f"{error}; --fresh starts anew, another --out keeps what is there") from None
    if found is not None:
        step = int(whole(found.state.step))
        say(f"going on from step {step} of {setup.out / 'checkpoints'}")
        return Begun(place(found.state), Cursor(**found.cursor), optimizer, step)
    _, params, router = load_pretrained(FLAGS.model, dtype="float32")
    return Begun(place(train_state(params, router, optimizer)), Cursor(), optimizer, None)


def train(setup: Setup, begun: Begun, policy: ComputePolicy) -> LoopResult:
    """Trains to the last step or to a signal."""
    step = make_train_step(
        setup.cfg, begun.optimizer, policy=policy, mtp_weight=FLAGS.mtp_weight, balance_weight=FLAGS.balance_weight,
        bias_rate=FLAGS.bias_rate,
    )  # fmt: skip
    return run(setup, begun, step, lambda number: batch(setup, number), make_evaluate(setup, policy))


def run(
    setup: Any, begun: Begun, step: Callable[..., Any], batches: Callable[[int], tuple],
    evaluate: Callable[[TrainState], Row],
) -> LoopResult:  # fmt: skip
    """Runs a step over batches, which are a function of their number, as `index_feed` takes one.

    Args:
      setup: has the folder `out`, the `settings` of the run and the number of its `steps`.
      begun: see `start`. step, evaluate: as of `train_loop`.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        log = stack.enter_context(RunLog(setup.out, step=begun.saved))
        progress = stack.enter_context(Progress(setup.steps, start=begun.saved or 0))
        saver = stack.enter_context(
            BackgroundSaver(setup.out / "checkpoints", setup.settings, keep=Keep(FLAGS.keep))
        )
        actions = make_actions(setup, log, progress, saver, stop, evaluate)
        return train_loop(
            step, begun.state, index_feed(batches), steps=setup.steps, cursor=begun.cursor, actions=actions
        )  # fmt: skip


def make_evaluate(setup: Setup, policy: ComputePolicy) -> Callable[[TrainState], Row]:
    """Held-out numbers of a state."""
    score = make_score(setup.cfg, min(8, len(setup.held.tokens)), policy)

    def evaluate(state: TrainState) -> Row:
        found = score(state.params, state.router, setup.held)._asdict()
        return {name: value for name, value in found.items() if math.isfinite(value) and name != "tokens"}

    return evaluate


def make_actions(setup: Any, log: RunLog, progress: Progress, saver: BackgroundSaver, stop, evaluate) -> Actions:
    """What the loop calls, and how often."""

    def save(state: TrainState, step: int, cursor: Cursor) -> None:
        log.sync()
        saver.save(state, step, cursor._asdict())

    def stopped() -> signal.Signals | None:
        saver.poll()
        return stop()

    every = max(1, setup.steps // 10) if FLAGS.eval_every is None else FLAGS.eval_every
    return Actions(
        write=log.write, progress=progress.update, evaluate=evaluate, eval_every=every, save=save,
        save_every=FLAGS.save_every, load_every=max(1, setup.steps // 10), stop=stopped,
    )  # fmt: skip


def batch(setup: Setup, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, weights and segments of a step, in micro-batches if there are several."""
    rows = batch_at(setup.rows, number, FLAGS.batch_size, FLAGS.seed)
    if FLAGS.accumulate == 1:
        return tuple(rows)
    return tuple(field.reshape(FLAGS.accumulate, -1, field.shape[-1]) for field in rows)
