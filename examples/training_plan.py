"""Shows a training plan by tokens: the paper's, or the same for less.

Printed are the stages with their steps, counted exactly; every piece of what changes (learning rate, batch size, the
router's bias speed γ, MTP weight λ, balance weight α), with the step that it begins with; how far the warm-up in tokens is
from one in steps. A piece begins with the first step at or after its first token. The column shapes counts the batch sizes
of a stage, for each of which a compiled step is made anew; beyond counts the tokens that its last step reads after its end.

Without flags it is the plan of DeepSeek-V3: 14.8T tokens and two stages that extend the context. --tokens, --batch_size,
--seq_len and --learning_rate scale it: each flag is the new value of the first stage, or the largest, and all others follow
in proportion. A plan that cannot be, such as one with a stage shorter than a step, is refused.

Examples:

  python examples/training_plan.py
  python examples/training_plan.py --draw=plan.png                             # or .svg
  python examples/training_plan.py --values_at=0 --values_at=14.3e12           # everything that a step then trains with
  python examples/training_plan.py --tokens=2e9 --batch_size=256 --seq_len=512 --learning_rate=1e-3 --batch_multiple=8
  python examples/training_plan.py --tokens=2e6 --batch_size=32 --seq_len=128 --learning_rate=3e-3 \\
      --context_steps=8 --warmup_steps=10
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import math
import sys
from pathlib import Path

from absl import app, flags
from command import aligned, flag_parser

from dsv3.checks import check
from dsv3.train.schedule import CURVES, Piece, TrainSchedule, schedule_at
from dsv3.train.schedule_paper import PAPER_SCHEDULE, scale_schedule
from dsv3.train.schedule_plot import plot_schedule
from dsv3.train.schedule_steps import StageSteps, run_step_from, schedule_runs, schedule_steps, tokens_at_step

FLAGS = flags.FLAGS
SCALES = ("tokens", "batch_size", "seq_len", "learning_rate", "batch_multiple", "warmup_steps", "context_steps")
NAMES = dict(zip(CURVES, ("learning rate", "sequences of a step", "γ, bias speed", "λ, MTP weight", "α, balance weight")))

flags.DEFINE_float("tokens", None, "Tokens of the first stage, pretraining; later stages come on top. Default: 14.8e12.")
flags.DEFINE_integer("batch_size", None, "The largest batch, in sequences.")
flags.DEFINE_integer("seq_len", None, "Tokens of a sequence in the first stage.")
flags.DEFINE_float("learning_rate", None, "The highest learning rate.")
flags.DEFINE_integer("batch_multiple", None, "Batch sizes are multiples of it. Default: 96, with --batch_size 1.")
flags.DEFINE_integer("warmup_steps", None, "Steps of warm-up, instead of its share of the tokens.")
flags.DEFINE_integer("context_steps", None, "Steps of each later stage, instead of its share of the tokens.")
flags.DEFINE_multi_float("values_at", [], "Also print what a step after so many tokens trains with; may be repeated.")
flags.DEFINE_string("draw", None, "File to draw the plan to, .png or .svg.")


def main(argv: list[str]) -> int:
    """Shows the plan; returns the exit code: 2 for bad input."""
    try:
        check_flags(argv)
        schedule = read_schedule()
        stages = schedule_steps(schedule)
        blocks = [stage_table(schedule, stages), piece_table(schedule), *warmup_lines(schedule)]
        blocks += [values_table(schedule)] if FLAGS.values_at else []
        print("\n\n".join(blocks))
        if FLAGS.draw:
            print(f"\ndrawn to {plot_schedule(schedule, FLAGS.draw)}")
    except (ValueError, OSError) as error:
        print(f"training_plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def check_flags(argv: list[str]) -> None:
    """Checks what `scale_schedule` does not look at."""
    check(len(argv) == 1, f"argument {argv[1:2]}, want flags only (--help shows examples)")
    if FLAGS.draw:
        path = Path(FLAGS.draw)
        check(path.suffix in (".png", ".svg"), f"--draw ends in {path.suffix or FLAGS.draw!r}, want .png or .svg")
        check(path.parent.is_dir(), f"--draw is {FLAGS.draw}, but there is no folder {str(path.parent)!r}")
    for tokens in FLAGS.values_at:
        whole = math.isfinite(tokens) and tokens >= 0 and tokens == int(tokens)
        check(whole, f"--values_at is {tokens:g}, want a whole number of tokens from 0")


def read_schedule() -> TrainSchedule:
    """The paper's plan, or what the flags make of it."""
    given = {name: FLAGS[name].value for name in SCALES if FLAGS[name].value is not None}
    if not given:
        return PAPER_SCHEDULE
    return scale_schedule(PAPER_SCHEDULE, **{"tokens": PAPER_SCHEDULE.stages[0].until, **given})


def stage_table(schedule: TrainSchedule, stages: tuple[StageSteps, ...]) -> str:
    """A line for each stage; `beyond` is what its last step reads beyond its end."""
    rows = [["stage", "length", "YaRN", "sequences", "shapes", "steps", "from step", "tokens", "from token", "beyond"]]
    for stage, found in zip(schedule.stages, stages):
        sizes = found.batch_sizes
        batch = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        yarn = "-" if stage.yarn_factor is None else f"{stage.yarn_factor:g}"
        beyond = found.start + found.tokens - int(stage.until)
        counts = [len(sizes), found.steps, found.first, found.tokens, found.start, beyond]
        rows.append([found.name, f"{found.seq_len:,}", yarn, batch, *(f"{count:,}" for count in counts)])
    steps, tokens = sum(found.steps for found in stages), sum(found.tokens for found in stages)
    rows.append(["all", "", "", "", "", f"{steps:,}", "", f"{tokens:,}", "", ""])
    return aligned(rows)


def piece_table(schedule: TrainSchedule) -> str:
    """A line for each piece of a curve, in the order in which they begin."""
    runs, found = tuple(schedule_runs(schedule)), []
    for name in CURVES:
        begin = 0
        for piece in getattr(schedule, name):
            step = run_step_from(runs, begin)
            last = run_step_from(runs, min(int(piece.until), schedule.total_tokens))
            found.append((begin, CURVES.index(name), [NAMES[name], course(piece)], step, last.step - step.step))
            begin = int(piece.until)
    rows = [["what", "course", "from token", "from step", "which begins at", "steps"]]
    for begin, _, words, step, steps in sorted(found):
        rows.append([*words, f"{begin:,}", f"{step.step:,}", f"{step.tokens:,}", f"{steps:,}"])
    return aligned(rows, left=2)


def course(piece: Piece) -> str:
    """A piece in words."""
    if piece.shape == "constant":
        return f"{piece.start:.6g}"
    return f"{piece.start:.6g} to {piece.end:.6g}, {piece.shape}"


def warmup_lines(schedule: TrainSchedule) -> list[str]:
    """How far a warm-up that is linear in tokens is from one that is linear in steps; nothing without a warm-up."""
    warm = schedule.learning_rate[0]
    if warm.shape != "linear" or warm.start != 0 or warm.end <= 0:
        return []
    steps = run_step_from(schedule_runs(schedule), int(warm.until)).step
    starts = [tokens_at_step(schedule, step) for step in range(0, steps, max(1, steps // 1000))]
    below = [i * max(1, steps // 1000) / steps - start / warm.until for i, start in enumerate(starts)]
    most = max(below)
    at = below.index(most) * max(1, steps // 1000)
    return [
        f"warm-up: {steps:,} steps, {int(warm.until):,} tokens. Linear in tokens the learning rate is up to {most:.2%} of\n"
        f"its peak below one that is linear in steps (at step {at:,}), as the batch grows meanwhile"
    ]


def values_table(schedule: TrainSchedule) -> str:
    """A line for each of --values_at."""
    head = ["at token", "stage", "learning rate", "sequences", "length", "YaRN", "γ", "λ", "α", "next step"]
    rows, runs = [head], tuple(schedule_runs(schedule))
    for tokens in FLAGS.values_at:
        now = schedule_at(schedule, tokens)
        yarn = "-" if now.yarn_factor is None else f"{now.yarn_factor:g}"
        weights = [f"{value:g}" for value in (now.bias_rate, now.mtp_weight, now.balance_weight)]
        step = run_step_from(runs, int(tokens)).step
        shape = [f"{now.learning_rate:.6g}", f"{now.batch_size:,}", f"{now.seq_len:,}", yarn]
        rows.append([f"{int(tokens):,}", schedule.stages[now.stage].name, *shape, *weights, f"{step:,}"])
    return aligned(rows)


parse_flags = flag_parser("training_plan")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
