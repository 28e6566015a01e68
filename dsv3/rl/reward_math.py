r"""The reward of a right answer in mathematics: 1.0 or 0.0.

    reward = make_math_reward()
    reward(question, "<think>...</think> so it is $\\boxed{\\frac{1}{2}}$", "0.5")      # 1.0
    reward(question, "<answer>$1,080</answer>", "He pays 3 * 360 = 1080.\n#### 1080")   # 1.0

Plain numbers are compared here, exactly; everything else by math-verify (extra `rl`), in a process with a limit of time, so
that no completion can stop a run or raise: what cannot be read is worth 0.

References:
  Cobbe et al., "Training Verifiers to Solve Math Word Problems" (GSM8K), arXiv:2110.14168: answers behind `####`.
  Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv:2103.03874: answers in \boxed.
  Kydlíček, "Math-Verify", github.com/huggingface/Math-Verify.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from dsv3.checks import check, check_choice
from dsv3.rl.answers import RULES, after_thinking, find_answer
from dsv3.rl.math_process import MathComparer
from dsv3.rl.quantity import Quantity, read_quantity
from dsv3.rl.reward import RewardFn

MAX_ANSWER = 2000  # characters; a longer answer is none
PERCENT, UNITS = ("either", "unit", "value"), ("ignore", "match")

_CLEAN = re.compile(r"\\(?:left|right|displaystyle|,|;|:|!|quad|qquad)(?![A-Za-z])|[\s$]")
_IN_BASE = re.compile(r"(\w+)_\{?(\d+)\}?")
_TEXT = re.compile(r"\\(?:text|mbox|textrm|mathrm|textbf|mathbf)\{([^{}]*)\}")


def make_math_reward(
    *, rules: tuple[str, ...] = ("tag", "boxed", "hash"), percent: str = "either", units: str = "ignore",
    tolerance: float = 0.0, skip_thinking: bool = True, workers: int = 1, cpu_seconds: int = 3,
) -> RewardFn:  # fmt: skip
    """Returns a reward of (prompt, completion, reference): 1.0 where the completion's answer is the reference's, else 0.0.

    Args:
      rules: how an answer is found, in order, see `answers.find_answer`. Looser rules, "phrase", "number", "whole", are
        chosen here.
      percent: what `50%` is beside a number without the sign: "unit": 50; "value": 0.5; "either": both.
      units: "ignore": `5 cm` is 5 and 5 m; "match": where both have a unit, it has to be the same.
      tolerance: largest |answer - reference| / |reference| of plain numbers; 0: exact, so that 0.33 is not 1/3.
      skip_thinking: whether to look behind `</think>` alone; a completion whose thinking does not end has no answer then.
      workers, cpu_seconds: see `MathComparer`.

    Returns:
      The reward. Its reference is a text: the answer, a text with `####` before it (GSM8K) or with a last box around it
      (MATH); or a number. A reference without an answer is a `ValueError`.

    Raises:
      ValueError: a wrong argument; math-verify is not installed.
    """
    known = isinstance(rules, tuple) and rules and set(rules) <= set(RULES)
    check(bool(known), f"make_math_reward: `rules` is {rules!r}, want a tuple of {', '.join(RULES)}")
    check_choice("make_math_reward", "percent", percent, PERCENT)
    check_choice("make_math_reward", "units", units, UNITS)
    check(0 <= tolerance < 1, f"make_math_reward: `tolerance` is {tolerance}, want one in [0, 1)")
    comparer = MathComparer(workers=workers, cpu_seconds=cpu_seconds)

    def math_reward(prompt: str, completion: str, reference: Any) -> float:
        """Returns 1.0 or 0.0; `prompt` is not looked at."""
        want = reference_answer(reference)
        text = after_thinking(completion) if skip_thinking else completion
        answer = find_answer(text, rules) if text is not None else None
        if answer is None or len(answer) > MAX_ANSWER:
            return 0.0
        if (plain := _plain_text(answer)) and plain == _plain_text(want):
            return 1.0
        in_base = _IN_BASE.fullmatch(_plain_text(want)), _IN_BASE.fullmatch(plain)
        if None not in in_base:  # math-verify looks at no base
            return float(in_base[0].groups() == in_base[1].groups())
        numbers = read_quantity(want), read_quantity(answer)
        if None not in numbers:
            return float(_same_quantity(*numbers, percent=percent, units=units, tolerance=tolerance))
        return float(comparer.equal(_bare(want), _bare(answer)))

    return math_reward


def reference_answer(reference: Any) -> str:
    r"""Returns the answer that a dataset's reference holds.

    Args:
      reference: a text, with `####` before its answer or a box around it, or that is the answer; or a number.

    Raises:
      ValueError: there is none.

    >>> reference_answer("6 * 7 = <<6*7=42>>42\n#### 42"), reference_answer(r"Thus \boxed{x^2}."), reference_answer(3)
    ('42', 'x^2', '3')
    """
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    text = isinstance(reference, str)
    check(text, f"math_reward: `reference` is of type {type(reference).__name__}, want a text or a number")
    answer = find_answer(reference, ("hash",) if "####" in reference else ("boxed", "whole"))
    check(bool(answer), f"math_reward: `reference` is {reference[-60:]!r}, want an answer in it")
    return answer


def _same_quantity(want: Quantity, got: Quantity, *, percent: str, units: str, tolerance: float) -> bool:
    """Whether two numbers are the same, by the reward's settings."""
    if units == "match" and want.unit and got.unit and want.unit != got.unit:
        return False
    pairs = [(want.value, got.value)]
    if want.percent != got.percent:
        scaled = tuple(q.value / 100 if q.percent else q.value for q in (want, got))
        pairs = {"unit": pairs, "value": [scaled], "either": [*pairs, scaled]}[percent]
    return any(abs(a - b) <= Fraction(tolerance) * abs(a) for a, b in pairs)


def _bare(text: str) -> str:
    r"""An answer without the dollar signs or `\(` around it, and without a full stop."""
    text = text.strip().rstrip(".")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text


def _plain_text(text: str) -> str:
    """A form in which what is written alike is equal: no blanks, no marks of size or text; words in small letters."""
    text = _TEXT.sub(r"\1", _bare(text))
    text = _CLEAN.sub("", re.sub(r"\\[dt]frac", r"\\frac", text))
    return text.lower() if text.isalpha() and len(text) > 1 else text
