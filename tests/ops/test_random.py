"""Threefry, folding, and draws with a key for each row."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3.ops.random import key_fold, threefry, uniform_draw
from tests.chi_square import assert_follows

# The published known answers of Threefry-2x32 with 20 rounds: counter, key, result.
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("counter, key, want", KNOWN)
def test_known_answers(counter, key, want):
    run = tf.function(threefry, jit_compile=True)
    for fn in (threefry, run):
        assert fn(tf.constant(key, tf.uint32), tf.constant(counter, tf.uint32)).numpy().tolist() == list(want)


def test_rows_draw_as_if_alone():
    keys = np.random.default_rng(0).integers(-(2**31), 2**31, (5, 2)).astype(np.int32)
    together = uniform_draw(keys, 7).numpy()
    for key, row in zip(keys, together):
        np.testing.assert_array_equal(uniform_draw(key, 7).numpy(), row)
        np.testing.assert_array_equal(uniform_draw(key, 3).numpy(), row[:3])
    np.testing.assert_array_equal(key_fold(keys, [1, 2, 3, 4, 5])[3].numpy(), key_fold(keys[3], 4).numpy())
    np.testing.assert_array_equal(key_fold(keys[0], [1, 2])[1].numpy(), key_fold(keys[0], 2).numpy())


def test_keys_and_folds_are_all_different():
    keys = key_fold([0, 1], tf.range(5000))
    others = key_fold([1, 0], tf.range(5000))
    words = np.concatenate([keys.numpy(), others.numpy()])
    assert len(np.unique(words, axis=0)) == 10000
    assert len(np.unique(uniform_draw(keys, 1).numpy())) > 4990


def test_uniform_in_one_draw_and_across_folds():
    for drawn in (uniform_draw([5, 6], 20000), uniform_draw(key_fold([5, 6], tf.range(20000)), 1)):
        drawn = drawn.numpy().ravel()
        assert drawn.min() >= 0 and drawn.max() < 1
        assert_follows(np.histogram(drawn, 50, (0, 1))[0], np.full(50, 0.02))
        pairs = np.histogram2d(drawn[::2], drawn[1::2], 8, [(0, 1), (0, 1)])[0]
        assert_follows(pairs.ravel(), np.full(64, 1 / 64))


@pytest.mark.parametrize("key, what", [([1.0, 2.0], "dtype float32"), ([1, 2, 3], r"shape \(3,\)"), (1, "rank 0")])
def test_bad_keys(key, what):
    with pytest.raises(ValueError, match=f"uniform_draw: `key` has {what}, want"):
        uniform_draw(key, 1)
