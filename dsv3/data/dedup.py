"""Finding documents that say the same: equal after normalisation, or near by the Jaccard similarity of their word runs.

    signatures = (minhash_signature(text) for text in texts)
    for text, match in zip(texts, find_duplicates(zip(map(exact_key, texts), signatures), threshold=0.8)): ...

A document is compared with those that were kept before it: the first of a group stays, and of the documents that stay no two
are near each other. That is what keeps near copies of held-out documents out of the training text, as what is held out is
decided among documents that stay.

References:
  Broder, "On the resemblance and containment of documents", 1997: MinHash.
  Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3: bands, and the formula of `lsh_probability`.
  Lee et al., "Deduplicating Training Data Makes Language Models Better", arXiv:2107.06499: runs of five words.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dsv3.checks import check, check_choice
from dsv3.data.extra import load_extra
from dsv3.data.ngrams import ngram_codes, split_words, word_codes

UNITS = ("words", "characters")
_BLOCK = 4096  # runs that are permuted at a time: [runs, permutations] numbers are held
_SEED = 1


class Match(NamedTuple):
    """A document that says what another one said before it.

    Args:
      first: number of the document that stays, in the given order.
      kind: "exact" or "near".
      similarity: 1 for exact ones, else the share of equal numbers in both signatures, an estimate of Jaccard's.
    """

    first: int
    kind: str
    similarity: float


def document_hash(text: str) -> int:
    """Returns what names a text: the first 8 bytes of its BLAKE2b (16 bytes), as a number below 2^64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little")


def exact_key(text: str) -> bytes:
    """Returns 16 bytes that texts have in common which differ only in capitals and blanks.

    >>> exact_key("To be,\\n  or not") == exact_key("to be, or NOT\\n")
    True
    """
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def text_shingles(text: str, size: int = 5, unit: str = "words") -> np.ndarray:
    """Returns the set of a text's runs of words or characters, as sorted numbers [S] uint32, S at least 1.

    Words are runs of letters and digits in small letters, so that punctuation and layout do not count; runs of characters
    serve languages that do not part words. A text with fewer than `size` units has one run, of all of them.

    Args:
      text: the text.
      size: units of a run.
      unit: "words" or "characters" (small letters, blanks as one).

    Raises:
      ValueError: `size` below 1 or another unit.
    """
    check(size >= 1, f"text_shingles: `size` is {size}, want at least 1")
    check_choice("text_shingles", "unit", unit, UNITS)
    if unit == "words":
        codes = word_codes(split_words(text) or [text])
    else:
        letters = np.frombuffer(" ".join(text.casefold().split()).encode("utf-32-le"), np.uint32)
        codes = (letters.astype(np.uint64) if len(letters) else np.zeros(1, np.uint64)) * np.uint64(0xD6E8FEB86659FD93)
    return np.unique(ngram_codes(codes, min(size, len(codes))).astype(np.uint32))


def minhash_signature(text: str, *, permutations: int = 128, size: int = 5, unit: str = "words") -> np.ndarray:
    """Returns a text's MinHash: two texts have equal numbers in a share of places that is their Jaccard similarity.

    Pr(a[i] = b[i]) = |A ∩ B| / |A ∪ B|, for the sets A and B of `text_shingles`

    Args:
      text: the text.
      permutations: numbers of the signature; the estimate's standard deviation is √(s(1−s)/permutations), s the similarity.
      size, unit: see `text_shingles`.

    Returns:
      [permutations] uint32, the same on every machine.

    Raises:
      ValueError: `permutations` below 2; datasketch is not installed; as `text_shingles`.
    """
    sketch = _empty(permutations).copy()
    shingles = text_shingles(text, size, unit)
    for start in range(0, len(shingles), _BLOCK):
        sketch.update_batch(shingles[start : start + _BLOCK].tolist())
    return sketch.hashvalues


def lsh_probability(similarity: float, bands: int, rows: int) -> float:
    """Probability that two signatures agree in one of the bands: 1 − (1 − similarity^rows)^bands.

    >>> round(lsh_probability(0.8, 18, 7), 3)
    0.986
    """
    return 1.0 - (1.0 - similarity**rows) ** bands


def lsh_bands(threshold: float, permutations: int = 128, recall: float = 0.95) -> tuple[int, int]:
    """Bands and rows that find pairs at the threshold with a given probability, and as few others as can be.

    The largest number of rows for which `lsh_probability(threshold, permutations // rows, rows)` is at least `recall`.

    Args:
      threshold: similarity above which documents are near, above 0 and at most 1.
      permutations: numbers of a signature.
      recall: wanted probability at the threshold; above it, it is larger.

    Returns:
      (bands, rows).

    Raises:
      ValueError: a threshold outside, too few permutations for it.

    >>> lsh_bands(0.8, 128)
    (18, 7)
    """
    check(0.0 < threshold <= 1.0, f"lsh_bands: `threshold` is {threshold}, want above 0 and at most 1")
    check(permutations >= 2, f"lsh_bands: `permutations` is {permutations}, want at least 2")
    for rows in range(permutations // 2, 0, -1):
        if lsh_probability(threshold, permutations // rows, rows) >= recall:
            return permutations // rows, rows
    raise ValueError(f"lsh_bands: `permutations` is {permutations}, too few to find pairs of similarity {threshold}")


def find_duplicates(
    documents: Iterable[tuple[bytes, np.ndarray | None]], *, threshold: float = 0.8, recall: float = 0.95
) -> Iterator[Match | None]:
    """Tells of each document whether it is a duplicate of one before it that was kept.

    Kept signatures are in an index (datasketch's `MinHashLSH`). A document is near a kept one when they agree in a band of
    their signatures and in at least `threshold` of all places; the nearest counts, of equally near ones the first. With s
    the Jaccard similarity of a pair it is found with a probability between P + Q − 1 and min(P, Q), where
    P = `lsh_probability(s, *lsh_bands(threshold, permutations, recall))` and Q = Pr(Binomial(permutations, s) ≥
    threshold · permutations). Held in memory: about 4 bytes a permutation and 350 bytes a band for each kept document.

    Args:
      documents: (`exact_key`, `minhash_signature`) of each, in order, taken one by one; None as signature: only exact
        duplicates of it are looked for.
      threshold: share of equal places from which on a document is a near duplicate.
      recall: see `lsh_bands`.

    Returns:
      An iterator with None for each document that stays and a `Match` for each that does not.

    Raises:
      ValueError: as `lsh_bands`; signatures of different lengths; datasketch is not installed.
    """
    keys: dict[bytes, int] = {}
    signatures: dict[int, np.ndarray] = {}
    index: Any = None
    for number, (key, signature) in enumerate(documents):
        if key in keys:
            yield Match(keys[key], "exact", 1.0)
            continue
        if signature is not None:
            if index is None:
                index, length = _make_index(threshold, len(signature), recall), len(signature)
            got = f"a signature of {len(signature)} numbers"
            check(len(signature) == length, f"find_duplicates: `documents` has {got}, want {length} as before")
            sketch = _sketch(signature)
            match = _nearest(signature, sorted(index.query(sketch)), signatures, threshold)
            if match is not None:
                yield match
                continue
            index.insert(number, sketch, check_duplication=False)
            signatures[number] = np.array(signature)  # a copy: it may be a row of many
        keys[key] = number
        yield None


def _nearest(
    signature: np.ndarray, candidates: list[int], signatures: dict[int, np.ndarray], threshold: float
) -> Match | None:
    if not candidates:
        return None
    shares = np.mean(np.stack([signatures[number] for number in candidates]) == signature, axis=1)
    best = int(np.argmax(shares))  # the first of the largest
    return Match(candidates[best], "near", float(shares[best])) if shares[best] >= threshold else None


def _make_index(threshold: float, permutations: int, recall: float):
    bands = lsh_bands(threshold, permutations, recall)
    return load_extra("find_duplicates", "datasketch").MinHashLSH(num_perm=permutations, params=bands)


@functools.lru_cache(maxsize=8)
def _empty(permutations: int):
    """A MinHash of nothing, with its permutations; its values are hashes already."""
    check(permutations >= 2, f"minhash_signature: `permutations` is {permutations}, want at least 2")
    module = load_extra("minhash_signature", "datasketch")
    return module.MinHash(num_perm=permutations, seed=_SEED, hashfunc=int, scheme="affine32")


def _sketch(signature: np.ndarray):
    """A MinHash of datasketch's with these numbers."""
    like = _empty(len(signature))
    module = load_extra("find_duplicates", "datasketch")
    return module.MinHash(hashvalues=signature, permutations=like.permutations, seed=_SEED, hashfunc=int, scheme="affine32")
