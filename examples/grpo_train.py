"""The training of `grpo.py`: from a checkpoint or from the start to the last exploration or to a signal."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

from absl import flags
from grpo_setup import Setup, every, optimizer_steps, say

from dsv3 import adamw
from dsv3.pretrained import load_pretrained
from dsv3.rl.loop import GrpoActions, GrpoCursor, GrpoResult, GrpoState, grpo_loop, grpo_specs, grpo_state
from dsv3.rl.report import progress_line
from dsv3.rl.score import make_score
from dsv3.rl.step import make_grpo_step
from dsv3.rl.workers import LocalWorker, ProcessWorkers, RayWorkers
from dsv3.train.checkpoint import Keep, restore_checkpoint
from dsv3.train.optim import Optimizer
from dsv3.train.progress import stop_on_signals
from dsv3.train.records import RunLog
from dsv3.train.saving import BackgroundSaver
from dsv3.train.schedule import Curve, curve_schedule, warmup_cosine
from dsv3.train.step import train_state

FLAGS = flags.FLAGS


def train(setup: Setup) -> GrpoResult:
    """Explores and learns."""
    optimizer = make_optimizer()
    state, cursor = start(setup, optimizer)
    how = {"temperature": setup.settings.temperature, "policy": setup.policy}
    more = {name: FLAGS[name].value for name in ("mtp_weight", "balance_weight", "bias_rate")}
    step = make_grpo_step(setup.cfg, optimizer, **how, **setup.loss, **more)
    score = make_score(setup.cfg, rows=FLAGS.rows, **how)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        log = stack.enter_context(RunLog(setup.out, step=cursor.step or None))
        saver = stack.enter_context(BackgroundSaver(setup.out / "checkpoints", setup.agreed, keep=Keep(FLAGS.keep)))
        worker = make_worker(setup, stack)

        def save(state: GrpoState, step: int, cursor: GrpoCursor) -> None:
            log.sync()
            saver.save(state, step, cursor._asdict())

        def stopped() -> signal.Signals | None:
            saver.poll()  # a checkpoint counts once this has ended it
            return stop()

        actions = GrpoActions(
            write=log.write, progress=lambda row: say(progress_line(row, setup.settings.explorations)), save=save,
            eval_every=every(FLAGS.eval_every, setup.settings.explorations), sample_every=FLAGS.sample_every,
            samples=FLAGS.samples, save_every=FLAGS.save_every, stop=stopped,
        )  # fmt: skip
        return grpo_loop(
            step, score, state, worker, setup.tasks, setup.reward, settings=setup.settings, cursor=cursor,
            heldout=setup.heldout, threads=FLAGS.reward_threads, policy=setup.policy, actions=actions,
        )  # fmt: skip


def make_optimizer() -> Optimizer:
    """AdamW as the flags say; its learning rate follows from the steps that it has taken."""
    rate = curve_schedule(rate_curve(optimizer_steps()))
    how = {"weight_decay": FLAGS.weight_decay, "clip_norm": FLAGS.clip_norm or None}
    return adamw(rate, schedule_unit="updates", **how)


def rate_curve(steps: int) -> Curve:
    """Linear warm-up, then a cosine to --lr_end, or --lr as it is."""
    last = FLAGS.lr if FLAGS.lr_end is None else FLAGS.lr_end
    return warmup_cosine(FLAGS.lr, warmup_tokens=FLAGS.warmup_steps, total_tokens=steps, final=last)


def make_worker(setup: Setup, stack: contextlib.ExitStack) -> Any:
    """Who draws samples; workers elsewhere end with `stack`."""
    if FLAGS.worker == "local":
        return LocalWorker(setup.options)
    if FLAGS.worker == "process":
        return stack.enter_context(ProcessWorkers(setup.options, FLAGS.workers))
    return stack.enter_context(RayWorkers(setup.options, FLAGS.workers, address=FLAGS.ray_address))


def start(setup: Setup, optimizer: Optimizer) -> tuple[GrpoState, GrpoCursor]:
    """The state and the cursor of the latest checkpoint, or of the model as it was."""
    how = {"reference": FLAGS.kl_weight > 0, "policy": setup.policy}
    like = grpo_specs(setup.cfg, optimizer, **how)
    found = restore_checkpoint(setup.out / "checkpoints", like, settings=setup.agreed, on_skip=say)
    if found is not None:
        say(f"going on after exploration {found.cursor['step']} of {setup.out / 'checkpoints'}")
        return found.state, GrpoCursor(**found.cursor)
    _, params, router = load_pretrained(FLAGS.model, dtype="float32")
    return grpo_state(train_state(params, router, optimizer), **how), GrpoCursor()
