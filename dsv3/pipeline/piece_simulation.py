"""When each piece of a schedule runs, which communication is hidden, and how long tasks take that are made of pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from dsv3.checks import check
from dsv3.pipeline.pieces import COMPUTE, PARTS, RESOURCES, Piece, PieceTable, piece_needs, slot_pieces
from dsv3.pipeline.simulation import PerStage, Times, stage_values
from dsv3.pipeline.table import BACKWARD, FORWARD, INPUT, WEIGHT, Task, check_count, execution_order


@dataclasses.dataclass(frozen=True)
class PieceTimes:
    """How long the pieces of one layer take, in any unit; a number for all stages, or one for each.

    attention, dispatch, experts, combine: forward.
    attention_input, experts_input, attention_weight, experts_weight: the two parts of the backward; default: as forward.
    dispatch_back, combine_back: gradients on their way back. That of a dispatch adds up over experts, as combine does, and
      is as long by default; that of a combine as long as dispatch.
    send: from the end of a stage's work to where the next rank may use it. It occupies neither resource.
    """

    attention: PerStage
    dispatch: PerStage
    experts: PerStage
    combine: PerStage
    attention_input: PerStage | None = None
    attention_weight: PerStage | None = None
    experts_input: PerStage | None = None
    experts_weight: PerStage | None = None
    dispatch_back: PerStage | None = None
    combine_back: PerStage | None = None
    send: float = 0.0


class PieceSimulation(NamedTuple):
    """Pieces in time.

    start, end: for each rank the times of its pieces. makespan: when the last one ends.
    compute, communication: how long each rank does either, `[ranks]`.
    exposed: how long each rank communicates and computes nothing beside, `[ranks]`.
    """

    table: PieceTable
    start: tuple[np.ndarray, ...]
    end: tuple[np.ndarray, ...]
    makespan: float
    compute: np.ndarray
    communication: np.ndarray
    exposed: np.ndarray

    @property
    def hidden_fraction(self) -> float:
        """The part of all ranks' communication that runs beside computation; 1 if there is none."""
        total = float(self.communication.sum())
        return 1.0 - float(self.exposed.sum()) / total if total else 1.0


def simulate_pieces(table: PieceTable, times: PieceTimes) -> PieceSimulation:
    """Lets every rank carry out its pieces in order, on each resource for itself.

    A piece starts once its resource is free and its inputs have come. So the end of one task may also overlap with the
    beginning of the next.

    Args:
      table: of `expand_pieces`.
      times: of the pieces of a layer.

    Returns:
      A `PieceSimulation`.

    Raises:
      ValueError: a time is negative or of a wrong shape.
    """
    schedule = table.schedule
    duration = _durations("simulate_pieces", schedule.stages, times)

    def needs(piece: Piece) -> list[Piece]:
        return piece_needs(piece, schedule.stages, table.layers)

    order = execution_order(table.rows, needs, lambda piece: [piece._replace(entry=-1)])
    assert not order.stuck, order.stuck
    start = tuple(np.zeros(len(row)) for row in table.rows)
    end = tuple(np.zeros(len(row)) for row in table.rows)
    free = [dict.fromkeys(RESOURCES, 0.0) for _ in table.rows]
    there: dict[Piece, tuple[float, int]] = {}
    for rank, i in order.steps:
        piece = table.rows[rank][i]
        begin = free[rank][piece.resource]
        for need in needs(piece):
            when, where = there[need]
            begin = max(begin, when if where == rank else when + times.send)
        start[rank][i], end[rank][i] = begin, begin + duration(piece)
        free[rank][piece.resource] = end[rank][i]
        there[piece._replace(entry=-1)] = (end[rank][i], rank)
    makespan = max(max(each.values()) for each in free)
    sums = np.array([_sums(*columns) for columns in zip(table.rows, start, end)])
    return PieceSimulation(table, start, end, float(makespan), *sums.T)


def chunk_times(times: PieceTimes, *, layers: int = 1) -> Times:
    """Returns how long whole tasks take that are made of such pieces, each alone on its rank, for `simulate`.

    The pieces' own simulation is never slower, as there a task may begin before the one before it has ended; and the full
    backward is the sum of its two parts here, without what its weights' part hides.

    Args:
      times: of the pieces of a layer.
      layers: of each stage.

    Returns:
      `Times`: numbers, or arrays by stage if any of `times` is one.

    Raises:
      ValueError: a time is negative, or two have different numbers of stages.
    """
    check_count("chunk_times", "layers", layers)
    values = (getattr(times, field.name) for field in dataclasses.fields(times))
    lengths = {np.shape(value)[0] for value in values if np.ndim(value)}
    check(len(lengths) <= 1, f"chunk_times: `times` has values for {sorted(lengths)} stages, want one number of stages")
    stages = max(lengths, default=1)
    duration = _durations("chunk_times", stages, times)
    alone = {
        kind: np.array([_span(slot_pieces((Task(kind, s, 0),), layers), layers, duration) for s in range(stages)])
        for kind in (FORWARD, INPUT, WEIGHT)
    }
    pairs = [[(Task(FORWARD, s, 0), Task(BACKWARD, t, 1)) for t in range(stages)] for s in range(stages)]
    both = np.array([[_span(slot_pieces(pair, layers), layers, duration) for pair in row] for row in pairs])
    found = (alone[FORWARD], alone[INPUT] + alone[WEIGHT], alone[WEIGHT], both)
    return Times(*(found if lengths else (float(each.item()) for each in found)), send=times.send)


def _durations(function: str, stages: int, times: PieceTimes) -> Callable[[Piece], float]:
    """Returns a function from a piece to its time, after looking at all times."""
    defaults = {
        "attention_input": "attention", "attention_weight": "attention", "experts_input": "experts",
        "experts_weight": "experts", "dispatch_back": "combine", "combine_back": "dispatch",
    }  # fmt: skip
    names = {(FORWARD, part): part for part in PARTS}
    names |= {(kind, part): f"{part}_{end}" for kind, end in ((INPUT, "input"), (WEIGHT, "weight")) for part in PARTS[::2]}
    names |= {(INPUT, part): f"{part}_back" for part in PARTS[1::2]}
    table = {}
    for key, name in names.items():
        value = getattr(times, name)
        value = getattr(times, defaults[name]) if value is None else value
        table[key] = stage_values(function, f"times.{name}", value, (stages,)).tolist()
    check(0 <= times.send < np.inf, f"{function}: `times.send` is {times.send}, want a finite number of at least 0")
    return lambda piece: table[piece.kind, piece.part][piece.stage]


def _span(pieces: Iterable[Piece], layers: int, duration: Callable[[Piece], float]) -> float:
    """How long pieces take on an empty rank when everything from outside is there."""
    free, there = dict.fromkeys(RESOURCES, 0.0), {}
    for piece in pieces:
        # One stage: what other stages would give is there.
        begin = max([free[piece.resource], *(there.get(need, 0.0) for need in piece_needs(piece, 1, layers))])
        free[piece.resource] = there[piece._replace(entry=-1)] = begin + duration(piece)
    return max(free.values())


def _sums(row: tuple[Piece, ...], start: np.ndarray, end: np.ndarray) -> tuple[float, float, float]:
    """Returns a rank's time of computation, of communication, and of communication with no computation beside it."""
    computes = np.array([piece.resource == COMPUTE for piece in row], bool)
    lengths = end - start
    # What has been computed at a time is linear between the pieces' starts and ends.
    times = np.stack([start[computes], end[computes]], -1).ravel()
    done = np.stack([np.zeros(computes.sum()), lengths[computes]], -1).ravel().cumsum()
    beside = np.interp(end[~computes], times, done) - np.interp(start[~computes], times, done)
    total = lengths[~computes].sum()
    return lengths[computes].sum(), total, total - beside.sum()
