"""The pretraining loss against the float64 oracles of the model and its MTP modules."""

import numpy as np
import pytest
import tensorflow as tf

import dsv3.train.loss
from dsv3 import model_apply, model_specs, mtp_chain, pretrain_loss
from tests import oracles
from tests.compare import PLAIN, assert_close, assert_trees_close
from tests.small import model_config, random_params, random_router, random_tokens

BATCH, LENGTH = 2, 6


def model(**fields):
    cfg = model_config(**fields)
    return cfg, random_params(model_specs(cfg)), random_router(cfg)


def oracle_losses(cfg, params, router, tokens):
    """Cross-entropy `[1 + modules, B, T]` of the target t_{i+k+1} at position i; NaN where there is no such token."""
    params, router = oracles.as_float64(params), oracles.as_float64(router)
    inputs = tokens[:, :-1]
    _, hidden = oracles.model(params, router, inputs, cfg=cfg)
    losses = np.full([1 + cfg.num_mtp_layers, *inputs.shape], np.nan)

    def fill(k, read):
        for b, i in np.ndindex(*inputs.shape):
            if i + k + 1 < tokens.shape[1]:
                target = tokens[b, i + k + 1 : i + k + 2]
                losses[k, b, i] = oracles.token_nll(read[b, i : i + 1], oracles.head(params), target)[0]

    fill(0, hidden)
    for k in range(1, cfg.num_mtp_layers + 1):
        later = np.minimum(np.arange(LENGTH) + k, LENGTH)  # positions without such a token get the last one
        embedded = params.embed[tokens[:, later]]
        hidden, read = oracles.mtp(oracles.layer(params.mtp, k - 1), router.mtp[k - 1], hidden, embedded, cfg=cfg)
        fill(k, read)
    return losses


def weighted(losses, weights, normalizer):
    """Module k at position i counts with the weight of its target, which stands at i + k in `weights`."""
    sums = []
    for k, table in enumerate(losses):
        pairs = [(b, i) for b, i in np.ndindex(*weights.shape) if i + k < LENGTH]
        sums.append(sum(table[b, i] * weights[b, i + k] for b, i in pairs) / normalizer)
    return sums[0], np.array(sums[1:])


@pytest.mark.parametrize("normalizer", [None, 7.5])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_oracle(normalizer, masked):
    cfg, params, router = model()
    tokens = random_tokens(cfg, BATCH, LENGTH + 1)
    weights = np.random.default_rng(1).integers(0, 3, (BATCH, LENGTH)).astype(np.float32) if masked else None
    how = {"cfg": cfg, "mtp_weight": 0.7, "balance_weight": 0.2, "policy": PLAIN}
    loss, parts = pretrain_loss(params, router, tokens, weights, normalizer=normalizer, **how)
    weights = np.ones([BATCH, LENGTH]) if weights is None else weights
    total = weights.sum() if normalizer is None else normalizer
    nll, mtp = weighted(oracle_losses(cfg, params, router, tokens), weights, total)
    assert_close(parts.nll, nll, 1e-5)
    assert_close(parts.mtp, mtp, 1e-5)
    assert_close(loss, nll + 0.7 * mtp.mean() + 0.2 * float(parts.balance), 1e-5)


@pytest.mark.parametrize("target", range(LENGTH))
def test_a_module_learns_its_own_distance_and_no_other(target):
    """With one weight, on target t_{p+1}, module k is judged at position p − k by nothing but that token."""
    cfg, params, router = model()
    tokens = random_tokens(cfg, 1, LENGTH + 1)
    weights = np.zeros([1, LENGTH], np.float32)
    weights[0, target] = 1.0
    _, parts = pretrain_loss(params, router, tokens, weights, cfg=cfg, policy=PLAIN)
    losses = oracle_losses(cfg, params, router, tokens)
    want = [losses[k, 0, target - k] if target >= k else 0.0 for k in range(3)]
    assert_close(tf.concat([[parts.nll], parts.mtp], 0), want, 1e-5)


def test_balance_and_load_are_summed_over_trunk_and_modules():
    cfg, params, router = model()
    tokens = random_tokens(cfg, BATCH, LENGTH + 1)
    _, parts = pretrain_loss(params, router, tokens, cfg=cfg, policy=PLAIN)
    out = model_apply(params, router, tokens[:, :-1], cfg=cfg, policy=PLAIN)
    chain = mtp_chain(params, router, out, tokens[:, 1:], cfg=cfg, policy=PLAIN)
    assert_close(parts.balance, float(tf.reduce_sum(out.stats.balance) + tf.reduce_sum(chain.stats.balance)))
    assert_close(parts.load.moe, out.stats.load)
    assert_close(parts.load.mtp, chain.stats.load)
    chosen = BATCH * LENGTH * cfg.moe.router.top_k
    np.testing.assert_array_equal(np.sum(np.concatenate(parts.load), 1), [chosen] * 4)


@pytest.mark.parametrize(("fields", "modules", "mixtures"), [
    ({"num_nextn_predict_layers": 0}, 0, 2),
    ({"num_nextn_predict_layers": 0, "first_k_dense_replace": 3}, 0, 0),
    ({"num_nextn_predict_layers": 1, "first_k_dense_replace": 3}, 1, 0),
])  # fmt: skip
def test_models_without_modules_or_mixtures(fields, modules, mixtures):
    cfg, params, router = model(**fields)
    tokens = random_tokens(cfg, BATCH, LENGTH + 1)
    loss, parts = pretrain_loss(params, router, tokens, cfg=cfg, mtp_weight=0.5, balance_weight=0.1, policy=PLAIN)
    nll, mtp = weighted(oracle_losses(cfg, params, router, tokens), np.ones([BATCH, LENGTH]), BATCH * LENGTH)
    assert parts.mtp.shape == [modules] and parts.load.moe.shape[0] == mixtures and parts.load.mtp.shape[0] == modules
    assert (float(parts.balance) > 0) == (modules + mixtures > 0)
    want = nll + 0.1 * float(parts.balance) + (0.5 * mtp.mean() if modules else 0.0)
    assert_close(loss, want, 1e-5)


def test_all_parts_of_the_loss_use_one_head(monkeypatch):
    """A head that is cast or turned for each part anew has gradients of other bits, and more work."""
    cfg, made = model_config(tie_word_embeddings=True), []
    real = dsv3.train.loss.head_weight
    monkeypatch.setattr(dsv3.train.loss, "head_weight", lambda params: made.append(1) or real(params))
    pretrain_loss(random_params(model_specs(cfg)), random_router(cfg), random_tokens(cfg, 2, 5), cfg=cfg, policy=PLAIN)
    assert len(made) == 1


def test_no_weight_at_all_is_a_loss_of_zero():
    cfg, params, router = model(num_nextn_predict_layers=1)
    tokens = random_tokens(cfg, 1, LENGTH + 1)
    loss, _ = pretrain_loss(params, router, tokens, np.zeros([1, LENGTH]), cfg=cfg, balance_weight=0.0, policy=PLAIN)
    assert float(loss) == 0.0


def test_wrong_input_is_named():
    cfg, params, router = model(num_nextn_predict_layers=0)
    tokens = random_tokens(cfg, 2, 4)
    for arguments, message in [
        ((tokens[0],), r"pretrain_loss: `tokens` has shape \(4,\), want \(\?, \?\) \[B, T\]"),
        ((tokens[:, :1],), "pretrain_loss: `tokens` has 1 column, want at least 2"),
        ((tokens, np.ones([2, 4])), r"pretrain_loss: `weights` has shape \(2, 4\), want \(2, 3\) \[B, T\]"),
        ((tokens + cfg.vocab_size,), "holds token id"),
    ]:
        with pytest.raises(ValueError, match=message):
            pretrain_loss(params, router, *arguments, cfg=cfg, policy=PLAIN)


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_packed_documents_are_learned_as_if_alone(modules):
    """With segments, a row of two documents has the losses of the two: no MTP module reads or predicts across the border."""
    cfg, params, router = model(num_nextn_predict_layers=modules)
    one, two = random_tokens(cfg, 1, 5, 1), random_tokens(cfg, 1, 4, 2)
    tokens = np.concatenate([one, two], 1)
    how = {"cfg": cfg, "policy": PLAIN, "normalizer": 3.0}
    _, packed = pretrain_loss(params, router, tokens, segments=np.repeat([[1, 2]], [5, 4], 1), **how)
    alone = [pretrain_loss(params, router, document, **how)[1] for document in (one, two)]
    assert_close(packed.nll, alone[0].nll + alone[1].nll, 1e-5)
    assert_close(packed.mtp, alone[0].mtp + alone[1].mtp, 1e-5)


def test_padding_changes_nothing():
    cfg, params, router = model()
    tokens = random_tokens(cfg, 2, 6)
    padded, segments = np.pad(tokens, [[0, 1], [0, 3]]), np.zeros([3, 9], np.int32)
    segments[:2, :6] = 1
    how = {"cfg": cfg, "policy": PLAIN}
    loss, want = pretrain_loss(params, router, tokens, **how)
    also, got = pretrain_loss(params, router, padded, segments=segments, **how)
    assert_close(also, loss, 1e-5)
    assert_trees_close(got, want, 1e-5)
