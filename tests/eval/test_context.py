"""Long contexts at small lengths: the engine's chunks and steps against one forward pass, with YaRN."""

import numpy as np
import pytest

import dsv3
from dsv3.eval.context import context_bytes, continue_context, whole_logprobs
from tests.compare import FUSED, PLAIN
from tests.more import LONG
from tests.small import model_config, random_params, random_router, random_tokens

# Far beyond the length that YaRN stretches, in blocks so small that attention over sequence and cache goes over tiles.
YARN = {"type": "yarn", "factor": 6, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
CFG = model_config(rope_scaling=YARN, max_position_embeddings=96, num_nextn_predict_layers=1, qk_rope_head_dim=6)
LENGTH, NEW = 96, 5


@pytest.fixture(scope="module")
def model():
    return random_params(dsv3.model_specs(CFG), std=0.3), random_router(CFG)


@pytest.mark.parametrize("policy", [PLAIN, pytest.param(FUSED, marks=LONG)], ids=["plain", "fused"])
def test_decoding_after_chunks_is_the_whole_forward_pass(model, policy):
    policy = policy.replace(attention_block=4, attention_unroll=3)
    prompt = random_tokens(CFG, 1, LENGTH - NEW)[0].tolist()
    told = []
    how = {"new_tokens": NEW, "policy": policy, "chunk": 13, "on_chunk": lambda *counts: told.append(counts)}
    found = continue_context(CFG, *model, prompt, **how)
    whole = whole_logprobs(CFG, *model, [*prompt, *found.tokens[:-1].tolist()], last=NEW, policy=policy)
    assert found.logprobs.shape == whole.logprobs.shape == (NEW, CFG.vocab_size)
    assert (np.sort(found.best, -1) == np.arange(CFG.vocab_size)).all()
    there = np.take_along_axis(whole.logprobs, found.best, -1)
    # Sums of up to 96 float32 terms, through three layers, at log-probabilities of up to 10.
    np.testing.assert_allclose(found.logprobs, there, atol=2e-5)
    np.testing.assert_array_equal(found.tokens, whole.logprobs.argmax(-1))
    assert told[-1] == (LENGTH - NEW - 1, LENGTH - NEW - 1) and len(told) == 7
    assert min(found.read_seconds, found.read_rate, found.step_seconds, whole.seconds, whole.trace_seconds) > 0


def test_it_is_the_far_past_that_is_compared(model):
    """A token at the beginning, and how YaRN stretches, change what is predicted at the end by far more than rounding."""
    tokens = random_tokens(CFG, 1, LENGTH)[0]
    other, shorter = tokens.copy(), CFG.replace(rope_scaling=YARN | {"factor": 3})
    other[1] = (other[1] + 1) % CFG.vocab_size
    want = whole_logprobs(CFG, *model, tokens, last=1, policy=PLAIN).logprobs
    for cfg, changed in [(CFG, other), (shorter, tokens)]:
        got = whole_logprobs(cfg, *model, changed, last=1, policy=PLAIN).logprobs
        assert np.abs(got - want).max() > 1e-3


def test_a_prompt_of_one_token(model):
    found = continue_context(CFG, *model, [3], new_tokens=2, policy=PLAIN)
    whole = whole_logprobs(CFG, *model, [3, int(found.tokens[0])], last=2, policy=PLAIN)
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(whole.logprobs, found.best, -1), atol=2e-5)


def test_refusals(model):
    with pytest.raises(ValueError, match="Engine: `max_length` is 97, want at most the model's, which is 96"):
        continue_context(CFG, *model, [1] * 95, new_tokens=2)
    with pytest.raises(ValueError, match="continue_context: `new_tokens` is 1, want 2 or more"):
        continue_context(CFG, *model, [1], new_tokens=1)
    for last in (0, 3):
        with pytest.raises(ValueError, match=f"whole_logprobs: `last` is {last}, want 1 to the 2 `tokens`"):
            whole_logprobs(CFG, *model, [1, 2], last=last)


def test_estimates():
    """The engine's grows by little more than its cache, the whole pass's by the widest layer; the rest is fixed."""
    cfg = dsv3.preset("deepseek-v3")

    def growth(**how):
        sizes = [context_bytes(cfg, tokens, **how) for tokens in (1000, 2000, 4000)]
        assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])
        return (sizes[1] - sizes[0]) / 1000

    for dtype, cache, entry in [("bfloat16", None, 1152), ("float32", None, 2304), ("bfloat16", "float8", 656)]:
        assert 61 * entry <= growth(chunk=512, dtype=dtype, cache=cache) < 1.5 * 61 * entry
    whole = growth(chunk=None, dtype="bfloat16")
    assert whole > 128 * (192 + 192 + 128) * 2  # queries, keys and values of one layer are there at one time
    assert growth(chunk=None, dtype="float32") == 2 * whole
    with pytest.raises(ValueError, match="context_bytes: `tokens` is 0, want > 0"):
        context_bytes(cfg, 0, chunk=None, dtype="float32")
