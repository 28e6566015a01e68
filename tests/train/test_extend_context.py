"""`examples/extend_context.py`: longer contexts for a model that comes trained and for one that it trains; grids."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

import dsv3
from dsv3.data import save_tokenizer, train_tokenizer
from dsv3.eval.passkey import load_grid
from dsv3.train.records import read_rows
from tests.more import MORE

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "\n".join(f"line {i}: the {i % 7}th of {i % 11} words, and {i * i % 97} more of them" for i in range(900))

# Flags are the process's own, so the program runs in one of its own: one for all cases.
DRIVER = """
import contextlib, io, json, sys
import extend_context
from absl.testing import flagsaver
from command import flag_parser

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = extend_context.main(flag_parser("extend_context")(["extend_context.py", *arguments]))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

SMALL = (
    "--passkey_keys=digits --batch_size=8 --seq_len=96 "
    "--context_steps=2 --grid_lengths=90,700 --grid_depths=0,1 --grid_trials=1 "
    "--eval_every=0 --save_every=2 --watch_every=0 --heldout=0.2"
).split()


def environment():
    return os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}", "PYTHONIOENCODING": "utf-8"}


def run(folder, cases):
    """Exit code, output and errors of each case."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([list(map(str, case)) for case in cases])], capture_output=True,
        timeout=600, cwd=folder, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus and a checkpoint directory with a tokenizer for it."""
    folder = tmp_path_factory.mktemp("context")
    (folder / "corpus.txt").write_text(TEXT)
    cfg = dsv3.preset("tiny").replace(vocab_size=320)
    dsv3.save_pretrained(folder / "model", cfg, dsv3.model_init([0, 1], cfg), dsv3.router_init(cfg))
    asked = "The pass key is 12345. Remember it. What is the pass key?"
    save_tokenizer(train_tokenizer([TEXT, asked], 320), folder / "model")
    longer = cfg.replace(rope_scaling=dsv3.preset("deepseek-v3").to_hf()["rope_scaling"])
    dsv3.save_pretrained(folder / "yarn", longer, dsv3.model_init([0, 1], longer), dsv3.router_init(longer))
    save_tokenizer(train_tokenizer([TEXT, asked], 320), folder / "yarn")
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_text(json.dumps(cfg.to_hf()))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    init = ["--init=model", "--corpus=corpus.txt", *SMALL]
    cases = {
        "cosine": [*init, "--plan=cosine", "--out=bad"],
        "preset": [*init, "--preset=tiny", "--out=bad"],
        "steps": [*init, "--steps=5", "--out=bad"],
        "short factor": [*init, "--yarn_factor=16", "--out=bad"],
        "grid too long": [*init, "--grid_lengths=90,4000", "--out=bad"],
        "grid too short": [*init, "--grid_lengths=10", "--out=bad"],
        "grid no number": [*init, "--grid_lengths=ten", "--out=bad"],
        "depth": [*init, "--grid_depths=0,2", "--out=bad"],
        "share": [*init, "--passkey=2", "--out=bad"],
        "yarn already": [*init, "--init=yarn", "--out=bad"],
        "no weights": [*init, "--init=empty", "--out=bad"],
        "no depth": [*init, "--grid_depths=", "--out=bad"],
        "beyond the model": [*init, "--seq_len=200", "--out=bad"],
        "paper's weight": [*init, "--mtp_weight=0.2", "--out=bad"],
        "two tokenizers": [*init, "--tokenizer=yarn", "--out=bad"],
        "no model": [*init, "--init=nowhere", "--out=bad"],
        "rows too short": ["--corpus=corpus.txt", *SMALL, "--preset=tiny", "--vocab_size=320", "--seq_len=32", "--out=bad"],
    }
    return dict(zip(cases, run(folder, cases.values()), strict=True))


@pytest.mark.skipif(not MORE, reason="a long case")
def test_a_trained_model_gets_longer_contexts(folder):
    command = ["--init=model", "--corpus=corpus.txt", "--passkey=0.5", *SMALL, "--out=long"]
    (code, out, err), again, other = run(folder, [command, command, [*command, "--grid_trials=2"]])
    assert code == 0, err
    rows = [row for row in read_rows(folder / "long" / "log.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [768, 1536, 1536 + 3072, 1536 + 6144]
    assert len({row["learning_rate"] for row in rows}) == 1
    grids = {path.stem: load_grid(path) for path in (folder / "long" / "passkey").iterdir()}
    assert set(grids) == {"before", "YaRN_untrained", "context_8x", "context_32x"}
    assert all(grid.lengths == [90, 700] and grid.depths == [0.0, 1.0] for grid in grids.values())
    assert (folder / "long" / "plots" / "passkey.png").stat().st_size > 10_000
    assert "Passkey retrieval" in (folder / "long" / "report.html").read_text()
    names = ("before", "YaRN, untrained", "context 8x  ", "context 32x  ")
    table = [line for line in out.splitlines() if line.startswith(names)]
    assert len(table) >= 8 and all("%" in line for line in table[-4:])
    exported = dsv3.ModelConfig.from_hf(folder / "long" / "export")
    yarn = exported.mla.rope.yarn
    assert (yarn.factor, yarn.original_length, exported.max_length) == (40.0, 96, 40 * 96)
    assert "Problems in a cell: 1; its standard error is up to 50 points." in out
    assert again[0] == 0 and "going on from step 4" in again[1] and "passkey problems" not in again[1]
    assert other[0] == 2 and "'before' in 'long' has lengths, depths and trials [90, 700], [0.0, 1.0], 1" in other[2]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("cosine", "--context_steps is given, but --plan=cosine, want --plan=paper or context"),
        ("preset", "--init and --preset are both given, want one of them"),
        ("steps", "--steps is given, but with --init and --plan=context there are only stages of --context_steps"),
        ("short factor", "--yarn_factor is 16, want at least 32"),
        ("grid too long", "--grid_lengths has 4000, want "),
        ("grid too short", "--grid_lengths has 10, want "),
        ("grid no number", "--grid_lengths is ['ten'], want whole numbers"),
        ("depth", "--grid_depths has 2.0, want 0 to 1"),
        ("share", "flag --passkey=2"),
        ("yarn already", "--plan=context extends the context itself, want a model without YaRN"),
        ("no weights", "empty"),
        ("no depth", "--grid_depths is empty, want at least one"),
        ("beyond the model", "--seq_len is 200, the maximum of --init is 128"),
        ("paper's weight", "--mtp_weight is given, but the stages of --plan=context have the paper's"),
        ("two tokenizers", "--init and --tokenizer are both given"),
        ("no model", "nowhere"),
        ("rows too short", "--passkey wants sequences of at least"),
    ],
)
def test_bad_input_is_one_line(folder, results, case, words):
    code, _, err = results[case]
    assert code == 2 and err.startswith("extend_context: ") and err.count("\n") == 1 and words in err, err
    assert not (folder / "bad" / "run.json").exists()


@pytest.mark.skipif(not MORE, reason="a long case")
def test_a_model_is_trained_first_and_a_stopped_run_goes_on(folder):
    """A checkpoint at the border of two stages is enough: grids that are there stay, those that are missing are made."""
    command = ["--corpus=corpus.txt", *SMALL, "--preset=tiny", "--vocab_size=320", "--steps=4", "--save_every=1", "--keep=9"]
    (whole,) = run(folder, [[*command, "--out=whole"]])
    assert whole[0] == 0, whole[2]
    made = {path.name: path.read_bytes() for path in (folder / "whole" / "passkey").iterdir()}
    assert set(made) == {"before.json", "YaRN_untrained.json", "context_8x.json", "context_32x.json"}
    log = [row["loss"] for row in read_rows(folder / "whole" / "log.jsonl") if row["kind"] == "train"]
    for path in (folder / "whole" / "checkpoints").iterdir():
        if path.name > "step-00000006":
            subprocess.run(["rm", "-r", str(path)], check=True)
    for name in ("context_8x.json", "context_32x.json"):
        (folder / "whole" / "passkey" / name).unlink()
    (again,) = run(folder, [[*command, "--out=whole"]])
    assert again[0] == 0 and "going on from step 6" in again[1], again[2]
    assert {path.name: path.read_bytes() for path in (folder / "whole" / "passkey").iterdir()} == made
    assert [row["loss"] for row in read_rows(folder / "whole" / "log.jsonl") if row["kind"] == "train"] == log


@pytest.mark.skipif(not MORE, reason="a long case")
def test_a_trained_model_on_a_mesh_in_fp8_and_with_an_average(folder):
    """A mesh gives the curve of one device; the export is of the average, too."""
    one = ["--init=model", "--corpus=corpus.txt", *SMALL, "--grid_lengths=90", "--grid_depths=0", "--ema_decay=0.5"]
    one += ["--batch_size=64", "--context_steps=1"]  # two rows in the longest stage, which a mesh divides
    more = {"mesh": ["--mesh=data:2"], "plain": [], "fp8": ["--fp8=paper"]}  # a mesh has to be the first of a process
    losses = {}
    for name, (code, _, err) in zip(more, run(folder, [[*one, *flags, f"--out={name}"] for name, flags in more.items()])):
        assert code == 0, err
        losses[name] = [row["loss"] for row in read_rows(folder / name / "log.jsonl") if row["kind"] == "train"]
        assert dsv3.ModelConfig.from_hf(folder / name / "export_ema").max_length == 40 * 96
        results = json.loads((folder / name / "results.json").read_text())
        assert 0 < results["training"]["mfu"] < 1
        assert load_grid(folder / name / "passkey" / "context_32x.json").trials == 1
    np.testing.assert_allclose(losses["mesh"], losses["plain"], rtol=1e-5)  # sums in another order, over two steps
    np.testing.assert_allclose(losses["fp8"], losses["plain"], rtol=0.02)  # products rounded to 2^-4, of some hundred terms
    assert losses["fp8"] != losses["plain"]


@pytest.mark.skipif(not MORE, reason="a long case")
def test_a_signal_ends_a_grid_which_is_made_when_the_run_goes_on(folder):
    command = ["--init=model", "--corpus=corpus.txt", *SMALL, "--grid_trials=9", "--context_steps=1", "--out=signal"]
    program = [sys.executable, str(ROOT / "examples" / "extend_context.py"), *command]
    process = subprocess.Popen(program, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = ""
    while "passkey problems" not in said:
        line = process.stdout.readline().decode()
        assert line, process.stderr.read().decode()
        said += line
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list((folder / "signal" / "passkey").glob("*.json")), "a grid that is not complete is not kept"
    ((code, out, err),) = run(folder, [command])
    assert code == 0 and "passkey problems, before" in out, err
    assert len(list((folder / "signal" / "passkey").glob("*.json"))) == 4
