"""What a teacher says of packed rows, stored once: its K most likely tokens at each place that counts.

A store is a folder of shards and a `manifest.json`. A shard is plain safetensors and has the places of some rows, in order:
`ids` int32 `[places, K]`, `logprobs` `[places, K]` and `rest` float32 `[places]`, as of `TopK`. The manifest has what the
numbers depend on, and each shard's digest. Shards appear whole, the manifest after them: a program that dies leaves a store
that the same program goes on with, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from dsv3.checks import check, check_choice
from dsv3.ops.divergence import TopK
from dsv3.train.checkpoint import check_settings, flat_settings
from dsv3.train.checkpoint_files import sync_file, sync_folder

MANIFEST = "manifest.json"
FORMAT = "dsv3 top-k probabilities 1"
PRECISIONS = ("float32", "float16")


class Shard(NamedTuple):
    """A file of a store.

    Attributes:
      file: its name. rows: first and last + 1 of the rows that it has. places: how many of theirs count.
      held: probability of the K tokens, summed over the places. size: bytes. sha256: of the file.
    """

    file: str
    rows: tuple[int, int]
    places: int
    held: float
    size: int
    sha256: str


def read_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the manifest of a store, `None` where there is none.

    Raises:
      ValueError: it is no manifest of a store.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        good = found["format"] == FORMAT and isinstance(found["settings"], dict) and found["shard_rows"] > 0
        shards = [Shard(**shard) for shard in found["shards"]]
        good = good and all(shard.file == os.path.basename(shard.file) for shard in shards)
    except (ValueError, TypeError, KeyError):
        good = False
    check(good, f"{str(path)!r} is no manifest of stored probabilities ({FORMAT!r})")
    return found | {"shards": [shard._replace(rows=tuple(shard.rows)) for shard in shards]}


def write_store(
    folder: str | os.PathLike,
    settings: Mapping[str, Any],
    weights: np.ndarray,
    say: Callable[[int, int], TopK],
    *,
    shard_rows: int = 256,
    precision: str = "float32",
    note: Callable[[Shard, bool], None] = lambda shard, kept: None,
) -> list[Shard]:
    """Writes a store, and keeps what a run before this one has written of it.

    Args:
      folder: where to; made if it is not there.
      settings: what the numbers depend on, JSON values; with others than these a store is not gone on with.
      weights: `[N, T]`, of the rows' targets: places above 0 are stored.
      say: from the first row and the one after the last to what the teacher says of them, `TopK` of `[rows, T, K]`.
      shard_rows: rows of a shard. precision: of the log-probabilities, "float32" or "float16"; `rest` is float32.
      note: gets each shard, and whether it was there.

    Returns:
      The shards.

    Raises:
      ValueError: a store with other settings is there. OSError: it cannot be written.
    """
    check_choice("write_store", "precision", precision, PRECISIONS)
    check(shard_rows > 0, f"write_store: `shard_rows` is {shard_rows}, want > 0")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "rows": len(weights), "shard_rows": shard_rows, "precision": precision, "settings": settings}
    old = read_manifest(folder)
    known = {} if old is None else {shard.file: shard for shard in old.pop("shards")}
    if old is not None:
        check_settings(old, head, where=f"the store in {str(folder)!r}")
    counts = (np.asarray(weights) > 0).sum(1)
    for number, first in enumerate(range(0, len(weights), shard_rows)):
        rows = first, min(first + shard_rows, len(weights))
        name = f"shard-{number:05}.safetensors"
        kept = name in known and known[name].places == counts[slice(*rows)].sum() and _problem(folder, known[name]) is None
        if not kept:
            known[name] = _write_shard(folder / name, rows, say(*rows), weights[slice(*rows)], precision)
            shards = [known[file]._asdict() for file in sorted(known)]
            _write(folder / MANIFEST, (json.dumps(head | {"shards": shards}, indent=1) + "\n").encode())
        note(known[name], kept)
    return [known[name] for name in sorted(known)]


def _write_shard(path: Path, rows: tuple[int, int], said: TopK, weights: np.ndarray, precision: str) -> Shard:
    counts = np.asarray(weights) > 0
    ids, logprobs, rest = (np.asarray(part)[counts] for part in said)
    tensors = {"ids": ids.astype(np.int32), "logprobs": logprobs.astype(precision), "rest": rest.astype(np.float32)}
    data = safetensors.numpy.save(tensors)
    _write(path, data)
    held = float(np.exp(logprobs.astype(np.float64)).sum())
    return Shard(path.name, rows, int(counts.sum()), held, len(data), hashlib.sha256(data).hexdigest())


def _write(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(data)
        sync_file(file)
    os.replace(part, path)
    sync_folder(path.parent)


def _problem(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file."""
    path = folder / shard.file
    if not path.is_file():
        return "is not there"
    if path.stat().st_size != shard.size:
        return f"has {path.stat().st_size:,} bytes, want {shard.size:,}"
    with open(path, "rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    return None if same else "has another SHA-256 than its manifest says: it has been changed"


class TeacherStore:
    """What a store says of rows.

    Args:
      folder: of a store that is complete; all of it is read once, to compare the digests.
      weights: `[N, T]`, of the rows that it was made of.

    Attributes:
      k: tokens of a place. size: bytes. held: the share of probability that the K tokens have, on average.

    Raises:
      ValueError: no store, not complete, or changed since; another number of rows or of places.
    """

    def __init__(self, folder: str | os.PathLike, weights: np.ndarray):
        self._folder, self._counts = Path(folder), np.asarray(weights) > 0
        found = read_manifest(folder)
        check(found is not None, f"{str(folder)!r} holds no {MANIFEST}, want a folder of stored probabilities")
        shards, of_rows = found["shards"], -(-found["rows"] // found["shard_rows"])
        missing = f"{len(shards)} of {of_rows} shards are there: the program that stores them goes on with the rest"
        check(len(shards) == of_rows, f"the store in {str(folder)!r} is not complete, {missing}")
        rows, want = found["rows"], len(self._counts)
        check(rows == want, f"the store in {str(folder)!r} is of {rows} rows, want the {want} of these conversations")
        for shard in shards:
            wrong = _problem(self._folder, shard)
            check(wrong is None, f"the store in {str(folder)!r}: {shard.file} {wrong}")
            places = int(self._counts[slice(*shard.rows)].sum())
            check(places == shard.places, f"{shard.file} has {shard.places} places, want the {places} of its rows")
        self._shards, self._shard_rows = shards, found["shard_rows"]
        self._files = [safe_open(self._folder / shard.file, framework="numpy") for shard in shards]
        self._begins = np.concatenate([[0], np.cumsum(self._counts.sum(1))])
        self.k = self._files[0].get_slice("ids").get_shape()[1]
        self.size = sum(shard.size for shard in shards)
        self.held = sum(shard.held for shard in shards) / max(1, self._begins[-1])

    def take(self, rows: np.ndarray) -> TopK:
        """Returns what is stored of rows, `TopK` of `[B, T, K]` in float32; zeros at places that do not count."""
        lead = (len(rows), self._counts.shape[1])
        said = TopK(np.zeros([*lead, self.k], np.int32), np.zeros([*lead, self.k], np.float32), np.zeros(lead, np.float32))
        for place, row in enumerate(np.asarray(rows).tolist()):
            number = row // self._shard_rows
            first = self._begins[self._shards[number].rows[0]]
            here = slice(int(self._begins[row] - first), int(self._begins[row + 1] - first))
            if here.start == here.stop:  # which safetensors does not cut out
                continue
            for name, array in said._asdict().items():
                array[place, self._counts[row]] = self._files[number].get_slice(name)[here]
        return said


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` that names each wanted setting which a store was not made with."""
    old, new = (flat_settings(json.loads(json.dumps(settings))) for settings in (stored, wanted))
    names = [name for name in new if new[name] != old.get(name)]
    other = "; ".join(f"`{name}` is {new[name]!r} here, {old.get(name, 'not set')!r} there" for name in names[:3])
    check(not names, f"{where} does not fit: {other}")
