"""Countdown problems: every try is arithmetic, held-out numbers stay out of all text, answers are judged by value."""

import ast
import collections
import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.rl.countdown import (
    HELD_OUT,
    LEVELS,
    count_tries,
    countdown_conversation,
    countdown_problems,
    countdown_question,
    countdown_texts,
    countdown_tries,
    expression_value,
    is_held_out,
    make_countdown_reward,
    worked_solution,
)


def value_of(text):
    """Python's own value of an expression."""
    return eval(compile(ast.parse(text, mode="eval"), "", "eval"), {"__builtins__": {}})


@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.sampled_from(["+-", "+-*"]))
def test_tries_are_arithmetic(numbers, signs):
    found = countdown_tries(tuple(sorted(numbers)), signs)
    assert len({made.expression for made in found}) == len(found) > 0
    for made in found:
        assert value_of(made.expression) == made.value == expression_value(made.expression, numbers) >= 0
        steps = made.steps.split()
        assert len(steps) == len(numbers) - 1 and steps[-1].endswith(f"={made.value}")
        assert all(value_of(step.replace("=", "==")) for step in steps)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_every_value_that_can_be_reached_is_among_the_tries(numbers):
    """All orders and signs by Python, left to right without a step below 0, products first."""
    want = set()
    for order in itertools.permutations(numbers):
        for ops in itertools.product("+-*", repeat=2):
            first = value_of(f"{order[0]}{ops[0]}{order[1]}")
            whole = value_of(f"{order[0]}{ops[0]}{order[1]}{ops[1]}{order[2]}")
            if first >= 0 and whole >= 0 and (ops[1] != "*" or ops[0] == "*"):
                want.add(whole)
    assert {made.value for made in countdown_tries(tuple(sorted(numbers)), "+-*")} == want


@pytest.mark.parametrize("level", LEVELS)
def test_problems_to_learn_from_and_held_out_ones_have_no_numbers_in_common(level):
    sides = [countdown_problems(level, heldout=heldout) for heldout in (False, True)]
    numbers = [{tuple(sorted(problem.numbers)) for problem in side} for side in sides]
    assert not numbers[0] & numbers[1] and all(map(is_held_out, numbers[1]))
    shape = LEVELS[level]
    every = set(itertools.combinations_with_replacement(range(1, shape.highest + 1), shape.count))
    assert numbers[0] | numbers[1] == every
    assert 0.5 / HELD_OUT < len(numbers[1]) / len(every) < 2 / HELD_OUT
    for side in sides:
        assert len(set(side)) == len(side)
        for problem in side[:50]:
            assert any(made.value == problem.target for made in countdown_tries(tuple(sorted(problem.numbers)), shape.signs))
    again = countdown_problems(level, heldout=False, seed=1)
    assert again != sides[0] and sorted(p.target for p in again) == sorted(p.target for p in sides[0])


@pytest.mark.parametrize("level", LEVELS)
def test_no_text_has_a_problem_of_held_out_numbers(level):
    texts = list(itertools.islice(countdown_texts(level, seed=3), 400))
    assert texts == list(itertools.islice(countdown_texts(level, seed=3), 400)) != texts[::-1]
    asked = [tuple(map(int, found.split())) for text in texts for found in re.findall(r"Make \d+ from ([\d ]+)\.", text)]
    assert len(asked) > 400 and not any(map(is_held_out, asked))
    given = [tuple(map(int, found.split())) for text in texts for found in re.findall(r"From ([\d ]+):", text)]
    assert len(given) > 100 and not any(map(is_held_out, given))
    steps = [step for text in texts for step in re.findall(r"\b\d+[-+*]\d+=\d+\b", text)]
    assert len(steps) > 700 and all(value_of(step.replace("=", "==")) for step in steps), "sums are right"
    answers = re.findall(r"Make (\d+) from [\d ]+\. (\S+)$", "\n".join(texts), re.MULTILINE)
    right = sum(value_of(answer) == int(target) for target, answer in answers)
    assert 0.05 < right / len(answers) < 0.6, "answers are what comes to mind first"
    talks = [text for text in texts if "<think>" in text]
    problems = [re.search(r"Make (\d+) from ([\d ]+)\.", text).groups() for text in talks]
    references = [{"target": int(target), "numbers": list(map(int, numbers.split()))} for target, numbers in problems]
    counts = [count_tries(text, reference) for text, reference in zip(talks, references)]
    assert {1, 2} <= {count.tries for count in counts} and not any(count.misjudged for count in counts)
    rewards = [make_countdown_reward()("", text.partition("Assistant: ")[2], each) for text, each in zip(talks, references)]
    assert len(talks) > 200 and 0.05 < sum(rewards) / len(talks) < 0.6, "nor need those be right that were thought over"


@pytest.mark.parametrize("level", LEVELS)
def test_worked_solutions_end_with_a_try_that_is_right(level):
    rng, reward, lengths = random.Random(0), make_countdown_reward(), collections.Counter()
    for problem in countdown_problems(level, heldout=False)[:200]:
        solution = worked_solution(problem, level, rng, most=3)
        if solution is None:
            lengths[None] += 1
            continue
        row = countdown_conversation(countdown_question(problem), *solution)
        assert reward("", row["messages"][1]["content"], problem) == 1
        counts = count_tries(row["messages"][1]["content"], problem)
        assert counts.rejected == counts.tries - 1 and counts.misjudged == counts.wrong_steps == 0
        lengths[counts.tries] += 1
    assert set(lengths) == ({1, 2} if level == "pair" else {None, 1, 2, 3})


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        ("<think>x</think><answer>9+7-4</answer>", 1), ("<answer> 7 + 9 - 4 </answer>", 1), ("<answer>9+7-4=12</answer>", 0),
        ("<answer>9+7-4", 0), ("9+7-4", 0), ("<answer>12</answer>", 0), ("<answer>9+7-4+4-4</answer>", 0),
        ("<answer>9-4+7</answer> <answer>1</answer>", 0), ("<answer>97-4</answer>", 0), ("<answer>(9+7)-4</answer>", 0),
        ("<answer>9++7-4</answer>", 0), ("<answer>-4+9+7</answer>", 0), ("<think><answer>9+7-4</answer>", 0),
        ("<answer>" + "9" * 5000 + "</answer>", 0), ("<answer>９+７-４</answer>", 0),
    ],
)  # fmt: skip
def test_answers(completion, want):
    assert make_countdown_reward()("", completion, {"numbers": [4, 7, 9], "target": 12}) == want


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.data())
def test_values_are_those_of_python(numbers, data):
    text = "".join(f"{n}{data.draw(st.sampled_from('+-*'))}" for n in numbers)[:-1]
    assert expression_value(text, numbers) == value_of(text)
    assert expression_value(text, [*numbers, 1]) is None


def test_blanks_do_not_make_one_number_of_two():
    assert expression_value("1 2+3", (12, 3)) is None and expression_value(" 12\n+ 3", (12, 3)) == 15


def test_what_is_no_reference():
    for reference in (12, {"numbers": [1, 2]}, {"numbers": ["1", 2], "target": 3}, {"numbers": 3, "target": 3}):
        with pytest.raises(ValueError, match="countdown: the reference is .*want a mapping with `numbers` and `target`"):
            make_countdown_reward()("", "<answer>1+2</answer>", reference)
    for call in (countdown_problems, lambda level, heldout: next(countdown_texts(level))):
        with pytest.raises(ValueError, match="`level` is 'hard', want one of pair, easy, long, product"):
            call("hard", heldout=True)
