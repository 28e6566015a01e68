"""Context extension as a plan: the paper's last two stages behind any training, or behind a model that comes trained."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.checks import check
from dsv3.train.schedule import CURVES, Curve, Piece, Stage, TrainSchedule, schedule_at
from dsv3.train.schedule_paper import PAPER_SCHEDULE
from dsv3.train.schedule_steps import schedule_steps

_LATE = schedule_at(PAPER_SCHEDULE, PAPER_SCHEDULE.total_tokens)
CONTEXT_FACTORS = (8, 32)
YARN_FACTOR = 40.0
CONTEXT_LR_SHARE = _LATE.learning_rate / max(piece.end for piece in PAPER_SCHEDULE.learning_rate)
"""The learning rate of the context stages over the highest one: a thirtieth."""


def context_schedule(
    before: TrainSchedule | None = None,
    *,
    seq_len: int,
    batch_size: int,
    steps: int,
    learning_rate: float,
    warmup_steps: int = 0,
    factors: Sequence[int] = CONTEXT_FACTORS,
    yarn_factor: float = YARN_FACTOR,
    batch_multiple: Sequence[int] | None = None,
) -> TrainSchedule:
    """Returns a training's schedule with stages of longer contexts behind it, as the paper has them.

    A stage has sequences `factor · seq_len` long and about as many tokens a step as `batch_size` sequences of `seq_len`: a
    whole number of `batch_multiple`, at least one. λ, α and γ are those of the paper's context stages: 0.1, 1e-4 and 0.

    Args:
      before: the training of before, without YaRN, which ends with sequences of `seq_len`; `None`: the model comes trained.
      seq_len: tokens of a sequence that the model knows, which YaRN stretches.
      batch_size: sequences of that length in a step.
      steps: of each stage.
      learning_rate: constant.
      warmup_steps: of these, in the first stage, if nothing comes before: a new optimiser's moments are of few gradients.
      factors: of the stages.
      yarn_factor: of all of them, at least the largest factor.
      batch_multiple: as of `TrainSchedule`, one for each stage behind `before`. Default: 1.

    Returns:
      `TrainSchedule`.

    Raises:
      ValueError: numbers that are too small, factors that do not grow, a YaRN factor below the largest.

    References: DeepSeek-V3 section 4.3.

    >>> found = context_schedule(seq_len=128, batch_size=64, steps=10, learning_rate=1e-3)
    >>> [(stage.seq_len, schedule_at(found, stage.until - 1).batch_size) for stage in found.stages]
    [(1024, 8), (4096, 2)]
    """
    name = "context_schedule"
    for argument, value in (("seq_len", seq_len), ("batch_size", batch_size), ("steps", steps)):
        check(value >= 1, f"{name}: `{argument}` is {value}, want at least 1")
    check(0 <= warmup_steps < steps, f"{name}: `warmup_steps` is {warmup_steps}, want 0 to below `steps`={steps}")
    check(learning_rate > 0, f"{name}: `learning_rate` is {learning_rate}, want above 0")
    growing = list(factors) == sorted(set(factors)) and min(factors, default=0) > 1
    check(growing, f"{name}: `factors` is {tuple(factors)}, want growing ones above 1")
    check(yarn_factor >= factors[-1], f"{name}: `yarn_factor` is {yarn_factor:g}, want at least {factors[-1]}, by `factors`")
    multiples = tuple(batch_multiple or (1,) * len(factors))
    check(min(multiples, default=0) >= 1, f"{name}: `batch_multiple` is {multiples}, want at least 1 each")
    check(len(multiples) == len(factors), f"{name}: `batch_multiple` has {len(multiples)} numbers, want {len(factors)}")
    stages, curves, begin = (), {curve: () for curve in CURVES}, 0
    if before is not None:
        check(not warmup_steps, f"{name}: `warmup_steps` is {warmup_steps}, want 0 behind a training")
        ends, yarn = before.stages[-1].seq_len, any(stage.yarn_factor for stage in before.stages)
        check(ends == seq_len and not yarn, f"{name}: `before` wants sequences of {seq_len} tokens at its end and no YaRN")
        begin = before.total_tokens
        stages, curves = before.stages, {curve: _until(getattr(before, curve), begin) for curve in CURVES}
        last = schedule_steps(before)[-1]
        begin = last.start + last.tokens
        multiples = (*before.multiples, *multiples)
    for factor, multiple in zip(factors, multiples[-len(factors):]):
        length = factor * seq_len
        size = max(1, round(batch_size / factor / multiple)) * multiple
        warm = begin + warmup_steps * size * length
        begin += steps * size * length
        stages = (*stages, Stage(f"context {factor}x", begin, length, yarn_factor=yarn_factor))
        late = {"bias_rate": _LATE.bias_rate, "mtp_weight": _LATE.mtp_weight, "balance_weight": _LATE.balance_weight}
        for curve, value in {**late, "learning_rate": learning_rate, "batch_size": size}.items():
            if curve == "learning_rate" and warmup_steps and factor == factors[0]:
                curves[curve] = (*curves[curve], Piece(warm, 0.0, value, "linear"))
            curves[curve] = (*curves[curve], Piece(begin, value, value))
    return TrainSchedule(**curves, stages=stages, batch_multiple=multiples)


def _until(curve: Curve, end: int) -> Curve:
    """A curve that ends with its training."""
    kept = [piece for piece in curve if piece.until < end]
    rest = [piece for piece in curve if piece.until >= end][:1]
    if not rest:
        return (*kept, Piece(end, kept[-1].end, kept[-1].end))
    check(
        rest[0].until == end or rest[0].start == rest[0].end,
        "context_schedule: a curve of `before` goes on after its last stage, want it to end there or be constant",
    )
    return (*kept, rest[0]._replace(until=end))
