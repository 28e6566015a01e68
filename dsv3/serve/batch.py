"""The shape of a running batch: buckets of rows and cache slots, and the one operation that changes either."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from dsv3 import tree
from dsv3.serve.steps import Caches, Rows


def row_bucket(rows: int, limit: int) -> int:
    """Returns the batch size for so many rows: a power of two, or `limit`.

    >>> [row_bucket(n, 12) for n in (1, 3, 8, 9)]
    [1, 4, 8, 12]
    """
    return min(1 << (rows - 1).bit_length(), limit)


def slot_bucket(tokens: int, smallest: int, limit: int) -> int:
    """Returns the cache size for so many tokens: `smallest` times a power of two, or `limit`.

    >>> [slot_bucket(n, 256, 1000) for n in (3, 256, 257, 700)]
    [256, 256, 512, 1000]
    """
    size = smallest
    while size < tokens:
        size *= 2
    return max(min(size, limit), tokens)


def chunk_plan(tokens: int, sizes: Sequence[int]) -> list[int]:
    """Returns chunk sizes that cover so many tokens: the largest, and at the end the smallest that is enough.

    >>> chunk_plan(1100, (32, 128, 512))
    [512, 512, 128]
    """
    sizes = sorted(sizes)
    plan = []
    while tokens > 0:
        plan.append(next((size for size in sizes if size >= tokens), sizes[-1]))
        tokens -= plan[-1]
    return plan


def rows_take(parts: Sequence[tuple[Caches, Rows]], index: Sequence[int], size: int) -> tuple[Caches, Rows]:
    """Builds a batch from rows of others: it grows or shrinks a cache, leaves rows out, repeats and joins them.

    Args:
      parts: batches; their rows are numbered through.
      index: for each row of the new batch, the row that it is a copy of.
      size: slots of the new cache; no taken row may hold more tokens.

    Returns:
      Caches and rows, apart from the parts'.
    """

    def take(*kv: tf.Tensor) -> tf.Tensor:
        slots = kv[0].shape[2]
        if len(kv) == 1 and list(index) == list(range(kv[0].shape[1])) and size > slots:  # just grown: one copy, not three
            return tf.pad(kv[0], [[0, 0], [0, 0], [0, size - slots], [0, 0]])
        kv = [tf.pad(part[:, :, :size], [[0, 0], [0, 0], [0, max(size - part.shape[2], 0)], [0, 0]]) for part in kv]
        return tf.gather(tf.concat(kv, 1), index, axis=1)

    caches = tree.map_leaves(lambda *kv: take(*map(tf.convert_to_tensor, kv)), *(part[0] for part in parts))
    rows = tree.map_leaves(lambda *x: tf.gather(tf.concat(x, 0), index), *(part[1] for part in parts))
    return caches, rows
