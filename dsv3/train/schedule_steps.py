"""The steps of a schedule, counted by integer arithmetic: how many, of which shape, and where in the tokens each begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dsv3.checks import check
from dsv3.train.schedule import TrainSchedule, batch_run


class Run(NamedTuple):
    """Neighbouring steps of one shape.

    Attributes:
      stage: index into the schedule's stages.
      step, tokens: of its first step: steps done and tokens seen before it.
      steps: how many. batch_size, seq_len: shape of each.
    """

    stage: int
    step: int
    tokens: int
    steps: int
    batch_size: int
    seq_len: int

    @property
    def step_tokens(self) -> int:
        """Tokens of each step."""
        return self.batch_size * self.seq_len

    @property
    def end(self) -> int:
        """Tokens seen after its last step."""
        return self.tokens + self.steps * self.step_tokens


class StageSteps(NamedTuple):
    """A stage in whole steps.

    Attributes:
      name: of the stage. seq_len: tokens of its sequences.
      first: steps done before it. steps: of the stage.
      start: tokens seen before it. tokens: that its steps read. The last step of a stage goes on past its end, by less than
        a step; the next stage begins there.
      batch_sizes: the different ones, in the order in which they come. A compiled step is made anew for each.
    """

    name: str
    seq_len: int
    first: int
    steps: int
    start: int
    tokens: int
    batch_sizes: tuple[int, ...]


class StepStart(NamedTuple):
    """A step: how many were done and how many tokens were seen before it."""

    step: int
    tokens: int


def schedule_runs(schedule: TrainSchedule) -> Iterator[Run]:
    """Yields all steps of a schedule in runs of one shape, in their order.

    Args:
      schedule: the schedule.

    Raises:
      ValueError: a stage in which no step begins.
    """
    step = tokens = 0
    for index, stage in enumerate(schedule.stages):
        check(
            tokens < stage.until,
            f"schedule_runs: stage {stage.name!r} has no step: the step before it ends at {tokens:,} tokens, it at "
            f"{stage.until:,}; want a longer stage or smaller batches",
        )
        while tokens < stage.until:
            size, change = batch_run(schedule, tokens)
            until = int(stage.until) if change is None else min(change, int(stage.until))
            run = Run(index, step, tokens, -(-(until - tokens) // (size * stage.seq_len)), size, stage.seq_len)
            yield run
            step, tokens = step + run.steps, run.end


def schedule_steps(schedule: TrainSchedule) -> tuple[StageSteps, ...]:
    """Returns how many steps and tokens each stage has, exactly.

    Args:
      schedule: the schedule.

    Raises:
      ValueError: a stage in which no step begins.
    """
    runs: list[list[Run]] = [[] for _ in schedule.stages]
    for run in schedule_runs(schedule):
        runs[run.stage].append(run)
    found = []
    for stage, of_stage in zip(schedule.stages, runs):
        first, last = of_stage[0], of_stage[-1]
        steps, sizes = last.step + last.steps - first.step, tuple(dict.fromkeys(run.batch_size for run in of_stage))
        found.append(
            StageSteps(stage.name, stage.seq_len, first.step, steps, first.tokens, last.end - first.tokens, sizes)
        )
    return tuple(found)


def tokens_at_step(schedule: TrainSchedule, step: int) -> int:
    """Returns the tokens that were seen when `step` steps of `schedule` are done.

    Raises:
      ValueError: the schedule has fewer steps.
    """
    check(step >= 0, f"tokens_at_step: `step` is {step}, want at least 0")
    for run in schedule_runs(schedule):
        if step <= run.step + run.steps:
            return run.tokens + (step - run.step) * run.step_tokens
    raise ValueError(f"tokens_at_step: `step` is {step}, want at most {run.step + run.steps}, the steps of the schedule")


def step_from(schedule: TrainSchedule, tokens: int) -> StepStart:
    """Returns the first step of `schedule` that begins at `tokens` or later; after the last one, where it ends."""
    check(tokens >= 0, f"step_from: `tokens` is {tokens}, want at least 0")
    return run_step_from(schedule_runs(schedule), tokens)


def run_step_from(runs: Iterable[Run], tokens: int) -> StepStart:
    """`step_from` of the `runs` of a schedule, for many values of `tokens`."""
    for run in runs:
        if tokens < run.end:
            ahead = max(0, -(-(tokens - run.tokens) // run.step_tokens))
            return StepStart(run.step + ahead, run.tokens + ahead * run.step_tokens)
    return StepStart(run.step + run.steps, run.end)
