"""`examples/long_context.py`: every part at small lengths, what it says of numbers, bad input in one line."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import dsv3
from dsv3.pretrained import save_pretrained
from tests.more import MORE
from tests.small import model_config, random_params, random_router

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flags are the process's own, so the program runs in one of its own: one for all cases.
DRIVER = """
import contextlib, io, json, sys
import long_context
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = long_context.main(long_context.parse_flags(["long_context.py", *arguments]))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
CASES = {
    "model": ["--model=model", "--lengths=40", "--wide_lengths=", "--new_tokens=3", "--chunk=16", "--json=model.json"],
}
NARROW = ["--wide_lengths=", "--parts=engine"]
BAD = {
    "argument": (["model"], "unexpected argument ['model'], want flags only"),
    "part": (["--parts=engine,decode"], "--parts has 'decode', want some of engine, whole, caches"),
    "alone": (["--parts=whole"], "--parts has 'whole', which wants 'engine' to compare with"),
    "number": (["--lengths=16K,4M"], "--lengths has '4M', want tokens, such as 4000 or 16K"),
    "nothing": (["--lengths=", "--wide_lengths="], "--lengths and --wide_lengths are empty, want a length at least"),
    "short": (["--lengths=33"], "--lengths has 33, want at least 34, as --new_tokens is 32"),
    "long": (["--lengths=1K,160K,163841"], "--lengths has 163,841, the model's maximum is 163,840 tokens"),
    "model's": (["--model=model", "--lengths=65"], "--lengths has 65, the model's maximum is 64 tokens"),
    "folder": (["--model=nowhere"], "nowhere"),
    "both": (["--model=model", "--heads=2"], "--layers, --heads and --hidden_size are of the narrow model"),
    "memory": (["--lengths=1K,160K", "--heads=9999999", *NARROW], r"engine at 1,024 tokens would need about [\d,.]+ GB of"),
    "wide memory": (["--lengths=", "--wide_lengths=1000000K"], "caches of the published widths at 1,024,000,000 tokens"),
    "json": (["--json=nowhere/a.json"], "--json: there is no directory nowhere"),
    "docs": (["--write_docs", "--parts=engine"], "--write_docs wants all parts of the narrow model"),
    "flag": (["--new_tokens=1"], "flag --new_tokens=1: 1 is not"),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(exit code, output, errors) of each case, and the numbers that one of them wrote."""
    folder = tmp_path_factory.mktemp("long")
    cfg = model_config(num_hidden_layers=2, num_nextn_predict_layers=0, max_position_embeddings=64)
    save_pretrained(folder / "model", cfg, random_params(dsv3.model_specs(cfg)), random_router(cfg))
    good = CASES if MORE else {}  # what is refused is always tested
    cases = [*good.values(), *(arguments for arguments, _ in BAD.values())]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)], capture_output=True, timeout=280, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    left = ["model", "model.json"] if MORE else ["model"]
    assert sorted(file.name for file in folder.iterdir()) == left  # what parts leave for others is gone
    numbers = json.loads((folder / "model.json").read_text()) if MORE else {}
    return dict(zip([*good, *BAD], found, strict=True)), numbers, done.stderr.decode()


@pytest.mark.skipif(not MORE, reason="a long case")
def test_all_parts_of_a_checkpoint(results):
    cases, numbers, told = results
    code, out, err = cases["model"]
    assert code == 0, cases["model"]
    engine, whole, caches = numbers
    assert [row["part"] for row in numbers] == ["engine", "whole", "caches"] and {row["length"] for row in numbers} == {40}
    assert 0 <= whole["apart_last"] <= whole["apart"] < 1e-4 < whole["spread"] and whole["same"] == 3
    assert engine["cache"] == 2 * 40 * 8 * 4 and min(engine["peak"], whole["peak"]) > 0
    assert [(row["kind"], row["dtype"]) for row in caches["caches"]] == [
        ("plain", "float32"), ("latent", "float32"), ("plain", "bfloat16"), ("latent", "bfloat16"), ("latent", "float8"),
    ]  # fmt: skip
    # Float32 sums in another order; latents, keys, values, scores and probabilities of 2^-9 each; latents of 2^-4.
    assert all(row["apart"] <= most for row, most in zip(caches["caches"], (0, 2e-6, 3e-2, 3e-2, 6e-2)))
    assert {row["layers"] for row in caches["caches"]} == {2}
    for text in ("Run\n", "Memory\n", "Caches of the model\n", "of one forward pass: ", "3 of 3", "All of it took"):
        assert text in out
    assert re.findall(r"^\[(\d) of 3\] 40 tokens, (\w+): done in 0:\d\d$", err, re.MULTILINE) == [
        ("1", "engine"), ("2", "whole"), ("3", "caches"),
    ]  # fmt: skip
    assert "[1 of 3] 40 tokens, engine: 36 of 36 tokens, ETA 0:00\n" in told  # by the child


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(results, case):
    code, out, err = results[0][case]
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    message = BAD[case][1]
    assert err.startswith("long_context: ") and (message in err or re.search(message, err)), err


REPORT = """
import dataclasses, json
import hush
from long_context_docs import page
from long_context_parts import Job, job_config
from long_context_report import Results, is_equal, text_report

job = Job("engine", 0, 32, 512, "float32", None, 0, "", {}, "")
wide = job_config(dataclasses.replace(job, part="wide")).mla
print(json.dumps([wide.num_heads, wide.kv_latent, wide.nope_dim, wide.rope_dim, wide.v_dim, wide.q_latent]))
for bent, apart in ((1.0, 1e-7), (2.0, 1e-5)):
    found = []
    for k in (16, 32, 64, 128):
        length = 1024 * k
        row = {"kind": "plain", "dtype": "float32", "token_bytes": 640, "layers": 3, "step_seconds": 0.0015, "apart": 0.0}
        row |= {"computed": 1920 * length, "measured": 1920 * length + 10**6}
        rows = [row, row | {"kind": "latent", "token_bytes": 288, "measured": 864 * length, "apart": 3e-7}]
        for part, numbers in {
            "engine": {"read_seconds": k, "read_rate": 1000.0, "step_seconds": 0.0123, "peak": 10**8 + 1000 * length,
                       "cache": 864 * length},
            "whole": {"seconds": k / 2, "trace_seconds": 1.0, "peak": int(1e8 + 4000 * 1024 * k**bent), "apart": k * apart,
                      "apart_last": 2e-6, "spread": 1.0, "same": 32},
            "caches": {"caches": rows}, "wide": {"caches": rows},
        }.items():
            found.append((dataclasses.replace(job, part=part, length=length), numbers))
    results = Results(job_config(job), found, 600.0)
    print(json.dumps([is_equal(results), text_report(results), page(results, "COMMAND", "MACHINE")]))
"""


@pytest.fixture(scope="module")
def reports():
    """The published widths, and what is made of good and of bad numbers: whether ways are equal, text, page."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


def test_what_numbers_mean(reports):
    assert reports[0] == [128, 512, 128, 64, 128, 1536]
    equal, text, page = reports[1]
    assert equal
    assert "Decoding after a read prompt gives the log-probabilities of one forward pass: 1.3e-05 apart at most" in text
    assert "Peak memory of one forward pass grows linearly: 4,000 bytes a token, no length further" in text
    cells = [line.split() for line in text.splitlines()]
    times = ["128.0", "1,000", "12.3", "231", "113", "64.0", "2,048", "624"]
    assert ["131,072", *times, "1.3e-05", "32", "of", "32"] in cells
    assert ["one", "forward", "pass", "4,000", "100", "0.0%", "yes"] in cells
    assert ["131,072", "latent,", "float32", "864", "251.7", "113.2", "44.8%", "1.5", "3.0e-07"] in cells
    for line in ("COMMAND", "Machine: MACHINE.", f"| 131,072 | {' | '.join(times)} |", "at most 163,840", "YaRN by 40"):
        assert line in page
    assert "{" not in page


def test_what_is_wrong_is_said(reports):
    equal, text, _ = reports[2]
    assert not equal
    assert "DIFFERS from one forward pass: 1.3e-03 apart at most, at most 0.001 is allowed" in text
    assert "Peak memory of one forward pass does NOT grow linearly" in text and "  NO" in text
