"""Where the references differ the side is a named option: a test for each side. Norms, RoPE and YaRN.

Expected values come from NumPy in this file or are written out; nothing here needs torch.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.config import RopeConfig, YarnConfig
from dsv3.nn.mla import mla_rope
from dsv3.nn.model import embed_apply
from dsv3.ops.norm import rms_norm
from dsv3.ops.rope import RopeTable, rope_apply, rope_frequencies, yarn_range
from dsv3.policy import default_policy

POLICY = default_policy().replace(fuse=False)
TINY = dsv3.preset("tiny")
YARN = YarnConfig(factor=40.0)


def config(**mla):
    """The tiny model with other attention settings; those of `RopeConfig` go there."""
    names = {f.name for f in dataclasses.fields(RopeConfig)}
    rope = dataclasses.replace(TINY.mla.rope, **{k: v for k, v in mla.items() if k in names})
    rest = {k: v for k, v in mla.items() if k not in names}
    return dataclasses.replace(TINY.mla, rope=rope, **rest)


def attention_params(seed=0):
    """One attention layer whose weights are large enough for positions and masks to matter."""
    rng = np.random.default_rng(seed)
    specs = dsv3.mla_specs(TINY.mla, std=1.0)
    return tree.map_leaves(lambda s: tf.constant(rng.normal(0.0, 0.4, s.shape), tf.float32), specs)


def hidden(rows=2, time=7, seed=1):
    return tf.constant(np.random.default_rng(seed).normal(size=(rows, time, TINY.hidden_size)), tf.float32)


def attend(params, x, cfg):
    return dsv3.mla_apply(params, x, cfg=cfg, policy=POLICY)


# RMSNorm's rounding


def norm_oracle(x, weight, rounding):
    y = x.astype(np.float64) / np.sqrt(np.mean(np.square(x.astype(np.float64)), -1, keepdims=True) + 1e-6)
    weight = weight.astype(np.float64)
    if rounding == "before_weight":
        y = y.astype(ml_dtypes.bfloat16).astype(np.float64)
    return (y * weight).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("rounding", ["before_weight", "after_weight"])
def test_norm_rounding_in_bfloat16(rounding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 32)).astype(ml_dtypes.bfloat16)
    weight = rng.uniform(0.5, 2, 32).astype(ml_dtypes.bfloat16)
    got = rms_norm(tf.constant(x), tf.constant(weight), rounding=rounding).numpy()
    other = {"before_weight": "after_weight", "after_weight": "before_weight"}[rounding]
    assert np.mean(got != norm_oracle(x, weight, rounding)) < 0.005  # a float32 value may lie on a rounding edge
    assert np.mean(got != norm_oracle(x, weight, other)) > 0.1


def test_norm_rounding_is_nothing_in_float32_and_is_passed_down():
    x, weight = hidden(), tf.constant(np.random.default_rng(2).uniform(0.5, 2, 32), tf.float32)
    np.testing.assert_array_equal(rms_norm(x, weight), rms_norm(x, weight, rounding="after_weight"))
    other = TINY.replace(norm_rounding="after_weight")
    assert other.mla.norm_rounding == "after_weight"
    params = tree.map_leaves(lambda p: tf.cast(p + 0.25, tf.bfloat16), dsv3.model_init(tf.constant([0, 1]), TINY))
    before, after = (
        dsv3.model_apply(params, dsv3.router_init(cfg), [[1, 2, 3, 4]], cfg=cfg, policy=POLICY).entries
        for cfg in (TINY, other)
    )
    assert np.any(tf.cast(before, tf.float32) != tf.cast(after, tf.float32))


@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_latents_keep_their_own_epsilon(eps):
    """The latents are normalised with 1e-6 whatever `rms_norm_eps` says; the norms over D follow it."""
    cfg = TINY.replace(rms_norm_eps=eps, num_nextn_predict_layers=0)
    params = dsv3.model_init(tf.constant([0, 1]), cfg)
    out = dsv3.model_apply(params, dsv3.router_init(cfg), [[5, 7, 9]], cfg=cfg, policy=POLICY)
    latent = out.entries[..., : cfg.mla.kv_latent].numpy()
    x = embed_apply(params, tf.constant([[5, 7, 9]]), policy=POLICY).numpy().astype(np.float64)
    x /= np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    want = x @ params.dense.mla.kv_a[0].numpy().astype(np.float64)[:, : cfg.mla.kv_latent]
    want /= np.sqrt(np.mean(want * want, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(latent[0], want, rtol=2e-4, atol=1e-6)
    final = np.sqrt(np.mean(np.square(out.hidden), -1))
    assert np.all(final < 0.9) if eps == 1.0 else np.allclose(final, 1, atol=1e-2)


# RoPE


def test_rope_rotates_neighbouring_pairs():
    table = RopeTable(tf.constant([[[0.0, 1.0]]]), tf.constant([[[1.0, 0.0]]]))  # a quarter turn, and none
    x = tf.constant([[[1.0, 2.0, 3.0, 4.0]]])
    assert rope_apply(x, table).numpy().ravel().tolist() == [-2, 1, 3, 4]
    assert rope_apply(x, table, output="halves").numpy().ravel().tolist() == [-2, 3, 1, 4]
    assert rope_apply(x, table, pairs="halves").numpy().ravel().tolist() == [-3, 1, 2, 4]
    assert rope_apply(x, table, pairs="halves", output="halves").numpy().ravel().tolist() == [-3, 2, 1, 4]


def test_rope_output_order_permutes_the_cached_key_only():
    params, x = attention_params(), hidden()
    ours, theirs = (attend(params, x, config(output=side)) for side in ("interleaved", "halves"))
    np.testing.assert_allclose(ours.out, theirs.out, rtol=0, atol=2e-6 * np.abs(ours.out).max())
    latent = TINY.mla.kv_latent
    np.testing.assert_array_equal(ours.entry[..., :latent], theirs.entry[..., :latent])
    rope = ours.entry[..., latent:].numpy()
    np.testing.assert_array_equal(np.concatenate([rope[..., 0::2], rope[..., 1::2]], -1), theirs.entry[..., latent:])
    assert np.any(rope != theirs.entry[..., latent:])


def test_rope_pairs_follow_the_order_of_the_weights():
    """Weights whose rotary columns are reordered to [evens | odds] are those that `halves` wants."""
    params, x, p = attention_params(), hidden(), TINY.mla.nope_dim
    latent, r = TINY.mla.kv_latent, TINY.mla.rope_dim
    order = np.concatenate([np.arange(0, r, 2), np.arange(1, r, 2)])
    q_b = tf.concat([params.q_b[..., :p], tf.gather(params.q_b[..., p:], order, axis=-1)], -1)
    kv_a = tf.concat([params.kv_a[:, :latent], tf.gather(params.kv_a[:, latent:], order, axis=-1)], -1)
    moved = params._replace(q_b=q_b, kv_a=kv_a)
    want = attend(params, x, config(pairs="interleaved")).out
    scale = np.abs(want).max()
    np.testing.assert_allclose(attend(moved, x, config(pairs="halves")).out, want, rtol=0, atol=2e-6 * scale)
    assert np.abs(attend(params, x, config(pairs="halves")).out - want).max() > 1e-2 * scale


def test_the_rotary_key_is_not_normalised():
    params, x = attention_params(), hidden()
    twice = params._replace(kv_a=params.kv_a * 2)
    one, two = (attend(p, x, TINY.mla).entry.numpy() for p in (params, twice))
    latent = TINY.mla.kv_latent
    np.testing.assert_allclose(two[..., :latent], one[..., :latent], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(two[..., latent:], 2 * one[..., latent:])


# YaRN


def test_yarn_numbers_of_the_published_model():
    mla = dsv3.preset("deepseek-v3").mla
    assert yarn_range(64, 10_000.0, 4096, 32, 1) == (10, 23)
    assert mla.softmax_scale == pytest.approx(0.1352338, abs=5e-8)
    table = mla_rope(mla, tf.constant([1]))
    plain = 10_000.0 ** -(np.arange(32) / 32)
    ramp = np.clip((np.arange(32) - 10) / 13, 0, 1)
    want = plain / 40 * ramp + plain * (1 - ramp)
    np.testing.assert_allclose(np.arcsin(table.sin[0, 0, 1:]), want[1:], rtol=1e-6)
    np.testing.assert_allclose(want[:11], plain[:11])
    np.testing.assert_allclose(want[23:], plain[23:] / 40)
    np.testing.assert_allclose(np.hypot(table.sin, table.cos), 1, rtol=1e-6)  # mscale / mscale_all_dim is 1


def test_the_pretraining_model_has_plain_rope():
    mla = dsv3.preset("deepseek-v3-pretrain").mla
    assert mla.softmax_scale == 192**-0.5
    np.testing.assert_allclose(
        mla_rope(mla, tf.constant([3])).cos[0, 0], np.cos(3 * 10_000.0 ** -(np.arange(32) / 32)), rtol=1e-5
    )


@pytest.mark.parametrize("length, stretched", [(4096, False), (4097, True), (163_840, True)])
def test_yarn_applies_always_or_beyond_the_original_length(length, stretched):
    always = config(yarn=YARN, max_length=length)
    beyond = config(yarn=dataclasses.replace(YARN, apply="beyond_original"), max_length=length)
    plain = config(max_length=length)
    assert always.rope.active_yarn is not None
    assert (beyond.rope.active_yarn is not None) == stretched
    assert always.softmax_scale > 1.5 * plain.softmax_scale
    assert beyond.softmax_scale == (always if stretched else plain).softmax_scale
    at = tf.constant([50])
    np.testing.assert_array_equal(mla_rope(beyond, at).cos, mla_rope(always if stretched else plain, at).cos)
    assert np.any(mla_rope(always, at).cos != mla_rope(plain, at).cos)


@pytest.mark.parametrize(
    "mscale, all_dim, softmax, table",
    [
        (1.0, 1.0, 1.0, 1.0),
        (0.7, 1.3, 1.3, (0.07 * np.log(40) + 1) / (0.13 * np.log(40) + 1)),
        (None, None, None, 0.1 * np.log(40) + 1),
        (0.7, None, None, 0.1 * np.log(40) + 1),
    ],
)
def test_softmax_scale_takes_mscale_all_dim(mscale, all_dim, softmax, table):
    """Trap: `mscale` in the softmax scale. It only changes cos and sin, by its ratio to `mscale_all_dim`."""
    cfg = config(yarn=dataclasses.replace(YARN, mscale=mscale, mscale_all_dim=all_dim))
    factor = 1.0 if softmax is None else (0.1 * softmax * np.log(40) + 1) ** 2
    assert cfg.softmax_scale == pytest.approx(TINY.mla.qk_dim**-0.5 * factor, rel=1e-12)
    angles = mla_rope(cfg, tf.constant([2]))
    np.testing.assert_allclose(np.hypot(angles.sin, angles.cos), table, rtol=1e-6)


def test_attention_factor_overrides_the_table_only():
    cfg = config(yarn=dataclasses.replace(YARN, attention_factor=3.0))
    assert cfg.softmax_scale == config(yarn=YARN).softmax_scale
    angles = mla_rope(cfg, tf.constant([2]))
    np.testing.assert_allclose(np.hypot(angles.sin, angles.cos), 3, rtol=1e-6)


def test_rope_frequencies_without_yarn():
    np.testing.assert_allclose(rope_frequencies(4, 100.0), [1, 0.1], rtol=1e-7)
