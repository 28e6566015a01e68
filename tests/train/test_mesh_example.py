"""`examples/mesh.py`: its table has the columns that the document shows, and bad input is one line before any work."""

import re

import pytest

from tests.more import LONG
from tests.programs import EXAMPLES, run_programs

BAD = [
    (["--mesh=expert:4", "--mesh=data:2", "--expert_nodes=2"], "--expert_nodes is 2, want a divisor of 1"),
    (["--mesh=data:3"], "--batch_size 8 has 8 rows in a micro-batch, want a multiple of 3"),
]
GOOD = "--preset=tiny --mesh=expert:4 --expert_nodes=2 --batch_size=4 --seq_len=8 --micro_batches=1 --steps=1".split()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_programs(("mesh", [arguments for arguments, _ in BAD]), folder=tmp_path_factory.mktemp("mesh"))


@LONG
def test_a_row_for_each_mesh(tmp_path):
    (done,) = run_programs(("mesh", [GOOD]), folder=tmp_path)
    assert done.code == 0, done.err
    head, row = done.out.splitlines()[:2]
    cells = dict(zip(re.split("  +", head), row.split()))
    assert cells["mesh"] == "expert:4" and cells["table"] == "one_f_one_b" and float(cells["loss"]) > 1
    assert 0 < int(cells["to nodes"]) < int(cells["sent KB"])
    shown = re.findall(r"^mesh  .* held$", (EXAMPLES.parent / "docs" / "mesh.md").read_text(encoding="utf-8"), re.M)
    assert shown and all(line.split() == head.split() for line in shown)


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_one_line(results, case):
    code, out, err = results[case]
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not re.search(r"[IWE]0000|WARNING", line)]
    assert len(lines) == 1 and lines[0].startswith("mesh: ") and BAD[case][1] in lines[0], err
