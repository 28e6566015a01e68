"""Scores of held-out answers: what packing and padding do not change, and what they are by another way."""

import math

import numpy as np
import pytest

from dsv3 import model_specs, pretrain_loss
from dsv3.data import TokenStream, pack_documents
from dsv3.eval import make_answer_evaluator
from tests.compare import PLAIN
from tests.small import model_config, random_params, random_router


def packed_of(cfg, sizes, length, seed=0):
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    tokens = rng.integers(0, cfg.vocab_size, starts[-1]).astype(np.int32)
    return pack_documents(TokenStream(tokens, starts, np.diff(starts)), length, learned=rng.random(len(tokens)) < 0.6)


@pytest.mark.parametrize("modules", [0, 1])
def test_scores_are_those_of_the_loss_however_rows_are_packed(modules):
    cfg = model_config(num_hidden_layers=2, num_nextn_predict_layers=modules)
    params, router = random_params(model_specs(cfg)), random_router(cfg)
    evaluate = make_answer_evaluator(cfg, batch_size=2, policy=PLAIN)
    sizes = [6, 5, 4, 7, 3]
    packed, alone = (evaluate(params, router, packed_of(cfg, sizes, length)) for length in (11, 6))
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
    rows = packed_of(cfg, sizes, 11)
    assert packed.tokens == rows.weights.sum() and evaluate.traces() == 2
    _, parts = pretrain_loss(params, router, rows.tokens, rows.weights, segments=rows.segments, cfg=cfg, policy=PLAIN)
    np.testing.assert_allclose(packed.nll, parts.nll, rtol=1e-5)
    if not modules:
        assert math.isnan(packed.mtp_nll) and math.isnan(packed.mtp_agreement)
        return
    later = sum(rows.weights[r, i + 1] for r, i in np.ndindex(len(rows.tokens), 10)
                if len({*rows.segments[r, i : i + 3]}) == 1)  # fmt: skip
    np.testing.assert_allclose(packed.mtp_nll * later, parts.mtp[0] * packed.tokens, rtol=1e-5)


def test_refusals():
    cfg = model_config(num_hidden_layers=2, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="make_answer_evaluator: `batch_size` is 0"):
        make_answer_evaluator(cfg, batch_size=0)
    rows = packed_of(cfg, [4], 5)
    evaluate = make_answer_evaluator(cfg, policy=PLAIN)
    model = random_params(model_specs(cfg)), random_router(cfg)
    with pytest.raises(ValueError, match="evaluate: `packed` has no target that counts"):
        evaluate(*model, rows._replace(weights=rows.weights * 0))
    with pytest.raises(ValueError, match="evaluate: `packed` holds token id"):
        evaluate(*model, rows._replace(tokens=rows.tokens + cfg.vocab_size))
