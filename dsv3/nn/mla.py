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
from dsv3.nn.linear import linear_apply, weight_matrix
from dsv3.ops.attention import MASKED, NEVER, AttentionMask, attention, attention_naive, causal_mask
from dsv3.ops.fuse import fused
from dsv3.ops.latent import latent_bytes, latent_pack, latent_unpack
from dsv3.ops.norm import rms_norm
from dsv3.ops.quantized import QuantizedWeight, column_scales, quantized_matmul
from dsv3.ops.rope import RopeTable, rope_apply, rope_frequencies, rope_table, yarn_mscale
from dsv3.policy import ComputePolicy, default_policy
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike

FORMS = ("auto", "expanded", "absorbed", "naive")


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
    if cache is not None:
        cache = cache._replace(kv=_read(cache.kv, cfg, entry.dtype, fuse=policy.fuse))
    if form == "auto":
        form = "absorbed" if cache is not None and _absorbing_is_cheaper(cfg, x.shape[1]) else "expanded"
    if form == "absorbed":
        q = _queries(params, x, cfg=cfg, policy=policy)
        heads = _absorbed(params, q, entry, table, cache, segments, cfg=cfg)
    else:
        q = _queries(params, x, cfg=cfg, policy=policy, halves=True)
        heads = _expanded(params, q, entry, table, cache, segments, cfg=cfg, policy=policy, naive=form == "naive")
    o = weight_matrix(params.o, cfg.num_heads * cfg.v_dim)
    out = linear_apply(heads, o, params.o_bias, fp8=policy.fp8, after_attention=True, fuse=policy.fuse)
    return MLAOutput(out, kept)


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
            q = _rope_halves(tf.reshape(q, [*_lead(q), cfg.num_heads, cfg.qk_dim]), cfg.rope_dim)
            return tf.reshape(q, [*_lead(q), cfg.num_heads * cfg.qk_dim])
        if isinstance(weight, DelayedWeight):
            weight = weight._replace(weight=_rope_halves(weight.weight, cfg.rope_dim))
        else:
            weight = _rope_halves(weight, cfg.rope_dim)
    return linear_apply(x, weight, **how)


def _rope_halves(x: tf.Tensor, rope_dim: int) -> tf.Tensor:
    """Moves interleaved pairs in the last `rope_dim` columns to halves: (.., a0, b0, a1, b1) to (.., a0, a1, b0, b1)."""
    lead = [tf.shape(x)[i] if size is None else size for i, size in enumerate(x.shape[:-1])]
    nope, rot = tf.split(x, [x.shape[-1] - rope_dim, rope_dim], axis=-1)
    rot = tf.reshape(tf.linalg.matrix_transpose(tf.reshape(rot, [*lead, rope_dim // 2, 2])), [*lead, rope_dim])
    return tf.concat([nope, rot], -1)


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


# Both transpose first: XLA on a CPU writes a transposition at the end of a chain element by element.


@fused
def _heads_first(q, cos, sin, *, heads, rope_dim, scale):
    """`[B, T, H·(P+R)]` with pairs in halves to rotated and scaled `[B, H, T, P+R]`, in halves too."""
    q = tf.transpose(tf.reshape(q, [*_lead(q), heads, q.shape[-1] // heads]), [0, 2, 1, 3])
    nope, a, b = tf.split(q, [q.shape[-1] - rope_dim, rope_dim // 2, rope_dim // 2], axis=-1)
    cos, sin = (tf.expand_dims(tf.cast(t, q.dtype), 1) for t in (cos, sin))
    q_rotated = tf.concat([nope, a * cos - b * sin, b * cos + a * sin], -1)
    return tf.cast(tf.cast(q_rotated, tf.float32) * scale, q.dtype)  # a rounded scale would be another temperature


@fused
def _keys_values(kv, k_rope, *, heads, nope_dim):
    """`[B, S, H·(P+U)]` and the shared rotary keys `[B, S, R]` to `[B, H, S, P+R]` and `[B, H, S, U]`."""
    kv = tf.transpose(tf.reshape(kv, [*_lead(kv), heads, kv.shape[-1] // heads]), [0, 2, 1, 3])
    k_nope, v = tf.split(kv, [nope_dim, kv.shape[-1] - nope_dim], axis=-1)
    shape = tf.concat([tf.shape(k_nope)[:3], [k_rope.shape[-1]]], 0)
    return tf.concat([k_nope, tf.broadcast_to(tf.expand_dims(k_rope, 1), shape)], -1), v


@fused
def _heads_last(heads):
    """`[B, H, T, U]` to `[B, T, H·U]`."""
    y = tf.transpose(heads, [0, 2, 1, 3])
    return tf.reshape(y, [*_lead(y), y.shape[2] * y.shape[3]])


def _lead(x: tf.Tensor) -> list:
    """The first two dims, static where known."""
    return [x.shape[i] if x.shape[i] is not None else tf.shape(x)[i] for i in (0, 1)]


def _expanded(params, q, entry, table, cache, segments, *, cfg, policy, naive) -> tf.Tensor:
    if cache is None:
        mask = causal_mask(q.shape[1] if q.shape[1] is not None else tf.shape(q)[1], segments)
    else:
        entry, mask = _with_past(entry, cache)
    # The scale goes into the queries, which are fewer than the scores.
    q = _heads_first(
        q, *table, heads=cfg.num_heads, rope_dim=cfg.rope_dim, scale=cfg.softmax_scale, fuse=policy.fuse
    )
    latent, k_rope = tf.split(entry, [cfg.kv_latent, cfg.rope_dim], axis=-1)
    if cfg.rope.output == "interleaved":
        k_rope = _rope_halves(k_rope, cfg.rope_dim)
    kv = linear_apply(latent, params.kv_b, fp8=policy.fp8, fuse=policy.fuse)
    k, v = _keys_values(kv, k_rope, heads=cfg.num_heads, nope_dim=cfg.nope_dim, fuse=policy.fuse)
    if naive or q.shape[2] is None or k.shape[2] is None:
        heads = attention_naive(q, k, v, mask, scale=1.0)
    else:
        heads = attention(
            q, k, v, mask, scale=1.0, causal=cache is None,
            block=policy.attention_block, max_unroll=policy.attention_unroll, keep=policy.attention_keep,
            fuse=policy.fuse,
        )  # fmt: skip
    return _heads_last(heads, fuse=policy.fuse)


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


def _absorbed(params, q, entry, table, cache, segments, *, cfg: MLAConfig) -> tf.Tensor:
    """Attends over latents: queries go through the keys' expansion, outputs through the values'."""
    h, p = cfg.num_heads, cfg.nope_dim
    if isinstance(params.k_up, tuple):
        params = mla_absorb(params, cfg=cfg)
    q = tf.reshape(q, [*_lead(q), h, cfg.qk_dim])
    rot = rope_apply(q[..., p:], table, pairs=cfg.rope.pairs, output=cfg.rope.output)
    wide = tf.concat([_per_head(q[..., :p], params.k_up, transpose=True), rot], -1)
    b, t = _lead(wide)
    wide = tf.reshape(wide, [b, t * h, cfg.cache_width])
    new_mask = _new_token_mask(t, segments)
    new_scores = _mask_heads(tf.matmul(wide, entry, transpose_b=True), new_mask, h)
    if cache is None:
        probs = tf.nn.softmax(tf.cast(new_scores, tf.float32) * cfg.softmax_scale, -1)
        latent = tf.matmul(tf.cast(probs, q.dtype), entry[..., : cfg.kv_latent])
    else:
        past = cache.kv
        slots = past.shape[1] if past.shape[1] is not None else tf.shape(past)[1]
        filled = tf.expand_dims(tf.range(slots), 0) < tf.expand_dims(cache.length, -1)
        past_scores = tf.where(
            tf.expand_dims(filled, 1), tf.matmul(wide, past, transpose_b=True), tf.cast(MASKED, q.dtype)
        )
        scores = tf.concat([past_scores, new_scores], -1)
        probs = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32) * cfg.softmax_scale, -1), q.dtype)
        # The rotary columns ride along: slicing them off a long cache would copy it.
        latent = tf.matmul(probs[..., :slots], past) + tf.matmul(probs[..., slots:], entry)
        latent = latent[..., : cfg.kv_latent]
    latent = tf.reshape(latent, [b, t, h, cfg.kv_latent])
    return tf.reshape(_per_head(latent, params.v_up), [b, t, h * cfg.v_dim])


def _per_head(x: tf.Tensor, weight: tf.Tensor | QuantizedWeight, *, transpose: bool = False) -> tf.Tensor:
    """Multiplies `[B, T, H, P]` by each head's `[P, L]` of `[H, P, L]`: `[B, T, H, L]`.

    With `transpose` a quantised weight is `[H, L, P]`.
    """
    b, t = _lead(x)
    rows = tf.reshape(tf.transpose(x, [2, 0, 1, 3]), [x.shape[2], b * t, x.shape[3]])
    if isinstance(weight, QuantizedWeight):
        y = quantized_matmul(rows, weight, transpose=transpose)
    else:
        y = tf.matmul(rows, tf.cast(weight, x.dtype))
    return tf.transpose(tf.reshape(y, [x.shape[2], b, t, y.shape[2]]), [1, 2, 0, 3])


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
