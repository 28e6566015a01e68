"""The latent cache."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import dsv3
from dsv3.nn.cache import Cache, cache_append, cache_bytes, cache_init
from tests.compare import SWEEP, normal
from tests.small import model_config

CFG = model_config()
WIDTH = CFG.mla.cache_width


def test_empty_cache():
    cache = cache_init(CFG, 2, 5)
    assert cache.kv.shape == (3, 2, 5, WIDTH) and cache.kv.dtype == tf.bfloat16
    assert cache.length.numpy().tolist() == [0, 0] and cache.length.dtype == tf.int32
    assert cache_init(CFG, 2, 5, layers=1, dtype=tf.float32).kv.shape == (1, 2, 5, WIDTH)


def test_bytes():
    assert cache_bytes(CFG, 10, dtype=tf.float32) == 3 * 10 * WIDTH * 4
    full = dsv3.preset("deepseek-v3")
    assert cache_bytes(full, 1) == 61 * 576 * 2


@SWEEP
@given(
    appends=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4),
    counted=st.booleans(),
    compiled=st.booleans(),
)
def test_rows_grow_behind_their_own_tokens(appends, counted, compiled):
    """Appends of T tokens of which each row counts some, against lists."""
    size = sum(new for new, *_ in appends)
    cache = cache_init(CFG, 2, size, dtype=tf.float32)
    append = tf.function(cache_append, autograph=False) if compiled else cache_append
    rows = [np.zeros([3, 0, WIDTH], np.float32)] * 2
    for i, (new, *counts) in enumerate(appends):
        entries = normal(i, 3, 2, new, WIDTH)
        counts = [min(c, new) for c in counts] if counted else [new, new]
        cache = append(cache, tf.constant(entries), tf.constant(counts)) if counted else append(cache, tf.constant(entries))
        rows = [np.concatenate([row, entries[:, b, : counts[b]]], 1) for b, row in enumerate(rows)]
        assert cache.length.numpy().tolist() == [row.shape[1] for row in rows]
        for b, row in enumerate(rows):
            np.testing.assert_array_equal(cache.kv[:, b, : row.shape[1]], row)


def test_the_old_cache_stays_as_it_was():
    old = cache_init(CFG, 1, 4, dtype=tf.float32)
    cache_append(old, tf.ones([3, 1, 2, WIDTH]))
    assert not old.kv.numpy().any() and old.length.numpy().tolist() == [0]


def test_entries_are_cast():
    cache = cache_append(cache_init(CFG, 1, 4), tf.ones([3, 1, 2, WIDTH]))
    assert cache.kv.dtype == tf.bfloat16 and float(tf.reduce_sum(cache.kv)) == 3 * 2 * WIDTH


def test_refusals():
    cache = cache_append(cache_init(CFG, 2, 4, dtype=tf.float32), tf.ones([3, 2, 3, WIDTH]), [3, 1])
    entries = tf.ones([3, 2, 2, WIDTH])
    assert cache_append(cache, entries, [1, 2]).length.numpy().tolist() == [4, 3]
    for arguments, message in [
        ((entries,), "cache_append: a row would hold 5 tokens, the cache has room for 4"),
        ((entries, [2, 0]), "cache_append: a row would hold 5 tokens, the cache has room for 4"),
        ((entries, [0, 3]), r"cache_append: `counts` holds 3, want at most 2 \[T\]"),
        ((entries, [1, 1, 1]), r"cache_append: `counts` has shape \(3,\), want \(2,\) \[B\]"),
        ((entries[:2],), r"cache_append: `entries` has shape .*, want \(3, 2, \?, 8\) \[X, B, T, W\]"),
        ((entries[:, :, :0],), "cache_append: `entries` has no token"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache_append(cache, *arguments)
    with pytest.raises(ValueError, match=r"cache_append: `cache.length` has shape \(1,\), want \(2,\) \[B\]"):
        cache_append(Cache(cache.kv, cache.length[:1]), entries)
    with pytest.raises(ValueError, match="cache_init: batch=0 and size=4, want both > 0"):
        cache_init(CFG, 0, 4)
