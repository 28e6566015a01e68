"""Rewards of form: tags, language, length, repetition."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.rl.reward_text import (
    make_format_reward,
    make_language_reward,
    make_overlong_penalty,
    make_repetition_penalty,
)

GOOD = "<think>2 + 2</think> <answer>4</answer>"


def of(reward, text):
    return reward("prompt", text, None)


@pytest.mark.parametrize(
    "text, kept",
    [
        (GOOD, 6),
        ("\n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 6),
        ("so " + GOOD, 5),
        (GOOD + " bye", 5),
        ("<think> </think><answer>4</answer>", 5),
        ("<think>a</think><answer></answer>", 5),
        ("<think>a</think> so <answer>4</answer>", 5),
        ("<think>a</think>4", 3),
        ("<think>a</think><answer>4", 3),
        (GOOD + "<answer>5</answer>", 3),
        ("<answer>4</answer><think>a</think>", 2),
        ("<think>a<think>b</think><answer>4</answer>", 0),
        ("<think>a", 0),
        ("</think>a<think>", 0),
        ("4", 0),
        ("", 0),
    ],
)
def test_format(text, kept):
    assert of(make_format_reward(), text) == float(kept == 6)
    assert of(make_format_reward(partial=True), text) == pytest.approx(kept / 6)
    assert of(make_format_reward(think="reasoning", answer="solution"), text) == 0.0
    renamed = text.replace("think", "reasoning").replace("answer", "solution")
    assert of(make_format_reward(think="reasoning", answer="solution"), renamed) == float(kept == 6)


def test_format_of_a_prompt_that_opens_the_tag():
    opened = make_format_reward(opened=True)
    assert of(opened, "2 + 2</think> <answer>4</answer>") == 1.0
    for text in (GOOD, "</think><answer>4</answer>", "2 + 2 <answer>4</answer>", "2</think>2</think><answer>4</answer>"):
        assert of(opened, text) == 0.0, text


def test_format_without_answer_tags():
    free = make_format_reward(answer=None)
    assert of(free, "<think>a</think>4") == of(free, GOOD) == 1.0
    for text in ("<think>a</think> ", "<think></think>4", "4", "b<think>a</think>4", "<think>a</think>4</think>"):
        assert of(free, text) == 0.0, text
    assert of(make_format_reward(answer=None, partial=True), "<think>a</think> ") == 3 / 4


@pytest.mark.parametrize(
    "language, unit, text, share",
    [
        ("en", "words", "one two three", 1.0),
        ("en", "words", "one two 三四", 0.5),
        ("en", "characters", "ab cd 三四", 4 / 6),
        ("zh", "words", "我们 know", 2 / 3),
        ("ja", "words", "これは猫です", 1.0),
        ("zh", "words", "これは猫です", 1 / 6),
        ("ko", "words", "고양이 cat", 0.5),
        ("ru", "words", "кошка и dog", 2 / 3),
        ("el", "words", "η γάτα", 1.0),
        ("en", "words", "naïve don't co-op café", 1.0),
        ("fr", "words", "cafe\u0301s noir кот", 2 / 3),
        ("en", "words", "the word猫 is", 3 / 4),
        ("th", "characters", "แมว", 1.0),
        ("en", "words", "12 + 3 = ?", 0.0),
        ("en", "words", "", 0.0),
        ("zh", "words", "所以 `print(x)` 是\n```python\nprint('hello world')\n```\n", 1.0),
        ("zh", "words", r"因为 $a + b$ \(x\) \[y\] $$z$$ \frac{a}{b} 所以", 1.0),
        ("zh", "words", r"costs $5\n因为 \( 所以 \(a\) $b$ $5".replace(r"\n", "\n"), 4 / 5),
        ("zh", "words", "<think>因为</think> https://example.com/page", 1.0),
        ("en", "words", "𝐱 µ Ω one", 1 / 2),
    ],
)
def test_language_by_script(language, unit, text, share):
    assert of(make_language_reward(language, unit=unit), text) == pytest.approx(share)


def test_language_of_sentences():
    english = "The quick brown fox jumps over the lazy dog and runs away from the hunter."
    german = "Der schnelle braune Fuchs springt über den faulen Hund und läuft vor dem Jäger davon."
    by_script = make_language_reward("de")
    identify = make_language_reward("de", measure="identify", among=("en", "fr"))
    assert of(by_script, english) == 1.0 and of(identify, english) == 0.0 and of(identify, german) == 1.0
    assert of(identify, f"{english} {german}") == pytest.approx(15 / 30)
    assert of(identify, f"{german} Also 42.") == 1.0  # too short to tell
    assert of(make_language_reward("en", measure="identify", among=("de",)), f"{english} 猫") == pytest.approx(15 / 16)


def test_long_texts_take_no_time():
    for piece in ["\\(", "$", "$$", "`", "```\n", "<a", "\\a{", "https://", "a. ", "<think>"]:
        text = piece * (100_000 // len(piece))
        for reward in (make_language_reward("en"), make_format_reward(partial=True), make_repetition_penalty()):
            of(reward, text)


def test_a_text_without_letters_is_worth_what_is_asked():
    assert of(make_language_reward("en", empty=1.0), "$x$ 12") == 1.0


@settings(max_examples=80)
@given(st.text(max_size=60), st.sampled_from(["words", "characters"]), st.sampled_from(["en", "zh", "ja"]))
def test_shares_are_shares(text, unit, language):
    assert 0.0 <= of(make_language_reward(language, unit=unit), text) <= 1.0
    assert 0.0 <= of(make_format_reward(partial=True), text) <= 1.0


@pytest.mark.parametrize("length, penalty", [(0, 0.0), (90, 0.0), (95, -0.5), (99, -0.9), (100, -1.0), (1000, -1.0)])
def test_overlong(length, penalty):
    assert of(make_overlong_penalty(max_length=100, buffer=10, count=len), "x" * length) == pytest.approx(penalty)


@settings(max_examples=80)
@given(st.lists(st.sampled_from("a B b c".split()), max_size=30), st.integers(1, 4))
def test_repetition(words, n):
    runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    runs = Counter(tuple(word.lower() for word in run) for run in runs.elements())
    again = sum(count - 1 for count in runs.values())
    want = -again / runs.total() if runs else 0.0
    assert of(make_repetition_penalty(ngram=n), " ".join(words)) == pytest.approx(want)
    assert of(make_repetition_penalty(ngram=n, unit="characters"), "".join(words)) == pytest.approx(want)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_format_reward(think="<think>"), "make_format_reward: `think` is '<think>', want a tag's name"),
        (lambda: make_format_reward(think=None), "`think` is None"),
        (lambda: make_format_reward(answer="think"), "`answer` is 'think', want another tag"),
        (lambda: make_language_reward("xx"), "make_language_reward: `language` is 'xx', want one of af, am"),
        (lambda: make_language_reward("en", measure="guess"), "`measure` is 'guess', want one of 'script', 'identify'"),
        (lambda: make_language_reward("en", unit="lines"), "`unit` is 'lines'"),
        (lambda: make_language_reward("en", measure="identify", among=("qq",)), "`among` has 'qq'"),
        (lambda: make_overlong_penalty(max_length=4, buffer=5, count=len), "make_overlong_penalty: `buffer` is 5, want 1"),
        (lambda: make_overlong_penalty(max_length=4, buffer=2, count=None), "`count` is None, want a function"),
        (lambda: make_repetition_penalty(ngram=0), "make_repetition_penalty: `ngram` is 0, want at least 1"),
        (lambda: make_repetition_penalty(unit="lines"), "`unit` is 'lines'"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
