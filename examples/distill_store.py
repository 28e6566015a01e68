"""Stores what a teacher says of conversations: the K likeliest tokens at each place that a student is to learn.

distill.py --stored reads it, so that the teacher runs once, wherever there is room for it, and not in every step of every
student. The rows are those of sft.py and distill.py: --data, --chat_template, --heldout, --seed, --max_length, --skip_long
have to be the same there, and so does --temperature; held-out rows are stored, too. --k with the size of the vocabulary
stores whole distributions.

In --out are shards (safetensors: ids, logprobs, rest) and manifest.json. A program that was killed goes on with the shards
that are whole. docs/distillation.md describes the format, and what it takes: K times 8 bytes and 4 for each place.

Examples:

  python examples/distill_store.py --teacher runs/sft/export --data rows.jsonl --k 64 --out runs/stored
  python examples/distill_store.py --teacher deepseek-dir --data rows.jsonl --k 64 --precision float16 --dtype bfloat16 \\
      --max_length 4096 --batch_size 2 --out runs/stored
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import app, flags
from command import failure_line, flag_parser, lock_folder, what_failed
from pretrain_setup import checkpoint_digest
from sft_setup import (
    Rows,
    check_rows_flags,
    describe_rows,
    make_rows,
    read_codec,
    rows_digest,
    rows_settings,
    say,
    timed,
)

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data import PackedDocuments, embedded_conversations, read_conversations
from dsv3.nn.model import cast_params, head_weight, model_apply
from dsv3.ops.divergence import TopK, top_k_logprobs
from dsv3.ops.segments import segment_inputs
from dsv3.policy import ComputePolicy, default_policy
from dsv3.pretrained import load_pretrained, pretrained_config
from dsv3.train.checkpoint import check_settings
from dsv3.train.progress import format_seconds
from dsv3.train.teacher_store import MANIFEST, PRECISIONS, Shard, read_manifest, write_store

FLAGS = flags.FLAGS

flags.DEFINE_string("teacher", None, "Checkpoint directory of the teacher.", required=True)
flags.DEFINE_string("data", None, "Conversations: a .json or .jsonl file. Default: small tasks that dsv3 makes itself.")
flags.DEFINE_string("chat_template", None, "A Jinja file to use instead of the teacher's chat template.")
flags.DEFINE_string("out", None, "Folder of the store.", required=True)
flags.DEFINE_bool("fresh", False, "Delete the store that is in --out and start anew.")
flags.DEFINE_integer("k", 64, "Tokens that are stored of each place.", 1)
flags.DEFINE_float("temperature", 1.0, "Of the distribution.")
flags.DEFINE_enum("precision", "float32", PRECISIONS, "Of the log-probabilities that are stored.")
flags.DEFINE_float("heldout", 0.1, "Share of the questions, by a hash, that is held out; these are stored, too.")
flags.DEFINE_integer("max_length", 256, "Tokens of a packed row: a conversation must fit into one.", 1)
flags.DEFINE_bool("skip_long", False, "Leave out conversations that are longer than --max_length, instead of refusing them.")
flags.DEFINE_integer("seed", 0, "Decides what is held out.", 0)
flags.DEFINE_integer("batch_size", 8, "Rows that the teacher computes at a time.", 1)
flags.DEFINE_integer("shard_rows", 256, "Rows of a shard.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and products.")

DECIDING = "k temperature heldout max_length skip_long seed batch_size dtype".split()


class Setup(NamedTuple):
    """The teacher's configuration, what the numbers depend on, and all rows: those that are held out come last."""

    cfg: ModelConfig
    settings: dict[str, Any]
    rows: PackedDocuments


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input, 1 for what fails later."""
    try:
        setup = prepare(argv)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    again = f"the same command{' without --fresh' if FLAGS.fresh else ''} goes on"
    try:
        pace = Pace(len(setup.rows.tokens))
        shards = write_store(
            FLAGS.out, setup.settings, setup.rows.weights, make_say(setup, pace), shard_rows=FLAGS.shard_rows,
            precision=FLAGS.precision, note=pace.note,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return fail(f"{what_failed(error, FLAGS.out)}; once that is put right, {again}", 1)
    except KeyboardInterrupt:
        return fail(f"interrupted; {again}", 130)
    places, held, size = (sum(getattr(shard, name) for shard in shards) for name in ("places", "held", "size"))
    rows = len(setup.rows.tokens)
    say(f"{places:,} places of {rows:,} rows, {FLAGS.k:,} tokens each: {held / places:.2%} of the probability")
    say(f"{size:,} bytes in {len(shards)} shards, {size / places:,.1f} a place: {FLAGS.out}")
    return 0


def prepare(argv: Sequence[str]) -> Setup:
    """Checks everything that can be wrong, cheapest first, and prepares the rows."""
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    teacher, out = Path(FLAGS.teacher), Path(FLAGS.out)
    check(teacher.is_dir(), f"--teacher {FLAGS.teacher!r} is no folder, want a checkpoint's")
    cfg = pretrained_config(teacher)
    good = math.isfinite(FLAGS.temperature) and FLAGS.temperature > 0
    check(good, f"--temperature is {FLAGS.temperature}, want above 0")
    size = cfg.vocab_size
    check(FLAGS.k <= size, f"--k is {FLAGS.k}, want at most the vocabulary of --teacher {FLAGS.teacher!r}, {size}")
    check_rows_flags(cfg)
    codec = read_codec(teacher, cfg)
    conversations = embedded_conversations() if FLAGS.data is None else read_conversations(FLAGS.data)
    old = claim(out)
    moment = datetime.now().isoformat() if old is None else old["settings"].get("time")
    codec = timed(codec, moment, MANIFEST)
    rows = make_rows(codec, conversations)
    settings = {
        **{name: FLAGS[name].value for name in DECIDING}, "teacher": checkpoint_digest(FLAGS.teacher),
        "vocab_size": size, **rows_settings(codec, conversations), "encoded": rows_digest(rows.train, rows.held),
        "time": moment,
    }  # fmt: skip
    if old is not None:
        kept = ("shard_rows", "precision")
        here = settings | {name: FLAGS[name].value for name in kept}
        try:
            check_settings(old["settings"] | {name: old[name] for name in kept}, here, where=f"the store in {str(out)!r}")
        except ValueError as error:
            raise ValueError(f"{error}; another --out keeps both, --fresh starts anew") from None
    if FLAGS.fresh:
        delete_store(out)
    describe_rows(rows)
    return Setup(cfg, settings, joined(rows))


def joined(rows: Rows) -> PackedDocuments:
    """All rows, those that are held out behind the others."""
    return PackedDocuments(*map(np.concatenate, zip(rows.train, rows.held)))


def claim(out: Path) -> dict[str, Any] | None:
    """Locks the folder; returns the manifest of the store in it, that goes on. It deletes nothing."""
    lock_folder(out)
    names = store_files(out)
    foreign = [name for name in names if name != MANIFEST and not (name[:6] == "shard-" and name.endswith(".safetensors"))]
    check(not foreign, f"--out {str(out)!r} holds {foreign[:1]}, which is no part of a store; want an empty folder")
    return None if FLAGS.fresh else read_manifest(out)


def store_files(out: Path) -> list[str]:
    """Names of all that is in a folder, as far as it is not hidden."""
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))


def delete_store(out: Path) -> None:
    """Deletes the store in a folder that `claim` has looked at. The manifest goes last."""
    for name in sorted(store_files(out), key=lambda name: name == MANIFEST):
        (out / name).unlink()


def make_say(setup: Setup, pace: Pace) -> Callable[[int, int], TopK]:
    """Loads the teacher; returns what computes its likeliest tokens for the rows from one number to another."""
    policy = default_policy().replace(dtype=None if FLAGS.dtype == "float32" else FLAGS.dtype)
    model: list[Any] = []  # loaded for the first shard that is not there

    def say_rows(first: int, last: int) -> TopK:
        if not model:
            _, params, router = load_pretrained(FLAGS.teacher, dtype=FLAGS.dtype)
            model.extend([cast_params(params, policy), router, make_pass(setup.cfg, policy)])
        *teacher, run = model
        parts = []
        for begin in range(first, last, FLAGS.batch_size):
            numbers = np.arange(begin, begin + FLAGS.batch_size)
            here = np.minimum(numbers, last - 1)
            found = run(*teacher, tf.constant(setup.rows.tokens[here]), tf.constant(setup.rows.segments[here]))
            parts.append([part.numpy()[: last - begin] for part in found])
            pace.count(min(last - begin, FLAGS.batch_size))
        return TopK(*map(np.concatenate, zip(*parts)))

    return say_rows


def make_pass(cfg: ModelConfig, policy: ComputePolicy) -> Callable[..., TopK]:
    """Compiles the teacher's pass over rows of one shape."""

    @tf.function(jit_compile=policy.jit, autograph=False)
    def run(params, router, tokens, segments):
        packed = segment_inputs(segments)
        where = {"segments": packed.segments, "positions": packed.positions, "mask": packed.inside}
        hidden = model_apply(params, router, tokens[:, :-1], cfg=cfg, **where, policy=policy).hidden
        rows = tf.reshape(hidden, [-1, cfg.hidden_size])
        head = tf.cast(head_weight(params), hidden.dtype)
        found = top_k_logprobs(rows, head, k=FLAGS.k, temperature=FLAGS.temperature, chunk=policy.loss_chunk)
        return TopK(*(tf.reshape(x, [*hidden.shape[:2], *x.shape[1:]]) for x in found))

    return run


class Pace:
    """Shows how far the rows are, tokens a second and the time that is left, every few seconds."""

    def __init__(self, rows: int, every: float = 10.0):
        self._rows, self._every, self._done, self._computed = rows, every, 0, 0
        self._begin = self._shown = time.monotonic()

    def note(self, shard: Shard, kept: bool) -> None:
        """Notes a shard; its rows have been counted, if they were computed."""
        if kept:
            say(f"{shard.file} is there")
            self._done += shard.rows[1] - shard.rows[0]

    def count(self, rows: int) -> None:
        """Notes rows that were computed."""
        self._done, self._computed, now = self._done + rows, self._computed + rows, time.monotonic()
        if now - self._shown >= self._every or self._done == self._rows:
            self._shown, pace = now, max(now - self._begin, 1e-9) / self._computed
            speed = f"{FLAGS.max_length / pace:,.0f} tokens/s"
            left = format_seconds((self._rows - self._done) * pace)
            print(f"row {self._done:,}/{self._rows:,}  {speed}  ETA {left}", file=sys.stderr, flush=True)


parse_flags, fail = flag_parser("distill_store"), failure_line("distill_store")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
