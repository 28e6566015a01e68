"""The conversations that are always there: small tasks whose answers are computed, so that they are right.

Sums with their steps as reasoning, words turned about, Python expressions and what they print, short functions; some with a
system message, some of two questions. They teach a small model the form of a conversation, not knowledge.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from dsv3.checks import check
from dsv3.data.messages import Conversation, Message

_WORDS = (
    "apple bread chair cloud dance earth flame grass house index juice knife lemon match night ocean paper queen river "
    "stone table under voice water young zebra above black clean dream eight fresh green heart input light money north "
    "order plant quick round sheep train value white error class print return import string number object method module"
).split()
# Name, parameters, what it does, its one line; `{f}` is one of several names for the function.
_FUNCTIONS = (
    ("larger", "a, b", "returns the larger of two numbers", "return a if a > b else b"),
    ("is_even", "n", "tells whether a number is even", "return n % 2 == 0"),
    ("square", "x", "returns the square of a number", "return x * x"),
    ("last", "items", "returns the last item of a list", "return items[-1]"),
    ("reverse", "text", "returns a string backwards", "return text[::-1]"),
    ("count", "text, letter", "counts a letter in a string", "return text.count(letter)"),
    ("total", "numbers", "adds up a list of numbers", "return sum(numbers)"),
    ("mean", "numbers", "returns the mean of a list of numbers", "return sum(numbers) / len(numbers)"),
    ("first_word", "text", "returns the first word of a string", "return text.split()[0]"),
    ("unique", "items", "returns the different items of a list in order", "return sorted(set(items))"),
    ("absolute", "x", "returns a number without its sign", "return -x if x < 0 else x"),
    ("join", "words", "joins words with spaces", 'return " ".join(words)'),
)


def embedded_conversations(count: int = 2000, seed: int = 0) -> list[Conversation]:
    """Makes conversations about small tasks; no two have the same task at first, also not in other words.

    So what is held out of them has not been learned in another phrasing. Functions are a dozen, under several names each.

    Args:
      count: how many, at most 2000: there are not many more questions than that.
      seed: another seed, other questions.

    Returns:
      The conversations, the same ones for the same arguments.

    Raises:
      ValueError: `count` out of range.

    >>> [message["role"] for message in embedded_conversations(1)[0].messages][-1]
    'assistant'
    """
    check(1 <= count <= 2000, f"embedded_conversations: `count` is {count}, want 1 to 2000")
    found: dict[str, Conversation] = {}
    rng = random.Random(seed)
    for make in _turns():
        messages = make(rng)
        found.setdefault(_task(messages), Conversation(f"embedded {len(found) + 1}", tuple(messages)))
        if len(found) == count:
            break
    return list(found.values())


def _task(messages: list[Message]) -> str:
    """What is asked for at first: of arithmetic numbers and sign, of functions the name, of the rest the question."""
    asked = next(message["content"] for message in messages if message["role"] == "user")
    name = re.search(r"`(\w+)`", asked)
    if name is not None:
        return name[1]
    numbers = re.fullmatch(r"\D*(\d+)\D+(\d+)\D*", asked)
    if numbers is None or "print(" in asked:
        return asked
    a, b = sorted(map(int, numbers.groups()))
    return f"{b} - {a}" if "-" in asked or "Take" in asked else f"{a} + {b}"


def _turns() -> Iterator[Callable[[random.Random], list[Message]]]:
    """The kinds of tasks, over and over."""
    while True:
        yield from (_sum, _letters, _expression, _function, _order, _two_questions, _difference, _letters, _terse)


def _asked(question: str, answer: str, *, reasoning: str | None = None) -> list[Message]:
    said: Message = {"role": "assistant", "content": answer}
    if reasoning is not None:
        said["reasoning_content"] = reasoning
    return [{"role": "user", "content": question}, said]


def _sum(rng: random.Random) -> list[Message]:
    """A sum of two numbers of two digits, digit by digit."""
    a, b = rng.randrange(10, 90), rng.randrange(10, 90)
    ones = a % 10 + b % 10
    note, one = (", carry 1", " + 1") if ones > 9 else ("", "")
    steps = f"{a % 10} + {b % 10} = {ones}{note}\n{a // 10} + {b // 10}{one} = {a // 10 + b // 10 + ones // 10}"
    question = rng.choice(("What is {a} + {b}?", "Add {a} and {b}.", "Compute {a} + {b}."))
    return _asked(question.format(a=a, b=b), f"{a} + {b} = {a + b}", reasoning=steps)


def _difference(rng: random.Random) -> list[Message]:
    a, b = sorted((rng.randrange(1, 60), rng.randrange(1, 60)), reverse=True)
    question = rng.choice(("What is {a} - {b}?", "Take {b} from {a}."))
    return _asked(question.format(a=a, b=b), f"{a} - {b} = {a - b}")


def _letters(rng: random.Random) -> list[Message]:
    word = rng.choice(_WORDS)
    question, answer = rng.choice(
        (
            ("Write {w} backwards.", word[::-1]),
            ("Write {w} in capitals.", word.upper()),
            ("How many letters has {w}?", f"{word} has {len(word)} letters."),
            ("What is the first letter of {w}?", f"The first letter of {word} is {word[0]}."),
            ("What is the last letter of {w}?", f"The last letter of {word} is {word[-1]}."),
            ("Spell {w}.", "-".join(word)),
        )
    )
    return _asked(question.format(w=word), answer)


def _order(rng: random.Random) -> list[Message]:
    words = rng.sample(_WORDS, 3)
    question, answer = rng.choice(
        (
            ("Sort these words: {w}", ", ".join(sorted(words))),
            ("Which of these words is the first in a dictionary: {w}?", min(words)),
            ("Join these words with dashes: {w}", "-".join(words)),
        )
    )
    return _asked(question.format(w=", ".join(words)), answer)


def _expression(rng: random.Random) -> list[Message]:
    """A line of Python; what it prints is computed here by the same operation."""
    numbers, word, n = [rng.randrange(1, 10) for _ in range(3)], rng.choice(_WORDS), rng.randrange(2, 5)
    code, value = rng.choice(
        (
            (f"sorted({numbers})", sorted(numbers)),
            (f"max({numbers})", max(numbers)),
            (f"sum({numbers})", sum(numbers)),
            (f"len({word!r})", len(word)),
            (f"{word!r}.upper()", word.upper()),
            (f"{word!r}[:{n}]", word[:n]),
            (f"{word!r}[::-1]", word[::-1]),
            (f"list(range({n}))", list(range(n))),
            (f"{numbers[0]} * {numbers[1]}", numbers[0] * numbers[1]),
        )
    )
    return _asked(f"What does this Python code print?\n\nprint({code})", str(value))


def _function(rng: random.Random) -> list[Message]:
    name, parameters, what, line = rng.choice(_FUNCTIONS)
    name = rng.choice((name, f"get_{name}", f"my_{name}", f"{name}_of", f"do_{name}"))
    question = rng.choice(("Write a Python function `{f}` that {what}.", "Define `{f}` in Python. It {what}."))
    answer = f"```python\ndef {name}({parameters}):\n    {line}\n```"
    return _asked(question.format(f=name, what=what), answer)


def _two_questions(rng: random.Random) -> list[Message]:
    word = rng.choice(_WORDS)
    first = _asked(f"Say {word} {rng.choice(('twice', 'two times'))}.", f"{word} {word}")
    return first + rng.choice((_asked("Now in capitals.", f"{word.upper()} {word.upper()}"), _asked("Now once.", word)))


def _terse(rng: random.Random) -> list[Message]:
    """The system message says how to answer."""
    a, b = rng.randrange(1, 30), rng.randrange(1, 30)
    sentence = f"The sum of {a} and {b} is {a + b}."
    how, answer = rng.choice((("Answer with a number.", str(a + b)), ("Answer in a sentence.", sentence)))
    return [{"role": "system", "content": how}, *_asked(f"{a} plus {b}?", answer)]
