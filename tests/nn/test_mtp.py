"""Multi-token prediction."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.nn.mla import mla_rope
from dsv3.nn.mtp import mtp_apply, mtp_specs
from tests import oracles
from tests.compare import PLAIN, assert_close, check_gradient, normal
from tests.small import model_config, random_params, random_router, random_tokens

TOLERANCE = 5e-6


def setup(**fields):
    cfg = dataclasses.replace(model_config(), **fields)
    return cfg, random_params(dsv3.model_specs(cfg)), random_router(cfg), random_tokens(cfg, 2, 7)


@pytest.mark.parametrize("concat", ["embedding_first", "hidden_first"])
def test_one_module(concat):
    cfg = dataclasses.replace(model_config(), mtp_concat=concat)
    params, bias = random_params(mtp_specs(cfg)), normal(5, 6, scale=0.1)
    hidden, embedded = normal(0, 2, 5, 12), normal(1, 2, 5, 12)
    got = mtp_apply(params, bias, hidden, embedded, cfg=cfg, table=mla_rope(cfg.mla, tf.range(5)), policy=PLAIN)
    p = oracles.as_float64(params)
    want = oracles.mtp(p, bias, hidden.astype(np.float64), embedded.astype(np.float64), cfg=cfg)
    for part, expected in zip((got.hidden, got.normed), want):
        assert_close(part, expected, TOLERANCE)


def test_gradient():
    cfg = model_config()
    params, bias = random_params(mtp_specs(cfg)), normal(5, 6, scale=0.1)
    how = {"cfg": cfg, "table": mla_rope(cfg.mla, tf.range(4)), "policy": PLAIN}
    check_gradient(
        lambda h, e, *p: mtp_apply(tree.unflatten_as(params, p), bias, h, e, **how).normed,
        lambda h, e, *p: oracles.mtp(tree.unflatten_as(params, p), bias, h, e, cfg=cfg)[1],
        [normal(0, 1, 4, 12), normal(1, 1, 4, 12), *(p.numpy() for p in tree.flatten(params))],
        directions=1,
        step=1e-6,
    )


@pytest.mark.parametrize("source", ["normed", "raw"])
@pytest.mark.parametrize("segmented", [False, True])
def test_chain_of_two(source, segmented):
    cfg, params, router, tokens = setup(mtp_hidden=source)
    inputs, ahead = tokens[:, :-1], tokens[:, 1:]
    where = {"segments": np.array([[0, 0, 0, 1, 1, 1]] * 2)} if segmented else {}
    out = dsv3.model_apply(params, router, inputs, cfg=cfg, policy=PLAIN, **where)
    chain = dsv3.mtp_chain(params, router, out, ahead, cfg=cfg, policy=PLAIN, **where)
    assert chain.normed.shape == (2, 2, 6, 12) and chain.stats.load.shape == (2, 6)

    p, r = oracles.as_float64(params), oracles.as_float64(router)
    hidden = (out.hidden if source == "normed" else out.raw_hidden).numpy().astype(np.float64)
    for k in range(2):
        # Module k + 1 reads token i + k + 1; where the row ends, its last token.
        reads = ahead[:, np.minimum(np.arange(6) + k, 5)]
        hidden, normed = oracles.mtp(oracles.layer(p.mtp, k), r.mtp[k], hidden, p.embed[reads], cfg=cfg, **where)
        assert_close(chain.normed[k], normed, 2 * TOLERANCE, f"module {k + 1}")


def test_modules_read_only_the_past():
    """Module k at position i depends on tokens up to i + k."""
    cfg, params, router, tokens = setup()
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % cfg.vocab_size

    def normed(row):
        out = dsv3.model_apply(params, router, row[:, :-1], cfg=cfg, policy=PLAIN)
        return dsv3.mtp_chain(params, router, out, row[:, 1:], cfg=cfg, policy=PLAIN).normed.numpy()

    differs = np.abs(normed(tokens) - normed(changed)).max((1, 3)) > 1e-5
    assert [int(np.argmax(d)) for d in differs] == [4, 3]
    assert differs[0, 4:].all() and differs[1, 3:5].all()


def test_masked_tokens_are_not_counted():
    cfg, params, router, tokens = setup()
    out = dsv3.model_apply(params, router, tokens[:, :-1], cfg=cfg, policy=PLAIN)
    mask = np.array([[1, 1, 0, 0, 0, 1]] * 2, bool)
    load = dsv3.mtp_chain(params, router, out, tokens[:, 1:], cfg=cfg, mask=mask, policy=PLAIN).stats.load
    assert load.numpy().sum(-1).tolist() == [2 * 6] * 2


def test_wrong_input_is_named():
    cfg, params, router, tokens = setup()
    out = dsv3.model_apply(params, router, tokens, cfg=cfg, policy=PLAIN)
    with pytest.raises(ValueError, match=r"mtp_chain: `next_tokens` has shape \(2, 6\), want \(2, 7\) \[B, T\]"):
        dsv3.mtp_chain(params, router, out, tokens[:, 1:], cfg=cfg)
    without = model_config(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"mtp_chain: the config has no MTP module \(num_nextn_predict_layers is 0\)"):
        dsv3.mtp_chain(params, router, out, tokens, cfg=without)
    module = tree.slice_leading(params.mtp, 0)
    how = {"cfg": cfg, "table": mla_rope(cfg.mla, tf.range(7)), "policy": PLAIN}
    with pytest.raises(ValueError, match=r"mtp_apply: `embedded` has shape \(2, 6, 12\), want \(2, 7, 12\) \[B, T, D\]"):
        mtp_apply(module, router.mtp[0], out.hidden, out.hidden[:, 1:], **how)
