"""Heads: the layouts in which attention wants queries, keys, values and outputs."""

from __future__ import annotations

import tensorflow as tf

from dsv3.ops.fuse import fused
from dsv3.ops.quantized import QuantizedWeight, quantized_matmul


def rope_halves(x: tf.Tensor, rope_dim: int) -> tf.Tensor:
    """Moves interleaved pairs in the last `rope_dim` columns to halves: (.., a0, b0, a1, b1) to (.., a0, a1, b0, b1)."""
    lead = [tf.shape(x)[i] if size is None else size for i, size in enumerate(x.shape[:-1])]
    nope, rot = tf.split(x, [x.shape[-1] - rope_dim, rope_dim], axis=-1)
    rot = tf.reshape(tf.linalg.matrix_transpose(tf.reshape(rot, [*lead, rope_dim // 2, 2])), [*lead, rope_dim])
    return tf.concat([nope, rot], -1)


# These transpose first: XLA on a CPU writes a transposition at the end of a chain element by element. Differentiation would
# put it there, so the way back is written by hand.


@fused
def _heads_back(d, cos, sin, *, rope_dim, scale):
    """`[B, H, T, P+R]` to `[B, T, H·(P+R)]`, turned back and scaled."""
    cos, sin = (tf.expand_dims(t, 2) for t in (cos, -sin))
    d = _turn(tf.transpose(d, [0, 2, 1, 3]), cos, sin, rope_dim, scale)
    return tf.reshape(d, [*lead_dims(d), d.shape[2] * d.shape[3]])


def _heads_first_gradient(q, cos, sin, d, *, heads, rope_dim, scale):
    return _heads_back(d, cos, sin, rope_dim=rope_dim, scale=scale, fuse=True), None, None


@fused(gradient=_heads_first_gradient)
def heads_first(q, cos, sin, *, heads, rope_dim, scale):
    """`[B, T, H·(P+R)]` with pairs in halves to rotated and scaled `[B, H, T, P+R]`, in halves too."""
    q = tf.transpose(tf.reshape(q, [*lead_dims(q), heads, q.shape[-1] // heads]), [0, 2, 1, 3])
    return _turn(q, *(tf.expand_dims(t, 1) for t in (cos, sin)), rope_dim, scale)


def _turn(x, cos, sin, rope_dim, scale):
    """Rotates the last `rope_dim` columns, pairs in halves, and scales all."""
    nope, a, b = tf.split(x, [x.shape[-1] - rope_dim, rope_dim // 2, rope_dim // 2], axis=-1)
    cos, sin = tf.cast(cos, x.dtype), tf.cast(sin, x.dtype)
    rotated = tf.concat([nope, a * cos - b * sin, b * cos + a * sin], -1)
    return tf.cast(tf.cast(rotated, tf.float32) * scale, x.dtype)  # a rounded scale would be another temperature


@fused
def _sum_heads(d_k, *, nope_dim):
    """The shared rotary keys' gradient `[B, S, R]`, of `[B, H, S, P+R]`."""
    return tf.cast(tf.reduce_sum(tf.cast(d_k[..., nope_dim:], tf.float32), 1), d_k.dtype)


def _keys_values_gradient(kv, k_rope, d_k, d_v, *, heads, nope_dim):
    d_kv = tf.transpose(tf.concat([d_k[..., :nope_dim], d_v], -1), [0, 2, 1, 3])  # plain: TensorFlow's own are the faster
    return tf.reshape(d_kv, tf.shape(kv)), _sum_heads(d_k, nope_dim=nope_dim, fuse=True)


@fused(gradient=_keys_values_gradient)
def keys_values(kv, k_rope, *, heads, nope_dim):
    """`[B, S, H·(P+U)]` and the shared rotary keys `[B, S, R]` to `[B, H, S, P+R]` and `[B, H, S, U]`."""
    kv = tf.transpose(tf.reshape(kv, [*lead_dims(kv), heads, kv.shape[-1] // heads]), [0, 2, 1, 3])
    k_nope, v = tf.split(kv, [nope_dim, kv.shape[-1] - nope_dim], axis=-1)
    shape = tf.concat([tf.shape(k_nope)[:3], [k_rope.shape[-1]]], 0)
    return tf.concat([k_nope, tf.broadcast_to(tf.expand_dims(k_rope, 1), shape)], -1), v


@fused
def heads_last(heads):
    """`[B, H, T, U]` to `[B, T, H·U]`."""
    y = tf.transpose(heads, [0, 2, 1, 3])
    return tf.reshape(y, [*lead_dims(y), y.shape[2] * y.shape[3]])


def lead_dims(x: tf.Tensor) -> list:
    """The first two dims, static where known."""
    return [x.shape[i] if x.shape[i] is not None else tf.shape(x)[i] for i in (0, 1)]


def per_head(x: tf.Tensor, weight: tf.Tensor | QuantizedWeight, *, transpose: bool = False) -> tf.Tensor:
    """Multiplies `[B, T, H, P]` by each head's `[P, L]` of `[H, P, L]`: `[B, T, H, L]`.

    With `transpose` a quantised weight is `[H, L, P]`.
    """
    b, t = lead_dims(x)
    rows = tf.reshape(tf.transpose(x, [2, 0, 1, 3]), [x.shape[2], b * t, x.shape[3]])
    if isinstance(weight, QuantizedWeight):
        y = quantized_matmul(rows, weight, transpose=transpose)
    else:
        y = tf.matmul(rows, tf.cast(weight, x.dtype))
    return tf.transpose(tf.reshape(y, [x.shape[2], b, t, y.shape[2]]), [1, 2, 0, 3])
