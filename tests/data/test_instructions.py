"""The embedded conversations: well formed, no question twice, and right, as far as a second way to compute can tell."""

import ast
import re

import pytest

from dsv3.data import check_messages, embedded_conversations

ROWS = embedded_conversations(2000)


def questions(pattern):
    """The groups of a pattern in first questions, with the answers to them."""
    for row in ROWS:
        asked, said = [m for m in row.messages if m["role"] != "system"][:2]
        found = re.fullmatch(pattern, asked["content"], re.S)
        if found:
            yield (*found.groups(), said)


def test_they_are_conversations_and_differ():
    for row in ROWS:
        check_messages(row.messages)
    assert len({next(m["content"] for m in row.messages if m["role"] == "user") for row in ROWS}) == len(ROWS) == 2000
    assert embedded_conversations(50) == ROWS[:50] and embedded_conversations(50, seed=1) != ROWS[:50]
    assert {len(row.messages) for row in ROWS} == {2, 3, 4}
    for count in (0, 2001):
        with pytest.raises(ValueError, match=f"embedded_conversations: `count` is {count}, want 1 to 2000"):
            embedded_conversations(count)


def test_no_task_is_there_in_two_phrasings():
    """By what a right answer is made of: operands and sign, the name of a function."""
    patterns = {
        "+": [r"What is (\d+) \+ (\d+)\?", r"Add (\d+) and (\d+)\.", r"Compute (\d+) \+ (\d+)\.", r"(\d+) plus (\d+)\?"],
        "-": [r"What is (\d+) - (\d+)\?", r"Take (\d+) from (\d+)\."],
        "name": [r"Write a Python function `(\w+)` that .*", r"Define `(\w+)` in Python\..*"],
    }
    for kind, ways in patterns.items():
        found = [[frozenset(groups[:-1]) for groups in questions(way)] for way in ways]
        tasks = [task for one in found for task in one]
        assert len(set(tasks)) == len(tasks) and min(map(len, found)) > 10, kind


def test_code_prints_what_is_said():
    found = list(questions(r"What does this Python code print\?\n\nprint\((.*)\)"))
    for code, said in found:
        assert str(eval(code, {})) == said["content"]  # noqa: S307
    assert len(found) > 100


def test_functions_are_python():
    found = list(questions(r".*`(\w+)`.*"))
    for name, said in found:
        (function,) = ast.parse(re.fullmatch(r"```python\n(.*)\n```", said["content"], re.S)[1]).body
        assert function.name == name
    assert len(found) > 50


def test_sums_and_their_steps_are_right():
    found = list(questions(r"\D*(\d+) (?:\+|and) (\d+)\D*"))
    for a, b, said in found:
        assert said["content"] == f"{a} + {b} = {int(a) + int(b)}"
        ones, tens = said["reasoning_content"].split("\n")
        left, result = tens.split(" = ")
        assert sum(map(int, left.split(" + "))) == int(result) == (int(a) + int(b)) // 10
        assert ones.startswith(f"{a[-1]} + {b[-1]} = {int(a[-1]) + int(b[-1])}")
        assert ("carry" in ones) == left.endswith(" + 1", 5)
    assert len(found) > 100


@pytest.mark.parametrize(
    "pattern, answer",
    [
        (r"Write (\w+) backwards\.", lambda w: "".join(reversed(w))),
        (r"Spell (\w+)\.", lambda w: re.sub(r"\B", "-", w)),
        (r"Write (\w+) in capitals\.", lambda w: "".join(chr(ord(c) - 32) for c in w)),
        (r"How many letters has (\w+)\?", lambda w: f"{w} has {len(list(w))} letters."),
        (r"What is the last letter of (\w+)\?", lambda w: f"The last letter of {w} is {list(w).pop()}."),
    ],
)
def test_words(pattern, answer):
    found = list(questions(pattern))
    assert found and all(said["content"] == answer(word) for word, said in found)
