"""Attention of a few new tokens over a long past, whose keys and values are made tile by tile, with an online softmax.

A latent cache holds no keys and values: expanding all of it at once, and a score for each of its slots, would take far more
memory than the cache itself. Here neither ever exists, and tiles that no row has filled are not visited.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from dsv3.checks import Dims, check
from dsv3.graph import plain
from dsv3.ops.attention import MASKED, NEVER
from dsv3.ops.attention_tiles import tile_update
from dsv3.typing import TensorLike

Expand = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""`expand(entries)`: keys `[B, H, n, P]` and values `[B, H, n, U]` of cache entries `[B, n, W]`."""


@plain
def attention_past(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    past: TensorLike,
    length: TensorLike,
    expand: Expand,
    *,
    scale: float,
    tile: int,
    fuse: bool = False,
) -> tf.Tensor:
    """`softmax(scale·q [k_past, k]ᵀ + mask) [v_past, v]`: new tokens see the past and the new tokens up to themselves.

    Args:
      q: `[B, H, N, P]`, rows of queries in the order of their tokens, the same number for each of the T new tokens.
      k: `[B, H, T, P]`; v: `[B, H, T, U]`: of the new tokens.
      past: `[B, S, W]`, cache entries. length: `[B]` int32, how many of the S slots a row has filled.
      expand: makes keys and values of entries, see `Expand`.
      scale: multiplies the scores.
      tile: slots of a tile.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[B, H, N, U]` in `q`'s dtype.

    Raises:
      ValueError: wrong shapes, a number of rows that is no multiple of T, or sizes that are not static.

    References: arXiv:2205.14135 (the online softmax); DeepSeek-V2 (arXiv:2405.04434) section 2.1 (what a cache holds).
    """
    q, k, v, past = (tf.convert_to_tensor(x) for x in (q, k, v, past))
    dims = Dims("attention_past")
    for name, value, letters in (
        ("q", q, "B H N P"), ("k", k, "B H T P"), ("v", v, "B H T U"), ("past", past, "B S W"), ("length", length, "B"),
    ):  # fmt: skip
        dims(name, value, letters)
    check(None not in (dims.N, dims.T, dims.S), "attention_past: unknown sizes, want static N, T and S")
    check(dims.N % dims.T == 0, f"attention_past: `q` has {dims.N} rows [N], want a multiple of the {dims.T} tokens [T]")
    check(tile > 0, f"attention_past: `tile` is {tile}, want > 0")
    tile, length = max(1, min(tile, dims.S)), tf.convert_to_tensor(length)
    step = tf.expand_dims(tf.repeat(tf.range(dims.T), dims.N // dims.T), 0)

    def update(state, k, v, k_index):
        blank = [tf.zeros_like(index) for index in (step, k_index)]
        scores = tf.matmul(q, k, transpose_b=True)
        probs, top, total, acc = tile_update(scores, *state, step, k_index, *blank, scale=scale, fuse=fuse)
        return top, total, acc + tf.cast(tf.matmul(probs, v), tf.float32)

    def body(i, *state):
        # The last tile begins earlier, so as not to end beyond the cache: its first slots have been seen.
        start = tf.minimum(i * tile, dims.S - tile)
        slots = tf.expand_dims(start + tf.range(tile), 0)
        new = tf.logical_and(slots >= i * tile, slots < tf.expand_dims(length, -1))
        return i + 1, *update(state, *expand(_slots(past, start, tile)), tf.where(new, 0, NEVER))

    lead = tf.unstack(tf.shape(q)[:3])
    empty = tf.fill([*lead, 1], MASKED), tf.zeros([*lead, 1]), tf.zeros([*lead, v.shape[3]])
    empty = [tf.ensure_shape(part, [*q.shape[:3], part.shape[-1]]) for part in empty]
    state = update(empty, k, v, tf.expand_dims(tf.range(dims.T), 0))  # first: from here on each row has seen a key
    tiles = -(-tf.reduce_max(length) // tile)
    _, _, total, acc = tf.while_loop(lambda i, *_: i < tiles, body, [0, *state], parallel_iterations=1)
    return tf.cast(acc / total, q.dtype)


def _slots(past: tf.Tensor, start: tf.Tensor, size: int) -> tf.Tensor:
    """`past[:, start : start + size]`."""
    rows = past.shape[0] if past.shape[0] is not None else tf.shape(past)[0]
    found = tf.slice(past, [0, start, 0], [rows, size, past.shape[2]])
    return tf.ensure_shape(found, [past.shape[0], size, past.shape[2]])
