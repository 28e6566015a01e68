"""The recipe of reasoning: its commands, what it refuses, and a short run of a seed, too short to learn much."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.more import LONG

ROOT = Path(__file__).parents[2]
SHORT = [  # fewer steps of pretraining leave too few right answers to learn from, even of two numbers
    "--seeds=1", "--nozero", "--level=pair", "--texts=5000", "--pretrain_steps=600", "--worked=60", "--cold_epochs=12",
    "--explorations=2", "--max_new_tokens=64", "--asked=0", "--traces=4", "--trace_epochs=4", "--measured=15", "--out=out",
]  # fmt: skip
STAGES = "pretrain sft grpo traces sft2 zero student student_sft student_grpo student_traces student_logits"
DATA = ("texts.jsonl", "worked.jsonl", "problems.jsonl", "heldout.jsonl", "student.json", "template.jinja")
STAGES = (STAGES + " student_policy student_both").split()
# A stage that notes each signal and saves at the first, as those that learn do; one that fails.
SLOW = """
import pathlib, signal, sys, time
out, seen = pathlib.Path(sys.argv[1].partition("=")[2]), []

def note(number, frame):
    seen.append(number)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
out.mkdir(exist_ok=True)
(out / "begun").touch()
while not seen:
    time.sleep(0.02)
time.sleep(0.3)
(out / "seen").write_text(" ".join(map(str, seen)))
sys.exit(143)
"""
BAD_STAGE = """
import pathlib, sys, time
while not pathlib.Path("slow/begun").exists():
    time.sleep(0.02)
sys.exit("what is wrong")
"""
STAGES_RUN = """
import pathlib, signal, sys
import hush, reasoning
from reasoning_stages import Stage

signal.signal(signal.SIGINT, signal.default_int_handler)
reasoning.FLAGS(["reasoning.py", "--jobs=2"])
reasoning.HERE = here = pathlib.Path.cwd()
plan = {0: [Stage(name, here / name, name, {}) for name in sys.argv[1:]]}
plan[0].append(Stage("later", here / "later", "later", {"model": here / "slow" / "export"}))
try:
    reasoning.run_all(plan)
except ValueError as error:
    print(error)
except KeyboardInterrupt:
    print("interrupted")
"""
TIMES = """
import json, pathlib, time
import hush, reasoning, reasoning_report
from reasoning_stages import Stage

here, told = pathlib.Path.cwd(), []
plan = {0: [Stage("a", here / "a", "a", {}), Stage("b", here / "b", "b", {})]}

def run(*done, fails=False):
    def run_all(plan):
        time.sleep(0.1)
        for name in done:
            (here / name).mkdir()
            (here / name / ".done").touch()
        if fails:
            raise ValueError
    return run_all

def timed(work):
    reasoning.run_all = work
    try:
        told.append(reasoning.run_timed(here / "path.seconds", plan))
    except ValueError:
        told.append(float((here / "path.seconds").read_text()))

for work in (run("a", fails=True), run("b"), run()):
    timed(work)
(here / "path.seconds").unlink()
timed(run())
facts = {"jobs": 1, "cores": 1, "path_work": 3, "students_work": 2, "path": None, "students": None}
told.append(reasoning_report.duration(facts))
told.append(reasoning_report.duration(facts | {"path": 4, "students": 5, "cores": 2}))
print(json.dumps(told))
"""
PRINT = """
import json, pathlib
import hush, reasoning
reasoning.FLAGS(["reasoning.py", "--students=4", "--seeds=4"])
path, students = reasoning.plans(pathlib.Path("here"))
made = path[3] + students[3]
print(json.dumps([[stage.name, stage.measures, stage.command] for stage in made]))
"""


BAD = """
import contextlib, io, json, sys
import hush, reasoning
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = reasoning.main(reasoning.parse_flags(["reasoning.py", *arguments]))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue()]))
"""


def python(program, *arguments, folder):
    """What a program prints, read as JSON lines; it imports from examples/."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return list(map(json.loads, done.stdout.splitlines()))


def call(folder, *arguments):
    """Exit code, standard output and standard error of the program in a folder."""
    command = [sys.executable, str(ROOT / "examples" / "reasoning.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_every_stage_begins_with_one_that_is_done(tmp_path):
    (rows,) = python(PRINT, folder=tmp_path)
    made, given = {f"here/seed-3/{name}" for name in DATA}, {}
    assert [name for name, measures, _ in rows if measures is None] == STAGES
    for name, measures, command in rows:
        flags = dict(part.removeprefix("--").partition("=")[::2] for part in command[2:])
        read = [value for flag, value in flags.items() if value.startswith("here/") and flag != "out"]
        assert set(read) <= made, f"{name} reads what is not there yet"
        assert measures is None or flags["problems"] == "here/seed-3/heldout.jsonl"
        assert measures is not None or flags.get("problems") != "here/seed-3/heldout.jsonl", "held-out problems only measure"
        assert "heldout" not in flags or command[1] == "examples/grpo.py" or 0 < float(flags["heldout"]) < 1, name
        out = flags["out"]
        made |= {out, f"{out}/export", f"{out}/tokenizer", f"{out}/rows.jsonl"}
        assert (ROOT / command[1]).exists() and flags["seed"] == "3"
        given[name] = flags
    data = {given[name]["data"] for name in ("sft2", "student_traces", "student_logits")}
    assert data == {"here/seed-3/traces/rows.jsonl"}, "students learn what the teacher's second fine-tuning has learned"
    counts = [int(given[name]["explorations"]) for name in ("student_grpo", "student_both", "student_policy")]
    assert counts[0] // 2 == counts[1] == counts[2]


def test_times_of_several_commands_add_up(tmp_path):
    (told,) = python(TIMES, folder=tmp_path)
    first, both, again, unknown, short, long = told
    assert 0.1 <= first < 0.2 <= both and again == both, "nothing was left for the third"
    assert unknown is None, "who kept no time does not know it"
    assert short.startswith("The times of its stages add up to 5 minutes") and short.endswith("on 1 core.")
    assert long.endswith("on 2 cores. All took 4 minutes. The students took 5 minutes more.")


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"level": "long"}')
    (tmp_path / "foreign" / "seed-0").mkdir(parents=True)
    (tmp_path / "tuned" / "seed-0").mkdir(parents=True)
    (tmp_path / "tuned" / "run.json").write_text('{"program": "sft"}')
    cases = [
        (["--out=out"], "--level is easy, but 'out' was begun with long"),
        (["--out=foreign"], "'foreign' has folders of seeds but no run.json"),
        (["--out=foreign", "--fresh"], "'foreign' has folders of seeds but no run.json"),
        (["--out=tuned"], "'tuned/run.json' is of another program's run"),
        (["--out=tuned", "--fresh"], "'tuned/run.json' is of another program's run"),
        (["--level=hard"], "should be one of"),
        (["--rl_lr=1e-5"], "--rl_lr is 1e-05 and --rl_lr_end 3e-05, want --rl_lr_end at most --rl_lr"),
        (["what"], "unexpected argument ['what']"),
    ]
    found = python(BAD, json.dumps([arguments for arguments, _ in cases]), folder=tmp_path)
    for (code, err), (_, want) in zip(found, cases, strict=True):
        assert code == 2 and err.startswith("reasoning: ") and err.count("\n") == 1 and want in err, err
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {"level": "long"}
    assert json.loads((tmp_path / "tuned" / "run.json").read_text()) == {"program": "sft"}
    assert (tmp_path / "foreign" / "seed-0").exists() and (tmp_path / "tuned" / "seed-0").exists()


@pytest.mark.parametrize("ends", ["a stage fails", "Ctrl-C"])
def test_stages_that_run_are_told_once_to_save_and_none_is_left(tmp_path, ends):
    """The terminal sends Ctrl-C to all processes of a command, here to those of its group."""
    for name, text in (("slow", SLOW), ("bad", BAD_STAGE)):
        (tmp_path / f"{name}.py").write_text(text)
    names = ["slow", "bad"] if ends == "a stage fails" else ["slow"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, "-c", STAGES_RUN, *names]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    if ends == "Ctrl-C":
        while not (tmp_path / "slow" / "begun").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=600)[0].splitlines()[-1]
    want = "[2 of 3] seed 0 bad: ended with 1: what is wrong (all of it:" if len(names) == 2 else "interrupted"
    assert said.startswith(want), said
    assert (tmp_path / "slow" / "seen").read_text() == str(signal.SIGTERM.value)
    assert not (tmp_path / "later.txt").exists() and not list(tmp_path.glob("*/.done"))
    assert 0.3 < float((tmp_path / "slow.seconds").read_text()) < 600


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reasoning")
    code, out, err = call(folder, *SHORT)
    logs = {path.name: path.read_text()[-2000:] for path in (folder / "out" / "seed-0").glob("*.txt")}
    assert code == 0, (out, err, logs)
    return folder, out


@LONG
def test_the_stages_of_one_seed_run(short):
    folder, out = short
    measured = {name: rows[0] for name, rows in json.loads((folder / "out" / "results.json").read_text()).items()}
    for name, numbers in measured.items():
        stage = json.loads((folder / "out" / "seed-0" / name / ".done").read_text())
        assert numbers["seconds"] == stage["seconds"], "of the training, not of the measurement"
    found = {name: numbers["accuracy"] for name, numbers in measured.items()}
    assert set(found) == {"pretrain", "sft", "grpo", "sft2"}
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    table = (folder / "out" / "table.txt").read_text()
    assert table in out and len(table.splitlines()) == len(found) + 1
    for name in STAGES[:5]:
        assert f" seed 0 {name}: python examples/" in out
    assert (folder / "out" / "plots" / "reasoning.png").stat().st_size > 10_000
    assert "An answer that corrects itself" in (folder / "out" / "report.html").read_text()


@LONG
def test_what_is_done_is_not_done_again(short):
    folder, out = short
    code, again, err = call(folder, *SHORT)
    assert code == 0 and "python examples/" not in again, err
    assert (folder / "out" / "table.txt").read_text() in again
    code, _, err = call(folder, *SHORT, "--explorations=7")
    assert code == 2 and "--explorations is 7, but 'out' was begun with 2" in err


@LONG
def test_the_end_answers_by_its_template_and_is_opened_by_the_library(short):
    folder, _ = short
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), "out/seed-0/sft2/export", "--chat"]
    command += ["--prompt=Make 12 from 4 8.", "--max_new_tokens=64", "--temperature=0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "<think>" in done.stdout, (shlex.join(command), done.stdout, done.stderr)
