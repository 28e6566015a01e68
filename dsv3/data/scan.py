"""The first step of preparing a corpus, part by part and in any number of processes: read, clean, filter, sign, store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dsv3.data.clean import clean_text
from dsv3.data.clock import Clock
from dsv3.data.corpus import Document, chunk_documents, heldout_place
from dsv3.data.dedup import document_hash, exact_key, minhash_signature
from dsv3.data.embedded import embedded_corpus
from dsv3.data.filters import first_reason, make_filters
from dsv3.data.settings import SourceSettings
from dsv3.data.sources import Part, Piece, list_parts, read_part
from dsv3.data.work import SPLITS, PartFiles

NAMED = 3  # documents left out that are named, by part and reason
_EMBEDDED = "embedded:"


class ScanTask(NamedTuple):
    """A part of a source to scan.

    Args:
      source: its settings.
      number: of the part, from 0.
      part: what to read.
      work: the work folder.
      heldout: share of the documents that is held out.
      seed: of what is held out.
      permutations: numbers of a signature; 0: none, for exact duplicates only.
      shingle: units of a run.
      unit: "words" or "characters".
      bad_rows: see `read_corpus`.
    """

    source: SourceSettings
    number: int
    part: Part
    work: str
    heldout: float
    seed: int
    permutations: int
    shingle: int
    unit: str
    bad_rows: str


def source_parts(source: SourceSettings, part_bytes: int) -> list[Part]:
    """Cuts a source in parts, as `list_parts`; a piece of the embedded corpus is a run of its documents by number.

    Args:
      source: the source.
      part_bytes: a part ends where it has so many bytes.

    Returns:
      The parts.

    Raises:
      FileNotFoundError, ValueError: as `list_parts`.
    """
    if not source.path.startswith(_EMBEDDED):
        return list_parts(source.path, part_bytes=part_bytes)
    ends = np.cumsum([0, *(len(document.text.encode()) for document in _embedded(source))])
    if len(ends) == 1:
        raise ValueError(f"source_parts: no document for {source.path!r}, want embedded:stdlib or embedded:reference")
    cuts = np.unique(np.append(np.searchsorted(ends, np.arange(0, ends[-1], part_bytes)), len(ends) - 1)).tolist()
    sizes = np.diff(ends[cuts]).tolist()
    return [Part((Piece("", a, b, size),), size) for (a, b), size in zip(itertools.pairwise(cuts), sizes)]


def scan_part(task: ScanTask) -> dict[str, Any]:
    """Reads, cleans and filters the documents of a part, and stores those that stay with what finds duplicates.

    Args:
      task: what to do.

    Returns:
      What is in the part's `part.json`: "read": [documents, bytes], skipped files and rows among them; "stored": the same by
      split; "dropped": by reason documents, bytes and some names; "clock": CPU seconds and bytes by stage, "scan" being all
      of them.

    Raises:
      ValueError: a bad row, see `read_corpus`.
      OSError: the disk is full or cannot be written; nothing of the part is left.
    """
    clock, filters = Clock(), make_filters(task.source.filter_settings())
    _sign("", task)  # loads what it needs, which is no part of the time
    start = time.process_time()
    with PartFiles(task.work, task.source.name, task.number, task.permutations) as files:
        result = files.result
        result |= {"read": [0, 0], "stored": {split: [0, 0] for split in SPLITS}, "dropped": {}}

        def drop(name: str, reason: str, size: int = 0) -> None:
            entry = result["dropped"].setdefault(reason, {"documents": 0, "bytes": 0, "names": []})
            entry["documents"] += 1
            entry["bytes"] += size
            entry["names"] += [name] if len(entry["names"]) < NAMED else []

        def skip(name: str, reason: str) -> None:
            _count(result["read"], 0)
            drop(name, reason)

        for document in clock.each("read", _documents(task, skip)):
            size = len(document.text.encode())
            _count(result["read"], size)
            text = clock.run("clean", size, clean_text, document.text, task.source.kind)
            reason = clock.run("filter", size, first_reason, text, filters) if text.strip() else "is empty"
            if reason is not None:
                drop(document.name, reason, size)
                continue
            size = len(text.encode())
            held = heldout_place(text, task.seed) < task.heldout
            key, signature = clock.run("sign", size, _sign, text, task)
            known = {"heldout": held, "digest": document_hash(text), "key": key, "signature": signature}
            clock.run("store", size, files.add, document.name, text, **known)
            _count(result["stored"][SPLITS[held]], size)
        clock.add("scan", time.process_time() - start, result["read"][1])
        result["clock"] = clock.totals()
    return result


def _documents(task: ScanTask, skip: Callable[[str, str], None]) -> Iterator[Document]:
    source = task.source
    if source.path.startswith(_EMBEDDED):
        runs = [itertools.islice(_embedded(source), piece.start, piece.stop) for piece in task.part.pieces]
        documents: Iterator[Document] = itertools.chain.from_iterable(runs)
    else:
        options = {"text_field": source.text_field, "bad_rows": task.bad_rows, "on_skip": skip}
        documents = read_part(source.path, task.part, **options)
    return documents if source.chunk is None else chunk_documents(documents, source.chunk)


def _embedded(source: SourceSettings) -> Iterator[Document]:
    """The documents of a part of the embedded corpus, `stdlib` or `reference`."""
    start = source.path.removeprefix(_EMBEDDED) + "/"
    return (document for document in embedded_corpus() if document.name.startswith(start))


def _sign(text: str, task: ScanTask) -> tuple[bytes, np.ndarray | None]:
    if not task.permutations:
        return exact_key(text), None
    return exact_key(text), minhash_signature(text, permutations=task.permutations, size=task.shingle, unit=task.unit)


def _count(total: list[int], size: int) -> None:
    total[0] += 1
    total[1] += size
