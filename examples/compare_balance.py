"""Trains one model with several ways to keep its experts balanced, and compares how even the load is and what it costs.

Every arm has the same model, the same batches in the same order and, for a seed, the same initial parameters. An arm is

  loss_free      the router's selection bias moves by γ a step, beside the paper's tiny sequence-wise balance loss
  loss_free:G    the same with γ = G instead of the paper's
  none           neither bias nor balance loss
  auxiliary:A    no bias, the balance loss alone, with weight A

Each run is one of pretrain.py, in a folder of its own under --out/runs, with its own report. A finished run is kept and not
trained again, so arms and seeds can be added, and an interrupted experiment goes on where it was. What stands after -- is
given to pretrain.py as it is, in the form --flag=value. It leaves

  runs/ARM-SEED/            a run of pretrain.py; runs/ARM-SEED.txt: what that printed
  balance.json, balance.txt the numbers of all finished runs, and the table
  balance.png               load and held-out loss over the steps
  report.html               everything on one page

The table's columns: γ and α, how far a step moves the bias and the weight of the balance loss; seeds, how many; bits/byte
and perplexity (a token's), of the held-out text, the mean over seeds; cost, how far the perplexity is above that of
loss_free with the same seed, in percent, the mean and, of several seeds, the smallest and the largest. Then, of the tokens
that each expert got in the last --window of the steps, in the worst layer of the worst seed: the busiest and the idlest
expert over the mean, the variance of load over mean, the entropy (1 is even), experts that got no token; even: whether every
expert is within 20% of the mean and the variance below 0.1; since, the step from which on that holds for every window that
ends there or later.

Examples:

  python examples/compare_balance.py
  python examples/compare_balance.py --data=runs/prepared --steps=1000 --seeds=0,1 -- --dtype=bfloat16
  python examples/compare_balance.py --arms=loss_free,loss_free:0.005,none,auxiliary:0.3 --corpus=book.txt --out=runs/book
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from balance_report import write_report
from balance_runs import AUXILIARY, LOSS_FREE, NONE, PAPER, Arm, is_finished
from command import flag_parser, lock_folder, write_text

from dsv3.checks import check

FLAGS = flags.FLAGS
SETTINGS = "settings.json"
OWN = "out seed steps data corpus bias_rate balance_weight fresh resume noresume".split()  # not to be passed on

flags.DEFINE_list(
    "arms", ["loss_free", "loss_free:0.005", "none", "auxiliary:0.01", "auxiliary:0.1"], "What to train; see above."
)
flags.DEFINE_list("seeds", ["0"], "Seeds of initial parameters and of the order of the data.")
flags.DEFINE_string("data", None, "Folder made by prepare_data.py. Default: --corpus, tokenised by each run.")
flags.DEFINE_string("corpus", None, "Text to train on: a file or a folder. Default: the running Python's own.")
flags.DEFINE_integer("steps", 600, "Optimiser steps of each run.", 10)
flags.DEFINE_float("window", 0.1, "Share of the steps, the last ones, whose load is looked at.", 0.0, 1.0)
flags.DEFINE_string("out", "runs/balance", "Folder of the runs and the report.")
flags.DEFINE_string("write_docs", None, "Folder with a balance.md, whose table is written anew, and balance.png beside it.")


class Job(NamedTuple):
    """A run: what to train, and where."""

    arm: Arm
    seed: int
    folder: Path


def main(argv: list[str]) -> int:
    """Trains what is missing and writes the report.

    Returns:
      The exit code: 2 for bad input, 1 if a run has failed, 128 + n when signal n has interrupted it.
    """
    try:
        arms, seeds = read_flags(argv)
        out = claim(Path(FLAGS.out), argv[1:])
        failed = 0
        for job in (Job(arm, seed, out / "runs" / f"{arm.folder}-{seed}") for seed in seeds for arm in arms):
            if not is_finished(job.folder):
                code, said = train(job, argv[1:])
                if code >= 128:
                    say("interrupted; the same command goes on where it was")
                    return code
                check(code != 2, f"{job.arm.name}, seed {job.seed}: {said}")
                if code:
                    say(f"{job.arm.name}, seed {job.seed}, has ended with {code}: {said}")
                    failed = 1
        docs = None if FLAGS.write_docs is None else Path(FLAGS.write_docs)
        print(write_report(out, FLAGS.window, docs))
    except (ValueError, OSError) as error:
        say(error)
        return 2
    except KeyboardInterrupt:  # between two runs
        say("interrupted; the same command goes on where it was")
        return 130
    return failed


def say(what: object) -> None:
    """Prints a line to standard error."""
    print(f"compare_balance: {' '.join(str(what).split())}", file=sys.stderr, flush=True)


def read_flags(argv: Sequence[str]) -> tuple[list[Arm], list[int]]:
    """Checks the flags; returns arms and seeds."""
    for argument in argv[1:]:
        check(argument.startswith("--"), f"unexpected argument {argument!r}, want flags as --name=value (see --help)")
        name = argument.lstrip("-").partition("=")[0]
        check(name not in OWN, f"--{name} stands after --, but each run has its own; want it left out there")
    for seed in FLAGS.seeds:
        check(seed.isdecimal(), f"--seeds has {seed!r}, want numbers of 0 or more")
    check(bool(FLAGS.arms and FLAGS.seeds), "--arms or --seeds is empty, want one at least")
    check(FLAGS.data is None or FLAGS.corpus is None, "--data and --corpus are both given, want one of them")
    check(FLAGS.window > 0, f"--window is {FLAGS.window}, want a share above 0")
    if FLAGS.write_docs is not None:
        page = Path(FLAGS.write_docs) / "balance.md"
        check(page.is_file(), f"--write_docs: there is no {str(page)!r}")
    return [read_arm(text) for text in dict.fromkeys(FLAGS.arms)], [int(seed) for seed in dict.fromkeys(FLAGS.seeds)]


def read_arm(text: str) -> Arm:
    """Reads one of --arms."""
    kind, _, number = text.partition(":")
    known = f"want {LOSS_FREE}, {LOSS_FREE}:RATE, {NONE} or {AUXILIARY}:WEIGHT"
    check(kind in (LOSS_FREE, NONE, AUXILIARY), f"--arms has {text!r}, {known}")
    if kind == NONE or (kind == LOSS_FREE and not number):
        check(":" not in text, f"--arms has {text!r}, {known}")
        return Arm(0.0, 0.0) if kind == NONE else PAPER
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"--arms has {text!r}, {known}") from None
    check(0 < value < float("inf"), f"--arms has {text!r}, want a number above 0 after the colon")
    return Arm(value, PAPER.balance_weight) if kind == LOSS_FREE else Arm(0.0, value)


def claim(out: Path, passed: Sequence[str]) -> Path:
    """Makes and locks the folder, or refuses one that holds something else or runs with other settings."""
    settings = {
        **{name: FLAGS[name].value and str(Path(FLAGS[name].value).resolve()) for name in ("data", "corpus")},
        "steps": FLAGS.steps,
        "passed": list(passed),
    }
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.is_dir() else []
    file = out / SETTINGS
    if others and SETTINGS not in others:
        raise ValueError(f"--out {str(out)!r} holds {others[0]!r} but no experiment of this program; want an empty folder")
    if any(out.glob("runs/*/run.json")):
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{str(file)!r} cannot be read as JSON") from None
        check_settings(saved, settings, out)
    lock_folder(out)
    (out / "runs").mkdir(exist_ok=True)
    write_text(file, json.dumps(settings, indent=1) + "\n")
    return out


def check_settings(saved: Any, settings: dict[str, Any], out: Path) -> None:
    """Refuses other settings than those of the runs in the folder."""
    check(isinstance(saved, dict), f"{str(out / SETTINGS)!r} holds no object of settings")
    for name, value in settings.items():
        what = "what stands after --" if name == "passed" else f"--{name}"
        check(
            saved.get(name) == value,
            f"{what} is {value}, the runs in {str(out)!r} have {saved.get(name)}; want the same, or another --out",
        )


def train(job: Job, passed: Sequence[str]) -> tuple[int, str]:
    """Runs pretrain.py once; returns its exit code, 128 + n after signal n, and the last that it said was wrong."""
    data = [f"--{name}={FLAGS[name].value}" for name in ("data", "corpus") if FLAGS[name].value is not None]
    every = 8 * max(1, FLAGS.steps // 50)  # a multiple of the steps of a row of loads, so that a run goes on at its end
    command = [
        sys.executable, str(Path(__file__).with_name("pretrain.py")), "--keep=1", f"--save_every={every}", *passed, *data,
        f"--steps={FLAGS.steps}", f"--seed={job.seed}", f"--bias_rate={job.arm.bias_rate!r}",
        f"--balance_weight={job.arm.balance_weight!r}", f"--out={job.folder}",
    ]  # fmt: skip
    print(f"{job.arm.name}, seed {job.seed}", file=sys.stderr, flush=True)
    said = [f"see {job.folder}.txt"]
    with open(f"{job.folder}.txt", "ab") as log, signals_to_child() as (caught, give):
        pipes = {"stdout": log, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        # In a group of its own, so that Ctrl-C reaches it once, from here.
        process = subprocess.Popen(command, process_group=0, **pipes)
        give(process)
        reader = threading.Thread(target=show, args=(process, log, said))
        reader.start()
        code = process.wait()
        reader.join()
    return (128 + caught[0] if caught else code), said[-1]


def show(process: subprocess.Popen, log, said: list[str]) -> None:
    """Shows the run's progress; what it says is wrong is kept, and all of it written to the log."""
    for line in process.stderr:
        log.write(line)
        text = line.decode(errors="replace").rstrip()
        if text.startswith("pretrain: "):
            said.append(text)
        else:
            print(f"  {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def signals_to_child() -> Iterator:
    """Within it SIGINT and SIGTERM go to the process that is given, which saves its run and ends.

    Yields:
      The signals that came, and the function to give the process to.
    """
    caught: list[int] = []
    child: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        caught.append(number)
        for process in child:
            process.send_signal(number)

    def give(process: subprocess.Popen) -> None:
        child.append(process)
        for number in caught:  # it was not there yet
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught, give
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


parse_flags = flag_parser("compare_balance")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
