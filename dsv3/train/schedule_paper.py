"""The paper's training plan as data, the same plan for less, the architecture of its stages; and how it fine-tunes.

What sections 4.2 and 4.3 of DeepSeek-V3 leave open is decided here, and said in `paper_schedule`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from dsv3.checks import check
from dsv3.config import ModelConfig, YarnConfig
from dsv3.train.schedule import CURVES, Curve, Piece, Stage, TrainSchedule, batch_run, schedule_at
from dsv3.train.schedule_steps import run_step_from, schedule_runs, schedule_steps, tokens_at_step


def paper_schedule() -> TrainSchedule:
    """Returns the paper's plan: 14.8T tokens of pretraining, then two stages that extend the context.

    Left open by the paper, and taken so:

    - The warm-up is of 2K steps. Here it is linear in tokens, over as many as 2,000 steps of the ramp read.
    - The batch size is "gradually increased": linearly in tokens, in multiples of 96, the greatest common divisor of the
      four sizes that are given.
    - Bias speed, MTP weight and balance weight of the context stages: what pretraining ends with.
    - Plain RoPE in pretraining.

    References: DeepSeek-V3 section 4.2 "Hyper-Parameters", "Training Hyper-Parameters", and section 4.3.
    """
    billion, k = 10**9, 1024
    least, most = 3072, 15_360
    switch = 10_000 * billion  # of λ; the learning rate begins to fall
    settled = switch + 4_300 * billion  # the learning rate has fallen; biases stay as they are
    last_rate = settled + 333 * billion
    total = last_rate + 167 * billion
    stages, batches = [Stage("pretraining", total, 4 * k)], []
    for name, length, size in (("context 8x", 32 * k, 1920), ("context 32x", 128 * k, 480)):
        until = stages[-1].until + 1000 * size * length
        stages.append(Stage(name, until, length, yarn_factor=40.0))
        batches.append(Piece(until, size, size))
    ramp = Piece(469 * billion, least, most, "linear")
    peak, low, final = 2.2e-4, 2.2e-5, 7.3e-6
    end = stages[-1].until
    rate = (
        Piece(switch, peak, peak), Piece(settled, peak, low, "cosine"), Piece(last_rate, low, low), Piece(end, final, final)
    )  # fmt: skip
    without = TrainSchedule(
        learning_rate=rate,
        batch_size=(ramp, Piece(total, most, most), *batches),
        bias_rate=(Piece(settled, 1e-3, 1e-3), Piece(end, 0.0, 0.0)),
        mtp_weight=(Piece(switch, 0.3, 0.3), Piece(end, 0.1, 0.1)),
        balance_weight=(Piece(end, 1e-4, 1e-4),),
        stages=tuple(stages),
        batch_multiple=math.gcd(least, most, *(int(piece.end) for piece in batches)),
    )
    return _with_warmup("paper_schedule", without, 2000)


def _with_warmup(function: str, schedule: TrainSchedule, steps: int) -> TrainSchedule:
    """A linear warm-up over the tokens of so many steps, in place of one that is there."""
    pieces = schedule.learning_rate
    pieces = pieces[1:] if pieces[0].shape == "linear" and not pieces[0].start and len(pieces) > 1 else pieces
    until = tokens_at_step(schedule, steps)
    check(
        until < pieces[0].until,
        f"{function}: {steps} steps of warm-up end at {until:,} tokens, want less than {pieces[0].until:,}, where the "
        "learning rate's next piece ends",
    )
    warm = (Piece(until, 0.0, pieces[0].start, "linear"),) if steps else ()
    return dataclasses.replace(schedule, learning_rate=(*warm, *pieces))


PAPER_SCHEDULE = paper_schedule()
PAPER_START = schedule_at(PAPER_SCHEDULE, 0)
"""What the paper begins with; λ, α and γ are the training step's defaults."""


class FineTuning(NamedTuple):
    """How often fine-tuning sees its data, `epochs`, and the learning rate at the beginning and at the end."""

    epochs: float
    first: float
    last: float

    def learning_rate(self, tokens: int, warmup_tokens: int = 0) -> Curve:
        """Returns a cosine in tokens from `first` to `last`, behind a linear warm-up if there is to be one; both end within
        the run's `tokens`."""
        warm = (Piece(warmup_tokens, 0.0, self.first, "linear"),) if warmup_tokens else ()
        return (*warm, Piece(tokens, self.first, self.last, "cosine"))


PAPER_SFT = FineTuning(epochs=2.0, first=5e-6, last=1e-6)
"""DeepSeek-V3 section 5.1. Documents of a row are kept apart; of a warm-up or a batch size nothing is said."""


def scale_schedule(
    schedule: TrainSchedule,
    *,
    tokens: int,
    batch_size: int | None = None,
    seq_len: int | None = None,
    learning_rate: float | None = None,
    batch_multiple: int | Sequence[int] | None = None,
    warmup_steps: int | None = None,
    context_steps: int | None = None,
) -> TrainSchedule:
    """Returns the same plan for another number of tokens: `schedule_at(scaled, f·t) = schedule_at(schedule, t)`.

    With f the ratio of tokens, every border of a piece or stage is multiplied by f, to the nearest token. Batch sizes,
    sequence lengths and learning rates are multiplied by ratios of their own. λ, α, γ and YaRN's factor stay; γ is a step's,
    and there are fewer steps.

    Args:
      schedule: the plan, such as `PAPER_SCHEDULE`.
      tokens: of the first stage, for the paper the 14.8T of pretraining; later stages come on top in their proportion.
      batch_size: the largest, in sequences; the others in proportion, rounded to `batch_multiple`. Default: as it is.
      seq_len: of the first stage; the others in proportion. Default: as it is.
      learning_rate: the highest; the others in proportion. Default: as it is.
      batch_multiple: for instance micro-batches times devices that share a batch out. Default: the schedule's, with another
        batch size 1; several numbers: one for each stage. The ramp has as many shapes as multiples, and for each a compiled
        step is made anew, unless they are micro-batches of one shape.
      warmup_steps: instead of the warm-up's share of the tokens.
      context_steps: of each stage after the first, instead of its share. Few tokens give a share that is less than a step.

    Returns:
      `TrainSchedule`.

    Raises:
      ValueError: what cannot be: a batch size nearer to 0 than to `batch_multiple`, a sequence that is no whole number of
        tokens, a stage or a curve's piece in which no step begins.
    """
    name = "scale_schedule"
    given = {"tokens": tokens, "batch_size": batch_size, "seq_len": seq_len, "learning_rate": learning_rate}
    for argument, value in given.items():
        check(value is None or (math.isfinite(value) and value > 0), f"{name}: `{argument}` is {value}, want above 0")
    steps_given = {"warmup_steps": (warmup_steps, 0), "context_steps": (context_steps, 1)}
    for argument, (value, least) in steps_given.items():
        check(value is None or value >= least, f"{name}: `{argument}` is {value}, want at least {least}")
    check(int(tokens) == tokens, f"{name}: `tokens` is {tokens}, want a whole number")
    ratio = Fraction(int(tokens), int(schedule.stages[0].until))
    single = batch_multiple is None or isinstance(batch_multiple, int)
    _check_batch(schedule, batch_size, (batch_multiple or 1) if single else 1)
    multiple = batch_multiple if single else tuple(batch_multiple)
    moved = _move(schedule, lambda until: math.floor(until * ratio + Fraction(1, 2)))
    length = Fraction(seq_len or schedule.stages[0].seq_len) / schedule.stages[0].seq_len
    largest = {curve: max(max(p.start, p.end) for p in getattr(schedule, curve)) for curve in CURVES}
    scaled = dataclasses.replace(
        moved,
        learning_rate=_times(moved.learning_rate, learning_rate, largest["learning_rate"]),
        batch_size=_times(moved.batch_size, batch_size, largest["batch_size"]),
        stages=tuple(dataclasses.replace(stage, seq_len=_length(stage, length)) for stage in moved.stages),
        batch_multiple=multiple if multiple is not None else 1 if batch_size else schedule.batch_multiple,
    )
    if context_steps is not None and len(scaled.stages) > 1:
        scaled = _with_stage_steps(scaled, context_steps)
    if warmup_steps is not None:
        scaled = _with_warmup(name, scaled, warmup_steps)
    _check_reached(name, scaled)
    return scaled


def _times(curve: Curve, largest: float | None, now: float) -> Curve:
    """A curve whose largest value becomes another."""
    if largest is None or largest == now:
        return curve
    return tuple(piece._replace(start=piece.start / now * largest, end=piece.end / now * largest) for piece in curve)


def _check_batch(schedule: TrainSchedule, batch_size: int | None, multiple: int) -> None:
    if batch_size is None:
        return
    values = [Fraction(value) for piece in schedule.batch_size for value in (piece.start, piece.end)]
    least = batch_size * min(values) / max(values)
    want = math.ceil(multiple * max(values) / min(values) / 2)
    check(
        2 * least >= multiple,
        f"scale_schedule: `batch_size` is {batch_size}, which makes {float(least):g} sequences of the smallest batch, "
        f"nearer to none than to batch_multiple={multiple}; want at least {want}",
    )


def _length(stage: Stage, ratio: Fraction) -> int:
    length = stage.seq_len * ratio
    check(
        length.denominator == 1 and length >= 1,
        f"scale_schedule: `seq_len` makes sequences of {float(length):g} tokens in stage {stage.name!r}, want whole ones",
    )
    return int(length)


def _move(schedule: TrainSchedule, place: Callable[[int], int]) -> TrainSchedule:
    """Puts every border of a piece or stage elsewhere."""

    def pieces(name: str) -> Curve:
        placed = tuple(piece._replace(until=place(int(piece.until))) for piece in getattr(schedule, name))
        begin = 0
        for number, piece in enumerate(placed, 1):
            what = f"piece {number} of `{name}` becomes shorter than a token"
            check(piece.until > begin, f"scale_schedule: {what}; want more `tokens`")
            begin = piece.until
        return placed

    curves = {name: pieces(name) for name in CURVES}
    stages = tuple(dataclasses.replace(stage, until=place(int(stage.until))) for stage in schedule.stages)
    return dataclasses.replace(schedule, **curves, stages=stages)


def _with_stage_steps(schedule: TrainSchedule, steps: int) -> TrainSchedule:
    """Gives every stage but the first `steps` whole steps; what lies in a stage moves with it."""
    ends = [0, *(int(stage.until) for stage in schedule.stages)]
    only_first = dataclasses.replace(schedule, stages=schedule.stages[:1], batch_multiple=schedule.multiples[0])
    (first,) = schedule_steps(only_first)
    new, seen = [0, ends[1]], first.tokens
    for begin, stage in zip(ends[1:], schedule.stages[1:]):
        size, change = batch_run(schedule, begin)
        check(
            change is None or change >= stage.until,
            f"scale_schedule: the batch size changes in stage {stage.name!r}, want one size for `context_steps`",
        )
        seen += steps * size * stage.seq_len
        new.append(seen)

    def place(until: int) -> int:
        at = next((i for i, end in enumerate(ends) if until <= end), len(ends) - 1)
        if until >= ends[at]:
            return new[at] + until - ends[at]
        return new[at - 1] + (until - ends[at - 1]) * (new[at] - new[at - 1]) // (ends[at] - ends[at - 1])

    return _move(schedule, place)


def _check_reached(function: str, schedule: TrainSchedule) -> None:
    """Every stage and every piece of a curve has a step that begins in it: else a part of the plan would be lost unseen."""
    runs = tuple(schedule_runs(schedule))  # it refuses a stage without a step
    for name in CURVES:
        begin = 0
        for number, piece in enumerate(getattr(schedule, name), 1):
            if begin >= schedule.total_tokens:
                break
            found = run_step_from(runs, begin)
            check(
                found.tokens < piece.until,
                f"{function}: no step begins in piece {number} of `{name}`, from {begin:,} to {piece.until:,} tokens: step "
                f"{found.step:,} begins at {found.tokens:,}; want more `tokens` or a smaller batch (a warm-up or context "
                "stage may be given in steps)",
            )
            begin = int(piece.until)


def stage_config(cfg: ModelConfig, schedule: TrainSchedule, stage: int) -> ModelConfig:
    """Returns the architecture of a stage: sequences of its length, plain RoPE or YaRN.

    YaRN stretches the longest context that was trained without it (`original_max_position_embeddings`). With factor s the
    model is made for s times that, of which a stage may train less, as the paper's 128K of 160K. Parameters are the same in
    all stages.

    Args:
      cfg: any stage's configuration; its YaRN settings, if it has some, are kept but for factor and length.
      schedule: the schedule.
      stage: index into its stages, see `ScheduleValues`.

    Raises:
      ValueError: no such stage, or one with longer sequences than its YaRN factor reaches.

    References: DeepSeek-V3 section 4.3; arXiv:2309.00071.

    >>> import dsv3
    >>> stage_config(dsv3.preset("deepseek-v3-pretrain"), PAPER_SCHEDULE, 2) == dsv3.preset("deepseek-v3")
    True
    """
    count = len(schedule.stages)
    check(0 <= stage < count, f"stage_config: `stage` is {stage}, want 0 to {count - 1}")
    here, rope = schedule.stages[stage], cfg.mla.rope
    yarn, length = None, here.seq_len
    if here.yarn_factor is not None:
        original = _original_length(cfg, schedule.stages)
        length = math.floor(here.yarn_factor * original)
        check(
            here.seq_len <= length,
            f"stage_config: stage {here.name!r} has sequences of {here.seq_len} tokens, want at most {length}: "
            f"YaRN's factor {here.yarn_factor:g} times the original length {original}",
        )
        given = rope.yarn or YarnConfig(here.yarn_factor)
        yarn = dataclasses.replace(given, factor=float(here.yarn_factor), original_length=original)
    rope = dataclasses.replace(rope, yarn=yarn, max_length=length)
    return dataclasses.replace(cfg, max_length=length, mla=dataclasses.replace(cfg.mla, rope=rope))


def _original_length(cfg: ModelConfig, stages: Sequence[Stage]) -> int:
    """The longest context without YaRN: of the stages, or of a model that comes trained."""
    plain = [stage.seq_len for stage in stages if stage.yarn_factor is None]
    if plain:
        return max(plain)
    return cfg.mla.rope.yarn.original_length if cfg.mla.rope.yarn else cfg.max_length
