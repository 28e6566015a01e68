"""Decoding with MTP drafts: the same tokens, the same distribution, fewer steps; and drafts that are the modules' own."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.compiled import RowWrite
from dsv3.nn.cache import Cache, cache_append
from dsv3.nn.mla import mla_rope
from dsv3.nn.model import embed_apply, head_weight, mtp_chain
from dsv3.nn.mtp import mtp_apply
from dsv3.serve import Engine, Request
from dsv3.serve.draft import mtp_draft
from dsv3.serve.steps import Caches, Sampling, prefill_step, speculative_step, state_init
from tests.chi_square import assert_follows
from tests.compare import PLAIN
from tests.more import LONG
from tests.serve.model import FREE, POLICY, assert_greedy, engine, full_logprobs, greedy, model, prompts

LENGTHS = (3, 1, 10, 2)


@pytest.mark.parametrize("depth, modules", [(1, 1), (2, 2), pytest.param(3, 2, marks=LONG)])
def test_greedy_output_is_that_of_plain_decoding(depth, modules):
    run = engine(speculative=depth, modules=modules)
    asked = prompts(*LENGTHS)
    for batch in (1, 2, 3, 4) if depth < 2 else (4,):
        done = run.generate(greedy(asked[:batch], 25))
        for prompt, completion in zip(asked, done):
            assert_greedy(prompt, completion, modules=modules)
            assert len(completion.tokens) == 25
            assert completion.drafted == depth * completion.steps
    assert sum(c.accepted for c in done) > 0 and min(c.steps for c in done) < 25
    # Every step but the last, which is cut off at the end, gives its accepted drafts and one token.
    for completion in done:
        assert 25 <= completion.steps + completion.accepted <= 25 + depth
        assert completion.acceptance_rate == completion.accepted / completion.drafted
        assert completion.tokens_per_step == 25 / completion.steps


def test_growing_caches_and_stops_between_drafts():
    asked = prompts(3, 20, 1, 7, 5)
    run = engine(speculative=2, smallest_cache=24)
    free = run.generate(greedy(asked, 30))
    for prompt, done in zip(asked, free):
        assert_greedy(prompt, done)
    for stops in ([4], [0, 2]):
        for got, whole in zip(run.generate(greedy(asked, 30, stop_tokens=stops)), free):
            place = next((i + 1 for i, token in enumerate(whole.tokens) if token in stops), 30)
            assert got.tokens == whole.tokens[:place]
            assert got.finish_reason == ("stop_token" if got.tokens[-1] in stops else "length")


def append(state, new):
    """What `compile_step` does with a `RowWrite`, as a function."""
    kept = {}
    for name, kv in state._asdict().items():
        write = getattr(new, name)
        assert isinstance(write, RowWrite)
        kept[name] = cache_append(Cache(kv, write.starts), write.values).kv
    return Caches(**kept)


def full_draft(tokens, cfg, params, router, depth):
    """Drafts from all tokens of one row at once, without a cache: what each module says at the last position."""
    tokens = list(tokens)
    for step in range(depth):
        known = len(tokens) - step
        module = min(step, cfg.num_mtp_layers - 1)
        read = tf.constant([tokens[:-1]], tf.int32)
        ahead = tf.constant([tokens[1:]], tf.int32)
        out = dsv3.model_apply(params, router, read, cfg=cfg, policy=PLAIN)
        if step == module:
            normed = mtp_chain(params, router, out, ahead, cfg=cfg, policy=PLAIN).normed[module, 0, known - 2]
        else:  # one module, chained on itself
            assert cfg.num_mtp_layers == 1
            hidden = out.hidden[:, : known - 1]
            for extra in range(step + 1):
                length = known - 1 + extra
                chained = mtp_apply(
                    tree.slice_leading(params.mtp, 0), router.mtp[0], hidden,
                    embed_apply(params, ahead[:, :length], policy=PLAIN),
                    cfg=cfg, table=mla_rope(cfg.mla, tf.range(length)), policy=PLAIN,
                )  # fmt: skip
                hidden = tf.concat([hidden, chained.hidden[:, -1:]], 1)
            normed = chained.normed[0, -1]
        logits = tf.tensordot(normed, head_weight(params), 1)
        tokens.append(int(tf.argmax(logits)))
    return tokens[-depth:]


@pytest.mark.parametrize("depth, modules", [(2, 2), (2, 1)])
def test_drafts_are_what_the_modules_say_of_all_tokens(depth, modules):
    """Whatever was refused before, a module's cache is as if it had read the true tokens only."""
    cfg, params, router = model(modules=modules)
    asked = prompts(7, 2)
    how = {"cfg": cfg, "policy": PLAIN, "modules": modules}
    caches, rows = state_init(cfg, 2, 48, dtype=tf.float32, modules=modules, depth=depth)
    for at, size in ((0, 4), (4, 4)):
        chunk = np.zeros([2, size + modules], np.int32)
        for b, prompt in enumerate(asked):
            piece = prompt[at : at + size + modules]
            chunk[b, : len(piece)] = piece
        counts = np.clip([len(p) - 1 - at for p in asked], 0, size)
        chunk, counts = tf.constant(chunk), tf.constant(counts, tf.int32)
        new, (rows, _) = prefill_step(caches, params, router, rows, chunk, counts, first=at == 0, **how)
        caches = append(caches, new)
    rows = rows._replace(token=tf.constant([p[-1] for p in asked]))
    sampling = Sampling(tf.zeros([2, 2], tf.int32), tf.zeros([2]), tf.zeros([2], tf.int32), tf.ones([2]))
    seen, said = set(), [list(p) for p in asked]
    for _ in range(6):
        drafts = mtp_draft(params, router, caches.mtp, rows.window, rows.length, None, depth=depth, **how)
        for b in range(2):
            assert drafts.tokens[b].numpy().tolist() == full_draft(said[b], cfg, params, router, depth)
        new, (rows, drawn) = speculative_step(
            caches, params, router, rows, sampling, tf.constant([True, True]), depth=depth, greedy=True, **how
        )
        caches = append(caches, new)
        for b in range(2):
            count = int(drawn.count[b])
            seen.add(count - 1)
            said[b] += drawn.tokens[b, :count].numpy().tolist()
            assert int(rows.length[b]) == len(said[b]) - 1
    assert len(seen) > 1  # drafts were refused and accepted


def test_sampled_output_has_the_distribution_of_plain_sampling():
    """All sequences of three tokens, against their exact probabilities."""
    settings = {"temperature": 0.8, "top_k": 4}
    prompt = prompts(4)[0]
    run = engine(speculative=2, max_batch=32)
    done = run.generate([Request(prompt, max_new_tokens=3, seed=seed, **settings, **FREE) for seed in range(1600)])
    assert 0 < sum(c.accepted for c in done) < sum(c.drafted for c in done)
    counts = np.zeros([6, 6, 6])
    np.add.at(counts, tuple(np.array([c.tokens for c in done]).T), 1)
    probs = np.zeros([6, 6, 6])
    for path in itertools.product(range(6), repeat=2):
        places = full_logprobs(prompt, [*path, 0])
        steps = [restricted(np.exp(place), settings) for place in places]
        probs[path] = steps[0][path[0]] * steps[1][path[1]] * steps[2]
    assert_follows(counts.ravel(), probs.ravel())
    assert_follows(counts.sum((0, 1)), probs.sum((0, 1)))


def restricted(probs, settings):
    """Temperature and top-k, in the plainest way."""
    weights = probs ** (1 / settings["temperature"])
    weights[np.argsort(-weights)[settings.get("top_k", 6) :]] = 0
    return weights / weights.sum()


def test_drafts_raise_the_speed_where_the_modules_know_the_model():
    """A trunk whose logits come from the embedding alone, and a module that reproduces them: every draft is accepted."""
    cfg, params, router = model()
    silent = tree.map_leaves(tf.zeros_like, (params.dense, params.moe, params.mtp.block))
    norms = params.mtp._replace(block=silent[2], embed_norm=tf.ones_like(params.mtp.embed_norm))
    d = cfg.hidden_size
    proj = tf.concat([tf.eye(d), tf.zeros([d, d])], 0)[None]
    knowing = params._replace(dense=silent[0], moe=silent[1], mtp=norms._replace(proj=proj, norm=params.norm[None]))
    run = Engine(cfg, knowing, router, policy=POLICY, speculative=3, max_batch=2, smallest_cache=64, chunk_sizes=(8,))
    done = run.generate(greedy(prompts(5, 3), 24))
    for completion in done:
        assert completion.acceptance_rate == 1.0 and completion.steps == 6 and completion.tokens_per_step == 4.0
