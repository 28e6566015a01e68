"""Routing: which experts, with which weights, and what keeps them balanced.

Selection sweeps use scores and biases on a coarse binary grid: float32 adds them exactly, so chosen experts are compared
exactly, and ties are frequent.
"""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.router import (
    expert_load,
    router_scores,
    router_select,
    router_update_bias,
    sequence_balance_loss,
    take_experts,
)
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, gradients, normal


def grid(seed, *shape, low=1, high=16):
    """Multiples of 1/16; few values, so that many are equal."""
    return np.random.default_rng([seed, *shape]).integers(low, high, shape).astype(np.float32) / 16


@st.composite
def selections(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    per = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, kept * per))
    return groups, per, kept, top_k


@SWEEP
@given(
    sizes=selections(), tokens=st.integers(0, 6), seed=st.integers(0, 99), normalize=st.booleans(),
    group_mask=st.sampled_from(["-inf", "zero"]), scale=st.sampled_from([1.0, 2.5]),
)  # fmt: skip
def test_selection(sizes, tokens, seed, normalize, group_mask, scale):
    groups, per, kept, top_k = sizes
    scores, bias = grid(seed, tokens, groups * per), grid(seed + 1, groups * per, low=-20, high=20)
    got = router_select(
        scores, bias, top_k=top_k, num_groups=groups, groups_kept=kept, scale=scale, normalize=normalize,
        group_mask=group_mask,
    )  # fmt: skip
    want = oracles.select(
        scores.astype(np.float64), bias, top_k=top_k, groups=groups, kept=kept, scale=scale, normalize=normalize,
        left_out=0.0 if group_mask == "zero" else -np.inf,
    )  # fmt: skip
    np.testing.assert_array_equal(got.experts, want.experts)
    assert_close(got.weights, want.weights)
    np.testing.assert_array_equal(got.scores, scores)
    if group_mask == "-inf":
        assert all(len(set(row // per)) <= kept for row in got.experts.numpy())


@pytest.mark.parametrize("jit", [False, True])
def test_ties_go_to_the_lower_index(jit):
    @tf.function(jit_compile=jit, autograph=False)
    def choose(scores):
        return router_select(scores, tf.zeros([8]), top_k=3, num_groups=4, groups_kept=2).experts

    assert choose(tf.fill([2, 8], 0.5)).numpy().tolist() == [[0, 1, 2]] * 2
    best_groups_last = tf.constant([[0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.5, 0.5]])
    assert choose(best_groups_last).numpy().tolist() == [[2, 3, 6]]


def test_negative_biases_show_the_side_of_the_group_mask():
    scores, bias = tf.fill([1, 4], 0.5), tf.constant([-0.75, -1.0, -1.0, -1.0])
    how = {"top_k": 2, "num_groups": 2, "groups_kept": 1}
    assert router_select(scores, bias, **how).experts.numpy().tolist() == [[0, 1]]
    left_out_wins = router_select(scores, bias, group_mask="zero", **how).experts
    assert left_out_wins.numpy().tolist() == [[2, 3]]


def test_bias_moves_the_choice_but_not_the_weights():
    scores = tf.constant([[0.9, 0.8, 0.1, 0.2]])
    chosen = router_select(scores, tf.constant([0.0, -1.0, 0.0, 1.0]), top_k=2, scale=2.0)
    assert chosen.experts.numpy().tolist() == [[3, 0]]
    assert_close(chosen.weights, np.array([[2 * 0.2 / 1.1, 2 * 0.9 / 1.1]]))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_reaches_scores_through_the_weights_only(normalize, fuse):
    scores, bias = np.random.default_rng(0).permutation(24).reshape(3, 8).astype(np.float32) / 32 + 0.1, np.zeros(8)
    scores = np.tile(scores, [86 if fuse else 1, 1])  # few rows are not compiled
    experts = router_select(scores, bias, top_k=3, num_groups=4, groups_kept=2).experts.numpy()
    how = {"scale": 2.5, "normalize": normalize}
    check_gradient(
        lambda s: router_select(s, bias, top_k=3, num_groups=4, groups_kept=2, fuse=fuse, **how).weights,
        lambda s: oracles.gate_weights(s, experts, **how),
        [scores],
    )
    bias = tf.constant(bias, tf.float32)
    to_bias = gradients(lambda b: router_select(scores, b, top_k=3, fuse=fuse, **how).weights, [bias])
    assert not to_bias[0].numpy().any()


@SWEEP
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 6))
def test_scores(tokens, width, experts):
    x, weight = normal(0, tokens, width), normal(1, width, experts)
    assert_close(router_scores(x, weight), oracles.sigmoid(x.astype(np.float64) @ weight))


def test_scores_of_bfloat16_are_computed_in_float32():
    x, weight = (tf.cast(a, tf.bfloat16) for a in (normal(0, 5, 64), normal(1, 64, 6)))
    exact = [tf.cast(a, tf.float64).numpy() for a in (x, weight)]
    scores = router_scores(x, weight)
    assert scores.dtype == tf.float32
    assert_close(scores, oracles.sigmoid(exact[0] @ exact[1]))


def test_take_experts_has_the_gradient_of_a_gather():
    values, experts = normal(0, 4, 5), np.array([[0, 4], [1, 1], [3, 2], [2, 0]], np.int32)
    assert_close(take_experts(values, experts), np.take_along_axis(values, experts, 1))
    check_gradient(lambda v: take_experts(v, experts), lambda v: np.take_along_axis(v, experts, 1), [values])


@SWEEP
@given(st.integers(0, 7), st.integers(1, 6), st.booleans(), st.sampled_from([np.int32, np.int64]))
def test_load_counts_what_the_mask_leaves(tokens, num_experts, masked, dtype):
    rng = np.random.default_rng(tokens)
    experts = np.stack([rng.permutation(num_experts)[:2] for _ in range(tokens)] or [np.zeros(1)]).astype(dtype)[:tokens]
    mask = rng.random(tokens) < 0.5 if masked else None
    got = expert_load(experts, num_experts, mask)
    assert got.dtype == tf.float32
    np.testing.assert_array_equal(got, oracles.load(experts, num_experts, mask))


def test_load_of_small_integers_and_of_none():
    """Entries that are no expert are not counted; a mask is true or false."""
    experts = np.array([[0, 2], [2, 3], [1, 0]], np.uint8)
    assert expert_load(experts, 3).numpy().tolist() == [2.0, 1.0, 2.0]
    assert expert_load(experts, 3, mask=np.array([2.0, 0.5, 0.0])).numpy().tolist() == [1.0, 0.0, 2.0]
    assert expert_load(np.array([[-1, 0]]), 1).numpy().tolist() == [1.0]


@SWEEP
@given(st.integers(0, 3), st.integers(1, 9), st.integers(0, 99))
def test_bias_update(layers, experts, seed):
    shape = (layers, experts) if layers else (experts,)
    load = np.random.default_rng(seed).integers(0, 4, shape).astype(np.float32)
    bias = normal(seed, *shape)
    assert_close(router_update_bias(bias, load, rate=0.25), oracles.update_bias(bias.astype(np.float64), load, 0.25))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("experts", [3, 7, 12, 160])
def test_even_load_leaves_the_bias(experts, jit):
    """The mean of equal integers must come out exactly, also where a compiler divides by a constant."""
    update = tf.function(lambda b, n: router_update_bias(b, n, rate=0.1), jit_compile=jit, autograph=False)
    for load in (1.0, 7.0, 1001.0):
        assert not update(tf.zeros([experts]), tf.fill([experts], load)).numpy().any()


def test_bias_update_has_no_gradient():
    assert not gradients(lambda b: router_update_bias(b, [1.0, 2.0]), [tf.zeros([2])])[0].numpy().any()


@SWEEP
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 99), st.data())
def test_balance_loss(batch, length, experts, masked, seed, data):
    top_k = data.draw(st.integers(1, experts))
    scores = grid(seed, batch, length, experts)
    mask = np.random.default_rng(seed).random((batch, length)) < 0.6 if masked else None
    got = sequence_balance_loss(scores, top_k=top_k, mask=mask)
    assert_close(got, oracles.balance_loss(scores.astype(np.float64), top_k=top_k, mask=mask))


def test_balance_loss_is_one_for_even_routing_and_e_over_k_for_a_collapse():
    even = np.tile(np.eye(4, dtype=np.float32) * 0.9 + 0.05, (1, 2, 1))
    assert_close(sequence_balance_loss(even, top_k=1), 1.0)
    collapsed = np.zeros([1, 8, 4], np.float32)
    collapsed[..., 2] = 1.0
    assert_close(sequence_balance_loss(collapsed, top_k=1), 4.0)


@pytest.mark.parametrize("masked, fuse", [(False, False), (True, False), (True, True)])
def test_balance_loss_gradient(masked, fuse):
    scores = np.random.default_rng(1).permutation(60).reshape(2, 5, 6).astype(np.float32) / 64 + 0.02
    mask = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool) if masked else None
    if fuse:  # few rows are not compiled
        scores, mask = np.tile(scores, [1, 26, 1]), np.tile(mask, [1, 26])
    check_gradient(
        lambda s: sequence_balance_loss(s, top_k=2, mask=mask, fuse=fuse),
        lambda s: np.array(oracles.balance_loss(s, top_k=2, mask=mask)),
        [scores],
    )


def test_wrong_input_is_named():
    scores, bias = tf.fill([2, 8], 0.5), tf.zeros([8])
    for how, message in [
        ({"top_k": 2, "num_groups": 3}, "router_select: 8 experts are not divisible by num_groups=3"),
        ({"top_k": 5, "num_groups": 2}, "router_select: cannot choose top_k=5 from 1 of 2 groups of 4 experts"),
        ({"top_k": 1, "num_groups": 8, "groups_kept": 2}, "router_select: num_groups=8 leaves one expert a group"),
        ({"top_k": 1, "group_mask": "max"}, "router_select: `group_mask` is 'max', want one of '-inf', 'zero'"),
    ]:
        with pytest.raises(ValueError, match=message):
            router_select(scores, bias, **how)
    with pytest.raises(ValueError, match=r"router_update_bias: `load` has shape \(4,\), want \(3,\) \[E\]"):
        router_update_bias(tf.zeros([3]), tf.zeros([4]))
    with pytest.raises(ValueError, match=r"expert_load: `mask` has shape \(3,\), want \(2,\) \[N\]"):
        expert_load([[0, 1], [1, 2]], 3, [True, False, True])
    with pytest.raises(ValueError, match=r"take_experts: `experts` has shape \(3, 1\), want \(2, \?\) \[N, K\]"):
        take_experts(scores, tf.zeros([3, 1], tf.int32))
    with pytest.raises(ValueError, match=r"sequence_balance_loss: `top_k` is 9, want 1 to 4 \[E\]"):
        sequence_balance_loss(tf.ones([1, 2, 4]), top_k=9)
