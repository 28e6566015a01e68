"""The small model that these tests generate with, engines that they share, and what the full forward pass says."""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf

import dsv3
from dsv3.serve import Completion, Engine, Request
from tests import small
from tests.compare import PLAIN

# Few rows take the kernel "rows", more take "sorted": both come up, and a row must not notice.
POLICY = PLAIN.replace(max_rows=8)
FREE = {"stop_tokens": ()}  # of requests that only their length ends


@functools.cache
def model(vocab: int = 6, modules: int = 1):
    """Returns (cfg, params, router); a small vocabulary, so that drafts are accepted now and then."""
    sizes = {  # a dense layer and a mixture of few experts: short to trace
        "num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "max_position_embeddings": 96,
    }  # fmt: skip
    cfg = small.model_config(vocab_size=vocab, num_nextn_predict_layers=modules, **sizes)
    return cfg, small.random_params(dsv3.model_specs(cfg), std=0.25), small.random_router(cfg)


@functools.cache
def engine(vocab: int = 6, modules: int = 1, **options) -> Engine:
    """Returns an engine of that model; tests share it, as each shape is traced once."""
    options = {"policy": POLICY, "chunk_sizes": (8,), "smallest_cache": 48, "max_batch": 4} | options
    return Engine(*model(vocab, modules), **options)


def prompts(*lengths: int, vocab: int = 6) -> list[list[int]]:
    return [np.random.default_rng([n, i]).integers(0, vocab, n).tolist() for i, n in enumerate(lengths)]


def full_logprobs(prompt, tokens, vocab: int = 6, modules: int = 1) -> np.ndarray:
    """Log-probabilities `[len(tokens), V]` of the places of new tokens, from one forward pass without a cache."""
    cfg, params, router = model(vocab, modules)
    read = tf.constant([[*prompt, *tokens][:-1]], tf.int32)
    logits = dsv3.model_apply(params, router, read, cfg=cfg, policy=PLAIN).logits
    return tf.nn.log_softmax(logits[0, len(prompt) - 1 :]).numpy()


def assert_greedy(prompt, done: Completion, **which) -> None:
    """Asserts that every token is the full forward pass's best one, with its log-probability."""
    want = full_logprobs(prompt, done.tokens, **which)
    np.testing.assert_array_equal(done.tokens, want.argmax(-1))
    np.testing.assert_allclose(done.logprobs, want.max(-1), atol=1e-5)


def greedy(prompts, tokens: int, **fields) -> list[Request]:
    return [Request(prompt, max_new_tokens=tokens, **(FREE | fields)) for prompt in prompts]
