"""Tokenised documents on disk: shards, read window by window (`shard_writer.py` writes them).

A shard is four `.npy` files, tokens, starts, bytes and hashes. A *window* is a run of its documents with about
`window_tokens` tokens, the unit in which the input stream reads and shuffles. The manifest has a digest of every
file, and one of every window, so that a reader checks exactly what it reads, however large a shard is.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.checks import check, check_choice
from dsv3.data.manifest import FILES, Manifest, check_sizes, read_manifest
from dsv3.data.tokenizer import TokenStream

WINDOW_TOKENS = 2**20
VERIFY = ("touched", "all", "sizes")
HEADER = 128  # bytes before the numbers of a file
_DAMAGED = "the file has changed since it was written"
DTYPES = {"starts.npy": "<i8", "bytes.npy": "<i8", "hashes.npy": "<u8"}


class Shard(NamedTuple):
    """The documents of a shard; arrays are mapped from the disk.

    Args:
      tokens: [N] uint16, or uint32 for a vocabulary above 65,536; documents back to back.
      starts: [documents + 1] int64; document d is `tokens[starts[d]:starts[d + 1]]`.
      text_bytes: [documents] int64; UTF-8 bytes of each document.
      hashes: [documents] uint64; of each document.
    """

    tokens: np.ndarray
    starts: np.ndarray
    text_bytes: np.ndarray
    hashes: np.ndarray


class Windows(NamedTuple):
    """All windows of a source, in the order of its shards; each field is [windows] int64.

    Args:
      shard: which shard a window is in, from 0.
      document: its first document in that shard.
      documents: how many it has.
      token: where it begins in that shard.
      tokens: how many it has.
    """

    shard: np.ndarray
    document: np.ndarray
    documents: np.ndarray
    token: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardSource:
    """One source of a prepared folder.

    Attributes:
      name: of the source.
      tokens, documents: how many it has.
      windows: where its windows are.
      vocab_size: ids are below it.
      folder: of its shards. entries: of its shards, from the manifest. Both `None`: the tokens are in `memory`.
      digests: of the windows.
      checked: by window, whether its digest need not be looked at any more; changes as windows are read.
      memory: the documents of a source that has no files.
      recent: what `stream.py` keeps of the windows that it read last; changes as rows are read.
    """

    name: str
    tokens: int
    documents: int
    windows: Windows
    vocab_size: int
    folder: Path | None = None
    entries: tuple[Mapping[str, Any], ...] | None = None
    digests: tuple[str, ...] = field(default=(), repr=False)
    checked: np.ndarray | None = field(default=None, repr=False)
    memory: TokenStream | None = field(default=None, repr=False)
    recent: dict[str, OrderedDict] = field(default_factory=dict, repr=False)


def open_shards(
    folder: str | os.PathLike, split: str = "train", *, verify: str = "touched", tokenizer: str | None = None
) -> dict[str, ShardSource]:
    """Opens the shards of a prepared folder; reads no token, unless it is to verify all.

    Args:
      folder: the prepared folder.
      split: "train" or "heldout".
      verify: "touched": a window's digest is checked when it is first read; "all": those of all files, now; "sizes": no
        digests. Sizes are checked now in any case.
      tokenizer: fingerprint of the tokenizer that the shards must have been made with; `None`: any.

    Returns:
      source → `ShardSource`, in the manifest's order.

    Raises:
      FileNotFoundError: no manifest, or a file is missing.
      ValueError: another tokenizer, a file with another size or digest, an empty source, an unknown split or `verify`.
    """
    check_choice("open_shards", "verify", verify, VERIFY)
    root, manifest = Path(folder), read_manifest(folder)
    check_choice("open_shards", "split", split, tuple(manifest.splits))
    other = f"open_shards: {str(root)!r} was made with tokenizer {manifest.tokenizer}, want {tokenizer}"
    check(tokenizer in (None, manifest.tokenizer), other)
    check_sizes("open_shards", root, manifest, (split,))
    sources = {name: _open_source(root / split / name, name, manifest, split) for name in manifest.splits[split]}
    check(bool(sources), f"open_shards: {str(root)!r} has no source in split {split!r}, want at least one")
    for source in sources.values():
        if verify == "all":
            verify_source(source)
        source.checked[:] = verify != "touched"
    return sources


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype of a shard's tokens: uint16 for up to 65,536 ids (`vocab_size`), else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def window_ends(starts: np.ndarray, window_tokens: int) -> np.ndarray:
    """[windows + 1] documents, at which windows begin and the last one ends: each closes when it has enough tokens."""
    ends, last = [0], len(starts) - 1
    while ends[-1] < last:
        full = int(np.searchsorted(starts, starts[ends[-1]] + window_tokens))  # the first start at or after that
        ends.append(min(full, last))
    return np.array(ends, np.int64)


def window_digest(tokens: np.ndarray, sizes: np.ndarray) -> str:
    """BLAKE2b of the documents' numbers of tokens (`sizes`, as 64-bit integers) and their `tokens`."""
    digest = hashlib.blake2b(np.ascontiguousarray(sizes, "<i8"), digest_size=16)
    digest.update(np.ascontiguousarray(tokens))
    return digest.hexdigest()


def memory_source(name: str, stream: TokenStream, *, vocab_size: int, window_tokens: int = WINDOW_TOKENS) -> ShardSource:
    """Makes a source of documents in memory, cut into windows as a shard is.

    Args:
      name: of the source.
      stream: the documents' tokens; a document has at least one.
      vocab_size: ids are below it.
      window_tokens: as for `write_shard`.

    Returns:
      The source.

    Raises:
      ValueError: no documents, or one without tokens.
    """
    sizes = np.diff(stream.starts)
    check(len(sizes) > 0 and sizes.min() > 0, f"memory_source: source {name!r} has an empty document, or none at all")
    ends = window_ends(np.asarray(stream.starts), window_tokens)
    windows = _place_windows([(np.diff(ends), np.diff(np.asarray(stream.starts)[ends]))])
    return ShardSource(name, int(sizes.sum()), len(sizes), windows, vocab_size, memory=stream)


def read_shard(source: ShardSource, index: int) -> Shard:
    """Maps a shard's arrays from the disk, after a look at the digests of its files.

    Args:
      source: the source.
      index: which of its shards, from 0.

    Returns:
      The shard.

    Raises:
      ValueError: a file has another digest than the manifest says.
    """
    check(source.entries is not None, f"read_shard: source {source.name!r} is in memory, want one with files")
    _verify_shard(source, index)
    paths = [_path(source, index, kind) for kind in FILES]
    return Shard(*(np.load(path, mmap_mode="r") for path in paths))


def verify_source(source: ShardSource) -> None:
    """Reads all files of a source and compares their digests with the manifest.

    Args:
      source: the source.

    Raises:
      ValueError: a file has another digest; it and the source are named.
    """
    for index in range(len(source.entries or ())):
        _verify_shard(source, index)


def read_window(source: ShardSource, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the documents of one window, and nothing else.

    Args:
      source: the source.
      window: which of its windows, from 0.

    Returns:
      (tokens [N] of the shard's dtype, starts [documents + 1] int64, which begin with 0).

    Raises:
      ValueError: the window has another digest than the manifest says.
      OSError: a file cannot be read.
    """
    shard, document, documents, token, tokens = (int(field[window]) for field in source.windows)
    if source.memory is not None:
        starts = source.memory.starts[document : document + documents + 1]
        return source.memory.tokens[token : token + tokens], starts - starts[0]
    starts = _read_part(source, shard, "starts.npy", document, documents + 1)
    ids = _read_part(source, shard, "tokens.npy", token, tokens)
    sizes, path = np.diff(starts), str(_path(source, shard, "tokens.npy"))
    where = f"read_window: documents {document} to {document + documents - 1} of {path!r} of source {source.name!r}"
    if not source.checked[window]:
        got, want = window_digest(ids, sizes), source.digests[window]
        check(got == want, f"{where} have digest {got}, want {want}: {_DAMAGED}")
        source.checked[window] = True
    check(sizes.min() > 0 and starts[-1] - starts[0] == tokens, f"{where} do not begin where they should: {_DAMAGED}")
    return ids, starts - starts[0]


def _open_source(folder: Path, name: str, manifest: Manifest, split: str) -> ShardSource:
    entries = tuple(manifest.splits[split][name])
    tokens, documents = (sum(entry[kind] for entry in entries) for kind in ("tokens", "documents"))
    check(tokens > 0, f"open_shards: source {name!r} is empty: it has no token in split {split!r}")
    for index, entry in enumerate(entries):
        item = token_dtype(manifest.vocab_size).itemsize
        lengths = (item * entry["tokens"], *(8 * (entry["documents"] + more) for more in (1, 0, 0)))
        for kind, length in zip(FILES, lengths):
            got = entry["files"][kind]["bytes"]
            text = f"open_shards: shard {index} of source {name!r}: {kind} has {got} bytes, want {HEADER + length}"
            check(got == HEADER + length, f"{text} for its counts")
    windows = _place_windows([
        tuple(np.array([window[kind] for window in entry["windows"]], np.int64) for kind in ("documents", "tokens"))
        for entry in entries
    ])  # fmt: skip
    digests = tuple(window["digest"] for entry in entries for window in entry["windows"])
    checked = np.zeros(len(digests), bool)
    return ShardSource(name, tokens, documents, windows, manifest.vocab_size, folder, entries, digests, checked)


def _place_windows(shards: list[tuple[np.ndarray, np.ndarray]]) -> Windows:
    """Where windows are, from the numbers of documents and tokens of each, by shard."""
    counts = [len(documents) for documents, _ in shards]
    begins = [[np.cumsum(part) - part for part in shard] for shard in shards]
    fields = np.repeat(np.arange(len(shards)), counts), *(
        np.concatenate(parts) for k in (0, 1) for parts in ([b[k] for b in begins], [shard[k] for shard in shards])
    )
    return Windows(*fields)


def _path(source: ShardSource, index: int, kind: str) -> Path:
    return source.folder / f"{source.entries[index]['name']}.{kind}"


def _read_part(source: ShardSource, index: int, kind: str, first: int, count: int) -> np.ndarray:
    """`count` numbers of a file from `first`: read, not mapped, since a mapped file that is cut off kills the process."""
    dtype = np.dtype(DTYPES.get(kind) or token_dtype(source.vocab_size))
    path = _path(source, index, kind)
    try:
        part = np.fromfile(path, dtype, count, offset=HEADER + first * dtype.itemsize)
    except OSError as error:
        raise OSError(error.errno, f"read_window: cannot read {str(path)!r} ({error.strerror})") from None
    check(len(part) == count, f"read_window: {str(path)!r} of source {source.name!r} is cut off: {_DAMAGED}")
    return part


def _verify_shard(source: ShardSource, index: int) -> None:
    for kind in FILES:
        path, want = _path(source, index, kind), source.entries[index]["files"][kind]["digest"]
        with path.open("rb") as file:
            got = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        check(got == want, f"open_shards: {str(path)!r} of source {source.name!r} has digest {got}, want {want}: {_DAMAGED}")
