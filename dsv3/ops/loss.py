"""Cross-entropy and log-probabilities that never hold the logits of many tokens at once."""

from __future__ import annotations

import functools

import tensorflow as tf

from dsv3.checks import Dims, check, check_token_ids, is_concrete
from dsv3.graph import plain
from dsv3.ops.chunks import in_chunks
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_max, row_parts, row_sum
from dsv3.typing import TensorLike


@plain
def token_nll(
    hidden: TensorLike, head: TensorLike, targets: TensorLike, *, chunk: int = 1024, keep: int = 0, fuse: bool = False
) -> tf.Tensor:
    """Negative log-likelihood of each target token, in nats.

    `nll_n = logsumexp(hidden_n @ head) − (hidden_n @ head)[target_n]`

    Logits exist for `chunk` tokens at a time, forward and backward (which computes them again, unless they are kept).

    Args:
      hidden: `[N, D]`, static N.
      head: `[D, V]`, in `hidden`'s dtype.
      targets: `[N]` int, in [0, V).
      chunk: tokens whose logits exist at one time.
      keep: up to so many logits, N·V, are computed at once, and wait for the backward in `hidden`'s dtype.
      fuse: compile the softmax kernels (not under XLA).

    Returns:
      `[N]` float32, differentiable (once) in `hidden` and `head`.
    """
    _check_tokens("token_nll", hidden, head, targets, chunk)
    found = in_chunks(
        hidden, head, [tf.cast(targets, tf.int32)], chunk=chunk, keep=keep, fuse=fuse, outputs=1, told=1,
        forward=functools.partial(_chunk_nll, fuse=fuse), backward=functools.partial(_chunk_grad, fuse=fuse),
    )  # fmt: skip
    return found[0]


@plain
def target_logprobs(
    hidden: TensorLike, head: TensorLike, targets: TensorLike, *, temperature: TensorLike = 1.0, chunk: int = 1024,
    keep: int = 0, fuse: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
    """Log-probability of each target token under `p = softmax(hidden @ head / temperature)`, and the entropy of p, in nats.

    `log p(target_n)` and `−Σ_v p_v·log p_v`. Logits exist for `chunk` tokens at a time, as in `token_nll`.

    Args:
      hidden: `[N, D]`, static N.
      head: `[D, V]`, in `hidden`'s dtype.
      targets: `[N]` int, in [0, V).
      temperature: a number or a scalar tensor above 0, without a gradient.
      chunk, keep: as of `token_nll`.
      fuse: compile the softmax kernels (not under XLA).

    Returns:
      Log-probabilities and entropies, `[N]` float32 each, differentiable (once) in `hidden` and `head`.
    """
    _check_tokens("target_logprobs", hidden, head, targets, chunk)
    if is_concrete(temperature):
        check(float(temperature) > 0, f"target_logprobs: `temperature` is {float(temperature)}, want above 0")
    temperature = tf.stop_gradient(tf.cast(temperature, tf.float32))
    logprobs, entropy = in_chunks(
        hidden, head, [tf.cast(targets, tf.int32)], chunk=chunk, keep=keep, fuse=fuse, outputs=2,
        forward=lambda logits, t: _chunk_logprobs(logits, t, temperature, fuse=fuse),
        backward=lambda logits, t, *d: _chunk_logprobs_grad(logits, t, temperature, *d, fuse=fuse),
    )  # fmt: skip
    return logprobs, entropy


def _check_tokens(function: str, hidden: TensorLike, head: TensorLike, targets: TensorLike, chunk: int) -> None:
    dims = Dims(function)
    dims("hidden", hidden, "N D")
    dims("head", head, "D V")
    dims("targets", targets, "N")
    check_token_ids(function, "targets", targets, dims.V if dims.V is not None else 2**31)
    check(chunk > 0, f"{function}: `chunk` is {chunk}, want > 0 tokens")
    check(dims.N is not None, f"{function}: `hidden` has an unknown number of tokens, want a static N")


@fused
def _chunk_nll(logits, targets):
    """The tokens' `-log p`, and what the backward is told: the log of the softmax's denominator."""
    picked = tf.cast(tf.gather(logits, targets, batch_dims=1), tf.float32)
    parts = [tf.cast(part, tf.float32) for part in row_parts(logits)]
    top = row_max(functools.reduce(tf.maximum, parts))
    lse = (tf.math.log(row_sum(tf.add_n([tf.exp(part - top) for part in parts]))) + top)[:, 0]
    return lse - picked, lse


@fused
def _chunk_grad(logits, targets, lse, d_nll):
    probs = tf.exp(tf.cast(logits, tf.float32) - tf.expand_dims(lse, -1))
    hot = tf.equal(tf.expand_dims(targets, -1), tf.range(logits.shape[-1]))
    return tf.cast((probs - tf.cast(hot, tf.float32)) * tf.expand_dims(d_nll, -1), logits.dtype)


def _scaled(logits: tf.Tensor, temperature: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Logits over the temperature, below their largest; the softmax of them; and the log of its denominator."""
    scaled = tf.cast(logits, tf.float32)
    scaled = (scaled - row_max(scaled)) / temperature
    weights = tf.exp(scaled)
    total = row_sum(weights)
    return scaled, weights / total, tf.math.log(total)


@fused
def _chunk_logprobs(logits, targets, temperature):
    scaled, probs, lse = _scaled(logits, temperature)
    hot = tf.equal(tf.expand_dims(targets, -1), tf.range(logits.shape[-1]))
    picked = row_sum(tf.where(hot, scaled, 0.0))
    return (picked - lse)[:, 0], (lse - row_sum(probs * scaled))[:, 0]


@fused
def _chunk_logprobs_grad(logits, targets, temperature, d_logprobs, d_entropy):
    scaled, probs, lse = _scaled(logits, temperature)
    hot = tf.equal(tf.expand_dims(targets, -1), tf.range(logits.shape[-1]))
    entropy = lse - row_sum(probs * scaled)
    of_logprobs = (tf.cast(hot, tf.float32) - probs) * tf.expand_dims(d_logprobs, -1)
    of_entropy = probs * (scaled - lse + entropy) * tf.expand_dims(d_entropy, -1)
    return tf.cast((of_logprobs - of_entropy) / temperature, logits.dtype)
