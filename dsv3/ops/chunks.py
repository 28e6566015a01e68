"""Numbers of each token's logits, for a few tokens at a time, so that the logits of many never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from dsv3.ops.products import matmul_transposed
from dsv3.typing import TensorLike


def in_chunks(
    hidden: TensorLike, head: TensorLike, beside: Sequence[tf.Tensor], *, chunk: int, keep: int, outputs: int,
    told: int = 0, forward: Callable[..., Sequence[tf.Tensor]], backward: Callable[..., tf.Tensor], fuse: bool,
) -> list[tf.Tensor]:  # fmt: skip
    """Computes float32 numbers of each token's logits, `[N]` each, for `chunk` tokens at a time, or of few tokens at once.

    Args:
      hidden: `[N, D]`, static N. head: `[D, V]`, in `hidden`'s dtype.
      beside: what else is known of the tokens, `[N, ...]` each, without a gradient. The last chunk is filled with zeros.
      chunk: tokens whose logits exist at one time.
      keep: up to so many logits, N·V, are computed at once, and wait for the backward; others are computed again there.
      outputs, told: how many; of those told, how many more numbers the forward finds, for the backward.
      forward: `forward(logits, *beside) -> (*outputs, *told)`.
      backward: `backward(logits, *beside, *told, *gradients) -> d_logits`.
      fuse: choose the product that is fastest outside XLA.

    Returns:
      The outputs, differentiable (once) in `hidden` and `head`.
    """
    hidden, head = tf.convert_to_tensor(hidden), tf.convert_to_tensor(head)
    n, vocab = hidden.shape[0], head.shape[1]
    known = [tf.stop_gradient(x) for x in beside]

    def gradients(rows, head, d_logits):
        return matmul_transposed(d_logits, head, fuse=fuse), tf.matmul(rows, d_logits, transpose_a=True)

    @tf.custom_gradient
    def at_once(hidden, head):
        logits = tf.matmul(hidden, head)
        found = forward(logits, *known)

        def grad(*d_outs):
            return gradients(hidden, head, backward(logits, *known, *found[outputs:], *d_outs))

        return list(found[:outputs]), grad

    if vocab is not None and 0 < n * vocab <= keep:
        return at_once(hidden, head)
    size = min(chunk, max(n, 1))
    chunks = -(-n // size)

    def split(x: tf.Tensor) -> tf.Tensor:
        pad = [[0, chunks * size - n], *([[0, 0]] * (x.shape.rank - 1))]
        return tf.reshape(tf.pad(x, pad), [chunks, size, *x.shape[1:]])

    known_chunks = [split(x) for x in known]

    @tf.custom_gradient
    def run(hidden, head):
        pieces = split(hidden)

        def one(i, *arrays):
            found = forward(tf.matmul(pieces[i], head), *(x[i] for x in known_chunks))[:outputs]
            return i + 1, *(array.write(i, value) for array, value in zip(arrays, found, strict=True))

        arrays = tuple(tf.TensorArray(tf.float32, chunks, element_shape=[size]) for _ in range(outputs))
        found = [array.stack() for array in _loop(chunks, one, arrays)]

        def grad(*d_outs):
            d_chunks = [split(d) for d in d_outs]

            def back(i, d_hidden, d_head):
                logits, given = tf.matmul(pieces[i], head), [x[i] for x in known_chunks]
                # What it is told, too, is found again: a recomputed block would else have to go through the forward for it.
                more = forward(logits, *given)[outputs:] if told else []
                d_logits = backward(logits, *given, *more, *(d[i] for d in d_chunks))
                d_piece, d_more = gradients(pieces[i], head, d_logits)
                return i + 1, d_hidden.write(i, d_piece), d_head + tf.cast(d_more, tf.float32)

            d_hidden = tf.TensorArray(hidden.dtype, chunks, element_shape=[size, hidden.shape[1]])
            d_hidden, d_head = _loop(chunks, back, (d_hidden, tf.zeros(head.shape, tf.float32)))
            d_hidden = tf.reshape(d_hidden.stack(), [chunks * size, hidden.shape[1]])[:n]
            return d_hidden, tf.cast(d_head, head.dtype)

        return [tf.reshape(out, [chunks * size])[:n] for out in found], grad

    return run(hidden, head)


def _loop(steps: int, body: Callable, state: tuple) -> tuple:
    """`body(i, *state)` for i below `steps`, without a loop for one step."""
    if steps == 1:
        return body(0, *state)[1:]
    return tf.while_loop(lambda i, *_: i < steps, body, (tf.constant(0), *state), parallel_iterations=1)[1:]
