"""Schedules: everything that changes in a training, as pure functions of the tokens seen.

A `Curve` is one number's course, in pieces; a `TrainSchedule` is all curves and the stages. Both are plain data. They are
read in two forms: in Python (`schedule_at`, for the loop: batch size, sequence length, the stage's architecture) and in
tensors (`curve_schedule`, for what a compiled step reads). The paper's own plan is in `schedule_paper.py`, steps are counted
in `schedule_steps.py`.

A step takes the values at the tokens that were seen before it; so does a piece or a stage begin with the first step at or
after its first token.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import check, check_choice
from dsv3.train.optim import Schedule

SHAPES = ("constant", "linear", "cosine")


class Piece(NamedTuple):
    """A part of a curve.

    Attributes:
      until: the first token that is not in it, a whole number; it begins where the one before it ends, the first at 0.
      start, end: values at both ends; alike in a constant piece.
      shape: `"constant"`, `"linear"` or `"cosine"`, half a period: flat at both ends.
    """

    until: int
    start: float
    end: float
    shape: str = "constant"


Curve = tuple[Piece, ...]
"""A number as a function of the tokens seen; after the last piece its end value is kept."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training with one architecture.

    Attributes:
      name: for tables and messages.
      until: the first token that is not in it.
      seq_len: tokens of a sequence.
      yarn_factor: how many times longer YaRN makes the context, or `None` for plain RoPE.
    """

    name: str
    until: int
    seq_len: int
    yarn_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainSchedule:
    """A whole training, as data.

    Attributes:
      learning_rate: curve. batch_size: curve in sequences, of constant and linear pieces; it is rounded to a multiple.
      bias_rate: γ, how far a step moves the router's bias. mtp_weight: λ. balance_weight: α.
      stages: in their order. Curves go on through them, in tokens from the very beginning.
      batch_multiple: batch sizes are multiples of it; a tuple has one for each stage.
    """

    learning_rate: Curve
    batch_size: Curve
    bias_rate: Curve
    mtp_weight: Curve
    balance_weight: Curve
    stages: tuple[Stage, ...]
    batch_multiple: int | tuple[int, ...] = 1

    def __post_init__(self):
        for name in CURVES:
            check_curve("TrainSchedule", name, getattr(self, name))
        shapes = {piece.shape for piece in self.batch_size}
        check("cosine" not in shapes, "TrainSchedule: `batch_size` has a cosine piece, want constant and linear ones")
        check(len(self.stages) > 0, "TrainSchedule: `stages` is empty, want at least one")
        begin = 0
        for stage in self.stages:
            where = f"TrainSchedule: stage {stage.name!r}"
            check(_whole(stage.until, begin + 1), f"{where} ends at {stage.until} tokens, want a whole number above {begin}")
            check(_whole(stage.seq_len, 1), f"{where} has sequences of {stage.seq_len} tokens, want a whole number from 1")
            check(
                stage.yarn_factor is None or stage.yarn_factor >= 1,
                f"{where}: `yarn_factor` is {stage.yarn_factor}, want None or at least 1",
            )
            begin = stage.until
        count = len(self.stages)
        fine = min(self.multiples, default=0) >= 1
        check(fine, f"TrainSchedule: `batch_multiple` is {self.batch_multiple}, want at least 1")
        check(
            len(self.multiples) == count,
            f"TrainSchedule: `batch_multiple` has {len(self.multiples)} numbers, want one or one for each of {count} stages",
        )
        for least, multiple in zip(self.least_sizes, self.multiples):
            check(
                2 * least >= multiple,
                f"TrainSchedule: `batch_size` is {float(least):g} sequences at its least, which is nearer to none than to "
                f"batch_multiple={multiple}; want at least {multiple / 2:g}",
            )

    @property
    def multiples(self) -> tuple[int, ...]:
        """`batch_multiple` of each stage."""
        single = isinstance(self.batch_multiple, int)
        return (self.batch_multiple,) * len(self.stages) if single else tuple(self.batch_multiple)

    @property
    def least_sizes(self) -> tuple[Fraction, ...]:
        """The smallest batch of each stage in sequences, before it is rounded to a multiple."""
        begins = (0, *(int(stage.until) for stage in self.stages))
        return tuple(_least(self.batch_size, begin, int(stage.until)) for begin, stage in zip(begins, self.stages))

    def stage_index(self, tokens: int) -> int:
        """The stage of a step that begins after so many tokens; after the last one, the last."""
        return min(sum(tokens >= stage.until for stage in self.stages), len(self.stages) - 1)

    @property
    def total_tokens(self) -> int:
        """Where the last stage ends."""
        return int(self.stages[-1].until)


CURVES = ("learning_rate", "batch_size", "bias_rate", "mtp_weight", "balance_weight")


class ScheduleValues(NamedTuple):
    """What a step trains with, as Python numbers.

    Attributes:
      stage: index into `TrainSchedule.stages`.
      learning_rate, bias_rate, mtp_weight, balance_weight: see `TrainSchedule`.
      batch_size: sequences, a multiple of `batch_multiple`. seq_len: tokens of each.
      yarn_factor: of the stage.
    """

    stage: int
    learning_rate: float
    batch_size: int
    seq_len: int
    bias_rate: float
    mtp_weight: float
    balance_weight: float
    yarn_factor: float | None


def schedule_at(schedule: TrainSchedule, tokens: int) -> ScheduleValues:
    """Returns everything that changes, for the step that begins when `tokens` tokens have been seen.

    Args:
      schedule: the schedule.
      tokens: a whole number from 0. After the last stage its values are kept.

    Returns:
      `ScheduleValues`.

    Raises:
      ValueError: tokens below 0, or a fraction of one.

    References: DeepSeek-V3 sections 4.2 and 4.3 have these quantities.
    """
    tokens = _tokens("schedule_at", tokens)
    index = schedule.stage_index(tokens)
    stage = schedule.stages[index]
    size = batch_run(schedule, tokens)[0]
    rate, bias, mtp, balance = (curve_at(getattr(schedule, name), tokens) for name in CURVES if name != "batch_size")
    return ScheduleValues(index, rate, size, stage.seq_len, bias, mtp, balance, stage.yarn_factor)


def curve_at(curve: Curve, tokens: int) -> float:
    """Returns the value of a curve; `curve_schedule` in Python numbers.

    Args:
      curve: the curve.
      tokens: seen before the step, a whole number from 0.

    >>> curve = warmup_cosine(1.0, warmup_tokens=10, total_tokens=110)
    >>> [round(curve_at(curve, t), 3) for t in (0, 5, 10, 60, 500)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    begin, piece = _piece_at(curve, _tokens("curve_at", tokens))
    if tokens >= piece.until:
        return float(piece.end)
    x = (int(tokens) - begin) / (piece.until - begin)
    x = math.sin(0.5 * math.pi * x) ** 2 if piece.shape == "cosine" else x  # ½·(1 − cos πx)
    return float(piece.start + (piece.end - piece.start) * x)


def curve_schedule(curve: Curve) -> Schedule:
    """Returns a curve as a function of tensors, for `adamw(learning_rate=...)` and the weights of `make_train_step`.

    It computes in float64, as Python does, and rounds the value to float32: pieces change at the same step in both forms.
    (In float32 tokens are 2²⁰ apart beyond 2⁴³ = 8.8e12, so that a border would be off by up to 2¹⁹.)

    Args:
      curve: the curve.

    Returns:
      A function from tokens seen (of any dtype and shape; float32 ones come rounded) to float32 of that shape.
    """
    check_curve("curve_schedule", "curve", curve)
    ends = [int(piece.until) for piece in curve]
    begins = [0, *ends]  # a last, constant piece goes on for ever
    pieces = (*curve, Piece(ends[-1] + 1, curve[-1].end, curve[-1].end))
    starts, finals = ([float(value) for value in values] for values in zip(*((p.start, p.end) for p in pieces)))
    lengths = [float(piece.until - begin) for piece, begin in zip(pieces, begins)]
    shapes = [SHAPES.index(piece.shape) for piece in pieces]

    def schedule(tokens: tf.Tensor) -> tf.Tensor:
        tokens = tf.cast(tokens, tf.float64)
        index = tf.reduce_sum(tf.cast(tokens[..., None] >= tf.constant(ends, tf.float64), tf.int32), -1)
        columns = (begins, lengths, starts, finals)
        begin, length, start, final = (tf.gather(tf.constant(values, tf.float64), index) for values in columns)
        shape, x = tf.gather(tf.constant(shapes), index), (tokens - begin) / length
        x = tf.where(shape == SHAPES.index("cosine"), tf.sin(0.5 * math.pi * x) ** 2, x)
        return tf.cast(start + (final - start) * x, tf.float32)

    return schedule


def warmup_cosine(
    peak: float, *, warmup_tokens: int, total_tokens: int, final: float = 0.0, constant_tokens: int = 0
) -> Curve:
    """Returns a linear warm-up from 0, a constant piece, then a cosine to `final`, which is kept.

    Args:
      peak: the highest value.
      warmup_tokens: length of the warm-up, may be 0. constant_tokens: length of the constant piece after it.
      total_tokens: where the cosine ends.
      final: the value from there on.

    References: DeepSeek-V3 section 4.2 has these pieces, and two constant ones after them (`PAPER_SCHEDULE`).

    >>> [piece.shape for piece in warmup_cosine(1.0, warmup_tokens=10, total_tokens=110)]
    ['linear', 'cosine']
    """
    start = warmup_tokens + constant_tokens
    check(
        0 <= warmup_tokens and 0 <= constant_tokens and start <= total_tokens,
        f"warmup_cosine: warm-up and constant phase end at {start} tokens, want at most total_tokens={total_tokens}",
    )
    pieces = [
        Piece(warmup_tokens, 0.0, peak, "linear"), Piece(start, peak, peak), Piece(total_tokens, peak, final, "cosine"),
        Piece(total_tokens + 1, final, final),
    ]  # fmt: skip
    begins = [0, *(piece.until for piece in pieces)]
    curve = tuple(piece for piece, begin in zip(pieces, begins) if piece.until > begin)
    return curve if len(curve) == 1 or curve[-2].end != final else curve[:-1]


def batch_run(schedule: TrainSchedule, tokens: int) -> tuple[int, int | None]:
    """Returns the batch size at `tokens` and the first token after it that may have another in the same stage; `None`: it
    stays.

    It is `batch_multiple·⌊x / batch_multiple + ½⌋`, at least one multiple, with x of the curve as an exact fraction.
    """
    begin, piece = _piece_at(schedule.batch_size, tokens)
    unit = schedule.multiples[schedule.stage_index(tokens)]
    if tokens >= piece.until:
        return _rounded(Fraction(piece.end), unit), None
    start, slope = Fraction(piece.start), Fraction(piece.end) - Fraction(piece.start)
    size = _rounded(start + slope * (tokens - begin) / (int(piece.until) - begin), unit)
    if not slope:
        return size, int(piece.until)
    border = Fraction(size) + Fraction(unit if slope > 0 else -unit, 2)  # where the curve is rounded to another size
    change = begin + (border - start) * (int(piece.until) - begin) / slope
    change = math.ceil(change) if slope > 0 else math.floor(change) + 1
    return size, min(change, int(piece.until))


def _least(curve: Curve, begin: int, end: int) -> Fraction:
    """The least value of a curve of constant and linear pieces between two tokens, the second not included."""
    values, first = [], 0
    for number, piece in enumerate(curve, 1):
        until = int(piece.until) if number < len(curve) else max(int(piece.until), end)
        if first < end and begin < until:
            start, slope = Fraction(piece.start), Fraction(piece.end) - Fraction(piece.start)
            length = int(piece.until) - first
            values += [start + slope * min(max(place - first, 0), length) / length for place in (begin, min(end, until))]
        first = int(piece.until)
    return min(values, default=Fraction(curve[-1].end))


def _rounded(size: Fraction, unit: int) -> int:
    return unit * max(1, math.floor(size / unit + Fraction(1, 2)))


def _piece_at(curve: Curve, tokens: int) -> tuple[int, Piece]:
    """The piece that a token is in, the last one for those after it, and where it begins."""
    begin = 0
    for piece in curve[:-1]:
        if tokens < piece.until:
            return begin, piece
        begin = int(piece.until)
    return begin, curve[-1]


def check_curve(function: str, argument: str, curve: Curve) -> None:
    """Raises `ValueError` unless `curve` is one: pieces in their order, of known shapes, with finite values from 0."""
    check(len(curve) > 0, f"{function}: `{argument}` has no piece, want at least one")
    begin = 0
    for number, piece in enumerate(curve, 1):
        where = f"{function}: piece {number} of `{argument}`"
        check(_whole(piece.until, begin + 1), f"{where} ends at {piece.until} tokens, want a whole number above {begin}")
        check_choice(function, f"{argument}.shape", piece.shape, SHAPES)
        fine = all(math.isfinite(value) and value >= 0 for value in (piece.start, piece.end))
        check(fine, f"{where} goes from {piece.start} to {piece.end}, want finite values from 0")
        alike = piece.shape != "constant" or piece.start == piece.end
        check(alike, f"{where} is constant but goes from {piece.start} to {piece.end}, want one value")
        begin = int(piece.until)


def _whole(value: float, least: int) -> bool:
    return math.isfinite(value) and value >= least and int(value) == value


def _tokens(function: str, tokens: int) -> int:
    check(_whole(tokens, 0), f"{function}: `tokens` is {tokens}, want a whole number from 0")
    return int(tokens)
