"""A schedule as text: ranks as rows, time steps as columns."""

from __future__ import annotations

from dsv3.pipeline.simulation import Times, simulate
from dsv3.pipeline.table import Schedule, Slot, schedule_order

UNIT = Times(forward=1, backward=2, weight=1)  # of the published pictures: F = B − W = W, and F&B = 3


def schedule_grid(schedule: Schedule) -> tuple[tuple[str, ...], ...]:
    """Returns the cells of a schedule in unit times: F, I and W take a step, B takes two, an overlapped pair three.

    A task's first cell has its kind and micro-batch, in small letters for direction 1 and for stages that are not the rank's
    first one. In a pair the forward has one cell, the backward the two after it, and the first of those begins with "&".
    A later cell of a task is "-", an idle one is empty.

    Args:
      schedule: a table that can be carried out.

    Returns:
      `cells[rank][step]`.

    Raises:
      ValueError: the rows block each other.
    """
    found = simulate(schedule, UNIT)
    cells = [[""] * int(found.makespan) for _ in range(schedule.ranks)]
    for row, starts, ends, entries in zip(cells, found.start, found.end, schedule.rows):
        for start, end, slot in zip(starts, ends, entries):
            marks = _slot_label(schedule, slot).replace("&", " &").split()
            row[int(start) : int(end)] = (marks + ["-"] * 3)[: int(end - start)]
    return tuple(tuple(row) for row in cells)


def schedule_text(schedule: Schedule) -> str:
    """Returns a schedule as lines, one for each rank: its grid, or its rows if they block each other.

    Args:
      schedule: any table.

    Returns:
      A heading, the rows, and what the letters mean.
    """
    if schedule_order(schedule).stuck:
        lines = [" ".join(_slot_label(schedule, slot) for slot in row) for row in schedule.rows]
        kind = "order of entries (they block each other)"
    else:
        grid = schedule_grid(schedule)
        width = max((len(cell) for row in grid for cell in row), default=1)
        lines = [" ".join(f"{cell or '.':<{width}}" for cell in row).rstrip() for row in grid]
        kind = "unit times"
    margin = len(str(schedule.ranks - 1))
    heading = (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.micro_batches} micro-batches; {kind}"
    )
    legend = "F forward, B backward, I backward for the input, W for the weights, F &B overlapped, . idle"
    if schedule.copies > 1:
        legend += "; small letters: direction 1"
    elif schedule.stages > schedule.ranks:
        legend += "; small letters: not the rank's first stage"
    return "\n".join([heading, *(f"{rank:>{margin}} | {line}" for rank, line in enumerate(lines)), legend])


def _slot_label(schedule: Schedule, slot: Slot) -> str:
    marks = []
    for task in slot:
        letter = task.kind.lower() if schedule.is_second(task) else task.kind
        marks.append(f"{letter}{task.micro_batch}")
    return "&".join(marks)
