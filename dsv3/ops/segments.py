"""Documents that share a row: their borders, their positions, and which tokens have a target in their own document.

The number that each token of a row has, its segment, tells them apart; 0 is padding. A document is a run of equal numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_integer
from dsv3.graph import plain
from dsv3.typing import TensorLike


class SegmentInputs(NamedTuple):
    """What a model is told of the inputs of packed rows.

    Attributes:
      segments: `[B, T]` int32, the runs of a row as 0, 1, 2, ...: a number that comes again in a row is of another document.
      positions: `[B, T]` int32, from 0 in each document.
      inside: `[B, T]` bool, the inputs whose target is of the same document: what would be an input if each document were a
        row of its own.
    """

    segments: tf.Tensor
    positions: tf.Tensor
    inside: tf.Tensor


@plain
def segment_inputs(segments: TensorLike) -> SegmentInputs:
    """Takes packed rows apart into inputs and targets.

    Args:
      segments: `[B, T+1]` int, the document of each token, 0 for padding; inputs are the first T of a row.

    Returns:
      `SegmentInputs`.

    >>> segment_inputs([[1, 1, 1, 2, 2, 0]]).inside.numpy().tolist()
    [[True, True, False, True, False]]
    """
    check_integer("segment_inputs", "segments", segments)
    segments = tf.cast(segments, tf.int32)
    rank, width = segments.shape.rank, segments.shape[-1] if segments.shape.rank == 2 else None
    check(rank == 2, f"segment_inputs: `segments` has rank {rank}, want 2 [B, T+1]")
    check(width is None or width > 1, f"segment_inputs: `segments` has {width} columns, want at least 2 [B, T+1]")
    first, second = segments[:, :-1], segments[:, 1:]
    return SegmentInputs(segment_runs(first), segment_positions(first), tf.equal(first, second) & tf.not_equal(first, 0))


@plain
def segment_runs(segments: TensorLike) -> tf.Tensor:
    """Numbers the runs of equal values in each row: 0, 1, 2, ...

    Args:
      segments: `[B, T]` int.

    Returns:
      `[B, T]` int32.

    >>> segment_runs([[5, 5, 2, 0, 0]]).numpy().tolist()
    [[0, 0, 1, 2, 2]]
    """
    Dims("segment_runs")("segments", segments, "B T")
    segments = tf.convert_to_tensor(segments)
    changes = tf.cast(tf.not_equal(segments[:, 1:], segments[:, :-1]), tf.int32)
    return tf.cumsum(tf.pad(changes, [[0, 0], [1, 0]]), 1)[:, : tf.shape(segments)[1]]


@plain
def segment_positions(segments: TensorLike) -> tf.Tensor:
    """Counts from 0 within each run of equal values.

    Args:
      segments: `[B, T]` int.

    Returns:
      `[B, T]` int32.

    >>> segment_positions([[5, 5, 2, 0, 0]]).numpy().tolist()
    [[0, 1, 0, 0, 1]]
    """
    Dims("segment_positions")("segments", segments, "B T")
    places, count = segment_places(segments)
    index = tf.broadcast_to(tf.range(tf.shape(places)[1]), tf.shape(places))
    return index - tf.gather(tf.math.unsorted_segment_min(index, places, count), places)


@plain
def segment_places(segments: TensorLike) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `[B, T]` int32, a number for each run that no other run of any row has, and how many numbers there may be."""
    runs = segment_runs(segments)
    rows, length = tf.shape(runs)[0], tf.shape(runs)[1]
    return runs + tf.expand_dims(tf.range(rows) * length, 1), rows * length


@plain
def segment_count(inside: TensorLike) -> tf.Tensor:
    """Counts the documents of packed rows that have an input.

    Args:
      inside: `[B, T]` bool, see `SegmentInputs`.

    Returns:
      A float32 scalar.

    >>> float(segment_count([[True, True, False, True, False]]))
    2.0
    """
    Dims("segment_count")("inside", inside, "B T")
    inside = tf.convert_to_tensor(inside)
    before = tf.pad(inside[:, :-1], [[0, 0], [1, 0]])[:, : tf.shape(inside)[1]]
    return tf.reduce_sum(tf.cast(inside & ~before, tf.float32))
