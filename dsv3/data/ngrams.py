"""Runs of n words as 64-bit numbers, so that NumPy can compare and count them."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 over the golden ratio


def split_words(text: str) -> list[str]:
    """Returns the runs of letters, digits and underscores of a text, in small letters.

    >>> split_words("Don't stop, x_1!")
    ['don', 't', 'stop', 'x_1']
    """
    return _WORD.findall(text.casefold())


def word_codes(words: Sequence[str]) -> np.ndarray:
    """Returns a number for each word, the same on every machine: [N] uint64, 8 bytes of BLAKE2b.

    Args:
      words: the words.

    >>> bool(word_codes(["a", "b", "a"])[0] == word_codes(["a"])[0])
    True
    """
    return np.fromiter(map(_word_code, words), np.uint64, len(words))


def ngram_codes(codes: np.ndarray, n: int) -> np.ndarray:
    """Returns a number for each run of n words: Σ codes[i + j] · factor^j mod 2^64, mixed.

    Of different runs two have the same number with probability 2^-64.

    Args:
      codes: [N] uint64, a number for each word.
      n: words of a run, at least 1.

    Returns:
      [max(0, N - n + 1)] uint64.
    """
    count = max(0, len(codes) - n + 1)
    total, factor = np.zeros(count, np.uint64), np.uint64(1)
    with np.errstate(over="ignore"):
        for j in range(n):
            total += codes[j : j + count] * factor
            factor = factor * _FACTOR
        total ^= total >> np.uint64(32)
        total *= np.uint64(0xD6E8FEB86659FD93)
        return total ^ (total >> np.uint64(32))


@functools.lru_cache(maxsize=1 << 18)
def _word_code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
