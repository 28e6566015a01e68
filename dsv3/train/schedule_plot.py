"""A schedule as a picture: everything that changes over the tokens, with its beginning and its end drawn larger."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.checks import check, check_choice
from dsv3.train.schedule import CURVES, ScheduleValues, TrainSchedule, schedule_at
from dsv3.train.schedule_steps import schedule_steps

ZOOM = 0.045  # of the first stage's tokens: so much is drawn larger at its beginning and before its end
POINTS = 400  # of a curve, beside both sides of each border
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"), (1, ""))


class Window(NamedTuple):
    """A column of the picture: what it shows, from where to where in tokens."""

    title: str
    begin: int
    end: int


def plot_schedule(schedule: TrainSchedule, path: str | os.PathLike) -> Path:
    """Draws learning rate, batch size, sequence length and the three weights, over the tokens seen.

    Args:
      schedule: the schedule.
      path: of the picture, ending in `.png` or `.svg`; its folder is there. A file of that name is replaced when the picture
        is whole.

    Returns:
      The path.

    Raises:
      ValueError: another ending, or no such folder.
    """
    path = Path(path)
    check_choice("plot_schedule", "path", path.suffix, (".png", ".svg"))
    check(path.parent.is_dir(), f"plot_schedule: there is no folder {str(path.parent)!r} for `path`")
    import matplotlib

    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "dsv3", "font.family": ["DejaVu Sans"]}):
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        _figure(schedule).savefig(picture, format=path.suffix[1:], dpi=100, metadata=metadata)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(picture.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def tokens_text(tokens: float) -> str:
    """Returns a number of tokens in three digits or so, with a letter.

    >>> tokens_text(2.5e12), tokens_text(62_914_560_000), tokens_text(480)
    ('2.5T', '62.9B', '480')
    """
    unit, letter = next(((unit, letter) for unit, letter in _UNITS if tokens >= unit), (1, ""))
    return f"{tokens / unit:.3g}{letter}" if tokens / unit < 999.5 else f"{tokens / unit:.0f}{letter}"


def _windows(schedule: TrainSchedule) -> list[Window]:
    first, total = int(schedule.stages[0].until), schedule.total_tokens
    part = max(1, round(first * ZOOM))
    return [Window("the beginning", 0, part), Window("all", 0, total), Window("the end", first - part, total)]


def _figure(schedule: TrainSchedule) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    windows, rows = _windows(schedule), (_draw_rate, _draw_batch, _draw_length, _draw_weights)
    axes = figure.subplots(len(rows), len(windows), sharey="row", sharex="col", width_ratios=(1, 1.7, 1.3))
    for column, window in enumerate(windows):
        tokens = _tokens(schedule, window)
        values = [schedule_at(schedule, t) for t in tokens]
        for row, draw in enumerate(rows):
            axis = axes[row][column]
            draw(axis, schedule, np.array(tokens, np.float64), values, column == 0)
            _shade(axis, schedule, window, named=row == 1 and column == 2)
            axis.grid(alpha=0.3)
        axes[0][column].set_title(window.title, fontsize=10)
        axes[-1][column].set_xlim(window.begin, window.end)
        axes[-1][column].set_xlabel("tokens seen", fontsize=9)
        _tick(axes[-1][column].xaxis, window)
    axes[-1][1].legend(loc="center left", fontsize=8)
    stages = schedule_steps(schedule)
    total = sum(stage.tokens for stage in stages)
    figure.suptitle(f"{tokens_text(total)} tokens in {sum(stage.steps for stage in stages):,} steps", fontsize=12)
    return figure


def _tick(axis: Any, window: Window) -> None:
    from matplotlib.ticker import MaxNLocator

    unit, letter = next((unit, letter) for unit, letter in _UNITS if window.end >= unit)
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(lambda x, _: f"{x / unit:g}{letter}" if x else "0")


def _tokens(schedule: TrainSchedule, window: Window) -> list[int]:
    """Evenly spaced tokens, and both sides of every border."""
    borders = {int(piece.until) for name in CURVES for piece in getattr(schedule, name)}
    borders |= {int(stage.until) for stage in schedule.stages}
    found = {int(t) for t in np.linspace(window.begin, window.end - 1, POINTS)}
    found |= {t for border in borders for t in (border - 1, border) if window.begin <= t < window.end}
    return sorted(found)


def _shade(axis: Any, schedule: TrainSchedule, window: Window, named: bool) -> None:
    """Stages after the first as shaded strips, with their names in one of the panels."""
    for number, (before, stage) in enumerate(zip(schedule.stages, schedule.stages[1:])):
        if before.until >= window.end:
            continue
        axis.axvspan(before.until, stage.until, color="tab:orange", alpha=0.12 + 0.1 * (number % 2), linewidth=0)
        if named:
            middle = (before.until + stage.until) / 2
            place = {"ha": "center", "va": "top", "rotation": 90, "fontsize": 8, "transform": axis.get_xaxis_transform()}
            yarn = "" if stage.yarn_factor is None else f", YaRN {stage.yarn_factor:g}"
            axis.text(middle, 0.97, stage.name + yarn, **place)


def _draw_rate(axis, schedule, tokens, values: Sequence[ScheduleValues], first):
    axis.plot(tokens, [v.learning_rate for v in values], color="tab:green")
    least = min(value for piece in schedule.learning_rate for value in (piece.start, piece.end) if value > 0)
    axis.set_yscale("log")
    axis.set_ylim(bottom=least / 2)
    if first:
        axis.set_ylabel("learning rate", fontsize=9)


def _draw_batch(axis, schedule, tokens, values, first):
    axis.plot(tokens, [v.batch_size for v in values], color="tab:blue", drawstyle="steps-post")
    axis.set_ylim(bottom=0)
    if first:
        axis.set_ylabel("sequences of a step", fontsize=9)


def _draw_length(axis, schedule, tokens, values, first):
    axis.plot(tokens, [v.seq_len for v in values], color="tab:red", drawstyle="steps-post")
    lengths = sorted({stage.seq_len for stage in schedule.stages})
    axis.set_yscale("log", base=2)
    axis.set_ylim(lengths[0] / 2, lengths[-1] * 2)
    axis.set_yticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    axis.minorticks_off()
    if first:
        axis.set_ylabel("tokens of a sequence", fontsize=9)


def _draw_weights(axis, schedule, tokens, values, first):
    styles = (("bias_rate", "γ, bias", "-"), ("mtp_weight", "λ, MTP", "--"), ("balance_weight", "α, balance", ":"))
    for name, label, style in styles:
        most = max(value for piece in getattr(schedule, name) for value in (piece.start, piece.end)) or 1.0
        heights = [getattr(v, name) / most for v in values]
        axis.plot(tokens, heights, style, drawstyle="steps-post", label=f"{label}: 1 is {most:g}")
    axis.set_ylim(-0.05, 1.1)
    if first:
        axis.set_ylabel("weights, of their largest", fontsize=9)
