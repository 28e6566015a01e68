"""The steps of `prepare_data.py`, each of which goes on with what it finds done."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from prepare_pool import Meter, Stage, Stopped, open_pool, run_stage
from prepare_report import summarise, tables, write_report
from prepare_setup import Setup, say, sweep
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.data import (
    Manifest,
    SourceSettings,
    load_tokenizer,
    mixture_settings,
    save_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    train_tokenizer,
    write_manifest,
)
from dsv3.data.clock import Clock
from dsv3.data.duplicates import drop_duplicates
from dsv3.data.encode import EncodeTask, encode_shard, plan_shards, sample_texts
from dsv3.data.scan import ScanTask, scan_part
from dsv3.data.work import SPLITS, read_json, read_scan, scan_folder, shard_file, write_json

FLAGS = flags.FLAGS
Stop = Callable[[], signal.Signals | None]
Shards = dict[str, dict[str, list[tuple[tuple[int, ...], int]]]]  # by split and source: parts, bytes


def run(setup: Setup, stop: Stop) -> None:
    """Does what is left to do.

    Raises:
      Stopped: a signal came.
      ValueError, OSError, MemoryError: what went wrong, in one line.
    """
    processes = FLAGS.processes or len(os.sched_getaffinity(0))
    wall = {}
    with contextlib.ExitStack() as stack:
        stack.callback(sweep, setup.out)  # behind the end of the processes
        pool = stack.enter_context(open_pool(processes, setup.out))
        wall["scan"] = run_stage(pool, processes, scan_stage(setup), stop)
        scans = {s.name: [read_scan(setup.work, s.name, i) for i in range(len(setup.parts[s.name]))] for s in setup.sources}
        for name, rows in scans.items():
            check_stored(name, rows)
        dropped = find_all_duplicates(setup, stop)
        shards = plan_all_shards(setup)
        sources = [source for source in setup.sources if shards["train"][source.name]]
        check_weights(sources)
        tokenizer = make_tokenizer(setup, shards["train"])
        encode = encode_stage(setup, shards, tokenizer)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # where this process does it itself: one core, too
        wall["tokenise"] = run_stage(pool, processes, encode, stop)
    done: dict[str, dict[str, list[dict[str, Any]]]] = {split: {} for split in SPLITS}
    for task in encode.tasks:
        result = read_json(shard_file(task.work, task.split, task.source, task.number))
        done[task.split].setdefault(task.source, []).append(result)
    told = {"processes": processes, "wall_seconds": wall}
    finish(setup, sources, tokenizer, summarise(setup.sources, scans, dropped, done, told), done)


def scan_stage(setup: Setup) -> Stage:
    """Reading, cleaning, filtering and signing of all parts."""
    common = {
        "work": str(setup.work), "heldout": FLAGS.heldout, "seed": FLAGS.seed, "shingle": FLAGS.shingle,
        "permutations": FLAGS.permutations if FLAGS.near else 0, "unit": FLAGS.shingle_unit, "bad_rows": FLAGS.bad_rows,
    }  # fmt: skip
    tasks = [
        ScanTask(source=source, number=number, part=part, **common)
        for source in setup.sources
        for number, part in enumerate(setup.parts[source.name])
    ]

    def is_done(task: ScanTask) -> bool:
        return scan_folder(task.work, task.source.name, task.number).is_dir()

    return Stage("scan", scan_part, tasks, lambda task: task.part.bytes, is_done)


def check_stored(name: str, scans: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a source of which nothing has passed the filters."""
    if any(sum(count for count, _ in scan["stored"].values()) for scan in scans):
        return
    reasons: dict[str, int] = {}
    for scan in scans:
        for reason, entry in scan["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + entry["documents"]
    told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    hint = f"other --filters={name}=... may help, in another --out or with --fresh"
    raise ValueError(f"source {name!r}: no document stays ({told or 'there is none'}); {hint}")


def find_all_duplicates(setup: Setup, stop: Stop) -> dict[str, Any]:
    """Which documents stay; the summary of `drop_duplicates`, with the CPU seconds as `clock`."""
    file = setup.work / "duplicates.json"
    if file.exists():
        return read_json(file)
    parts = [part for source in setup.sources for part in setup.parts[source.name]]
    meter, sizes = Meter("duplicates", len(parts), sum(part.bytes for part in parts), 0, 0), iter(parts)

    def on_part() -> None:
        meter.update(next(sizes).bytes)
        if (number := stop()) is not None:
            raise Stopped(number)

    clock, counts = Clock(), {source.name: len(setup.parts[source.name]) for source in setup.sources}
    threshold = FLAGS.near or 1.0  # without signatures it does not matter
    found = clock.run("duplicates", 0, drop_duplicates, setup.work, counts, threshold=threshold, on_part=on_part)
    found["clock"] = clock.totals()
    write_json(file, found)
    return found


def plan_all_shards(setup: Setup) -> Shards:
    """The parts that make up each shard; tells of sources that have nothing to train on or nothing held out."""
    shards = {
        split: {
            source.name: plan_shards(setup.work, split, source.name, len(setup.parts[source.name]), FLAGS.part_bytes)
            for source in setup.sources
        }
        for split in SPLITS
    }
    for name, found in shards["train"].items():
        if not found:
            held = "only what is held out stays" if shards["heldout"][name] else "sources before it say all of it"
            say(f"source {name!r} has nothing to train on: {held}")
    check(any(shards["train"].values()), "no source has anything to train on")
    for name, found in shards["heldout"].items():
        if not found and FLAGS.heldout and shards["train"][name]:
            say(f"source {name!r} has so few documents that none is held out (--heldout={FLAGS.heldout}, --chunk)")
    return shards


def check_weights(sources: Sequence[SourceSettings]) -> None:
    """Refuses, before any tokenising, weights that make no mixture of the sources which have something to train on."""
    try:
        mixture_settings(sources)
    except ValueError as error:
        raise ValueError(f"{error}; only {', '.join(s.name for s in sources)} have something to train on") from None


def make_tokenizer(setup: Setup, shards: Mapping[str, Sequence[tuple[tuple[int, ...], int]]]) -> Tokenizer:
    """The tokenizer of the folder: one from before, that of --tokenizer, or a new one."""
    folder = setup.out / "tokenizer"
    if not folder.exists():
        if FLAGS.tokenizer is not None:
            save_tokenizer(load_tokenizer(FLAGS.tokenizer), folder)
        else:
            say(f"training a tokenizer of {FLAGS.vocab_size:,} ids")
            sizes = {name: sum(size for _, size in found) for name, found in shards.items()}
            parts = {name: len(setup.parts[name]) for name in shards}
            texts = sample_texts(setup.work, parts, sizes, FLAGS.tokenizer_bytes)
            save_tokenizer(train_tokenizer(texts, FLAGS.vocab_size), folder)
    return load_tokenizer(folder)


def encode_stage(setup: Setup, shards: Shards, tokenizer: Tokenizer) -> Stage:
    """Making all shards, those of sources that have only something held out among them."""
    common = {
        "work": str(setup.work), "out": str(setup.out), "vocab_size": vocab_size(tokenizer), "fim": FLAGS.fim,
        "window_tokens": FLAGS.window_tokens, "seed": FLAGS.seed,
    }  # fmt: skip
    tasks = [
        EncodeTask(split=split, source=source.name, number=number, parts=parts, bytes=size, **common)
        for split in SPLITS
        for source in setup.sources
        for number, (parts, size) in enumerate(shards[split][source.name])
    ]

    def is_done(task: EncodeTask) -> bool:
        return shard_file(task.work, task.split, task.source, task.number).exists()

    return Stage("tokenise", encode_shard, tasks, lambda task: task.bytes, is_done)


def vocab_size(tokenizer: Tokenizer) -> int:
    """Ids of a tokenizer are below it."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def finish(
    setup: Setup, sources: Sequence[SourceSettings], tokenizer: Tokenizer, summary: dict[str, Any],
    done: Mapping[str, Mapping[str, list[dict[str, Any]]]],
) -> None:  # fmt: skip
    """Writes the report and, last, the manifest; then work/ is not needed any more."""
    mixture = mixture_settings(sources)
    summary["mixture"] = mixture
    write_report(setup.out, summary)
    keys = ("licence", "path", "kind", "languages", "documents", "tokens", "bytes", "dropped")
    told = {name: {key: source[key] for key in keys} for name, source in summary["sources"].items()}
    entries = {split: {name: [r["entry"] for r in rows] for name, rows in found.items()} for split, found in done.items()}
    write_manifest(
        setup.out,
        Manifest(
            tokenizer_fingerprint(tokenizer), vocab_size(tokenizer), special_ids(tokenizer),
            {**setup.settings, "mixture": mixture}, told, entries,
        ),
    )  # fmt: skip
    if not FLAGS.keep_work:
        shutil.rmtree(setup.work)
    print(tables(summary))
    say(f"{str(setup.out)!r} is whole: manifest.json, report.html")
