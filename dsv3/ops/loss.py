"""Cross-entropy and log-probabilities that never hold the logits of all tokens at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import tensorflow as tf

from dsv3.checks import Dims, check, check_token_ids, is_concrete
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_max, row_sum
from dsv3.typing import TensorLike


@plain
def token_nll(
    hidden: TensorLike, head: TensorLike, targets: TensorLike, *, chunk: int = 1024, fuse: bool = False
) -> tf.Tensor:
    """Negative log-likelihood of each target token, in nats.

    `nll_n = logsumexp(hidden_n @ head) − (hidden_n @ head)[target_n]`

    Logits exist for `chunk` tokens at a time, forward and backward (which computes them again).

    Args:
      hidden: `[N, D]`, static N.
      head: `[D, V]`, in `hidden`'s dtype.
      targets: `[N]` int, in [0, V).
      chunk: tokens whose logits exist at one time.
      fuse: compile the softmax kernels (not under XLA).

    Returns:
      `[N]` float32, differentiable (once) in `hidden` and `head`.
    """
    _check_tokens("token_nll", hidden, head, targets, chunk)
    found = _in_chunks(
        hidden, head, targets, chunk=chunk, outputs=1, forward=lambda logits, t: (_chunk_nll(logits, t, fuse=fuse),),
        backward=functools.partial(_chunk_grad, fuse=fuse),
    )  # fmt: skip
    return found[0]


@plain
def target_logprobs(
    hidden: TensorLike, head: TensorLike, targets: TensorLike, *, temperature: TensorLike = 1.0, chunk: int = 1024,
    fuse: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
    """Log-probability of each target token under `p = softmax(hidden @ head / temperature)`, and the entropy of p, in nats.

    `log p(target_n)` and `−Σ_v p_v·log p_v`. Logits exist for `chunk` tokens at a time, as in `token_nll`.

    Args:
      hidden: `[N, D]`, static N.
      head: `[D, V]`, in `hidden`'s dtype.
      targets: `[N]` int, in [0, V).
      temperature: a number or a scalar tensor above 0, without a gradient.
      chunk: tokens whose logits exist at one time.
      fuse: compile the softmax kernels (not under XLA).

    Returns:
      Log-probabilities and entropies, `[N]` float32 each, differentiable (once) in `hidden` and `head`.
    """
    _check_tokens("target_logprobs", hidden, head, targets, chunk)
    if is_concrete(temperature):
        check(float(temperature) > 0, f"target_logprobs: `temperature` is {float(temperature)}, want above 0")
    temperature = tf.stop_gradient(tf.cast(temperature, tf.float32))
    logprobs, entropy = _in_chunks(
        hidden, head, targets, chunk=chunk, outputs=2,
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


def _in_chunks(
    hidden: TensorLike, head: TensorLike, targets: TensorLike, *, chunk: int, outputs: int,
    forward: Callable[..., Sequence[tf.Tensor]], backward: Callable[..., tf.Tensor],
) -> list[tf.Tensor]:  # fmt: skip
    """Computes numbers of each token's logits, `[N]` each, for `chunk` tokens at a time.

    Args:
      hidden, head, targets: see `token_nll`.
      outputs: how many.
      forward: `forward(logits, targets) -> outputs`. backward: `backward(logits, targets, *gradients) -> d_logits`.
    """
    hidden, head = tf.convert_to_tensor(hidden), tf.convert_to_tensor(head)
    n = hidden.shape[0]
    size = min(chunk, max(n, 1))
    chunks = -(-n // size)

    def split(x: tf.Tensor) -> tf.Tensor:
        pad = [[0, chunks * size - n], *([[0, 0]] * (x.shape.rank - 1))]
        return tf.reshape(tf.pad(x, pad), [chunks, size, *x.shape[1:]])

    target_chunks = split(tf.cast(targets, tf.int32))

    @tf.custom_gradient
    def run(hidden, head):
        pieces = split(hidden)

        def one(i, *arrays):
            found = forward(tf.matmul(pieces[i], head), target_chunks[i])
            return i + 1, *(array.write(i, value) for array, value in zip(arrays, found))

        arrays = tuple(tf.TensorArray(tf.float32, chunks, element_shape=[size]) for _ in range(outputs))
        found = [array.stack() for array in _loop(chunks, one, arrays)]

        def grad(*d_outs):
            d_chunks = [split(d) for d in d_outs]

            def back(i, d_hidden, d_head):
                d_logits = backward(tf.matmul(pieces[i], head), target_chunks[i], *(d[i] for d in d_chunks))
                d_piece = tf.matmul(d_logits, head, transpose_b=True)
                d_head += tf.cast(tf.matmul(pieces[i], d_logits, transpose_a=True), tf.float32)
                return i + 1, d_hidden.write(i, d_piece), d_head

            d_hidden = tf.TensorArray(hidden.dtype, chunks, element_shape=[size, hidden.shape[1]])
            d_hidden, d_head = _loop(chunks, back, (d_hidden, tf.zeros(head.shape, tf.float32)))
            d_hidden = tf.reshape(d_hidden.stack(), [chunks * size, hidden.shape[1]])[:n]
            return d_hidden, tf.cast(d_head, head.dtype)

        return [tf.reshape(out, [chunks * size])[:n] for out in found], grad

    return run(hidden, head)


def _loop(steps: int, body, state: tuple) -> tuple:
    """`body(i, *state)` for i below `steps`, without a loop for one step."""
    if steps == 1:
        return body(0, *state)[1:]
    return tf.while_loop(lambda i, *_: i < steps, body, (tf.constant(0), *state), parallel_iterations=1)[1:]


@fused
def _chunk_nll(logits, targets):
    logits = tf.cast(logits, tf.float32)
    top = row_max(logits)
    lse = (tf.math.log(row_sum(tf.exp(logits - top))) + top)[:, 0]
    hot = tf.equal(tf.expand_dims(targets, -1), tf.range(logits.shape[-1]))
    return lse - row_sum(tf.where(hot, logits, 0.0))[:, 0]


@fused
def _chunk_grad(logits, targets, d_nll):
    logits_f32 = tf.cast(logits, tf.float32)
    probs = tf.exp(logits_f32 - row_max(logits_f32))
    probs /= row_sum(probs)
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
