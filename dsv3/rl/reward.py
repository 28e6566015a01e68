"""Rewards: named functions of (prompt, completion, reference), weighted and added up.

    reward = make_reward({"accuracy": (make_math_reward(), 1.0), "format": (make_format_reward(), 0.5)})
    reward(prompt, completion, reference)     # Reward(total=1.5, parts={'accuracy': 1.0, 'format': 1.0})

A part is any function of that form; a weight of 0 has a part measured without being learned.

References:
  DeepSeek-AI, "DeepSeek-R1", arXiv:2501.12948, section 2.2.2: accuracy and format by rules, no neural reward model; section
  2.3.2: language consistency; the parts are summed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dsv3.checks import check

RewardFn = Callable[[str, str, Any], float]


class Reward(NamedTuple):
    """The reward of one completion.

    Args:
      total: Σ weight · part.
      parts: each part by its name, before its weight.
    """

    total: float
    parts: dict[str, float]


def make_reward(parts: Mapping[str, tuple[RewardFn, float]]) -> Callable[[str, str, Any], Reward]:
    """Returns the weighted sum of rewards: total = Σ weight · part.

    Args:
      parts: name → (function of prompt, completion and reference; weight). A weight may be negative, for a penalty, or 0.

    Returns:
      `reward(prompt, completion, reference)`, which gives a `Reward`, and raises a `ValueError` that names the part where
      one is not a finite number. Threads may share it where they may share the parts; all of `dsv3.rl` they may.

    Raises:
      ValueError: no part; a weight that is no finite number; a part that is no function.

    >>> make_reward({"length": (lambda prompt, completion, reference: len(completion), 0.5)})("", "abcd", None)
    Reward(total=2.0, parts={'length': 4.0})
    """
    check(bool(parts), "make_reward: `parts` is empty, want at least one reward")
    settled: dict[str, tuple[RewardFn, float]] = {}
    for name, part in parts.items():
        pair = isinstance(part, tuple) and len(part) == 2
        check(pair, f"make_reward: part {name!r} is of type {type(part).__name__}, want (function, weight)")
        want = "want a function of (prompt, completion, reference)"
        check(callable(part[0]), f"make_reward: part {name!r} has {part[0]!r}, {want}")
        settled[name] = part[0], _number("make_reward", f"weight of {name!r}", part[1])

    def reward(prompt: str, completion: str, reference: Any) -> Reward:
        """The weighted sum for one completion; returns a `Reward`."""
        found = {}
        for name, (function, _) in settled.items():
            found[name] = _number("reward", f"part {name!r}", function(prompt, completion, reference))
        return Reward(math.fsum(weight * found[name] for name, (_, weight) in settled.items()), found)

    return reward


def score_completions(
    reward: Callable[[str, str, Any], Reward], prompts: Sequence[str], completions: Sequence[str], references: Sequence[Any],
    *, workers: int = 1, first_row: int = 0,
) -> list[Reward]:  # fmt: skip
    """Computes the rewards of many completions, in order.

    Args:
      reward: what `make_reward` returns.
      prompts, completions, references: a row each.
      workers: threads. Code and mathematics are judged in processes of their own, so threads are enough to have many at a
        time.
      first_row: the number that the first row has in messages.

    Returns:
      A `Reward` for each row.

    Raises:
      ValueError: lengths that differ; a row whose reward raises one, named by its number.

    >>> double = make_reward({"is": (lambda prompt, completion, reference: completion == reference, 2.0)})
    >>> [found.total for found in score_completions(double, ["", ""], ["a", "b"], ["a", "a"])]
    [2.0, 0.0]
    """
    sizes = [len(prompts), len(completions), len(references)]
    check(len(set(sizes)) == 1, f"score_completions: {sizes} prompts, completions and references, want as many of each")
    check(workers >= 1, f"score_completions: `workers` is {workers}, want at least 1")

    def score(row: int) -> Reward:
        try:
            return reward(prompts[row], completions[row], references[row])
        except ValueError as error:
            raise ValueError(f"score_completions: row {first_row + row}: {error}") from error

    if workers == 1:
        return [score(row) for row in range(sizes[0])]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(score, range(sizes[0])))


def _number(function: str, what: str, value: Any) -> float:
    """A finite number, or a `ValueError`; numbers of NumPy and truth values are numbers."""
    good = isinstance(value, numbers.Real) or type(value).__name__ == "bool"
    check(good, f"{function}: {what} is {value!r:.80} of type {type(value).__name__}, want a number")
    check(math.isfinite(value), f"{function}: {what} is {float(value)}, want a finite number")
    return float(value)
