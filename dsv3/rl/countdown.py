"""Countdown problems that are made here: numbers and a target, to be reached with each number once.

    Make 12 from 4 7 9.          9+7-4

They are a family for reasoning that a small model can learn: an answer is found by trying, and each try can be checked. All
text about them is made from a random key: what a model is pretrained on, a few worked solutions with a checking step for a
cold start, and problems for reinforcement learning. Which problems are held out is decided by their numbers, in any order:
no text that is made for training has a problem of held-out numbers.

References: the numbers round of the television game "Des chiffres et des lettres" and "Countdown"; problems of this kind for
searching in text: Gandhi et al., "Stream of Search", arXiv:2404.03683.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dsv3.checks import check
from dsv3.rl.answers import after_thinking, last_tag
from dsv3.rl.reward import RewardFn

_EXPRESSION = re.compile(r"[0-9]{1,4}(?:[-+*][0-9]{1,4})*")
_TRY = re.compile(r"=([0-9]{1,6}) [0-9]{1,6}\? (yes|no)$", re.MULTILINE)
_STEP = re.compile(r"\b([0-9]{1,4})([-+*])([0-9]{1,4})=([0-9]{1,8})\b")
HELD_OUT = 5  # one set of numbers of so many is held out


class Level(NamedTuple):
    """A kind of problem: so many numbers `count` from 1 to `highest`, joined by some of `signs`, from left to right."""

    count: int
    highest: int
    signs: str


LEVELS = {"pair": Level(2, 9, "+-"), "easy": Level(3, 16, "+-"), "long": Level(4, 9, "+-"), "product": Level(3, 9, "+-*")}


class Countdown(NamedTuple):
    """A problem: `numbers`, each to be used once, and the `target`."""

    numbers: tuple[int, ...]
    target: int


class Try(NamedTuple):
    """An expression, its steps as text, and its value."""

    expression: str
    steps: str
    value: int


def countdown_question(problem: Countdown) -> str:
    """Returns the problem as it is asked.

    >>> countdown_question(Countdown((4, 7, 9), 12))
    'Make 12 from 4 7 9.'
    """
    return f"Make {problem.target} from {' '.join(map(str, problem.numbers))}."


@functools.lru_cache(maxsize=65536)
def countdown_tries(numbers: tuple[int, ...], signs: str) -> tuple[Try, ...]:
    """Returns what can be tried: an expression for each value of signs, in one of its orders, where no step is below 0.

    A product comes before sums, so that from left to right and by precedence an expression is the same.

    >>> [made.steps for made in countdown_tries((2, 5), "+-")]
    ['2+5=7', '5-2=3']
    """
    found: dict[tuple, Try] = {}
    for order in sorted(set(itertools.permutations(numbers))):
        for ops in itertools.product(signs, repeat=len(numbers) - 1):
            made = _compute(order, ops)
            if made is not None:
                factors = 1 + next((i for i, op in enumerate(ops) if op != "*"), len(ops))
                joined = tuple(sorted(order[:factors])), tuple(sorted(zip(ops[factors - 1 :], order[factors:])))
                alone = (), tuple(sorted(zip(("+", *ops), order)))
                found.setdefault(joined if factors > 1 else alone, made)
    return tuple(found.values())


def _compute(order: Sequence[int], ops: Sequence[str]) -> Try | None:
    value, steps = order[0], []
    for i, (op, number) in enumerate(zip(ops, order[1:])):
        new = {"+": value + number, "-": value - number, "*": value * number}[op]
        if new < 0 or op == "*" and i and ops[i - 1] != "*":
            return None
        steps.append(f"{value}{op}{number}={new}")
        value = new
    text = "".join(map(str, itertools.chain(order[:1], *zip(ops, order[1:]))))
    return Try(text, " ".join(steps), value)


def is_held_out(numbers: Sequence[int]) -> bool:
    """Returns whether problems of these numbers are held out, whatever their order and the target."""
    return zlib.crc32(repr(sorted(numbers)).encode()) % HELD_OUT == 0


def countdown_problems(level: str, *, heldout: bool, seed: int = 0) -> list[Countdown]:
    """Returns all problems of a level, in the order of a seed: those to learn from, or those that are held out.

    Args:
      level: a name of `LEVELS`.
      heldout: which.
      seed: of the order of problems and of the numbers in each.

    Raises:
      ValueError: no such level.
    """
    shape, rng, found = _level("countdown_problems", level), random.Random(f"{seed} problems {heldout}"), []
    for numbers in itertools.combinations_with_replacement(range(1, shape.highest + 1), shape.count):
        if is_held_out(numbers) == heldout:
            for target in sorted({made.value for made in countdown_tries(numbers, shape.signs)}):
                found.append(Countdown(tuple(rng.sample(numbers, shape.count)), target))
    rng.shuffle(found)
    return found


def _level(function: str, name: str) -> Level:
    check(name in LEVELS, f"{function}: `level` is {name!r}, want one of {', '.join(LEVELS)}")
    return LEVELS[name]


def worked_solution(problem: Countdown, level: str, rng: random.Random, *, most: int = 6) -> tuple[str, str] | None:
    """Returns the thinking and the answer of one way to a solution: tries in random order, each checked, until one is right.

    A check says the target again: a small model compares two numbers that stand side by side much sooner than distant ones.

    Args:
      problem: a problem of the level.
      level: a name of `LEVELS`.
      rng: decides the order of tries.
      most: tries of a solution that is returned.

    Returns:
      Lines such as `4+7=11 11-9=2 12? no`, and the right expression; `None` if it took more tries.
    """
    tries = list(countdown_tries(tuple(sorted(problem.numbers)), _level("worked_solution", level).signs))
    rng.shuffle(tries)
    for i, made in enumerate(tries[:most]):
        if made.value == problem.target:
            return thought(tries[: i + 1], problem.target), made.expression
    return None


def thought(tries: Sequence[Try], target: int) -> str:
    """Returns tries with their checks as lines of thinking."""
    return "\n".join(f"{made.steps} {target}? {'yes' if made.value == target else 'no'}" for made in tries)


def countdown_conversation(question: str, thinking: str, answer: str) -> dict[str, Any]:
    """Returns a row for supervised fine-tuning, with the answer in its tags."""
    said = f"<think>\n{thinking}\n</think>\n<answer>{answer}</answer>"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]}


def countdown_texts(level: str, *, seed: int = 0) -> Iterator[str]:
    """Returns documents without end to pretrain on: conversations in which people think for a while and answer, right or
    not; answers without thinking; expressions of given numbers; sums.

    The thinking is tries in random order and ends after each with probability 1/2, whether or not one was right; the answer
    is the last one. So checks are right, and conclusions need not be. No problem of held-out numbers is among the
    documents; sums of two numbers are of all.

    Args:
      level: a name of `LEVELS`.
      seed: of everything.

    Raises:
      ValueError: no such level.
    """
    shape, rng = _level("countdown_texts", level), random.Random(f"{seed} texts")

    def made() -> tuple[tuple[int, ...], list[Try]]:
        """Numbers to learn from, in some order, and what can be tried, in another one."""
        while True:
            numbers = tuple(rng.randint(1, shape.highest) for _ in range(shape.count))
            if not is_held_out(numbers):
                tries = countdown_tries(tuple(sorted(numbers)), shape.signs)
                return numbers, rng.sample(tries, len(tries))

    def conversation() -> str:
        numbers, tries = made()
        target, said = rng.choice(tries).value, tries[:1]
        while len(said) < len(tries) and rng.random() < 0.5:
            said = tries[: len(said) + 1]
        question = countdown_question(Countdown(numbers, target))
        thinking = thought(said, target)
        return f"User: {question}\nAssistant: <think>\n{thinking}\n</think>\n<answer>{said[-1].expression}</answer>"

    def answers() -> str:
        lines = []
        for _ in range(4):
            numbers, tries = made()
            lines.append(f"{countdown_question(Countdown(numbers, rng.choice(tries).value))} {tries[0].expression}")
        return "\n".join(lines)

    def expressions() -> str:
        found = [made() for _ in range(5)]
        return "\n".join(f"From {' '.join(map(str, numbers))}: {tries[0].expression}" for numbers, tries in found)

    def sums() -> str:
        return "\n".join(rng.choice(made()[1][0].steps.split()) for _ in range(8))

    kinds, weights = (conversation, answers, expressions, sums), (8, 1, 1, 1)
    while True:
        yield rng.choices(kinds, weights)[0]()


def make_countdown_reward() -> RewardFn:
    """Returns a reward of (prompt, completion, reference): 1.0 where the answer in `<answer>` is right, else 0.0.

    It is an expression of the reference's numbers, each once, joined by `+`, `-` and `*`, with the target as its value. The
    reference is a `Countdown` or a mapping with `numbers` and `target`; anything else is a ValueError.

    >>> make_countdown_reward()("", "<answer>9+7-4</answer>", Countdown((4, 7, 9), 12))
    1.0
    """

    def countdown_reward(prompt: str, completion: str, reference: Any) -> float:
        """Returns whether the answer is right."""
        problem = _problem(reference)
        rest = after_thinking(completion)
        answer = None if rest is None else last_tag(rest)
        return float(answer is not None and expression_value(answer, problem.numbers) == problem.target)

    return countdown_reward


def expression_value(text: str, numbers: Sequence[int]) -> int | None:
    """Returns the value of an expression that has each of the numbers once, and nothing else; `None` if it is none.

    >>> expression_value("9+7-4", (4, 7, 9)), expression_value("9+7", (4, 7, 9))
    (12, None)
    """
    text = re.sub(r"\s*([-+*])\s*", r"\1", text.strip())
    if not _EXPRESSION.fullmatch(text) or sorted(map(int, re.findall(r"\d+", text))) != sorted(numbers):
        return None
    value = 0
    for sign, product in re.findall(r"(^|[-+])([\d*]+)", text):
        value += (-1 if sign == "-" else 1) * math.prod(map(int, product.split("*")))
    return value


class TryCounts(NamedTuple):
    """What a completion's thinking has.

    Args:
      tries: lines that end in `yes` or `no`.
      rejected: those that end in `no`.
      misjudged: those whose last value is the target and that say `no`, or the reverse.
      steps: computations of two numbers. wrong_steps: those whose result is wrong.
    """

    tries: int
    rejected: int
    misjudged: int
    steps: int
    wrong_steps: int


def count_tries(completion: str, reference: Any) -> TryCounts:
    """Counts a completion's tries: whether it checks itself, and how well.

    >>> count_tries("<think>\\n4+7=11 11-9=2 12? no\\n9+7=15 15-4=11 12? yes\\n</think>", Countdown((4, 7, 9), 12))
    TryCounts(tries=2, rejected=1, misjudged=1, steps=4, wrong_steps=1)
    """
    target = _problem(reference).target
    lines = _TRY.findall(completion)
    rejected = sum(said == "no" for _, said in lines)
    misjudged = sum((int(value) == target) != (said == "yes") for value, said in lines)
    steps = _STEP.findall(completion)
    wrong = sum(expression_value(f"{a}{op}{b}", (int(a), int(b))) != int(c) for a, op, b, c in steps)
    return TryCounts(len(lines), rejected, misjudged, len(steps), wrong)


def _problem(reference: Any) -> Countdown:
    if isinstance(reference, Countdown):
        return reference
    want = "want a mapping with `numbers` and `target`"
    good = isinstance(reference, Mapping) and {"numbers", "target"} <= set(reference)
    check(good, f"countdown: the reference is {reference!r:.80}, {want}")
    numbers, target = reference["numbers"], reference["target"]
    good = isinstance(numbers, (list, tuple)) and all(type(number) is int for number in (*numbers, target))
    check(good, f"countdown: the reference is {reference!r:.80}, {want} of whole numbers")
    return Countdown(tuple(numbers), target)
