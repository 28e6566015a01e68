"""Cross-entropy that never holds the logits of all tokens at once."""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import Dims, check, check_token_ids
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
    dims = Dims("token_nll")
    dims("hidden", hidden, "N D")
    dims("head", head, "D V")
    dims("targets", targets, "N")
    check_token_ids("token_nll", "targets", targets, dims.V if dims.V is not None else 2**31)
    check(chunk > 0, f"token_nll: `chunk` is {chunk}, want > 0 tokens")
    check(dims.N is not None, "token_nll: `hidden` has an unknown number of tokens, want a static N")
    targets = tf.cast(targets, tf.int32)
    n, size = dims.N, min(chunk, max(dims.N, 1))
    chunks = -(-n // size)

    def split(x: tf.Tensor) -> tf.Tensor:
        pad = [[0, chunks * size - n], *([[0, 0]] * (x.shape.rank - 1))]
        return tf.reshape(tf.pad(x, pad), [chunks, size, *x.shape[1:]])

    target_chunks = split(targets)

    @tf.custom_gradient
    def run(hidden, head):
        pieces = split(hidden)

        def forward(i, out):
            nll = _chunk_nll(tf.matmul(pieces[i], head), target_chunks[i], fuse=fuse)
            return i + 1, out.write(i, nll)

        out = tf.TensorArray(tf.float32, chunks, element_shape=[size])
        out = _loop(chunks, forward, (out,))[0].stack()

        def grad(d_nll):
            d_chunks = split(d_nll)

            def backward(i, d_hidden, d_head):
                d_logits = _chunk_grad(tf.matmul(pieces[i], head), target_chunks[i], d_chunks[i], fuse=fuse)
                d_piece = tf.matmul(d_logits, head, transpose_b=True)
                d_head += tf.cast(tf.matmul(pieces[i], d_logits, transpose_a=True), tf.float32)
                return i + 1, d_hidden.write(i, d_piece), d_head

            d_hidden = tf.TensorArray(hidden.dtype, chunks, element_shape=[size, hidden.shape[1]])
            d_hidden, d_head = _loop(chunks, backward, (d_hidden, tf.zeros(head.shape, tf.float32)))
            d_hidden = tf.reshape(d_hidden.stack(), [chunks * size, hidden.shape[1]])[:n]
            return d_hidden, tf.cast(d_head, head.dtype)

        return tf.reshape(out, [chunks * size])[:n], grad

    return run(tf.convert_to_tensor(hidden), tf.convert_to_tensor(head))


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
