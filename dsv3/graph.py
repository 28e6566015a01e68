"""Marks library functions as plain graph builders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tensorflow as tf

F = TypeVar("F", bound=Callable)


def plain(fn: F) -> F:
    """Decorates a function that AutoGraph must leave alone when a caller's `tf.function` traces it.

    dsv3 builds its graphs with explicit `tf.cond` and `tf.while_loop`; converting it would only slow tracing down and turn
    a one-line error into twenty.
    """
    return tf.autograph.experimental.do_not_convert(fn)
