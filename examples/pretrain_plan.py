"""The plan of `pretrain.py`: what changes as tokens are seen, its stages, and how a batch is cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from command import aligned

from dsv3 import pipeline
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data import Mixture, MixtureUse, check_mixture
from dsv3.parallel.mesh import parse_axes
from dsv3.train.schedule import Piece, Stage, TrainSchedule, schedule_at, warmup_cosine
from dsv3.train.schedule_context import CONTEXT_FACTORS, CONTEXT_LR_SHARE, context_schedule
from dsv3.train.schedule_paper import PAPER_SCHEDULE, scale_schedule, stage_config
from dsv3.train.schedule_steps import StageSteps, schedule_runs, schedule_steps

FLAGS = flags.FLAGS
FINAL_LR = 0.1  # the cosine ends at this share of the peak, as in the paper
OWN = ("mtp_weight", "balance_weight", "bias_rate")  # what the paper's plan has curves for
SHAPING = "plan steps tokens batch_size accumulate seq_len context_steps".split()  # what batches depend on


def check_plan_flags(cfg: ModelConfig) -> None:
    """Checks the flags of the plan against each other and the model."""
    check(FLAGS.lr > 0, f"--lr is {FLAGS.lr}, want above 0")
    check(
        FLAGS.batch_size % FLAGS.accumulate == 0,
        f"--batch_size {FLAGS.batch_size} is not divisible by --accumulate {FLAGS.accumulate}",
    )
    decay = FLAGS.ema_decay
    check(decay is None or 0 < decay < 1, f"--ema_decay is {decay}, want a number above 0 and below 1")
    check(FLAGS.tokens is None or not FLAGS["steps"].present, "--tokens and --steps are both given, want one of them")
    if FLAGS.plan == "paper":
        for name in OWN:
            check(not FLAGS[name].present, f"--{name} is given, but --plan=paper has a curve for it")
        check(cfg.mla.rope.yarn is None, "--plan=paper extends the context itself, want a model without YaRN")
        check(FLAGS.init is None, "--plan=paper and --init are both given; want --plan=context, which goes on with a model")
        return
    only = {"yarn_factor": ("context",), "context_lr": ("context",)}
    only |= {"context_steps": ("paper", "context"), "batch_multiple": ("paper", "context")}
    for name, plans in only.items():
        fits = FLAGS.plan in plans or not FLAGS[name].present
        check(fits, f"--{name} is given, but --plan={FLAGS.plan}, want --plan={' or '.join(plans)}")
    if FLAGS.plan == "context":
        check_context_flags(cfg)
    check(FLAGS.seq_len <= cfg.max_length, f"--seq_len is {FLAGS.seq_len}, the model's maximum is {cfg.max_length}")
    a_step = FLAGS.batch_size * FLAGS.seq_len
    steps = FLAGS.steps if FLAGS.tokens is None else -(-FLAGS.tokens // a_step)
    what, most = ("--context_steps less one,", context_steps() - 1) if only_context() else ("--steps", steps)
    check(warmup_steps() <= most, f"--warmup_steps is {warmup_steps()}, want at most {what} {most}")


def check_context_flags(cfg: ModelConfig) -> None:
    """Checks the flags of --plan=context."""
    check(cfg.mla.rope.yarn is None, "--plan=context extends the context itself, want a model without YaRN")
    least = CONTEXT_FACTORS[-1]
    check(FLAGS.yarn_factor >= least, f"--yarn_factor is {FLAGS.yarn_factor:g}, want at least {least}, the longest stage's")
    rate = FLAGS.context_lr
    check(rate is None or 0 < rate < math.inf, f"--context_lr is {rate}, want a number above 0")
    for name in ("steps", "tokens"):
        given = FLAGS.init is not None and FLAGS[name].present
        check(not given, f"--{name} is given, but with --init and --plan=context there are only stages of --context_steps")
    for name in OWN:
        given = FLAGS.init is not None and FLAGS[name].present
        check(not given, f"--{name} is given, but the stages of --plan=context have the paper's")
    both = FLAGS.init is not None and FLAGS["lr"].present and rate is not None
    check(not both, "--lr and --context_lr are both given, but with --init there is one rate; want one of them")


def only_context() -> bool:
    """Whether a model that comes trained gets longer contexts, and nothing before."""
    return FLAGS.plan == "context" and FLAGS.init is not None


def context_steps() -> int:
    """Steps of a stage of --plan=context: as given, or a tenth of the training before it."""
    return FLAGS.context_steps or max(1, first_steps() // 10)


def first_steps() -> int:
    """Steps of the first stage, if all its batches are as large as the largest."""
    return FLAGS.steps if FLAGS.tokens is None else max(1, FLAGS.tokens // (FLAGS.batch_size * FLAGS.seq_len))


def warmup_steps() -> int:
    """Steps of warm-up: as given, or a twentieth of the run; a tenth of a context stage that it begins with."""
    if only_context():
        return context_steps() // 10 if FLAGS.warmup_steps is None else FLAGS.warmup_steps
    return first_steps() // 20 if FLAGS.warmup_steps is None else FLAGS.warmup_steps


def make_schedule(begun: Mapping[str, Any] | None = None) -> TrainSchedule:
    """The run's schedule, from the flags; a run that goes on has batches that are multiples of the same as in `begun`, its
    settings."""
    tokens = FLAGS.tokens or FLAGS.steps * FLAGS.batch_size * FLAGS.seq_len
    if FLAGS.plan == "paper":
        lengths = [stage.seq_len * FLAGS.seq_len // PAPER_SCHEDULE.stages[0].seq_len for stage in PAPER_SCHEDULE.stages]
        return scale_schedule(
            PAPER_SCHEDULE, tokens=tokens, batch_size=FLAGS.batch_size, seq_len=FLAGS.seq_len, learning_rate=FLAGS.lr,
            batch_multiple=batch_multiples([FLAGS.seq_len, *lengths[1:]], begun),
            warmup_steps=FLAGS.warmup_steps, context_steps=FLAGS.context_steps,
        )  # fmt: skip
    before = None if only_context() else cosine_schedule(tokens)
    if FLAGS.plan == "cosine":
        return before
    multiples = batch_multiples([factor * FLAGS.seq_len for factor in CONTEXT_FACTORS], begun)
    return context_schedule(
        before, seq_len=FLAGS.seq_len, batch_size=FLAGS.batch_size, steps=context_steps(),
        learning_rate=FLAGS.context_lr or CONTEXT_LR_SHARE * FLAGS.lr, warmup_steps=warmup_steps() if before is None else 0,
        yarn_factor=FLAGS.yarn_factor, batch_multiple=multiples,
    )  # fmt: skip


def cosine_schedule(tokens: int) -> TrainSchedule:
    """One stage of so many tokens: warm-up, cosine, and constants for the rest."""
    a_step = FLAGS.batch_size * FLAGS.seq_len
    rate = warmup_cosine(FLAGS.lr, warmup_tokens=warmup_steps() * a_step, total_tokens=tokens, final=FINAL_LR * FLAGS.lr)
    constant = {name: (Piece(tokens, FLAGS[name].value, FLAGS[name].value),) for name in OWN}
    size = (Piece(tokens, FLAGS.batch_size, FLAGS.batch_size),)
    stage = Stage("pretraining", tokens, FLAGS.seq_len)
    return TrainSchedule(learning_rate=rate, batch_size=size, stages=(stage,), **constant)


def mesh_shares() -> int:
    """Devices of --mesh that share the rows of a micro-batch out."""
    sizes = parse_axes(FLAGS.mesh) if FLAGS.mesh else {}
    return sizes.get("data", 1) * sizes.get("expert", 1)


def wanted_rows(seq_len: int) -> int:
    """Rows of a micro-batch as --accumulate has it: with longer sequences fewer, so that it has about as many tokens."""
    return max(1, FLAGS.batch_size // FLAGS.accumulate * FLAGS.seq_len // seq_len)


def batch_multiples(lengths: Sequence[int], begun: Mapping[str, Any] | None) -> list[int]:
    """What the batches of stages with sequences of these lengths are multiples of: a micro-batch that --batch_multiple, or
    the devices of --mesh, share in equal parts. A run that goes on keeps what it began with, whatever the mesh is now."""
    if begun is not None and FLAGS.batch_multiple is None:
        found = begun.get("batch_multiple")
        whole = isinstance(found, list) and all(isinstance(number, int) and number >= 1 for number in found)
        if whole and len(found) >= len(lengths) and all(begun.get(name) == FLAGS[name].value for name in SHAPING):
            return found[-len(lengths) :]
    shares = FLAGS.batch_multiple or mesh_shares()
    return [max(1, wanted_rows(length) // shares) * shares for length in lengths]


def micro_batch_rows(schedule: TrainSchedule) -> dict[int, int]:
    """Rows of a micro-batch by length of the sequences: as many as --accumulate says or a little fewer, so that they divide
    each batch of the stage and devices get equal parts.

    Raises:
      ValueError: the devices of --mesh cannot share some batch in equal parts.
    """
    shares, rows, sizes = mesh_shares(), {}, {}
    for run in schedule_runs(schedule):
        sizes[run.stage] = math.gcd(sizes.get(run.stage, 0), run.batch_size)
    for number, size in sizes.items():
        stage, both = schedule.stages[number], math.lcm(shares, math.gcd(*schedule.multiples[-len(CONTEXT_FACTORS) :]))
        check(
            size % shares == 0,
            f"batches of stage {stage.name!r} are multiples of {size}, want of {shares}, the devices on data and expert of "
            f"--mesh {FLAGS.mesh}; a run that fits these, too, begins with "
            f"--batch_multiple={both}{larger_batch(schedule, both)}",
        )
        most = max(1, wanted_rows(stage.seq_len) // shares)
        rows[stage.seq_len] = shares * max(n for n in range(1, most + 1) if size // shares % n == 0)
    return rows


def larger_batch(schedule: TrainSchedule, multiple: int) -> str:
    """What a run whose batches are multiples of so many needs besides: in the paper's plan each is at least half of one; a
    plan of contexts alone rounds up."""
    times = math.ceil(multiple / (2 * min(schedule.least_sizes))) if FLAGS.plan == "paper" else 1
    return f" and --batch_size={times * FLAGS.batch_size}" if times > 1 else ""


def batch_cutter(schedule: TrainSchedule) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns what cuts tokens and weights of a batch into micro-batches `[A, B, ...]`; without --accumulate they stay
    whole, if batches always have one size."""
    rows = micro_batch_rows(schedule)

    def cut(tokens: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if FLAGS.accumulate == 1 and FLAGS.plan == "cosine":
            return tokens, weights
        return tuple(part.reshape(-1, rows[tokens.shape[1] - 1], part.shape[-1]) for part in (tokens, weights))

    return cut


def stage_of(cfg: ModelConfig, schedule: TrainSchedule, stage: int) -> ModelConfig:
    """The architecture of a stage: plans with context stages extend the context, any other one leaves it as it is."""
    return cfg if FLAGS.plan == "cosine" else stage_config(cfg, schedule, stage)


def drawn(schedule: TrainSchedule, mixture: Mixture) -> MixtureUse:
    """What the run takes of each source; a source that runs dry is refused here, before the training.

    Batches that are left out for a spike come on top: there is to be room for those of two times that the run goes back.
    """

    def shape(tokens: int) -> tuple[int, int]:
        values = schedule_at(schedule, tokens)
        return values.batch_size, values.seq_len

    largest = max(run.step_tokens for run in schedule_runs(schedule))
    check_mixture(mixture, shape, schedule.total_tokens + 2 * FLAGS.patience * largest)
    return check_mixture(mixture, shape, schedule.total_tokens)


def check_micro_batches(schedule: TrainSchedule) -> None:
    """Refuses devices that cannot share a batch, and a pipeline's schedule that cannot order the micro-batches of a step."""
    ranks, rows = parse_axes(FLAGS.mesh).get("pipe", 1) if FLAGS.mesh else 1, micro_batch_rows(schedule)
    for run in schedule_runs(schedule):
        if FLAGS.plan != "cosine" and ranks > 1:
            pipeline.SCHEDULES[FLAGS.schedule](ranks, run.batch_size // rows[run.seq_len])


def stage_table(schedule: TrainSchedule) -> str:
    """The stages, for people."""
    rows = [("stage", "steps", "tokens", "batch", "length", "YaRN", "learning rate")]
    for found, stage in zip(schedule_steps(schedule), schedule.stages):
        sizes = found.batch_sizes
        batch = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        factor = "-" if stage.yarn_factor is None else f"{stage.yarn_factor:g}"
        rates = " ".join(f"{rate:.2e}" for rate in dict.fromkeys(_rates(schedule, found)))
        rows.append((found.name, f"{found.steps:,}", f"{found.tokens:,}", batch, f"{found.seq_len:,}", factor, rates))
    return aligned(rows)


def _rates(schedule: TrainSchedule, stage: StageSteps) -> Iterator[float]:
    """The learning rate at the beginning of a stage, its highest, and the last step's."""
    end = stage.start + stage.tokens
    rates = [schedule_at(schedule, stage.start + (stage.tokens - 1) * i // 64).learning_rate for i in range(65)]
    yield rates[0]
    yield max(rates)
    yield schedule_at(schedule, math.floor(end - stage.tokens / stage.steps)).learning_rate
