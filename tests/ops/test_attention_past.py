"""Attention over a past in tiles is attention over all of it, and makes nothing of the size of the past."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.attention_past import attention_past
from tests import oracles
from tests.compare import SWEEP, assert_close, normal
from tests.ops.test_attention import graph_shapes

HEADS, WIDTH, QK, V = 2, 5, 4, 3
KEYS, VALUES = normal(8, HEADS, WIDTH, QK), normal(9, HEADS, WIDTH, V)


def expand(entries):
    """Keys and values as products of entries and weights, as a latent layer has them."""
    entries = tf.cast(tf.expand_dims(entries, 1), tf.float32)
    return tf.matmul(entries, KEYS), tf.matmul(entries, VALUES)


def inputs(batch, tokens, slots, rows=1, dirt=0.0):
    """q, k, v, and a past whose unfilled slots hold `dirt`; the last row fills all slots, others fill some."""
    rng = np.random.default_rng([batch, tokens, slots])
    length = rng.integers(0, slots + 1, batch).astype(np.int32)
    length[-1] = slots
    past = normal(0, batch, slots, WIDTH)
    past[np.arange(slots) >= length[:, None]] = dirt
    k, v = (part.numpy() for part in expand(normal(1, batch, tokens, WIDTH)))
    return normal(2, batch, HEADS, tokens * rows, QK), k, v, past, length


def oracle(q, k, v, past, length):
    """Everything at once: of the slots a row sees those that are filled, and of the new tokens those up to its own."""
    past_k, past_v = (part.numpy() for part in expand(past))
    tokens, rows = k.shape[2], q.shape[2] // k.shape[2]
    own = np.repeat(np.tri(tokens, dtype=bool), rows, 0)
    filled = np.arange(past.shape[1]) < length[:, None, None]
    seen = np.concatenate([np.broadcast_to(filled, [len(q), len(own), past.shape[1]]), np.stack([own] * len(q))], -1)
    return oracles.attention(q, np.concatenate([past_k, k], 2), np.concatenate([past_v, v], 2), seen, 0.4)


@SWEEP
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 11)),
    rows=st.integers(1, 2),
    tile=st.integers(1, 12),
)
def test_all_at_once(sizes, rows, tile):
    given = inputs(*sizes, rows=rows)
    assert_close(attention_past(*given, expand, scale=0.4, tile=tile), oracle(*given))


@pytest.mark.parametrize("how", ["fused", "xla"])
def test_compiled(how):
    """Tiles of 64 slots are large enough for the compiled row sums and maxima to take their own form."""
    given = inputs(2, 3, 150)

    def fn(*given):
        return attention_past(*given, expand, scale=0.4, tile=64, fuse=how == "fused")

    got = tf.function(fn, autograph=False, jit_compile=how == "xla")(*map(tf.constant, given))
    assert_close(got, oracle(*given))


@pytest.mark.parametrize("dirt", [1e4, float("nan")])
def test_unfilled_slots_do_not_matter(dirt):
    """Not a number in a tile that is not visited; a large one also beside filled slots."""
    q, k, v, past, _ = inputs(2, 3, 8)
    length = np.array([4, 0] if np.isnan(dirt) else [3, 0], np.int32)
    clean = np.where(np.arange(8)[None, :, None] < length[:, None, None], past, 0.0)
    dirty = np.where((np.arange(8) < 4)[None, :, None] & ~np.isfinite(dirt), clean, np.where(clean == 0, dirt, clean))
    got = attention_past(q, k, v, dirty.astype(np.float32), length, expand, scale=0.4, tile=4)
    assert_close(got, oracle(q, k, v, clean.astype(np.float32), length))


def test_tiles_that_no_row_has_filled_are_not_visited():
    seen = []

    def noted(entries):
        seen.append(len(entries))
        return expand(entries)

    q, k, v, past, _ = inputs(2, 1, 9)
    attention_past(q, k, v, past, np.array([5, 1], np.int32), noted, scale=0.4, tile=3)
    assert len(seen) == 2
    attention_past(q, k, v, past, np.array([0, 0], np.int32), noted, scale=0.4, tile=3)
    assert len(seen) == 2
    given = inputs(2, 3, 0)
    assert_close(attention_past(*given, noted, scale=0.4, tile=3), oracle(*given))
    assert len(seen) == 2


def test_nothing_is_as_long_as_the_past():
    slots = 64
    specs = [tf.TensorSpec(np.shape(x), tf.as_dtype(np.asarray(x).dtype)) for x in inputs(1, 3, slots)]
    fn = tf.function(lambda *given: attention_past(*given, expand, scale=0.4, tile=8), autograph=False)
    shapes = list(graph_shapes(fn.get_concrete_function(*specs).graph))
    assert any(8 in shape for _, shape in shapes)
    long = [(name, shape) for name, shape in shapes if slots in shape and shape != [1, slots, WIDTH]]
    assert not long, long


def test_bfloat16_sums_in_float32():
    """Of 1,000 equal slots each counts 1/1,001; added up one by one in bfloat16 they would stop at 256."""
    q, k, v, past, _ = inputs(1, 1, 1)
    past = np.repeat(past, 1000, 1)
    low = [tf.cast(x, tf.bfloat16) for x in (q, k, v, past)]

    def rounded(entries):
        return [tf.cast(x, tf.bfloat16) for x in expand(entries)]

    fn = tf.function(lambda *given: attention_past(*given, rounded, scale=0.4, tile=1), autograph=False)
    got, length = fn(*low, tf.constant([1000])), np.array([1000], np.int32)
    assert got.dtype == tf.bfloat16
    want = oracle(*(tf.cast(x, tf.float32).numpy() for x in low), length)
    assert_close(got, want, 1e-2)  # keys, values, scores and the result are rounded to 2^-9 each


def test_wrong_input_is_named():
    q, k, v, past, length = inputs(2, 3, 7)
    for change, message in [
        ({"k": k[..., 1:]}, r"`k` has shape \(2, 2, 3, 3\), want \(2, 2, \?, 4\) \[B, H, T, P\]"),
        ({"v": v[:, :, 1:]}, r"`v` has shape .*, want \(2, 2, 3, \?\) \[B, H, T, U\]"),
        ({"past": past[:1]}, r"`past` has shape .*, want \(2, \?, \?\) \[B, S, W\]"),
        ({"length": length[:1]}, r"`length` has shape \(1,\), want \(2,\) \[B\]"),
        ({"q": q[:, :, :2]}, r"`q` has 2 rows \[N\], want a multiple of the 3 tokens \[T\]"),
        ({"tile": 0}, "`tile` is 0, want > 0"),
    ]:
        given = {"q": q, "k": k, "v": v, "past": past, "length": length, "tile": 2} | change
        with pytest.raises(ValueError, match=f"attention_past: {message}"):
            attention_past(**given, expand=expand, scale=1.0)
