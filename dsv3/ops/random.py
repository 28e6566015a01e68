"""Random numbers as a pure function of a key, with a key for each row: Threefry-2x32 with 20 rounds.

TensorFlow's stateless generators take one seed for a whole tensor. Generation wants one for each row of a batch, so that
what a row draws does not depend on its neighbours.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from dsv3.checks import Dims, check, check_integer
from dsv3.graph import plain
from dsv3.typing import TensorLike

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


@plain
def threefry(key: TensorLike, counter: TensorLike) -> tf.Tensor:
    """Encrypts counters: the same key and counter give the same 64 bits, any change gives unrelated ones.

    Args:
      key: `[..., 2]` uint32.
      counter: `[..., 2]` uint32; its leading dims and the key's broadcast.

    Returns:
      `[..., 2]` uint32.

    References: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11), Threefry-2x32-20.
    """
    key, counter = tf.convert_to_tensor(key, tf.uint32), tf.convert_to_tensor(counter, tf.uint32)
    k0, k1 = key[..., 0], key[..., 1]
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(_PARITY))
    x0, x1 = counter[..., 0] + k0, counter[..., 1] + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 += x1
            x1 = tf.bitwise.left_shift(x1, np.uint32(rotation)) | tf.bitwise.right_shift(x1, np.uint32(32 - rotation))
            x1 ^= x0
        x0 += schedule[(group + 1) % 3]
        x1 += schedule[(group + 2) % 3] + np.uint32(group + 1)
    return tf.stack([x0, x1], -1)


@plain
def key_fold(key: TensorLike, data: TensorLike) -> tf.Tensor:
    """Derives a new key from a key and a number, such as a row's or a token's index.

    Args:
      key: `[2]` or `[B, 2]` int.
      data: a number, or `[B]` int; a `[2]` key then becomes a key for each row.

    Returns:
      `[2]` or `[B, 2]` int32.

    >>> bool(tf.reduce_all(key_fold([1, 2], 3) == key_fold([[1, 2]], [3])[0]))
    True
    """
    words, data = _words("key_fold", key), tf.convert_to_tensor(data)
    check_integer("key_fold", "data", data)
    data = tf.bitcast(tf.cast(data, tf.int32), tf.uint32)
    if data.shape.rank == 1 and words.shape.rank == 1:
        words = tf.broadcast_to(words, tf.concat([tf.shape(data), [2]], 0))
    data = tf.broadcast_to(data, tf.shape(words)[:-1])
    # The second counter word keeps folds apart from draws.
    return tf.bitcast(threefry(words, tf.stack([data, tf.ones_like(data)], -1)), tf.int32)


@plain
def uniform_draw(key: TensorLike, count: int) -> tf.Tensor:
    """Draws uniform numbers in [0, 1), multiples of 2⁻²⁴; the first ones do not depend on `count`.

    Args:
      key: `[2]` or `[B, 2]` int.
      count: numbers for each key.

    Returns:
      `[count]` or `[B, count]` float32.
    """
    words = tf.expand_dims(_words("uniform_draw", key), -2)
    counter = tf.constant([[i, 0] for i in range(count)], tf.uint32)
    bits = threefry(words, counter)[..., 0]
    return tf.cast(tf.cast(tf.bitwise.right_shift(bits, np.uint32(8)), tf.int32), tf.float32) * 2.0**-24


def _words(function: str, key: TensorLike) -> tf.Tensor:
    """A key as uint32, each number modulo 2³²."""
    key = tf.convert_to_tensor(key)
    check_integer(function, "key", key)
    check(key.shape.rank in (1, 2), f"{function}: `key` has rank {key.shape.rank}, want 1 or 2 [2] or [B, 2]")
    Dims(function)("key", key, "2" if key.shape.rank == 1 else "B 2")
    return tf.bitcast(tf.cast(key, tf.int32), tf.uint32)
