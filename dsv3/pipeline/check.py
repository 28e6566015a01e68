"""Whether a table is a schedule: every task once and in its place, no rank waiting for ever, no rank holding too much."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3.checks import check
from dsv3.pipeline.simulation import check_finished, peak_activations
from dsv3.pipeline.table import BACKWARD, FORWARD, INPUT, KINDS, Schedule, Slot, Task, check_count, schedule_order


def schedule_check(schedule: Schedule, *, max_activations: float | None = None) -> None:
    """Raises `ValueError` with the first fault of a table, if it has one.

    In this order: the table's form; each task in range and on the rank that has its stage; for each micro-batch one
    direction, and in each stage one forward and either a full backward or its two parts; a rank's tasks for one
    micro-batch in order; all rows can be followed to their end, where a task waits for what `task_needs` says and
    results are sent as soon as they are there; activations within the bound.

    Args:
      schedule: a table.
      max_activations: the most that a rank may hold, in stages times micro-batches (`peak_activations`); None: any.

    Returns:
      Nothing.

    Raises:
      ValueError: names rank, entry and task of the fault.
    """
    _check_form(schedule)
    seen = _check_places(schedule)
    _check_complete(schedule, seen)
    check_finished("schedule_check", schedule, schedule_order(schedule))
    if max_activations is not None:
        for rank, peak in enumerate(peak_activations(schedule)):
            what = f"rank {rank} holds {peak} activations"
            _check(peak <= max_activations, f"{what}, want at most `max_activations`, {max_activations}")


def _check(condition: bool, message: str) -> None:
    check(condition, f"schedule_check: {message}")


def _check_form(schedule: Schedule) -> None:
    for name in ("ranks", "stages", "micro_batches"):
        check_count("schedule_check", f"schedule.{name}", getattr(schedule, name))
    rows, ranks = len(schedule.rows), schedule.ranks
    _check(rows == ranks, f"`schedule.rows` has {rows} rows, want {ranks}, one a rank")
    _check(len(schedule.placement) in (1, 2), f"`schedule.placement` has {len(schedule.placement)} directions, want 1 or 2")
    for direction, places in enumerate(schedule.placement):
        where = f"`schedule.placement` of direction {direction}"
        _check(len(places) == schedule.stages, f"{where} has {len(places)} stages, want {schedule.stages}")
        strange = [rank for rank in places if rank not in range(ranks)]
        _check(not strange, f"{where} names rank {strange[:1]}, want ranks below {ranks}")


def _entries(schedule: Schedule) -> Iterator[tuple[int, int, Slot]]:
    return ((rank, i, slot) for rank, row in enumerate(schedule.rows) for i, slot in enumerate(row))


def _check_places(schedule: Schedule) -> dict[Task, tuple[int, int]]:
    """Looks at each task by itself; returns where each is: task → (rank, entry)."""
    seen: dict[Task, tuple[int, int]] = {}
    for rank, i, slot in _entries(schedule):
        kinds = tuple(task.kind for task in slot)
        where = f"rank {rank}, entry {i}"
        _check(set(kinds) <= set(KINDS), f"{where} has kinds {kinds}, want {KINDS}")
        alone_or_pair = len(slot) == 1 or kinds in ((FORWARD, BACKWARD), (FORWARD, INPUT))
        _check(alone_or_pair, f"{where} has kinds {kinds}, want one task, or a forward and a backward")
        for task in slot:
            for name, size in (("stage", schedule.stages), ("micro_batch", schedule.micro_batches)):
                value = getattr(task, name)
                _check(value in range(size), f"{where}: `{name}` is {value!r}, want an integer in [0, {size})")
            ways = range(schedule.copies)
            _check(task.direction in ways, f"{where}: `direction` is {task.direction!r}, want one of {list(ways)}")
            home = schedule.rank_of(task)
            _check(home == rank, f"{where}: {task} is on rank {rank}, want rank {home}, where its stage is")
            first = seen.setdefault(task, (rank, i))
            _check(first == (rank, i), f"{where}: {task} is there again, want it once (it is in entry {first[1]})")
    return seen


def _check_complete(schedule: Schedule, seen: dict[Task, tuple[int, int]]) -> None:
    """Each micro-batch has one direction, and in each stage what belongs there, in order."""
    directions: dict[int, set[int]] = {}
    for task in seen:
        directions.setdefault(task.micro_batch, set()).add(task.direction)
    for m in range(schedule.micro_batches):
        ways = sorted(directions.get(m, ()))
        _check(len(ways) == 1, f"micro-batch {m} goes in directions {ways}, want one")
        for stage in range(schedule.stages):
            forward, full, inputs, weights = (Task(kind, stage, m, ways[0]) for kind in KINDS)
            for task in [forward] if full in seen else [forward, inputs, weights]:
                missing = f"{task} is missing" + ("" if task is forward else " (as is a full backward)")
                _check(task in seen, f"{missing}, want it on rank {schedule.rank_of(task)}")
            split = [task for task in (inputs, weights) if task in seen]
            _check(
                full not in seen or not split, f"{full} is there beside {', '.join(map(str, split))}, want one of the two"
            )
            chain = [forward, full] if full in seen else [forward, inputs, weights]
            for before, after in zip(chain, chain[1:]):
                (rank, i), (_, j) = seen[before], seen[after]
                _check(i < j, f"rank {rank}: {after} is in entry {j}, want it after {before} in entry {i}")
