"""Latent attention: its forms are one function, with a cache or without."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3 import YarnConfig, tree
from dsv3.nn import mla
from dsv3.nn.heads import heads_first
from dsv3.nn.mla import LayerCache, mla_apply, mla_expand, mla_rope, mla_specs
from dsv3.nn.mla_plain import PlainCache, plain_apply, plain_cache_values
from dsv3.ops.latent import latent_pack
from tests import oracles
from tests.compare import FUSED, GRADIENT_TOLERANCE, PLAIN, assert_close, check_gradient, gradients, normal, to_numpy
from tests.small import mla_config, random_params

FORMS = ("expanded", "absorbed", "naive")
YARN = YarnConfig(factor=4.0, original_length=8, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.7)
CONFIGS = {
    "plain": {},
    "no query compression": {"q_latent": None},
    "bias": {"bias": True},
    "one head, wide values": {"num_heads": 1, "v_dim": 7, "nope_dim": 1},
    "hf order": {"rope": {"output": "halves"}, "rope_dim": 6},
    "halves": {"rope": {"pairs": "halves", "output": "halves"}, "rope_dim": 6},
    "halves to interleaved": {"rope": {"pairs": "halves"}, "rope_dim": 6},
    "yarn": {"rope": {"yarn": YARN}, "rope_dim": 6},
}


def setup(**fields):
    cfg = mla_config(**fields)
    return cfg, random_params(mla_specs(cfg, std=0.1))


@settings(max_examples=14)
@given(name=st.sampled_from(list(CONFIGS)), batch=st.integers(1, 2), length=st.integers(1, 7), segmented=st.booleans())
def test_matches_the_equations(name, batch, length, segmented):
    cfg, params = setup(**CONFIGS[name])
    x = normal(0, batch, length, cfg.hidden_size)
    segments = np.sort(np.random.default_rng(length).integers(0, 3, (batch, length))) if segmented else None
    want = oracles.mla(oracles.as_float64(params), x.astype(np.float64), cfg=cfg, segments=segments)
    for form in FORMS:
        assert_close(mla_apply(params, x, cfg=cfg, segments=segments, form=form, policy=PLAIN).out, want, 4e-6, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["plain", "no query compression", "bias"])
def test_gradient_of_input_and_parameters(name, form):
    cfg, params = setup(**CONFIGS[name])
    leaves = [p.numpy() for p in tree.flatten(params)]
    segments = np.array([[0, 0, 1, 1, 1]])

    def apply(x, *leaves):
        p = tree.unflatten_as(params, leaves)
        return mla_apply(p, x, cfg=cfg, form=form, segments=segments, policy=PLAIN.replace(attention_block=2)).out

    def oracle(x, *leaves):
        return oracles.mla(tree.unflatten_as(params, leaves), x, cfg=cfg, segments=segments)

    check_gradient(apply, oracle, [normal(0, 1, 5, cfg.hidden_size), *leaves], directions=1)


@pytest.mark.parametrize("unroll", [0, 16])
def test_blocks_and_tiles(unroll):
    cfg, params = setup()
    x = normal(0, 2, 7, cfg.hidden_size)
    policy = PLAIN.replace(attention_block=2, attention_unroll=unroll)
    want = mla_apply(params, x, cfg=cfg, form="naive", policy=PLAIN).out
    assert_close(mla_apply(params, x, cfg=cfg, policy=policy).out, want)


def test_fused_in_a_graph():
    cfg, params = setup()
    x = tf.constant(normal(0, 2, 5, cfg.hidden_size))
    leaves = tree.flatten(params)

    def value_and_grad(policy):
        def fn(x, *leaves):
            return tuple(mla_apply(tree.unflatten_as(params, leaves), x, cfg=cfg, policy=policy))

        return [*fn(x, *leaves), *gradients(fn, [x, *leaves])]

    for got, want in zip(tf.function(value_and_grad, autograph=False)(FUSED), value_and_grad(PLAIN)):
        assert_close(got, want, GRADIENT_TOLERANCE)


def test_entry_is_the_normalised_latent_and_the_rotated_key():
    cfg, params = setup(rope={"output": "halves"})
    x = normal(0, 2, 4, cfg.hidden_size)
    p = oracles.as_float64(params)
    kv = x @ p.kv_a
    freqs = oracles.frequencies(2, 100.0)
    rotated = oracles.rope(kv[..., 6:], np.arange(4), freqs, pairs="interleaved", output="halves")
    want = np.concatenate([oracles.rms_norm(kv[..., :6], p.kv_norm), rotated], -1)
    assert_close(mla_apply(params, x, cfg=cfg, policy=PLAIN).entry, want)


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("dirt", [0.0, 1e4])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("name", ["yarn", "hf order", "halves", "halves to interleaved"])
def test_past_of_unlike_lengths(form, new, dirt, name):
    """Row b has `past[b]` tokens in a cache of 6 slots; what lies in the other slots must not matter."""
    cfg, params = setup(**CONFIGS[name])
    past = [0, 4, 6]
    x = normal(0, 3, 6 + new, cfg.hidden_size)
    full = mla_apply(params, x, cfg=cfg, form="naive", policy=PLAIN)
    kv = np.full([3, 6, cfg.cache_width], dirt, np.float32)
    for b, n in enumerate(past):
        kv[b, :n] = full.entry[b, :n]
    newest = np.stack([x[b, n : n + new] for b, n in enumerate(past)])
    got = mla_apply(params, newest, cfg=cfg, cache=LayerCache(kv, tf.constant(past)), form=form, policy=PLAIN)
    for part in ("out", "entry"):
        want = np.stack([getattr(full, part).numpy()[b, n : n + new] for b, n in enumerate(past)])
        assert_close(getattr(got, part), want, 4e-6, part)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name, cache", [("yarn", None), ("yarn", "float8"), ("halves to interleaved", None)])
def test_a_long_past_is_read_in_tiles(form, cache, name):
    """11 slots are more than 4 blocks of 2, and are read in tiles of 8; rows have filled none, some and all of them."""
    cfg, params = setup(**CONFIGS[name])
    kv = normal(1, 3, 11, cfg.cache_width)
    past = LayerCache(latent_pack(kv, rope=cfg.rope_dim) if cache else kv, tf.constant([0, 4, 11]))

    def apply(x, unroll, policy):
        policy = policy.replace(cache=cache, attention_block=2, attention_unroll=unroll)
        return mla_apply(params, x, cfg=cfg, cache=past, form=form, policy=policy).out

    x = tf.constant(normal(0, 3, 3, cfg.hidden_size))
    want = apply(x, 6, PLAIN)
    for policy in (PLAIN, FUSED):
        fn = tf.function(lambda x, unroll: apply(x, unroll, policy), autograph=False)  # noqa: B023
        assert_close(fn(x, 4), want, 4e-6)
        graphs = [fn.get_concrete_function(x, unroll).graph for unroll in (4, 6)]
        loops = [sum(op.type in ("While", "StatelessWhile") for op in graph.get_operations()) for graph in graphs]
        assert loops == [1, 0]


def test_expanded_keys_and_values_are_what_plain_attention_keeps():
    cfg, params = setup(**CONFIGS["yarn"])
    past = [0, 4, 6]
    x = normal(0, 3, 7, cfg.hidden_size)
    full = mla_apply(params, x, cfg=cfg, form="naive", policy=PLAIN)
    k, v = mla_expand(params, full.entry, cfg=cfg, policy=PLAIN)
    assert k.shape[1:] == (cfg.num_heads, 7, cfg.qk_dim) and v.shape[1:] == (cfg.num_heads, 7, cfg.v_dim)
    assert plain_cache_values(cfg) == (k[:1, :, :1].numpy().size + v[:1, :, :1].numpy().size)
    dirt = np.arange(7)[:, None] >= np.array(past)[:, None, None, None]
    kept = PlainCache(np.where(dirt, 1e4, k), np.where(dirt, 1e4, v), tf.constant(past))
    newest, entry, want = (np.stack([part[b, n : n + 1] for b, n in enumerate(past)]) for part in (x, full.entry, full.out))
    got = plain_apply(params, newest, entry, kept, cfg=cfg, policy=PLAIN)
    assert_close(got, want, 4e-6)
    with pytest.raises(ValueError, match=r"plain_apply: `cache.v` has shape .*, want \(3, 2, 7, 3\) \[B, H, S, U\]"):
        plain_apply(params, newest, entry, kept._replace(v=kept.v[..., 1:]), cfg=cfg)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_laid_out_for_decoding_change_nothing(name):
    cfg, params = setup(**CONFIGS[name])
    stacked = mla.mla_absorb(tree.map_leaves(lambda p: tf.stack([p, 2.0 * p]), params), cfg=cfg)
    x = normal(0, 2, 3, cfg.hidden_size)
    for i, same in enumerate([params, tree.map_leaves(lambda p: 2.0 * p, params)]):
        laid_out = tree.slice_leading(stacked, i)
        want = mla_apply(same, x, cfg=cfg, form="naive", policy=PLAIN)
        for form in FORMS:
            assert_close(mla_apply(laid_out, x, cfg=cfg, form=form, policy=PLAIN).out, want.out, 4e-6, form)


def test_positions_shift_all_scores_alike():
    cfg, params = setup()
    x = normal(0, 1, 5, cfg.hidden_size)
    shifted = mla_apply(params, x, cfg=cfg, table=mla_rope(cfg, tf.range(7, 12)), policy=PLAIN).out
    assert_close(shifted, mla_apply(params, x, cfg=cfg, policy=PLAIN).out, 1e-5)  # angles of up to 12 are rounded


@pytest.mark.parametrize("form", FORMS)
def test_unknown_batch_and_length(form):
    cfg, params = setup()
    spec = tf.TensorSpec([None, None, cfg.hidden_size])
    fn = tf.function(
        lambda x: mla_apply(params, x, cfg=cfg, form=form, policy=PLAIN).out, input_signature=[spec], autograph=False
    )
    for shape in ((2, 5), (1, 1)):
        x = normal(0, *shape, cfg.hidden_size)
        assert_close(fn(x), mla_apply(params, x, cfg=cfg, form="naive", policy=PLAIN).out)
    assert fn.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    cfg, params = setup()
    half = tree.map_leaves(lambda p: tf.cast(p, tf.bfloat16), params)
    exact = tree.map_leaves(lambda p: tf.cast(p, tf.float32), half)
    x = tf.cast(normal(0, 2, 5, cfg.hidden_size), tf.bfloat16)
    got = mla_apply(half, x, cfg=cfg, form=form, policy=PLAIN)
    assert got.out.dtype == got.entry.dtype == tf.bfloat16
    # Five products in a row, each rounded to 2^-9.
    assert_close(got.out, mla_apply(exact, tf.cast(x, tf.float32), cfg=cfg, policy=PLAIN).out, 3e-2)


def test_bfloat16_keeps_the_softmax_scale():
    """A scale rounded to bfloat16 would be 0.35% off for the published model: all scores at another temperature."""
    scale = dsv3.preset("deepseek-v3").mla.softmax_scale
    q = tf.cast(normal(0, 1, 6, 2 * 8, scale=4.0), tf.bfloat16)
    table = mla_rope(mla_config(rope_dim=4), tf.zeros([6], tf.int32))
    plain, scaled = (heads_first(q, *table, heads=2, rope_dim=4, scale=s) for s in (1.0, scale))
    np.testing.assert_array_equal(to_numpy(scaled), to_numpy(tf.cast(to_numpy(plain) * np.float32(scale), tf.bfloat16)))


def test_published_softmax_scale():
    assert dsv3.preset("deepseek-v3").mla.softmax_scale == pytest.approx(0.1352338, abs=5e-8)
    assert dsv3.preset("deepseek-v3-pretrain").mla.softmax_scale == 192**-0.5


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1.3688879 / 1.1844440),
        ({"mscale": None, "mscale_all_dim": None}, 1.3688879),
        ({"attention_factor": 0.5}, 0.5),
    ],
)
def test_yarn_factor_of_cosine_and_sine(fields, factor):
    """ln(40)/10 + 1 = 1.3688879; without both mscales the formula of the YaRN paper."""
    cfg = mla_config(rope={"yarn": YarnConfig(factor=40.0, **fields)})
    assert_close(mla_rope(cfg, [0]).cos, np.full([1, 1, 1], factor))


def test_yarn_of_the_official_code_waits_for_long_contexts():
    def table(**fields):
        yarn = YarnConfig(factor=40.0, original_length=64, apply="beyond_original")
        return mla_rope(mla_config(rope={"yarn": yarn, **fields}, rope_dim=8), tf.range(9))

    plain = mla_rope(mla_config(rope_dim=8), tf.range(9))
    assert_close(table(max_length=64).cos, plain.cos)
    assert np.abs(table(max_length=65).cos - plain.cos).max() > 0.01


def test_wrong_input_is_named():
    cfg, params = setup()
    x, width = tf.zeros([2, 3, cfg.hidden_size]), cfg.cache_width
    cache = LayerCache(tf.zeros([2, 4, width]), tf.zeros([2], tf.int32))
    for arguments, message in [
        ({"x": x[0]}, r"mla_apply: `x` has shape \(3, 8\), want \(\?, \?, 8\) \[B, T, D\]"),
        ({"x": x[..., 1:]}, r"mla_apply: `x` has shape \(2, 3, 7\), want \(\?, \?, 8\) \[B, T, D\]"),
        ({"segments": tf.zeros([2, 4])}, r"mla_apply: `segments` has shape \(2, 4\), want \(2, 3\) \[B, T\]"),
        ({"segments": tf.zeros([2, 3]), "cache": cache}, "mla_apply: `segments` and `cache` exclude each other"),
        ({"cache": cache._replace(kv=cache.kv[:1])}, r"mla_apply: `cache.kv` has shape .*, want \(2, \?, 8\) \[B, S, W\]"),
        ({"cache": cache._replace(length=[0])}, r"mla_apply: `cache.length` has shape \(1,\), want \(2,\) \[B\]"),
        ({"cfg": dsv3.preset("tiny")}, "mla_apply: `cfg` is of type ModelConfig, want MLAConfig"),
        ({"form": "flash"}, "mla_apply: `form` is 'flash', want one of 'auto', 'expanded', 'absorbed', 'naive'"),
    ]:
        with pytest.raises(ValueError, match=message):
            mla_apply(params, **({"x": x, "cfg": cfg} | arguments))
    with pytest.raises(ValueError, match="mla_apply: `params` is of type tuple, want MLAParams"):
        mla_apply((), x, cfg=cfg)
