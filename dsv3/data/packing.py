"""Rows of one length from a token stream, and which rows make up the batch of a step.

Pretraining packs documents back to back and lets attention cross their borders (`pack_sequences`);
fine-tuning keeps them apart by segment ids (`pack_documents`). Batches are a pure function of
seed and step, so a run that goes on from a step number sees exactly what it would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dsv3.data.shuffle import mix_keys, permute
from dsv3.data.tokenizer import TokenStream


class Packed(NamedTuple):
    """A stream in rows of `length` + 1 tokens that overlap by one: every token but the first is a target.

    Args:
      tokens: [N] int32, the stream.
      starts: [rows] int64, where each row begins. The last row is moved back to end with the stream.
      length: T, inputs (and targets) of a row.
    """

    tokens: np.ndarray
    starts: np.ndarray
    length: int


class Batch(NamedTuple):
    """Rows for one step: inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`.

    Args:
      tokens: [B, T + 1] int32.
      weights: [B, T] float32; 1 for a target that counts, 0 for one that another row counts. Only the last row of
        a `Packed` has zeros, and a row that fills up an evaluation batch; `passkey_rows` has other numbers.
    """

    tokens: np.ndarray
    weights: np.ndarray


class PackedDocuments(NamedTuple):
    """Rows in which documents do not see each other: a `Batch`, and whose token each is.

    Args:
      tokens: [N, T + 1] int32, documents one after the other from the left.
      weights: [N, T] float32; 1 for a target that counts, 0 for others, borders between documents, and padding.
      segments: [N, T + 1] int32; 1, 2, ... by document within the row, 0 where there is nothing.
    """

    tokens: np.ndarray
    weights: np.ndarray
    segments: np.ndarray


class BatchPlan(NamedTuple):
    """Shuffled epochs over `rows` rows, `batch_size` a step; the order follows from `seed` alone."""

    rows: int
    batch_size: int
    seed: int = 0


def pack_sequences(tokens: np.ndarray | TokenStream, length: int) -> Packed:
    """Cuts a stream into rows of `length` + 1 tokens for pretraining, across the borders of documents.

    Row r is tokens[r * length : r * length + length + 1]; the last row ends with the stream.

    Args:
      tokens: [N] integers, or a `TokenStream`.
      length: T, at least 1.

    Returns:
      `Packed` with ceil((N - 1) / T) rows.

    Raises:
      ValueError: the corpus is shorter than one row; `length` below 1; `tokens` not a vector of integers.

    References:
      DeepSeek-V3 (arXiv:2412.19437), section 4.1: packing without a cross-document mask.

    >>> packed = pack_sequences(np.arange(8), 3)
    >>> take_rows(packed, [0, 2]).tokens.tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    tokens = _as_tokens("pack_sequences", tokens)
    _check_length("pack_sequences", length)
    if len(tokens) < length + 1:
        want = f"want at least {length + 1} for one sequence of length {length}"
        raise ValueError(f"pack_sequences: the corpus has {len(tokens)} tokens, {want}")
    starts = np.minimum(np.arange(0, len(tokens) - 1, length, dtype=np.int64), len(tokens) - 1 - length)
    return Packed(tokens, starts, length)


def pack_documents(stream: TokenStream, length: int, *, learned: np.ndarray | None = None) -> PackedDocuments:
    """Packs whole documents into rows, each seen only by itself; for fine-tuning.

    Greedy first fit: a document goes to the first row that has room for its tokens. One that is longer than a row is cut
    into pieces that overlap by one token; each piece is a segment of its own, and no target is lost.

    Args:
      stream: the documents' tokens.
      length: T, at least 1; a row holds T + 1 tokens.
      learned: [N] bool, the tokens of the stream that count as targets; default: all. The first of a document never does.

    Returns:
      `PackedDocuments`.

    Raises:
      ValueError: `length` below 1, no document with two tokens, or `learned` of another shape than the stream.

    References:
      DeepSeek-V3 (arXiv:2412.19437), section 5.1: packed samples are masked from each other.
    """
    _check_length("pack_documents", length)
    tokens = _as_tokens("pack_documents", stream)
    learned = np.ones(len(tokens), bool) if learned is None else np.asarray(learned)
    if learned.shape != tokens.shape:
        raise ValueError(f"pack_documents: `learned` has shape {learned.shape}, want {tokens.shape} as the stream [N]")
    pieces = [
        (start, min(start + length + 1, stop))
        for first, stop in zip(stream.starts[:-1].tolist(), stream.starts[1:].tolist(), strict=True)
        for start in range(first, stop - 1, length)
    ]
    if not pieces:
        raise ValueError("pack_documents: empty corpus: no document with at least two tokens")
    rows = _first_fit([stop - start for start, stop in pieces], length + 1)
    shape = (max(rows) + 1, length + 1)
    packed = PackedDocuments(np.zeros(shape, np.int32), np.zeros([shape[0], length], np.float32), np.zeros(shape, np.int32))
    used = [(0, 0)] * shape[0]  # by row: tokens, segments
    for row, (start, stop) in zip(rows, pieces, strict=True):
        begin, segments = used[row]
        end = begin + stop - start
        packed.tokens[row, begin:end] = tokens[start:stop]
        packed.weights[row, begin : end - 1] = learned[start + 1 : stop]
        packed.segments[row, begin:end] = segments + 1
        used[row] = (end, segments + 1)
    return packed


def batch_rows(plan: BatchPlan, step: int) -> np.ndarray:
    """Which rows make up the batch of a step.

    The rows of the whole run are epoch after epoch, each a permutation of all rows; step s takes places
    s * batch_size to (s + 1) * batch_size - 1 of them, across the border of two epochs where it falls so. A
    batch of a * b rows is a batches of b in a row: accumulate over its parts.

    Args:
      plan: rows, batch size and seed.
      step: from 0.

    Returns:
      [batch_size] int64, indices of rows.

    Raises:
      ValueError: a negative step, or no rows, or a batch size below 1.

    >>> plan = BatchPlan(rows=4, batch_size=2)
    >>> sorted([*batch_rows(plan, 0).tolist(), *batch_rows(plan, 1).tolist()])
    [0, 1, 2, 3]
    """
    for name, value, least in (("rows", plan.rows, 1), ("batch_size", plan.batch_size, 1), ("step", step, 0)):
        if value < least:
            raise ValueError(f"batch_rows: `{name}` is {value}, want at least {least}")
    places = step * plan.batch_size + np.arange(plan.batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(places, plan.rows)
    rows = np.empty(plan.batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = _epoch_order(plan.rows, epoch, plan.seed)[offsets[here]]
    return rows


def batch_at(
    packed: Packed | PackedDocuments, step: int, batch_size: int, seed: int = 0
) -> Batch | PackedDocuments:
    """The batch of a step: shuffled epochs as a pure function of seed and step.

    Args:
      packed: rows of either kind.
      step: from 0; a run that resumes goes on with its own step number.
      batch_size: rows of a step; with gradient accumulation the rows of all its parts.
      seed: of the order.

    Returns:
      `Batch` for `Packed`, `PackedDocuments` with batch_size rows for `PackedDocuments`.

    Raises:
      ValueError: as `batch_rows`.
    """
    return take_rows(packed, batch_rows(BatchPlan(_row_count(packed), batch_size, seed), step))


def heldout_batches(packed: Packed | PackedDocuments, batch_size: int) -> Iterator[Batch | PackedDocuments]:
    """Yields all rows in order, in batches of one shape, for an evaluation that counts every target once.

    Args:
      packed: rows of held-out text, of either kind.
      batch_size: rows of a batch; the last one is filled up with rows of weight 0.

    Returns:
      An iterator of ceil(rows / batch_size) batches; the weights of a `Packed` sum to N - 1 in all.

    Raises:
      ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"heldout_batches: `batch_size` is {batch_size}, want at least 1")
    return _ordered_batches(packed, batch_size)


def take_rows(packed: Packed | PackedDocuments, rows: np.ndarray) -> Batch | PackedDocuments:
    """Gathers rows by index.

    Args:
      packed: rows of either kind.
      rows: [B] integers.

    Returns:
      `Batch` for `Packed`, `PackedDocuments` with B rows for `PackedDocuments`.
    """
    rows = np.asarray(rows, np.int64)
    if isinstance(packed, PackedDocuments):
        return PackedDocuments(*(field[rows] for field in packed))
    starts = packed.starts[rows]
    counted = rows * packed.length - starts  # targets of the row before that a moved last row repeats
    weights = np.arange(packed.length) >= counted[:, None]
    return Batch(packed.tokens[starts[:, None] + np.arange(packed.length + 1)], weights.astype(np.float32))


def _ordered_batches(packed: Packed | PackedDocuments, batch_size: int) -> Iterator[Batch | PackedDocuments]:
    count = _row_count(packed)
    for first in range(0, count, batch_size):
        rows = np.arange(first, first + batch_size)
        batch = take_rows(packed, np.minimum(rows, count - 1))
        yield batch._replace(weights=batch.weights * (rows < count)[:, None].astype(np.float32))


def _row_count(packed: Packed | PackedDocuments) -> int:
    return len(packed.tokens if isinstance(packed, PackedDocuments) else packed.starts)


@functools.lru_cache(maxsize=4)
def _epoch_order(rows: int, epoch: int, seed: int) -> np.ndarray:
    return permute(rows, mix_keys(seed, epoch))


def _first_fit(sizes: list[int], length: int) -> list[int]:
    """The row of each piece: the first that has room for it."""
    free = np.full(len(sizes), length)
    rows: list[int] = []
    count = 0  # rows in use; the one after them is empty and has room
    for size in sizes:
        row = int(np.argmax(free[: count + 1] >= size))
        free[row] -= size
        count = max(count, row + 1)
        rows.append(row)
    return rows


def _as_tokens(function: str, tokens: np.ndarray | TokenStream) -> np.ndarray:
    tokens = np.asarray(tokens.tokens if isinstance(tokens, TokenStream) else tokens)
    if tokens.ndim != 1 or not (np.issubdtype(tokens.dtype, np.integer) or not len(tokens)):
        got = f"shape {tokens.shape} and dtype {tokens.dtype}"
        raise ValueError(f"{function}: `tokens` has {got}, want a vector of integers [N]")
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= 2**31):
        got = f"ids from {tokens.min()} to {tokens.max()}"
        raise ValueError(f"{function}: `tokens` has {got}, want 0 to 2**31 - 1")
    return tokens.astype(np.int32, copy=False)


def _check_length(function: str, length: int) -> None:
    if length < 1:
        raise ValueError(f"{function}: `length` is {length}, want at least 1")
