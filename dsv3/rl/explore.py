"""One exploration: which problems, their samples, the rewards of these, and which groups are worth a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dsv3.checks import check
from dsv3.rl.advantage import saturated_groups
from dsv3.rl.reward import Reward, score_completions
from dsv3.rl.rollout import Prompt, Rollouts, join_rollouts, take_rollouts
from dsv3.rl.settings import GrpoSettings
from dsv3.typing import Tree

RewardOf = Callable[[str, str, Any], Reward]
"""`reward(prompt, answer, reference)`, as `dsv3.rl.reward.make_reward` makes them."""


class Task(NamedTuple):
    """A problem as the loop needs it.

    Attributes:
      ids, turns: see `Prompt`.
      text, reference: what the reward gets beside the answer.
      opening: what the prompt has already said of the answer, as `<think>`: the reward gets it before what was drawn.
      name: what messages call it, such as file and line; without one its number.
    """

    ids: Sequence[int]
    text: str = ""
    reference: Any = None
    turns: Sequence[Sequence[int]] = ()
    opening: str = ""
    name: str = ""

    def prompt(self, number: int) -> Prompt:
        """Returns what is asked, as problem `number`."""
        return Prompt(self.ids, number, self.turns, self.name)


class Worker(Protocol):
    """Who produces rollouts: this process (`LocalWorker`) or others (`dsv3.rl.workers`)."""

    def update(self, params: Tree, router: Tree) -> None:
        """Takes the model's parameters, of which nothing else holds on to the memory."""

    def rollout(self, prompts: Sequence[Prompt], **how: Any) -> Rollouts:
        """Draws samples, as `dsv3.rl.rollout.rollout` does; `how` are its keyword arguments."""


class Graded(NamedTuple):
    """Rewards: `total` `[N]` float64, and `parts`, each `[N]`, by name."""

    total: np.ndarray
    parts: dict[str, np.ndarray]


class Explored(NamedTuple):
    """B groups of G samples to learn from.

    Attributes:
      rollouts: N = B·G rows. graded: their rewards.
      drawn: problems that were drawn. saturated: those of them whose samples all got the same reward. filled: those that
        were kept nevertheless.
      position: how many problems the run has drawn after this.
    """

    rollouts: Rollouts
    graded: Graded
    drawn: int
    saturated: int
    filled: int
    position: int


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def task_number(position: int, count: int, seed: int) -> int:
    """Returns which of `count` problems comes at a place in the order of a run: each epoch has all, in an order of its own.

    >>> sorted(task_number(place, 4, seed=1) for place in range(4, 8))
    [0, 1, 2, 3]
    """
    return int(_order(seed, position // count, count)[position % count])


def explore(
    worker: Worker,
    tasks: Sequence[Task],
    reward: RewardOf,
    *,
    settings: GrpoSettings,
    step: int,
    position: int = 0,
    threads: int = 1,
) -> Explored:
    """Draws problems and samples and grades them, until there are enough groups.

    The result follows from the arguments and the worker's parameters alone.

    Args:
      worker: see `Worker`.
      tasks: all problems; they are numbered through.
      reward: see `RewardOf`.
      settings: of the run.
      step: number of the exploration. position: how many problems the run has drawn before.
      threads: for rewards that wait for processes of their own; with more than one they must allow it.

    Returns:
      `Explored`.

    Raises:
      ValueError: fewer tasks than an exploration wants, a reward that is not a finite number, as `rollout`.
    """
    check(
        len(tasks) >= settings.prompts,
        f"explore: {len(tasks)} problems are fewer than an exploration's, which are {settings.prompts}",
    )
    kept: list[tuple[Rollouts, Graded]] = []
    left: list[tuple[Rollouts, Graded]] = []
    seen: set[int] = set()
    for _ in range(settings.max_draws):
        asked, position = _next_numbers(seen, settings.prompts - len(kept), position, len(tasks), settings.seed)
        if not asked:
            break
        rollouts = worker.rollout([tasks[i].prompt(i) for i in asked], **sampling_of(settings, step))
        graded = grade(rollouts, tasks, reward, threads=threads)
        dull = saturated_groups(graded.total.reshape(len(asked), -1)).numpy()
        if not settings.skip_saturated:
            return Explored(rollouts, graded, len(seen), int(dull.sum()), int(dull.sum()), position)
        for group, same in enumerate(dull):
            rows = range(group * settings.group_size, (group + 1) * settings.group_size)
            (left if same else kept).append((take_rollouts(rollouts, rows), _rows(graded, rows)))
        if len(kept) == settings.prompts:
            break
    missing = settings.prompts - len(kept)
    groups = kept + left[:missing]
    return Explored(
        join_rollouts([group for group, _ in groups]), _joined([graded for _, graded in groups]), len(seen), len(left),
        missing, position,
    )  # fmt: skip


def sampling_of(settings: GrpoSettings, step: int) -> dict[str, Any]:
    """Returns the arguments of `rollout` in an exploration."""
    names = ("group_size", "max_new_tokens", "temperature", "stop_tokens", "stop", "bucket", "seed")
    return {name: getattr(settings, name) for name in names} | {"step": step}


def _next_numbers(seen: set[int], wanted: int, position: int, count: int, seed: int) -> tuple[list[int], int]:
    """The next problems that this exploration has not had, which it notes; and how many the run has then drawn."""
    asked: list[int] = []
    while len(asked) < wanted and len(seen) < count:
        number = task_number(position, count, seed)
        position += 1
        if number not in seen:
            seen.add(number)
            asked.append(number)
    return asked, position


def grade(rollouts: Rollouts, tasks: Sequence[Task], reward: RewardOf, *, threads: int = 1) -> Graded:
    """Computes the rewards of samples.

    Args:
      rollouts: see there; `numbers` are those of the tasks.
      tasks, reward, threads: as of `explore`.

    Raises:
      ValueError: as `grade_answers`.
    """
    numbers, samples = rollouts.numbers.tolist(), rollouts.samples.tolist()
    answers = [rollouts.answer(row) for row in range(len(numbers))]
    found = grade_answers(tasks, numbers, samples, answers, reward, threads=threads)
    names = list(found[0].parts)
    return Graded(np.array([total for total, _ in found]), {n: np.array([r.parts[n] for r in found]) for n in names})


def grade_answers(
    tasks: Sequence[Task], numbers: Sequence[int], samples: Sequence[int], answers: Sequence[str], reward: RewardOf, *,
    threads: int = 1,
) -> list[Reward]:  # fmt: skip
    """Computes the rewards of answers, each with what its prompt has already said of it.

    Args:
      tasks, reward, threads: as of `explore`.
      numbers, samples: of each answer which of the tasks it is to, and which of the samples to that it is.
      answers: as they were drawn.

    Raises:
      ValueError: a reward that is not a finite number, by problem, sample and part; parts that are not always the same.
    """

    def named(prompt: str, answer: str, row: int) -> Reward:
        task, number = tasks[numbers[row]], numbers[row]
        where = f"the reward of {task.name or f'problem {number}'}, sample {samples[row]}"
        try:
            found = reward(prompt, answer, task.reference)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        check(isinstance(found, Reward), f"{where} is of type {type(found).__name__}, want a Reward, as of make_reward")
        check(math.isfinite(found.total), f"{where} is {found.total}, want a finite number")
        return found

    asked, rows = [tasks[number].text for number in numbers], range(len(numbers))
    said = [tasks[number].opening + answer for number, answer in zip(numbers, answers)]
    found = score_completions(named, asked, said, rows, workers=threads)
    names = list(found[0].parts)
    for row, (_, parts) in zip(rows, found):
        check(list(parts) == names, f"grade: sample {row} has the parts {list(parts)}, but the first has {names}")
    return found


def _rows(graded: Graded, rows: Sequence[int]) -> Graded:
    index = list(rows)
    return Graded(graded.total[index], {name: values[index] for name, values in graded.parts.items()})


def _joined(parts: Sequence[Graded]) -> Graded:
    names = parts[0].parts
    return Graded(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([part.parts[name] for part in parts]) for name in names},
    )


def evaluate(
    worker: Worker, tasks: Sequence[Task], reward: RewardOf, *, settings: GrpoSettings, threads: int = 1
) -> dict[str, Any]:
    """Measures a policy on problems, with the best token each time.

    Args:
      worker: see `Worker`; it has the policy.
      tasks, reward, threads: as of `explore`.
      settings: of the run; its answers may be as long.

    Returns:
      `problems`, how many; `accuracy`, the share whose first part, or whose reward if it has no parts, is at least 1; the
      means of `reward` and of each of the `parts`; of `length`, tokens of an answer; `truncated`, the share without an end.
    """
    names = ("max_new_tokens", "stop_tokens", "stop", "bucket")
    how = {name: getattr(settings, name) for name in names} | {"group_size": 1, "temperature": 0.0}
    rollouts = worker.rollout([task.prompt(i) for i, task in enumerate(tasks)], **how)
    graded = grade(rollouts, tasks, reward, threads=threads)
    parts = {name: float(values.mean()) for name, values in graded.parts.items()}
    first, total = next(iter(graded.parts.values()), graded.total), float(graded.total.mean())
    return {
        "problems": len(tasks), "accuracy": float((first >= 1).mean()), "reward": total, "parts": parts,
        "length": float(rollouts.lengths.mean()), "truncated": float(rollouts.truncated.mean()),
    }  # fmt: skip
