"""Shows a pipeline schedule: its table, its bubble and activations beside the formulas, a picture.

--schedule is one of gpipe, one_f_one_b, interleaved, zb1p, dualpipe and dualpipe_v. A rank has one stage (interleaved:
--chunks shorter ones; dualpipe and dualpipe_v: two). --forward, --backward and --weight are the times of one stage for one
micro-batch: F, the full backward B, and the part W of B that is for the weights; with interleaved, of a rank's stages
together.

The table's columns: bubble, the longest idle time of a rank as simulated; published, what the literature's formula gives;
exact, what dsv3's formula gives, or "-" where its conditions do not hold; activations, the most that a rank holds, in stages
times micro-batches; stages, whose parameters a rank holds; copies of each parameter; makespan; idle, the idle part of all
ranks' time. The grid shows unit times (F 1, B 2, overlapped pair 3): what is in a cell is said below it.

Examples:

  python examples/schedule.py                                        # DualPipe, 8 ranks, 20 micro-batches
  python examples/schedule.py --micro_batches=24 --compare --nogrid  # beside all others of as many stages
  python examples/schedule.py --draw=dualpipe.svg                    # or .png
  python examples/schedule.py --schedule=zb1p --ranks=4 --micro_batches=8 --weight=0.5
  python examples/schedule.py --overlapped=2.5 --send=0.1            # F&B < F + B; messages take time
  python examples/schedule.py --pieces=1,1,1,1 --draw=pieces.png     # attention, dispatch, experts, combine of a layer

With --pieces a stage is --layers layers of four pieces, whose backwards take as long as their forwards for the input and
again for the weights; the times of whole tasks follow from them, and --draw shows computation and communication in two
lines.
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import sys
from pathlib import Path

from absl import app, flags
from command import aligned, flag_parser

from dsv3.checks import check
from dsv3.pipeline import (
    SCHEDULES,
    PieceTimes,
    Schedule,
    Times,
    chunk_times,
    draw,
    expand_pieces,
    expected,
    schedule_check,
    simulate,
    simulate_pieces,
)

FLAGS = flags.FLAGS
HEADINGS = ["schedule", "ranks", "bubble", "published", "exact", "activations", "stages", "copies", "makespan", "idle"]

flags.DEFINE_enum("schedule", "dualpipe", list(SCHEDULES), "Which schedule.")
flags.DEFINE_integer("ranks", 8, "Devices.")
flags.DEFINE_integer("micro_batches", 20, "Micro-batches of a step, both directions of dualpipe together.")
flags.DEFINE_integer("chunks", 2, "Virtual stages on each rank of interleaved.")
flags.DEFINE_float("forward", 1.0, "F, the time of a forward.")
flags.DEFINE_float("backward", 2.0, "B, the time of a full backward.")
flags.DEFINE_float("weight", 1.0, "W, the time of the backward's part for the weights.")
flags.DEFINE_float("overlapped", None, "F&B, the time of an overlapped forward and backward. Default: F + B.")
flags.DEFINE_float("send", 0.0, "Time of a message to another rank.")
flags.DEFINE_bool("compare", False, "List the other schedules too, with as many stages (interleaved: times --chunks).")
flags.DEFINE_bool("grid", True, "Print the table as text.")
flags.DEFINE_list("pieces", None, "Four times of a layer: attention,dispatch,experts,combine. They replace the times above.")
flags.DEFINE_integer("layers", 1, "Layers of a stage, for --pieces.")
flags.DEFINE_string("draw", None, "File to draw to, .svg or .png.")


def main(argv: list[str]) -> int:
    """Shows what the flags ask for; returns the exit code: 2 for bad input."""
    try:
        check(len(argv) == 1, f"argument {argv[1:2]}, want flags only (--help shows examples)")
        ending = Path(FLAGS.draw or ".svg").suffix or FLAGS.draw
        check(not FLAGS.draw or ending in (".svg", ".png"), f"--draw ends in {ending!r}, want .svg or .png")
        pieces = read_pieces()
        times = read_times(pieces)
        schedule = make(FLAGS.schedule, FLAGS.ranks)
        schedule_check(schedule)
        show_table(schedule, times)
        if FLAGS.grid:
            print(f"\n{schedule}")
        picture = simulate(schedule, stage_times(schedule, times))
        if pieces:
            picture = simulate_pieces(expand_pieces(schedule, layers=FLAGS.layers), pieces)
            show_pieces(picture, times)
        if FLAGS.draw:
            print(f"\ndrawn to {draw(picture, FLAGS.draw)}")
    except (ValueError, OSError) as error:
        print(f"schedule: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def read_pieces() -> PieceTimes | None:
    """Returns the times of --pieces."""
    if FLAGS.pieces is None:
        return None
    try:
        values = [float(value) for value in FLAGS.pieces]
    except ValueError:
        values = []
    check(len(values) == 4, f"--pieces is {','.join(FLAGS.pieces)}, want four numbers: attention,dispatch,experts,combine")
    check(FLAGS.schedule != "interleaved", "--pieces is not for interleaved, whose ranks have several shorter stages")
    return PieceTimes(*values, send=FLAGS.send)


def read_times(pieces: PieceTimes | None) -> Times:
    """Returns the times of one stage's tasks."""
    if pieces:
        return chunk_times(pieces, layers=FLAGS.layers)
    return Times(FLAGS.forward, FLAGS.backward, FLAGS.weight, FLAGS.overlapped, FLAGS.send)


def make(name: str, ranks: int) -> Schedule:
    """Returns a schedule of the flags' sizes."""
    more = {"chunks": FLAGS.chunks} if name == "interleaved" else {}
    return SCHEDULES[name](ranks, FLAGS.micro_batches, **more)


def stage_times(schedule: Schedule, times: Times) -> Times:
    """Returns the times of a schedule's stages: those of interleaved are shorter."""
    if schedule.name != "interleaved":
        return times
    part = schedule.stages // schedule.ranks
    return Times(times.forward / part, times.backward / part, times.weight / part, send=times.send)


def show_table(schedule: Schedule, times: Times) -> None:
    """Prints a line for the schedule, and with --compare one for each other of as many stages."""
    rows = [HEADINGS, figures(schedule, times)]
    refused = []
    if FLAGS.compare:
        stages = schedule.stages if schedule.name != "interleaved" else schedule.ranks
        rows, rank_counts = [HEADINGS], dict.fromkeys(SCHEDULES, stages) | {"dualpipe_v": stages // 2}
        for name, ranks in rank_counts.items():
            try:
                check(name != "dualpipe_v" or stages % 2 == 0, f"dualpipe_v: {stages} stages, want an even number")
                rows.append(figures(make(name, ranks), times))
            except ValueError as error:
                refused.append(f"not listed: {error}")
    print(aligned(rows))
    print(*refused, sep="\n", end="\n" if refused else "")


def figures(schedule: Schedule, times: Times) -> list[str]:
    """Returns a schedule's line of the table."""
    times = stage_times(schedule, times)
    found = simulate(schedule, times)
    chunks = schedule.stages // schedule.ranks if schedule.name == "interleaved" else 1
    want = expected(schedule.name, schedule.ranks, schedule.micro_batches, times, chunks=chunks)
    peak = int(found.peak_activations.max())
    exact = "-" if want.exact is None else f"{want.exact:g}"
    numbers = [schedule.ranks, f"{found.bubble:g}", f"{want.bubble:g}", exact, peak, want.stages_per_rank, want.copies]
    return [schedule.name, *map(str, numbers), f"{found.makespan:g}", f"{found.bubble_fraction:.1%}"]


def show_pieces(found, times: Times) -> None:
    """Prints how much communication the pieces' order hides."""
    exposed = " ".join(f"{value:g}" for value in found.exposed)
    apart = times.forward + times.backward
    print(f"\npieces: makespan {found.makespan:g}; {found.hidden_fraction:.1%} of the communication runs beside computation")
    print(f"exposed communication by rank: {exposed}; of {found.communication.max():g}")
    print(f"a pair alone takes F&B = {times.overlapped:g}, one after the other F + B = {apart:g}")


parse_flags = flag_parser("schedule")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
