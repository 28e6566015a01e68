"""Pretrains a DeepSeek-V3 on text: from raw documents to a folder that Hugging Face transformers opens.

Without flags it trains the preset "demo" on the sources and the language reference of the running Python, in minutes on
two cores, and leaves everything in runs/demo:

  run.json        what decides the numbers of this run
  tokenizer/      a byte-level BPE tokenizer, trained on the corpus
  log.jsonl       one line a step; tensorboard/ has the same: tensorboard --logdir runs/demo
  trouble.jsonl   batches that were left out for a spike or a loss that is no number, and times that the run went back
  checkpoints/    the last ones; after an interruption the same command goes on from there, to the same losses
  report.html     all that came out on one page: results, plots, load of the experts, trouble, samples, settings
  plots/          loss, learning rate, load of the experts, norms by component
  results.json    held-out bits per byte beside gzip's and xz's, and more; samples.txt: completions of held-out text
  export/         opened by AutoModelForCausalLM.from_pretrained and by dsv3.load_pretrained

A corpus is a text file, a JSON-lines or Parquet file with a `text` field, or a folder of such files; text and JSON
lines may be compressed (.gz, .bz2, .xz, .zst).

Examples:

  python examples/pretrain.py
  python examples/pretrain.py --corpus book.txt --out runs/book --steps 1000
  python examples/pretrain.py --corpus rows.jsonl --config model/config.json --tokenizer model --out runs/mine
  python examples/pretrain.py --corpus texts --preset small --out runs/small --steps 20000 --batch_size 32 \\
      --accumulate 8 --seq_len 1024 --lr 1e-3 --dtype bfloat16 --remat block
  python examples/pretrain.py --fp8 paper --out runs/fp8
  python examples/pretrain.py --mesh data:2,expert:2
  python examples/pretrain.py --mesh pipe:2,expert:2 --accumulate 4 --schedule dualpipe
  python examples/launch.py --num_clients=2 examples/pretrain.py --mesh data:2,expert:2
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import contextlib
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import app, flags, logging
from command import flag_parser
from pretrain_report import on_host, report
from pretrain_setup import Setup, agreed, compute_dtype, prepare, say, warmup_steps

import dsv3
from dsv3 import pipeline
from dsv3.compiled import place
from dsv3.data import batch_at
from dsv3.eval import make_evaluator
from dsv3.layout import make_layouts, zero_layouts
from dsv3.parallel.mesh import whole
from dsv3.policy import ComputePolicy, default_policy
from dsv3.recipe import RECIPES
from dsv3.train.checkpoint import Keep, checkpoint_step, list_checkpoints, restore_checkpoint
from dsv3.train.loop import Actions, LoopResult, Row, index_feed, train_loop
from dsv3.train.mesh_params import state_layouts
from dsv3.train.optim import Optimizer, adamw
from dsv3.train.progress import Progress, stop_on_signals
from dsv3.train.records import TROUBLE, RunLog
from dsv3.train.saving import BackgroundSaver
from dsv3.train.schedule import curve_schedule, warmup_cosine
from dsv3.train.state import TrainState
from dsv3.train.step import make_train_step, train_init, train_specs
from dsv3.train.trouble import Cursor, Trouble
from dsv3.train.watch import make_watch

FLAGS = flags.FLAGS
FINAL_LR = 0.1  # the cosine ends at this share of the peak, as in the paper

flags.DEFINE_string("corpus", None, "Text to train on: a file or a folder. Default: the running Python's own.")
flags.DEFINE_float("heldout", 0.02, "Share of the documents, or of the pieces of fewer than 100, that is never trained on.")
flags.DEFINE_enum("preset", "demo", dsv3.PRESETS, "Architecture by name.")
flags.DEFINE_string("config", None, "Architecture from a config.json (or its folder) instead of a preset.")
flags.DEFINE_string("tokenizer", None, "Folder with a tokenizer.json. Default: train one on the corpus.")
flags.DEFINE_integer("vocab_size", None, "Vocabulary of the model, and of the tokenizer where one is trained.", 1)
flags.DEFINE_string("out", "runs/demo", "Folder of the run.")
flags.DEFINE_bool("resume", True, "Go on with the run that is in --out. --noresume refuses instead.")
flags.DEFINE_bool("fresh", False, "Delete the run that is in --out and start anew.")

flags.DEFINE_integer("steps", 600, "Optimiser steps.", 1)
flags.DEFINE_integer("batch_size", 8, "Sequences of a step, all micro-batches together.", 1)
flags.DEFINE_integer("accumulate", 1, "Micro-batches of a step; must divide --batch_size. Less memory, same result.", 1)
flags.DEFINE_integer("seq_len", 256, "Tokens of a sequence.", 1)
flags.DEFINE_integer("seed", 0, "Decides initial parameters, the order of the data and what is held out.", 0)

flags.DEFINE_float("lr", 3e-3, "Peak learning rate; a cosine in tokens takes it down to a tenth.")
flags.DEFINE_integer("warmup_steps", None, "Steps of linear warm-up. Default: a twentieth of --steps.", 0)
flags.DEFINE_float("weight_decay", 0.1, "Decoupled weight decay; norms and biases have none.", 0.0)
flags.DEFINE_float("clip", 1.0, "Largest norm of the gradient; 0: do not clip.", 0.0)
flags.DEFINE_float("mtp_weight", 0.3, "Weight of the multi-token prediction loss.", 0.0)
flags.DEFINE_float("balance_weight", 1e-4, "Weight of the sequence-wise balance loss.", 0.0)
flags.DEFINE_float("bias_rate", 1e-3, "How far a step moves the router's selection bias.", 0.0)
flags.DEFINE_float("ema_decay", None, "Keep an average of the parameters with this decay a step, and export it.", 0.0, 1.0)

flags.DEFINE_integer("eval_every", None, "Steps between held-out losses; 0: none. Default: a tenth of --steps.", 0)
flags.DEFINE_integer("save_every", 100, "Steps between checkpoints; 0: only at the end and when interrupted.", 0)
flags.DEFINE_integer("keep", 2, "Checkpoints that stay, the last ones.", 1)
flags.DEFINE_integer("keep_every", 0, "And those of every so many steps, for good; 0: none.", 0)
flags.DEFINE_integer("watch_every", None, "Steps between norms by component; 0: none. Default: a fiftieth of --steps.", 0)
flags.DEFINE_integer("patience", 4, "Spikes in a row that are left out until the run goes back; 0: none is looked for.", 0)
flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Compute dtype; parameters are float32. Default: float32, with --fp8 bfloat16."
)
flags.DEFINE_enum(
    "fp8", "none", ["none", *RECIPES], "Recipe by which linear layers and experts compute in FP8; moments are then bfloat16."
)
flags.DEFINE_enum("remat", "none", ["none", "block"], "Recompute each block in the backward pass: less memory.")
flags.DEFINE_string("mesh", None, "Devices by axis, as data:2,expert:4: rows over both, experts over expert. Default: one.")
flags.DEFINE_enum(
    "schedule", "one_f_one_b", sorted(pipeline.SCHEDULES), "Order of micro-batches on the ranks of a --mesh with pipe."
)
flags.DEFINE_integer("expert_nodes", 1, "With --mesh: nodes that expert is cut into; rows go to a node once.", 1)
flags.DEFINE_bool("zero", True, "With --mesh: each device stores and updates a part of what all use (ZeRO-1).")
flags.DEFINE_enum("loop", "unroll", ["unroll", "scan"], "Layers as a repeated graph or as a loop.")


def main(argv: list[str]) -> int:
    """Runs everything.

    Returns:
      The exit code: 2 for bad input, 1 for what fails later, 128 + n when signal n has interrupted the training.
    """
    again = same_command()
    logging.set_verbosity(logging.WARNING)  # TensorFlow tells at length how it connects processes
    try:
        setup = prepare(argv)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail(f"interrupted; to go on, {again}", 130)
    with setup.clients:
        code = run(setup, again)
        if 0 < code < 128:  # the other processes end, too
            sys.exit(code)
    return code


def run(setup: Setup, again: str) -> int:
    """Trains and reports; returns the exit code."""
    dtype = compute_dtype()
    plain = default_policy().replace(dtype=None if dtype == "float32" else dtype, remat=FLAGS.remat, loop=FLAGS.loop)
    try:
        result = train(setup, plain)
        if result.step < FLAGS.steps:
            say(f"{result.stopped.name}: saved at step {result.step} of {FLAGS.steps}; to go on, {again}")
            return 128 + result.stopped
        report(setup, result.state, plain)
    except FloatingPointError as error:
        return fail(f"{error}; {last_checkpoint(setup)}; a lower --lr may help, with --fresh or another --out", 1)
    except (ValueError, OSError) as error:
        return fail(f"{error}; once that is put right, {again}", 1)
    except tf.errors.OpError as error:
        if setup.clients.count == 1:
            raise
        setup.clients.wait_for_watch()
        return fail(f"an exchange with the other processes has failed ({error.message}); {again}", 1)
    except KeyboardInterrupt:  # outside of the training
        fail(f"interrupted; to go on, {again}", 130)
        raise SystemExit(130) from None  # not in good order: the other processes end, too
    return 0


def fail(error: object, code: int) -> int:
    """Says what is wrong, in one line, and returns the exit code."""
    print(f"pretrain: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def same_command() -> str:
    """How to go on with a run; the interpreter is named as seen from here, so that an environment's own is taken."""
    if os.environ.get("DTENSOR_JOBS"):
        return "start all processes again"
    python = os.path.relpath(sys.executable)
    if python.startswith(os.pardir) or os.sep not in python:
        python = sys.executable
    same = [arg for arg in sys.argv if arg.lstrip("-").partition("=")[0] != "fresh"]
    return f"run the same command again: {shlex.join([python, *same])}"


def last_checkpoint(setup: Setup) -> str:
    """What there is to go back to."""
    found = list_checkpoints(setup.out / "checkpoints")
    return f"the last checkpoint is of step {checkpoint_step(found[-1])}" if found else "no checkpoint was saved before it"


def train(setup: Setup, plain: ComputePolicy) -> LoopResult:
    """Trains from the latest checkpoint, or from the start, to the last step or to a signal.

    Held-out losses are those of the compute dtype, as `plain` has it: they tell what FP8 did to the parameters.
    """
    cfg, checkpoints = setup.cfg, setup.out / "checkpoints"
    optimizer, layouts = make_optimizer(), make_mesh_layouts(setup)
    policy = plain.replace(fp8=RECIPES.get(FLAGS.fp8))
    step = make_train_step(
        cfg, optimizer, layouts, mtp_weight=FLAGS.mtp_weight, balance_weight=FLAGS.balance_weight,
        bias_rate=FLAGS.bias_rate, policy=policy, schedule=pipeline.SCHEDULES[FLAGS.schedule],
        expert_nodes=FLAGS.expert_nodes, ema_decay=FLAGS.ema_decay,
    )  # fmt: skip
    restore = make_restore(setup, optimizer, layouts)
    found = restore(lambda step: True)
    if found is None:
        state = train_init([0, FLAGS.seed], cfg, optimizer, layouts, **state_parts())
        cursor = Cursor()
    else:
        state, cursor = found
        say(f"going on from step {int(whole(state.step))} of {checkpoints}")
    state = place(state) if layouts is None else state  # with no other reference to it, it does not exist twice
    del found
    start = int(whole(state.step))
    eval_every = max(1, FLAGS.steps // 10) if FLAGS.eval_every is None else FLAGS.eval_every
    watch_every = max(1, FLAGS.steps // 50) if FLAGS.watch_every is None else FLAGS.watch_every
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        log = stack.enter_context(RunLog(setup.out, step=start)) if setup.leads else None
        progress = stack.enter_context(Progress(FLAGS.steps, start=start)) if setup.leads else None
        saver = stack.enter_context(
            BackgroundSaver(
                checkpoints, setup.settings, keep=Keep(FLAGS.keep, FLAGS.keep_every),
                agree=lambda done: agreed(int(not done), setup.mesh) == 0,
            )  # fmt: skip
        )

        def save(state: TrainState, done: int, cursor: Cursor) -> None:
            if log is not None:
                log.sync()
            saver.save(state, done, cursor._asdict())

        def go_back(done: int) -> tuple[TrainState, Cursor] | None:
            saver.finish()
            return restore(lambda step: step <= done and step % FLAGS.save_every == 0)

        def stop_together() -> signal.Signals | None:
            saver.poll()
            number = agreed(stop() or 0, setup.mesh)
            return signal.Signals(number) if number else None

        def write(row: Row) -> None:
            log.write(row)
            if row["kind"] in TROUBLE:
                progress.say(trouble_line(row))

        shown = {"write": write, "progress": progress.update, "rewind": log.rewind} if log is not None else {}
        actions = Actions(
            evaluate=make_evaluate(setup, plain), eval_every=eval_every, save=save, save_every=FLAGS.save_every,
            watch=make_watch(cfg, optimizer, layouts, policy=policy), watch_every=watch_every, restore=go_back,
            load_every=max(1, FLAGS.steps // 50), stop=stop_together, **shown,
        )  # fmt: skip
        feed = index_feed(lambda number: micro_batches(setup, number))
        trouble = Trouble(patience=FLAGS.patience) if FLAGS.patience else None
        return train_loop(step, state, feed, steps=FLAGS.steps, cursor=cursor, trouble=trouble, actions=actions)


def trouble_line(row: Row) -> str:
    """What went wrong, for people."""
    if row["kind"] == "rollback":
        return f"back from step {row['step']} to the checkpoint of step {row['to']}; the data between is left out"
    return f"after step {row['step']} a batch was left out: {row['reason']}"


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


def make_restore(setup: Setup, optimizer: Optimizer, layouts):
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
        return None if found is None else (found.state, Cursor(**found.cursor))

    return restore


def make_optimizer() -> Optimizer:
    """AdamW with the paper's betas, clipping, and a warm-up and cosine in tokens."""
    a_step = FLAGS.batch_size * FLAGS.seq_len
    curve = warmup_cosine(
        FLAGS.lr, warmup_tokens=warmup_steps() * a_step, total_tokens=FLAGS.steps * a_step, final=FINAL_LR * FLAGS.lr
    )
    moments = RECIPES[FLAGS.fp8].moments if FLAGS.fp8 in RECIPES else "float32"
    rate = curve_schedule(curve)
    return adamw(rate, weight_decay=FLAGS.weight_decay, clip_norm=FLAGS.clip or None, moment_dtype=moments)


def micro_batches(setup: Setup, number: int):
    """Tokens `[A, B, T+1]` and weights `[A, B, T]` of a batch; without accumulation A is left out."""
    batch = batch_at(setup.train, number, FLAGS.batch_size, FLAGS.seed)
    if FLAGS.accumulate == 1:
        return batch
    return tuple(part.reshape(FLAGS.accumulate, -1, part.shape[-1]) for part in batch)


def make_evaluate(setup: Setup, policy: ComputePolicy):
    """Held-out numbers of a state, for the curve: windows without overlap, which is fast. The first process measures."""
    score = make_evaluator(setup.cfg, length=FLAGS.seq_len, policy=policy)

    def evaluate(state: TrainState) -> dict[str, float]:
        params, router = (state.params, state.router) if setup.mesh is None else on_host(setup, (state.params, state.router))
        if not setup.leads:
            return {}
        got = score(params, router, setup.curve)._asdict()
        return {name: value for name, value in got.items() if math.isfinite(value) and name not in ("tokens", "bytes")}

    return evaluate


parse_flags = flag_parser("pretrain")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
