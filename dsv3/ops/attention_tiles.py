"""Attention in a loop over tiles of queries and keys, with an online softmax: memory does not grow with the length.

For sequences too long to unroll. Forward keeps the output and one logsumexp a row; backward walks the same tiles again,
keys outermost, and recomputes their probabilities.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.ops.attention import BLIND, MASKED, NEVER, AttentionMask, allowed
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_max, row_sum


@fused
def tile_update(s, top, total, acc, q_index, k_index, q_segment, k_segment, *, scale):
    """One step of the online softmax: (probabilities, new max, new sum, rescaled accumulator)."""
    mask = allowed(AttentionMask(q_index, k_index, q_segment, k_segment))
    scores = tf.where(mask, tf.cast(s, tf.float32) * scale, MASKED)
    new_top = tf.maximum(top, row_max(scores))
    probs = tf.exp(scores - new_top)
    shrink = tf.exp(top - new_top)
    return tf.cast(probs, s.dtype), new_top, total * shrink + row_sum(probs), acc * shrink


@fused
def _tile_grad(s, lse, d_probs, delta, q_index, k_index, q_segment, k_segment, *, scale):
    mask = allowed(AttentionMask(q_index, k_index, q_segment, k_segment))
    probs = tf.exp(tf.where(mask, tf.cast(s, tf.float32) * scale, MASKED) - lse)
    d_scores = probs * (tf.cast(d_probs, tf.float32) - delta) * scale
    return tf.cast(probs, s.dtype), tf.cast(d_scores, s.dtype)


def _tiles(x: tf.Tensor, tile: int, dim: int, pad_value: int = 0) -> tf.Tensor:
    """Pads `dim` to whole tiles and moves the tile number to the front: `[n, ...]`."""
    size = x.shape[dim]
    n = -(-size // tile)
    pads = [[0, n * tile - size] if d == dim else [0, 0] for d in range(x.shape.rank)]
    x = tf.pad(x, pads, constant_values=pad_value)
    shape = [*x.shape[:dim], n, tile, *x.shape[dim + 1 :]]
    shape = [tf.shape(x)[i] if s is None else s for i, s in enumerate(shape[: dim])] + shape[dim:]
    return tf.transpose(tf.reshape(x, shape), [dim, *(d for d in range(len(shape)) if d != dim)])


def _untile(x: tf.Tensor, length: int) -> tf.Tensor:
    """The inverse of `_tiles` for `[n, B, H, tile, D]`: `[B, H, length, D]`."""
    x = tf.transpose(x, [1, 2, 0, 3, 4])
    shape = tf.shape(x)
    x = tf.reshape(x, [shape[0], shape[1], shape[2] * shape[3], x.shape[4]])
    return x[:, :, :length]


def _mask_tiles(mask: AttentionMask, tile: int) -> AttentionMask:
    return AttentionMask(
        _tiles(mask.q_index, tile, 1), _tiles(mask.k_index, tile, 1, NEVER),
        _tiles(mask.q_segment, tile, 1), _tiles(mask.k_segment, tile, 1),
    )  # fmt: skip


def apply(q, k, v, mask: AttentionMask, *, scale: float, causal: bool, tile: int, fuse: bool) -> tf.Tensor:
    """See `attention.attention`."""
    length, keys = q.shape[2], k.shape[2]
    tiles = _mask_tiles(mask, tile)

    @tf.custom_gradient
    def run(q, k, v):
        q_tiles, k_tiles, v_tiles = _tiles(q, tile, 2), _tiles(k, tile, 2), _tiles(v, tile, 2)
        out, lse = _forward(q_tiles, k_tiles, v_tiles, tiles, scale=scale, causal=causal, fuse=fuse)

        def grad(d_out):
            do_tiles = _tiles(d_out, tile, 2)
            delta = tf.reduce_sum(tf.cast(do_tiles, tf.float32) * tf.cast(out, tf.float32), -1, keepdims=True)
            d_q, d_k, d_v = _backward(
                q_tiles, k_tiles, v_tiles, do_tiles, lse, delta, tiles, scale=scale, causal=causal, fuse=fuse
            )
            return _untile(d_q, length), _untile(d_k, keys), _untile(d_v, keys)

        return _untile(out, length), grad

    result = run(q, k, v)
    return tf.ensure_shape(result, [q.shape[0], q.shape[1], length, v.shape[3]])


def _forward(q, k, v, mask: AttentionMask, *, scale, causal, fuse):
    """Loops over query tiles, inside over key tiles; returns tiles of outputs and of logsumexps."""
    n, tile = q.shape[0], q.shape[3]
    rows = tf.shape(q)[1:3]
    outs = tf.TensorArray(q.dtype, n, element_shape=[*q.shape[1:4], v.shape[4]])
    lses = tf.TensorArray(tf.float32, n, element_shape=[*q.shape[1:4], 1])

    def inner(i):
        def body(j, top, total, acc):
            s = tf.matmul(q[i], k[j], transpose_b=True)
            probs, top, total, acc = tile_update(
                s, top, total, acc, mask.q_index[i], mask.k_index[j], mask.q_segment[i], mask.k_segment[j],
                scale=scale, fuse=fuse,
            )  # fmt: skip
            return j + 1, top, total, acc + tf.cast(tf.matmul(probs, v[j]), tf.float32)

        start = [
            tf.fill([rows[0], rows[1], tile, 1], MASKED),
            tf.zeros([rows[0], rows[1], tile, 1]),
            tf.zeros([rows[0], rows[1], tile, v.shape[4]]),
        ]
        start = [tf.ensure_shape(t, [*q.shape[1:4], t.shape[-1]]) for t in start]
        stop = i + 1 if causal else k.shape[0]
        return tf.while_loop(lambda j, *_: j < stop, body, [0, *start], parallel_iterations=1)[1:]

    def outer(i, outs, lses):
        top, total, acc = inner(i)
        total = tf.where(top > BLIND, total, float("inf"))  # a query that sees no key: output and gradients are zero
        return i + 1, outs.write(i, tf.cast(acc / total, q.dtype)), lses.write(i, top + tf.math.log(total))

    _, outs, lses = tf.while_loop(lambda i, *_: i < n, outer, [0, outs, lses], parallel_iterations=1)
    return outs.stack(), lses.stack()


def _backward(q, k, v, d_out, lse, delta, mask: AttentionMask, *, scale, causal, fuse):
    """Loops over key tiles, inside over the query tiles that see them; d(q) is summed in place."""
    n, m = q.shape[0], k.shape[0]
    d_ks = tf.TensorArray(k.dtype, m, element_shape=k.shape[1:])
    d_vs = tf.TensorArray(v.dtype, m, element_shape=v.shape[1:])

    def inner(j, d_q):
        def body(i, d_q, d_k, d_v):
            s = tf.matmul(q[i], k[j], transpose_b=True)
            d_probs = tf.matmul(d_out[i], v[j], transpose_b=True)
            probs, d_s = _tile_grad(
                s, lse[i], d_probs, delta[i], mask.q_index[i], mask.k_index[j], mask.q_segment[i], mask.k_segment[j],
                scale=scale, fuse=fuse,
            )  # fmt: skip
            d_q = tf.tensor_scatter_nd_add(d_q, [[i]], tf.expand_dims(tf.cast(tf.matmul(d_s, k[j]), tf.float32), 0))
            d_k += tf.cast(tf.matmul(d_s, q[i], transpose_a=True), tf.float32)
            d_v += tf.cast(tf.matmul(probs, d_out[i], transpose_a=True), tf.float32)
            return i + 1, d_q, d_k, d_v

        zeros = [tf.zeros_like(k[0], tf.float32), tf.zeros_like(v[0], tf.float32)]
        first = j if causal else tf.zeros_like(j)
        return tf.while_loop(lambda i, *_: i < n, body, [first, d_q, *zeros], parallel_iterations=1)[1:]

    def outer(j, d_q, d_ks, d_vs):
        d_q, d_k, d_v = inner(j, d_q)
        return j + 1, d_q, d_ks.write(j, tf.cast(d_k, k.dtype)), d_vs.write(j, tf.cast(d_v, v.dtype))

    start = [tf.constant(0), tf.zeros_like(q, tf.float32), d_ks, d_vs]
    _, d_q, d_ks, d_vs = tf.while_loop(lambda j, *_: j < m, outer, start, parallel_iterations=1)
    return tf.cast(d_q, q.dtype), d_ks.stack(), d_vs.stack()
