"""Advantages of samples of one prompt over each other."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from dsv3.checks import Dims, check, check_choice, is_concrete
from dsv3.graph import plain
from dsv3.typing import TensorLike

STDS = ("population", "sample", "none")
"""What a group's differences are divided by: its standard deviation with ddof 0, with ddof 1, or nothing."""


@plain
def group_advantages(rewards: TensorLike, *, std: str = "population", eps: float = 1e-6) -> tf.Tensor:
    """How much better each sample is than its group: `A = (r − mean(r)) / (std(r) + eps)`.

    A group whose rewards are all the same gives zeros, exactly, whatever `std` and `eps` are: there is nothing to learn.

    Args:
      rewards: `[B, G]`, G samples of each of B prompts.
      std: `"population"` (ddof 0), `"sample"` (ddof 1), or `"none"`: `A = r − mean(r)`.
      eps: see the formula; not used with `"none"`.

    Returns:
      `[B, G]` float32, without a gradient.

    Raises:
      ValueError: groups of one, rewards that are not finite.

    References: arXiv:2402.03300 section 4.1.2; without the deviation: arXiv:2503.20783.

    >>> group_advantages([[1.0, 0.0], [0.1, 0.1]], eps=0.0).numpy().tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    check_choice("group_advantages", "std", std, STDS)
    check(eps >= 0, f"group_advantages: `eps` is {eps}, want at least 0")
    check_rewards("group_advantages", rewards)
    rewards = tf.stop_gradient(tf.cast(rewards, tf.float32))
    apart = rewards - tf.reduce_mean(rewards, -1, keepdims=True)
    spread = tf.reduce_max(rewards, -1, keepdims=True) > tf.reduce_min(rewards, -1, keepdims=True)
    if std != "none":
        freedom = tf.cast(tf.shape(rewards)[-1] - (std == "sample"), tf.float32)
        largest = tf.where(spread, tf.reduce_max(tf.abs(apart), -1, keepdims=True), 1.0)
        unit = apart / largest  # whose squares are neither nothing nor infinite
        deviation = largest * tf.sqrt(tf.reduce_sum(unit * unit, -1, keepdims=True) / freedom)
        apart /= tf.where(spread, deviation + eps, 1.0)
    return tf.where(spread, apart, 0.0)


@plain
def saturated_groups(rewards: TensorLike) -> tf.Tensor:
    """Returns which groups have rewards that are all the same, `[B]` bool: their advantages are zero.

    Args:
      rewards: `[B, G]`.

    >>> saturated_groups([[1.0, 0.0], [1.0, 1.0]]).numpy().tolist()
    [False, True]
    """
    check_rewards("saturated_groups", rewards)
    rewards = tf.cast(rewards, tf.float32)
    return tf.equal(tf.reduce_max(rewards, -1), tf.reduce_min(rewards, -1))


def check_rewards(function: str, rewards: TensorLike) -> None:
    """Raises `ValueError` for rewards that are not `[B, G]` with G of 2 or more, or, where that can be seen, not finite."""
    dims = Dims(function)
    dims("rewards", rewards, "B G")
    check(
        dims.G is None or dims.G > 1,
        f"{function}: `rewards` has groups of {dims.G}, want at least 2 samples of a prompt: each is held against others",
    )
    if is_concrete(rewards):
        found = np.asarray(rewards, np.float64)
        bad = np.argwhere(~np.isfinite(found))
        if len(bad):
            group, place = bad[0].tolist()
            raise ValueError(
                f"{function}: `rewards` of group {group}, sample {place} is {found[group, place]}, want finite numbers"
            )
