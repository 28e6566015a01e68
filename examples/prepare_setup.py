"""What `prepare_data.py` does before any long work: reads its flags, checks all of them, and claims the folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from command import lock_folder, say
from prepare_pool import wait_for_workers

from dsv3.checks import check
from dsv3.data import (
    Part,
    SourceSettings,
    check_sources,
    check_tokenizer,
    fim_ids,
    load_tokenizer,
    lsh_bands,
    mixture_settings,
    read_sources,
    tokenizer_fingerprint,
)
from dsv3.data.extra import load_extra
from dsv3.data.filters import make_filters
from dsv3.data.scan import source_parts
from dsv3.data.settings import DEFAULT, FIELDS, UNKNOWN, make_source
from dsv3.data.work import remove_unfinished, write_json

FLAGS = flags.FLAGS
RUN_FILE = "run.json"
DELETED = ".work.deleted"  # the work folder while it is being deleted
PARTS = ("manifest.json", "report.json", "report.html", "plots", "train", "heldout", "tokenizer", "work", RUN_FILE)
# Flags that decide the content of the folder; the number of processes does not.
DECIDING = "heldout seed near permutations shingle shingle_unit part_bytes window_tokens fim bad_rows".split()
PER_SOURCE = [field for field in FIELDS if field not in ("name", "path")]


class Setup(NamedTuple):
    """What there is to do.

    Attributes:
      out: the prepared folder. work: the folder in it for what is not finished.
      sources: their settings. parts: of each.
      settings: what decides the content of the folder.
      whole: whether it is there already.
    """

    out: Path
    work: Path
    sources: tuple[SourceSettings, ...]
    parts: dict[str, list[Part]]
    settings: dict[str, Any]
    whole: bool


def prepare(argv: Sequence[str]) -> Setup:
    """Checks everything that can be wrong, cheapest first, and claims the folder.

    Raises:
      ValueError, OSError: bad input; the message is one line.
    """
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    check_flags()
    sources = read_source_flags()
    for module in ("zstandard", "datasketch"):
        load_extra("prepare_data", module)
    for source in sources:
        make_filters(source.filter_settings())  # that it needs nothing that is missing
    settings = {name: FLAGS[name].value for name in DECIDING}
    settings["tokenizer"] = tokenizer_settings()
    settings["sources"] = {source.name: source_settings(source) for source in sources}
    settings["mixture"] = mixture_settings(sources)
    out = Path(FLAGS.out)
    claim_folder(out)
    parts = {}
    for source in sources:
        parts[source.name] = source_parts(source, FLAGS.part_bytes)
        empty = not any(part.bytes for part in parts[source.name])
        check(not empty, f"source {source.name!r} is empty: {source.path!r} has no bytes")
    resume(out, settings, {source.name: list_inputs(source, parts[source.name]) for source in sources})
    return Setup(out, out / "work", sources, parts, settings, (out / "manifest.json").exists())


def check_flags() -> None:
    """Checks the flags' values; their signs are checked as they are parsed."""
    check(0 <= FLAGS.heldout < 1, f"--heldout is {FLAGS.heldout}, want a share of at least 0 and below 1")
    check(0 <= FLAGS.near <= 1, f"--near is {FLAGS.near}, want a similarity up to 1, or 0 for exact duplicates only")
    check(0 <= FLAGS.fim <= 1, f"--fim is {FLAGS.fim}, want a share from 0 to 1")
    if FLAGS.near:
        lsh_bands(FLAGS.near, FLAGS.permutations)
    check(
        FLAGS.tokenizer is None or not (FLAGS["vocab_size"].present or FLAGS["tokenizer_bytes"].present),
        "--tokenizer is given, and --vocab_size or --tokenizer_bytes, which are for training one; want one of them",
    )


def read_source_flags() -> tuple[SourceSettings, ...]:
    """The sources of --sources or --source with the flags that change them; without both the embedded corpus."""
    check(not (FLAGS.sources and FLAGS.source), "--sources and --source are both given, want one of them")
    if FLAGS.sources:
        rows = [dataclasses.asdict(source) for source in read_sources(FLAGS.sources)]
    elif FLAGS.source:
        rows = [dict(zip(("name", "path"), split_pair("source", pair))) for pair in FLAGS.source]
    else:
        rows = [dataclasses.asdict(source) for source in DEFAULT]
    names = [row["name"] for row in rows]
    for field in PER_SOURCE:
        for item in FLAGS[field].value:
            name, equals, value = item.partition("=")
            chosen = [name] if equals and name in names else names
            if chosen is names:
                value = item
                looks = equals and field not in ("filters", "licence")
                check(not looks, f"--{field}={item} names no source, want one of {', '.join(names)}")
            for row in rows:
                if row["name"] in chosen:
                    row[field] = value
    sources = check_sources(make_source("prepare_data", row) for row in rows)
    for source in sources:
        if source.licence == UNKNOWN:
            say(f"source {source.name!r} has no licence: the manifest will say {UNKNOWN!r} (--licence={source.name}=...)")
    return sources


def split_pair(flag: str, pair: str) -> tuple[str, str]:
    """`name=value` as its parts."""
    name, equals, value = pair.partition("=")
    check(bool(name and equals and value), f"--{flag}={pair}, want name=path")
    return name, value


def tokenizer_settings() -> dict[str, Any]:
    """What decides the tokenizer: its fingerprint, or what one is trained with."""
    if FLAGS.tokenizer is None:
        check(FLAGS.vocab_size >= 266, f"--vocab_size is {FLAGS.vocab_size}, want at least 266 for a trained tokenizer")
        return {"vocab_size": FLAGS.vocab_size, "bytes": FLAGS.tokenizer_bytes}
    tokenizer = load_tokenizer(FLAGS.tokenizer)
    check_tokenizer(tokenizer, 2**32)
    if FLAGS.fim:
        fim_ids(tokenizer)
    return {"fingerprint": tokenizer_fingerprint(tokenizer)}


def source_settings(source: SourceSettings) -> dict[str, Any]:
    """All about a source that decides the content; its filters with every threshold."""
    values = dataclasses.asdict(source) | {"filters": source.filter_settings()}
    return json.loads(json.dumps({name: value for name, value in values.items() if name != "name"}))


def list_inputs(source: SourceSettings, parts: Sequence[Part]) -> list[list[Any]]:
    """Name, bytes and time of change of each file."""
    if source.path.startswith("embedded:"):
        return [[source.path, sum(part.bytes for part in parts), 0]]
    rows = {}
    for piece in (piece for part in parts for piece in part.pieces):
        file = Path(source.path) / piece.name if piece.name else Path(source.path)
        stat = file.stat()
        rows[piece.name] = [piece.name or file.name, stat.st_size, stat.st_mtime_ns]
    return list(rows.values())


def claim_folder(out: Path) -> None:
    """Makes the folder and locks it. It deletes nothing.

    Raises:
      ValueError: the folder is in use or holds something else.
      OSError: it cannot be written.
    """
    lock_folder(out)
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    ours = not others or RUN_FILE in others
    check(ours, f"--out {str(out)!r} holds {others[:1]} but nothing that this program began; want an empty folder")
    foreign = [name for name in others if name not in PARTS]
    check(
        not (FLAGS.fresh and foreign),
        f"--out {str(out)!r} holds {foreign[:1]}, which is no part of a prepared folder; want it moved away",
    )
    gone = wait_for_workers(out)
    check(gone, f"--out {str(out)!r} is in use by processes that a killed run has left; want them ended")


def resume(out: Path, settings: Mapping[str, Any], inputs: Mapping[str, list[list[Any]]]) -> None:
    """Goes on with what is in the folder, if it was begun with the same settings and inputs; else writes these."""
    if FLAGS.fresh:
        delete(out)
    file, listed = out / RUN_FILE, out / "work" / "inputs.json"
    digests = {name: hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest() for name, rows in inputs.items()}
    if file.exists():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            before, known = saved["settings"], saved["inputs"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(file)!r} cannot be read; --fresh starts anew") from None
        other = f"; --out {str(out)!r} was begun otherwise: another --out keeps both, --fresh starts anew"
        for name, was, now in differences(before, json.loads(json.dumps(settings))):
            raise ValueError(f"{name} is {now!r:.80}, was {was!r:.80}{other}")
        for name, digest in digests.items():
            if known.get(name) != digest:
                raise ValueError(f"source {name!r} has changed: {changed_file(listed, name, inputs[name])}{other}")
    else:
        write_json(file, {"settings": settings, "inputs": digests})
    if not (out / "manifest.json").exists():
        sweep(out)
        if not listed.exists():
            write_json(listed, inputs)


def sweep(out: Path) -> None:
    """Removes what processes that were ended have left half-written."""
    shutil.rmtree(out / DELETED, ignore_errors=True)
    for folder in (out / "work", out / "train", out / "heldout"):
        remove_unfinished(folder)


def differences(before: Any, now: Any, name: str = ""):
    """Yields (name, was, is) of what differs between two settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            head = f"source {key!r}" if name == "sources" else f"{name}: {key}" if name.startswith("source ") else key
            yield from differences(before.get(key, "nothing"), now.get(key, "nothing"), head)
    elif before != now:
        yield name, before, now


def changed_file(listed: Path, source: str, rows: list[list[Any]]) -> str:
    """Says which file of a source is not what it was."""
    try:
        before = {row[0]: row[1:] for row in json.loads(listed.read_text(encoding="utf-8"))[source]}
    except (OSError, ValueError, KeyError, TypeError):
        return "another size or time of a file"
    now = {row[0]: row[1:] for row in rows}
    for name in sorted({*before, *now}, key=str):
        if name not in now:
            return f"{name!r} is gone"
        if name not in before:
            return f"{name!r} is new"
        if before[name] != now[name]:
            return f"{name!r} has {now[name][0]:,} bytes, had {before[name][0]:,}, or was written anew"
    return "the order of its files"


def delete(out: Path) -> None:
    """Deletes what was prepared, so that it may be killed at any moment.

    First the manifest goes, as the folder is not whole any more; then, in one step, what says which shards are done.
    `run.json` goes last: until then the folder is known to be this program's.
    """
    (out / PARTS[0]).unlink(missing_ok=True)
    if (out / DELETED).exists():
        shutil.rmtree(out / DELETED)
    if (out / "work").exists():
        (out / "work").rename(out / DELETED)
        shutil.rmtree(out / DELETED)
    for part in PARTS:
        shutil.rmtree(out / part) if (out / part).is_dir() else (out / part).unlink(missing_ok=True)
