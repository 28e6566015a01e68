"""Rewards of a completion's form: its tags, its language, its length, its repetitions. None looks at the reference.

References:
  DeepSeek-AI, "DeepSeek-R1", arXiv:2501.12948, section 2.2.2 (format), section 2.3.2 (language consistency: the share of
  words in the target language).
  Yu et al., "DAPO", arXiv:2503.14476, section 3.4 and equation 13: the soft overlong punishment.
  Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv:2502.03373: a penalty for repeated
  n-grams.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from dsv3.checks import check, check_choice
from dsv3.data.extra import load_extra
from dsv3.rl.answers import code_spans
from dsv3.rl.reward import RewardFn

# Script, by the first word of its letters' Unicode names → the languages that are written in it, by their codes of ISO 639.
_WRITTEN = {
    "LATIN": "af ca cs cy da de en es et eu fi fr ga hr hu id is it lt lv ms mt nl no pl pt ro sk sl sq sv sw tl tr vi",
    "CYRILLIC": "be bg kk mk mn ru uk", "DEVANAGARI": "hi mr ne", "ARABIC": "ar fa ps ur", "CJK": "ja ko zh", "HANGUL": "ko",
    "HIRAGANA": "ja", "KATAKANA": "ja", "ARMENIAN": "hy", "BENGALI": "bn", "ETHIOPIC": "am", "GEORGIAN": "ka", "GREEK": "el",
    "GUJARATI": "gu", "GURMUKHI": "pa", "HEBREW": "he", "KANNADA": "kn", "KHMER": "km", "LAO": "lo", "MALAYALAM": "ml",
    "MYANMAR": "my", "SINHALA": "si", "TAMIL": "ta", "TELUGU": "te", "THAI": "th",
}  # fmt: skip
LANGUAGES = frozenset(" ".join(_WRITTEN.values()).split())
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})  # a letter counts as a word

_MATHS = {r"\(": r"\)", r"\[": r"\]", "$": "$", "$$": "$$"}
_MATHS_MARK = re.compile(r"\\[()\[\]]|\$\$?|\n")
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*")
_TAGS_AND_LINKS = re.compile(r"</?[A-Za-z][\w-]*>|https?://\S+")
_SEGMENT = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_FEW_LETTERS = 24  # a shorter piece is too short to tell its language from others of its script


def make_format_reward(
    *, think: str = "think", answer: str | None = "answer", opened: bool = False, partial: bool = False
) -> RewardFn:
    """Returns a reward of (prompt, completion, reference): 1.0 for `<think>...</think> <answer>...</answer>`, else 0.0.

    Each tag has to be there once, in this order, with something between; before, between and behind there are blanks alone.

    Args:
      think: name of the first tags.
      answer: name of the second; None: any text that is not blank follows the first.
      opened: whether the prompt ends with `<think>`, so that the completion has the closing tag alone.
      partial: the share of the rules that are kept instead of 0.0: first tags once and in order; nothing before them;
        something in them; second tags once, in order, behind the first; something in them; nothing behind them.

    Raises:
      ValueError: a tag's name that is none.

    >>> reward = make_format_reward()
    >>> reward("", "<think>2 + 2</think> <answer>4</answer>", None), reward("", "<think></think><answer>4</answer>", None)
    (1.0, 0.0)
    """
    for name, tag in (("think", think), ("answer", answer)):
        good = tag is None and name == "answer" or isinstance(tag, str) and re.fullmatch(r"[\w-]+", tag)
        check(bool(good), f"make_format_reward: `{name}` is {tag!r}, want a tag's name")
    check(think != answer, f"make_format_reward: `answer` is {answer!r}, want another tag than `think`")

    def format_reward(prompt: str, completion: str, reference: Any) -> float:
        """Returns the share of kept rules, or whether all are kept; `prompt` and `reference` are not looked at."""
        text = f"<{think}>{completion}" if opened else completion
        first, before, inner, rest = _split_tags(text, think)
        rules = [first, first and not before.strip(), first and bool(inner.strip())]
        if answer is None:
            rules.append(first and bool(rest.strip()))
        else:
            second, between, given, behind = _split_tags(rest, answer)
            second = first and second and text.count(f"<{answer}>") == text.count(f"</{answer}>") == 1
            rules += [second, second and bool(given.strip()), second and not (between + behind).strip()]
        return sum(rules) / len(rules) if partial else float(all(rules))

    return format_reward


def make_language_reward(
    language: str, *, measure: str = "script", unit: str = "words", among: tuple[str, ...] = ("en", "zh"), empty: float = 0.0
) -> RewardFn:
    r"""Returns a reward of (prompt, completion, reference): the share of the completion that is in a language, 0.0 to 1.0.

    Code, mathematics, tags and links are left out.

    Args:
      language: code of ISO 639, such as "en".
      measure: "script": what is written in the language's script, so that English and German are the same; "identify": also
        in a sentence that py3langid (extra `data`) finds more like `language` than like any other of `among`.
      unit: "words": runs of letters, where a script has blanks between words, else each letter; or "characters": letters.
      among: languages that the text may be in, with "identify"; `language` is always one.
      empty: the reward where nothing is left.

    Raises:
      ValueError: an argument that is not known; py3langid is not installed.

    >>> make_language_reward("en")("", r"We know that $\pi$ 很 big", None)
    0.8
    """
    known = ", ".join(sorted(LANGUAGES))
    check(language in LANGUAGES, f"make_language_reward: `language` is {language!r}, want one of {known}")
    check_choice("make_language_reward", "measure", measure, ("script", "identify"))
    check_choice("make_language_reward", "unit", unit, ("words", "characters"))
    scripts = {script for script, languages in _WRITTEN.items() if language in languages.split()}
    classify = _classifier(tuple(sorted({language, *among}))) if measure == "identify" else None

    def language_reward(prompt: str, completion: str, reference: Any) -> float:
        """Returns the share; `prompt` and `reference` are not looked at."""
        prose = _prose(completion)
        right = total = 0
        for piece in _SEGMENT.split(prose) if classify else [prose]:
            units = _script_units(piece, unit)
            inside = sum(script in scripts for script in units)
            total += len(units)
            if classify is None or sum(map(str.isalpha, piece)) < _FEW_LETTERS or classify(piece) == language:
                right += inside
        return right / total if total else empty

    return language_reward


def make_overlong_penalty(*, max_length: int, buffer: int, count: Callable[[str], int]) -> RewardFn:
    """Returns a reward of (prompt, completion, reference) that falls from 0.0 to -1.0 in the last `buffer` before a length.

        0                                     n <= max_length - buffer
        (max_length - buffer - n) / buffer    up to max_length
        -1                                    beyond

    Args:
      max_length: the length from which on it is -1.0.
      buffer: where it falls.
      count: a completion's length, such as `lambda text: len(tokenizer.encode(text).ids)`.

    Raises:
      ValueError: not 0 < buffer <= max_length.

    References:
      DAPO, arXiv:2503.14476, equation 13.

    >>> penalty = make_overlong_penalty(max_length=10, buffer=4, count=len)
    >>> [penalty("", "x" * n, None) for n in (6, 8, 10, 11)]
    [0.0, -0.5, -1.0, -1.0]
    """
    good = type(buffer) is int and type(max_length) is int and 0 < buffer <= max_length
    check(good, f"make_overlong_penalty: `buffer` is {buffer!r}, want 1 to `max_length` {max_length!r}")
    check(callable(count), f"make_overlong_penalty: `count` is {count!r}, want a function of a text")

    def overlong_penalty(prompt: str, completion: str, reference: Any) -> float:
        """Returns -1.0 to 0.0; `prompt` and `reference` are not looked at."""
        return min(0.0, max(-1.0, (max_length - buffer - count(completion)) / buffer))

    return overlong_penalty


def make_repetition_penalty(*, ngram: int = 4, unit: str = "words") -> RewardFn:
    """Returns a reward of (prompt, completion, reference): minus the share of n-grams that have occurred before.

        (different n-grams - n-grams) / n-grams

    Args:
      ngram: n. A shorter completion has none, and is worth 0.0.
      unit: "words", by blanks, in small letters; or "characters", for scripts without blanks.

    Raises:
      ValueError: an argument that is not known.

    >>> make_repetition_penalty(ngram=2)("", "so so so so", None) == -2 / 3
    True
    """
    check(type(ngram) is int and ngram >= 1, f"make_repetition_penalty: `ngram` is {ngram!r}, want at least 1")
    check_choice("make_repetition_penalty", "unit", unit, ("words", "characters"))

    def repetition_penalty(prompt: str, completion: str, reference: Any) -> float:
        """Returns -1.0 to 0.0; `prompt` and `reference` are not looked at."""
        text = completion.lower()
        items = text.split() if unit == "words" else [letter for letter in text if not letter.isspace()]
        runs = list(zip(*(items[start:] for start in range(ngram))))
        return (len(set(runs)) - len(runs)) / len(runs) if runs else 0.0

    return repetition_penalty


def _split_tags(text: str, tag: str) -> tuple[bool, str, str, str]:
    """Whether a pair of tags is there once and in order; what stands before, in and behind it."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    before, _, rest = text.partition(opening)
    inner, found, behind = rest.partition(closing)
    return text.count(opening) == text.count(closing) == 1 and bool(found), before, inner, behind


def _prose(text: str) -> str:
    """The text without code, mathematics, tags and links."""
    text = _cut_spans(text, code_spans(text))
    text = _cut_spans(text, _math_spans(text))
    return _TAGS_AND_LINKS.sub(" ", _COMMAND.sub(" ", text))


def _cut_spans(text: str, spans: list[tuple[int, int]]) -> str:
    """The text with a blank for each span."""
    stops = [0, *(stop for _, stop in spans)]
    return " ".join(text[stop:start] for stop, (start, _) in zip(stops, [*spans, (len(text), 0)]))


def _math_spans(text: str) -> list[tuple[int, int]]:
    """Where mathematics stands, from and to; a dollar sign has its like in the same line."""
    spans, opening, start = [], None, 0
    for match in _MATHS_MARK.finditer(text):
        mark = match[0]
        if opening is not None and mark == _MATHS[opening]:
            spans.append((start, match.end()))
            opening = None
        elif mark in _MATHS:
            opening, start = mark, match.start()
        elif opening == "$":
            opening = None
    return spans


@functools.lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str | None:
    """The script of a letter; None for what is no letter of a script that a language here has."""
    if not letter.isalpha():
        return None
    words = unicodedata.name(letter, "").split()
    return next((word for word in words[:2] if word in _WRITTEN), None)


def _script_units(text: str, unit: str) -> list[str]:
    """The script of each letter, or of each word: a run of letters of one script, or one letter where that has no blanks."""
    units: list[str] = []
    before = None
    for letter in text:
        script = _script(letter)
        if script and (unit == "characters" or script in _UNSPACED or script != before):
            units.append(script)
        # A mark over a letter, an apostrophe or a hyphen does not end a word.
        before = script or (before if letter in "'’-" or unicodedata.combining(letter) else None)
    return units


@functools.lru_cache(maxsize=8)
def _classifier(among: tuple[str, ...]) -> Callable[[str], str]:
    """Tells a text's language, one of `among`."""
    module = load_extra("make_language_reward", "py3langid.langid")
    identifier = module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
    unknown = sorted(set(among) - set(identifier.labels))
    names = ", ".join(map(repr, unknown))
    check(not unknown, f"make_language_reward: `among` has {names}, want languages that py3langid knows")
    identifier.set_languages(list(among))
    return lambda text: identifier.classify(text)[0]
