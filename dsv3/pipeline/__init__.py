"""Pipeline parallelism: schedules as data, their checks, simulators and pictures.

A generator (`dualpipe(8, 20)`; all are in `SCHEDULES`) makes a `Schedule`: for each rank its tasks in order.
`schedule_check` says what is wrong with a table; `simulate` when everything runs, how long ranks are idle and what they
hold; `expected` the same by formula. `expand_pieces` splits tasks into attention, dispatch, experts and combine, to see
which communication is hidden. `draw` makes a picture, `print` shows a table as text. Nothing here computes a model.
"""

from dsv3.pipeline.check import schedule_check
from dsv3.pipeline.drawing import draw
from dsv3.pipeline.dual import dualpipe, dualpipe_v
from dsv3.pipeline.formulas import Expected, expected
from dsv3.pipeline.grid import schedule_grid, schedule_text
from dsv3.pipeline.piece_simulation import PieceSimulation, PieceTimes, chunk_times, simulate_pieces
from dsv3.pipeline.pieces import Piece, PieceTable, expand_pieces, piece_needs
from dsv3.pipeline.schedules import SCHEDULES, gpipe, interleaved, one_f_one_b, zb1p
from dsv3.pipeline.simulation import Simulation, Times, peak_activations, simulate
from dsv3.pipeline.table import Schedule, Slot, Task, schedule_order, slot_needs, task_gives, task_needs

__all__ = [
    "SCHEDULES",
    "Expected",
    "Piece",
    "PieceSimulation",
    "PieceTable",
    "PieceTimes",
    "Schedule",
    "Simulation",
    "Slot",
    "Task",
    "Times",
    "chunk_times",
    "draw",
    "dualpipe",
    "dualpipe_v",
    "expand_pieces",
    "expected",
    "gpipe",
    "interleaved",
    "one_f_one_b",
    "peak_activations",
    "piece_needs",
    "schedule_check",
    "schedule_grid",
    "schedule_order",
    "schedule_text",
    "simulate",
    "simulate_pieces",
    "slot_needs",
    "task_gives",
    "task_needs",
    "zb1p",
]
