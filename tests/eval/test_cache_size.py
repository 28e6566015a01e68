"""Caches that are made, filled and attended over: bytes, and outputs that agree."""

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3.eval.cache_size import CHUNK, _hidden, caches_bytes, measure_caches, token_bytes
from dsv3.nn.mla import mla_apply
from tests.compare import PLAIN, assert_close, error
from tests.small import mla_config, random_params

pytestmark = pytest.mark.usefixtures("own_garbage")

CFG = mla_config(num_heads=4, kv_latent=10)
CACHES = [("plain", "float32"), ("latent", "float32"), ("plain", "bfloat16"), ("latent", "bfloat16"), ("latent", "float8")]
SIZE = CHUNK + 70


def layers(count=2):
    return [random_params(dsv3.mla_specs(CFG, std=0.1), seed=i) for i in range(count)]


def test_bytes_of_a_token():
    width, kept = CFG.kv_latent + CFG.rope_dim, CFG.num_heads * (CFG.nope_dim + CFG.rope_dim + CFG.v_dim)
    want = [4 * kept, 4 * width, 2 * kept, 2 * width, CFG.kv_latent + 4 + 2 * CFG.rope_dim]
    assert [token_bytes(CFG, *which) for which in CACHES] == want
    for kind, dtype, message in [("plain", "float8", "`dtype` is 'float8'"), ("both", "float32", "`kind` is 'both'")]:
        with pytest.raises(ValueError, match=f"token_bytes: {message}"):
            token_bytes(CFG, kind, dtype)


def test_all_caches_give_the_same_attention():
    told, which = [], [*CACHES[:2], CACHES[4]]  # the others are in the program's test
    found = measure_caches(layers, CFG, SIZE, which, layers=2, on_chunk=lambda *counts: told.append(counts))
    assert [(size.kind, size.dtype) for size in found] == which
    for size in found:
        assert size.computed == 2 * SIZE * token_bytes(CFG, size.kind, size.dtype)
        assert size.measured >= 0 and size.step_seconds > 0
    for size, tolerance in zip(found[1:], (2e-6, 6e-2)):  # float32 sums in another order; latents rounded to 2^-4
        assert error(size.out, found[0].out) <= tolerance, size
    assert told[:2] == [(CHUNK, 3 * SIZE), (SIZE, 3 * SIZE)] and told[-1] == (3 * SIZE, 3 * SIZE)


def test_estimates_hold_what_is_kept():
    sizes = [caches_bytes(CFG, size, CACHES, layers=3) for size in (10, 10**6, 2 * 10**6)]
    kept = sum(token_bytes(CFG, *which) for which in CACHES)
    assert sizes[0] > 2**27 and sizes[2] - sizes[1] == 4 * 10**6 * kept


def test_what_is_filled_is_the_sequence():
    """The step over the cache is the last position of attention over all hidden states, each at its own place."""
    (found,) = measure_caches(layers, CFG, SIZE, CACHES[1:2], layers=2)
    parts = (0, CHUNK), (CHUNK, SIZE - CHUNK), (SIZE, 1)
    hidden = tf.concat([_hidden(at, count, CFG.hidden_size, "float32") for at, count in parts], 1)
    want = mla_apply(layers()[-1], hidden, cfg=CFG, policy=PLAIN).out[0, -1]
    assert_close(found.out, want, 4e-6)  # sums of 583 terms in another order


def test_refusals():
    for change, message in [
        ({"size": 0}, "measure_caches: `layers` is 2 and `size` 0, want both > 0"),
        ({"layers": 0}, "measure_caches: `layers` is 0 and `size` 4, want both > 0"),
        ({"layers": 1}, "measure_caches: `make_layers` gives 2 layers, want 1"),
        ({"caches": [("plain", "float8")]}, "token_bytes: `dtype` is 'float8'"),
    ]:
        given = {"size": 4, "layers": 2, "caches": CACHES[:1]} | change
        with pytest.raises(ValueError, match=message):
            measure_caches(layers, CFG, **given)


def test_the_published_numbers():
    cfg = dsv3.preset("deepseek-v3").mla
    latent, plain = (token_bytes(cfg, kind, "bfloat16") for kind in ("latent", "plain"))
    assert (latent, plain) == (2 * 576, 2 * 128 * (192 + 128)) and np.isclose(latent / plain, 0.0140625)
