"""The training of `pretrain.py`: the stages of its schedule one after the other, from a checkpoint or from the start."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from pretrain_plan import batch_cutter, stage_of
from pretrain_setup import Setup, agreed, on_host, say
from pretrain_speed import token_flops

import dsv3
from dsv3 import pipeline
from dsv3.compiled import place
from dsv3.config import ModelConfig
from dsv3.data import input_init, input_state, prefetch_batches, read_batches
from dsv3.data.passkey import passkey_form, passkey_rows
from dsv3.data.prefetch import InputBatch
from dsv3.eval import make_evaluator
from dsv3.layout import make_layouts, zero_layouts
from dsv3.parallel.mesh import whole
from dsv3.policy import ComputePolicy
from dsv3.pretrained import load_pretrained
from dsv3.recipe import RECIPES
from dsv3.train.checkpoint import Keep, drop_checkpoints, restore_checkpoint
from dsv3.train.loop import Actions, Fed, Feed, LoopResult, Row, train_loop
from dsv3.train.mesh_params import state_layouts
from dsv3.train.optim import Optimizer, adamw
from dsv3.train.progress import Progress, stop_on_signals
from dsv3.train.records import TROUBLE, RunLog
from dsv3.train.saving import BackgroundSaver
from dsv3.train.schedule import curve_schedule, schedule_at
from dsv3.train.schedule_steps import schedule_steps
from dsv3.train.state import TrainState
from dsv3.train.step import make_train_step, train_init, train_specs, train_state
from dsv3.train.trouble import Cursor, Trouble
from dsv3.train.watch import make_watch

FLAGS = flags.FLAGS
Restore = Callable[[Callable[[int], bool]], tuple[TrainState, Cursor] | None]


class Tools(NamedTuple):
    """What all stages share: how the parameters are stored and updated, where rows and checkpoints go, what ends the run.

    The first process has `log` and `progress`; `begin` makes the state of step 0; `ends`: steps at which stages end.
    """

    optimizer: Optimizer
    layouts: Any
    plain: ComputePolicy
    begin: Callable[[], TrainState]
    restore: Restore
    saver: BackgroundSaver
    stop: Callable[[], signal.Signals | None]
    log: RunLog | None
    progress: Progress | None
    ends: tuple[int, ...]


def total_steps(setup: Setup) -> int:
    """Steps of all stages."""
    return sum(stage.steps for stage in schedule_steps(setup.schedule))


Stop = Callable[[], signal.Signals | None]
StageEnd = Callable[[int, TrainState, Stop], None]


def train(setup: Setup, plain: ComputePolicy, at_end: StageEnd | None = None) -> LoopResult:
    """Trains from the latest checkpoint, or from the start, to the last step or to a signal.

    `at_end(number, state, stop)` is called when `number` stages are done, 0 before the first, and again by a run that goes
    on right there; once `stop()` names a signal it is to return.

    Held-out losses are those of the compute dtype, as `plain` has it: they tell what FP8 did to the parameters.
    """
    optimizer, layouts = make_optimizer(setup), make_mesh_layouts(setup)
    begin, restore = make_begin(setup, optimizer, layouts), make_restore(setup, optimizer, layouts)
    stages = schedule_steps(setup.schedule)
    ends = tuple(stage.first + stage.steps for stage in stages)
    held = [start(setup, begin, restore)]
    known = None if held[0].cursor.data is None else held[0].step
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        log = stack.enter_context(RunLog(setup.out, step=known)) if setup.leads else None
        progress = stack.enter_context(Progress(ends[-1], start=held[0].step)) if setup.leads else None
        saver = stack.enter_context(
            BackgroundSaver(
                setup.out / "checkpoints", setup.settings,
                keep=Keep(FLAGS.keep, FLAGS.keep_every, lambda step: is_anchor(step, ends)),
                agree=lambda written: agreed(int(not written), setup.mesh) == 0,
            )  # fmt: skip
        )
        tools = Tools(optimizer, layouts, plain, begin, restore, saver, stop, log, progress, ends)
        for number, end in enumerate((0, *ends)):
            if number and held[0].step < end and held[0].stopped is None:
                held.append(train_stage(setup, tools, number - 1, held))
            if at_end is not None and held[0].step == end and held[0].stopped is None:
                saver.finish()  # it may take long: the checkpoint of the border is to be there
                at_end(number, held[0].state, stop)
                caught = agreed(stop() or 0, setup.mesh)
                held.append(held.pop()._replace(stopped=signal.Signals(caught) if caught else None))
        return held.pop()


def train_stage(setup: Setup, tools: Tools, number: int, held: list[LoopResult]) -> LoopResult:
    """Trains one stage to its end: its architecture, its length of sequences. Takes where it begins out of `held`: with
    another reference to that state a run that goes back would have two."""
    cfg, end = stage_of(setup.cfg, setup.schedule, number), tools.ends[number]
    first = tools.ends[number - 1] if number else 0
    if len(tools.ends) > 1:
        stage = setup.schedule.stages[number]
        say(f"stage {stage.name}: sequences of {stage.seq_len:,} tokens, to step {end:,}")
    curves = {name: curve_schedule(getattr(setup.schedule, name)) for name in ("mtp_weight", "balance_weight", "bias_rate")}
    policy = tools.plain.replace(fp8=RECIPES.get(FLAGS.fp8))
    step = make_train_step(
        cfg, tools.optimizer, tools.layouts, policy=policy, schedule=pipeline.SCHEDULES[FLAGS.schedule],
        expert_nodes=FLAGS.expert_nodes, ema_decay=FLAGS.ema_decay, **curves,
    )  # fmt: skip
    watch = make_watch(cfg, tools.optimizer, tools.layouts, policy=policy)
    evaluate = make_evaluate(setup, cfg, tools.plain, setup.schedule.stages[number].seq_len)
    trouble = Trouble(patience=FLAGS.patience) if FLAGS.patience else None
    cursor = entered(held[0].cursor, held[0].step, first)
    mfu = token_flops(setup)[setup.schedule.stages[number].seq_len] / setup.product_flops
    actions = make_actions(setup, tools, cfg, first, mfu, watch, evaluate)
    return train_loop(step, held.pop().state, make_feed(setup), steps=end, cursor=cursor, trouble=trouble, actions=actions)


def is_anchor(step: int, ends: tuple[int, ...]) -> bool:
    """Whether a run may go back to the checkpoint of a step: a regular one, or one at the border of two stages."""
    return bool(FLAGS.save_every) and (step % FLAGS.save_every == 0 or step in ends)


def entered(cursor: Cursor, step: int, first: int) -> Cursor:
    """Where a run is at a step of a stage: at its beginning nothing is known yet of how high its losses are."""
    return cursor._replace(losses=(), norms=()) if step == first else cursor


def make_actions(setup: Setup, tools: Tools, cfg: ModelConfig, first: int, mfu: float, watch, evaluate) -> Actions:
    """What the loop calls in a stage, which begins at the step `first`, and how often; `mfu`: utilisation by a token/s."""
    total, log, progress = tools.ends[-1], tools.log, tools.progress
    config = cfg.to_hf()

    def save(state: TrainState, done: int, cursor: Cursor) -> None:
        if log is not None:
            log.sync()
        tools.saver.save(state, done, {**cursor._asdict(), "config": config})

    def go_back(done: int) -> tuple[TrainState, Cursor] | None:
        tools.saver.finish()
        found = tools.restore(lambda step: max(first, 1) <= step <= done and is_anchor(step, tools.ends))
        if found is None and first == 0:
            found = tools.begin(), Cursor()
        if found is None:
            return None
        state, cursor = found
        del found
        state = in_variables(setup, state)
        step = int(whole(state.step))
        if setup.leads:
            drop_checkpoints(setup.out / "checkpoints", after=step)
        return state, entered(cursor, step, first)

    def stop_together() -> signal.Signals | None:
        tools.saver.poll()
        caught = agreed(tools.stop() or 0, setup.mesh)
        return signal.Signals(caught) if caught else None

    def write(row: Row) -> None:
        log.write(row | {"mfu": float(f"{row['tokens_per_second'] * mfu:.4g}")} if row["kind"] == "train" else row)
        if row["kind"] in TROUBLE:
            progress.say(trouble_line(row))

    shown = {"write": write, "progress": progress.update, "rewind": log.rewind} if log is not None else {}
    return Actions(
        evaluate=evaluate, eval_every=max(1, total // 10) if FLAGS.eval_every is None else FLAGS.eval_every, save=save,
        save_every=FLAGS.save_every, watch=watch,
        watch_every=max(1, total // 50) if FLAGS.watch_every is None else FLAGS.watch_every, restore=go_back,
        load_every=max(1, total // 50), stop=stop_together, **shown,
    )  # fmt: skip


def trouble_line(row: Row) -> str:
    """What went wrong, for people."""
    if row["kind"] == "rollback":
        to = f"the checkpoint of step {row['to']}" if row["to"] else "the start"
        return f"back from step {row['step']} to {to}; the data between is left out"
    return f"after step {row['step']} a batch was left out: {row['reason']}"


def make_feed(setup: Setup) -> Feed:
    """Batches of the mixture, with --read_ahead read before they are wanted; every process reads whole ones, as steps do."""
    mixture, schedule, cut = setup.data.mixture, setup.schedule, batch_cutter(setup.schedule)
    form = passkey_form(setup.data.tokenizer, FLAGS.passkey_keys) if FLAGS.passkey else None

    def shape(tokens: int) -> tuple[int, int]:
        values = schedule_at(schedule, tokens)
        return values.batch_size, values.seq_len

    def exercises(batches: Iterator[InputBatch]) -> Iterator[InputBatch]:
        with contextlib.closing(batches):
            for item in batches:
                given = {"share": FLAGS.passkey, "seed": FLAGS.seed, "key_weight": FLAGS.passkey_weight}
                made = passkey_rows(form, np.asarray(item.batch.tokens), **given)
                yield item._replace(batch=made._replace(weights=made.weights * item.batch.weights))

    def feed(data: Any, tokens: int) -> Iterator[Fed]:
        state = input_init(mixture) if data is None else input_state(data, mixture)
        batches = read_batches(setup.data.sources, mixture, state, shape, tokens=tokens)
        batches = batches if form is None else exercises(batches)
        if FLAGS.read_ahead:
            batches = prefetch_batches(batches, FLAGS.read_ahead)
        with contextlib.closing(batches):
            for item in batches:
                yield Fed(*cut(*(np.asarray(part) for part in item.batch)), item.state._asdict())

    return feed


def make_mesh_layouts(setup: Setup):
    """How the parameters lie on the mesh, `None` without one."""
    if setup.mesh is None:
        return None
    specs = dsv3.model_specs(setup.cfg)
    layouts = make_layouts(specs, setup.mesh)
    return zero_layouts(specs, layouts) if FLAGS.zero else layouts


def state_parts() -> dict[str, Any]:
    """What the state has beside parameters and moments."""
    return {"fp8": RECIPES.get(FLAGS.fp8), "ema": FLAGS.ema_decay is not None}


def make_restore(setup: Setup, optimizer: Optimizer, layouts) -> Restore:
    """How to read the latest checkpoint of an accepted step, wherever that was written: `(state, cursor)` or `None`."""
    like = train_specs(setup.cfg, optimizer, **state_parts())
    placed = None if layouts is None else state_layouts(like, layouts)

    def restore(accept: Callable[[int], bool]) -> tuple[TrainState, Cursor] | None:
        folder = setup.out / "checkpoints"
        try:
            found = restore_checkpoint(
                folder, like, layouts=placed, settings=setup.settings, accept=accept, on_skip=say
            )
        except ValueError as error:
            raise ValueError(f"{error}; --fresh starts anew, another --out keeps what is there") from None
        if found is None:
            return None
        return found.state, Cursor(**{name: value for name, value in found.cursor.items() if name != "config"})

    return restore


def make_begin(setup: Setup, optimizer: Optimizer, layouts) -> Callable[[], TrainState]:
    """How to make the state of a new model."""
    return lambda: new_state(setup, optimizer, layouts)


def start(setup: Setup, begin: Callable[[], TrainState], restore: Restore) -> LoopResult:
    """Where the latest checkpoint is, or a new model."""
    found = restore(lambda step: True)
    if found is None:
        found = begin(), Cursor()
    else:
        say(f"going on from step {int(whole(found[0].step))} of {setup.out / 'checkpoints'}")
    state, cursor = found
    del found
    state = in_variables(setup, state)
    return LoopResult(state, int(whole(state.step)), None, cursor)


def in_variables(setup: Setup, state: TrainState) -> TrainState:
    """A state as a step takes it: with no other reference to it left, it does not exist twice."""
    return place(state) if setup.mesh is None else state


def new_state(setup: Setup, optimizer: Optimizer, layouts) -> TrainState:
    """The state of a new model, or of that of --init."""
    if FLAGS.init is None:
        return train_init([0, FLAGS.seed], setup.cfg, optimizer, layouts, **state_parts())
    _, params, router = load_pretrained(FLAGS.init, dtype="float32")
    return train_state(params, router, optimizer, layouts, **state_parts())


def make_optimizer(setup: Setup) -> Optimizer:
    """AdamW with the paper's betas, clipping, and the schedule's learning rate."""
    rate = curve_schedule(setup.schedule.learning_rate)
    moments = FLAGS.moment_dtype or (RECIPES[FLAGS.fp8].moments if FLAGS.fp8 in RECIPES else "float32")
    return adamw(rate, weight_decay=FLAGS.weight_decay, clip_norm=FLAGS.clip or None, moment_dtype=moments)


def make_evaluate(setup: Setup, cfg: ModelConfig, policy: ComputePolicy, length: int):
    """Held-out numbers of a state, for the curve: windows without overlap, which is fast. The first process measures."""
    score = make_evaluator(cfg, length=length, batch_size=max(1, 2048 // length), policy=policy)

    def evaluate(state: TrainState) -> dict[str, float]:
        params, router = (state.params, state.router) if setup.mesh is None else on_host(setup, (state.params, state.router))
        if not setup.leads:
            return {}
        got = score(params, router, setup.data.curve)._asdict()
        return {name: value for name, value in got.items() if math.isfinite(value) and name not in ("tokens", "bytes")}

    return evaluate
