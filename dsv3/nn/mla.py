"""Multi-head latent attention: keys and values come from one small latent, which is all that decoding must keep.

Two forms of the same function. *Expanded* computes every head's keys and values from the latents: cheapest when many
queries share them (training, prefill). *Absorbed* folds the expansion into queries and outputs and attends over the
latents themselves: cheapest for a few new tokens against a long cache.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_choice, check_type
from dsv3.config import LATENT_NORM_EPS, MLAConfig
from dsv3.graph import plain
from dsv3.nn.fp8_delayed import DelayedWeight
from dsv3.nn.heads import heads_first, heads_last, keys_values, lead_dims, per_head, rope_halves
from dsv3.nn.linear import linear_apply, weight_matrix
from dsv3.ops.attention import MASKED, NEVER, AttentionMask, attention, attention_naive, causal_mask
from dsv3.ops.attention_past import attention_past
from dsv3.ops.fuse import fused
from dsv3.ops.latent import latent_bytes, latent_pack, latent_unpack
from dsv3.ops.norm import rms_norm
from dsv3.ops.quantized import QuantizedWeight, column_scales
from dsv3.ops.rope import RopeTable, rope_apply, rope_frequencies, rope_table, yarn_mscale
from dsv3.policy import ComputePolicy, default_policy
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike

FORMS = ("auto", "expanded", "absorbed", "naive")
_PAST_BLOCKS = 4  # blocks of queries whose size a tile of the past has: a score costs less there than expanding its key


class MLAParams(NamedTuple):
    """Parameters of one attention layer; `()` for parts that the config leaves out.

    Attributes:
      q_a: `[D, Q]`, q_norm: `[Q]`; both `()` without query compression.
      q_b: `[Q, H, P+R]`, per head first the part without position; `[D, H, P+R]` without query compression.
      kv_a: `[D, L+R]`: the latent, then the shared rotary key. kv_norm: `[L]`.
      kv_b: `[L, H, P+U]`: per head keys, then values.
      o: `[H, U, D]`.
      q_a_bias `[Q]`, kv_a_bias `[L+R]`, o_bias `[D]`: with `MLAConfig.bias`.
      k_up: `[H, P, L]`, v_up: `[H, L, U]`: kv_b again, as the absorbed form reads it; `()` unless `mla_absorb` made them.

    q_a, q_b, kv_a, kv_b and o may each be a `QuantizedWeight`. If kv_b is one, so are k_up, then `[H, L, P]`, and v_up.
    """

    q_a: tf.Tensor
    q_norm: tf.Tensor
    q_b: tf.Tensor
    kv_a: tf.Tensor
    kv_norm: tf.Tensor
    kv_b: tf.Tensor
    o: tf.Tensor
    q_a_bias: tf.Tensor
    kv_a_bias: tf.Tensor
    o_bias: tf.Tensor
    k_up: tf.Tensor = ()
    v_up: tf.Tensor = ()


class LayerCache(NamedTuple):
    """One layer's past: `kv` `[B, S, L+R]` (normalised latent, rotated key) and `length` `[B]` int32, tokens in it.

    In FP8 `kv` is `[B, S, bytes]` `uint8`, see `ops.latent`.
    """

    kv: tf.Tensor
    length: tf.Tensor


class MLAOutput(NamedTuple):
    """`out` `[B, T, D]`, and `entry` `[B, T, L+R]`: what a cache must keep of these tokens; bytes if that is in FP8."""

    out: tf.Tensor
    entry: tf.Tensor


def mla_specs(cfg: MLAConfig, *, std: float) -> MLAParams:
    """Returns the `ParamSpec`s of one attention layer.

    Args:
      cfg: the layer's configuration.
      std: standard deviation of initial weights.
    """
    d, h = cfg.hidden_size, cfg.num_heads
    q_in = cfg.q_latent or d
    compressed, biased = cfg.q_latent is not None, cfg.bias

    def norm(size: int, axis: str) -> ParamSpec:
        return ParamSpec((size,), (axis,), init="ones")

    def bias(size: int, axis: str) -> ParamSpec:
        return ParamSpec((size,), (axis,), init="zeros")

    return MLAParams(
        q_a=ParamSpec((d, q_in), ("embed", "q_latent"), std=std) if compressed else (),
        q_norm=norm(q_in, "q_latent") if compressed else (),
        q_b=ParamSpec((q_in, h, cfg.qk_dim), ("q_latent" if compressed else "embed", "heads", "head_dim"), std=std),
        kv_a=ParamSpec((d, cfg.cache_width), ("embed", "kv_latent"), std=std),
        kv_norm=norm(cfg.kv_latent, "kv_latent"),
        kv_b=ParamSpec((cfg.kv_latent, h, cfg.nope_dim + cfg.v_dim), ("kv_latent", "heads", "head_dim"), std=std),
        o=ParamSpec((h, cfg.v_dim, d), ("heads", "head_dim", "embed"), std=std),
        q_a_bias=bias(q_in, "q_latent") if compressed and biased else (),
        kv_a_bias=bias(cfg.cache_width, "kv_latent") if biased else (),
        o_bias=bias(d, "embed") if biased else (),
    )


@plain
def mla_absorb(params: MLAParams, *, cfg: MLAConfig) -> MLAParams:
    """Adds kv_b in the layout that the absorbed form reads, so that decoding does not transpose it at every step.

    Args:
      params: of one layer, or of stacked layers with a leading dim.
      cfg: the layer's configuration.

    Returns:
      The parameters with `k_up` and `v_up`. They are for decoding: nothing else keeps them in step with kv_b.
    """
    if isinstance(params.kv_b, QuantizedWeight):
        return _absorb_quantized(params, cfg)
    lead = list(range(len(params.kv_b.shape) - 3))
    latent, head, dim = (len(lead) + i for i in range(3))
    keys, values = tf.split(params.kv_b, [cfg.nope_dim, cfg.v_dim], axis=-1)
    return params._replace(
        k_up=tf.transpose(keys, [*lead, head, dim, latent]), v_up=tf.transpose(values, [*lead, head, latent, dim])
    )


def _absorb_quantized(params: MLAParams, cfg: MLAConfig) -> MLAParams:
    """kv_b with heads first, every head's columns with scales of their own: products then read either side of it."""
    values, scale = params.kv_b
    *lead, latent, heads, width = values.shape
    scale = column_scales(scale, heads * width)
    groups = scale.shape[-2]
    first = list(range(len(lead)))
    order = [len(lead) + i for i in (1, 0, 2)]
    values = tf.transpose(values, [*first, *order])
    scale = tf.expand_dims(tf.transpose(tf.reshape(scale, [*lead, groups, heads, width]), [*first, *order]), -2)
    pairs = [tf.split(t, [cfg.nope_dim, cfg.v_dim], axis=-1) for t in (values, scale)]
    keys, outputs = (QuantizedWeight(*pair) for pair in zip(*pairs))
    return params._replace(k_up=keys, v_up=outputs)


@plain
def mla_rope(cfg: MLAConfig, positions: TensorLike) -> RopeTable:
    """Returns the cosines and sines of positions (`[B, T]` or `[T]`, in tokens) under the config's RoPE and YaRN."""
    rope, yarn = cfg.rope, cfg.rope.active_yarn
    if yarn is None:
        return rope_table(positions, rope_frequencies(rope.dim, rope.theta))
    freqs = rope_frequencies(
        rope.dim,
        rope.theta,
        factor=yarn.factor,
        original_length=yarn.original_length,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
    )
    factor = yarn.attention_factor
    if factor is None and yarn.mscale and yarn.mscale_all_dim:
        factor = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    elif factor is None:
        factor = yarn_mscale(yarn.factor)
    return rope_table(positions, freqs, factor=factor)


@plain
def mla_apply(
    params: MLAParams,
    x: TensorLike,
    *,
    cfg: MLAConfig,
    table: RopeTable | None = None,
    segments: TensorLike | None = None,
    cache: LayerCache | None = None,
    form: str = "auto",
    policy: ComputePolicy | None = None,
) -> MLAOutput:
    """Causal multi-head latent attention over new tokens and, if given, a cached past.

    Args:
      params: see `MLAParams`.
      x: `[B, T, D]`.
      cfg: the layer's configuration.
      table: cos and sin of the tokens' positions, from `mla_rope`; default: positions 0.. T−1, after the past if there is
        one.
      segments: `[B, T]` int: tokens see only their own segment. Padding is a segment of its own. Not with a cache.
      cache: the past; row `b` has `cache.length[b]` tokens, and new token `t` sees them and the new tokens up to itself.
      form: `"expanded"`, `"absorbed"`, `"naive"` (expanded, all scores at once) or `"auto"`.
      policy: how to compute; default: the device's.

    Returns:
      `MLAOutput`. The cache itself is not changed: see `nn.cache`.

    References: DeepSeek-V3 section 2.1.1; DeepSeek-V2 (arXiv:2405.04434) appendix C for the absorbed form.
    """
    check_choice("mla_apply", "form", form, FORMS)
    check_type("mla_apply", "cfg", cfg, MLAConfig)
    check_type("mla_apply", "params", params, MLAParams)
    policy = policy or default_policy()
    packed = policy.cache == "float8" or (cache is not None and cache.kv.dtype == tf.uint8)
    width = cfg.cache_width if cache is None or cache.kv.dtype != tf.uint8 else latent_bytes(cfg.kv_latent, cfg.rope_dim)
    dims = Dims("mla_apply", D=cfg.hidden_size, W=width)
    dims("x", x, "B T D")
    if segments is not None:
        dims("segments", segments, "B T")
        check(cache is None, "mla_apply: `segments` and `cache` exclude each other: a cache row is one sequence")
    if cache is not None:
        dims("cache.kv", cache.kv, "B S W")
        dims("cache.length", cache.length, "B")
    x = tf.convert_to_tensor(x)
    if table is None:
        steps = tf.range(tf.shape(x)[1])
        table = mla_rope(cfg, steps if cache is None else tf.expand_dims(cache.length, -1) + steps)
    entry = kept = _latents(params, x, table, cfg=cfg, policy=policy)
    if packed:  # attention reads what the cache will hold, so that it sees the same however a text is cut into steps
        kept = latent_pack(entry, rope=cfg.rope_dim, fuse=policy.fuse)
        entry = _read(kept, cfg, entry.dtype, fuse=policy.fuse)
    if form == "auto":
        form = "absorbed" if cache is not None and _absorbing_is_cheaper(cfg, x.shape[1]) else "expanded"
    tile = None if cache is None or form == "naive" else _past_tile(cache, x.shape[1], form, cfg=cfg, policy=policy)
    if cache is not None and tile is None:
        cache = cache._replace(kv=_read(cache.kv, cfg, entry.dtype, fuse=policy.fuse))
    if form == "absorbed":
        q = _queries(params, x, cfg=cfg, policy=policy)
        heads = _absorbed(params, q, entry, table, cache, segments, cfg=cfg, policy=policy, tile=tile)
    else:
        q = mla_queries(params, x, table, cfg=cfg, policy=policy)
        how = {"cfg": cfg, "policy": policy, "naive": form == "naive", "tile": tile}
        heads = _expanded(params, q, entry, cache, segments, **how)
    o = weight_matrix(params.o, cfg.num_heads * cfg.v_dim)
    out = linear_apply(heads, o, params.o_bias, fp8=policy.fp8, after_attention=True, fuse=policy.fuse)
    return MLAOutput(out, kept)


@plain
def mla_queries(
    params: MLAParams, x: TensorLike, table: RopeTable, *, cfg: MLAConfig, policy: ComputePolicy | None = None
) -> tf.Tensor:
    """Returns every head's queries, rotated and scaled, for the keys that `mla_expand` makes.

    Args:
      params: see `MLAParams`.
      x: `[B, T, D]`.
      table: cos and sin of the tokens' positions.
      cfg, policy: as of `mla_apply`.

    Returns:
      `[B, H, T, P+R]`. The scale of the softmax is in them, as queries are fewer than scores.
    """
    policy = policy or default_policy()
    q = _queries(params, tf.convert_to_tensor(x), cfg=cfg, policy=policy, halves=True)
    how = {"heads": cfg.num_heads, "rope_dim": cfg.rope_dim, "scale": cfg.softmax_scale}
    return heads_first(q, *table, **how, fuse=policy.fuse)


@plain
def mla_expand(
    params: MLAParams,
    entries: TensorLike,
    *,
    cfg: MLAConfig,
    policy: ComputePolicy | None = None,
    dtype: tf.DType | str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Expands cache entries to every head's keys and values: what plain attention with the same heads would keep.

    Args:
      params: see `MLAParams`; only kv_b is read.
      entries: `[B, S, L+R]`, or `[B, S, bytes]` `uint8`.
      cfg, policy: as of `mla_apply`.
      dtype: of the results; default: the entries', or the compute dtype for bytes.

    Returns:
      `[B, H, S, P+R]`, in which rotated pairs lie in halves, and `[B, H, S, U]`.
    """
    policy = policy or default_policy()
    entries = tf.convert_to_tensor(entries)
    if dtype is None:
        dtype = entries.dtype if entries.dtype != tf.uint8 else policy.compute_dtype or tf.bfloat16
    latent, k_rope = tf.split(_read(entries, cfg, dtype, fuse=policy.fuse), [cfg.kv_latent, cfg.rope_dim], axis=-1)
    if cfg.rope.output == "interleaved":
        k_rope = rope_halves(k_rope, cfg.rope_dim)
    kv = linear_apply(latent, params.kv_b, fp8=policy.fp8, fuse=policy.fuse)
    return keys_values(kv, k_rope, heads=cfg.num_heads, nope_dim=cfg.nope_dim, fuse=policy.fuse)


def _read(kv: tf.Tensor, cfg: MLAConfig, dtype: tf.DType, *, fuse: bool) -> tf.Tensor:
    """Entries `[B, S, L+R]` in a dtype, as attention reads them."""
    if kv.dtype != tf.uint8:
        return tf.cast(kv, dtype)
    return latent_unpack(kv, latent=cfg.kv_latent, rope=cfg.rope_dim, dtype=dtype, fuse=fuse)


def _absorbing_is_cheaper(cfg: MLAConfig, new_tokens: int | None) -> bool:
    """Compares multiplications per cached token and head: absorbed scores are wide, expanding costs once a token."""
    absorbed = cfg.cache_width + cfg.kv_latent
    expanded = cfg.qk_dim + cfg.v_dim
    expansion = cfg.kv_latent * (cfg.nope_dim + cfg.v_dim)
    return new_tokens is not None and new_tokens * absorbed <= new_tokens * expanded + expansion


def _queries(params: MLAParams, x, *, cfg: MLAConfig, policy: ComputePolicy, halves: bool = False) -> tf.Tensor:
    """`[B, T, H·(P+R)]`, not yet rotated; `halves` has the pairs to rotate in halves, however they lie in the weights."""
    how = {"fp8": policy.fp8, "fuse": policy.fuse}
    if cfg.q_latent is not None:
        x = linear_apply(x, params.q_a, params.q_a_bias, **how)
        x = rms_norm(x, params.q_norm, eps=LATENT_NORM_EPS, rounding=cfg.norm_rounding, fuse=policy.fuse)
    weight = params.q_b
    if halves and cfg.rope.pairs == "interleaved":  # on the weights: on the queries it costs more than the rotation
        if isinstance(weight, QuantizedWeight):  # its columns have scales in blocks: there it must be the queries
            q = linear_apply(x, weight, **how)
            q = rope_halves(tf.reshape(q, [*lead_dims(q), cfg.num_heads, cfg.qk_dim]), cfg.rope_dim)
            return tf.reshape(q, [*lead_dims(q), cfg.num_heads * cfg.qk_dim])
        if isinstance(weight, DelayedWeight):
            weight = weight._replace(weight=rope_halves(weight.weight, cfg.rope_dim))
        else:
            weight = rope_halves(weight, cfg.rope_dim)
    return linear_apply(x, weight, **how)


def _latents(params: MLAParams, x, table: RopeTable, *, cfg: MLAConfig, policy: ComputePolicy) -> tf.Tensor:
    """`[B, T, L+R]`: the normalised latent and the rotated shared key (which is not normalised)."""
    latent = linear_apply(x, params.kv_a, params.kv_a_bias, fp8=policy.fp8, fuse=policy.fuse)
    return _finish_latents(
        latent, params.kv_norm, *table, rope=cfg.rope, rounding=cfg.norm_rounding, fuse=policy.fuse
    )


@fused
def _finish_latents(latent, weight, cos, sin, *, rope, rounding):
    latent, k_rope = tf.split(latent, [latent.shape[-1] - rope.dim, rope.dim], axis=-1)
    latent = rms_norm(latent, weight, eps=LATENT_NORM_EPS, rounding=rounding)
    return tf.concat([latent, rope_apply(k_rope, RopeTable(cos, sin), pairs=rope.pairs, output=rope.output)], -1)


def _past_tile(cache: LayerCache, tokens: int | None, form: str, *, cfg: MLAConfig, policy: ComputePolicy) -> int | None:
    """Slots of a tile of a past that is read in tiles, or `None` for one that is short enough, or of unknown size.

    Read at once, it has a score for each slot in a block of queries, and is expanded as a whole.
    """
    slots, long = cache.kv.shape[1], policy.attention_block * policy.attention_unroll
    if slots is None or tokens is None or slots <= long:
        return None
    few = tokens * cfg.num_heads <= policy.attention_block if form == "absorbed" else tokens > long
    return None if few else _PAST_BLOCKS * policy.attention_block


def _expanded(params, q, entry, cache, segments, *, cfg, policy, naive, tile) -> tf.Tensor:
    how = {"cfg": cfg, "policy": policy}
    if tile:
        def expand(kv):
            return mla_expand(params, kv, dtype=q.dtype, **how)

        heads = attention_past(
            q, *expand(entry), cache.kv, cache.length, expand, scale=1.0, tile=tile, fuse=policy.fuse
        )
        return heads_last(heads, fuse=policy.fuse)
    if cache is None:
        mask = causal_mask(q.shape[2] if q.shape[2] is not None else tf.shape(q)[2], segments)
    else:
        entry, mask = _with_past(entry, cache)
    k, v = mla_expand(params, entry, **how)
    if naive or q.shape[2] is None or k.shape[2] is None:
        heads = attention_naive(q, k, v, mask, scale=1.0)
    else:
        block = policy.query_block(q.shape[2]) if cache is None else policy.attention_block
        heads = attention(
            q, k, v, mask, scale=1.0, causal=cache is None,
            block=block, max_unroll=policy.attention_unroll, keep=policy.attention_keep, fuse=policy.fuse,
        )  # fmt: skip
    return heads_last(heads, fuse=policy.fuse)


def _with_past(entry: tf.Tensor, cache: LayerCache) -> tuple[tf.Tensor, AttentionMask]:
    """Puts the past before the new tokens; the mask leaves out slots that a row has not filled."""
    past = cache.kv.shape[1] if cache.kv.shape[1] is not None else tf.shape(cache.kv)[1]
    steps = tf.range(tf.shape(entry)[1])
    slots = tf.expand_dims(tf.range(past), 0)
    length = tf.expand_dims(cache.length, -1)
    q_index = length + steps
    k_index = tf.concat([tf.where(slots < length, slots, NEVER), q_index], 1)
    mask = AttentionMask(q_index, k_index, tf.zeros_like(q_index), tf.zeros_like(k_index))
    return tf.concat([cache.kv, entry], 1), mask


def _absorbed(params, q, entry, table, cache, segments, *, cfg: MLAConfig, policy, tile) -> tf.Tensor:
    """Attends over latents: queries go through the keys' expansion, outputs through the values'."""
    h, p = cfg.num_heads, cfg.nope_dim
    if isinstance(params.k_up, tuple):
        params = mla_absorb(params, cfg=cfg)
    q = tf.reshape(q, [*lead_dims(q), h, cfg.qk_dim])
    rot = rope_apply(q[..., p:], table, pairs=cfg.rope.pairs, output=cfg.rope.output)
    wide = tf.concat([per_head(q[..., :p], params.k_up, transpose=True), rot], -1)
    b, t = lead_dims(wide)
    wide = tf.reshape(wide, [b, t * h, cfg.cache_width])
    if tile:
        def expand(entry):  # all heads have the same keys and values: their queries are rows of one
            return (tf.expand_dims(_read(entry, cfg, q.dtype, fuse=policy.fuse), 1),) * 2

        how = {"scale": cfg.softmax_scale, "tile": tile, "fuse": policy.fuse}
        latent = attention_past(tf.expand_dims(wide, 1), *expand(entry), cache.kv, cache.length, expand, **how)
    else:
        latent = _over_latents(wide, entry, cache, _new_token_mask(t, segments), cfg=cfg)
    latent = tf.reshape(latent[..., : cfg.kv_latent], [b, t, h, cfg.kv_latent])
    return tf.reshape(per_head(latent, params.v_up), [b, t, h * cfg.v_dim])


def _over_latents(wide, entry, cache: LayerCache | None, new_mask, *, cfg: MLAConfig) -> tf.Tensor:
    """`[B, T·H, L]` with all scores at once; further columns, if there are any, mean nothing."""
    new_scores = _mask_heads(tf.matmul(wide, entry, transpose_b=True), new_mask, cfg.num_heads)
    if cache is None:
        probs = tf.nn.softmax(tf.cast(new_scores, tf.float32) * cfg.softmax_scale, -1)
        return tf.matmul(tf.cast(probs, wide.dtype), entry[..., : cfg.kv_latent])
    past = cache.kv
    slots = past.shape[1] if past.shape[1] is not None else tf.shape(past)[1]
    filled = tf.expand_dims(tf.range(slots), 0) < tf.expand_dims(cache.length, -1)
    past_scores = tf.where(
        tf.expand_dims(filled, 1), tf.matmul(wide, past, transpose_b=True), tf.cast(MASKED, wide.dtype)
    )
    scores = tf.concat([past_scores, new_scores], -1)
    probs = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32) * cfg.softmax_scale, -1), wide.dtype)
    # The rotary columns ride along: slicing them off a long cache would copy it.
    return tf.matmul(probs[..., :slots], past) + tf.matmul(probs[..., slots:], entry)


def _new_token_mask(t, segments) -> tf.Tensor:
    """`[B or 1, T, T]` bool: which new tokens see each other."""
    steps = tf.range(t)
    mask = tf.expand_dims(tf.expand_dims(steps, 0) <= tf.expand_dims(steps, 1), 0)
    if segments is None:
        return mask
    segments = tf.convert_to_tensor(segments)
    return tf.logical_and(mask, tf.equal(tf.expand_dims(segments, 1), tf.expand_dims(segments, 2)))


def _mask_heads(scores: tf.Tensor, mask: tf.Tensor, heads: int) -> tf.Tensor:
    """Applies a `[B or 1, T, S]` mask to scores `[B, T·H, S]`."""
    return tf.where(tf.repeat(mask, heads, 1), scores, tf.cast(MASKED, scores.dtype))
