"""Pretrains a DeepSeek-V3 on text: from raw documents to a folder that Hugging Face transformers opens.

Without flags it trains the preset "demo" on the sources and the language reference of the running Python, in minutes on
two cores, and leaves everything in runs/demo:

  run.json        what decides the numbers of this run
  tokenizer/      a byte-level BPE tokenizer, trained on the corpus
  log.jsonl       one line a step; tensorboard/ has the same: tensorboard --logdir runs/demo
  trouble.jsonl   batches that were left out for a spike or a loss that is no number, and times that the run went back
  checkpoints/    the last ones; after an interruption the same command goes on from there, to the same losses
  report.html     all that came out on one page: results, plots, load of the experts, trouble, samples, settings
  plots/          loss, learning rate, speed, MTP guesses, load of the experts, norms by component
  results.json    held-out bits per byte beside gzip's and xz's, and more; samples.txt: completions of held-out text
  export/         opened by AutoModelForCausalLM.from_pretrained and by dsv3.load_pretrained

A corpus is a text file, a JSON-lines or Parquet file with a `text` field, or a folder of such files; text and JSON
lines may be compressed (.gz, .bz2, .xz, .zst).

Examples:

  python examples/pretrain.py
  python examples/pretrain.py --steps 20 --out runs/short
  python examples/pretrain.py --corpus book.txt --out runs/book --steps 1000
  python examples/pretrain.py --corpus rows.jsonl --config model/config.json --tokenizer model --out runs/mine
  python examples/pretrain.py --corpus texts --preset small --out runs/small --steps 20000 --batch_size 32 \\
      --accumulate 8 --seq_len 1024 --lr 1e-3 --dtype bfloat16 --remat block
  python examples/pretrain.py --data runs/prepared --mixture code:2,english:1,prose:1 --epochs prose:4 --out runs/mixed
  python examples/pretrain.py --data runs/prepared --plan paper --batch_size 32 --seq_len 64 --accumulate 4 \\
      --context_steps 20 --out runs/plan
  python examples/pretrain.py --init runs/mine/export --plan context --seq_len 256 --context_steps 50 --out runs/long
  python examples/pretrain.py --fp8 paper --out runs/fp8
  python examples/pretrain.py --mesh data:2,expert:2
  python examples/pretrain.py --mesh pipe:2,expert:2 --accumulate 4 --schedule dualpipe
  python examples/launch.py --num_clients=2 examples/pretrain.py --mesh data:2,expert:2
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
from absl import app, flags, logging
from command import flag_parser, what_failed
from pretrain_plan import stage_of
from pretrain_report import report
from pretrain_setup import Setup, compute_dtype, last_checkpoint, prepare, say, summed
from pretrain_speed import product_rate
from pretrain_train import Stop, total_steps, train

import dsv3
from dsv3 import pipeline
from dsv3.data.passkey import KEYS
from dsv3.policy import ComputePolicy, default_policy
from dsv3.recipe import RECIPES
from dsv3.train.state import TrainState

FLAGS = flags.FLAGS

flags.DEFINE_string("data", None, "Folder made by prepare_data.py. Default: --corpus, tokenised here.")
flags.DEFINE_list("mixture", None, "Shares of the sources of --data, as code:2,prose:1. Default: what the folder says.")
flags.DEFINE_list("epochs", None, "Most epochs of sources of --data, as code:4. Default: what the folder says.")
flags.DEFINE_string("corpus", None, "Text to train on: a file or a folder. Default: the running Python's own.")
flags.DEFINE_float("heldout", 0.02, "Share of the documents, or of the pieces of fewer than 100, that is never trained on.")
flags.DEFINE_string("init", None, "Start with the parameters, architecture and tokenizer of a checkpoint directory.")
flags.DEFINE_float(
    "passkey", 0.0, "Share of the rows that become exercises in finding something again, for models too small to learn it "
    "from text: half are passkey problems.", 0.0, 1.0,
)  # fmt: skip
flags.DEFINE_float(
    "passkey_weight", 8.0, "How much a token of a key that is asked for counts in the losses; others, which are many more, "
    "count 1.", 0.0,
)  # fmt: skip
flags.DEFINE_enum("passkey_keys", "digits", KEYS, "What is to be found: numbers of five digits, or four words.")
flags.DEFINE_enum("preset", "demo", dsv3.PRESETS, "Architecture by name.")
flags.DEFINE_string("config", None, "Architecture from a config.json (or its folder) instead of a preset.")
flags.DEFINE_string("tokenizer", None, "Folder with a tokenizer.json. Default: train one on the corpus.")
flags.DEFINE_integer("vocab_size", None, "Vocabulary of the model, and of the tokenizer where one is trained.", 1)
flags.DEFINE_string("out", "runs/demo", "Folder of the run.")
flags.DEFINE_bool("resume", True, "Go on with the run that is in --out. --noresume refuses instead.")
flags.DEFINE_bool("fresh", False, "Delete the run that is in --out and start anew.")

flags.DEFINE_enum(
    "plan", "cosine", ["cosine", "paper", "context"],
    "cosine: one stage, warm-up and cosine. paper: the paper's whole plan, scaled: batch ramp, switches, longer contexts. "
    "context: the paper's two stages of longer contexts, after a stage like cosine's or after --init.",
)
flags.DEFINE_integer("steps", 600, "Optimiser steps; with --plan=paper those that --batch_size would need. See --tokens.", 1)
flags.DEFINE_integer("tokens", None, "Tokens of the first stage, instead of steps times batch.", 1)
flags.DEFINE_integer("batch_size", 8, "Sequences of a step, all micro-batches together; with --plan=paper the largest.", 1)
flags.DEFINE_integer("accumulate", 1, "Micro-batches of --batch_size, which it must divide. Less memory, same result.", 1)
flags.DEFINE_integer("seq_len", 256, "Tokens of a sequence; with --plan=paper in the first stage.", 1)
flags.DEFINE_integer("context_steps", None, "With --plan=paper or context: steps of each stage with longer contexts.", 1)
flags.DEFINE_integer(
    "batch_multiple", None, "With --plan=paper or context: so many devices can share each batch in equal parts, on whatever "
    "--mesh the run goes on. Default: those on data and expert of the --mesh that it begins with.", 1,
)  # fmt: skip
flags.DEFINE_float("yarn_factor", 40.0, "With --plan=context: how much longer YaRN makes the context, at least 32.", 1.0)
flags.DEFINE_float("context_lr", None, "With --plan=context: learning rate of its stages. Default: 0.0332 of --lr.")
flags.DEFINE_integer("seed", 0, "Decides initial parameters, the order of the data and what is held out.", 0)

flags.DEFINE_float("lr", 3e-3, "Peak learning rate; a cosine in tokens takes it down to a tenth.")
flags.DEFINE_integer("warmup_steps", None, "Steps of linear warm-up. Default: a twentieth of --steps.", 0)
flags.DEFINE_float("weight_decay", 0.1, "Decoupled weight decay; norms and biases have none.", 0.0)
flags.DEFINE_float("clip", 1.0, "Largest norm of the gradient; 0: do not clip.", 0.0)
flags.DEFINE_float("mtp_weight", 0.3, "Weight of the multi-token prediction loss.", 0.0)
flags.DEFINE_float("balance_weight", 1e-4, "Weight of the sequence-wise balance loss.", 0.0)
flags.DEFINE_float("bias_rate", 1e-3, "How far a step moves the router's selection bias.", 0.0)
flags.DEFINE_float("ema_decay", None, "Keep an average of the parameters with this decay a step, and export it.", 0.0, 1.0)

flags.DEFINE_integer(
    "read_ahead", 0, "Batches that tf.data reads while a step computes, for slow storage; 0: read between steps.", 0
)
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
flags.DEFINE_enum(
    "moment_dtype", None, ["float32", "bfloat16"], "Storage of AdamW's moments; the paper: bfloat16, half the memory. "
    "Default: float32, with --fp8 its recipe's."
)  # fmt: skip
flags.DEFINE_enum("remat", "none", ["none", "block"], "Recompute each block in the backward pass: less memory.")
flags.DEFINE_string("mesh", None, "Devices by axis, as data:2,expert:4: rows over both, experts over expert. Default: one.")
flags.DEFINE_enum(
    "schedule", "one_f_one_b", sorted(pipeline.SCHEDULES), "Order of micro-batches on the ranks of a --mesh with pipe."
)
flags.DEFINE_integer("expert_nodes", 1, "With --mesh: nodes that expert is cut into; rows go to a node once.", 1)
flags.DEFINE_bool("zero", True, "With --mesh: each device stores and updates a part of what all use (ZeRO-1).")
flags.DEFINE_enum("loop", "unroll", ["unroll", "scan"], "Layers as a repeated graph or as a loop.")


_program = "pretrain"  # the one that runs, for its messages


class Extension(NamedTuple):
    """What another program adds to this one.

    Attributes:
      program: its name. check: looks at its flags, given the setup, before the training.
      at_end: called with the setup and the policy, and as `train` says.
      sections: called after the training for more sections of the report.
    """

    program: str
    check: Callable[[Setup], None]
    at_end: Callable[[Setup, ComputePolicy, int, TrainState, Stop], None]
    sections: Callable[[Setup], list]


def main(argv: list[str], extension: Extension | None = None) -> int:
    """Runs everything.

    Returns:
      The exit code: 2 for bad input, 1 for what fails later, 128 + n when signal n has interrupted the training.
    """
    global _program
    _program = "pretrain" if extension is None else extension.program
    again = same_command()
    logging.set_verbosity(logging.WARNING)  # TensorFlow tells at length how it connects processes
    try:
        setup = prepare(argv, extension and extension.check)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail(f"interrupted; to go on, {again}", 130)
    with setup.clients:
        code = run(setup, again, extension)
        if 0 < code < 128:  # the other processes end, too
            sys.exit(code)
    return code


def run(setup: Setup, again: str, extension: Extension | None = None) -> int:
    """Trains and reports; returns the exit code."""
    dtype = compute_dtype()
    plain = default_policy().replace(dtype=None if dtype == "float32" else dtype, remat=FLAGS.remat, loop=FLAGS.loop)
    at_end = None if extension is None else functools.partial(extension.at_end, setup, plain)
    try:
        setup = setup._replace(product_flops=summed(product_rate(dtype), setup.mesh))
        result, total = train(setup, plain, at_end), total_steps(setup)
        if result.step < total or (extension is not None and result.stopped is not None):
            say(f"{result.stopped.name}: saved at step {result.step} of {total}; to go on, {again}")
            return 128 + result.stopped
        last = len(setup.schedule.stages) - 1
        more = [] if extension is None else extension.sections(setup)
        report(setup._replace(cfg=stage_of(setup.cfg, setup.schedule, last)), result.state, plain, more)
    except FloatingPointError as error:
        return fail(f"{error}; {last_checkpoint(setup.out)}; a lower --lr may help, with --fresh or another --out", 1)
    except (ValueError, OSError) as error:
        return fail(f"{what_failed(error, setup.out)}; once that is put right, {again}", 1)
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
    print(f"{_program}: {' '.join(str(error).split())}", file=sys.stderr)
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


parse_flags = flag_parser("pretrain")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
