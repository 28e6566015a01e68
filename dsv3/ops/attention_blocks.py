"""Attention in unrolled blocks of queries: each block's scores against all keys that it may see.

Backward computes a block's probabilities again, or, for short sequences, gets them from the forward pass.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.ops.attention import MASKED, AttentionMask, allowed
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_sum
from dsv3.ops.softmax import row_softmax


@fused
def _biased(scores, bias):
    return scores + bias


@fused
def _score_grad(probs, d_probs, delta):
    """d(probabilities) to d(scores)."""
    d_probs = tf.cast(d_probs, tf.float32)
    return tf.cast(tf.cast(probs, tf.float32) * (d_probs - delta), probs.dtype)


@fused
def _row_dot(a, b):
    return row_sum(tf.cast(a, tf.float32) * tf.cast(b, tf.float32))


def apply(
    q, k, v, mask: AttentionMask, *, scale: float, causal: bool, block: int, keep: bool, fuse: bool
) -> tf.Tensor:
    """See `attention.attention`."""
    length, keys = q.shape[2], k.shape[2]
    spans = [(a, min(a + block, length)) for a in range(0, length, block)]
    biases, sighted = [], []
    for a, b in spans:
        e = b if causal else keys
        part = AttentionMask(mask.q_index[:, a:b], mask.k_index[:, :e], mask.q_segment[:, a:b], mask.k_segment[:, :e])
        seen = allowed(part)
        biases.append(tf.where(seen, tf.constant(0, q.dtype), tf.constant(MASKED, q.dtype)))
        # Without a key to see, output and gradient are zero; a causal query sees itself.
        sighted.append(None if causal else tf.cast(tf.reduce_any(seen, -1, keepdims=True), q.dtype))

    def probabilities(q, k, i):
        a, b = spans[i]
        scores = tf.matmul(q[:, :, a:b], k[:, :, : biases[i].shape[-1]], transpose_b=True)
        return row_softmax(_biased(scores, biases[i], fuse=fuse), fuse=fuse)

    def see(x, i):
        return x if sighted[i] is None else x * sighted[i]

    @tf.custom_gradient
    def run(q, k, v):
        outs, kept = [], []
        for i in range(len(spans)):
            probs = probabilities(q, k, i)
            outs.append(see(tf.matmul(probs, v[:, :, : probs.shape[-1]]), i))
            kept.append(probs if keep else None)
        out = tf.concat(outs, 2)

        def grad(d_out):
            with tf.control_dependencies([d_out]):  # else a graph optimiser would keep what is to be computed again
                q_again = tf.identity(q)
            delta = _row_dot(d_out, out, fuse=fuse)
            d_q, d_k, d_v = [], [], []
            for i, (a, b) in enumerate(spans):
                probs, d_block = kept[i] if keep else probabilities(q_again, k, i), see(d_out[:, :, a:b], i)
                e = probs.shape[-1]
                d_probs = tf.matmul(d_block, v[:, :, :e], transpose_b=True)
                d_scores = _score_grad(probs, d_probs, delta[:, :, a:b], fuse=fuse)
                d_q.append(tf.matmul(d_scores, k[:, :, :e]))
                d_k.append(tf.matmul(d_scores, q[:, :, a:b], transpose_a=True))
                d_v.append(tf.matmul(probs, d_block, transpose_a=True))
            return tf.concat(d_q, 2), *(_sum_prefixes(*pieces, size=keys, fuse=fuse) for pieces in (d_k, d_v))

        return out, grad

    if scale != 1.0:
        q = tf.cast(tf.cast(q, tf.float32) * scale, q.dtype)  # in float32: a rounded scale would be another temperature
    return run(q, k, v)


@fused
def _sum_prefixes(*pieces, size):
    """Sums `[B, H, e_i, ...]` pieces, each of which is the beginning of `[B, H, size, ...]`, in float32."""
    total = 0.0
    for piece in pieces:
        total += tf.pad(tf.cast(piece, tf.float32), [[0, 0], [0, 0], [0, size - piece.shape[2]], [0, 0]])
    return tf.cast(total, pieces[0].dtype)
