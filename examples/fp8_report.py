"""Trains one model in several precisions from the same start on the same text, and compares the losses.

Every variant of a seed has the same initial parameters and the same batches in the same order. A variant is one of

  float32, bfloat16    compute dtypes without FP8, moments in float32
  a recipe's name      that recipe in bfloat16 with its dtype of moments: paper, power_of_two, tensor, e5m2_gradients ...
  narrow               scales by tensor, sums in the model of a tensor core's 14-bit accumulator, promoted every 128 elements
  narrow_never         the same without promotion (both are slow: a step takes many times as long)

A finished run is kept in --out and not trained again, so variants and seeds can be added, and an interrupted report goes on
at its last run. Where they are there, float32 and bfloat16 are what the others are compared with. It leaves

  runs/VARIANT-SEED.json   the losses of a run
  curves.png               losses, and differences to bfloat16, as running means
  report.json, report.txt  the table

The table's columns: loss, the mean of the last tenth of the steps; to bfloat16 and to float32, how far that is from theirs,
in percent of it, the mean over seeds with the smallest and the largest; apart, the mean over the last tenth of the absolute
difference between running means of ten steps, which does not let positive and negative cancel out; spike, by how much a loss
exceeded the running mean of ten steps before it, at most, after the warm-up; held out, nats a token of held-out text, in
bfloat16 for all but float32.

Examples:

  python examples/fp8_report.py
  python examples/fp8_report.py --variants=bfloat16,e5m2_gradients,tensor --seeds=0
  python examples/fp8_report.py --variants=tensor,narrow,narrow_never --steps=100 --batch_size=2 --seq_len=128 \\
      --seeds=0 --out=runs/narrow
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from command import PIECE, cut_corpus, flag_parser, write_text
from fp8_compare import write_report

import dsv3
from dsv3.checks import check
from dsv3.compiled import place, snapshot
from dsv3.data import (
    Packed,
    TokenStream,
    batch_at,
    chunk_documents,
    embedded_corpus,
    encode_documents,
    pack_sequences,
    read_corpus,
    split_documents,
    train_tokenizer,
)
from dsv3.eval import make_evaluator
from dsv3.policy import default_policy
from dsv3.recipe import RECIPES, Fp8Recipe
from dsv3.train.loop import Actions, index_feed, train_loop
from dsv3.train.optim import adamw
from dsv3.train.progress import Progress
from dsv3.train.schedule import curve_schedule, warmup_cosine
from dsv3.train.step import make_train_step, train_init

FLAGS = flags.FLAGS
NARROW = Fp8Recipe("narrow", scaling="tensor", accumulate="tensor_core")
VARIANTS: dict[str, Fp8Recipe | str] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    **RECIPES,
    "narrow": NARROW,
    "narrow_never": NARROW.replace(name="narrow_never", interval=None),
}
SHOWN = ["float32", "bfloat16", "paper"]
HELDOUT, HELDOUT_CHARS = 0.02, 65536
DECIDING = "preset corpus steps batch_size seq_len lr".split()

flags.DEFINE_list("variants", SHOWN, f"What to train: of {', '.join(VARIANTS)}.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of initial parameters, of the order of the text and of what is held out.")
flags.DEFINE_enum("preset", "demo", dsv3.PRESETS, "Architecture by name.")
flags.DEFINE_string("corpus", None, "Text to train on: a file or a folder. Default: the running Python's own.")
flags.DEFINE_integer("steps", 600, "Optimiser steps.", 40)
flags.DEFINE_integer("batch_size", 8, "Sequences of a step.", 1)
flags.DEFINE_integer("seq_len", 256, "Tokens of a sequence.", 1)
flags.DEFINE_float("lr", 3e-3, "Peak learning rate; warm-up and cosine are those of pretrain.py.", 0.0)
flags.DEFINE_string("out", "runs/fp8_report", "Folder of the runs and the report.")


class Text(NamedTuple):
    """`packed`: rows of training text; `heldout`: held-out tokens."""

    packed: Packed
    heldout: TokenStream


def main(argv: list[str]) -> int:
    """Trains what is missing and writes the report; returns the exit code: 2 for bad input, 1 if a run has diverged."""
    failed = []
    try:
        check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
        seeds = read_flags()
        out = claim(Path(FLAGS.out))
        for seed in seeds:
            missing = [name for name in FLAGS.variants if not run_file(out, name, seed).exists()]
            text = read_text(seed) if missing else None
            for name in missing:
                try:
                    write_text(run_file(out, name, seed), json.dumps(train(name, seed, text)) + "\n")
                except FloatingPointError as error:
                    failed.append(f"{name}, seed {seed}: {error}")
        print(write_report(out, list(VARIANTS)))
    except (ValueError, OSError) as error:
        print(f"fp8_report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fp8_report: interrupted; the same command goes on at the run that was cut off", file=sys.stderr)
        return 130
    for line in failed:
        print(f"fp8_report: {' '.join(line.split())}", file=sys.stderr)
    return 1 if failed else 0


def read_flags() -> list[int]:
    """Checks the flags and returns the seeds."""
    for name in FLAGS.variants:
        check(name in VARIANTS, f"--variants has {name!r}, want some of {', '.join(VARIANTS)}")
    for seed in FLAGS.seeds:
        check(seed.isdecimal(), f"--seeds has {seed!r}, want numbers of 0 or more")
    cfg = dsv3.preset(FLAGS.preset)
    check(FLAGS.lr > 0, f"--lr is {FLAGS.lr}, want above 0")
    check(FLAGS.seq_len <= cfg.max_length, f"--seq_len is {FLAGS.seq_len}, the model's maximum is {cfg.max_length}")
    check(cfg.vocab_size >= 266, f"preset {FLAGS.preset!r} has {cfg.vocab_size} ids, too few for a trained tokenizer")
    return [int(seed) for seed in FLAGS.seeds]


def claim(out: Path) -> Path:
    """Makes the folder, or refuses one whose runs had other settings."""
    settings = {name: FLAGS[name].value for name in DECIDING}
    (out / "runs").mkdir(parents=True, exist_ok=True)
    file = out / "settings.json"
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        wrong = [name for name in settings if saved.get(name) != settings[name]]
        if wrong:
            raise ValueError(f"--{wrong[0]} is {settings[wrong[0]]}, the runs in {str(out)!r} have {saved.get(wrong[0])}")
    write_text(file, json.dumps(settings, indent=1) + "\n")
    return out


def run_file(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}-{seed}.json"


def read_text(seed: int) -> Text:
    """The corpus as `pretrain.py` cuts it, with a tokenizer of its own for each seed."""
    documents = cut_corpus(embedded_corpus() if FLAGS.corpus is None else read_corpus(FLAGS.corpus))
    train, heldout = (list(chunk_documents(side, PIECE)) for side in split_documents(documents, HELDOUT, seed))
    check(bool(heldout), "the corpus is too short to hold out a part and train on another")
    tokenizer = train_tokenizer((document.text for document in train), dsv3.preset(FLAGS.preset).vocab_size)
    sizes = np.cumsum([len(document.text) for document in heldout])
    some = heldout[: int(np.searchsorted(sizes, HELDOUT_CHARS)) + 1]
    streams = [encode_documents(tokenizer, documents) for documents in (train, some)]
    return Text(pack_sequences(streams[0], FLAGS.seq_len), streams[1])


def train(name: str, seed: int, text: Text) -> dict[str, Any]:
    """One run: its losses (next-token cross-entropy of each step's batch) and the held-out one at the end."""
    cfg, variant = dsv3.preset(FLAGS.preset), VARIANTS[name]
    recipe = variant if isinstance(variant, Fp8Recipe) else None
    plain = default_policy().replace(dtype=None if name == "float32" else "bfloat16")
    a_step = FLAGS.batch_size * FLAGS.seq_len
    curve = warmup_cosine(
        FLAGS.lr, warmup_tokens=FLAGS.steps // 20 * a_step, total_tokens=FLAGS.steps * a_step, final=0.1 * FLAGS.lr
    )
    optimizer = adamw(curve_schedule(curve), moment_dtype=recipe.moments if recipe else "float32")
    step = make_train_step(cfg, optimizer, policy=plain.replace(fp8=recipe))
    print(f"{name}, seed {seed}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    with Progress(FLAGS.steps) as progress:
        state = train_loop(
            step, place(train_init([0, seed], cfg, optimizer, fp8=recipe)),
            index_feed(lambda number: batch_at(text.packed, number, FLAGS.batch_size, seed)), steps=FLAGS.steps,
            actions=Actions(write=rows.append, progress=progress.update, load_every=FLAGS.steps),
        ).state  # fmt: skip
    params, router = snapshot((state.params, state.router))
    score = make_evaluator(cfg, length=FLAGS.seq_len, policy=plain)(params, router, text.heldout)
    losses = [row["nll"] for row in rows if row["kind"] == "train"]
    return {"variant": name, "seed": seed, "loss": losses, "heldout": score.nll}


parse_flags = flag_parser("fp8_report")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
