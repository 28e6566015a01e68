"""Batches between the steps, and ahead of them: a `tf.data` pipeline reads the next ones while a step computes."""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from dsv3.checks import check
from dsv3.data.mixture import InputState, Mixture, Shape, input_state, next_rows
from dsv3.data.packing import Batch
from dsv3.data.shards import ShardSource
from dsv3.data.stream import host_rows, read_rows

_SIGNATURE = (
    Batch(tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.float32)),
    tf.TensorSpec([], tf.string),
    tf.TensorSpec([], tf.int64),
)


class InputBatch(NamedTuple):
    """What a step gets.

    Attributes:
      batch: tokens [B, T + 1] int32 and weights [B, T] float32, of this host's rows.
      state: of the input after these rows; a checkpoint after the step stores it.
      tokens: of all hosts' rows so far, these included.
    """

    batch: Batch
    state: InputState
    tokens: int


def read_batches(
    sources: Mapping[str, ShardSource],
    mixture: Mixture,
    state: InputState,
    shape: Shape,
    *,
    tokens: int = 0,
    total_tokens: int | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Generator[InputBatch, None, None]:
    """Yields the batches of a run from a state on, in the process and thread of the caller.

    Args:
      sources: those that the mixture was made of.
      mixture: the mixture.
      state: where the input stands.
      shape: tokens so far → (batch_size, seq_len) of the next step, of all hosts.
      tokens: so far.
      total_tokens: ends with the step that takes the run to so many; `None`: never.
      host: whose rows are read, from 0.
      hosts: how many there are.

    Returns:
      An iterator of batches.

    Raises:
      ValueError, OSError: while it is consumed, as `next_rows`, `read_rows` and `host_rows`.
    """
    while total_tokens is None or tokens < total_tokens:
        batch_size, seq_len = shape(tokens)
        mine = host_rows(batch_size, host, hosts)
        plan, state = next_rows(mixture, state, batch_size, seq_len)
        tokens += batch_size * seq_len
        yield InputBatch(read_rows(sources, mixture, plan, mine), state, tokens)


def prefetch_batches(batches: Generator[InputBatch, None, None], depth: int = 2) -> Generator[InputBatch, None, None]:
    """Reads batches ahead in a `tf.data` pipeline, from now on, so that a step finds its batch ready.

    Args:
      batches: from `read_batches`; nobody else may use it or its sources from now on.
      depth: how many are held ready.

    Returns:
      The same batches, as tensors. `close()` it (`contextlib.closing`): when that returns nothing is read any more.

    Raises:
      ValueError: `depth` below 1; and, in place of the batch that could not be made, whatever `batches` raises.
    """
    check(depth >= 1, f"prefetch_batches: `depth` is {depth}, want at least 1")
    reading, problems = threading.Lock(), []

    def elements():
        while True:
            with reading:
                item = _next_or_none(batches, problems)
            if item is None:
                return
            yield item.batch, json.dumps(item.state._asdict()), item.tokens

    options = tf.data.Options()
    options.experimental_warm_start = True  # begin with the iterator, not with its first element
    dataset = tf.data.Dataset.from_generator(elements, output_signature=_SIGNATURE).prefetch(depth)
    found = iter(dataset.with_options(options))
    end = _make_end(batches, reading, found)
    consumer = _consume(found, problems, end)
    weakref.finalize(consumer, end)  # also when the process ends, while there is still a TensorFlow to end it with
    next(consumer)
    return consumer


def _next_or_none(batches: Iterator[InputBatch], problems: list[Exception]) -> InputBatch | None:
    """The next batch; none at the end, when it was stopped, and after a problem, which is for the consumer to raise."""
    try:
        return next(batches, None)
    except Exception as error:
        problems.append(error)
        return None


def _make_end(batches: Generator[InputBatch, None, None], reading: threading.Lock, elements: Iterator[Any]):
    """Returns what ends the producer, after the batch that it is at, and the pipeline; a second call does nothing."""
    ended = []

    def end() -> None:
        if ended:
            return
        ended.append(True)
        with reading:
            batches.close()
        with contextlib.suppress(tf.errors.OpError):
            for _ in elements:  # what is ready; then the pipeline has come to its end, and none of its threads is in Python
                pass

    return end


def _consume(
    elements: Iterator[Any], problems: list[Exception], end: Callable[[], None]
) -> Generator[InputBatch, None, None]:
    try:
        yield  # so that closing it before the first batch ends the reading, too
        for batch, state, tokens in elements:
            yield InputBatch(batch, input_state(json.loads(state.numpy())), int(tokens))
        if problems:
            raise problems[0]
    finally:
        end()
        del elements, end
