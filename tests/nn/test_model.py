"""The whole model."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3 import tree
from tests import oracles
from tests.compare import FUSED, PLAIN, assert_close, error, gradients
from tests.small import model_config, random_params, random_router, random_tokens

# Three blocks, a norm and the head: the sum of their roundings, relative to the largest logit.
TOLERANCE = 1e-5

CONFIGS = {
    "every part": {},
    "no dense layer": {"first_k_dense_replace": 0},
    "no mixture": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "tied": {"tie_word_embeddings": True},
    "no query compression": {"q_lora_rank": None},
    "two shared, one group": {"n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    "one layer": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
}


def setup(**fields):
    cfg = model_config(**fields)
    return cfg, random_params(dsv3.model_specs(cfg)), random_router(cfg)


def apply(model, tokens, **how):
    cfg, params, router = model
    return dsv3.model_apply(params, router, tokens, cfg=cfg, **({"policy": PLAIN} | how))


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_equations(name):
    cfg, params, router = setup(**CONFIGS[name])
    tokens = random_tokens(cfg, 2, 5)
    out = apply((cfg, params, router), tokens)
    logits, hidden = oracles.model(oracles.as_float64(params), oracles.as_float64(router), tokens, cfg=cfg)
    assert_close(out.logits, logits, TOLERANCE)
    assert_close(out.hidden, hidden, TOLERANCE)
    described = tree.to_dict(dsv3.output_specs(cfg, 2, 5))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in tree.to_dict(out).items()} == {
        path: (spec.shape, tf.as_dtype(spec.dtype)) for path, spec in described.items()
    }
    if cfg.num_moe_layers:
        assert out.stats.load.shape == (cfg.num_moe_layers, 6) and out.stats.experts.shape[0] == cfg.num_moe_layers
        assert (tf.reduce_sum(out.stats.load, -1).numpy() == 2 * 5 * 2).all()
    else:
        assert out.stats == ()


POLICIES = {
    "remat": PLAIN.replace(remat="block"),
    "scan": PLAIN.replace(loop="scan"),
    "small blocks": PLAIN.replace(experts="blocks", attention_block=2),
}


def value_and_grad(model, tokens, policy):
    """Logits, and the gradient of a loss on everything that a model returns, for every parameter."""
    cfg, params, router = model

    def loss(*leaves):
        out = dsv3.model_apply(tree.unflatten_as(params, leaves), router, tokens, cfg=cfg, policy=policy)
        return tf.reduce_sum(out.logits**2) + tf.reduce_sum(out.stats.balance) + tf.reduce_sum(tf.sin(out.entries))

    return [apply(model, tokens, policy=policy).logits, *gradients(loss, tree.flatten(params))]


def assert_same_gradients(got, want):
    for g, w in zip(got, want):
        # Relative to the tensor's norm. The sums run in another order through three blocks and back.
        assert float(tf.norm(g - w)) <= 5e-6 * float(tf.norm(w)) + 1e-12


def test_policies_change_nothing():
    model = setup(num_nextn_predict_layers=0)
    tokens = random_tokens(model[0], 1, 5)
    want = value_and_grad(model, tokens, PLAIN)
    for policy in POLICIES.values():
        assert_same_gradients(value_and_grad(model, tokens, policy), want)


@pytest.mark.parametrize(("policy", "dense"), [(POLICIES["scan"], 0), (FUSED, 1)])
def test_policies_change_nothing_in_a_graph(policy, dense):
    model = setup(num_nextn_predict_layers=0, num_hidden_layers=2, first_k_dense_replace=dense)
    tokens = random_tokens(model[0], 2, 5)
    fn = tf.function(lambda: value_and_grad(model, tokens, policy), autograph=False)
    assert_same_gradients(fn(), value_and_grad(model, tokens, PLAIN))


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_packed_documents_are_apart(form):
    """A row of three documents gives the logits of the documents alone, with positions that run on or start anew."""
    model = setup()
    sizes = [3, 1, 4]
    tokens = random_tokens(model[0], 1, sum(sizes))
    segments = np.repeat(np.arange(3), sizes)[None]
    anew = np.concatenate([np.arange(n) for n in sizes])
    documents = np.split(tokens, np.cumsum(sizes)[:-1], 1)
    want = np.concatenate([apply(model, d).logits for d in documents], 1)
    assert_close(apply(model, tokens, segments=segments, positions=anew, form=form).logits, want, TOLERANCE)
    # Rotations by other angles differ in their rounding.
    assert_close(apply(model, tokens, segments=segments, form=form).logits, want, 2 * TOLERANCE)
    assert error(apply(model, tokens, form=form).logits, want) > 0.01


def test_left_padded_rows():
    model = setup()
    tokens = random_tokens(model[0], 3, 6)
    sizes = [6, 2, 5]
    pad = np.arange(6) < 6 - np.array(sizes)[:, None]
    padded = np.where(pad, 0, np.stack([np.roll(row, 6 - n) for row, n in zip(tokens, sizes)]))
    out = apply(
        model, padded, segments=pad.astype(np.int32), positions=np.maximum(np.cumsum(~pad, 1) - 1, 0), mask=~pad
    )
    for b, n in enumerate(sizes):
        alone = apply(model, tokens[b : b + 1, :n])
        assert_close(out.logits[b : b + 1, 6 - n :], alone.logits, TOLERANCE)
    assert (tf.reduce_sum(out.stats.load, -1).numpy() == sum(sizes) * 2).all()


@settings(max_examples=5)
@given(
    form=st.sampled_from(["auto", "absorbed", "expanded", "naive"]),
    chunks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_cached_rows_of_unlike_lengths_decode_like_the_full_forward(form, chunks, seed):
    """Prompts of unlike lengths, right-padded; then chunks of which each row takes as many tokens as it likes."""
    model = cfg, *_ = setup()
    rng = np.random.default_rng(seed)
    tokens = random_tokens(cfg, 3, 14, seed)
    full = apply(model, tokens).logits.numpy()
    cache = dsv3.cache_init(cfg, 3, 14, dtype=tf.float32)
    for new in [4, *chunks]:
        starts = cache.length.numpy()
        counts = rng.integers(1, new + 1, 3)
        chunk = np.stack([row[a : a + new] for row, a in zip(tokens, starts)])
        out = apply(model, chunk, cache=cache, form=form)
        for b, (a, n) in enumerate(zip(starts, counts)):
            assert_close(out.logits[b, :n], full[b, a : a + n], TOLERANCE)
        cache = dsv3.cache_append(cache, out.entries, counts)


def test_token_by_token():
    model = cfg, *_ = setup()
    tokens = random_tokens(cfg, 2, 6)
    full = apply(model, tokens)
    cache = dsv3.cache_init(cfg, 2, 6, dtype=tf.float32)
    for t in range(6):
        out = apply(model, tokens[:, t : t + 1], cache=cache)
        assert_close(out.logits[:, 0], full.logits[:, t], TOLERANCE)
        cache = dsv3.cache_append(cache, out.entries)
    assert_close(cache.kv, full.entries, TOLERANCE)


def test_replay_of_experts():
    model = cfg, *_ = setup()
    tokens = random_tokens(cfg, 2, 5)
    out = apply(model, tokens)
    unbiased = (cfg, model[1], dsv3.router_init(cfg))
    assert_close(apply(unbiased, tokens, experts=out.stats.experts).logits, out.logits)
    assert (apply(unbiased, tokens).stats.experts.numpy() != out.stats.experts.numpy()).any()


@pytest.mark.parametrize("policy", [PLAIN, PLAIN.replace(loop="scan"), PLAIN.replace(remat="block")])
def test_bfloat16_parameters(policy):
    cfg, params, router = setup()
    half = tree.map_leaves(lambda p: tf.cast(p, tf.bfloat16), params)
    exact = tree.map_leaves(lambda p: tf.cast(p, tf.float32), half)
    tokens = random_tokens(cfg, 2, 5)
    want = apply((cfg, exact, router), tokens)
    got = apply((cfg, half, router), tokens, policy=policy, experts=want.stats.experts)
    assert got.logits.dtype == got.entries.dtype == tf.bfloat16
    assert got.stats.load.dtype == got.stats.balance.dtype == tf.float32
    assert_close(got.logits, want.logits, 5e-2)  # some twenty roundings to 2^-9 in a row


def test_compute_dtype_over_float32_parameters():
    model = cfg, *_ = setup()
    tokens = random_tokens(cfg, 2, 5)
    want = apply(model, tokens)
    got = apply(model, tokens, policy=PLAIN.replace(dtype="bfloat16"), experts=want.stats.experts)
    assert got.logits.dtype == tf.bfloat16
    assert_close(got.logits, want.logits, 5e-2)
    grads = gradients(
        lambda *leaves: apply((cfg, tree.unflatten_as(model[1], leaves), model[2]), tokens,
                              policy=PLAIN.replace(dtype="bfloat16")).logits,
        tree.flatten(model[1]),
    )  # fmt: skip
    assert {g.dtype for g in grads} == {tf.float32}


def test_unused_parameters_get_zero_gradients():
    cfg, params, router = setup()
    found = gradients(
        lambda *leaves: apply((cfg, tree.unflatten_as(params, leaves), router), random_tokens(cfg, 1, 3)).logits,
        tree.flatten(params),
    )
    by_path = {path: g.numpy() for (path, _), g in zip(tree.items(params), found)}
    assert all(not g.any() for path, g in by_path.items() if path.startswith("mtp."))
    assert all(g.any() for path, g in by_path.items() if not path.startswith("mtp."))


def test_wrong_input_is_named():
    model = cfg, *_ = setup()
    tokens = random_tokens(cfg, 2, 5)
    cache = dsv3.cache_init(cfg, 2, 4)
    for arguments, message in [
        ({"tokens": tokens[0]}, r"model_apply: `tokens` has shape \(5,\), want \(\?, \?\) \[B, T\]"),
        ({"tokens": tokens[:, :0]}, "model_apply: `tokens` is empty, want at least one token"),
        ({"tokens": tokens + 40}, r"model_apply: `tokens` holds token id \d+, want ids in \[0, 40\) \[V\]"),
        ({"tokens": tokens - 40}, r"model_apply: `tokens` holds token id -\d+, want ids in \[0, 40\)"),
        ({"tokens": tokens.astype(np.float32)}, "model_apply: `tokens` has dtype float32, want an integer dtype"),
        ({"segments": tokens[:1]}, r"model_apply: `segments` has shape \(1, 5\), want \(2, 5\) \[B, T\]"),
        ({"mask": tokens[:, 1:]}, r"model_apply: `mask` has shape \(2, 4\), want \(2, 5\) \[B, T\]"),
        ({"cache": cache, "segments": tokens}, "mla_apply: `segments` and `cache` exclude each other"),
        ({"cache": dsv3.cache_init(cfg, 3, 4)}, r"mla_apply: `cache.kv` has shape .*, want \(2, \?, 8\) \[B, S, W\]"),
        ({"positions": [0, 1]}, "rope_apply: `table` is of 1 rows and 2 positions"),
    ]:
        how = {"tokens": tokens} | arguments
        with pytest.raises(ValueError, match=message):
            apply(model, how.pop("tokens"), **how)
