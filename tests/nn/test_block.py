"""One transformer block."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import tree
from dsv3.nn.block import block_apply, block_specs
from dsv3.nn.mla import LayerCache, mla_rope
from dsv3.nn.moe import RouterStats
from tests import oracles
from tests.compare import PLAIN, assert_close, check_gradient, normal
from tests.small import model_config, random_params

# Attention, experts and three norms in a row: a few times the rounding of one of them.
TOLERANCE = 5e-6


def setup(dense, **fields):
    cfg = model_config(**fields)
    bias = () if dense else normal(5, cfg.moe.router.num_experts, scale=0.1)
    return cfg, random_params(block_specs(cfg, dense=dense)), bias, mla_rope(cfg.mla, tf.range(5))


@pytest.mark.parametrize("dense", [True, False])
def test_matches_the_equations(dense):
    cfg, params, bias, table = setup(dense, rms_norm_eps=0.1)
    x = normal(0, 2, 5, cfg.hidden_size)
    segments = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    got = block_apply(params, bias, x, cfg=cfg, table=table, policy=PLAIN, segments=segments)
    want = oracles.block(oracles.as_float64(params), bias, x.astype(np.float64), cfg=cfg, segments=segments)
    assert_close(got.out, want, TOLERANCE)
    assert got.entry.shape == (2, 5, cfg.mla.cache_width)
    assert got.stats == () if dense else isinstance(got.stats, RouterStats)


@pytest.mark.parametrize("dense", [True, False])
def test_gradient(dense):
    cfg, params, bias, table = setup(dense)

    def apply(x, *leaves):
        return block_apply(tree.unflatten_as(params, leaves), bias, x, cfg=cfg, table=table, policy=PLAIN).out

    def oracle(x, *leaves):
        return oracles.block(tree.unflatten_as(params, leaves), bias, x, cfg=cfg)

    leaves = [p.numpy() for p in tree.flatten(params)]
    # The oracle chooses experts itself; a step of 1e-6 along a direction must not change whom.
    check_gradient(apply, oracle, [normal(0, 1, 5, cfg.hidden_size), *leaves], directions=1, step=1e-6)


def test_cache_mask_and_replay_are_passed_on():
    cfg, params, bias, table = setup(False)
    x = normal(0, 1, 5, cfg.hidden_size)
    how = {"cfg": cfg, "policy": PLAIN}
    full = block_apply(params, bias, x, table=table, **how)
    past = LayerCache(full.entry[:, :3], tf.constant([3]))
    last = block_apply(params, bias, x[:, 3:], table=mla_rope(cfg.mla, [3, 4]), cache=past, **how)
    assert_close(last.out, full.out[:, 3:], TOLERANCE)
    masked = block_apply(params, bias, x, table=table, mask=[[True, False, False, True, False]], **how)
    assert float(tf.reduce_sum(masked.stats.load)) == 2 * cfg.moe.router.top_k
    others = (full.stats.experts + 1) % cfg.moe.router.num_experts
    replayed = block_apply(params, bias, x, table=table, experts=others, **how)
    np.testing.assert_array_equal(replayed.stats.experts, others)
