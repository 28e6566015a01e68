"""Writing shards: documents' tokens in files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.checks import check
from dsv3.data.manifest import FILES, write_files
from dsv3.data.shards import DTYPES, HEADER, WINDOW_TOKENS, Shard, token_dtype, window_digest, window_ends


def write_shard(
    folder: str | os.PathLike,
    number: int,
    documents: Iterable[tuple[np.ndarray, int, int]],
    *,
    vocab_size: int,
    window_tokens: int = WINDOW_TOKENS,
) -> dict[str, Any]:
    """Writes documents as one shard, whose four files appear together when all are on the disk.

    The shard is held in memory, in the dtype of the file, while it is gathered. A shard of this number is replaced.

    Args:
      folder: of the source, as `prepared/train/code`; made if it is not there.
      number: of the shard, from 0.
      documents: (tokens [n] integers, UTF-8 bytes of the text, hash below 2**64), taken one by one.
      vocab_size: ids are below it; up to 65,536 they take two bytes.
      window_tokens: a window ends with the document that takes it to so many tokens.

    Returns:
      The shard's entry of the manifest: name, counts, windows, and size and digest of each file.

    Raises:
      ValueError: no documents; one without tokens, or with ids outside of the vocabulary; a number out of range.
      OSError: the disk is full or the folder cannot be written; nothing of the shard is left.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_shard(folder, 0, [(np.array([0, 7, 1]), 2, 99)], vocab_size=300)["tokens"]
    3
    """
    for name, value, least in (("number", number, 0), ("vocab_size", vocab_size, 1), ("window_tokens", window_tokens, 1)):
        check(value >= least, f"write_shard: `{name}` is {value}, want at least {least}")
    name = f"{number:05d}"
    shard = _gather(documents, vocab_size)
    windows = _cut_windows(shard, window_tokens)
    contents = {f"{name}.{kind}": [npy_header(array), array] for kind, array in zip(FILES, shard)}
    files = {kind: _describe(contents[f"{name}.{kind}"]) for kind in FILES}
    write_files("write_shard", Path(folder), contents)
    counts = {"tokens": len(shard.tokens), "documents": len(shard.hashes), "bytes": int(shard.text_bytes.sum())}
    return {"name": name, **counts, "windows": windows, "files": files}


def _gather(documents: Iterable[tuple[np.ndarray, int, int]], vocab_size: int) -> Shard:
    """Collects documents as the arrays of a shard, and checks them."""
    dtype, pieces, sizes, hashes = token_dtype(vocab_size), [], [], []
    for tokens, size, digest in documents:
        tokens, where = np.asarray(tokens), f"write_shard: document {len(pieces)}"
        whole = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer) and len(tokens) > 0
        check(whole, f"{where} has tokens of shape {tokens.shape}, dtype {tokens.dtype}, want integers [n], n at least 1")
        low, high = int(tokens.min()), int(tokens.max())
        check(low >= 0 and high < vocab_size, f"{where} has ids from {low} to {high}, want 0 to {vocab_size - 1}")
        fits = 0 <= size < 2**63 and 0 <= digest < 2**64
        check(fits, f"{where} has {size} bytes and hash {digest}, want 0 or more, and a hash below 2**64")
        pieces.append(tokens.astype(dtype))
        sizes.append(size)
        hashes.append(digest)
    check(bool(pieces), "write_shard: `documents` is empty, want at least one document")
    starts = np.cumsum([0, *map(len, pieces)], dtype=DTYPES["starts.npy"])
    return Shard(
        np.concatenate(pieces), starts, np.array(sizes, DTYPES["bytes.npy"]), np.array(hashes, DTYPES["hashes.npy"])
    )


def _cut_windows(shard: Shard, window_tokens: int) -> list[dict[str, Any]]:
    """The windows of a shard, as the manifest has them."""
    windows = []
    for first, stop in itertools.pairwise(window_ends(shard.starts, window_tokens).tolist()):
        begin, end = shard.starts[[first, stop]]
        digest = window_digest(shard.tokens[begin:end], np.diff(shard.starts[first : stop + 1]))
        windows.append({"documents": stop - first, "tokens": int(end - begin), "digest": digest})
    return windows


def _describe(pieces: list[Any]) -> dict[str, Any]:
    """Size and digest of a file of these pieces."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return {"bytes": sum(memoryview(piece).nbytes for piece in pieces), "digest": digest.hexdigest()}


def npy_header(array: np.ndarray) -> bytes:
    """Returns the 128 bytes before the numbers of a vector's `.npy` file, format 1.0."""
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': ({len(array)},), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"
