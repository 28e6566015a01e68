"""`examples/schedule.py`: its table, its pictures, bad input in one line; and the numbers in docs/pipeline.md."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flags are the process's own, so the program runs in one of its own: one for all cases.
DRIVER = """
import contextlib, io, json, sys
import schedule
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = schedule.main(schedule.parse_flags(["schedule.py", *arguments]))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

COMPARE = ["--micro_batches=24", "--compare", "--nogrid"]
UNEQUAL = [*COMPARE, "--backward=2.5"]
CASES = {
    "plain": [],
    "compare": COMPARE,
    "unequal": UNEQUAL,
    "seven": ["--schedule=gpipe", "--ranks=7", "--compare", "--nogrid"],
    "interleaved": ["--schedule=interleaved", "--micro_batches=16", "--nogrid", "--draw=interleaved.png"],
    "pieces": ["--pieces=1,1,1,1", "--draw=pieces.svg", "--ranks=4", "--micro_batches=8"],
}
BAD = {
    "odd ranks": (["--ranks=7"], "dualpipe: `ranks` is 7, want an even number"),
    "weight": (["--weight=3"], "`times.weight` is 3.0 in stage 0, want at most backward, 2.0"),
    "ending": (["--draw=a.pdf"], "--draw ends in '.pdf', want .svg or .png"),
    "no ending": (["--draw=a"], "--draw ends in 'a', want .svg or .png"),
    "folder": (["--draw=nowhere/a.svg"], "No such file or directory"),
    "pieces": (["--pieces=1,x,1,1"], "--pieces is 1,x,1,1, want four numbers"),
    "unknown": (["--schedule=pipedream"], "value should be one of <gpipe|one_f_one_b"),
    "argument": (["dualpipe"], "argument ['dualpipe'], want flags only"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedule")
    cases = [*CASES.values(), *(arguments for arguments, _ in BAD.values())]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)], capture_output=True, timeout=120, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    return dict(zip([*CASES, *(f"bad {name}" for name in BAD)], found, strict=True)) | {"folder": folder}


def rows(text):
    """The table's lines as name → (bubble, published, exact, activations, stages, copies, makespan)."""
    lines = [line.split() for line in text.splitlines()]
    return {cells[0]: tuple(cells[2:9]) for cells in lines if len(cells) == 10 and cells[1].isdigit()}


def test_tables(results):
    code, out, err = results["plain"]
    assert (code, err) == (0, "") and rows(out) == {"dualpipe": ("6", "6", "6", "9", "2", "2", "66")}
    assert "0 | F0   F1   F2" in out
    found = rows(results["compare"][1])
    assert found["zb1p"] == ("7", "7", "7", "8", "1", "1", "79")
    assert found["interleaved"] == ("10.5", "10.5", "10.5", "23", "2", "1", "82.5")
    assert found["dualpipe"][:4] == found["dualpipe_v"][:4] == ("6", "6", "6", "9")
    assert rows(results["unequal"][1])["dualpipe"][:3] == ("8", "9", "8")


def test_what_does_not_fit_is_told(results):
    code, out, _ = results["seven"]
    assert code == 0 and sorted(rows(out)) == ["gpipe", "one_f_one_b", "zb1p"]
    assert "not listed: dualpipe: `ranks` is 7, want an even number" in out
    assert "not listed: dualpipe_v: 7 stages, want an even number" in out


def test_pictures_and_pieces(results):
    assert results["interleaved"][0] == 0 and (results["folder"] / "interleaved.png").stat().st_size > 1000
    code, out, _ = results["pieces"]
    assert code == 0 and (results["folder"] / "pieces.svg").stat().st_size > 1000
    assert "a pair alone takes F&B = 6, one after the other F + B = 10" in out
    assert re.search(r"pieces: makespan 67; 59\.4% of the communication runs beside computation", out)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(results, what):
    code, _, err = results[f"bad {what}"]
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("schedule: ") and BAD[what][1] in lines[0], (code, lines)


@pytest.mark.parametrize("case", ["compare", "unequal"])
def test_document_has_what_the_program_prints(results, case):
    text = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert f"python examples/schedule.py {' '.join(CASES[case])}" in text
    assert results[case][1].strip() in text
