"""The choice by keys against TensorFlow's `top_k`: the same places, ties included."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3.ops.router import router_select, sequence_balance_loss
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
    [(33, 1, 6, 1, 6), (33, 4, 8, 2, 4), (20, 3, 5, 2, 7), (33, 8, 2, 8, 3), (1, 2, 2, 1, 2), (0, 2, 4, 1, 2),
     (9, 8, 2 + LIMIT // 8, 4, 8)],
)  # fmt: skip
def test_the_same_experts_and_weights(tokens, groups, per, kept, top_k, group_mask):
    scores = tf.constant(np.random.default_rng(tokens).integers(1, 16, [tokens, groups * per]) / 16, tf.float32)
    bias = tf.constant(values(1, groups * per)) * 0.5
    bias = tf.where(tf.math.is_finite(bias), bias, -2.0)
    how = {"top_k": top_k, "num_groups": groups, "groups_kept": kept, "scale": 2.5, "group_mask": group_mask}
    got, want = (router_select(scores, bias, fuse=fuse, **how) for fuse in (True, False))
    np.testing.assert_array_equal(got.experts, want.experts)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-6)


@pytest.mark.parametrize("experts, top_k", [(1, 1), (6, 2), (32, 5), (LIMIT + 1, 4)])
def test_the_same_balance_loss(experts, top_k):
    scores = tf.constant(np.random.default_rng(0).integers(1, 16, [2, 19, experts]) / 16, tf.float32)
    mask = np.random.default_rng(1).random([2, 19]) < 0.7
    got, want = (sequence_balance_loss(scores, top_k=top_k, mask=mask, fuse=fuse) for fuse in (True, False))
    np.testing.assert_allclose(got, want, rtol=1e-6)
