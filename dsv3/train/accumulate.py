"""Adding up what micro-batches give, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dsv3 import tree
from dsv3.graph import plain
from dsv3.typing import Tree


@plain
def accumulate_parts(
    part: Callable[[Any], Tree], count: int | tf.Tensor, *, largest: Callable[[str], bool] = lambda path: False
) -> Tree:
    """Returns `part(0) + part(1) + … + part(count − 1)`, leaf by leaf, in float32; a single part comes as it is.

    Args:
      part: from a micro-batch's number to a tree of tensors, such as loss and gradients. It is traced twice, however many
        micro-batches there are.
      count: how many, at least 1: a number, or an int32 scalar where that is not known yet.
      largest: which leaves, by their path, are not added up: of them the largest value counts.
    """
    first = part(0)
    if isinstance(count, int) and count == 1:
        return first

    def joined(path: str, total: tf.Tensor, more: tf.Tensor) -> tf.Tensor:
        return (tf.maximum if largest(path) else tf.add)(total, more)

    _, total = tf.while_loop(
        lambda i, _: i < count,
        lambda i, total: (i + 1, tree.map_with_path(joined, total, _float32(part(i)))),
        (tf.constant(1), _float32(first)),
        parallel_iterations=1,
    )
    return total


def _float32(values: Tree) -> Tree:
    return tree.map_leaves(lambda t: tf.cast(t, tf.float32), values)
