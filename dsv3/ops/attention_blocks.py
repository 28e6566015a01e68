"""Attention in unrolled blocks of queries: each block's scores against all keys that it may see, then forgotten."""

from __future__ import annotations

import tensorflow as tf

from dsv3.ops.attention import BLIND, MASKED, AttentionMask, allowed
from dsv3.ops.fuse import fused
from dsv3.ops.reduce import row_max, row_sum


@fused
def _block_softmax(s, q_index, k_index, q_segment, k_segment, *, scale):
    """Scores to unnormalised probabilities: (exp(s − max), their sum, logsumexp)."""
    mask = allowed(AttentionMask(q_index, k_index, q_segment, k_segment))
    scores = tf.where(mask, tf.cast(s, tf.float32) * scale, MASKED)
    top = row_max(scores)
    probs = tf.exp(scores - top)
    total = row_sum(probs)
    total = tf.where(top > BLIND, total, float("inf"))  # a query that sees no key: output and gradients are zero
    return tf.cast(probs, s.dtype), total, top + tf.math.log(total)


@fused
def _block_softmax_grad(s, lse, d_probs, delta, q_index, k_index, q_segment, k_segment, *, scale):
    """Scores and d(probabilities) to (probabilities, d(scores)·scale)."""
    mask = allowed(AttentionMask(q_index, k_index, q_segment, k_segment))
    probs = tf.exp(tf.where(mask, tf.cast(s, tf.float32) * scale, MASKED) - lse)
    d_scores = probs * (tf.cast(d_probs, tf.float32) - delta) * scale
    return tf.cast(probs, s.dtype), tf.cast(d_scores, s.dtype)


@fused
def _row_dot(a, b):
    return row_sum(tf.cast(a, tf.float32) * tf.cast(b, tf.float32))


@fused
def _normalise(out, total):
    return tf.cast(tf.cast(out, tf.float32) / total, out.dtype)


def apply(q, k, v, mask: AttentionMask, *, scale: float, causal: bool, block: int, fuse: bool) -> tf.Tensor:
    """See `attention.attention`."""
    length, keys = q.shape[2], k.shape[2]
    spans = [(a, min(a + block, length)) for a in range(0, length, block)]

    def seen(b: int) -> int:
        return b if causal else keys

    def block_mask(a: int, b: int) -> tuple[tf.Tensor, ...]:
        e = seen(b)
        return mask.q_index[:, a:b], mask.k_index[:, :e], mask.q_segment[:, a:b], mask.k_segment[:, :e]

    @tf.custom_gradient
    def run(q, k, v):
        outs, lses = [], []
        for a, b in spans:
            s = tf.matmul(q[:, :, a:b], k[:, :, : seen(b)], transpose_b=True)
            probs, total, lse = _block_softmax(s, *block_mask(a, b), scale=scale, fuse=fuse)
            outs.append(_normalise(tf.matmul(probs, v[:, :, : seen(b)]), total, fuse=fuse))
            lses.append(lse)
        out = tf.concat(outs, 2)

        def grad(d_out):
            return _backward(q, k, v, out, lses, d_out, spans, seen, block_mask, scale=scale, fuse=fuse)

        return out, grad

    return run(q, k, v)


def _backward(q, k, v, out, lses, d_out, spans, seen, block_mask, *, scale, fuse):
    """d(q) block by block; d(k) and d(v) as sums over the blocks that saw them."""
    delta = _row_dot(d_out, out, fuse=fuse)
    edges = sorted({seen(b) for _, b in spans})
    sizes = [b - a for a, b in zip([0, *edges], edges)]
    d_q, d_k, d_v = [], [[] for _ in sizes], [[] for _ in sizes]
    for (a, b), lse in zip(spans, lses):
        e = seen(b)
        q_block, do_block = q[:, :, a:b], d_out[:, :, a:b]
        s = tf.matmul(q_block, k[:, :, :e], transpose_b=True)
        d_probs = tf.matmul(do_block, v[:, :, :e], transpose_b=True)
        probs, d_s = _block_softmax_grad(
            s, lse, d_probs, delta[:, :, a:b], *block_mask(a, b), scale=scale, fuse=fuse
        )
        d_q.append(tf.matmul(d_s, k[:, :, :e]))
        parts = edges.index(e) + 1
        pieces = tf.matmul(d_s, q_block, transpose_a=True), tf.matmul(probs, do_block, transpose_a=True)
        for into, piece in zip((d_k, d_v), pieces):
            for j, part in enumerate(tf.split(piece, sizes[:parts], axis=2)):
                into[j].append(part)
    rest = k.shape[2] - sum(sizes)
    grads = [tf.concat([tf.add_n(parts) for parts in parts_of], 2) for parts_of in (d_k, d_v)]
    grads = [tf.pad(g, [[0, 0], [0, 0], [0, rest], [0, 0]]) if rest else g for g in grads]
    return tf.concat(d_q, 2), *grads
