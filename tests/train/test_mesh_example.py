"""`examples/mesh.py`: its table has the columns that the document shows, and bad input is one line before any work."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "mesh.py"), *arguments], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_row_for_each_mesh():
    done = run(
        "--preset=tiny", "--mesh=expert:4", "--expert_nodes=2", "--batch_size=4", "--seq_len=8", "--micro_batches=1",
        "--steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()[:2]
    cells = dict(zip(re.split("  +", head), row.split()))
    assert cells["mesh"] == "expert:4" and cells["table"] == "one_f_one_b" and float(cells["loss"]) > 1
    assert 0 < int(cells["to nodes"]) < int(cells["sent KB"])
    shown = re.findall(r"^mesh  .* held$", (ROOT / "docs" / "mesh.md").read_text(encoding="utf-8"), re.M)
    assert shown and all(line.split() == head.split() for line in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh=expert:4", "--mesh=data:2", "--expert_nodes=2"], "--expert_nodes is 2, want a divisor of 1"),
        (["--mesh=data:3"], "--batch_size 8 has 8 rows in a micro-batch, want a multiple of 3"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if not re.search(r"[IWE]0000|WARNING", line)]
    assert len(lines) == 1 and lines[0].startswith("mesh: ") and message in lines[0], done.stderr
