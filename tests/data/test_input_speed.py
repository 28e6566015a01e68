"""`examples/input_speed.py`: both tables, on made-up shards and on a prepared folder; bad input in one line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dsv3.data import Manifest, SpecialIds, write_manifest, write_shard
from tests.more import LONG

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flags are the process's own, so the program runs in one of its own: one for all cases.
DRIVER = """
import contextlib, io, json, sys
import input_speed
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = input_speed.main(input_speed.parse_flags(["input_speed.py", *arguments]))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
SMALL = "--preset=tiny --batch_size=4 --seq_len=64 --hosts=2 --train_batch_size=2 --train_seq_len=16".split()
CASES = {
    "made up": ["--tokens=100000", "--late_ms=60", "--steps=2", "--write_docs=docs", *SMALL],
    "prepared": ["--prepared=prepared", "--steps=0", *SMALL],
}
BAD = {
    "folder": (["--prepared=nowhere"], "read_manifest: 'nowhere' has no manifest.json"),
    "broken": (["--prepared=broken"], "open_shards: 'broken/train/a/00000.tokens.npy' of source 'a' has"),
    "hosts": (["--hosts=3"], "host_rows: `batch_size` is 64, want a multiple of the 3 hosts"),
    "length": (["--train_seq_len=2000"], "--train_seq_len is 2000, the model's maximum is 1024"),
    "argument": (["prepared"], "unexpected argument ['prepared'], want flags only"),
    "no page": (["--write_docs=nowhere"], "--write_docs: there is no 'nowhere/data.md'"),
    "no mark": (["--write_docs=prepared"], "'prepared/data.md' has 0 blocks marked <!-- input speed -->, want one"),
    "half of it": (["--write_docs=docs", "--steps=0"], "--write_docs wants both tables, without --steps=0"),
    "flag": (["--depth=0"], "flag --depth=0: 0 is not a positive integer"),
}
STREAM = ["cold, digests checked", "cold, digests not checked", "warm", "warm, the plan alone"]
STREAM += ["warm, host 0 of 2", "warm, host 1 of 2", "the first step after a resume, cold"]
TRAINING = ["always the same batch", "read between steps", "read ahead", "late, between steps", "late, ahead"]


def prepare(folder):
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, 300, 50), 50, 0) for _ in range(200)]
    entry = write_shard(folder / "train" / "a", 0, documents, vocab_size=300, window_tokens=1000)
    write_manifest(folder, Manifest("f" * 32, 300, SpecialIds(0, 1, 2), {}, {"a": {}}, {"train": {"a": [entry]}}))


def run_all(folder, cases):
    """(exit code, output, errors) of each case, in one process, and the page that is there at the end."""
    for name in ("prepared", "broken"):
        prepare(folder / name)
    with (folder / "broken" / "train" / "a" / "00000.tokens.npy").open("ab") as file:
        file.write(b"more")
    (folder / "docs").mkdir()
    (folder / "docs" / "data.md").write_text("before\n<!-- input speed -->\nold\n<!-- end of input speed -->\nafter\n")
    (folder / "prepared" / "data.md").write_text("no mark\n")
    before = sorted(folder.rglob("*"))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(list(cases.values()))], capture_output=True, timeout=280, cwd=folder,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert sorted(folder.rglob("*")) == before  # made-up shards are gone
    return dict(zip(cases, found, strict=True)) | {"page": (folder / "docs" / "data.md").read_text()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a case that only reads, and of bad input."""
    cases = {"prepared": CASES["prepared"]} | {case: arguments for case, (arguments, _) in BAD.items()}
    return run_all(tmp_path_factory.mktemp("speed"), cases)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of the case that trains."""
    return run_all(tmp_path_factory.mktemp("trained"), {"made up": CASES["made up"]})


@pytest.mark.parametrize("case", [pytest.param("made up", marks=LONG), "prepared"])
def test_tables(request, case):
    results = request.getfixturevalue("trained" if case == "made up" else "results")
    code, out, _ = results[case]
    assert code == 0, results[case]
    for name in [*STREAM, *TRAINING]:
        count = sum(line.startswith(name + "  ") for line in out.splitlines())
        assert count == (name in STREAM or case == "made up"), out
    assert "the paper's run on 2,048 GPUs: 3.2 M tokens/s" in out
    rows = [line.split()[-4:] for line in out.splitlines() if line.startswith(tuple(TRAINING))]
    for step, waiting, share, _ in rows:
        assert float(share.rstrip("%")) == pytest.approx(100 * float(waiting) / float(step), rel=0.1, abs=0.2)


@LONG
def test_the_page_gets_what_was_printed_and_the_command(trained):
    page, printed = trained["page"], trained["made up"][1]
    command = " ".join(sorted(["--tokens=100000", "--late_ms=60", "--steps=2", *SMALL]))
    lines = page.splitlines()
    assert lines[:2] == ["before", "<!-- input speed -->"] and lines[-3:] == ["```", "<!-- end of input speed -->", "after"]
    said = lines[2].split("`")[1].split()
    assert said[:2] == ["python", "examples/input_speed.py"] and " ".join(sorted(said[2:])) == command
    assert page.partition("```text\n")[2].partition("```")[0] == printed and "\nold\n" not in page


@LONG
def test_late_batches_are_waited_for(trained):
    lines = trained["made up"][1].splitlines()
    wait = next(float(line.split()[-3]) for line in lines if line.startswith("late, between steps"))
    assert 60 <= wait < 1000


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(results, case):
    code, out, err = results[case]
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("input_speed: ") and BAD[case][1] in err
