"""The GRPO loss: a clipped ratio to the policy that sampled, and a divergence from a reference policy."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_choice
from dsv3.graph import plain
from dsv3.typing import TensorLike

KL_ESTIMATORS = ("k1", "k2", "k3")
AVERAGES = ("token", "sequence", "fixed")
FARTHEST = 20.0  # log-ratios count as this at most: far beyond it exp is infinite, and infinity times zero no number


class GrpoTotals(NamedTuple):
    """What sums are divided by: `tokens` that count, and `sequences` that have one; float32 scalars."""

    tokens: tf.Tensor
    sequences: tf.Tensor


class GrpoStats(NamedTuple):
    """What happened to the tokens of a loss; float32 scalars, means over the tokens that count.

    Attributes:
      clip_low, clip_high: share of tokens whose ratio is beyond the lower limit with a negative advantage, and beyond the
        upper one with a positive: those that give no gradient. dual_clip: share of those that the dual limit stops.
      kl: the divergence from the reference by the chosen estimator; `()` without a reference.
      drift: that of the policy that sampled from this one, `KL(π_old ‖ π_θ)` by k3: how far the policy has gone since.
      ratio_mean, ratio_max: of `π_θ / π_old`.
    """

    clip_low: tf.Tensor
    clip_high: tf.Tensor
    dual_clip: tf.Tensor
    kl: tf.Tensor | tuple
    drift: tf.Tensor
    ratio_mean: tf.Tensor
    ratio_max: tf.Tensor


class GrpoLoss(NamedTuple):
    """`loss = policy + kl_weight·penalty`, float32 scalars, and `GrpoStats`; without a reference `penalty` is `()`."""

    loss: tf.Tensor
    policy: tf.Tensor
    penalty: tf.Tensor | tuple
    stats: GrpoStats


@plain
def kl_estimate(logprobs: TensorLike, ref_logprobs: TensorLike, *, estimator: str = "k3") -> tf.Tensor:
    """Estimates `KL(π_θ ‖ π_ref)` at tokens that π_θ has drawn, with `d = log π_ref − log π_θ` and `r = exp(d)`.

    `k1 = −d`, `k2 = d²/2`, `k3 = r − d − 1`, where d counts as 20 at most. The expectations of k1 and k3 are
    the divergence; k3 is never negative.

    Args:
      logprobs, ref_logprobs: `[N, T]`, of the same tokens under both policies.
      estimator: `"k1"`, `"k2"` or `"k3"`. As part of a loss, the gradient of k1 is zero on average, that of k2 is that of
        the divergence, and that of k3 is that of the divergence the other way round.

    Returns:
      `[N, T]` float32.

    References: Schulman, Approximating KL divergence (2020); arXiv:2402.03300 equation 4 has k3.

    >>> [round(float(kl_estimate([[0.0]], [[-1.0]], estimator=k)[0, 0]), 3) for k in KL_ESTIMATORS]
    [1.0, 0.5, 0.368]
    """
    check_choice("kl_estimate", "estimator", estimator, KL_ESTIMATORS)
    dims = Dims("kl_estimate")
    dims("logprobs", logprobs, "N T")
    dims("ref_logprobs", ref_logprobs, "N T")
    d = tf.cast(ref_logprobs, tf.float32) - tf.cast(logprobs, tf.float32)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    d = tf.minimum(d, FARTHEST)
    return tf.math.expm1(d) - d


@plain
def grpo_totals(mask: TensorLike) -> GrpoTotals:
    """Returns the `GrpoTotals` of a `mask` `[..., T]`, at least 1 each: for a batch that is computed in parts."""
    mask = tf.cast(mask, tf.float32)
    sequences = tf.reduce_sum(tf.cast(tf.reduce_any(mask > 0, -1), tf.float32))
    return GrpoTotals(tf.maximum(tf.reduce_sum(mask), 1.0), tf.maximum(sequences, 1.0))


@plain
def token_weights(
    mask: TensorLike, *, average: str = "sequence", length: int | None = None, totals: GrpoTotals | None = None
) -> tf.Tensor:
    """Returns how much each token counts in the loss, `[N, T]` float32.

    `"token"`: 1 / all tokens. `"sequence"`: 1 / (tokens of its sequence · sequences): the mean over sequences of the mean
    over their tokens. `"fixed"`: 1 / (`length` · sequences): no sequence's weight depends on its length.

    Args:
      mask: `[N, T]`, 1 for tokens that count. A sequence without any is none.
      average: see above.
      length: of `"fixed"`, in tokens, such as the longest response that is allowed.
      totals: of the whole batch, where `mask` is a part of it; default: of `mask`.

    References: `"sequence"` arXiv:2402.03300 equation 3; `"token"` arXiv:2503.14476; `"fixed"` arXiv:2503.20783.

    >>> token_weights([[1, 1], [1, 0]], average="sequence").numpy().tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    check_average("token_weights", average, length)
    Dims("token_weights")("mask", mask, "N T")
    mask = tf.cast(mask, tf.float32)
    totals = grpo_totals(mask) if totals is None else totals
    if average == "token":
        return mask / totals.tokens
    if average == "fixed":
        return mask / (length * totals.sequences)
    return mask / (tf.maximum(tf.reduce_sum(mask, -1, keepdims=True), 1.0) * totals.sequences)


def check_average(function: str, average: str, length: int | None) -> None:
    """Raises `ValueError` for an unknown average, and unless `"fixed"` and only that has a `length`."""
    check_choice(function, "average", average, AVERAGES)
    if average == "fixed":
        check(length is not None and length > 0, f"{function}: `length` is {length}, want tokens > 0 with average='fixed'")
    else:
        check(length is None, f"{function}: `length` is {length}, want None with average={average!r}")


def check_loss(
    function: str, *, clip_low: float, clip_high: float, dual_clip: float | None, kl: str, kl_weight: float, average: str,
    length: int | None,
) -> None:  # fmt: skip
    """Raises `ValueError` for settings that `grpo_loss` cannot have; `function` is named in the message."""
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("kl_weight", kl_weight)):
        check(value >= 0, f"{function}: `{name}` is {value}, want at least 0")
    check(dual_clip is None or dual_clip > 1, f"{function}: `dual_clip` is {dual_clip}, want above 1 or None")
    check_choice(function, "kl", kl, KL_ESTIMATORS)
    check_average(function, average, length)


@plain
def grpo_loss(
    logprobs: TensorLike,
    old_logprobs: TensorLike,
    ref_logprobs: TensorLike | None,
    advantages: TensorLike,
    mask: TensorLike,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl: str = "k3",
    kl_weight: float = 0.0,
    average: str = "sequence",
    length: int | None = None,
    totals: GrpoTotals | None = None,
) -> GrpoLoss:
    """`L = −Σ_t w_t·(min(ρ_t·A, clip(ρ_t, 1−ε_low, 1+ε_high)·A) − β·KL_t)`, with `ρ_t = π_θ(t) / π_old(t)`.

    `log ρ` counts as 20 at most and as −20 at least. With `dual_clip` c a token of a negative advantage contributes at least
    `c·A`, however large ρ is.

    Args:
      logprobs: `[N, T]`, log π_θ of the tokens: what the gradient goes through.
      old_logprobs: `[N, T]`, under the policy that sampled. For a step on fresh samples `tf.stop_gradient(logprobs)` will
        do: every ratio is then 1, and the gradient that of `A·log π`.
      ref_logprobs: `[N, T]`, under the reference policy; `None`: there is none.
      advantages: `[N]`, of the sequences, without a gradient.
      mask: `[N, T]`, 1 for tokens that count: those that were drawn. What the others hold does not matter, nor the advantage
        of a sequence without any.
      clip_low, clip_high: ε_low and ε_high. Above 1, ε_low is no limit. dual_clip: c, above 1; `None`: no limit.
      kl: estimator of the divergence, see `kl_estimate`. kl_weight: β.
      average, length: what w_t is, see `token_weights`.
      totals: of the whole batch, where these rows are a part of it; losses and statistics of the parts then add up (but
        `ratio_max`, of which the largest counts). Default: of `mask`.

    Returns:
      `GrpoLoss`.

    Raises:
      ValueError: wrong shapes or settings.

    References: arXiv:2402.03300 equation 3; DeepSeek-V3 section 5.2.2 equations 26 to 28; two limits: arXiv:2503.14476;
      dual clip: arXiv:1912.09729.

    >>> out = grpo_loss([[0.5, 0.0]], [[0.0, 0.0]], None, [1.0], [[1, 1]])
    >>> round(float(out.loss), 4), float(out.stats.clip_high)  # −(1.2 + 1) / 2, as exp(0.5) is above 1.2
    (-1.1, 0.5)
    """
    check_loss(
        "grpo_loss", clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl, kl_weight=kl_weight,
        average=average, length=length,
    )  # fmt: skip
    dims = Dims("grpo_loss")
    dims("logprobs", logprobs, "N T")
    given = {"old_logprobs": old_logprobs, "mask": mask} | ({} if ref_logprobs is None else {"ref_logprobs": ref_logprobs})
    for name, value in given.items():
        dims(name, value, "N T")
    dims("advantages", advantages, "N")
    none = ref_logprobs is None and kl_weight > 0
    check(not none, f"grpo_loss: `kl_weight` is {kl_weight}, but there is no `ref_logprobs`")
    mask = tf.cast(mask, tf.float32)
    counted = mask > 0
    totals = grpo_totals(mask) if totals is None else totals
    weights = token_weights(mask, average=average, length=length, totals=totals)
    # Before anything is computed of them: a NaN times zero is one.
    logprobs = tf.where(counted, tf.cast(logprobs, tf.float32), 0.0)
    old = tf.stop_gradient(tf.where(counted, tf.cast(old_logprobs, tf.float32), 0.0))
    ratio = tf.exp(tf.clip_by_value(logprobs - old, -FARTHEST, FARTHEST))
    advantages = tf.where(counted, tf.expand_dims(tf.stop_gradient(tf.cast(advantages, tf.float32)), 1), 0.0)
    gain, limits = _clipped(ratio, advantages, clip_low, clip_high, dual_clip)
    policy = -tf.reduce_sum(weights * gain)

    def mean(x: tf.Tensor) -> tf.Tensor:
        return tf.stop_gradient(tf.reduce_sum(mask * tf.cast(x, tf.float32)) / totals.tokens)

    penalty, apart = (), ()
    if ref_logprobs is not None:
        ref = tf.stop_gradient(tf.where(counted, tf.cast(ref_logprobs, tf.float32), 0.0))
        divergence = kl_estimate(logprobs, ref, estimator=kl)
        penalty, apart = tf.reduce_sum(weights * divergence), mean(divergence)
    stats = GrpoStats(
        *map(mean, limits), kl=apart, drift=mean(kl_estimate(old, logprobs)), ratio_mean=mean(ratio),
        ratio_max=tf.stop_gradient(tf.reduce_max(tf.where(counted, ratio, 0.0))),
    )  # fmt: skip
    loss = policy + kl_weight * penalty if kl_weight else policy
    return GrpoLoss(loss, policy, penalty, stats)


def _clipped(
    ratio: tf.Tensor, advantages: tf.Tensor, low: float, high: float, dual: float | None
) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """What each token is worth, and which tokens are beyond the lower, the upper and the dual limit."""
    free = ratio * advantages
    # Of equal values the first gets the gradient: a ratio of exactly 1 is never taken for a clipped one.
    gain = tf.minimum(free, tf.clip_by_value(ratio, 1.0 - low, 1.0 + high) * advantages)
    below = tf.logical_and(ratio < 1.0 - low, advantages < 0)
    above = tf.logical_and(ratio > 1.0 + high, advantages > 0)
    stopped = tf.zeros_like(below)
    if dual is not None:
        stopped = tf.logical_and(ratio > dual, advantages < 0)
        gain = tf.where(stopped, dual * advantages, gain)
    return gain, (below, above, stopped)
