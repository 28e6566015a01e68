"""Times FP8 on this machine, each case in turns with its peers: quantisers, products, the training step.

On a CPU FP8 is emulated: values are rounded as FP8 rounds them, and products are those of float32. So it is slower than
bfloat16, and the question is by how much. The table's columns: ms, the median over --repeats; GB/s, of what a case reads and
writes; ratio, its time by that of the peer in the same run: for quantisers the time that the copy takes for the same number
of bytes, for products and steps bfloat16.

Examples:

  python examples/fp8_speed.py
  python examples/fp8_speed.py --cases=step --preset=demo --batch_size=4
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags
from command import aligned, flag_parser

import dsv3
from dsv3.checks import check
from dsv3.compiled import place
from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK, fp8_fake, fp8_quantize
from dsv3.ops.fuse import fused
from dsv3.ops.gemm import fp8_fprop
from dsv3.policy import default_policy
from dsv3.recipe import RECIPES
from dsv3.train.step import make_train_step, train_init

FLAGS = flags.FLAGS
CASES = ("quantize", "product", "step")

flags.DEFINE_list("cases", list(CASES), f"What to time: of {', '.join(CASES)}.")
flags.DEFINE_integer("size", 2048, "Rows and columns of the matrices.", 128)
flags.DEFINE_integer("repeats", 9, "Turns; the median counts.", 1)
flags.DEFINE_enum("preset", "demo", dsv3.PRESETS, "The model whose training step is timed.")
flags.DEFINE_integer("batch_size", 8, "Sequences of that step.", 1)
flags.DEFINE_integer("seq_len", 256, "Tokens of a sequence.", 1)
flags.DEFINE_enum("recipe", "paper", RECIPES, "Recipe of that step.")

Case = tuple[str, Callable[[], Any], int]
"""A name, what is timed, and the bytes that it reads and writes, 0 where they do not count."""


def main(argv: list[str]) -> int:
    """Times the cases and prints the table; returns the exit code: 2 for bad input."""
    try:
        check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
        wrong = [name for name in FLAGS.cases if name not in CASES]
        check(not wrong, f"--cases has {wrong[:1]}, want some of {', '.join(CASES)}")
        length = dsv3.preset(FLAGS.preset).max_length
        check(FLAGS.seq_len <= length, f"--seq_len is {FLAGS.seq_len}, the model's maximum is {length}")
    except ValueError as error:
        print(f"fp8_speed: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if (load := os.getloadavg()[0]) > 1:
        print(f"fp8_speed: this machine is busy (load {load:.1f}); ratios mean little now", file=sys.stderr)
    rows = [("case", "ms", "GB/s", "ratio")]
    for name in FLAGS.cases:
        for cases in {"quantize": quantizers, "product": products, "step": steps}[name]():
            rows += measure(cases)
    print(aligned(rows))
    return 0


def measure(cases: list[Case]) -> list[tuple[str, ...]]:
    """Runs the cases in turns, the first being the peer of all."""
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(FLAGS.repeats + 2):
        for times, (_, run, _) in zip(seconds, cases):
            begin = time.perf_counter()
            run()
            if turn > 1:
                times.append(time.perf_counter() - begin)
    medians = [statistics.median(times) for times in seconds]
    rows = []
    for median, (name, _, moved) in zip(medians, cases):
        like = medians[0] * (moved / cases[0][2] if moved else 1)
        rate = f"{moved / median / 1e9:.1f}" if moved else "-"
        rows.append((name, f"{1e3 * median:.2f}", rate, f"{median / like:.2f}"))
    return rows


def normal(*shape: int, dtype: str = "float32") -> tf.Tensor:
    return tf.cast(np.random.default_rng(0).normal(size=shape), dtype)


@fused
def copy(x):
    return -x  # a copy that no compiler leaves out


def quantizers() -> Iterator[list[Case]]:
    """Of activations in both dtypes and of a weight; values, scales and input are counted, each once."""
    n = FLAGS.size * FLAGS.size
    for name, block, dtype in (
        ("1x128", ROW_BLOCK, "float32"), ("1x128", ROW_BLOCK, "bfloat16"), ("128x128", WEIGHT_BLOCK, "float32"),
    ):  # fmt: skip
        x = normal(FLAGS.size, FLAGS.size, dtype=dtype)
        scales = 4 * n // (block[0] * block[1])
        yield [
            (f"copy, {dtype}", lambda x=x: copy(x, fuse=True), 2 * n * x.dtype.size),
            (
                f"fp8_quantize {name}, {dtype}", lambda x=x, b=block: fp8_quantize(x, block=b, fuse=True),
                n * (x.dtype.size + 1) + scales,
            ),
            (f"fp8_fake {name}, {dtype}", lambda x=x, b=block: fp8_fake(x, block=b, fuse=True), 2 * n * x.dtype.size),
        ]  # fmt: skip


def products() -> Iterator[list[Case]]:
    """`x @ w` of square matrices."""
    x, w = normal(FLAGS.size, FLAGS.size), normal(FLAGS.size, FLAGS.size)
    half = [tf.cast(t, tf.bfloat16) for t in (x, w)]
    q, kernel = fp8_quantize(x, block=ROW_BLOCK), fp8_quantize(w, block=WEIGHT_BLOCK)

    @tf.function(autograph=False)
    def whole(x, w):
        pair = fp8_quantize(x, block=ROW_BLOCK, fuse=True), fp8_quantize(w, block=WEIGHT_BLOCK, fuse=True)
        return fp8_fprop(*pair, fuse=True)

    size = FLAGS.size
    yield [
        (f"product {size}, bfloat16", lambda: tf.matmul(*half), 0),
        (f"product {size}, float32", lambda: tf.matmul(x, w), 0),
        (f"fp8_fprop {size}", lambda: fp8_fprop(q, kernel, fuse=True), 0),
        (f"fp8_fprop {size} and its quantisers", lambda: whole(x, w), 0),
    ]


def steps() -> Iterator[list[Case]]:
    """One training step of a model, compiled before it is timed."""
    cfg = dsv3.preset(FLAGS.preset)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (FLAGS.batch_size, FLAGS.seq_len + 1)).astype(np.int32)
    plain = default_policy()
    half = plain.replace(dtype="bfloat16")
    cases = []
    recipe = RECIPES[FLAGS.recipe]
    for name, policy in (("bfloat16", half), ("float32", plain), (FLAGS.recipe, half.replace(fp8=recipe))):
        optimizer = dsv3.adamw(1e-3, moment_dtype=policy.fp8.moments if policy.fp8 else "float32")
        step = make_train_step(cfg, optimizer, policy=policy)
        state = [place(train_init([0, 0], cfg, optimizer, fp8=policy.fp8))]

        def run(step=step, state=state):
            state[0], metrics = step(state[0], tokens)
            return float(metrics.loss)

        cases.append((f"step of {FLAGS.preset}, {name}", run, 0))
    yield cases


parse_flags = flag_parser("fp8_speed")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
