"""The R1 path on one machine: a small DeepSeek-V3 learns to reason about countdown problems, stage by stage.

    Make 12 from 4 7 9.          4+7=11 11-9=2 12? no  7+9=16 16-4=12 12? yes  7+9-4

Each stage is a program of its own, whose command is printed; any of them can be run by hand or on other data:

  pretrain    pretrain.py: sums, expressions, and conversations that think for a while and answer, right or not
  sft         sft.py: a cold start on a few worked solutions that check each try
  grpo        grpo.py: reinforcement learning on rewards by rules alone
  traces      solve.py: rejection sampling; right answers of the model to the problems that it learns from
  sft2        sft.py: a second fine-tuning, on those
  zero        grpo.py on the pretrained model without a cold start, as R1-Zero

With --students a smaller student follows, of as many of the seeds, on the same text:

  student         pretrain.py
  student_sft     sft.py: the worked solutions
  student_grpo    grpo.py: rewards alone
  student_traces  sft.py on the pretrained student: the same answers of the teacher that sft2 has learned
  student_logits  distill.py on the pretrained student: the distributions of sft2 on these answers
  student_policy  distill.py --on_policy after that: the distributions of sft2 on the student's own answers
  student_both    grpo.py after student_logits: rewards

After each, solve.py measures the model on held-out problems, whose numbers no text for training has. All is repeated with
--seeds other models, data and samples. In --out are a folder for each seed with its stages, table.txt, results.json, plots,
report.html, and in path.seconds and students.seconds how long all took. What is done is not done again: after an
interruption the same command goes on.

Examples:

  python examples/reasoning.py                                     # three seeds
  python examples/reasoning.py --students 3                        # the same folder, and a student of each
  python examples/reasoning.py --seeds 1 --out runs/one
  python examples/reasoning.py --level long --seeds 1 --out runs/long
  python examples/generate.py runs/reasoning/seed-0/sft2/export --chat --prompt 'Make 12 from 4 7 9.'

References: DeepSeek-AI, "DeepSeek-R1", arXiv:2501.12948, sections 2.2 (R1-Zero) and 2.3 (R1).
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from command import failure_line, flag_parser, lock_folder, what_failed, write_text
from reasoning_report import report
from reasoning_stages import Stage, make_stages, make_student_stages, write_problems

from dsv3.checks import check
from dsv3.rl.countdown import LEVELS
from dsv3.train.progress import stop_on_signals

FLAGS = flags.FLAGS
HERE = Path(__file__).resolve().parent
MINUTES = {"pretrain": 13, "grpo": 9, "solve": 2, "sft": 2, "distill": 5}  # about, of the default settings

flags.DEFINE_string("out", "runs/reasoning", "Folder of everything.")
flags.DEFINE_bool("fresh", False, "Delete what is in --out and start anew.")
flags.DEFINE_integer("seeds", 3, "How many times all is done.", 1)
flags.DEFINE_enum("level", "easy", list(LEVELS), "Kind of problems.")
flags.DEFINE_bool("zero", True, "Also learn by rewards without a cold start.")
flags.DEFINE_integer("students", 0, "Of how many of the seeds a smaller student is taught.", 0)
flags.DEFINE_integer("jobs", None, "Stages that run at a time, on their share of the cores. Default: one on each core.", 1)
flags.DEFINE_bool("write_docs", False, "Write docs/reasoning.md and its plot from the results.")

flags.DEFINE_string("preset", "narrow", "Architecture, see pretrain.py.")
flags.DEFINE_integer("texts", 80_000, "Documents to pretrain on.", 100)
flags.DEFINE_integer("pretrain_steps", 5000, "Steps of pretraining, of 8 sequences of 256 tokens.", 1)
flags.DEFINE_integer("worked", 128, "Worked solutions of the cold start.", 8)
flags.DEFINE_float("cold_epochs", 5.0, "How often they are learned.")
flags.DEFINE_integer("explorations", 130, "Of reinforcement learning, each of 16 problems and 16 answers to each.", 1)
flags.DEFINE_float("rl_lr", 3e-4, "Learning rate, of on-policy distillation, too.", 0.0)
flags.DEFINE_float("rl_lr_end", 3e-5, "The same at the end.", 0.0)
flags.DEFINE_float("kl_weight", 0.01, "Weight of the divergence from where it began.", 0.0)
flags.DEFINE_integer("max_new_tokens", 192, "Tokens of an answer at most.", 16)
flags.DEFINE_integer("asked", 0, "Problems to learn from whose answers are sampled for the second fine-tuning; 0: all.", 0)
flags.DEFINE_integer("traces", 4, "Right answers to each of them that it learns, of twice as many samples.", 1)
flags.DEFINE_float("trace_epochs", 1.0, "How often.")
flags.DEFINE_float("student_epochs", 4.0, "How often a student learns the teacher's answers.")
flags.DEFINE_integer("measured", 250, "Held-out problems that are measured, by four answers to each; 0: all.", 0)
FREE = ("out", "fresh", "seeds", "students", "jobs", "write_docs")  # what may change when a command goes on


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input, 1 for a stage that fails."""
    try:
        check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
        few = FLAGS.students <= FLAGS.seeds
        check(few, f"--students is {FLAGS.students}, want at most --seeds, which is {FLAGS.seeds}")
        rates = f"--rl_lr is {FLAGS.rl_lr:g} and --rl_lr_end {FLAGS.rl_lr_end:g}"
        check(FLAGS.rl_lr_end <= FLAGS.rl_lr < math.inf, f"{rates}, want --rl_lr_end at most --rl_lr")
        out = Path(FLAGS.out)
        claim(out)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    again = f"the same command{' without --fresh' if FLAGS.fresh else ''} goes on"
    try:
        path, students = plans(out)
        for seed in path:
            write_problems(out / f"seed-{seed}", seed)
        parts = {"path": path, "students": students}
        took = {name: run_timed(out / f"{name}.seconds", stages) for name, stages in parts.items()}
        plan = {seed: [*path[seed], *students[seed]] for seed in path}
        cores = len(available_cores())
        facts = {"cores": cores, "jobs": FLAGS.jobs or cores, "preset": FLAGS.preset}
        facts |= {name: None if seconds is None else round(seconds / 60) for name, seconds in took.items()}
        report(out, plan, facts, docs=FLAGS.write_docs)
    except (ValueError, OSError) as error:
        return fail(f"{what_failed(error, FLAGS.out)}; once that is put right, {again}", 1)
    except KeyboardInterrupt:
        return fail(f"interrupted; {again}", 130)
    return 0


def plans(out: Path) -> tuple[dict[int, list[Stage]], dict[int, list[Stage]]]:
    """The stages of each seed, and those of its student."""
    folders = {seed: out / f"seed-{seed}" for seed in range(FLAGS.seeds)}
    path = {seed: make_stages(folder, seed) for seed, folder in folders.items()}
    taught = {seed: make_student_stages(folder, seed) if seed < FLAGS.students else [] for seed, folder in folders.items()}
    return path, taught


def claim(out: Path) -> None:
    """Makes and locks the folder, and checks that what is in it has the same settings; with --fresh it deletes that."""
    lock_folder(out)
    own = FLAGS.get_key_flags_for_module(sys.modules[__name__])
    settings = {flag.name: flag.value for flag in own if flag.name not in FREE}
    there, seeds = out / "run.json", sorted(out.glob("seed-*"))
    old = read_run(there)
    check(old is not None or not seeds, f"{str(out)!r} has folders of seeds but no run.json; want another --out")
    if FLAGS.fresh:
        for path in seeds:
            shutil.rmtree(path)
        for name in ("path.seconds", "students.seconds", there.name):
            (out / name).unlink(missing_ok=True)
    elif old is not None:
        for name in [name for name in settings if old.get(name) != settings[name]][:1]:
            raise ValueError(
                f"--{name} is {settings[name]}, but {str(out)!r} was begun with {old.get(name)}; another --out keeps both, "
                "--fresh starts anew"
            )
    write_text(there, json.dumps(settings, indent=1) + "\n")


def read_run(file: Path) -> dict[str, Any] | None:
    """The settings that a folder was begun with, `None` for a new one; refuses those of other programs."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{str(file)!r} cannot be read as JSON; want another --out") from None
    own = isinstance(found, dict) and "level" in found
    check(own, f"{str(file)!r} is of another program's run; want another --out")
    return found


class Running(NamedTuple):
    """A stage that runs."""

    stage: Stage
    where: str
    process: subprocess.Popen
    begin: float
    cores: tuple[int, ...]


def run_timed(file: Path, plan: Mapping[int, Sequence[Stage]]) -> float | None:
    """Runs all that is not done; returns the seconds that it took, with those of earlier commands, which `file` keeps;
    `None` where stages were done by commands that kept none."""
    begin, before = time.monotonic(), read_seconds(file)
    done = [stage.done.exists() for stages in plan.values() for stage in stages]
    known = file.exists() or not any(done)
    try:
        run_all(plan)
    finally:
        if known and not all(done):
            write_text(file, f"{before + time.monotonic() - begin}\n")
    return read_seconds(file) if known else None


def run_all(plan: Mapping[int, Sequence[Stage]]) -> None:
    """Runs what is not done, --jobs stages at a time, each on its share of the cores, as soon as what it reads is there."""
    total = sum(map(len, plan.values()))
    every = [(f"[{i} of {total}]", seed, stage) for i, (seed, stage) in enumerate(in_turn(plan), 1)]
    todo = [entry for entry in every if not entry[2].done.exists()]
    free, running = shares(FLAGS.jobs or len(available_cores())), []
    with stop_on_signals(endings()) as stopped:  # no stage is lost between its start and `running`
        try:
            while todo or running:
                if stopped() is not None:
                    raise KeyboardInterrupt
                waiting = {stage.folder for _, _, stage in todo} | {each.stage.folder for each in running}
                ready = [entry for entry in todo if not waiting.intersection(entry[2].reads())]
                for entry in ready[: len(free)]:
                    todo.remove(entry)
                    running.append(start(*entry, free.pop()))
                time.sleep(0.1)
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    free.append(each.cores)
                    finish(each)
        finally:
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.wait()
                write_text(each.stage.spent, f"{spent(each)}\n")


def endings() -> tuple[signal.Signals, ...]:
    """Signals that end this program: not those that whoever has started it wants ignored, as nohup does."""
    every = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    return tuple(number for number in every if signal.getsignal(number) is not signal.SIG_IGN)


def in_turn(plan: Mapping[int, Sequence[Stage]]) -> list[tuple[int, Stage]]:
    """All stages, those first after which most is left to do, one thing after the other; else in the order of the seeds."""

    def left(stage: Stage, stages: Sequence[Stage]) -> int:
        later = [left(each, stages) for each in stages if stage.folder in each.reads()]
        return MINUTES.get(stage.program, 1) + max(later, default=0)

    every = [(seed, stage) for seed, stages in plan.items() for stage in stages]
    return sorted(every, key=lambda entry: -left(entry[1], plan[entry[0]]))


def shares(jobs: int) -> list[tuple[int, ...]]:
    """The cores of each job; small models compute faster on one core each than together on all."""
    cores = available_cores()
    return [tuple(cores[i::jobs]) or tuple(cores) for i in reversed(range(jobs))]


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def start(where: str, seed: int, stage: Stage, cores: tuple[int, ...]) -> Running:
    """Starts a stage in a process of its own; what it prints goes to a file beside its folder.

    Ctrl-C does not reach it: a stage saves where it is at the first signal, which `run_all` sends, and dies of the second.
    """
    where = f"{where} seed {seed} {stage.name}:"
    print(where, shlex.join(stage.command), flush=True)
    command = [sys.executable, str(HERE / stage.command[1].split("/")[1]), *stage.command[2:]]
    with open(stage.log, "a") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cores)
    return Running(stage, where, process, time.monotonic(), cores)


def spent(each: Running) -> float:
    """Seconds that a stage has run, those of earlier commands included."""
    return time.monotonic() - each.begin + read_seconds(each.stage.spent)


def read_seconds(file: Path) -> float:
    """What earlier commands have taken; 0 if there was none."""
    return float(file.read_text()) if file.exists() else 0.0


def finish(each: Running) -> None:
    """Marks a stage as done and says what came out, or raises `ValueError` with its last words."""
    stage, code, seconds = each.stage, each.process.returncode, spent(each)
    write_text(stage.spent, f"{seconds}\n")
    last = [line for line in stage.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    check(code == 0, f"{each.where} ended with {code}: {' '.join(last)[-200:]} (all of it: {stage.log})")
    write_text(stage.done, json.dumps({"command": stage.command, "seconds": seconds}) + "\n")
    print(f"{each.where} {result(stage)}{seconds:.0f} s", flush=True)


def result(stage: Stage) -> str:
    """What a measurement has found."""
    if stage.measures is None:
        return ""
    found = json.loads((stage.folder / "results.json").read_text())
    return f"accuracy {found['accuracy']:.1%}, {found['tokens']:.0f} tokens an answer; "


parse_flags, fail = flag_parser("reasoning"), failure_line("reasoning")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
