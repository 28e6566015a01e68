"""A schedule as a picture: ranks as rows, time to the right."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.checks import check, check_choice
from dsv3.pipeline.grid import UNIT
from dsv3.pipeline.piece_simulation import PieceSimulation
from dsv3.pipeline.pieces import COMMUNICATION
from dsv3.pipeline.simulation import Simulation, simulate
from dsv3.pipeline.table import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule, Task

# For each kind the colour of direction 0 (or a rank's first stage) and, paler, that of the other one.
COLOURS = {
    FORWARD: ("#f2a541", "#fbd9a6"),
    BACKWARD: ("#4f9d5d", "#a9d3b0"),
    INPUT: ("#6fc0c4", "#c3e5e6"),
    WEIGHT: ("#6c8ebf", "#c5d3e8"),
}
MEANING = {FORWARD: "forward", BACKWARD: "backward", INPUT: "backward for the input", WEIGHT: "backward for the weights"}


class Bar(NamedTuple):
    """A rectangle of the picture: of a task (with its number) or a piece, in a line, over a time."""

    line: int
    start: float
    length: float
    kind: str
    pale: bool
    text: str


def draw(what: Schedule | Simulation | PieceSimulation, path: str | os.PathLike) -> Path:
    """Draws a schedule to a file, the same bytes each time.

    A cell's colour tells the kind of its task, a paler one the second direction or another stage than the rank's first;
    the number is the micro-batch. An overlapped pair is two cells in one frame, the backward's twice as long as the
    forward's. Of a simulation of pieces each rank has two lines, computation above and communication below; a letter tells
    the part.

    Args:
      what: a schedule, which is drawn in unit times (F = I = W = 1), or a simulation.
      path: of the picture, ending in `.svg` or `.png`; its folder is there.

    Returns:
      The path.

    Raises:
      ValueError: another ending, or something else to draw.
    """
    path = Path(path)
    check_choice("draw", "path", path.suffix, (".svg", ".png"))
    what = simulate(what, UNIT) if isinstance(what, Schedule) else what
    kinds = (Simulation, PieceSimulation)
    check(isinstance(what, kinds), f"draw: `what` is of type {type(what).__name__}, want a Schedule or a simulation of one")
    if isinstance(what, Simulation):
        bars, frames, schedule, label = _task_bars(what), _frames(what), what.schedule, "time"
    else:
        bars, frames, schedule = _piece_bars(what), [], what.table.schedule
        label = "time (computation: A attention, E experts; communication: D dispatch, C combine)"

    import matplotlib

    # Text as outlines looks the same everywhere. The salt makes the elements' names the same each time.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "dsv3", "font.family": ["DejaVu Sans"]}):
        figure = _figure(bars, frames, schedule, what.makespan, label)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)
    return path


def _task_bars(found: Simulation) -> list[Bar]:
    """One bar for each task; an overlapped pair's two share its time as 1 to 2."""
    bars = []
    for rank, row in enumerate(found.schedule.rows):
        for slot, start, end in zip(row, found.start[rank].tolist(), found.end[rank].tolist()):
            cuts = [start, end] if len(slot) == 1 else [start, start + (end - start) / 3, end]
            for task, low, high in zip(slot, cuts, cuts[1:]):
                pale = found.schedule.is_second(task)
                bars.append(Bar(rank, low, high - low, task.kind, pale, str(task.micro_batch)))
    return bars


def _frames(found: Simulation) -> list[Bar]:
    """The outlines of overlapped pairs."""
    return [
        Bar(rank, start, end - start, "", False, "")
        for rank, row in enumerate(found.schedule.rows)
        for slot, start, end in zip(row, found.start[rank].tolist(), found.end[rank].tolist())
        if len(slot) == 2
    ]


def _piece_bars(found: PieceSimulation) -> list[Bar]:
    """One bar for each piece, with the part's first letter."""
    bars = []
    for rank, row in enumerate(found.table.rows):
        for piece, start, end in zip(row, found.start[rank].tolist(), found.end[rank].tolist()):
            task = Task(piece.kind, piece.stage, piece.micro_batch, piece.direction)
            line = 2 * rank + (piece.resource == COMMUNICATION)
            text = f"{piece.part[0].upper()}{piece.micro_batch}"
            bars.append(Bar(line, start, end - start, piece.kind, found.table.schedule.is_second(task), text))
    return bars


def _figure(bars: list[Bar], frames: list[Bar], schedule: Schedule, makespan: float, label: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = max(bar.line for bar in bars) + 1
    lines = count // schedule.ranks
    cells = max(Counter(bar.line for bar in bars).values())
    width = min(40.0, max(6.0, 0.22 * cells))
    figure = Figure(figsize=(width, 0.24 * count + 0.9), layout="constrained")
    axes = figure.subplots()
    present = []
    for kind, pale in itertools.product(COLOURS, (False, True)):
        alike = [bar for bar in bars if (bar.kind, bar.pale) == (kind, pale)]
        if not alike:
            continue
        colour = COLOURS[kind][pale]
        _rectangles(axes, alike, colour, "white", 0.4)
        other = "direction 1" if schedule.copies > 1 else "not the rank's first stage"
        present.append(Patch(color=colour, label=MEANING[kind] + (f", {other}" if pale else "")))
    if frames:
        _rectangles(axes, frames, "none", "black", 0.8)
        present.append(Patch(facecolor="none", edgecolor="black", label="overlapped pair"))
    inches = width * 0.92 / makespan if makespan else 0.0
    for bar in bars:
        size = min(7.0, 72 * inches * bar.length / (0.7 * len(bar.text)))  # of a font that fits into the cell
        if size >= 2.5:
            x, y = bar.start + bar.length / 2, bar.line
            axes.text(x, y, bar.text, fontsize=round(size, 1), ha="center", va="center_baseline")
    names = [f"rank {rank}" for rank in range(schedule.ranks)]
    axes.set_yticks([lines * rank + (lines - 1) / 2 for rank in range(schedule.ranks)], names, fontsize=7)
    axes.set(xlim=(0, makespan or 1), ylim=(count - 0.5, -0.5), facecolor="#f4f4f4")
    axes.set_xlabel(label, fontsize=7)
    axes.tick_params(labelsize=7, length=2)
    title = f"{schedule.name}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.micro_batches} micro-batches"
    axes.set_title(title, fontsize=8)
    figure.legend(handles=present, loc="outside lower center", ncols=min(5, len(present)), fontsize=6.5, frameon=False)
    return figure


def _rectangles(axes: Any, bars: list[Bar], colour: str, edge: str, line: float) -> None:
    from matplotlib.collections import PolyCollection

    corners = []
    for bar in bars:
        left, right, top, bottom = bar.start, bar.start + bar.length, bar.line - 0.45, bar.line + 0.45
        corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
    axes.add_collection(PolyCollection(corners, facecolors=colour, edgecolors=edge, linewidths=line))
