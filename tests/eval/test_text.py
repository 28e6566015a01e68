"""Bits per byte: windows that count every token once, and sums against the float64 oracle."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import model_specs
from dsv3.data import TokenStream
from dsv3.eval import bits_per_byte, make_evaluator, text_windows
from tests import oracles
from tests.compare import PLAIN
from tests.small import model_config, random_params, random_router

CFG = model_config(num_hidden_layers=2, num_nextn_predict_layers=1, max_position_embeddings=12)


def stream(length, size=60, seed=0):
    tokens = np.random.default_rng(seed).integers(0, CFG.vocab_size, length).astype(np.int32)
    return TokenStream(tokens, np.array([0, length], np.int64), np.array([size], np.int64))


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 4), st.data())
def test_windows_count_every_token_but_the_first_once(count, length, batch_size, data):
    overlap = data.draw(st.integers(0, length - 1))
    tokens = np.arange(1, count + 1, dtype=np.int32)
    counted = []
    for batch in text_windows(tokens, length, batch_size=batch_size, overlap=overlap):
        assert batch.tokens.shape == (batch_size, length + 1) and batch.weights.shape == (batch_size, length)
        for row, weights in zip(batch.tokens, batch.weights):
            places = np.flatnonzero(weights)
            counted += row[places + 1].tolist()
            if len(places):
                assert (np.diff(row[: places[-1] + 2]) == 1).all(), "the context is what stands before"
                assert row[0] == 1 or places[0] >= overlap, "context of at least the overlap"
    assert counted == list(range(2, count + 1))


def oracle_score(params, router, text, length, overlap):
    """One window after the other and one token after the other."""
    params, router = oracles.as_float64(params), oracles.as_float64(router)
    tokens, start, first = text.tokens, 0, 0
    nll = hits = mtp_nll = agreed = later = 0.0
    while True:
        piece = tokens[start : start + length + 1]
        logits, hidden = oracles.model(params, router, piece[None, :-1], cfg=CFG)
        ahead = params.embed[piece[None, 1:]]
        _, read = oracles.mtp(oracles.layer(params.mtp, 0), router.mtp[0], hidden, ahead, cfg=CFG)
        guesses = (read @ oracles.head(params))[0]
        for i in range(first, len(piece) - 1):
            nll -= math.log(oracles.softmax(logits[0, i])[piece[i + 1]])
            hits += logits[0, i].argmax() == piece[i + 1]
            if i > 0:  # the token before it is drafted from, so this one may be the module's
                mtp_nll -= math.log(oracles.softmax(guesses[i - 1])[piece[i + 1]])
                agreed += guesses[i - 1].argmax() == logits[0, i].argmax()
                later += 1
        if start + length + 1 >= len(tokens):
            break
        start, first = start + length - overlap, overlap
    count = len(tokens) - 1
    bits = nll / math.log(2) / text.text_bytes.sum()
    return bits, nll / count, hits / count, mtp_nll / later, agreed / later


def test_scores_match_the_oracle_and_compile_once():
    params, router = random_params(model_specs(CFG)), random_router(CFG)
    evaluate = make_evaluator(CFG, length=8, batch_size=2, overlap=3, policy=PLAIN)
    for seed, length in enumerate((30, 9, 4, 31)):
        text = stream(length, seed=seed)
        got = evaluate(params, router, text)
        want = oracle_score(params, router, text, 8, 3)
        np.testing.assert_allclose(got[:5], want, rtol=1e-5)
        assert (got.tokens, got.bytes) == (length - 1, 60)
    assert evaluate.traces() == 1


def test_bits_per_byte_is_the_evaluators_and_needs_no_module():
    cfg = CFG.replace(num_nextn_predict_layers=0)
    params, router = random_params(model_specs(cfg)), random_router(cfg)
    text = stream(25)
    got = make_evaluator(cfg, length=12, overlap=6, batch_size=4, policy=PLAIN)(params, router, text)
    assert math.isnan(got.mtp_nll) and math.isnan(got.mtp_agreement)
    assert bits_per_byte(params, router, text, cfg=cfg, batch_size=4, policy=PLAIN) == pytest.approx(got.bits_per_byte)
    assert got.bits_per_byte == pytest.approx(got.nll * 24 / math.log(2) / 60)


def test_wrong_input_is_named():
    for how, message in [
        ({"length": 13}, "`length` is 13, want 1 to max_length=12"),
        ({"length": 0}, "`length` is 0"),
        ({"length": 8, "overlap": 8}, "`overlap` is 8, want 0 to length - 1 = 7"),
        ({"length": 8, "batch_size": 0}, "`batch_size` is 0"),
    ]:
        with pytest.raises(ValueError, match=f"make_evaluator: {message}"):
            make_evaluator(CFG, **how)
    evaluate = make_evaluator(CFG, length=8, policy=PLAIN)
    text = stream(20)
    with pytest.raises(ValueError, match=r"evaluate: `stream` holds token id 40, want ids in \[0, 40\)"):
        evaluate((), (), text._replace(tokens=text.tokens * 0 + 40))
    with pytest.raises(ValueError, match="text_windows: `tokens` has 1 tokens, want at least 2"):
        next(text_windows(np.zeros(1, np.int32), 4))
