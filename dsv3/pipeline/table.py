"""A pipeline schedule as a table: for each rank the tasks that it carries out, in order.

A micro-batch goes through the stages `0 .. stages - 1` forward and comes back in the other direction. What a rank does
for one micro-batch in one of its stages is a `Task`; a table entry (`Slot`) is one task, or a forward and a backward that
overlap. A row is an order and no timetable: a rank starts an entry as soon as it has finished the entry before it and all
inputs have arrived. Times come from a simulator (`dsv3.pipeline.simulation`), or from devices that follow the rows.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dsv3.checks import check

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
KINDS = (FORWARD, BACKWARD, INPUT, WEIGHT)


class Task(NamedTuple):
    """One stage's work for one micro-batch.

    kind: "F" forward; "B" full backward; "I" backward for the input; "W" backward for the weights. I and W together are B.
    stage: of the model, `0` is the first one in either direction.
    micro_batch: unique over both directions.
    direction: of DualPipe's two, in which the first stage is on the first and on the last rank; else 0.
    """

    kind: str
    stage: int
    micro_batch: int
    direction: int = 0

    def __str__(self) -> str:
        way = f", direction {self.direction}" if self.direction else ""
        return f"{self.kind} of micro-batch {self.micro_batch} in stage {self.stage}{way}"


# One entry of a row: (task,), or (forward, backward) for two that overlap.
Slot = tuple[Task, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """A table of tasks; `print(schedule)` shows it in unit times.

    name: of the generator.
    ranks: devices, each with a row.
    stages: that each micro-batch goes through.
    micro_batches: of one step, both directions together.
    rows: for each rank its entries in order.
    placement: `placement[direction][stage]` is the rank that has the stage. With two directions every stage is on two ranks,
      each with a copy of its parameters.
    """

    name: str
    ranks: int
    stages: int
    micro_batches: int
    rows: tuple[tuple[Slot, ...], ...]
    placement: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> int:
        """How often each parameter is held: once for each direction."""
        return len(self.placement)

    def rank_stages(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Returns the (direction, stage) pairs that `rank` holds."""
        held = ((d, s) for d, ranks in enumerate(self.placement) for s, r in enumerate(ranks) if r == rank)
        return tuple(held)

    def rank_of(self, task: Task) -> int:
        """Returns the rank that carries out `task`."""
        return self.placement[task.direction][task.stage]

    def is_second(self, task: Task) -> bool:
        """Whether `task` is in direction 1 or in a stage that is not its rank's first; pictures tell these apart."""
        ranks = self.placement[task.direction]
        return bool(task.direction) or ranks.index(ranks[task.stage]) != task.stage

    def __repr__(self) -> str:
        sizes = f"ranks={self.ranks}, stages={self.stages}, micro_batches={self.micro_batches}"
        return f"Schedule({self.name}, {sizes})"

    def __str__(self) -> str:
        from dsv3.pipeline.grid import schedule_text  # it needs this module

        return schedule_text(self)


def task_needs(task: Task, stages: int) -> tuple[Task, ...]:
    """Returns the results that a task waits for.

    A forward needs the forward of the stage before; a backward its own stage's forward and the gradient from the stage
    after; the backward for the weights the one for the input. A result is named by the task that makes it, the gradient
    for a stage's input by its "I", whether that is a task of its own or a part of "B".

    Args:
      task: any task.
      stages: of the schedule.

    Returns:
      Tasks of kind "F" or "I".
    """
    if task.kind == FORWARD:
        return (task._replace(stage=task.stage - 1),) if task.stage else ()
    if task.kind == WEIGHT:
        return (task._replace(kind=INPUT),)
    own = task._replace(kind=FORWARD)
    return (own, task._replace(kind=INPUT, stage=task.stage + 1)) if task.stage + 1 < stages else (own,)


def task_gives(task: Task) -> Task:
    """Returns the result of `task` under the name that `task_needs` uses: a full backward gives the input's gradient."""
    return task._replace(kind=INPUT) if task.kind == BACKWARD else task


def slot_needs(slot: Slot, stages: int) -> tuple[Task, ...]:
    """Returns what the tasks of `slot` wait for, see `task_needs` (also for `stages`): it starts when all has come."""
    return tuple(need for task in slot for need in task_needs(task, stages))


class Order(NamedTuple):
    """An order in which the items of several queues can be carried out.

    steps: (queue, position) in that order. stuck: queue → (position, what is missing there) for queues that cannot go on.
    """

    steps: list[tuple[int, int]]
    stuck: dict[int, tuple[int, Any]]


def execution_order(
    queues: Sequence[Sequence[Any]],
    needs: Callable[[Any], Iterable[Hashable]],
    gives: Callable[[Any], Iterable[Hashable]],
) -> Order:
    """Carries out queues side by side, each in its own order, and tells where they get stuck.

    Args:
      queues: of items, such as the rows of a schedule.
      needs: what an item waits for. gives: what is there once it is done.

    Returns:
      An `Order`. If nothing is stuck it has every item once, after all that it needs.
    """
    done: set[Hashable] = set()
    waiting: dict[Hashable, list[int]] = {}
    at = [0] * len(queues)
    ready = list(range(len(queues)))
    steps: list[tuple[int, int]] = []
    while ready:
        queue = ready.pop()
        while at[queue] < len(queues[queue]):
            item = queues[queue][at[queue]]
            missing = [need for need in needs(item) if need not in done]
            if missing:
                waiting.setdefault(missing[0], []).append(queue)
                break
            steps.append((queue, at[queue]))
            at[queue] += 1
            for result in gives(item):
                done.add(result)
                ready.extend(waiting.pop(result, ()))
    return Order(steps, {queue: (at[queue], need) for need, there in waiting.items() for queue in there})


def schedule_order(schedule: Schedule) -> Order:
    """Returns an order of all entries that keeps every row and every dependency, and where there is none.

    Args:
      schedule: any table, also a faulty one.

    Returns:
      An `Order` whose queues are the ranks.
    """
    return execution_order(
        schedule.rows, lambda slot: slot_needs(slot, schedule.stages), lambda slot: [task_gives(task) for task in slot]
    )


def row_activations(row: Iterable[Slot], sizes: Callable[[Task], float] = lambda task: 1) -> Iterator[float]:
    """Yields what a rank holds during each entry of its row.

    A forward's activations are held from its start to the end of its backward; where the backward is split, to the end of
    the part for the weights, which needs them too. So the forward of an overlapped pair counts beside its partner.

    Args:
      row: a rank's entries.
      sizes: of a task's activations; 1 counts micro-batches times stages.

    Yields:
      One sum for each entry.
    """
    held: float = 0
    for slot in row:
        held += sum(sizes(task) for task in slot if task.kind == FORWARD)
        yield held
        held -= sum(sizes(task) for task in slot if task.kind in (BACKWARD, WEIGHT))


def check_count(function: str, argument: str, value: Any, least: int = 1) -> None:
    """Raises `ValueError` in the name of `function` unless `value` of `argument` is an integer of at least `least`."""
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
    check(good, f"{function}: `{argument}` is {value!r}, want an integer of at least {least}")
