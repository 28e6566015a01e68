"""The last step of preparing a corpus, shard by shard and in any number of processes: stored documents become tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.data.clock import Clock
from dsv3.data.fim import encode_fim
from dsv3.data.shard_writer import write_shard
from dsv3.data.tokenizer import load_tokenizer
from dsv3.data.work import read_index, read_keep, read_texts, shard_file, write_json

BINS = 24  # of documents' lengths: bin k has those of 2^k to 2^(k+1) - 1 tokens, the last one longer ones, too
_SAMPLED = 64  # parts that a sample is taken of
_BATCH = 1 << 20  # characters that are encoded at a time


class EncodeTask(NamedTuple):
    """A shard to make.

    Args:
      split: "train" or "heldout".
      source: name.
      number: of the shard, from 0.
      parts: numbers of the scanned parts whose documents it has.
      bytes: of those documents that stay.
      work: the work folder.
      out: the prepared folder, which has the tokenizer.
      vocab_size: see `write_shard`.
      window_tokens: see `write_shard`.
      fim: share of the documents for filling in the middle, of the training split only.
      seed: of that.
    """

    split: str
    source: str
    number: int
    parts: tuple[int, ...]
    bytes: int
    work: str
    out: str
    vocab_size: int
    window_tokens: int
    fim: float
    seed: int


def plan_shards(
    work: str | os.PathLike, split: str, source: str, parts: int, shard_bytes: int
) -> list[tuple[tuple[int, ...], int]]:
    """Decides which parts make up which shard: parts in order, until their documents that stay have so many bytes.

    Args:
      work: the work folder, with all parts scanned and duplicates found.
      split: "train" or "heldout".
      source: name.
      parts: how many the source has.
      shard_bytes: a shard ends with the part that takes it to so many bytes.

    Returns:
      (numbers of the parts, bytes) of each shard; none where no document stays.
    """
    shards, group, size = [], [], 0
    for number in range(parts):
        index = read_index(work, source, number)
        chosen = read_keep(work, source, number) & (index.heldout == (split == "heldout"))
        if not chosen.any():
            continue
        group.append(number)
        size += int(index.sizes[chosen].sum())
        if size >= shard_bytes:
            shards.append((tuple(group), size))
            group, size = [], 0
    return shards + ([(tuple(group), size)] if group else [])


def encode_shard(task: EncodeTask) -> dict[str, Any]:
    """Encodes the documents of some scanned parts that stay, and writes them as a shard.

    Args:
      task: what to do.

    Returns:
      "entry": the shard's entry of the manifest; "lengths": [BINS] documents by length in tokens; "clock": CPU seconds and
      bytes of tokenising, and of "shard", which is all: reading stored texts, tokenising, digests, writing.

    Raises:
      ValueError: a tokenizer without the tokens that are needed.
      OSError: the disk is full or cannot be written; nothing of the shard is left.
    """
    clock, lengths = Clock(), np.zeros(BINS, np.int64)
    tokenizer = load_tokenizer(Path(task.out) / "tokenizer")
    rate = task.fim if task.split == "train" else 0.0

    def documents() -> Iterator[tuple[np.ndarray, int, int]]:
        for batch in _batches(kept_documents(task.work, task.source, task.parts, task.split)):
            texts, size = [text for text, _, _ in batch], sum(size for _, size, _ in batch)
            encoded = clock.run("tokenise", size, encode_fim, tokenizer, texts, seed=task.seed, rate=rate)
            for tokens, (_, size, digest) in zip(encoded, batch):
                lengths[min(BINS, len(tokens).bit_length()) - 1] += 1
                yield tokens, size, digest

    folder, start = Path(task.out) / task.split / task.source, time.process_time()
    options = {"vocab_size": task.vocab_size, "window_tokens": task.window_tokens}
    entry = write_shard(folder, task.number, documents(), **options)
    clock.add("shard", time.process_time() - start, entry["bytes"])
    result = {"entry": entry, "lengths": lengths.tolist(), "clock": clock.totals()}
    write_json(shard_file(task.work, task.split, task.source, task.number), result)
    return result


def kept_documents(
    work: str | os.PathLike, source: str, parts: tuple[int, ...], split: str
) -> Iterator[tuple[str, int, int]]:
    """Yields (text, bytes, hash) of the stored documents of some parts that are in a split and stay.

    Args:
      work: the work folder.
      source: name.
      parts: numbers of the parts.
      split: "train" or "heldout".

    Returns:
      An iterator in the order of the parts.
    """
    for number in parts:
        index = read_index(work, source, number)
        here = index.heldout == (split == "heldout")
        columns = (read_keep(work, source, number)[here], index.sizes[here], index.hashes[here])
        for text, keep, size, digest in zip(read_texts(work, source, number, split), *(c.tolist() for c in columns)):
            if keep:
                yield text, size, digest


def sample_texts(
    work: str | os.PathLike, parts: Mapping[str, int], sizes: Mapping[str, int], max_bytes: int
) -> Iterator[str]:
    """Yields training texts that a tokenizer can be trained on: of each source as much as its share of the bytes.

    Args:
      work: the work folder.
      parts: source → how many it has.
      sizes: source → bytes of its training documents that stay.
      max_bytes: about so many bytes are taken, evenly from up to 64 parts of a source; everything, where that is less.

    Returns:
      An iterator of texts, in the order of sources, parts and documents.
    """
    scale = max_bytes / max(1, sum(sizes.values()))
    for source, count in parts.items():
        if scale >= 1:
            yield from (text for text, _, _ in kept_documents(work, source, tuple(range(count)), "train"))
            continue
        numbers = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED)).round().astype(int)).tolist()
        taken = 0
        for i, number in enumerate(numbers, 1):
            goal = scale * sizes[source] * i / len(numbers)  # what one part has too little of, the next ones give
            for text, size, _ in kept_documents(work, source, (number,), "train"):
                if taken >= goal:
                    break
                yield text
                taken += size


def _batches(documents: Iterator[tuple[str, int, int]]) -> Iterator[list[tuple[str, int, int]]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[0])
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
