"""Finds what a completion gives as its answer: behind its thinking, in tags or boxes, after ####, in a fenced block.

Every function takes any text, runs in linear time, and returns None where there is nothing to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`\n]*$")
_NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?%?(?![\w])")
_PHRASE = re.compile(r"(?i)\banswer\b[ \t*_]*(?:is|:|=)[ \t*_:]*")
_INLINE = re.compile(r"`[^`\n]+`")
RULES = ("tag", "boxed", "hash", "phrase", "number", "whole")


class _Block(NamedTuple):
    """A fenced block: where it and its lines begin and end, its language, and whether it is closed."""

    start: int
    inner_start: int
    inner_stop: int
    stop: int
    language: str
    closed: bool


def after_thinking(text: str, tag: str = "think") -> str | None:
    """Returns what follows the last closing tag, the whole text where there are no tags, None where thinking never ended.

    >>> after_thinking("<think>2 + 2</think> 4"), after_thinking("<think>2 + 2"), after_thinking("4")
    (' 4', None, '4')
    """
    _, closed, rest = text.rpartition(f"</{tag}>")
    if f"<{tag}>" in rest:
        return None
    return rest if closed else text


def last_tag(text: str, tag: str = "answer") -> str | None:
    """Returns what the last pair `<tag>...</tag>` holds, stripped.

    >>> last_tag("<answer>1</answer> or <answer> 2 </answer>")
    '2'
    """
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inner = before.rpartition(f"<{tag}>")
    return inner.strip() if closed and opened else None


def last_boxed(text: str) -> str | None:
    r"""Returns what the last complete `\boxed{...}` or `\fbox{...}` holds, braces in it included, stripped.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}, or \boxed{3")
    '\\frac{1}{2}'
    """
    found, stack = None, []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]", text):
        if match[0][-1] == "{" and match[0] != r"\{":
            stack.append(match.end() if len(match[0]) > 1 else None)
        elif match[0] == "}" and stack:
            start = stack.pop()
            if start is not None:  # a box around this one ends later, and then it is that one
                found = text[start : match.start()].strip()
    return found


def last_code_block(text: str, languages: tuple[str, ...] = ("", "python", "py", "python3")) -> str | None:
    """Returns the last closed block in a fence of backticks or tildes, of one of the languages (small letters).

    >>> last_code_block("```python\\nx = 1\\n```\\nIt prints\\n```text\\n1\\n```\\n")
    'x = 1\\n'
    """
    found = None
    for block in _blocks(text):
        if block.closed and block.language in languages:
            found = text[block.inner_start : block.inner_stop]
    return found


def code_spans(text: str) -> list[tuple[int, int]]:
    """Returns where code stands, from and to: fenced blocks, also one that is not closed, and `inline` code."""
    spans, start = [], 0
    for block in [*_blocks(text), None]:
        stop = block.start if block else len(text)
        spans += [(start + match.start(), start + match.end()) for match in _INLINE.finditer(text[start:stop])]
        if block:
            spans.append((block.start, block.stop))
            start = block.stop
    return spans


def find_answer(text: str, rules: tuple[str, ...]) -> str | None:
    r"""Returns the answer that the first rule to find one finds.

    Args:
      text: a completion, or what follows its thinking.
      rules: in order, of
        "tag": the last `<answer>...</answer>`, and in it what "boxed" or "hash" finds, or else all of it;
        "boxed": the last `\boxed{...}`;
        "hash": what follows the last `####`, to the line's end (GSM8K);
        "phrase": what follows the last "answer is" or "answer:", to the sentence's end;
        "number": the last number;
        "whole": everything.

    >>> find_answer(r"so <answer>it is $\boxed{7}$</answer>", ("tag", "boxed"))
    '7'
    """
    for rule in rules:
        found = _FINDERS[rule](text)
        if found:
            return found
    return None


def _blocks(text: str) -> Iterator[_Block]:
    """The fenced blocks, in order; the last one may not be closed."""
    opened, place = None, 0
    for line in text.splitlines(keepends=True):
        match = _FENCE.match(line.rstrip("\r\n"))
        end = place + len(line)
        if opened is None and match:
            opened, fence = _Block(place, end, len(text), len(text), match[2].lower(), False), match[1]
        elif opened is not None and match and match[1].startswith(fence) and not match[2]:
            yield opened._replace(inner_stop=place, stop=end, closed=True)
            opened = None
        place = end
    if opened is not None:
        yield opened


def _in_tag(text: str) -> str | None:
    inner = last_tag(text)
    return inner and (last_boxed(inner) or _after_hash(inner) or inner)


def _after_hash(text: str) -> str | None:
    _, found, rest = text.rpartition("####")
    return rest.strip().split("\n")[0].strip() if found else None


def _after_phrase(text: str) -> str | None:
    ends = [match.end() for match in _PHRASE.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] :].split("\n")[0]
    return re.split(r"\.(?:\s|$)", line)[0].strip(" *_") or None


def _last_number(text: str) -> str | None:
    found = [match[0] for match in _NUMBER.finditer(text)]
    return found[-1] if found else None


_FINDERS = {
    "tag": _in_tag, "boxed": last_boxed, "hash": _after_hash, "phrase": _after_phrase, "number": _last_number,
    "whole": str.strip,
}  # fmt: skip
