"""Schedules: scalars as pure functions of the tokens seen."""

from __future__ import annotations

import math

import tensorflow as tf

from dsv3.checks import check
from dsv3.train.optim import Schedule


def warmup_cosine(
    peak: float, *, warmup_tokens: float, total_tokens: float, final: float = 0.0, constant_tokens: float = 0.0
) -> Schedule:
    """Linear warm-up from 0, a constant phase, then a cosine to `final`, which is kept.

    Args:
      peak: the highest value.
      warmup_tokens: length of the warm-up. constant_tokens: length of the constant phase after it.
      total_tokens: where the cosine ends.
      final: the value from there on.

    Returns:
      A function from tokens seen (a scalar tensor) to a float32 scalar.

    References: DeepSeek-V3 section 4.2 has these phases.

    >>> s = warmup_cosine(1.0, warmup_tokens=10, total_tokens=110)
    >>> [round(float(s(tf.constant(t))), 3) for t in (0, 5, 10, 60, 110, 500)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    start = warmup_tokens + constant_tokens
    check(
        0 <= warmup_tokens and 0 <= constant_tokens and start <= total_tokens,
        f"warmup_cosine: warm-up and constant phase end at {start} tokens, want at most total_tokens={total_tokens}",
    )

    def schedule(tokens: tf.Tensor) -> tf.Tensor:
        t = tf.cast(tokens, tf.float32)
        warm = tf.minimum(1.0, t / max(warmup_tokens, 1.0)) if warmup_tokens else tf.constant(1.0)
        progress = tf.clip_by_value((t - start) / max(total_tokens - start, 1.0), 0.0, 1.0)
        return warm * (final + (peak - final) * 0.5 * (1.0 + tf.cos(math.pi * progress)))

    return schedule
