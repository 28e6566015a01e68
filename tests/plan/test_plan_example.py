"""`examples/plan.py`: its numbers are those of the package and of docs/plan.md, and bad input is one line."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.more import LONG

ROOT = pathlib.Path(__file__).resolve().parents[2]

DOCUMENT = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
# The rows of its table: flags, gigabytes, million hours.
WHAT_IF = {
    flags.strip("`"): rest for flags, *rest in re.findall(r"^\| (none|`--[^`]*`) \| (.*?) \| ([\d.]+) \|$", DOCUMENT, re.M)
}

# Flags are the process's own: one process for all cases.
DRIVER = """
import contextlib, io, json, sys
import plan
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = plan.main(plan.parse_flags(["plan.py", *arguments]))
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

GOOD = {
    "published": [],
    "bfloat16": ["--products_dtype=bfloat16", "--dispatch_dtype=bfloat16"],
    "h200": ["--hardware=h200", "--products_dtype=bfloat16", "--dispatch_dtype=bfloat16"],
    "slow": ["--set=flops_fraction=0.3", "--set=ib_bandwidth=25e9"],
    "tiny": ["--preset=tiny", "--mesh=data:2", "--schedule=one_f_one_b", "--batch=8", "--length=32", "--tokens=1e6"],
    "search": ["--search", "--devices=2048"],
    "serve": ["--serve=64", "--mesh=expert:32", "--weights_dtype=fp8", "--batch=32", "--mtp=false"],
}
BAD = {
    "an argument": (["x"], "1 arguments, want flags only"),
    "a mesh": (["--mesh=tensor:8"], "parse_mesh: `text` has 'tensor:8', want axis:size"),
    "experts": (["--mesh=pipe:16,expert:48"], "256 experts are not divisible by expert:48"),
    "devices": (["--devices=1024"], "--mesh has 2048 devices, want --devices=1024"),
    "stages": (["--stages=4,x"], "--stages=4,x, want numbers such as 5,4,4,3"),
    "what if": (["--set=speed=2"], "`changes` is 'speed', want one of"),
    "no number": (["--set=memory"], "--set=memory, want field=number"),
    "any": (["--schedule=any"], "--schedule=any wants --search"),
    "both": (["--search", "--mesh=data:2"], "--search wants no --mesh"),
    "a trace of many": (["--trace", "--search"], "--trace excludes --search and --serve"),
    "a trace": (["--trace", "--mesh=expert:2,data:3"], "dualpipe wants an even number of pipe ranks, not 1"),
    "a file": (["--config=nowhere"], "nowhere"),
    "a preset": (["--preset=deepseek-v9"], "flag --preset=deepseek-v9"),
    "serving": (["--serve=1", "--mesh=expert:24"], "256 experts are not divisible by expert:24"),
}


def run_all(cases):
    """What each call gives, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(list(cases.values()))], capture_output=True, timeout=240,
        cwd=ROOT / "examples",
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def results():
    changes = {flags: [] if flags == "none" else flags.split() for flags in WHAT_IF}
    return run_all(GOOD | changes | {what: arguments for what, (arguments, _) in BAD.items()})


def hours(out):
    return float(re.search(r"tokens: ([\d.]+)M H800 hours", out).group(1))


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(results, what):
    code, out, err = results[what]
    assert (code, out) == (2, "") and err.count("\n") == 1, (code, out, err)
    assert err.startswith("plan: ") and BAD[what][1] in err


def test_the_published_run_is_shown(results):
    code, out, err = results["published"]
    assert (code, err) == (0, "")
    for expected in (
        "671,026,404,352", "671,026,419,200", "37,552,282,624", "36,625,603,584", "250.5", "; fits into",
        "published: 2.664M hours; predicted", "38.9% is stated",
    ):  # fmt: skip
        assert expected in out
    assert max(len(line) for line in out.splitlines()) < 150


def test_the_document_shows_what_the_program_prints(results):
    blocks = re.findall(r"```text\n(.*?)```", DOCUMENT, re.S)
    shown = {0: "published", 1: "search", 3: "serve"}  # the other one is below
    assert len(blocks) == 4
    assert {i: blocks[i].rstrip() for i in shown} == {i: results[what][1].rstrip() for i, what in shown.items()}


@LONG
def test_the_document_shows_the_trace():
    code, out, _ = run_all({"trace": ["--trace"]})["trace"]
    assert code == 0 and "NOT" not in out
    assert re.findall(r"```text\n(.*?)```", DOCUMENT, re.S)[2].rstrip() == out.rstrip()


@pytest.mark.parametrize("flags", WHAT_IF)
def test_the_document_says_what_changes(results, flags):
    memory, million = WHAT_IF[flags]
    code, out, _ = results[flags]
    (most,) = re.findall(r"fullest rank: ([\d.]+ GB); ", out)
    assert memory == most + ("" if code == 0 else ", does not fit")
    assert float(million) == hours(out)


def test_what_does_not_fit_is_said(results):
    code, out, _ = results["bfloat16"]
    assert code == 1 and "DOES NOT FIT" in out and hours(out) > hours(results["published"][1])
    code, out, _ = results["h200"]
    assert code == 0 and "H200 hours" in out and "published: " not in out


def test_what_if(results):
    assert hours(results["slow"][1]) > 1.3 * hours(results["published"][1])
    assert results["tiny"][0] == 0 and "tiny on 2 H800" in results["tiny"][1]
    code, out, _ = results["search"]
    assert code == 0 and "pipe:16,expert:64,data:2  dualpipe " in "\n".join(out.splitlines()[3:5])
    code, out, _ = results["serve"]
    assert code == 0 and "latent cache: 70,272 bytes a token" in out
