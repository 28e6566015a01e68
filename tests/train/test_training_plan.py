"""`examples/training_plan.py`: its tables are those of docs/training_plan.md, pictures are whole, bad input is one line."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from dsv3.train.schedule_paper import PAPER_SCHEDULE, scale_schedule
from dsv3.train.schedule_plot import plot_schedule

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "training_plan.md").read_text(encoding="utf-8")
# Its commands, in their order; a block with what each prints follows.
SHOWN = [line.split()[2:] for line in re.findall(r"^`(python examples/training_plan\.py.*?)`", DOCUMENT, re.M)]

# Flags are the process's own, so the program runs in one of its own: one for all cases.
DRIVER = """
import contextlib, io, json, sys
import training_plan
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = training_plan.main(training_plan.parse_flags(["training_plan.py", *arguments]))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

BAD = {
    "an argument": (["x"], "argument ['x'], want flags only"),
    "no number": (["--tokens=x"], "flag --tokens=x: could not convert"),
    "few tokens": (["--tokens=2e5", "--batch_size=32", "--seq_len=128"], "stage 'context 8x' has no step"),
    "a small batch": (["--batch_size=8"], "makes 0.25 sequences of the smallest batch, nearer to none than"),
    "a lost piece": (["--tokens=2e4", "--batch_size=32", "--seq_len=128", "--context_steps=2"], "no step begins in piece"),
    "values": (["--values_at=-1"], "--values_at is -1, want a whole number of tokens from 0"),
    "ending": (["--draw=a.pdf"], "--draw ends in '.pdf', want .png or .svg"),
    "no folder": (["--draw=nowhere/a.png"], "--draw is nowhere/a.png, but there is no folder 'nowhere'"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "docs").mkdir()
    cases = [*SHOWN, *(arguments for arguments, _ in BAD.values())]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)], capture_output=True, timeout=120, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    return dict(zip([*range(len(SHOWN)), *BAD], found, strict=True)) | {"folder": folder}


def test_the_document_shows_what_the_program_prints(results):
    blocks = re.findall(r"```text\n(.*?)```", DOCUMENT, re.S)
    assert len(blocks) == len(SHOWN) == 4
    for number, block in enumerate(blocks):
        code, out, err = results[number]
        assert (code, err) == (0, "")
        # The last block has the last table alone.
        assert out.rstrip() == block.rstrip() if number < 3 else out.rstrip().endswith("\n\n" + block.rstrip())


def test_the_picture(results, tmp_path):
    drawn = results["folder"] / "docs" / "training_plan.png"
    assert 20_000 < drawn.stat().st_size < 150_000
    assert [path.name for path in drawn.parent.iterdir()] == ["training_plan.png"]
    assert (ROOT / "docs" / "training_plan.png").stat().st_size < 150_000
    plan = scale_schedule(PAPER_SCHEDULE, tokens=2_000_000, batch_size=32, seq_len=128, context_steps=2)
    assert plot_schedule(plan, tmp_path / "plan.svg").read_bytes().startswith(b"<?xml")
    pictures = [plot_schedule(plan, tmp_path / f"{name}.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "plan.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", None)  # the last thing that it does
    with pytest.raises(TypeError):
        plot_schedule(PAPER_SCHEDULE, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="plot_schedule: `path` is '.pdf', want one of '.png', '.svg'"):
        plot_schedule(PAPER_SCHEDULE, tmp_path / "plan.pdf")
    with pytest.raises(ValueError, match="plot_schedule: there is no folder"):
        plot_schedule(PAPER_SCHEDULE, tmp_path / "nowhere" / "plan.png")


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(results, what):
    code, out, err = results[what]
    assert (code, out) == (2, "") and err.count("\n") == 1, (code, out, err)
    assert err.startswith("training_plan: ") and BAD[what][1] in err
