"""Batched, cached, chunked generation against the model's full forward pass."""

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.resident import measure_growth
from dsv3.serve import Engine, Request
from dsv3.serve.batch import rows_take
from dsv3.serve.steps import Caches, Rows
from tests import small
from tests.chi_square import assert_follows
from tests.compare import FUSED, PLAIN, XLA
from tests.more import LONG
from tests.serve.model import FREE, POLICY, assert_greedy, engine, full_logprobs, greedy, model, prompts


def test_unlike_prompts_decode_as_the_full_forward_pass():
    """More requests than rows, prompts of 1 to 40 tokens, ends at different times, caches that grow."""
    asked = prompts(5, 1, 40, 2, 8, 9, 17, 16, 3)
    lengths = [4, 30, 2, 9, 40, 1, 5, 12, 7]
    requests = [Request(prompt, max_new_tokens=n, **FREE) for prompt, n in zip(asked, lengths)]
    done = engine(chunk_sizes=(3, 16), smallest_cache=32).generate(requests)
    for prompt, length, completion in zip(asked, lengths, done):
        assert (completion.prompt_tokens, len(completion.tokens)) == (len(prompt), length)
        assert completion.finish_reason == "length" and completion.steps == length
        assert_greedy(prompt, completion)


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=LONG)])
def test_caches_longer_than_some_blocks_are_read_in_tiles(depth):
    """Chunks of 7 tokens in caches of 96 slots, with blocks of 4 queries of which 3 are unrolled; progress is told."""
    told = []
    policy = POLICY.replace(attention_block=4, attention_unroll=3)
    how = {"policy": policy, "chunk_sizes": (7,), "smallest_cache": 48, "max_batch": 2, "speculative": depth}
    asked = prompts(59, 17)
    run = Engine(*model(), **how, on_chunk=lambda *counts: told.append(counts))
    for prompt, done in zip(asked, run.generate(greedy(asked, 9))):
        assert_greedy(prompt, done)
    assert told == [(min(7 * i, 58), 58) for i in range(1, 10)]


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=LONG)])
def test_a_row_does_not_depend_on_its_batch(depth):
    asked = prompts(6, 3, 11, 4)
    settings = [{}, {"temperature": 1.3, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 1.0}]
    requests = [
        Request(prompt, max_new_tokens=10, seed=i + 2**40, **how, **FREE)
        for i, (prompt, how) in enumerate(zip(asked, settings))
    ]
    run = engine(speculative=depth)
    together = run.generate(requests)
    assert_greedy(asked[0], together[0])
    for request, want in zip(requests, together):
        (alone,) = run.generate([request])
        assert alone.tokens == want.tokens
        np.testing.assert_allclose(alone.logprobs, want.logprobs, atol=1e-5)
    turned = run.generate(requests[::-1])
    assert [c.tokens for c in turned[::-1]] == [c.tokens for c in together]


def test_a_second_call_traces_nothing():
    run = Engine(*model(), policy=POLICY, chunk_sizes=(8,), smallest_cache=32, max_batch=2)
    first = run.generate(greedy(prompts(9, 12), 18))
    traces = run.traces()
    assert traces == 3  # the first chunk of a prompt, a later one, a decode
    run.generate(greedy(prompts(3, 9), 20))
    run.generate(greedy(prompts(2, 2), 30))  # other lengths, same buckets
    assert run.generate(greedy(prompts(9, 12), 18)) == first
    assert run.traces() == traces


def test_other_parameters_need_no_tracing():
    cfg, params, router = model()
    run = engine()
    before = run.generate(greedy(prompts(5), 6))
    traces = run.traces()
    try:
        run.update(small.random_params(dsv3.model_specs(cfg), seed=9, std=0.25), router)
        other = run.generate(greedy(prompts(5), 6))
        # Variables, as a training state holds them, serve as well.
        run.update(tree.map_leaves(lambda leaf: tf.Variable(leaf), params), router)
        again = run.generate(greedy(prompts(5), 6))
    finally:
        run.update(params, router)
    assert other[0].tokens != before[0].tokens and again[0].tokens == before[0].tokens
    assert run.generate(greedy(prompts(5), 6)) == before
    assert run.traces() <= traces + 2  # variables are another kind of argument


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=LONG)])
def test_a_row_that_ends_at_the_cache_s_end_disturbs_no_other(depth):
    """A row ends with a full bucket and goes on being computed beside one that does not end yet."""
    asked = prompts(31, 2)
    requests = [Request(asked[0], max_new_tokens=1, **FREE), Request(asked[1], max_new_tokens=25, **FREE)]
    for first in (1, 2):
        requests[0] = Request(asked[0][: 32 - first], max_new_tokens=first, **FREE)
        done = engine(speculative=depth, smallest_cache=32).generate(requests)
        assert_greedy(asked[1], done[1])
        assert_greedy(requests[0].prompt, done[0])


def test_the_last_token_fits_max_length():
    for length in (95, 92):
        (done,) = engine().generate(greedy(prompts(length), 50))
        assert len(done.tokens) == 96 - length and done.finish_reason == "length"
        assert_greedy(prompts(length)[0], done)


def test_a_cache_that_grows_exists_beside_its_successor_only(own_garbage):
    """64 MB that become 128: the most that is needed meanwhile is little more than the latter."""
    rows = Rows(*(tf.constant([3, 5]) for _ in range(3)), ())
    caches = Caches(tf.random.uniform([4, 2, 2**15, 64]), ())
    (grown, same), growth = measure_growth(lambda: rows_take([(caches, rows)], [0, 1], 2**16))
    np.testing.assert_array_equal(grown.trunk[:, :, : 2**15], caches.trunk)
    assert grown.trunk.shape == (4, 2, 2**16, 64) and not grown.trunk[:, :, 2**15 :].numpy().any()
    assert same.length.numpy().tolist() == [3, 5]
    assert growth.peak < 1.25 * 2**27
    turned, _ = rows_take([(caches, rows)], [1, 0], 2**16)
    np.testing.assert_array_equal(turned.trunk[:, :, : 2**15], caches.trunk.numpy()[:, ::-1])


def test_many_equal_prompts_are_read_once_and_drawn_apart():
    prompt = prompts(7)[0]
    run = engine(max_batch=16)
    done = run.generate([Request(prompt, max_new_tokens=3, temperature=1.0, seed=seed, **FREE) for seed in range(608)])
    probs = np.exp(full_logprobs(prompt, [0])[0])
    assert_follows(np.bincount([c.tokens[0] for c in done], minlength=6), probs)
    for completion in done[:3]:
        want = full_logprobs(prompt, completion.tokens)
        np.testing.assert_allclose(completion.logprobs, want[range(3), completion.tokens], atol=1e-5)


def test_a_batch_shrinks_when_most_rows_have_ended():
    asked = prompts(*range(1, 17))
    requests = [Request(p, max_new_tokens=2 + 8 * (i in (3, 9)), **FREE) for i, p in enumerate(asked)]
    run = Engine(*model(), policy=POLICY, chunk_sizes=(16,), smallest_cache=48, max_batch=16)
    done = run.generate(requests)
    for i in (0, 3, 9, 15):
        assert_greedy(asked[i], done[i])
    assert run.traces() == 3  # a prefill and a decode of 16 rows, and a decode of the 2 that are left


def test_stop_tokens_end_a_row_and_count_as_its_token():
    prompt = prompts(6)[0]
    run = engine()
    (free,) = run.generate(greedy([prompt], 20))
    stop = free.tokens[4]
    place = free.tokens.index(stop)
    (done,) = run.generate(greedy([prompt], 20, stop_tokens=[stop]))
    assert done.tokens == free.tokens[: place + 1] and done.finish_reason == "stop_token"
    (done,) = run.generate([Request(prompt, max_new_tokens=20)])  # the config's own, token 1
    want = free.tokens[: free.tokens.index(1) + 1] if 1 in free.tokens else free.tokens
    assert done.tokens == want


def test_top_logprobs_are_the_full_forward_pass_s():
    prompt = prompts(6)[0]
    (done,) = engine(speculative=1).generate([Request(prompt, max_new_tokens=5, top_logprobs=3, **FREE)])
    want = full_logprobs(prompt, done.tokens)
    for place, best in enumerate(done.top_logprobs):
        order = np.argsort(-want[place])[:3]
        assert [token for token, _ in best] == order.tolist()
        np.testing.assert_allclose([value for _, value in best], want[place][order], atol=1e-5)
    assert len(done.top_logprobs) == 5
    assert engine().generate(greedy([prompt], 5))[0].top_logprobs == ((),) * 5
    assert done.experts is None and done.sampled_logprobs == (), "nothing is recorded unless it is asked for"


@pytest.mark.parametrize("policy", [FUSED, XLA, PLAIN.replace(dtype="bfloat16")], ids=["fused", "xla", "bfloat16"])
def test_policies_give_the_same_logprobs(policy):
    asked = prompts(1 if policy.jit else 11)
    done = engine(policy=policy, smallest_cache=16).generate(greedy(asked, 4))
    for prompt, completion in zip(asked, done):
        want = full_logprobs(prompt, completion.tokens)
        loose = policy.dtype == "bfloat16"
        np.testing.assert_allclose(completion.logprobs, want.max(-1), atol=0.1 if loose else 1e-5)


def test_logits_that_are_not_finite_are_an_error():
    cfg, params, router = model()
    bad = params._replace(norm=params.norm * float("nan"))
    with pytest.raises(ValueError, match="Engine: request 0: new token 0 has log-probability nan, want finite logits"):
        Engine(cfg, bad, router, policy=POLICY).generate(greedy(prompts(1), 4))


BAD = [
    ("some text", "request 1: `prompt` is text, but the engine has no tokenizer"),
    ([], "request 1: `prompt` is empty"),
    ([3, 6], r"request 1: `prompt` holds token id \[6\], want ids in \[0, 6\)"),
    ([-1], r"request 1: `prompt` holds token id \[-1\]"),
    ([1.5], r"request 1: `prompt` holds \[1.5\], want text or integer token ids"),
    ([1] * 96, "request 1: `prompt` has 96 tokens, want fewer than max_length, which is 96"),
    (Request([1], max_new_tokens=0), "`max_new_tokens` is 0, want > 0"),
    (Request([1], temperature=-1.0), "`temperature` is -1.0, want at least 0"),
    (Request([1], top_k=-1), "`top_k` is -1"),
    (Request([1], top_p=0.0), "`top_p` is 0.0, want above 0 and at most 1"),
    (Request([1], seed=2**64), "`seed` is 18446744073709551616"),
    (Request([1], stop_tokens=[6]), r"`stop_tokens` holds token id \[6\]"),
    (Request([1], top_logprobs=7), "`top_logprobs` is 7, want 0 to vocab_size, which is 6"),
    (Request([1], stop="end"), "`stop` is the string 'end', want a sequence of strings"),
    (Request([1], stop=["end", ""]), "`stop` holds an empty string"),
    (Request([1], stop=["end"]), "`stop` holds strings, but the engine has no tokenizer"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=range(len(BAD)))
def test_bad_requests_are_refused_before_any_work(bad, message):
    run = engine()
    bad = bad if isinstance(bad, Request) else Request(bad)
    traces = run.traces()
    with pytest.raises(ValueError, match=f"Engine: .*{message}"):
        run.stream([Request([1]), bad])
    assert run.traces() == traces


def test_bad_engines_and_arguments_are_refused():
    cfg, params, router = model()
    plain = cfg.replace(num_nextn_predict_layers=0)
    for what, message in [
        ({"speculative": -1}, "`speculative` is -1, want at least 0"),
        ({"max_batch": 0}, "`max_batch` is 0, want > 0"),
        ({"max_length": 0}, "`max_length` is 0, want > 0"),
        ({"max_length": 97}, "`max_length` is 97, want at most the model's, which is 96"),
        ({"chunk_sizes": ()}, "`chunk_sizes` is "),
    ]:
        with pytest.raises(ValueError, match=f"Engine: {message}"):
            Engine(cfg, params, router, **what)
    with pytest.raises(ValueError, match="Engine: `speculative` is 1, but the model has no MTP module"):
        Engine(plain, params._replace(mtp=()), dsv3.router_init(plain), speculative=1)
    with pytest.raises(ValueError, match="Engine: `requests` is a Request, want a list"):
        engine().generate(Request([1]))
    with pytest.raises(ValueError, match="Engine: request 0 is a str, want a Request"):
        engine().generate(["hello"])
    assert engine().generate([]) == []
