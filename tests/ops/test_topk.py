"""The choice by keys against TensorFlow's `top_k`: the same places, ties included."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3.ops.router import router_select, router_weights, sequence_balance_loss
from dsv3.ops.topk import LIMIT, best_keys, key_places, key_values, place_keys


def values(seed, *shape):
    """Coarse values of both signs, so that many are equal, and some infinite."""
    rng = np.random.default_rng([seed, *shape])
    return np.where(rng.random(shape) < 0.1, -np.inf, rng.integers(-6, 7, shape) / 4).astype(np.float32)


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 130])
def test_keys_order_values_then_places(size, rows):
    x, count = values(0, size, rows), min(size, 5)
    found = best_keys(place_keys(tf.constant(x)), count)
    want = tf.math.top_k(x.T, count)
    assert len(found) == count
    np.testing.assert_array_equal(np.stack([key_places(k, size) for k in found], 1), want.indices)
    np.testing.assert_array_equal(np.stack([key_values(k) for k in found], 1), want.values)


@pytest.mark.parametrize("group_mask", ["-inf", "zero"])
@pytest.mark.parametrize(
    "tokens, groups, per, kept, top_k",
    [(300, 1, 6, 1, 6), (300, 4, 8, 2, 4), (257, 3, 5, 2, 7), (256, 8, 2, 8, 3), (256, 2, 2, 1, 2),
     (300, 8, 2 + LIMIT // 8, 4, 8)],
)  # fmt: skip
def test_the_same_experts_and_weights(tokens, groups, per, kept, top_k, group_mask):
    scores = tf.constant(np.random.default_rng(tokens).integers(1, 16, [tokens, groups * per]) / 16, tf.float32)
    bias = tf.constant(values(1, groups * per)) * 0.5
    bias = tf.where(tf.math.is_finite(bias), bias, -2.0)
    how = {"top_k": top_k, "num_groups": groups, "groups_kept": kept, "scale": 2.5, "group_mask": group_mask}
    got, want = (router_select(scores, bias, fuse=fuse, **how) for fuse in (True, False))
    assert got.experts.dtype == tf.int32 and got.experts.shape == [tokens, top_k]
    np.testing.assert_array_equal(got.experts, want.experts)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-6)


@pytest.mark.parametrize("experts, top_k", [(1, 1), (6, 2), (32, 5), (LIMIT + 1, 4)])
def test_the_same_balance_loss(experts, top_k):
    scores = tf.constant(np.random.default_rng(0).integers(1, 16, [2, 150, experts]) / 16, tf.float32)
    mask = np.random.default_rng(1).random([2, 150]) < 0.7
    got, want = (sequence_balance_loss(scores, top_k=top_k, mask=mask, fuse=fuse) for fuse in (True, False))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_choice_and_balance_of_the_same_scores(known):
    """Value and gradient of a loss of both, of few rows, of many, and of a number that the graph does not know."""

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([300 if known else None, 8]), tf.TensorSpec([8])])
    def compiled(scores, bias):
        return value(scores, bias, True)

    def value(scores, bias, fuse):
        with tf.GradientTape() as tape:
            tape.watch(scores)
            routing = router_select(scores, bias, top_k=3, num_groups=4, groups_kept=2, fuse=fuse)
            balance = sequence_balance_loss(tf.expand_dims(scores, 0), top_k=3, fuse=fuse)
            loss = tf.reduce_sum(routing.weights * tf.constant([1.0, -2.0, 3.0])) + 10.0 * balance
        return loss, tape.gradient(loss, scores), routing.experts

    rng = np.random.default_rng(0)
    for rows in (300,) if known else (0, 5, 300):
        given = tf.constant(rng.random([rows, 8]), tf.float32), tf.constant(rng.random([8]) - 0.5, tf.float32)
        got, want = compiled(*given), value(*given, False)
        np.testing.assert_array_equal(got[2], want[2])
        for a, b in zip(got[:2], want[:2]):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_gate_values_of_given_experts(normalize):
    """Also where one expert is named twice, as a replay may: each of the two has its gradient."""
    scores = tf.constant(np.random.default_rng(0).random([4, 5]), tf.float32)
    experts, d = tf.constant([[0, 4], [1, 1], [3, 2], [2, 2]]), tf.constant([[1.0, -2.0]])
    found = []
    for fuse in (True, False):
        with tf.GradientTape() as tape:
            tape.watch(scores)
            weights = router_weights(scores, experts, scale=2.5, normalize=normalize, fuse=fuse)
        found.append((weights, tape.gradient(weights, scores, tf.tile(d, [4, 1]))))
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
