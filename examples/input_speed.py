"""Times the input of a training: how fast rows are read from shards, and how long a step waits for them.

The first table times the stream alone, on one core. Cold: the files are not in the page cache. M tokens/s: of the rows that
are read, and of the whole step, which for one of several hosts is more. The second trains a model on the stream and on a
batch that is always the same, which gives the step's own tokens/s. Waiting: the time from the end of a step until the next
batch is there. Late: every batch is held back for --late_ms, as by slow storage.

Without --prepared the shards are random tokens in a temporary folder.

Examples:

  python examples/input_speed.py
  python examples/input_speed.py --prepared=prepared --batch_size=32 --seq_len=4096
  python examples/input_speed.py --write_docs=docs
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import contextlib
import itertools
import math
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from command import aligned, flag_parser, write_text

import dsv3
from dsv3.checks import check
from dsv3.compiled import place
from dsv3.data import (
    InputBatch,
    Manifest,
    Mixture,
    ShardSource,
    SpecialIds,
    host_rows,
    input_init,
    make_mixture,
    next_rows,
    open_shards,
    prefetch_batches,
    read_batches,
    read_manifest,
    read_rows,
    write_manifest,
    write_shard,
)
from dsv3.train.step import make_train_step, train_init

FLAGS = flags.FLAGS
LENGTHS = {"short": 100, "usual": 800, "books": 50_000}  # made-up sources, and the mean tokens of their documents
SHARDS = 4  # of each of these
DOCS = re.compile(r"(<!-- input speed -->\n).*?(<!-- end of input speed -->\n)", re.S)
PAPER = 14.8e12 / (2.664e6 / 2048 * 3600)  # tokens/s of arXiv:2412.19437: 14.8T in 2.664M hours of 2,048 GPUs

flags.DEFINE_string("prepared", None, "A prepared folder. Default: made-up shards.")
flags.DEFINE_integer("tokens", 24_000_000, "Tokens of made-up shards.", 100_000)
flags.DEFINE_integer("batch_size", 64, "Rows of a step of the stream alone, a multiple of --hosts.", 1)
flags.DEFINE_integer("seq_len", 1024, "Tokens of such a row.", 1)
flags.DEFINE_integer("group_tokens", 2**20, "Rows are shuffled within so many tokens of a source.", 1)
flags.DEFINE_integer("hosts", 4, "Hosts that share the rows of a step.", 1)
flags.DEFINE_enum("preset", "demo", dsv3.PRESETS, "The model that is trained.")
flags.DEFINE_integer("train_batch_size", 8, "Rows of its steps.", 1)
flags.DEFINE_integer("train_seq_len", 256, "Tokens of such a row.", 1)
flags.DEFINE_integer("steps", 5, "Its steps that are timed, after two; 0: none, and no second table.", 0)
flags.DEFINE_integer("late_ms", 100, "Time for which late batches are held back.", 0)
flags.DEFINE_integer("depth", 2, "Batches that are read ahead.", 1)
flags.DEFINE_string("write_docs", None, "Folder with a data.md, whose marked block gets the tables and their command.")


def main(argv: list[str]) -> int:
    """Prints both tables; returns the exit code: 2 for bad input."""
    try:
        check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
        host_rows(FLAGS.batch_size, 0, FLAGS.hosts)
        cfg = dsv3.preset(FLAGS.preset)
        if FLAGS.prepared is not None:
            cfg = cfg.replace(vocab_size=read_manifest(FLAGS.prepared).vocab_size)
            open_shards(FLAGS.prepared)
        longest = f"--train_seq_len is {FLAGS.train_seq_len}, the model's maximum is {cfg.max_length}"
        check(FLAGS.train_seq_len <= cfg.max_length, longest)
        if FLAGS.write_docs is not None:
            check(FLAGS.steps > 0, "--write_docs wants both tables, without --steps=0")
            marked_page(Path(FLAGS.write_docs))
    except (OSError, ValueError) as error:
        print(f"input_speed: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if (load := os.getloadavg()[0]) > 1:
        print(f"input_speed: this machine is busy (load {load:.1f}); times mean little now", file=sys.stderr)
    said = list(tables(cfg))
    if FLAGS.write_docs is not None:
        write_docs(Path(FLAGS.write_docs), said)
    return 0


def tables(cfg: dsv3.ModelConfig) -> Iterator[str]:
    """Measures and prints, part by part; yields what was printed."""

    def show(*lines: str) -> str:
        print("\n".join(lines), flush=True)
        return "\n".join(lines)

    with contextlib.ExitStack() as stack:
        folder = FLAGS.prepared or make_shards(stack.enter_context(tempfile.TemporaryDirectory()), cfg.vocab_size)
        sources = open_shards(folder)
        total = sum(source.tokens for source in sources.values())
        windows = sum(len(source.windows.tokens) for source in sources.values())
        yield show(f"{total:,} tokens in {len(sources)} sources, {windows} windows; vocabulary {cfg.vocab_size:,}", "")
        yield show(aligned([("stream", "M tokens/s", "of the step", "ms a step"), *time_stream(Path(folder), total)]))
        yield show(f"the paper's run on 2,048 GPUs: {PAPER / 1e6:.1f} M tokens/s", "")
        if FLAGS.steps:
            head = ("training", "ms a step", "ms waiting", "share", "tokens/s")
            yield show(aligned([head, *time_training(cfg, sources)]))


def marked_page(docs: Path) -> tuple[Path, str]:
    """The page of --write_docs and its text, which has one marked block."""
    page = docs / "data.md"
    check(page.is_file(), f"--write_docs: there is no {str(page)!r}")
    text = page.read_text(encoding="utf-8")
    count = len(DOCS.findall(text))
    check(count == 1, f"--write_docs: {str(page)!r} has {count} blocks marked <!-- input speed -->, want one")
    return page, text


def write_docs(docs: Path, said: Sequence[str]) -> None:
    """Puts the tables and the command that made them where the page is marked."""
    page, text = marked_page(docs)
    key = FLAGS.get_key_flags_for_module(sys.modules[__name__])
    given = [flag.serialize() for flag in key if flag.present and flag.name != "write_docs"]
    command = shlex.join(["python", "examples/input_speed.py", *given])
    block = "\n".join([f"`{command}`, on {os.cpu_count()} cores:", "", "```text", *said, "```", ""])
    write_text(page, DOCS.sub(lambda found: f"{found[1]}{block}{found[2]}", text))


def make_shards(folder: str, vocab_size: int) -> str:
    """Writes a prepared folder of random tokens; returns it."""
    rng, special = np.random.default_rng(0), SpecialIds(0, 1, 2)
    splits: dict[str, list] = {name: [] for name in LENGTHS}
    for name, mean in LENGTHS.items():
        for number in range(SHARDS):
            count = max(1, FLAGS.tokens // (len(LENGTHS) * SHARDS * mean))
            sizes = np.maximum(2, rng.exponential(mean, count).astype(int)).tolist()
            tokens = rng.integers(3, vocab_size, sum(sizes))
            documents = ((part, len(part), 0) for part in np.split(tokens, np.cumsum(sizes)[:-1]))
            splits[name].append(write_shard(Path(folder) / "train" / name, number, documents, vocab_size=vocab_size))
    write_manifest(folder, Manifest("0" * 32, vocab_size, special, {}, {name: {} for name in LENGTHS}, {"train": splits}))
    return folder


def time_stream(folder: Path, total: int) -> Iterator[tuple[str, ...]]:
    """Rows of the first table."""
    steps = max(2, min(total, 50_000_000) // (FLAGS.batch_size * FLAGS.seq_len))
    every = slice(0, FLAGS.batch_size)
    for name, verify in (("cold, digests checked", "touched"), ("cold, digests not checked", "sizes")):
        forget(folder)
        yield stream_row(name, open_shards(folder, verify=verify), every, steps)
    sources = open_shards(folder)
    stream_row("", sources, every, steps)  # all digests are known, all files in the page cache
    yield stream_row("warm", sources, every, steps)
    yield stream_row("warm, the plan alone", sources, None, steps)
    for host in range(FLAGS.hosts) if FLAGS.hosts > 1 else ():
        mine = host_rows(FLAGS.batch_size, host, FLAGS.hosts)
        yield stream_row(f"warm, host {host} of {FLAGS.hosts}", sources, mine, steps)
    forget(folder)
    yield stream_row("the first step after a resume, cold", open_shards(folder), every, 1, skipped=steps // 2)


def stream_row(
    name: str, sources: Mapping[str, ShardSource], rows: slice | None, steps: int, skipped: int = 0
) -> tuple[str, ...]:
    """Times steps of the stream; `rows` are read, `None`: none. `skipped` steps are planned before."""
    mixture = mixture_of(sources)
    state = input_init(mixture)
    for _ in range(skipped):
        _, state = next_rows(mixture, state, FLAGS.batch_size, FLAGS.seq_len)
    begin = time.perf_counter()
    for _ in range(steps):
        plan, state = next_rows(mixture, state, FLAGS.batch_size, FLAGS.seq_len)
        if rows is not None:
            read_rows(sources, mixture, plan, rows)
    seconds = (time.perf_counter() - begin) / steps
    rates = [count * FLAGS.seq_len / seconds / 1e6 for count in (rows.stop - rows.start if rows else 0, FLAGS.batch_size)]
    return name, f"{rates[0]:.1f}" if rows else "-", f"{rates[1]:.1f}", f"{1e3 * seconds:.2f}"


def mixture_of(sources: Mapping[str, ShardSource]) -> Mixture:
    return make_mixture(sources, group_tokens=FLAGS.group_tokens)


def forget(folder: Path) -> None:
    """Drops the shards from the page cache, as far as the system does what it is asked."""
    for path in (folder / "train").rglob("*.npy"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def time_training(cfg: dsv3.ModelConfig, sources: Mapping[str, ShardSource]) -> Iterator[tuple[str, ...]]:
    """Rows of the second table: the same model and shapes, batches that come in different ways."""
    mixture, optimizer = mixture_of(sources), dsv3.adamw(1e-3)
    shape = (FLAGS.train_batch_size, FLAGS.train_seq_len)

    def stream(late_ms: int = 0) -> Generator[InputBatch, None, None]:
        for item in read_batches(sources, mixture, input_init(mixture), lambda tokens: shape):
            time.sleep(late_ms / 1e3)
            yield item

    def same() -> Generator[InputBatch, None, None]:
        yield from itertools.repeat(next(stream()))

    step = make_train_step(cfg, optimizer)
    state = place(train_init([0, 0], cfg, optimizer))
    for name, start in (
        ("always the same batch", same),
        ("read between steps", stream),
        ("read ahead", lambda: prefetch_batches(stream(), FLAGS.depth)),
        ("late, between steps", lambda: stream(FLAGS.late_ms)),
        ("late, ahead", lambda: prefetch_batches(stream(FLAGS.late_ms), FLAGS.depth)),
    ):
        waits, seconds = [], []
        with contextlib.closing(start()) as batches:
            for _ in range(FLAGS.steps + 2):
                begin = time.perf_counter()
                batch = next(batches).batch
                ready = time.perf_counter()
                state, metrics = step(state, batch.tokens)
                float(metrics.loss)
                waits.append(ready - begin)
                seconds.append(time.perf_counter() - begin)
        whole, wait = statistics.median(seconds[2:]), statistics.median(waits[2:])
        yield name, f"{1e3 * whole:.1f}", f"{1e3 * wait:.2f}", f"{wait / whole:.2%}", f"{math.prod(shape) / whole:,.0f}"


parse_flags = flag_parser("input_speed")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
