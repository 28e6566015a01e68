"""Duplicates: signatures against brute-force Jaccard similarity, and what LSH finds against its formula."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.dedup import (
    Match,
    document_hash,
    exact_key,
    find_duplicates,
    lsh_bands,
    lsh_probability,
    minhash_signature,
    text_shingles,
)
from dsv3.data.ngrams import split_words

WORDS = st.lists(st.sampled_from("to be or not that is the".split()), min_size=1, max_size=30)


def shingle_set(text, size=5):
    words = split_words(text)
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def jaccard(one, other, size=5):
    a, b = shingle_set(one, size), shingle_set(other, size)
    return len(a & b) / len(a | b)


def pair(rng, similarity, words=300):
    """Two texts of random words that begin alike, with about the given similarity of runs of five words."""
    one, other = (" ".join(f"w{n}" for n in rng.integers(0, 10**9, words)) for _ in range(2))
    shared = round(2 * similarity / (1 + similarity) * (words - 4)) + 4  # J = s / (2 n − s) for s shared of n runs
    return one, " ".join([*one.split()[:shared], *other.split()[shared:]])


def find(texts, **options):
    threshold = {name: options.pop(name) for name in ("threshold", "recall") if name in options}
    return list(find_duplicates(((exact_key(t), minhash_signature(t, **options)) for t in texts), **threshold))


# Sets and signatures


@given(WORDS, st.integers(1, 6))
def test_shingles_are_the_set_of_runs(words, size):
    text = ", ".join(words).title()
    got = text_shingles(text, size)
    assert got.dtype == np.uint32 and len(got) == len(shingle_set(text, size)) and np.all(np.diff(got.astype(np.int64)) > 0)


def test_shingles_of_characters_serve_texts_without_blanks():
    one, other = "吾輩は猫である。名前はまだ無い。", "吾輩は猫である。名前はもうある。"
    assert len(text_shingles(one)) <= 2  # each sentence is a word
    a, b = (set(text_shingles(text, 3, "characters").tolist()) for text in (one, other))
    want = [{text[i : i + 3] for i in range(len(text) - 2)} for text in (one, other)]
    assert len(a) == len(want[0]) and len(a & b) == len(want[0] & want[1])
    assert np.array_equal(text_shingles("A  b", 9, "characters"), text_shingles("a b", 9, "characters"))


def test_texts_without_words_are_compared_whole():
    assert len(text_shingles("")) == len(text_shingles("?!", 3)) == len(text_shingles("", 3, "characters")) == 1
    assert text_shingles("?!") != text_shingles("!!")


@pytest.mark.parametrize("similarity", [0.1, 0.5, 0.8, 0.95])
def test_signatures_estimate_jaccard(similarity):
    """The mean over 40 pairs, which has the standard deviation √(s(1−s)/(40·128)); four of them for no false alarm."""
    rng, off = np.random.default_rng(0), []
    for _ in range(40):
        texts = pair(rng, similarity)
        exact = jaccard(*texts)
        assert exact == pytest.approx(similarity, abs=0.01)
        one, other = (minhash_signature(text) for text in texts)
        off.append(np.mean(one == other) - exact)
    assert abs(np.mean(off)) < 4 * math.sqrt(similarity * (1 - similarity) / (40 * 128))
    assert np.std(off) < 2 * math.sqrt(similarity * (1 - similarity) / 128)


def test_signatures_are_the_same_on_every_machine():
    assert minhash_signature("To be, or not to be: that is the question").tolist()[:3] == SIGNATURE
    assert document_hash("to be") == HASH
    long = " ".join(f"w{i}" for i in range(9000))  # taken in blocks
    halves = [minhash_signature(" ".join(long.split()[a:b])) for a, b in ((0, 4502), (4498, 9000))]
    assert np.array_equal(minhash_signature(long), np.minimum(*halves))


SIGNATURE, HASH = [1849865253, 155973919, 827136803], 16403658637029719142


# What is found


@settings(max_examples=50)
@given(st.floats(0.05, 1.0), st.integers(2, 300), st.floats(0.5, 0.999))
def test_bands_reach_their_recall(threshold, permutations, recall):
    try:
        bands, rows = lsh_bands(threshold, permutations, recall)
    except ValueError as error:
        assert "too few to find pairs" in str(error) and 1 - (1 - threshold) ** permutations < recall
        return
    assert bands * rows <= permutations and 1 - (1 - threshold**rows) ** bands >= recall
    for more in range(rows + 1, permutations // 2 + 1):
        assert lsh_probability(threshold, permutations // more, more) < recall


def binomial_tail(n, s, least):
    return sum(math.comb(n, k) * s**k * (1 - s) ** (n - k) for k in range(least, n + 1))


@pytest.mark.parametrize("threshold, permutations", [(0.8, 128), (0.5, 64)])
@pytest.mark.parametrize("gap", [-0.25, -0.1, 0.0, 0.08, 0.15])
def test_found_pairs_are_as_many_as_the_formula_says(threshold, permutations, gap):
    """Recall above the threshold, false alarms below it: between P + Q − 1 and min(P, Q), within four deviations."""
    rng, trials = np.random.default_rng(1), 60
    pairs = [pair(rng, threshold + gap, words=120) for _ in range(trials)]
    found = sum(find(texts, threshold=threshold, permutations=permutations)[1] is not None for texts in pairs) / trials
    s = float(np.mean([jaccard(*texts) for texts in pairs]))
    p = lsh_probability(s, *lsh_bands(threshold, permutations))
    q = binomial_tail(permutations, s, math.ceil(threshold * permutations - 1e-9))
    low, high = max(0.0, p + q - 1), min(p, q)
    spread = [4 * math.sqrt(max(x * (1 - x), 1 / trials) / trials) for x in (low, high)]
    assert low - spread[0] <= found <= high + spread[1]
    if gap == 0.15:
        assert found > 0.9
    if gap == -0.25:
        assert found == 0


def test_duplicates_in_a_corpus_are_those_of_brute_force():
    """Groups of texts far above and far below the threshold: there is nothing to chance then."""
    rng, texts = np.random.default_rng(2), []
    for similarity in (0.99, 0.3, 0.97, 0.5, 0.1):
        texts += pair(rng, similarity)
    texts = [texts[i] for i in rng.permutation(len(texts))] + [texts[0].upper()]
    want, kept = [], []
    for i, text in enumerate(texts):
        near = [j for j in kept if jaccard(texts[j], text) >= 0.8]
        want.append(near[0] if near else None)
        kept += [] if near else [i]
    got = find(texts)
    assert [match and match.first for match in got] == want and sum(first is not None for first in want) == 3
    assert got[-1] == Match(want[-1], "exact", 1.0)


def test_first_of_a_group_stays_and_kept_ones_are_not_near():
    """a ~ b ~ c, but not a ~ c: b goes because of a, and c stays, as it is not near what stays."""
    rng = np.random.default_rng(3)
    words = [f"w{n}" for n in rng.integers(0, 10**9, 1000)]
    a, b, c = (" ".join(words[start : start + 500]) for start in (0, 60, 120))
    assert jaccard(a, b) > 0.75 and jaccard(b, c) > 0.75 and jaccard(a, c) < 0.65
    first, second, third = find([a, b, c], threshold=0.7)
    assert first is None and second.first == 0 and second.kind == "near" and second.similarity >= 0.7 and third is None
    assert [match and match.first for match in find([c, a, b], threshold=0.7)][:2] == [None, None]
    assert [match and match.first for match in find([b, a, c], threshold=0.7)] == [None, 0, 0]


def test_the_nearest_counts_and_of_equals_the_first():
    rng = np.random.default_rng(4)
    base = minhash_signature(pair(rng, 0.5)[0])
    other, halfway, close = base.copy(), base.copy(), base.copy()
    other[:40] += 1  # shares 88 of 128 numbers with the base
    halfway[:20] += 1  # 108 with each of the two
    close[:10] += 1  # 118 with the base, 98 with the other
    got = find_duplicates([(b"0", other), (b"1", base), (b"2", halfway), (b"3", close)], threshold=0.7)
    assert list(got) == [None, None, Match(0, "near", 108 / 128), Match(1, "near", 118 / 128)]


def test_exact_duplicates_alone():
    texts = ["To be or not", "to be,  or not", "to be or\nNOT ", "to be"]
    assert list(find_duplicates((exact_key(text), None) for text in texts)) == [None, None, Match(0, "exact", 1.0), None]
    assert [match and match.kind for match in find(texts)] == [None, "near", "exact", None]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: text_shingles("x", 0), "text_shingles: `size` is 0, want at least 1"),
        (lambda: text_shingles("x", 1, "lines"), "text_shingles: `unit` is 'lines', want one of 'words', 'characters'"),
        (lambda: minhash_signature("x", permutations=1), "minhash_signature: `permutations` is 1, want at least 2"),
        (lambda: lsh_bands(0.0), "lsh_bands: `threshold` is 0.0, want above 0 and at most 1"),
        (lambda: lsh_bands(0.1, 8), "lsh_bands: `permutations` is 8, too few to find pairs of similarity 0.1"),
        (lambda: list(find_duplicates([(b"0", np.zeros(8, np.uint32)), (b"1", np.zeros(9, np.uint32))], threshold=0.9)),
         "find_duplicates: `documents` has a signature of 9 numbers, want 8 as before"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message
