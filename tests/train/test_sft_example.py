"""`examples/sft.py` as its user runs it: to the end, interrupted and run again, and given bad input, in one process."""

import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import dsv3
from dsv3.data import (
    chat_codec,
    embedded_conversations,
    encode_prompt,
    find_chat_template,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from dsv3.data.default_template import DEFAULT_CHAT_TEMPLATE
from dsv3.pretrained import load_pretrained, save_pretrained
from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from dsv3.train.records import read_rows
from dsv3.train.schedule_paper import PAPER_SFT
from tests.more import LONG

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
SMALL = "--model=model --data=rows.jsonl --batch_size=2 --max_length=120 --lr=3e-3 --lr_end=1e-3 --epochs=1".split()
RUN = [*SMALL, "--eval_every=5", "--save_every=4"]
SHORT = [*RUN, "--out=short", "--max_length=50", "--skip_long", "--samples=99"]
PARTS = [*SMALL, "--batch_size=4", "--epochs=1.5", "--warmup_steps=3", "--eval_every=0", "--save_every=0", "--samples=0"]

# Runs the program for each list of arguments; `@n` sends the signal that Ctrl-C sends when batch n is asked for, `!n` ends
# the program there, `~file` deletes a file before, `^run` changes what a run says of its rows.
DRIVER = """
import contextlib, io, json, os, pathlib, signal, sys
import sft, sft_train
from absl.testing import flagsaver

make = sft_train.batch
for arguments in json.loads(sys.argv[1]):
    stops, ends = ([int(argument[1:]) for argument in arguments if argument[0] == kind] for kind in "@!")
    for argument in arguments:
        if argument[0] == "~":
            os.remove(argument[1:])
        if argument[0] == "^":
            file = pathlib.Path(argument[1:], "run.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | {"encoded": "others"}))

    def batch(setup, number):
        if number in stops:
            os.kill(os.getpid(), signal.SIGINT)
        if number in ends:
            raise KeyboardInterrupt
        return make(setup, number)

    sft_train.batch = batch
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), flagsaver.flagsaver():
        try:
            code = sft.main(sft.parse_flags(["sft.py", *(argument for argument in arguments if argument[0] not in "@!~^")]))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue().splitlines()]))
print(json.dumps({name: sft.FLAGS[name].default for name in ("epochs", "lr", "lr_end", "warmup_steps")}))
"""

USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
BAD = {
    "no model": (["--data=rows.jsonl"], "no model in runs/demo/export: `make demo` makes one, or name"),
    "no such model": (["--model=nowhere"], "nowhere"),
    "roles out of order": ([*SMALL, "--data=order.jsonl"], r"'order.jsonl' line 2: message 2 is of role 'user', want 'as"),
    "no rows": ([*SMALL, "--data=other.jsonl"], r"'other.jsonl' line 1: the fields are \['text'\], want `messages`"),
    "no file": ([*SMALL, "--data=none.json"], "'none.json' is no file"),
    "a template that does not parse": ([*SMALL, "--chat_template=broken.jinja"], "'broken.jinja' does not parse .line 1"),
    "a template that fails": (
        [*SMALL, "--chat_template=fails.jinja"], "'rows.jsonl' line 1: render_chat: --chat_template 'fails.jinja' fails",
    ),
    "a template that breaks out": (
        [*SMALL, "--chat_template=escapes.jinja"], "--chat_template 'escapes.jinja' tries what its sandbox forbids",
    ),
    "a template without an end": ([*SMALL, "--chat_template=endless.jinja"], "'endless.jinja' does not end message 2 with"),
    "a long conversation": ([*SMALL, "--max_length=9"], r"'rows.jsonl' line 1: the conversation has \d+ tokens, --max"),
    "only long conversations": ([*SMALL, "--max_length=3", "--skip_long"], "no conversation of --data is as short as --max"),
    "beyond the model": ([*SMALL, "--max_length=129"], "--max_length is 129, want at most the model's context, 128"),
    "few rows": ([*SMALL, "--batch_size=400"], "--data makes .* packed rows, fewer than --batch_size 400"),
    "one question": ([*SMALL, "--data=same.jsonl"], "split_conversations: 1 different questions, want at least 2"),
    "rates": ([*SMALL, "--lr=1e-6"], r"--lr is 1e-06 and --lr_end 0.001, want 0 <= lr_end <= lr and lr > 0"),
    "no number": ([*SMALL, "--lr=nan"], "--lr is nan, want a number"),
    "odd parts": ([*SMALL, "--accumulate=3"], "--batch_size 2 is not divisible by --accumulate 3"),
    "epochs": ([*SMALL, "--epochs=0"], "--epochs is 0.0, want above 0"),
    "warm-up": ([*SMALL, "--warmup_steps=900"], "--warmup_steps is 900, want fewer than the .* steps of 1 epochs"),
    "another vocabulary": ([*SMALL, "--model=large"], "the tokenizer's largest id is .*, want below the model's vocab_size"),
    "other settings": ([*RUN, "--out=straight", "--seed=3"], "`seed` is 3 here, 0 there"),
    "another model": ([*RUN, "--out=straight", "--model=other"], "`model` is .*; another --out keeps both"),
    "a folder of something else": ([*RUN, "--out=model"], "--out 'model' holds 'config.json' but no run"),
    "no resuming": ([*RUN, "--out=straight", "--noresume"], "--noresume, but --out 'straight' holds a run"),
    "other special tokens": ([*RUN, "--out=straight", "--model=renamed"], "`special_tokens.bos_token` is .*; another --out"),
    "other rows": ([*RUN, "--out=begun", "^begun"], "`encoded` is '.*' here, 'others' there; another --out keeps both"),
    "an end that the model runs past": (
        [*SMALL, "--model=deaf"], "ends answers with '.*', the token 1, at which the model does not stop; want it in",
    ),
    "fresh on its own model": (
        [*RUN, "--out=own", "--fresh", "--model=own/export"], "would delete --model 'own/export', which lies in",
    ),
    "fresh on a model of links": ([*RUN, "--out=own", "--fresh", "--model=links"], "would delete --model 'links', which"),
    "fresh on its own data": (
        [*RUN, "--out=own", "--fresh", "--data=own/export/rows.jsonl"], "would delete --data 'own/export/rows",
    ),
    "fresh on its own template": (
        [*RUN, "--out=own", "--fresh", "--chat_template=own/export/fails.jinja"], "would delete --chat_template 'own",
    ),
    "fresh on another program's run": (
        [*RUN, "--out=pretrained", "--fresh"], "--out 'pretrained' holds a run of pretrain.py, want another --out",
    ),
    "argument": ([*SMALL, "rows.jsonl"], r"unexpected argument \['rows.jsonl'\]"),
}  # fmt: skip
# Runs whose settings bad input is compared with, which end before anything is computed; and one that learns a little.
BEGUN = {name: [*RUN, f"--out={name}", "--samples=0", "--eval_every=0", "!0"] for name in ("straight", "begun")}
QUICK = [*SMALL, "--out=quick", "--epochs=0.1", "--eval_every=0", "--samples=0"]
GOOD = {
    "straight": [*RUN, "--out=straight", "--samples=2"],
    "interrupted": [*RUN, "--out=broken", "--samples=1", "@6"],
    "again": [*RUN, "--out=broken", "--samples=3"],
    "ended": [*SHORT, "!2"],
    "begun again": [*SHORT, "~short/tokenizer/tokenizer.json"],
    "at once": [*PARTS, "--out=once"],
    "in parts": [*PARTS, "--out=parts", "--accumulate=2"],
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    rows = embedded_conversations(90)
    text = "\n".join(message["content"] for row in rows for message in row.messages)
    tokenizer = train_tokenizer(["".join(random.Random(0).sample(text.splitlines(True), k=80))] * 3, 330)
    cfg = dsv3.preset("tiny").replace(vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1, first_k_dense_replace=0)
    router = dsv3.router_init(cfg)
    save_pretrained(folder / "model", cfg, dsv3.model_init([0, 1], cfg), router)
    save_tokenizer(tokenizer, folder / "model")
    save_pretrained(folder / "other", cfg, dsv3.model_init([2, 3], cfg), router)
    save_tokenizer(tokenizer, folder / "other")
    save_pretrained(folder / "large", cfg, dsv3.model_init([0, 1], cfg), router)
    save_tokenizer(train_tokenizer([text], 600), folder / "large")
    write_rows(folder / "rows.jsonl", [{"messages": row.messages} for row in rows])
    write_rows(folder / "order.jsonl", [{"messages": [USER, SAID]}, {"messages": [USER, USER]}])
    write_rows(folder / "other.jsonl", [{"text": "Hi"}])
    write_rows(folder / "same.jsonl", [{"messages": [USER, SAID]}] * 3)
    for name, template in {
        "broken": "{% if", "fails": "{{ messages[0].content + 1 }}", "escapes": "{{ messages.__class__ }}",
        "endless": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }.items():  # fmt: skip
        (folder / f"{name}.jinja").write_text(template)
    (folder / "pretrained" / "export").mkdir(parents=True)
    (folder / "pretrained" / "run.json").write_text('{"seed": 0}')
    for name, file, entry in (
        ("renamed", "tokenizer_config.json", {"bos_token": "<think>"}), ("deaf", "config.json", {"eos_token_id": 2}),
    ):  # fmt: skip
        changed = pathlib.Path(shutil.copytree(folder / "model", folder / name), file)
        changed.write_text(json.dumps(json.loads(changed.read_text()) | entry))
    own = folder / "own" / "export"
    shutil.copytree(folder / "model", own)
    for file in ("rows.jsonl", "fails.jinja"):
        shutil.copy(folder / file, own / file)
    (folder / "own" / "run.json").write_text('{"program": "sft"}')
    (folder / "links").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / "links" / name).symlink_to(own / name)
    return folder


def run_all(folder, calls):
    """What each call gives, in one process, and the defaults of some flags."""
    threads = {"TF_NUM_INTRAOP_THREADS": "2", "TF_NUM_INTEROP_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(list(calls.values()))], capture_output=True, text=True, timeout=500,
        cwd=folder, env=os.environ | threads | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip([*calls, "defaults"], map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def few(folder):
    """Of a process for all that takes little time."""
    return run_all(folder, BEGUN | {what: arguments for what, (arguments, _) in BAD.items()} | {"quick": QUICK})


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Of runs that take a while, in a folder of their own."""
    own = tmp_path_factory.mktemp("runs")
    for name in ("model", "rows.jsonl"):
        (own / name).symlink_to(folder / name)
    return own, run_all(own, GOOD)


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(folder, few, what):
    code, _, lines = few[what]
    assert all(few[name][0] == 130 for name in BEGUN)
    kept = [*(name for name in os.listdir(folder / "model") if name != ".lock"), "fails.jinja", "rows.jsonl"]
    assert sorted(os.listdir(folder / "own" / "export")) == sorted(kept), "what --fresh would delete is there"
    assert code == 2 and len(lines) == 1 and lines[0].startswith("sft: "), lines
    assert re.search(BAD[what][1], lines[0]), lines[0]


def rows_of(folder, kind):
    return [row for row in read_rows(folder / "log.jsonl") if row["kind"] == kind]


def test_a_short_run_ends_with_a_model(folder, few):
    code, _, lines = few["quick"]
    assert code == 0, lines
    rows, scores = rows_of(folder / "quick", "train"), json.loads((folder / "quick" / "results.json").read_text())
    assert len(rows) >= 2 and all(np.isfinite(row["loss"]) for row in rows)
    assert 0 < scores["after"]["nll"] != scores["before"]["nll"] > 0
    _, before, _ = load_pretrained(folder / "model", dtype="float32")
    _, after, _ = load_pretrained(folder / "quick" / "export", dtype="float32")
    assert np.abs(after.head - before.head).max() > 0


@LONG
def test_a_run_leaves_what_it_promises(results):
    folder, results = results
    code, printed, _ = results["straight"]
    assert code == 0
    out = folder / "straight"
    scores = json.loads((out / "results.json").read_text())
    held = rows_of(out, "heldout")
    assert held[0]["step"] == 0 and held[-1]["nll"] == pytest.approx(scores["after"]["nll"])
    assert scores["after"]["nll"] < scores["before"]["nll"] - 0.3
    assert scores["after"]["mtp_nll"] < scores["before"]["mtp_nll"] - 0.3
    rates = [row["learning_rate"] for row in rows_of(out, "train")]
    assert rates[0] == pytest.approx(3e-3) and 1e-3 < rates[-1] < rates[-2] < rates[1]
    for name in ("loss", "learning_rate", "expert_load"):
        assert (out / "plots" / f"{name}.png").stat().st_size > 5000
    samples = (out / "samples.txt").read_text()
    assert samples in printed and samples.count(", before\n") == samples.count(", after\n") == 2
    page = (out / "report.html").read_text()
    assert "cross-entropy" in page and "in the data" in page and "data:image/png;base64," in page
    cfg, params, router = load_pretrained(out / "export", dtype="float32")
    tokenizer = load_tokenizer(out / "export")
    template = find_chat_template(out / "export", tokenizer)
    assert template.source == DEFAULT_CHAT_TEMPLATE and str(out / "export") not in template.source
    prompt = encode_prompt(chat_codec(tokenizer, template), [USER])
    assert dsv3.model_apply(params, router, [prompt], cfg=cfg).logits.shape == [1, len(prompt), cfg.vocab_size]
    assert [checkpoint_step(path) for path in list_checkpoints(out / "checkpoints")][-1] == len(rates)


@LONG
def test_an_interrupted_run_goes_on_to_the_same_losses(results):
    folder, results = results
    code, printed, _ = results["interrupted"]
    assert code == 130 and "SIGINT: saved at step 7 of" in printed and "run the same command again" in printed
    code, printed, _ = results["again"]
    assert code == 0 and "going on from step 7" in printed
    want, got = rows_of(folder / "straight", "train"), rows_of(folder / "broken", "train")
    assert [row["step"] for row in got] == list(range(1, len(want) + 1))
    for name in ("loss", "nll", "balance", "grad_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-4, err_msg=name)
    before, samples = ((folder / "broken" / name).read_text() for name in ("before.json", "samples.txt"))
    before = json.loads(before)
    assert "begun with 1 questions" in printed and len(before["questions"]) == samples.count(", after\n") == 1


@LONG
def test_micro_batches_give_the_losses_of_the_whole(results):
    folder, results = results
    for what in ("at once", "in parts"):
        assert results[what][0] == 0, results[what]
    want, got = (rows_of(folder / name, "train") for name in ("once", "parts"))
    assert [row["step"] for row in got] == [row["step"] for row in want] and len(want) > 6
    for name in ("loss", "nll", "balance", "grad_norm", "tokens"):
        # Sums in another order; AdamW makes of the rounding of a gradient near zero a step of full size.
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-3, err_msg=name)
    assert want[-1]["nll"] < want[0]["nll"] - 0.3


@LONG
def test_the_rate_warms_up_and_falls_by_a_cosine(results):
    folder, _ = results
    rates = [row["learning_rate"] for row in rows_of(folder / "parts", "train")]
    falling = np.arange(len(rates) - 3) / (len(rates) - 3)
    want = [0.0, 1e-3, 2e-3, *(1e-3 + 1e-3 * (1 + np.cos(np.pi * falling)))]
    np.testing.assert_allclose(rates, want, rtol=1e-5)


def test_the_defaults_are_the_paper_s(few):
    paper = {"epochs": PAPER_SFT.epochs, "lr": PAPER_SFT.first, "lr_end": PAPER_SFT.last}
    assert few["defaults"] == paper | {"warmup_steps": 0}


@LONG
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(results):
    folder, results = results
    code, _, lines = results["ended"]
    assert code == 130 and lines[-1].startswith("sft: interrupted; to go on, run the same command again"), lines
    code, printed, _ = results["begun again"]
    assert code == 0 and "going on" not in printed
    assert [row["step"] for row in rows_of(folder / "short", "heldout")].count(0) == 1
    assert load_tokenizer(folder / "short" / "export").get_vocab() == load_tokenizer(folder / "model").get_vocab()


@LONG
def test_conversations_that_are_left_out_are_not_asked(results):
    folder, results = results
    _, printed, _ = results["begun again"]
    held = int(re.search(r"held out: (\d+) sequences", printed)[1])  # of one conversation each
    assert printed.count("left out ") == 2, "some of the held-out ones, too"
    assert (folder / "short" / "samples.txt").read_text().count(", after\n") == held
