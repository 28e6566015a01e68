"""Generation with quantised weights and with an FP8 cache: the same steps, the same tokens as their full forward pass."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3.nn.cache import entry_format
from dsv3.serve import Engine
from dsv3.serve.steps import state_init
from tests.compare import PLAIN
from tests.more import LONG
from tests.serve.model import POLICY, greedy, model, prompts

LENGTHS, NEW = (3, 11, 20), 10
CACHED = {"policy": POLICY.replace(cache="float8")}


@functools.cache
def cached(**options):
    return texts(model(), **CACHED, **options)


@functools.cache
def quantized(kind: str):
    cfg, params, router = model()
    return cfg, dsv3.quantize_params(params, cfg, kind=kind, fuse=False), router


def texts(which, **options):
    how = {"policy": POLICY, "chunk_sizes": (8,), "smallest_cache": 48, "max_batch": 4} | options
    return Engine(*which, **how).generate(greedy(prompts(*LENGTHS), NEW))


def assert_greedy(which, done, policy, atol):
    """Every token is the full forward pass's best one, with its log-probability."""
    cfg, params, router = which
    for prompt, completion in zip(prompts(*LENGTHS), done):
        read = tf.constant([[*prompt, *completion.tokens][:-1]], tf.int32)
        logits = dsv3.model_apply(params, router, read, cfg=cfg, policy=policy).logits[0, len(prompt) - 1 :]
        want = tf.nn.log_softmax(logits).numpy()
        np.testing.assert_array_equal(completion.tokens, want.argmax(-1))
        np.testing.assert_allclose(completion.logprobs, want.max(-1), atol=atol)


@pytest.mark.parametrize("kind", ["fp8", pytest.param("int8", marks=LONG)])
def test_quantised_weights(kind):
    """Unlike prompts in chunks."""
    assert_greedy(quantized(kind), texts(quantized(kind)), PLAIN, 1e-5)


OPTIONS = [{}, pytest.param({"chunk_sizes": (4,)}, marks=LONG), {"speculative": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "small chunks", "drafts"])
def test_fp8_cache(options):
    """However a text was cut into chunks and steps, attention has read the same entries: the whole text's, in one pass.

    A latent that is rounded the other way by the last bit of a sum moves by a step of E4M3, 2^-3 of it: none does here.
    """
    done = cached(**options)
    assert_greedy(model(), done, PLAIN.replace(cache="float8"), 1e-5)


@LONG
def test_both_with_drafts():
    which = quantized("fp8")
    done = texts(which, speculative=1, **CACHED)  # modules with quantised matrices and caches in FP8, too
    assert_greedy(which, done, PLAIN.replace(cache="float8"), 1e-5)


def test_the_cache_is_bytes():
    cfg, _, _ = model()
    caches, rows = state_init(cfg, 2, 8, dtype=tf.bfloat16, cache="float8", modules=1, depth=1)
    width = entry_format(cfg, "float8")[0]
    assert caches.trunk.dtype == caches.mtp.dtype == tf.uint8
    assert caches.trunk.shape == (cfg.num_layers, 2, 8, width) and caches.mtp.shape == (1, 2, 8, width)
    assert rows.window.hidden.dtype == tf.bfloat16


def test_what_an_fp8_cache_changes_is_small_but_there():
    pairs = zip(texts(model()), cached())
    differences = [np.abs(np.subtract(a.logprobs[:3], b.logprobs[:3])).max() for a, b in pairs]
    assert all(1e-4 < difference < 0.1 for difference in differences)
