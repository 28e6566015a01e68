"""Both sides of `mtp_next`: what a second MTP module reads of the first."""

import numpy as np
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.nn.mla import mla_rope
from dsv3.nn.model import embed_apply
from dsv3.nn.mtp import mtp_apply
from dsv3.policy import CPU

POLICY = CPU.replace(fuse=False)


def chain_by_hand(cfg, params, router, out, ahead, second_input):
    table = mla_rope(cfg.mla, tf.range(ahead.shape[1]))
    hidden, normed = out.hidden, []
    for k in range(2):
        tokens = tf.concat([ahead[:, k:], tf.repeat(ahead[:, -1:], k, 1)], 1)
        module = mtp_apply(
            tree.slice_leading(params.mtp, k), router.mtp[k], hidden, embed_apply(params, tokens, policy=POLICY),
            cfg=cfg, table=table, policy=POLICY,
        )  # fmt: skip
        hidden = getattr(module, second_input)
        normed.append(module.normed)
    return np.stack(normed)


def test_second_module_reads_what_the_option_says():
    base = dsv3.preset("tiny").replace(num_nextn_predict_layers=2, initializer_range=0.2)
    params, router = dsv3.model_init(tf.constant([0, 7]), base), dsv3.router_init(base)
    # With weights of one both sides agree: the second module's own norm undoes the first's.
    uneven = tf.random.stateless_uniform(params.mtp.norm.shape, [0, 2], 0.2, 2.0)
    params = params._replace(mtp=params.mtp._replace(norm=uneven))
    tokens = tf.random.stateless_uniform([2, 7], [0, 1], 0, base.vocab_size, tf.int32)
    got = {}
    for option, field in (("raw", "hidden"), ("normed", "normed")):
        cfg = base.replace(mtp_next=option)
        assert dsv3.ModelConfig.from_hf(cfg.to_hf()) == cfg
        out = dsv3.model_apply(params, router, tokens[:, :-1], cfg=cfg, policy=POLICY)
        got[option] = dsv3.mtp_chain(params, router, out, tokens[:, 1:], cfg=cfg, policy=POLICY).normed.numpy()
        want = chain_by_hand(cfg, params, router, out, tokens[:, 1:], field)
        np.testing.assert_allclose(got[option], want, rtol=1e-5, atol=1e-5)  # float32, other order of operations
    np.testing.assert_array_equal(got["raw"][0], got["normed"][0])  # the first module is the same
    assert np.abs(got["raw"][1] - got["normed"][1]).max() > 0.01
