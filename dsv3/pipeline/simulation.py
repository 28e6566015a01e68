"""When each entry of a schedule runs, given how long tasks and messages take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3.checks import check
from dsv3.pipeline.table import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Order,
    Schedule,
    Slot,
    Task,
    row_activations,
    schedule_order,
    slot_needs,
    task_gives,
)

PerStage = float | Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Times:
    """How long tasks take, in any unit; a number for all stages, or one for each stage of the schedule.

    forward: F. backward: B, the full backward, input and weights together.
    weight: W, the weights' part, at most B; the input's part takes B − W.
    overlapped: F&B, a forward and a full backward that overlap; a number, or a matrix by (stage of the forward, stage of the
      backward). Default: F + B, no gain. If the pair's backward is split, W is taken off.
    send: from the end of a task to where another rank may use its result. It keeps no rank busy.
    """

    forward: PerStage
    backward: PerStage
    weight: PerStage
    overlapped: PerStage | None = None
    send: float = 0.0


class Simulation(NamedTuple):
    """A schedule in time.

    start, end: for each rank the times of its entries. makespan: when the last one ends.
    busy, idle: for each rank, `[ranks]`; together the makespan.
    peak_activations: for each rank the most that it holds at once, `[ranks]`, in activations of one stage for one
      micro-batch, from the start of the forward to the end of the backward, its weights' part included. It depends on the
      rows' order only.
    """

    schedule: Schedule
    start: tuple[np.ndarray, ...]
    end: tuple[np.ndarray, ...]
    makespan: float
    busy: np.ndarray
    idle: np.ndarray
    peak_activations: np.ndarray

    @property
    def bubble(self) -> float:
        """The largest idle time of a rank."""
        return float(self.idle.max())

    @property
    def bubble_fraction(self) -> float:
        """The part of all ranks' time that is idle."""
        return float(self.idle.mean() / self.makespan) if self.makespan else 0.0


def simulate(schedule: Schedule, times: Times) -> Simulation:
    """Lets every rank follow its row: an entry starts once the rank is free and all inputs have come.

    Args:
      schedule: a table that `schedule_check` passes.
      times: of its tasks.

    Returns:
      A `Simulation`.

    Raises:
      ValueError: a time is negative, of a wrong shape, or W is longer than B; or the rows block each other.

    >>> from dsv3.pipeline import Times, one_f_one_b, simulate
    >>> simulate(one_f_one_b(4, 8), Times(forward=1, backward=2, weight=1)).bubble
    9.0
    """
    durations = _durations("simulate", schedule, times)
    order = schedule_order(schedule)
    check_finished("simulate", schedule, order)
    start = tuple(np.zeros(len(row)) for row in schedule.rows)
    end = tuple(np.zeros(len(row)) for row in schedule.rows)
    free, busy = [0.0] * schedule.ranks, [0.0] * schedule.ranks
    there: dict[Task, tuple[float, int]] = {}  # result → when it is there, and on which rank
    for rank, i in order.steps:
        slot = schedule.rows[rank][i]
        begin = free[rank]
        for need in slot_needs(slot, schedule.stages):
            when, where = there[need]
            begin = max(begin, when if where == rank else when + times.send)
        duration = durations(slot)
        start[rank][i], end[rank][i] = begin, begin + duration
        free[rank], busy[rank] = begin + duration, busy[rank] + duration
        for task in slot:
            there[task_gives(task)] = (begin + duration, rank)
    makespan = max(free)
    peaks = peak_activations(schedule)
    return Simulation(schedule, start, end, makespan, np.array(busy), makespan - np.array(busy), peaks)


def peak_activations(schedule: Schedule, sizes: PerStage | None = None) -> np.ndarray:
    """Returns the most activations that each rank holds at once, `[ranks]`.

    They are held from the start of a forward to the end of its backward, of its weights' part if it is split.

    Args:
      schedule: any table.
      sizes: of one micro-batch's activations, a number or one for each stage, such as bytes. Default: they are counted.

    Returns:
      The largest sum on each rank; without `sizes` the number of (stage, micro-batch) pairs.

    Raises:
      ValueError: `sizes` has another number of stages.
    """
    by_stage = [1] * schedule.stages
    if sizes is not None:
        by_stage = stage_values("peak_activations", "sizes", sizes, (schedule.stages,)).tolist()
    peaks = [max(row_activations(row, lambda task: by_stage[task.stage]), default=0) for row in schedule.rows]
    return np.array(peaks)


def check_finished(function: str, schedule: Schedule, order: Order) -> None:
    """Raises `ValueError` in the name of `function` if an `order` of the schedule is stuck, with what a rank waits for."""
    for rank, (i, need) in sorted(order.stuck.items()):
        what = " & ".join(str(task) for task in schedule.rows[rank][i])
        stuck = f"rank {rank} waits for ever at entry {i} ({what})"
        raise ValueError(f"{function}: `schedule`: {stuck}, want {need} before it")


def _durations(function: str, schedule: Schedule, times: Times):
    """Returns a function from an entry to its time, after looking at all times."""
    stages = (schedule.stages,)
    forward, backward, weight = (
        stage_values(function, f"times.{name}", getattr(times, name), stages) for name in ("forward", "backward", "weight")
    )
    late = np.flatnonzero(weight > backward)
    if late.size:
        s = late[0]
        raise ValueError(f"{function}: `times.weight` is {weight[s]} in stage {s}, want at most backward, {backward[s]}")
    pair = forward[:, None] + backward if times.overlapped is None else times.overlapped
    pair = stage_values(function, "times.overlapped", pair, stages * 2).tolist()
    check(0 <= times.send < np.inf, f"{function}: `times.send` is {times.send}, want a finite number of at least 0")
    alone = {FORWARD: forward, BACKWARD: backward, INPUT: backward - weight, WEIGHT: weight}
    alone = {kind: values.tolist() for kind, values in alone.items()}

    def duration(slot: Slot) -> float:
        if len(slot) == 1:
            return alone[slot[0].kind][slot[0].stage]
        first, second = slot
        both = pair[first.stage][second.stage]
        return both if second.kind == BACKWARD else max(0.0, both - alone[WEIGHT][second.stage])

    return duration


def stage_values(function: str, argument: str, value: PerStage, shape: tuple[int, ...]) -> np.ndarray:
    """Returns times, one for each stage, from a number or an array of them.

    Args:
      function, argument: named in the error.
      value: a number, or numbers of the `shape`.
      shape: `(stages,)`, or `(stages, stages)` for pairs.

    Returns:
      An array of `shape`, float64.

    Raises:
      ValueError: another shape; a number that is negative or not finite.
    """
    array = np.asarray(value, np.float64)
    letters = ", ".join(["stage"] * len(shape))
    check(array.shape in ((), shape), f"{function}: `{argument}` has shape {array.shape}, want () or {shape} [{letters}]")
    bad = array[~((array >= 0) & (array < np.inf))]
    check(bad.size == 0, f"{function}: `{argument}` holds {bad[:1].sum()}, want finite numbers of at least 0")
    return np.broadcast_to(array, shape)
