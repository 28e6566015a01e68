"""`examples/compare_balance.py`: its numbers from logs with known answers, bad input, and a run that is interrupted."""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv3.train.records import read_rows
from tests.more import LONG, MORE, more
from tests.small import model_config

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
EVEN = [[100, 110, 90, 100], [100, 100, 100, 100]]  # by layer and expert
BUSY = [[100, 110, 90, 100], [70, 130, 100, 100]]
IDLE = [[100, 100, 100, 100], [115, 115, 115, 55]]


@pytest.fixture(scope="module")
def report():
    """The modules of the numbers and of the report; neither has flags."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import balance_report

        yield balance_report
    finally:
        sys.path.remove(str(EXAMPLES))


def write_run(out, rate, weight, seed, nll, loads, **settings):
    """A finished run of 100 steps, `loads` of each tenth of it."""
    folder = out / "runs" / f"{rate}-{weight}-{seed}"
    folder.mkdir(parents=True)
    told = {"seed": seed, "bias_rate": rate, "balance_weight": weight, "lr": 0.1, "corpus": "abc", **settings}
    (folder / "run.json").write_text(json.dumps(told))
    held = {"bits_per_byte": nll / 2, "nll": nll}
    (folder / "results.json").write_text(json.dumps({"heldout": held}))
    (folder / "report.html").write_text("")
    rows = [{"kind": "load", "step": 10 * n, "steps": 10, "load": load} for n, load in enumerate(loads, 1)]
    rows += [{"kind": "heldout", "step": step, "nll": nll + 1 - step / 100} for step in (0, 50, 100)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def experiment(tmp_path):
    """The paper's arm and a quicker one with two seeds, no balancing with two, an auxiliary loss with one."""
    for seed, nll in ((0, 4.0), (1, 4.1)):
        write_run(tmp_path, 0.001, 1e-4, seed, nll, [IDLE] * 5 + [EVEN] * 5)
        write_run(tmp_path, 0.005, 1e-4, seed, nll + 0.01, [EVEN] * 10)
        write_run(tmp_path, 0.0, 0.0, seed, nll + (0.03 if seed else -0.01), [EVEN] * 9 + [BUSY])
    write_run(tmp_path, 0.0, 0.01, 1, 4.3, [IDLE] * 9 + [EVEN])
    return tmp_path


def test_numbers_of_known_logs(report, experiment):
    table = report.write_report(experiment, 0.2, None)
    found = json.loads((experiment / "balance.json").read_text())
    assert list(found) == ["loss_free:0.001", "loss_free:0.005", "none", "auxiliary:0.01"]
    free, quick, none, auxiliary = found.values()
    assert free["seeds"] == [0, 1] and free["perplexity"] == pytest.approx([math.exp(4.0), math.exp(4.1)])
    assert free["cost"] == [] and quick["cost"] == pytest.approx([math.exp(0.01) - 1] * 2)
    assert none["cost"] == pytest.approx([math.exp(-0.01) - 1, math.exp(0.03) - 1])
    assert auxiliary["cost"] == pytest.approx([math.exp(0.2) - 1]), "only with the same seed"
    assert (free["window"], free["summed"]) == ([20, 20], [20, 20])
    # The last two rows: experts of the second layer got 170, 230, 200 and 200 of a mean of 200.
    assert none["busiest"] == [1.15, 1.15] and none["idlest"] == [0.85, 0.85] and none["even"] == [True, True]
    assert none["variance"] == pytest.approx([0.01125] * 2) and none["unused"] == [0, 0]
    # 215, 215, 215, 155: nobody is 20% above the mean, but one is below.
    assert auxiliary["busiest"] == [1.075] and auxiliary["idlest"] == [0.775] and auxiliary["even"] == [False]
    # A window is 20 steps: that to step 60 has a row of IDLE and one of EVEN, and its idlest expert 155 of 200.
    assert (free["since"], quick["since"], none["since"], auxiliary["since"]) == ([70, 70], [20, 20], [20, 20], [None])
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][:3] == ["arm", "γ", "α"] and lines[0][-2:] == ["even", "since"]
    assert lines[1][:7] == ["loss_free", "0.001", "0.0001", "2", "2.0250", f"{(math.exp(4) + math.exp(4.1)) / 2:.2f}", "-"]
    mean = (math.exp(3.99) + math.exp(4.13)) / 2
    assert " ".join(lines[3]).startswith(f"none 0 0 2 2.0300 {mean:.2f} +1.03 (-1.00 to +3.05) 1.150 0.850 0.0112")
    assert lines[3][-2:] == ["yes", "20"] and lines[4][-2:] == ["no", "-"] and "+22.14" in lines[4]
    assert table.endswith("load: of the last 20 steps")
    assert (experiment / "balance.png").stat().st_size > 10_000
    page = (experiment / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "auxiliary:0.01" in page and "bias_rate" not in page


def test_a_window_of_one_row_sees_the_last_alone(report, experiment):
    report.write_report(experiment, 0.1, None)
    found = json.loads((experiment / "balance.json").read_text())
    assert found["none"]["busiest"] == [1.3, 1.3] and found["none"]["since"] == [None, None]
    assert found["auxiliary:0.01"]["even"] == [True] and found["auxiliary:0.01"]["since"] == [100]


def test_worst_layer_and_what_is_even(report):
    """Where every expert is within 20% the variance is below 0.04, so its own bound of 0.1 is never what fails."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        load = rng.uniform(0.8, 1.2, [3, 8])
        load /= load.mean(1, keepdims=True)
        found = report.worst_layer(1000 * load)
        assert found.busiest == pytest.approx(load.max(), abs=1e-6) and found.idlest == pytest.approx(load.min(), abs=1e-6)
        assert found.variance == pytest.approx(load.var(1).max(), abs=1e-6) and found.variance < 0.04
        assert found.even == bool(load.max() <= 1.2 and load.min() >= 0.8)


def test_rows_that_do_not_fill_the_window_are_told(report, tmp_path):
    folder = write_run(tmp_path, 0.0, 0.0, 0, 4.0, [EVEN] * 10)
    rows = read_rows(folder / "log.jsonl")
    rows[8]["steps"] = 3  # the run went on from step 87, and with it the count
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = report.write_report(tmp_path, 0.2, None).splitlines()
    assert lines[-1] == "none, seed 0: the rows of the log that lie in them have 13 steps"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.2, "seed": 1}, "none, seed 1, and loss_free:0.001, seed 0, differ in lr"),
        ({"corpus": "b"}, "none, seed 0, and loss_free:0.001, seed 0, differ in corpus"),
    ],
)
def test_runs_of_other_settings_are_not_compared(report, tmp_path, settings, message):
    write_run(tmp_path, 0.001, 1e-4, 0, 4.0, [EVEN] * 10)
    write_run(tmp_path, 0.0, 0.0, **{"seed": 0, "nll": 4.0, "loads": [EVEN] * 10, **settings})
    with pytest.raises(ValueError, match=message):
        report.write_report(tmp_path, 0.1, None)


def test_the_table_goes_into_the_docs(report, experiment, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "balance.md"
    page.write_text("before\n\n<!-- table -->\n```\nold\n```\n\nafter\n```\nkept\n```\n")
    table = report.write_report(experiment, 0.1, docs)
    assert page.read_text() == f"before\n\n<!-- table -->\n```\n{table}\n```\n\nafter\n```\nkept\n```\n"
    assert (docs / "balance.png").read_bytes() == (experiment / "balance.png").read_bytes()
    page.write_text("no mark")
    with pytest.raises(ValueError, match="has 0 places marked for the table"):
        report.write_report(experiment, 0.1, docs)


def test_the_docs_have_a_place_for_the_table(report):
    page = EXAMPLES.parent / "docs" / "balance.md"
    assert len(report.DOCS.findall(page.read_text(encoding="utf-8"))) == 1


CALLS = """
import contextlib, io, json, sys
import compare_balance
from absl.testing import flagsaver
found = []
for argv in json.loads(sys.argv[1]):
    said, shown = io.StringIO(), io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        try:
            code = compare_balance.main(compare_balance.parse_flags(["compare_balance.py", *argv]))
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue(), shown.getvalue()])
print(json.dumps(found))
"""


def call(folder, *commands):
    """Calls the program in one other process, as two programs' flags cannot be in one; returns codes and outputs."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(commands)], capture_output=True, text=True, timeout=300, cwd=folder,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_bad_input_is_one_line(tmp_path):
    settings = {"data": None, "corpus": None, "steps": 50, "passed": []}
    for folder, file, text in (
        ("other", "settings.json", settings), ("mine", "thesis.txt", {}), ("odd", "settings.json", [])
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        if folder != "mine":
            (tmp_path / folder / "runs" / "none-0").mkdir(parents=True)
            (tmp_path / folder / "runs" / "none-0" / "run.json").write_text("{}")
        (tmp_path / folder / file).write_text(json.dumps(text))
    cases = {
        "--arms has 'loss', want loss_free, loss_free:RATE, none or auxiliary:WEIGHT": ["--arms=none,loss"],
        "--arms has 'none:1', want": ["--arms=none:1"],
        "--arms has 'auxiliary', want": ["--arms=auxiliary"],
        "--arms has 'loss_free:-1', want a number above 0": ["--arms=loss_free:-1"],
        "--seeds has 'a', want numbers of 0 or more": ["--seeds=0,a"],
        "--data and --corpus are both given": ["--data=a", "--corpus=b"],
        "--window is 0.0, want a share above 0": ["--window=0"],
        "flag --steps=9": ["--steps=9"],
        "unexpected argument 'tiny', want flags as --name=value": ["--", "--preset", "tiny"],
        "--seed stands after --, but each run has its own": ["--", "--seed=3"],
        "--write_docs: there is no": ["--write_docs=nowhere"],
        "holds 'thesis.txt' but no experiment of this program": [f"--out={tmp_path / 'mine'}"],
        "--steps is 60, the runs in": ["--steps=60", f"--out={tmp_path / 'other'}"],
        "what stands after -- is ['--lr=1'], the runs in": ["--steps=50", f"--out={tmp_path / 'other'}", "--", "--lr=1"],
        "holds no object of settings": [f"--out={tmp_path / 'odd'}"],
    }
    assert_one_line(tmp_path, cases)


@LONG
def test_bad_input_of_a_run_is_one_line(tmp_path):
    """Settings are there, of an experiment of which no run has begun."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "settings.json").write_text(json.dumps({"data": None, "corpus": None, "steps": 50, "passed": []}))
    said = "loss_free:0.001, seed 0: pretrain: read_corpus: 'nowhere' does not exist"
    assert_one_line(tmp_path, {said: ["--out=new", "--corpus=nowhere"]})


def assert_one_line(tmp_path, cases):
    for message, (code, said, _) in zip(cases, call(tmp_path, *cases.values())):
        lines = [line for line in said.splitlines() if line != "loss_free:0.001, seed 0"]
        assert code == 2 and len(lines) == 1, (message, code, said)
        assert lines[0].startswith("compare_balance: ") and message in lines[0], (message, said)


def test_finished_runs_are_not_trained_again(experiment):
    """Of all runs of the folder there is a table, whichever were asked for; an arm that is there in part is finished."""
    settings = {"data": None, "corpus": str((experiment / "text").resolve()), "steps": 100, "passed": ["--lr=0.1"]}
    (experiment / "settings.json").write_text(json.dumps(settings))
    for folder in list((experiment / "runs").iterdir()):
        told = json.loads((folder / "run.json").read_text())
        kind = "loss_free" if told["bias_rate"] else "auxiliary" if told["balance_weight"] else "none"
        number = {"loss_free": f"-{told['bias_rate']:g}", "auxiliary": f"-{told['balance_weight']:g}", "none": ""}[kind]
        folder.rename(folder.with_name(f"{kind}{number}-{told['seed']}"))
    same = ["--corpus=text", "--steps=100", "--out=.", "--window=0.2"]
    asked = [["--arms=loss_free,none", "--seeds=1,0"], ["--arms=loss_free:0.001,auxiliary:1e-2,loss_free:5e-3", "--seeds=1"]]
    first, second = call(experiment, *([*same, *some, "--", "--lr=0.1"] for some in asked))
    assert first == second and first[:2] == [0, ""], (first, second)
    assert first[2].count("\n") == 6 and (experiment / "balance.txt").read_text() == first[2]


def environment():
    """Two threads, as this process has (`conftest.py`)."""
    paths = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
    return os.environ | {"TF_NUM_INTRAOP_THREADS": "2", "TF_NUM_INTEROP_THREADS": "2", "PYTHONPATH": paths}


@pytest.mark.skipif(not MORE, reason="a long case")
def test_an_experiment_that_is_interrupted_goes_on(tmp_path):
    words, rng = "to be or not that is the question whether tis nobler in mind suffer".split(), random.Random(0)
    (tmp_path / "words.txt").write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(400)))
    cfg = model_config(num_hidden_layers=2, num_nextn_predict_layers=0).replace(vocab_size=280)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()))
    sizes = "--config=config.json --batch_size=4 --seq_len=8 --heldout=0.1 --watch_every=0 --eval_every=0 --lr=0.01".split()
    arms = ["loss_free:0.02", *more("none")]
    command = [sys.executable, str(EXAMPLES / "compare_balance.py"), "--corpus=words.txt", "--steps=200", "--out=out"]
    command += [f"--arms={','.join(arms)}", "--", *sizes]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment()}
    folder = tmp_path / "out" / "runs" / "loss_free-0.02-0"
    log = folder / "log.jsonl"

    with subprocess.Popen(command, **how) as first:
        deadline = time.monotonic() + 200
        while not log.exists() or log.read_bytes().count(b'"train"') < 3:
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()
            time.sleep(0.01)
        first.send_signal(signal.SIGTERM)
        shown, said = first.communicate(timeout=200)
    assert first.returncode == 128 + signal.SIGTERM and not shown, (shown, said)
    assert said.splitlines()[-1] == "compare_balance: interrupted; the same command goes on where it was"
    stopped = read_rows(log)[-1]["step"]
    assert 3 <= stopped < 200, "it was interrupted too late to show anything"

    second = subprocess.run(command, timeout=300, **how)
    assert second.returncode == 0, second.stderr
    assert f"going on from step {stopped} of" in folder.with_name(f"{folder.name}.txt").read_text()
    found = json.loads((tmp_path / "out" / "balance.json").read_text())
    assert list(found) == arms and found[arms[0]]["even"] == [True]
    for arm in found.values():
        assert arm["window"] == arm["summed"] == [20]
        for layer in arm["by_layer"][0]["load"]:  # every token of the window was sent to that many experts
            assert sum(layer) == 20 * 4 * 8 * cfg.moe.router.top_k
    assert all(found[name]["variance"][0] > 2 * found[arms[0]]["variance"][0] for name in arms[1:])
