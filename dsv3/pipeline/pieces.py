"""A schedule in smaller pieces: attention, dispatch, experts and combine of each layer, on two resources of a rank.

Attention and experts compute; dispatch and combine, which send tokens to their experts and back, communicate. In an
overlapped pair the pieces of the forward and of the backward alternate, so that one's communication runs beside the
other's computation:

    compute        ATTN F    | MLP I      | MLP W, MLP F | ATTN I, ATTN W
    communication  COMBINE I | DISPATCH F | DISPATCH I   | COMBINE F

This is the order of DeepSeek-V3's figure 4, which goes round in a chunk of several layers; here it begins where a chunk
does. The table is data like a `Schedule`: whoever starts a rank's pieces in order, without waiting for the end of a
communication until its result is needed, does what the simulator here shows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from dsv3.pipeline.simulation import check_finished
from dsv3.pipeline.table import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Schedule,
    Slot,
    Task,
    check_count,
    schedule_order,
    task_needs,
)

ATTENTION, DISPATCH, EXPERTS, COMBINE = PARTS = ("attention", "dispatch", "experts", "combine")
COMPUTE, COMMUNICATION = RESOURCES = ("compute", "communication")


class Piece(NamedTuple):
    """A part of a task in one layer.

    kind: "F" forward, "I" backward for the input, "W" backward for the weights (attention and experts only).
    part: "attention", "dispatch", "experts" or "combine"; backwards, the gradient of that part.
    layer: within the stage, from 0. stage, micro_batch, direction: of the task. entry: its place in the schedule's row.
    """

    kind: str
    part: str
    layer: int
    stage: int
    micro_batch: int
    direction: int
    entry: int

    @property
    def resource(self) -> str:
        """What it occupies: "compute" or "communication"."""
        return COMMUNICATION if self.part in (DISPATCH, COMBINE) else COMPUTE


@dataclasses.dataclass(frozen=True, repr=False)
class PieceTable:
    """A schedule's pieces: for each rank all of them in order. layers: of each stage."""

    schedule: Schedule
    layers: int
    rows: tuple[tuple[Piece, ...], ...]

    def __repr__(self) -> str:
        return f"PieceTable({self.schedule!r}, layers={self.layers})"


def expand_pieces(schedule: Schedule, *, layers: int = 1) -> PieceTable:
    """Splits every task of a schedule into the pieces of its layers.

    A full backward that overlaps with no forward has the experts' weights' part beside its own dispatch, and attention's
    beside the next layer's combine. A pair takes its layers in opposite order, the forward's first beside the backward's
    last.

    Args:
      schedule: a table that `schedule_check` passes.
      layers: of each stage.

    Returns:
      A `PieceTable`.

    Raises:
      ValueError: `layers` is no integer of at least 1, or the rows block each other.

    References: DeepSeek-V3 (arXiv:2412.19437), section 3.2.1, figure 4.
    """
    check_count("expand_pieces", "layers", layers)
    check_finished("expand_pieces", schedule, schedule_order(schedule))
    rows = ([piece for i, slot in enumerate(row) for piece in slot_pieces(slot, layers, i)] for row in schedule.rows)
    return PieceTable(schedule, layers, tuple(map(tuple, rows)))


def slot_pieces(slot: Slot, layers: int, entry: int = 0) -> list[Piece]:
    """Returns the pieces of a table entry in order.

    Args:
      slot: one task, or an overlapped pair. layers: of a stage. entry: the slot's place in its row.

    Returns:
      Pieces; with a pair those of both tasks, alternating.
    """

    def pieces(task: Task, layer: int, *what: tuple[str, str]) -> list[Piece]:
        split = {FORWARD: (FORWARD,), BACKWARD: (INPUT, WEIGHT)}.get(task.kind, (task.kind,))
        return [Piece(kind, part, layer, *task[1:], entry) for kind, part in what if kind in split]

    found = []
    for layer in range(layers):
        back = layers - 1 - layer
        if len(slot) == 2:
            forward, backward = slot
            found += pieces(backward, back, (INPUT, COMBINE))
            found += pieces(forward, layer, (FORWARD, ATTENTION), (FORWARD, DISPATCH))
            found += pieces(backward, back, (INPUT, EXPERTS), (INPUT, DISPATCH), (WEIGHT, EXPERTS))
            found += pieces(forward, layer, (FORWARD, EXPERTS), (FORWARD, COMBINE))
            found += pieces(backward, back, (INPUT, ATTENTION), (WEIGHT, ATTENTION))
        elif slot[0].kind == FORWARD:
            found += pieces(slot[0], layer, *((FORWARD, part) for part in PARTS))
        else:
            first = [(INPUT, COMBINE), (INPUT, EXPERTS), (INPUT, DISPATCH), (WEIGHT, EXPERTS)]
            found += pieces(slot[0], back, *first, (INPUT, ATTENTION), (WEIGHT, ATTENTION))
    return found


def piece_needs(piece: Piece, stages: int, layers: int) -> list[Piece]:
    """Returns the pieces that one waits for, by what they are: their `entry` is -1.

    Args:
      piece: of a table. stages: of the schedule. layers: of a stage.

    Returns:
      The piece before it in its task; for a task's first piece the last ones of the tasks that it needs.
    """
    piece = piece._replace(entry=-1)
    if piece.kind == WEIGHT:
        return [piece._replace(kind=INPUT)]
    step = 1 if piece.kind == FORWARD else -1
    place = PARTS.index(piece.part) - step
    if 0 <= place < len(PARTS):
        return [piece._replace(part=PARTS[place])]
    if 0 <= piece.layer - step < layers:
        return [piece._replace(layer=piece.layer - step, part=PARTS[place % len(PARTS)])]
    task = Task(piece.kind, piece.stage, piece.micro_batch, piece.direction)
    ends = {FORWARD: (COMBINE, layers - 1), INPUT: (ATTENTION, 0)}
    return [Piece(need.kind, *ends[need.kind], *need[1:], -1) for need in task_needs(task, stages)]
