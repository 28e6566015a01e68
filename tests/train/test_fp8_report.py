"""What the FP8 programs make of losses, and how they refuse bad input."""

import json
import sys

import numpy as np
import pytest

from tests.programs import EXAMPLES, run_programs


@pytest.fixture(scope="module")
def fp8_compare():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import fp8_compare

        yield fp8_compare
    finally:
        sys.path.remove(str(EXAMPLES))


def test_runs_are_compared_with_those_of_the_same_seed(fp8_compare, tmp_path):
    (tmp_path / "runs").mkdir()
    base = np.linspace(8.0, 4.0, 200)
    swing = np.where(np.arange(200) // 10 % 2, 0.01, -0.01)  # two windows of ten cancel out in the last tenth
    spiked = base * 1.02
    spiked[100] *= 1.5
    for name, seed, loss in (
        ("float32", 0, base), ("bfloat16", 0, base * 1.01), ("bfloat16", 1, base * 1.5), ("paper", 0, base * (1.01 + swing)),
        ("tensor", 1, spiked),
    ):  # fmt: skip
        run = {"variant": name, "seed": seed, "loss": loss.tolist(), "heldout": 4.5}
        (tmp_path / "runs" / f"{name}-{seed}.json").write_text(json.dumps(run))
    table = fp8_compare.write_report(tmp_path, ["float32", "bfloat16", "paper", "tensor", "never"])
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found) == ["float32", "bfloat16", "paper", "tensor"]
    assert found["bfloat16"]["to_float32"] == pytest.approx([0.01]) and found["bfloat16"]["seeds"] == [0, 1]
    assert abs(found["paper"]["to_bfloat16"][0]) < 0.001 < 0.003 < found["paper"]["apart_bfloat16"][0]
    assert found["tensor"]["to_bfloat16"] == pytest.approx([1.02 / 1.5 - 1]) and "to_float32" not in found["tensor"]
    assert 0.45 < found["tensor"]["spike"] < 0.55 and found["float32"]["spike"] < 0.02
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert len({len(line) for line in table.splitlines()}) == 1, "columns are aligned"


def test_no_run_is_one_line(fp8_compare, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="holds no finished run"):
        fp8_compare.write_report(tmp_path, ["paper"])


PROGRAMS = {
    "fp8_report": ["--seeds=a"], "fp8_speed": ["--cases=all"],
    "fp8_error": ["--rows=16", "--depth=128", "--depth=1024", "--positive"],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    done = run_programs(*((program, [flags]) for program, flags in PROGRAMS.items()), folder=folder)
    return dict(zip(PROGRAMS, done, strict=True)) | {"left": list(folder.iterdir())}


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("fp8_report", "--seeds has 'a', want numbers of 0 or more"),
        ("fp8_speed", "--cases has ['all'], want some of quantize, product, step"),
    ],
)
def test_bad_input_is_one_line(program, message, results):
    assert results[program] == (2, "", f"{program}: {message}\n") and not results["left"]


def test_errors_of_products_are_shown(results):
    """The paper's 128-element promotion keeps sums' errors small at any length; without it they grow."""
    assert results["fp8_error"].code == 0
    short, long = (line.split() for line in results["fp8_error"].out.splitlines()[2:])
    promoted, never = ([float(row[i]) for row in (short, long)] for i in (6, 8))
    assert promoted[1] < 1.5 * promoted[0] and never[0] == promoted[0] and never[1] > 10 * promoted[1]
