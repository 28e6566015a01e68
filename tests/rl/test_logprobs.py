"""Log-probabilities in the form of training: of the formula, of the sampler, with the experts of the sampler."""

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import pretrain_loss, tree
from dsv3.nn.model import model_apply
from dsv3.rl.logprobs import token_logprobs
from dsv3.serve import Request
from tests.compare import PLAIN, assert_close, loops
from tests.rl.model import BFLOAT16, FREE, engine, model, prompts, together
from tests.small import random_tokens

LENGTHS = (3, 1, 11, 7)


def sample(run, temperature=0.8, tokens=12, seed=0):
    asked = prompts(*LENGTHS)
    how = {"max_new_tokens": tokens, "temperature": temperature, **FREE}
    return list(zip(asked, run.generate([Request(p, seed=seed + i, **how) for i, p in enumerate(asked)])))


def compared(pairs, temperature=0.8, experts=None, policy=PLAIN):
    """For each pair the largest difference from the sampler's log-probabilities, and for each of its choices of experts
    whether training made it, too."""
    cfg, params, router = model()
    tokens = together(pairs)
    got = token_logprobs(params, router, tokens, cfg=cfg, temperature=temperature, experts=experts, policy=policy)
    for row, (prompt, done) in enumerate(pairs):
        length = len(prompt) + len(done.tokens) - 1
        assert done.experts.shape == (2, length, 2) and done.experts.dtype == np.int16
        apart = np.array(done.sampled_logprobs) - got.logprobs[row, len(prompt) - 1 : length]
        chosen = got.experts.numpy()[:, row, :length, None] == done.experts[..., None]
        yield np.abs(apart).max(), chosen.any(-1)


@pytest.mark.parametrize("temperature, kept", [(1.0, 0), (0.6, 0), (0.6, 2**25)])
def test_matches_the_softmax_of_the_logits(temperature, kept):
    cfg, params, router = model()
    tokens = random_tokens(cfg, 2, 7)
    policy = PLAIN.replace(loss_chunk=5, loss_keep=kept)
    got = token_logprobs(params, router, tokens, cfg=cfg, temperature=temperature, policy=policy)
    logits = model_apply(params, router, tokens[:, :-1], cfg=cfg, policy=PLAIN).logits.numpy().astype(np.float64)
    logp = logits / temperature - logits.max(-1, keepdims=True) / temperature
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    # Float32 logits of size 3 over the temperature.
    np.testing.assert_allclose(got.logprobs, np.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0], atol=1e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(logp) * logp).sum(-1), atol=1e-5)
    assert got.experts.shape == (2, 2, 6, 2) and got.mtp.shape == (0,)


@pytest.mark.parametrize("depth, temperature", [(0, 0.7), (2, 1.3), (2, 0.0)])
def test_equals_the_samplers_with_and_without_drafts(depth, temperature):
    """Float32 with caches, chunks, absorbed attention and batches of other sizes: logits within a few roundings of 3."""
    pairs = sample(engine(speculative=depth), temperature)
    for apart, same in compared(pairs, temperature or 1.0):
        assert apart < 2e-5 and same.all()
    if depth:
        assert 0 < sum(done.accepted for _, done in pairs) < sum(done.drafted for _, done in pairs)


def test_a_row_that_ends_within_accepted_drafts_keeps_its_own_part_of_the_record():
    pairs = [pair for seed in range(0, 40, 4) for pair in sample(engine(speculative=2), 1.3, 2, seed)]
    assert any(done.steps + done.accepted > 2 for _, done in pairs), "no row was cut off, want other prompts here"
    assert all(len(done.tokens) == 2 == len(done.sampled_logprobs) for _, done in pairs)
    assert all(apart < 2e-5 and same.all() for apart, same in compared(pairs, 1.3))


@pytest.mark.parametrize("depth", [0, 1])
def test_prompts_whose_chunks_read_a_long_cache_in_tiles_have_their_experts_recorded(depth):
    """Chunks of 7 tokens, caches of 64 slots, blocks of 4 queries of which 3 are unrolled, tiles of 16 slots."""
    tiled = PLAIN.replace(attention_block=4, attention_unroll=3)
    run = engine(speculative=depth, policy=tiled, chunk_sizes=(7,), smallest_cache=48)
    asked = prompts(50, 17)
    how = {"max_new_tokens": 5, "temperature": 0.8, **FREE}
    pairs = list(zip(asked, run.generate([Request(prompt, seed=i, **how) for i, prompt in enumerate(asked)])))
    for apart, same in compared(pairs):
        assert apart < 2e-5 and same.all()


def test_a_model_without_mixtures_records_no_experts():
    from dsv3.serve import Engine

    cfg, params, router = model(0, num_hidden_layers=1)
    run = Engine(cfg, params, router, policy=PLAIN, chunk_sizes=(8,), smallest_cache=32, record=True)
    (done,) = run.generate([Request([3, 4], max_new_tokens=2, temperature=0.9, **FREE)])
    got = token_logprobs(params, router, [[3, 4, *done.tokens]], cfg=cfg, temperature=0.9, policy=PLAIN)
    assert done.experts.shape == (0, 3, 2) and got.experts.shape == (0, 1, 3, 2)
    np.testing.assert_allclose(done.sampled_logprobs, got.logprobs[0, 1:], atol=1e-5)


def test_router_replay_takes_away_what_other_experts_would_change():
    """In bfloat16 the decoder and the forward pass round otherwise, and now and then choose other experts."""
    pairs = sample(engine(speculative=2, policy=BFLOAT16), tokens=40)
    experts = np.zeros([2, len(pairs), together(pairs).shape[1] - 1, 2], np.int32)
    for row, (_, done) in enumerate(pairs):
        experts[:, row, : done.experts.shape[1]] = done.experts
    free, fixed = (list(compared(pairs, experts=x, policy=BFLOAT16)) for x in (None, experts))
    agreed = np.mean([same.mean() for _, same in free])
    assert 0.9 < agreed < 1.0 and all(same.all() for _, same in fixed), f"{agreed=}"
    apart, worst = (max(apart for apart, _ in found) for found in (fixed, free))
    # Logits of up to 4 in bfloat16 are spaced by 2^-6, and there are some ten roundings on the way to them.
    assert apart < 0.1 < worst, f"{apart=} {worst=}"


def test_replay_really_uses_the_given_experts_and_trains_their_gates():
    cfg, params, router = model()
    tokens = random_tokens(cfg, 2, 7)
    own = token_logprobs(params, router, tokens, cfg=cfg, policy=PLAIN)
    again = token_logprobs(params, router, tokens, cfg=cfg, experts=own.experts, policy=PLAIN)
    assert_close(again.logprobs, own.logprobs, 1e-6)
    other = (own.experts + 1) % 6
    with tf.GradientTape() as tape:
        tape.watch(params.moe.ffn.router)
        got = token_logprobs(params, router, tokens, cfg=cfg, experts=other, policy=PLAIN)
        total = tf.reduce_sum(got.logprobs)
    np.testing.assert_array_equal(got.experts, other)
    assert np.abs(got.logprobs - own.logprobs).max() > 0.01
    assert np.abs(tape.gradient(total, params.moe.ffn.router)).max() > 0


def test_few_logits_are_computed_at_once():
    cfg, params, router = model()
    tokens = random_tokens(cfg, 2, 7)

    def found(policy):
        return token_logprobs(params, router, tokens, cfg=cfg, policy=policy).logprobs

    assert loops(lambda: found(PLAIN.replace(loss_chunk=5))) == 0
    assert loops(lambda: found(PLAIN.replace(loss_chunk=5, loss_keep=0))) == 1


def test_padding_changes_nothing_and_counts_nowhere():
    cfg, params, router = model()
    tokens = random_tokens(cfg, 1, 9)
    padded = np.concatenate([tokens, np.full((1, 4), 7, np.int32)], 1)
    mask = np.zeros([1, 12], np.float32)
    mask[0, 3:8] = 1
    short = token_logprobs(params, router, tokens, mask[:, :8], cfg=cfg, mtp=True, policy=PLAIN)
    long = token_logprobs(params, router, padded, mask, cfg=cfg, mtp=True, policy=PLAIN)
    assert_close(long.logprobs[:, :8], short.logprobs, 1e-5)
    assert_close(long.mtp, short.mtp, 1e-5)
    for a, b in zip(tree.flatten((long.load, long.balance)), tree.flatten((short.load, short.balance))):
        assert_close(a, b, 1e-5)
    assert float(tf.reduce_sum(long.load.moe[0])) == 8 * 2


def test_the_modules_loss_is_that_of_pretraining_and_trains_the_modules_alone():
    cfg, params, router = model(2)
    tokens = random_tokens(cfg, 2, 9)
    mask = np.random.default_rng(0).integers(0, 2, (2, 8)).astype(np.float32)
    leaves = tree.flatten(params)
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        got = token_logprobs(params, router, tokens, mask, cfg=cfg, mtp=True, mtp_tokens=50.0, policy=PLAIN)
        total = tf.reduce_sum(got.mtp)
    _, parts = pretrain_loss(params, router, tokens, mask, cfg=cfg, normalizer=50.0, policy=PLAIN)
    assert_close(got.mtp, parts.mtp, 1e-5)
    for path, gradient in zip(tree.to_dict(params), tape.gradient(total, leaves)):
        moved = gradient is not None and np.abs(tf.convert_to_tensor(gradient)).max() > 0
        assert moved == path.startswith("mtp."), path


def test_wrong_arguments_are_named():
    cfg, params, router = model(0)
    tokens = random_tokens(cfg, 2, 5)
    for how, message in [
        ({"tokens": tokens[:, :1]}, "`tokens` has 1 column, want at least 2"),
        ({"mask": np.ones([2, 5])}, r"`mask` has shape \(2, 5\), want \(2, 4\) \[N, T\]"),
        ({"mtp": True}, "`mtp` is asked for, but the model has no MTP module"),
    ]:
        with pytest.raises(ValueError, match=f"token_logprobs: {message}"):
            token_logprobs(**{"params": params, "router": router, "tokens": tokens, "cfg": cfg} | how)
    with pytest.raises(ValueError, match=r"`experts` has shape"):
        token_logprobs(params, router, tokens, cfg=cfg, experts=np.zeros([2, 2, 3, 2], np.int32))
    with pytest.raises(ValueError, match="target_logprobs: `temperature` is 0.0, want above 0"):
        token_logprobs(params, router, tokens, cfg=cfg, temperature=0.0)
    assert dsv3.router_init(cfg).mtp.shape == (0, 6)
