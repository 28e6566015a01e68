"""The mixture-of-experts layer."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import count_params, tree
from dsv3.nn.moe import moe_apply, moe_specs
from tests import oracles
from tests.compare import FUSED, PLAIN, SWEEP, assert_close, check_gradient, gradients, normal
from tests.small import moe_config, random_params

CONFIGS = {
    "grouped": {},
    "one group": {"num_groups": 1, "groups_kept": 1},
    "two shared": {"num_shared": 2},
    "none shared": {"num_shared": 0},
    "all chosen": {"num_groups": 1, "groups_kept": 1, "top_k": 8},
    "one chosen, raw weights": {"top_k": 1, "normalize": False, "scale": 1.0},
}
POLICIES = {
    "sorted": PLAIN,
    "blocks": PLAIN.replace(experts="blocks"),
    "rows": PLAIN.replace(max_rows=10**6),
}


def setup(name="grouped"):
    cfg = moe_config(**CONFIGS[name])
    return cfg, random_params(moe_specs(cfg, std=0.1)), normal(9, cfg.router.num_experts, scale=0.1)


def chosen_by_oracle(params, bias, x, cfg):
    r, tokens = cfg.router, x.reshape(-1, cfg.hidden_size).astype(np.float64)
    scores = oracles.sigmoid(tokens @ oracles.as_float64(params).router)
    chosen = oracles.select(scores, bias, top_k=r.top_k, groups=r.num_groups, kept=r.groups_kept, scale=r.scale)
    return chosen.experts.reshape(*x.shape[:2], r.top_k)


@SWEEP
@given(st.sampled_from(list(CONFIGS)), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_matches_the_equations(name, batch, length, seed):
    cfg, params, bias = setup(name)
    x = normal(seed, batch, length, cfg.hidden_size)
    for kernel, policy in POLICIES.items():
        got = moe_apply(params, bias, x, cfg=cfg, policy=policy)
        # No two candidates of these tokens tie within float32's rounding.
        np.testing.assert_array_equal(got.stats.experts, chosen_by_oracle(params, bias, x, cfg))
        want = oracles.moe(oracles.as_float64(params), bias, x.astype(np.float64), cfg=cfg)
        assert_close(got.out, want, what=kernel)


@pytest.mark.parametrize("kernel", POLICIES)
@pytest.mark.parametrize("name", ["grouped", "two shared", "one chosen, raw weights"])
def test_gradient_of_input_and_parameters(name, kernel):
    cfg, params, bias = setup(name)
    x = normal(0, 2, 3, cfg.hidden_size)
    experts = moe_apply(params, bias, x, cfg=cfg, policy=PLAIN).stats.experts.numpy()

    def apply(x, *leaves):
        return moe_apply(tree.unflatten_as(params, leaves), bias, x, cfg=cfg, policy=POLICIES[kernel]).out

    def oracle(x, *leaves):
        return oracles.moe(tree.unflatten_as(params, leaves), bias, x, cfg=cfg, experts=experts)

    check_gradient(apply, oracle, [x, *(p.numpy() for p in tree.flatten(params))], directions=1)


def test_fused_in_a_graph():
    cfg, params, bias = setup()
    x = tf.constant(normal(0, 2, 7, cfg.hidden_size))
    leaves = tree.flatten(params)

    def value_and_grad(policy):
        def fn(x, *leaves):
            return moe_apply(tree.unflatten_as(params, leaves), bias, x, cfg=cfg, policy=policy).out

        return [fn(x, *leaves), *gradients(fn, [x, *leaves])]

    for got, want in zip(tf.function(value_and_grad, autograph=False)(FUSED), value_and_grad(PLAIN)):
        assert_close(got, want, 1e-5)


def test_replay():
    cfg, params, bias = setup()
    x = normal(0, 2, 3, cfg.hidden_size)
    chosen = moe_apply(params, bias, x, cfg=cfg, policy=PLAIN)
    again = moe_apply(params, np.zeros(8), x, cfg=cfg, experts=chosen.stats.experts, policy=PLAIN)
    assert_close(again.out, chosen.out)
    np.testing.assert_array_equal(again.stats.experts, chosen.stats.experts)
    others = (chosen.stats.experts.numpy() + 1) % 8
    want = oracles.moe(oracles.as_float64(params), bias, x.astype(np.float64), cfg=cfg, experts=others)
    assert_close(moe_apply(params, bias, x, cfg=cfg, experts=others.astype(np.int64), policy=PLAIN).out, want)


@pytest.mark.parametrize("policy", [PLAIN, FUSED])
def test_replay_refuses_what_is_no_expert(policy):
    cfg, params, bias = setup()
    for entry in (-1, 8):
        experts = np.full([2, 3, cfg.router.top_k], entry)
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{entry} is not in \[0, 8\)"):
            moe_apply(params, bias, normal(0, 2, 3, cfg.hidden_size), cfg=cfg, experts=experts, policy=policy)


def test_replay_has_the_same_gradient():
    cfg, params, bias = setup()
    x, leaves = normal(0, 2, 3, cfg.hidden_size), tree.flatten(params)
    experts = moe_apply(params, bias, x, cfg=cfg, policy=PLAIN).stats.experts

    def grads(**how):
        def fn(x, *leaves):
            return moe_apply(tree.unflatten_as(params, leaves), bias, x, cfg=cfg, policy=PLAIN, **how).out

        return gradients(fn, [x, *leaves])

    for got, want in zip(grads(experts=experts), grads()):
        assert_close(got, want)


def test_stats_count_what_the_mask_leaves():
    cfg, params, bias = setup()
    x = normal(0, 2, 5, cfg.hidden_size)
    mask = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
    full, masked = (moe_apply(params, bias, x, cfg=cfg, mask=m, policy=PLAIN) for m in (None, mask))
    assert_close(masked.out, full.out)
    experts = full.stats.experts.numpy()
    np.testing.assert_array_equal(masked.stats.experts, experts)
    np.testing.assert_array_equal(full.stats.load, oracles.load(experts.reshape(-1, 3), 8))
    np.testing.assert_array_equal(masked.stats.load, oracles.load(experts.reshape(-1, 3), 8, mask))
    assert float(tf.reduce_sum(masked.stats.load)) == 3 * mask.sum()
    scores = oracles.sigmoid(x.astype(np.float64) @ oracles.as_float64(params).router)
    assert_close(full.stats.balance, oracles.balance_loss(scores, top_k=3))
    assert_close(masked.stats.balance, oracles.balance_loss(scores, top_k=3, mask=mask))


def test_balance_reaches_the_router_only():
    cfg, params, bias = setup()
    x = normal(0, 2, 5, cfg.hidden_size)

    def balance(*leaves):
        return moe_apply(tree.unflatten_as(params, leaves), bias, x, cfg=cfg, policy=PLAIN).stats.balance

    found = tree.unflatten_as(params, gradients(balance, tree.flatten(params)))
    assert {path for path, g in tree.items(found) if g.numpy().any()} == {"router"}
    check_gradient(
        lambda w: balance(w, *tree.flatten(params)[1:]),
        lambda w: np.array(oracles.balance_loss(oracles.sigmoid(x @ w), top_k=3)),
        [params.router.numpy()],
    )


def test_bias_steers_every_token():
    cfg, params, _ = setup()
    bias = np.zeros(8, np.float32)
    bias[[2, 3, 6]] = 5.0
    stats = moe_apply(params, bias, normal(0, 2, 4, cfg.hidden_size), cfg=cfg, policy=PLAIN).stats
    assert stats.load.numpy().tolist() == [0, 0, 8, 8, 0, 0, 8, 0]


def test_bfloat16_routes_in_float32():
    cfg, params, bias = setup()
    half = tree.map_leaves(lambda p: tf.cast(p, tf.bfloat16), params)
    exact = tree.map_leaves(lambda p: tf.cast(p, tf.float32), half)
    x = tf.cast(normal(0, 4, 9, cfg.hidden_size), tf.bfloat16)
    got = moe_apply(half, bias, x, cfg=cfg, policy=PLAIN)
    want = moe_apply(exact, bias, tf.cast(x, tf.float32), cfg=cfg, policy=PLAIN)
    assert got.out.dtype == tf.bfloat16
    np.testing.assert_array_equal(got.stats.experts, want.stats.experts)
    assert_close(got.stats.balance, want.stats.balance)
    assert_close(got.out, want.out, 2e-2)  # three products, each rounded to 2^-9


def test_shared_experts_are_one_wide_layer():
    cfg = moe_config(num_shared=2)
    specs = moe_specs(cfg, std=0.1)
    assert specs.shared.gate_up.shape == (8, 2 * 2 * 5) and moe_specs(moe_config(num_shared=0), std=0.1).shared == ()
    assert count_params(specs) == 8 * 8 + (8 + 2) * 3 * 8 * 5


def test_wrong_input_is_named():
    cfg, params, bias = setup()
    x = tf.zeros([2, 3, cfg.hidden_size])
    for arguments, message in [
        ({"x": x[0]}, r"moe_apply: `x` has shape \(3, 8\), want \(\?, \?, 8\) \[B, T, D\]"),
        ({"bias": bias[1:]}, r"moe_apply: `bias` has shape \(7,\), want \(8,\) \[E\]"),
        ({"mask": tf.ones([6])}, r"moe_apply: `mask` has shape \(6,\), want \(2, 3\) \[B, T\]"),
        ({"experts": tf.zeros([2, 3, 2])}, r"moe_apply: `experts` has shape \(2, 3, 2\), want \(2, 3, 3\) \[B, T, K\]"),
    ]:
        how = {"x": x, "bias": bias} | arguments
        with pytest.raises(ValueError, match=message):
            moe_apply(params, how.pop("bias"), how.pop("x"), cfg=cfg, **how)
    spec = tf.TensorSpec([None, 3, cfg.hidden_size])
    unknown = tf.function(lambda x: moe_apply(params, bias, x, cfg=cfg).out, input_signature=[spec], autograph=False)
    with pytest.raises(ValueError, match="moe_apply: `x` has an unknown number of tokens, want static B and T"):
        unknown.get_concrete_function()
