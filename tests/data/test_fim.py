"""Fill in the middle: the published format, and a cut that follows from a document and a seed alone."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dsv3.data import (
    Document,
    encode_documents,
    encode_fim,
    fim_ids,
    fim_split,
    load_tokenizer,
    read_corpus,
    special_ids,
    train_tokenizer,
)
from dsv3.data.tokenizer import BOS, EOS, MARKERS, PAD
from tests.real_data import DATA

ROOT = Path(__file__).resolve().parents[2]
REAL = DATA / "deepseek_v3_tokenizer"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="DeepSeek's tokenizer is not here (DSV3_DATA)")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 3, 300)


def parts_of(tokens, tokenizer):
    """The three texts of a document, from its tokens: bos begin prefix hole suffix end middle eos."""
    ids, special, tokens = fim_ids(tokenizer), special_ids(tokenizer), tokens.tolist()
    assert (tokens[0], tokens[1], tokens[-1]) == (special.bos, ids.begin, special.eos)
    hole, end = tokens.index(ids.hole), tokens.index(ids.end)
    assert hole < end
    prefix, suffix, middle = tokens[2:hole], tokens[hole + 1 : end], tokens[end + 1 : -1]
    assert not {*ids, *special} & {*prefix, *suffix, *middle}
    return [tokenizer.decode(part) for part in (prefix, middle, suffix)]


TEXTS = st.text(max_size=40).filter(lambda text: not any(marker in text for marker in MARKERS))


@settings(max_examples=200)
@given(TEXTS, st.integers(-(2**70), 2**70), st.floats(0, 1))
def test_parts_join_to_the_text(text, seed, rate):
    parts = fim_split(text, seed, rate)
    assert parts is None or "".join(parts) == text
    assert parts == fim_split(text, seed, rate)
    assert fim_split(text, seed, 0) is None
    assert (fim_split(text, seed, 1) is None) == (text == "")
    if parts is not None:
        assert fim_split(text, seed, 1) == parts  # the rate decides which documents, never where


@settings(max_examples=100)
@given(st.lists(TEXTS | st.sampled_from(["", f"forged {EOS}{BOS} end", "日本語\r\n😀"]), max_size=4), st.floats(0, 1))
def test_tokens_are_the_format_and_give_the_text_back(tokenizer, texts, rate):
    found = encode_fim(tokenizer, texts, seed=3, rate=rate)
    assert len(found) == len(texts)
    for tokens, text in zip(found, texts, strict=True):
        assert tokens.dtype == np.int32
        parts = fim_split(text, 3, rate)
        if parts is None:
            np.testing.assert_array_equal(tokens, encode_documents(tokenizer, [Document("", text)]).tokens)
        else:
            assert parts_of(tokens, tokenizer) == list(parts)


def test_the_order_is_prefix_suffix_middle(tokenizer):
    ids, (bos, eos, _) = fim_ids(tokenizer), special_ids(tokenizer)
    text = "def f(x):\n    return x + 1\n"
    parts = fim_split(text, 0, 1)
    codes = [tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
    want = [bos, ids.begin, *codes[0], ids.hole, *codes[2], ids.end, *codes[1], eos]
    assert encode_fim(tokenizer, [text], rate=1)[0].tolist() == want
    assert all(parts)


def test_the_cut_never_changes():
    assert fim_split("def f(x):\n    return x + 1\n", 0, 1) == ("def f(", "x", "):\n    return x + 1\n")
    assert fim_split("def f(x):\n    return x + 1\n", 0) is None


def test_shares_and_cuts_are_even():
    texts = [f"{i:05d}".ljust(99, ".") for i in range(20_000)]
    taken = [parts for parts in (fim_split(text, seed=1) for text in texts) if parts is not None]
    assert abs(len(taken) - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5  # four standard deviations
    cuts = np.array([(len(p), len(p) + len(m)) for p, m, _ in (fim_split(text, 1, 1) for text in texts)])
    # The smaller and the larger of two even numbers from 0 to 99 have means of nearly 33 and 66.
    np.testing.assert_allclose(cuts.mean(axis=0), [(100 - 1) / 3 - 1 / 6, 200 / 3 - 1 / 2], atol=1)
    assert cuts.min() == 0 and cuts.max() == 99
    counts = np.bincount(cuts.ravel(), minlength=100)  # each of the 100 places in a hundredth of 40,000 cuts
    assert counts.min() > 300 and counts.max() < 500
    other = {i for i, text in enumerate(texts) if fim_split(text, seed=2)}
    both = len({i for i, text in enumerate(texts) if fim_split(text, seed=1)} & other)
    assert 150 < both < 250  # seeds take documents independently: a hundredth are taken by both


def test_a_document_with_a_marker_stays_as_it_is(tokenizer):
    for marker in MARKERS[2:5]:
        text = f"a text with {marker} in it"
        assert fim_split(text, 0, 1) is None
        tokens = encode_fim(tokenizer, [text], rate=1)[0]
        np.testing.assert_array_equal(tokens, encode_documents(tokenizer, [Document("", text)]).tokens)
    assert fim_split(f"{MARKERS[0]} is not one of them", 0, 1) is not None


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    encode_fim(tokenizer, [EOS], rate=1)
    assert tokenizer.encode(EOS).ids == [0, 1]


def test_bad_input(tokenizer):
    for rate in (-0.1, 1.5, float("nan")):
        for call in (lambda rate=rate: fim_split("a", 0, rate), lambda rate=rate: encode_fim(tokenizer, ["a"], rate=rate)):
            with pytest.raises(ValueError, match=f"`rate` is {rate}, want 0 to 1"):
                call()
    other = Tokenizer(models.BPE())
    other.add_tokens([BOS, EOS, PAD, MARKERS[2]])
    with pytest.raises(ValueError, match=f"fim_ids: the tokenizer has no token {MARKERS[3]}, want DeepSeek's markers"):
        encode_fim(other, ["a"])
    assert encode_fim(other, [""], rate=0)[0].tolist() == [0, 1]
    short = Tokenizer.from_str(tokenizer.to_str())
    short.enable_truncation(4)
    with pytest.raises(ValueError, match="encode_fim: the tokenizer truncates or pads"):
        encode_fim(short, ["a"])


@needs_real
def test_deepseeks_markers_and_real_text():
    real = load_tokenizer(REAL)
    assert fim_ids(real) == (128_801, 128_800, 128_802)
    assert [real.id_to_token(i) for i in fim_ids(real)] == ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
    if not (DATA / "corpus").is_dir():
        return
    texts = [document.text for document in read_corpus(DATA / "corpus" / "thealgorithms_python.jsonl")][:300]
    taken = [fim_split(text) for text in texts]
    assert 15 < sum(parts is not None for parts in taken) < 50  # 30 +- 5.2
    for tokens, parts in zip(encode_fim(real, texts), taken, strict=True):
        if parts is not None:
            assert parts_of(tokens, real) == list(parts)
