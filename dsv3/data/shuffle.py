"""Random numbers without a state: hashes of keys, and permutations that follow from them.

They depend on the keys' bits alone, so they are the same with any version of NumPy, on any machine.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def mix_keys(*keys: int | str) -> int:
    """Hashes integers and names into one of 64 bits.

    Args:
      keys: integers count modulo 2⁶⁴, names by their BLAKE2b hash.

    Returns:
      The hash; it depends on the order of the keys.

    >>> mix_keys(0, "code") == mix_keys("code", 0)
    False
    """
    mixed = 0
    for key in keys:
        mixed = _mix(mixed ^ (name_key(key) if isinstance(key, str) else key & _MASK))
    return mixed


def name_key(name: str) -> int:
    """Returns 64 bits of the BLAKE2b hash of `name`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def permute(count: int, key: int) -> np.ndarray:
    """Permutes 0 to `count` - 1: they are sorted by a hash of each, in a stream that begins at `key`.

    Args:
      count: how many numbers.
      key: a hash, from `mix_keys`.

    Returns:
      [count] int64.

    >>> sorted(permute(4, key=mix_keys(0)).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(splitmix64(np.uint64(key) + np.arange(count, dtype=np.uint64)), kind="stable")


def spread(key: int, step: int) -> float:
    """A number in [0, 1) for each step, such that any run of steps is spread evenly.

    (key + step · φ) mod 1, with φ the golden ratio: sums over n steps stay within O(log n) of their mean.

    Args:
      key: a hash, where the sequence begins.
      step: from 0.

    Returns:
      The number; a multiple of 2⁻⁵³.
    """
    return ((key + step * _GOLDEN & _MASK) >> 11) / 2**53


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Mixes the 64-bit integers of `x`; returns a bijection of them (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    """`splitmix64` of one integer."""
    x = x + _GOLDEN & _MASK
    x = (x ^ x >> 30) * _FIRST & _MASK
    x = (x ^ x >> 27) * _SECOND & _MASK
    return x ^ x >> 31
