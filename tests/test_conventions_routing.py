"""Where the references differ the side is a named option: a test for each side. Router and multi-token prediction.

Expected values are written out or follow from another side; nothing here needs torch.
"""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.nn.mla import mla_rope
from dsv3.nn.model import embed_apply, head_weight
from dsv3.nn.mtp import mtp_apply
from dsv3.ops.router import router_scores, router_select
from dsv3.policy import default_policy

POLICY = default_policy().replace(fuse=False)
TINY = dsv3.preset("tiny")


def hidden(rows=2, time=7, seed=1):
    return tf.constant(np.random.default_rng(seed).normal(size=(rows, time, TINY.hidden_size)), tf.float32)


# Router


def test_left_out_groups_are_minus_infinity_or_zero():
    """Kept: group 1, all of whose biased scores are negative. With 0.0 experts of group 0 win."""
    scores = tf.constant([[0.1, 0.2, 0.6, 0.3]])
    bias = tf.constant([-2.0, -2.0, -1.0, -1.0])
    how = {"top_k": 2, "num_groups": 2, "groups_kept": 1}
    official = router_select(scores, bias, **how)
    assert official.experts.numpy().tolist() == [[2, 3]]
    zero = router_select(scores, bias, group_mask="zero", **how)
    assert zero.experts.numpy().tolist() == [[0, 1]]
    np.testing.assert_allclose(official.weights, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(zero.weights, [[1 / 3, 2 / 3]], rtol=1e-6)
    positive = tf.constant([0.1, 0.1, 0.2, 0.2])
    for side in ("-inf", "zero"):
        assert router_select(scores, positive, group_mask=side, **how).experts.numpy().tolist() == [[2, 3]]


@pytest.mark.parametrize("side", ["-inf", "zero"])
def test_group_mask_reaches_the_layer(side):
    """With every biased score negative, zero moves all choices to the left-out groups."""
    cfg = dataclasses.replace(TINY.moe, router=dataclasses.replace(TINY.moe.router, group_mask=side))
    rng = np.random.default_rng(0)
    params = tree.map_leaves(
        lambda s: tf.constant(rng.normal(0.0, 0.4, s.shape), tf.float32), dsv3.moe_specs(cfg, std=1.0)
    )
    experts = dsv3.moe_apply(params, tf.fill([8], -5.0), hidden(), cfg=cfg, policy=POLICY).stats.experts.numpy()
    scores = router_scores(tf.reshape(hidden(), [-1, 32]), params.router).numpy().reshape(-1, 4, 2)
    kept = np.argsort(-scores.sum(-1), -1)[:, :2]
    is_kept = (experts.reshape(-1, 2, 1) // 2 == kept[:, None]).any(-1)
    assert np.all(is_kept == (side == "-inf"))


def test_bias_selects_and_does_not_weigh():
    """The weights come from the unbiased scores, normalised, then scaled."""
    scores, bias = tf.constant([[0.2, 0.4, 0.6]]), tf.constant([1.0, 0.0, 0.0])
    routing = router_select(scores, bias, top_k=2, scale=2.5)
    assert routing.experts.numpy().tolist() == [[0, 2]]
    np.testing.assert_allclose(routing.weights, [[2.5 * 0.25, 2.5 * 0.75]], rtol=1e-6)
    plain = router_select(scores, bias, top_k=2, scale=2.5, normalize=False)
    np.testing.assert_allclose(plain.weights, [[0.5, 1.5]], rtol=1e-6)


def test_router_is_float32_for_bfloat16_inputs():
    """Two experts whose scores differ by less than bfloat16 can tell: float32 takes the better, later one."""
    x = tf.constant([[1.0, 2**-9]], tf.bfloat16)
    weight = tf.constant([[1.0, 1.0], [0.0, 1.0]], tf.bfloat16)
    scores = router_scores(x, weight)
    assert scores.dtype == tf.float32
    assert router_select(scores, tf.zeros([2]), top_k=1).experts.numpy().tolist() == [[1]]
    rounded = tf.cast(tf.sigmoid(tf.matmul(x, weight)), tf.float32)
    assert router_select(rounded, tf.zeros([2]), top_k=1).experts.numpy().tolist() == [[0]]


def test_selection_bias_is_float32_for_bfloat16_models():
    """A bias that bfloat16 would round away decides between equal scores, through the whole layer."""
    cfg = dataclasses.replace(TINY.moe, router=dataclasses.replace(TINY.moe.router, num_groups=1, groups_kept=1, top_k=1))
    zeros = tree.map_leaves(lambda s: tf.zeros(s.shape, tf.bfloat16), dsv3.moe_specs(cfg, std=1.0))
    bias = tf.constant([1.0, 1 + 2**-10] + [0.0] * 6)
    assert float(tf.cast(bias[1], tf.bfloat16)) == 1.0
    out = dsv3.moe_apply(zeros, bias, tf.cast(hidden(), tf.bfloat16), cfg=cfg, policy=POLICY)
    assert set(out.stats.experts.numpy().ravel()) == {1}


# Multi-token prediction


def mtp_model(**options):
    cfg = TINY.replace(num_nextn_predict_layers=1, initializer_range=0.3, **options)
    return cfg, dsv3.model_init(tf.constant([3, 4]), cfg), dsv3.router_init(cfg)


TOKENS = tf.constant([[3, 1, 4, 1, 5, 9, 2, 6]])


def chain(cfg, params, router):
    out = dsv3.model_apply(params, router, TOKENS[:, :-1], cfg=cfg, policy=POLICY)
    return out, dsv3.mtp_chain(params, router, out, TOKENS[:, 1:], cfg=cfg, policy=POLICY).normed[0].numpy()


def test_mtp_concat_says_which_half_takes_the_embedding():
    cfg, params, router = mtp_model()
    other = cfg.replace(mtp_concat="hidden_first")
    halves = tf.split(params.mtp.proj, 2, axis=1)
    swapped = params._replace(mtp=params.mtp._replace(proj=tf.concat(halves[::-1], 1)))
    _, want = chain(cfg, params, router)
    np.testing.assert_allclose(chain(other, swapped, router)[1], want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert np.abs(chain(other, params, router)[1] - want).max() > 0.1
    # As published the first D rows are the embedding's: without them the next token does not matter.
    blind = params._replace(mtp=params.mtp._replace(proj=tf.concat([tf.zeros_like(halves[0]), halves[1]], 1)))
    out = dsv3.model_apply(blind, router, TOKENS[:, :-1], cfg=cfg, policy=POLICY)
    ones = [
        dsv3.mtp_chain(blind, router, out, ahead, cfg=cfg, policy=POLICY).normed
        for ahead in (TOKENS[:, 1:], tf.zeros_like(TOKENS[:, 1:]))
    ]
    np.testing.assert_array_equal(*ones)


@pytest.mark.parametrize("side, field", [("normed", "hidden"), ("raw", "raw_hidden")])
def test_mtp_reads_the_hidden_state_before_or_after_the_final_norm(side, field):
    cfg, params, router = mtp_model(mtp_hidden=side)
    params = params._replace(norm=tf.constant(np.random.default_rng(5).uniform(0.2, 2, 32), tf.float32))
    out, got = chain(cfg, params, router)
    found = {}
    for name in ("hidden", "raw_hidden"):
        found[name] = mtp_apply(
            tree.slice_leading(params.mtp, 0), router.mtp[0], getattr(out, name),
            embed_apply(params, TOKENS[:, 1:], policy=POLICY), cfg=cfg,
            table=mla_rope(cfg.mla, tf.range(7)), policy=POLICY,
        ).normed.numpy()  # fmt: skip
    np.testing.assert_allclose(got, found[field], rtol=0, atol=1e-6)
    assert np.abs(found["hidden"] - found["raw_hidden"]).max() > 0.05


def test_mtp_shares_embedding_and_head():
    cfg = TINY.replace(tie_word_embeddings=True)
    params = dsv3.model_init(tf.constant([0, 1]), cfg)
    assert params.head == ()
    np.testing.assert_array_equal(head_weight(params), tf.transpose(params.embed))
    assert not [path for path, _ in tree.items(params.mtp) if "head" in path or path.endswith("embed")]
