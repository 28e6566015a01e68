"""`examples/grpo.py` to the end with what a real run has: a chat template, drafts, a reference, mini-batches, measurements,
several turns, workers elsewhere, published settings."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from dsv3 import tree
from dsv3.pretrained import load_pretrained
from dsv3.rl.settings import PUBLISHED
from dsv3.train.records import read_rows, row_scalars
from tests.more import MORE
from tests.rl.model import save_sums_model

pytestmark = pytest.mark.skipif(not MORE, reason="long cases: each run compiles for some ten seconds")

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

# Flags are the process's own: so it is a process of its own, one for all runs. `@n` sends a signal when a run shows its
# exploration n. At last come the values that recipes give flags.
DRIVER = """
import contextlib, io, json, os, signal, sys
import grpo, grpo_setup, grpo_train
from absl.testing import flagsaver

def call(arguments):
    ends = [int(argument[1:]) for argument in arguments if argument[0] == "@"]

    def shown(row, total):
        if row["step"] in ends:
            os.kill(os.getpid(), signal.SIGTERM)
        return line(row, total)

    grpo_train.progress_line = shown
    try:
        return grpo.main(grpo.parse_flags(["grpo.py", *(argument for argument in arguments if argument[0] != "@")]))
    except SystemExit as end:
        return end.code

def recipe(name):
    grpo.parse_flags(["grpo.py", "--model=model", f"--recipe={name}"])
    grpo_setup.take_recipe()
    return grpo_setup.FLAGS.flag_values_dict()

if __name__ == "__main__":  # workers in other processes import this again
    line = grpo_train.progress_line
    for arguments in json.load(open("runs.json")):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
            code = call(arguments)
        print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
    found = {}
    for name in sorted(grpo_setup.PUBLISHED):
        with flagsaver.flagsaver():
            found[name] = recipe(name)
    print(json.dumps(found))
"""

SMALL = "--model=model --prompts=2 --group_size=4 --reward=language:0.5,number:0 --samples=2".split()
CHAT = [
    *SMALL,
    *"--chat --made=30 --heldout=4 --explorations=4 --max_new_tokens=4 --recipe=r1 --lr=0.01 --minibatches=2".split(),
    *"--rows=3 --reference_every=3 --measure_every=2 --eval_every=2 --mtp_weight=0.5".split(),
]
TURNS = [
    *SMALL,
    *"--problems=turns.jsonl --heldout=0 --explorations=2 --max_new_tokens=16 --recipe=deepseekmath --lr=0.01".split(),
    r"--template={question}\n", r"--turn_template=\nand {question}:", *(f"--stop={text}" for text in "0123456789+="),
]
RUNS = {
    "whole": [*CHAT, "--out=whole"],
    "stopped": [*CHAT, "--out=broken", "@2"],
    "gone on": [*CHAT, "--out=broken"],
    "turns": [*TURNS, "--out=turns"],
}
WORKERS = {name: [*TURNS, f"--out={name}", f"--worker={name}", "--workers=2"] for name in ("process", "ray")}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    save_sums_model(folder / "model", TEMPLATE, modules=1, length=64)
    rows = [{"prompt": [f"{n}+1=", f"{n}+2="], "reference": 2 * n + 3} for n in range(4)]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(folder, runs):
    """Each run's exit code and what it has printed, and last the recipes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "driver.py"], capture_output=True, text=True, timeout=400, cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def results(folder):
    return dict(zip([*RUNS, "recipes"], call(folder, list(RUNS.values())), strict=True))


def numbers_of(row):
    """Those that time does not decide, by their names."""
    return {name: value for name, value in row_scalars(row).items() if not name.endswith("seconds")}


def assert_same_run(got, want):
    """Rows of the same numbers: sums in float32 that other threads may add up otherwise, through some steps of AdamW."""
    assert [(row["kind"], row["step"]) for row in got] == [(row["kind"], row["step"]) for row in want]
    for a, b in zip(got, want):
        if a["kind"] == "samples":
            names = ("problem", "sample", "prompt", "answer", "finish")
            assert [[one[name] for name in names] for one in a["samples"]] == [
                [one[name] for name in names] for one in b["samples"]
            ]
            continue
        a, b = numbers_of(a), numbers_of(b)
        assert set(a) == set(b)
        for name in a:
            # what is the difference of numbers that are nearly alike is known to their rounding
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


def rows_of(folder, kind):
    return [row for row in read_rows(folder / "log.jsonl") if row["kind"] == kind]


def test_a_run_that_is_interrupted_gives_the_numbers_of_one_that_is_not(folder, results):
    assert results["whole"][0] == 0, results["whole"]
    code, out, err = results["stopped"]
    assert code == 128 + 15 and "SIGTERM: saved after 2 of 4 explorations; the same command goes on" in out, (out, err)
    code, out, err = results["gone on"]
    assert code == 0 and "going on after exploration 2" in out, (out, err)
    assert_same_run(read_rows(folder / "broken" / "log.jsonl"), read_rows(folder / "whole" / "log.jsonl"))
    exports = [load_pretrained(folder / name / "export", dtype="float32") for name in ("broken", "whole")]
    for (path, a), b in zip(tree.items(exports[0][1]), tree.flatten(exports[1][1])):
        # AdamW makes a step of full size, 0.01, of a gradient that is nothing but rounding.
        assert np.mean(np.abs(np.asarray(a) - np.asarray(b)) > 1e-4) < 0.02, path


def test_a_run_has_drafts_a_reference_and_measurements(folder, results):
    _, out, _ = results["whole"]
    rows = rows_of(folder / "whole", "grpo")
    assert all(row["taken"] == 2 and row["skipped"] == 0 and len(row["mtp"]) == 1 for row in rows)
    assert all(0 <= row["acceptance"] <= 1 for row in rows)
    assert out.count("  accepted ") == 4 and out.count("  kl 0.") == 4
    # The first mini-batch meets the reference itself, and so does the first after the reference has become the policy.
    kl = [row["kl"] for row in rows]
    assert 0 < kl[0] < 0.5 * kl[2] and 0 < kl[3] < 0.5 * kl[2], kl
    measured = [row["step"] for row in rows if "mismatch" in row]
    assert measured == [row["step"] for row in rows if "free_mismatch" in row and "router_agreement" in row] == [1, 3]
    # Of float32 with a cache and without, as in test_logprobs.py.
    assert rows[0]["mismatch"]["max"] < 1e-4 and rows[0]["router_agreement"] > 0.99
    assert [row["step"] for row in rows_of(folder / "whole", "heldout")] == [0, 2, 4]
    sample = rows_of(folder / "whole", "samples")[0]["samples"][0]
    assert len(sample["prompt"]) == 4 and sample["prompt"][1] == "+", "the question, without what the template has around it"
    page = (folder / "whole" / "report.html").read_text()
    assert all(f"<td class=left>{name}</td><td>" in page for name in ("kl", "acceptance", "router_agreement"))
    cfg, params, _ = load_pretrained(folder / "whole" / "export", dtype="float32")
    _, before, _ = load_pretrained(folder / "model", dtype="float32")
    moved = [float(abs(a - b).numpy().max()) for a, b in zip(tree.flatten(params.mtp), tree.flatten(before.mtp))]
    assert cfg.num_mtp_layers == 1 and min(moved) > 0, "the drafts are trained, too"


def test_recipes_are_the_published_settings(folder, results):
    for name, published in PUBLISHED.items():
        flags = results["recipes"][name]
        want = {"kl_weight": published.kl_weight, "group_size": published.group_size, "lr": published.learning_rate,
                "minibatches": published.minibatches, "epochs": published.epochs}  # fmt: skip
        want |= dict.fromkeys(("clip_low", "clip_high"), published.clip or 0.2)
        want |= {"reference_every": published.reference_every or 0, "prompts": 8, "max_new_tokens": 64}
        assert {flag: flags[flag] for flag in want} == want
    whole, turns = (json.loads((folder / name / "run.json").read_text()) for name in ("whole", "turns"))
    names = ("kl_weight", "clip_low", "clip_high", "epochs", "lr", "group_size", "minibatches", "reference_every")
    assert [whole[name] for name in names] == [0.001, 10.0, 10.0, 1, 0.01, 4, 2, 3], "flags that are given come first"
    assert [turns[name] for name in names] == [0.04, 0.2, 0.2, 1, 0.01, 4, 1, 0]


def test_a_conversation_of_several_turns(folder, results):
    code, out, err = results["turns"]
    assert code == 0, (out, err)
    for row in rows_of(folder / "turns", "samples"):
        for sample in row["samples"]:
            assert re.fullmatch(r"(\d)\+1=\n\nand \1\+2=:", sample["prompt"]), sample
    rows = rows_of(folder / "turns", "grpo")
    assert max(row["length_max"] for row in rows) > 16, "more than one answer of 16 tokens"
    for row in rows:  # weights of the recipe, and of drafts by default
        assert row["loss"] == pytest.approx(row["policy"] + 0.04 * row["penalty"] + 0.1 * row["mtp"][0], abs=1e-6)


@pytest.mark.parametrize("worker", WORKERS)
def test_workers_elsewhere_give_the_same_run(folder, results, worker):
    if worker == "ray":
        pytest.importorskip("ray", reason="the extra `ray` is not installed")
    (code, out, err), _ = call(folder, [WORKERS[worker]])
    assert code == 0, (out, err)
    assert_same_run(read_rows(folder / worker / "log.jsonl"), read_rows(folder / "turns" / "log.jsonl"))
