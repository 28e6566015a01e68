"""The weighted sum, what it refuses, and many completions at a time."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from dsv3.rl.reward import Reward, make_reward, score_completions


def constant(value):
    return lambda prompt, completion, reference: value


def test_weighted_sum_over_named_parts():
    seen = []
    reward = make_reward({
        "a": (lambda *arguments: seen.append(arguments) or 0.25, 2.0), "b": (constant(1), -0.5), "seen": (constant(True), 0),
    })  # fmt: skip
    assert reward("p", "c", {"r": 1}) == Reward(2.0 * 0.25 - 0.5, {"a": 0.25, "b": 1.0, "seen": 1.0})
    assert seen == [("p", "c", {"r": 1})]
    assert [type(value) for value in reward("", "", None).parts.values()] == [float] * 3


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), 0.5, np.int64(1), np.bool_(True)])
def test_numbers_of_numpy_are_numbers(value):
    total = make_reward({"a": (constant(value), 1.0)})("", "", None).total
    assert type(total) is float and total == float(value)


@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), "reward: part 'format' is nan, want a finite number"),
        (np.float32("nan"), "part 'format' is nan"),
        (float("-inf"), "part 'format' is -inf, want a finite number"),
        (None, "part 'format' is None of type NoneType, want a number"),
        ("1.0", "part 'format' is '1.0' of type str, want a number"),
        (1j, "part 'format' is 1j of type complex, want a number"),
        (np.array([1.0]), "part 'format' is array"),
    ],
)
def test_what_is_no_number_is_refused_by_name(value, message):
    reward = make_reward({"accuracy": (constant(1.0), 1.0), "format": (constant(value), 0.0)})
    with pytest.raises(ValueError, match=message) as error:
        reward("", "", None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({}, "make_reward: `parts` is empty"),
        ({"a": constant(1)}, "make_reward: part 'a' is of type function, want \\(function, weight\\)"),
        ({"a": (1.0, constant(1))}, "make_reward: part 'a' has 1.0, want a function"),
        ({"a": (constant(1), float("nan"))}, "make_reward: weight of 'a' is nan, want a finite number"),
        ({"a": (constant(1), "1")}, "make_reward: weight of 'a' is '1' of type str"),
    ],
)
def test_bad_parts(parts, message):
    with pytest.raises(ValueError, match=message):
        make_reward(parts)


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_in_order_and_rows_are_named(workers):
    reward = make_reward({"is": (lambda prompt, completion, reference: float(completion) - reference, 2.0)})
    found = score_completions(reward, [""] * 9, [str(i) for i in range(9)], [1] * 9, workers=workers)
    assert [row.total for row in found] == [2.0 * (i - 1) for i in range(9)]
    with pytest.raises(ValueError, match="score_completions: row 102: reward: part 'is' is nan, want a finite number"):
        score_completions(reward, [""] * 4, ["1", "2", "nan", "3"], [1] * 4, workers=workers, first_row=100)
    assert score_completions(reward, [], [], [], workers=workers) == []


def test_workers_work_side_by_side():
    barrier = threading.Barrier(3, timeout=30)
    reward = make_reward({"meets": (lambda *_: float(barrier.wait() >= 0), 1.0)})
    assert len(score_completions(reward, [""] * 3, [""] * 3, [None] * 3, workers=3)) == 3


def test_bad_rows():
    reward = make_reward({"a": (constant(1), 1.0)})
    with pytest.raises(ValueError, match=r"score_completions: \[1, 2, 1\] prompts, completions and references, want"):
        score_completions(reward, [""], ["", ""], [None])
    with pytest.raises(ValueError, match="score_completions: `workers` is 0, want at least 1"):
        score_completions(reward, [""], [""], [None], workers=0)


def test_rewards_load_no_tensorflow():
    """Processes that score start in a moment; what mathematics needs is loaded in its own process."""
    names = "answers problems quantity reward reward_code reward_math reward_text sandbox".split()
    code = f"import sys\nfor name in {names}:\n    __import__('dsv3.rl.' + name)\n"
    code += "print([name for name in ('tensorflow', 'sympy', 'math_verify', 'py3langid') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
