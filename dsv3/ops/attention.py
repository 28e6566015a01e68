"""Softmax attention over explicit queries, keys and values, with masks given as indices.

A query sees the keys whose index is not above its own and whose segment is its own. Indices default to positions in the
sequence (causal attention); segments isolate packed documents, and padding, which is a segment of its own.

`attention_naive` holds all scores and is the plain statement of the function. `attention` computes it in blocks, so that
no `[T, S]` score matrix of a whole sequence exists, forward or backward; up to a length, the blocks' probabilities wait
for the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, static_shape
from dsv3.graph import plain
from dsv3.typing import TensorLike

MASKED = -1e30  # a finite stand-in for −inf: a row that sees no key stays finite
BLIND = 0.5 * MASKED  # a row whose largest score lies below sees no key
NEVER = 2**31 - 1  # key index that no query reaches


class AttentionMask(NamedTuple):
    """Who sees whom: query `t` sees key `s` if `k_index ≤ q_index` and the segments are equal.

    Attributes:
      q_index: `[B or 1, T]` int32. k_index: `[B or 1, S]` int32.
      q_segment, k_segment: the same shapes, int32.
    """

    q_index: tf.Tensor
    k_index: tf.Tensor
    q_segment: tf.Tensor
    k_segment: tf.Tensor


@plain
def causal_mask(length: int | tf.Tensor, segments: TensorLike | None = None) -> AttentionMask:
    """Returns the causal mask of one sequence length, isolated by segments where given.

    Args:
      length: T.
      segments: `[B, T]` int, or `None` for one segment.
    """
    index = tf.expand_dims(tf.range(length, dtype=tf.int32), 0)
    if segments is None:
        segments = tf.zeros_like(index)
    else:
        segments = tf.convert_to_tensor(segments)
        check(
            segments.shape.rank == 2,
            f"causal_mask: `segments` has rank {segments.shape.rank}, want 2 [B, T]",
        )
        segments = tf.cast(segments, tf.int32)
    return AttentionMask(index, index, segments, segments)


def allowed(mask: AttentionMask) -> tf.Tensor:
    """Returns the mask as `[B or 1, 1, T, S]` bool."""
    causal = tf.expand_dims(mask.k_index, 1) <= tf.expand_dims(mask.q_index, 2)
    same = tf.equal(tf.expand_dims(mask.k_segment, 1), tf.expand_dims(mask.q_segment, 2))
    return tf.expand_dims(tf.logical_and(causal, same), 1)


def check_attention(function: str, q: TensorLike, k: TensorLike, v: TensorLike, mask: AttentionMask) -> Dims:
    """Checks the shapes that all attention functions share."""
    dims = Dims(function)
    dims("q", q, "B H T P")
    dims("k", k, "B H S P")
    dims("v", v, "B H S U")
    for name, index, letter in zip(mask._fields, mask, "TSTS"):
        shape, want = static_shape(index), getattr(dims, letter)
        check(len(shape) == 2, f"{function}: `mask.{name}` has rank {len(shape)}, want 2 [B or 1, {letter}]")
        rows, size = shape
        check(
            size is None or want is None or size == want,
            f"{function}: `mask.{name}` has length {size}, want {want} [{letter}]",
        )
        check(
            rows in (None, 1, dims.B) or dims.B is None,
            f"{function}: `mask.{name}` has {rows} rows, want {dims.B} or 1 [B or 1]",
        )
    return dims


@plain
def attention_naive(q: TensorLike, k: TensorLike, v: TensorLike, mask: AttentionMask, *, scale: float) -> tf.Tensor:
    """`softmax(scale·q kᵀ + mask) v` with all scores at once; the softmax is in float32.

    Args:
      q: `[B, H, T, P]`; k: `[B, H, S, P]`; v: `[B, H, S, U]`.
      mask: see `AttentionMask`.
      scale: multiplies the scores.

    Returns:
      `[B, H, T, U]` in `q`'s dtype. A query that sees no key gives zeros.
    """
    check_attention("attention_naive", q, k, v, mask)
    scores = tf.cast(tf.matmul(q, k, transpose_b=True), tf.float32) * scale
    seen = allowed(mask)
    probs = tf.where(seen, tf.nn.softmax(tf.where(seen, scores, MASKED), -1), 0.0)
    return tf.matmul(tf.cast(probs, v.dtype), v)


@plain
def attention(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    mask: AttentionMask,
    *,
    scale: float,
    causal: bool = False,
    block: int = 256,
    max_unroll: int = 16,
    keep: int = 1024,
    fuse: bool = False,
) -> tf.Tensor:
    """`softmax(scale·q kᵀ + mask) v` in blocks of queries; for long sequences the backward recomputes the probabilities.

    Args:
      q: `[B, H, T, P]`; k: `[B, H, S, P]`; v: `[B, H, S, U]`, static T and S.
      mask: see `AttentionMask`.
      scale: multiplies the scores.
      causal: promises that each query sees the key at its own place and none behind it (T = S), so that blocks of keys
        behind are left out.
      block: queries of a block.
      max_unroll: with more blocks than this, tiles are computed in loops with an online softmax, whose memory does not
        grow with T.
      keep: up to so many keys the backward gets the blocks' probabilities from the forward pass, as they take less memory
        than a layer's other values; 0 always recomputes.
      fuse: use the kernels that are fast outside XLA: TensorFlow's softmax, and compiled element-wise chains.

    Returns:
      `[B, H, T, U]` in `q`'s dtype; zeros for a query that sees no key. Differentiable (once) in `q`, `k` and `v`.

    References: arXiv:2205.14135 (the recomputing backward and the online softmax).
    """
    from dsv3.ops import attention_blocks, attention_tiles

    dims = check_attention("attention", q, k, v, mask)
    check(
        dims.T is not None and dims.S is not None,
        "attention: `q` and `k` have unknown lengths, want static T and S",
    )
    check(not causal or dims.T == dims.S, f"attention: causal=True wants T = S, but T={dims.T} and S={dims.S}")
    q, k, v = tf.convert_to_tensor(q), tf.convert_to_tensor(k), tf.convert_to_tensor(v)
    if -(-dims.T // block) <= max_unroll:
        how = {"scale": scale, "causal": causal, "block": block, "keep": dims.S <= keep, "fuse": fuse}
        return attention_blocks.apply(q, k, v, mask, **how)
    return attention_tiles.apply(q, k, v, mask, scale=scale, causal=causal, tile=block, fuse=fuse)
