"""Plain attention with a latent layer's weights: the keys and values of every head are kept, as without compression.

The same function as `mla_apply` with a cache, for comparison: what a latent cache saves, and what it costs.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims
from dsv3.config import MLAConfig
from dsv3.graph import plain
from dsv3.nn.heads import heads_last
from dsv3.nn.linear import linear_apply, weight_matrix
from dsv3.nn.mla import MLAParams, mla_expand, mla_queries, mla_rope
from dsv3.ops.attention import MASKED
from dsv3.ops.rope import RopeTable
from dsv3.policy import ComputePolicy, default_policy
from dsv3.typing import TensorLike


class PlainCache(NamedTuple):
    """One layer's past: `k` `[B, H, S, P+R]`, `v` `[B, H, S, U]`, and `length` `[B]` int32, tokens in it."""

    k: tf.Tensor
    v: tf.Tensor
    length: tf.Tensor


def plain_cache_values(cfg: MLAConfig) -> int:
    """Returns how many values a `PlainCache` holds for a token, `H·(P+R+U)`; a latent cache holds `L+R`."""
    return cfg.num_heads * (cfg.qk_dim + cfg.v_dim)


@plain
def plain_apply(
    params: MLAParams,
    x: TensorLike,
    entry: TensorLike,
    cache: PlainCache,
    *,
    cfg: MLAConfig,
    table: RopeTable | None = None,
    policy: ComputePolicy | None = None,
) -> tf.Tensor:
    """Computes `mla_apply(params, x, cache=...).out` for one new token a row from keys and values that were kept.

    Args:
      params: see `MLAParams`.
      x: `[B, 1, D]`.
      entry: `[B, 1, L+R]`, the new token's, as `mla_apply` returns it; its keys and values are made here.
      cache: the past, of keys and values that `mla_expand` made.
      cfg, table, policy: as of `mla_apply`.

    Returns:
      `[B, 1, D]`.
    """
    policy = policy or default_policy()
    dims = Dims("plain_apply", D=cfg.hidden_size, W=cfg.cache_width, H=cfg.num_heads, P=cfg.qk_dim, U=cfg.v_dim)
    for name, value, letters in (
        ("x", x, "B 1 D"), ("entry", entry, "B 1 W"), ("cache.k", cache.k, "B H S P"), ("cache.v", cache.v, "B H S U"),
        ("cache.length", cache.length, "B"),
    ):  # fmt: skip
        dims(name, value, letters)
    if table is None:
        table = mla_rope(cfg, tf.expand_dims(cache.length, -1))
    q = mla_queries(params, x, table, cfg=cfg, policy=policy)
    new_k, new_v = mla_expand(params, tf.cast(entry, q.dtype), cfg=cfg, policy=policy)
    k, v = (tf.cast(part, q.dtype) for part in (cache.k, cache.v))
    filled = tf.expand_dims(tf.range(tf.shape(k)[2]), 0) < tf.expand_dims(cache.length, -1)
    past = tf.where(filled[:, tf.newaxis, tf.newaxis], tf.matmul(q, k, transpose_b=True), tf.cast(MASKED, q.dtype))
    scores = tf.concat([past, tf.matmul(q, new_k, transpose_b=True)], -1)
    probs = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32), -1), q.dtype)
    heads = tf.matmul(probs[..., :-1], v) + probs[..., -1:] * new_v
    o = weight_matrix(params.o, cfg.num_heads * cfg.v_dim)
    how = {"fp8": policy.fp8, "after_attention": True, "fuse": policy.fuse}
    return linear_apply(heads_last(heads, fuse=policy.fuse), o, params.o_bias, **how)
