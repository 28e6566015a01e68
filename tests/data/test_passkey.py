"""Passkey problems: what they hold, where, and what a row of a training becomes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import passkey, train_tokenizer
from dsv3.data.passkey import passkey_form, passkey_problem, passkey_rows
from dsv3.data.tokenizer import special_ids

FILLER = np.arange(1000, dtype=np.int32) % 7 + 3
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def form():
    return passkey_form(train_tokenizer([TEXT, "The pass key is 12345. Remember it."], 300))


def places(tokens, part):
    """Where a run of tokens begins in a row."""
    tokens, part = list(tokens), list(part)
    return [i for i in range(len(tokens) - len(part) + 1) if tokens[i : i + len(part)] == part]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99_999), st.floats(0, 1), st.integers(0, 300))
def test_a_problem_has_its_length_and_tells_the_number_at_its_depth(form, number, depth, extra):
    length = 1 + len(form.told) + len(form.key(number)) + len(form.remember) + len(form.asked) + extra
    problem = passkey_problem(form, FILLER, length=length, depth=depth, number=number)
    assert problem.prompt.shape == (length,) and problem.prompt.dtype == np.int32 and problem.number == number
    assert problem.prompt[0] == form.bos and tuple(problem.prompt[-len(form.asked) :]) == form.asked
    (told,) = places(problem.prompt, (*form.told, *form.key(number), *form.remember))
    assert told == 1 + round(depth * extra)
    rest = np.delete(problem.prompt, np.r_[told : told + length - 1 - extra - len(form.asked)])[1 : 1 + extra]
    np.testing.assert_array_equal(rest, FILLER[:extra])
    assert form.tokenizer.decode(problem.answer.tolist()) == f" {number:05d}"


def test_a_text_asks_for_what_it_tells(form):
    exact = 1 + len(form.told) + len(form.key(7)) + len(form.remember) + len(form.asked)
    problem = passkey_problem(form, np.zeros(0, np.int32), length=exact, depth=0, number=7)
    shown = form.tokenizer.decode(problem.prompt.tolist())
    assert shown == "\nThe pass key is 00007. Remember it.\n\nWhat is the pass key? The pass key is"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 400), st.integers(1, 6))
def test_rows_keep_their_width_and_follow_from_their_tokens(form, seed, extra, count):
    rows = np.random.default_rng(seed).integers(3, 259, [count, form.least + 1 + extra]).astype(np.int32)
    before = rows.copy()
    made = passkey_rows(form, rows, share=1.0, seed=3).tokens
    assert made.shape == rows.shape and made.dtype == np.int32
    np.testing.assert_array_equal(rows, before)
    np.testing.assert_array_equal(made[::-1], passkey_rows(form, rows[::-1], share=1.0, seed=3).tokens)
    assert (made != passkey_rows(form, rows, share=1.0, seed=4).tokens).any()
    untouched = passkey_rows(form, rows, share=0.0, seed=3, key_weight=8)
    np.testing.assert_array_equal(untouched.tokens, rows)
    assert (untouched.weights == 1).all() and untouched.weights.shape == rows[:, 1:].shape


def test_rows_hold_problems_whose_answers_were_told_and_passages_that_come_again(form):
    rows = np.random.default_rng(0).integers(3, 259, [200, 3 * form.least]).astype(np.int32)
    made = passkey_rows(form, rows, share=1.0).tokens
    asked = repeated = 0
    for row in made:
        for document in np.split(row, np.flatnonzero(row == form.bos)):
            document = document.tolist()
            for at in places(document, form.asked):
                answer = document[at + len(form.asked) : document.index(form.eos)]
                assert answer[-len(form.end) :] == list(form.end)
                assert places(document, (*form.told, *answer[: -len(form.end)], *form.remember))
                asked += 1
            if document[:1] == [form.bos] and form.eos in document and not places(document, form.asked):
                passage = document[1 : document.index(form.eos)]
                periods = [p for p in range(passkey._PASSAGE, len(passage) // 2 + 2) if passage[p:] == passage[:-p]]
                assert periods
                repeated += 1
    assert asked > 150 and repeated > 150
    changed = (passkey_rows(form, rows, share=0.3).tokens != rows).any(1).mean()
    assert 0.2 < changed < 0.4  # 200 draws of 0.3: three deviations are 0.1


def test_keys_that_are_asked_for_have_their_weight_and_nothing_else(form):
    rows = np.random.default_rng(2).integers(3, 259, [60, 3 * form.least]).astype(np.int32)
    plain, made = passkey_rows(form, rows, share=0.7), passkey_rows(form, rows, share=0.7, key_weight=8)
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    assert made.weights.dtype == np.float32 and (plain.weights == 1).all()
    problems = 0
    for row, weights in zip(made.tokens, made.weights):
        want = np.ones(len(row), np.float32)
        for at in places(row, form.asked):
            begin = at + len(form.asked)
            want[begin : begin + len(form.key(0))] = 8
            problems += 1
        np.testing.assert_array_equal(weights, want[1:])  # of targets
    assert problems > 40


def test_bad_input_is_named(form):
    filler = np.zeros(500, np.int32)
    for options, words in (
        ({"length": 20}, "`length` is 20, want at least"),
        ({"depth": 1.5}, "`depth` is 1.5, want 0 to 1"),
        ({"number": 10**5}, "`number` is 100000, want 0 to 99999"),
        ({"length": 900}, "`filler` has 500 tokens, want at least"),
    ):
        with pytest.raises(ValueError, match=words):
            passkey_problem(form, filler, **({"length": 200, "depth": 0.5, "number": 1} | options))
    with pytest.raises(ValueError, match="the vocabulary has 0 words as tokens, want at least 16"):
        passkey_form(train_tokenizer(["0 1 2"], 270), "words")
    with pytest.raises(ValueError, match="`keys` is 'letters'"):
        passkey_form(form.tokenizer, "letters")
    with pytest.raises(ValueError, match="`share` is 2, want 0 to 1"):
        passkey_rows(form, np.zeros([2, 300], np.int32), share=2)
    for weight in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"`key_weight` is {weight}, want a finite number from 0"):
            passkey_rows(form, np.zeros([2, 300], np.int32), share=0.5, key_weight=weight)
    with pytest.raises(ValueError, match=f"rows have {form.least} tokens, want more than {form.least}"):
        passkey_rows(form, np.zeros([2, form.least], np.int32), share=0.5)


def test_passages_hold_no_border_of_documents(form, monkeypatch):
    rows = np.random.default_rng(1).integers(3, 259, [50, 3 * form.least]).astype(np.int32)
    rows[:, ::9], rows[:, 1::9] = form.eos, form.bos


    def bare(form, filler, *, length, number, **_):
        return passkey.PasskeyProblem(np.full(length, 9, np.int32), np.full(len(form.key(number)), 9, np.int32), number)

    with monkeypatch.context() as patched:  # problems have their filler's borders: without them only passages could have any
        patched.setattr(passkey, "passkey_problem", bare)
        made = passkey_rows(form, rows, share=1.0).tokens
    for row in made:
        begins = np.flatnonzero(row == form.bos)
        assert not len(begins) or (row == form.eos).sum() >= len(begins)
        for document in np.split(row, begins)[1:]:
            inside = document[1 : np.flatnonzero(document == form.eos)[0]]
            assert form.bos not in inside and len(inside) >= 2 * passkey._PASSAGE
    same = np.full([5, 3 * form.least], 7, np.int32)
    assert all(places(row, form.asked) for row in passkey_rows(form, same, share=1.0).tokens)


def test_words_are_keys_too():
    text = " ".join(f"{a}{b}{c}{d}" for a in "bdfgkl" for b in "aeiou" for c in "mnrst" for d in "aeo")
    form = passkey_form(train_tokenizer([f" {text}"] * 3, 600), "words")
    assert len(form.words) >= 16 and form.count == len(form.words) ** 4
    keys = {form.key(number) for number in range(0, form.count, max(1, form.count // 500))}
    assert len(keys) >= 500 and all(len(key) == 4 and set(key) <= set(form.words) for key in keys)
    texts = form.tokenizer.decode(list(form.key(form.count - 1))).split()
    assert len(texts) == 4 and all(len(word) >= 3 and word.islower() for word in texts)
    made = passkey_problem(form, FILLER, length=100, depth=0.3, number=form.count - 1)
    assert tuple(made.answer) == form.key(form.count - 1) and places(made.prompt, made.answer)


def test_special_tokens_are_the_tokenizers(form):
    assert (form.bos, form.eos) == special_ids(form.tokenizer)[:2]
