"""`examples/grpo.py` as its user runs it: stopped in the middle, run again to the end, and given bad input."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from dsv3.pretrained import load_pretrained
from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from dsv3.train.records import read_rows
from tests.more import LONG
from tests.rl.model import save_sums_model

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

# Flags are the process's own, and another example's have the same names: so it is a process of its own, one for all cases.
# The first of them ends before it has saved anything, the second is sent a signal when it shows its second exploration.
DRIVER = """
import contextlib, io, json, os, signal, sys
import grpo, grpo_train
from absl.testing import flagsaver

def once(name):
    new = not os.path.exists(name)
    open(name, "w").close()
    return new

def interrupted(row, total):
    if once("ended"):
        raise KeyboardInterrupt
    if row["step"] == 2 and once("sent"):
        os.kill(os.getpid(), signal.SIGTERM)
    return f"exploration {row['step']}"

def noted(saver, poll=grpo_train.BackgroundSaver.poll):
    open("polled", "a").write(".")
    return poll(saver)

grpo_train.progress_line = interrupted
grpo_train.BackgroundSaver.poll = noted
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = grpo.main(grpo.parse_flags(["grpo.py", *arguments]))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""

RUN = (
    "--out=run --explorations=3 --prompts=2 --group_size=4 --max_new_tokens=4 --made=30 --heldout=4 --lr=0.01 --kl_weight=0 "
    "--measure_every=0 --eval_every=2 --reward=language:0.5,number:0 --rows=8 --samples=2"
).split()
# The template tells the microsecond; with a weight of balance no exploration is without a gradient, and each has a rate.
TIMED = [*RUN, "--chat", "--model=clock", "--lr_end=0.001", "--balance_weight=1e-4"]
GOOD = {"ended": TIMED, "stopped": TIMED, "gone on": TIMED}
QUICK = [*RUN, "--explorations=1", "--lr_end=0.001"]  # to the end, in a folder where nothing ends it
SPLIT = "--problems=split.jsonl --heldout=1 --prompts=1 --max_new_tokens=4".split()
BAD = {
    "no reference": ([*RUN, "--reference_every=5"], "--reference_every 5, but with --kl_weight 0 there is no reference"),
    "a reward twice": (["--reward=number:1,number:2"], "--reward has 'number' twice, want each once"),
    "a group of one": ([*RUN, "--group_size=1"], "--group_size=1: 1 is not integer >= 2"),
    "no model": (["--model=nowhere"], "nowhere"),
    "a reward": (["--reward=honesty:1"], "--reward has 'honesty', want some of accuracy, code, countdown"),
    "a weight": (["--reward=number:much"], "--reward 'number:much': could not convert"),
    "too many held out": (["--made=20", "--heldout=19"], "20 problems, of which --heldout 19 are not trained on"),
    "no room": (["--max_new_tokens=40"], "rollout: the made-up sum "),
    "a template": (["--template=what?"], "--template is 'what?', want a text with {question} in it"),
    "chat of several turns": (
        ["--problems=turns.jsonl", "--chat"], "turns.jsonl:1: encode_turns: the chat template of 'model' does not end",
    ),
    "a template that fails": (
        ["--problems=split.jsonl", "--chat", "--model=failing"],
        "split.jsonl:4: render_chat: the chat template of 'failing' refuses the messages: no threes",
    ),
    "a template that breaks out": (
        ["--chat", "--model=breaking"], ": render_chat: the chat template of 'breaking' tries what its sandbox forbids",
    ),
    "rows": (["--problems=rows.jsonl"], "read_rows: 'rows.jsonl' line 2: there is no 'prompt', want one among 'question'"),
    "an empty reference": (["--problems=empty.jsonl"], "read_rows: 'empty.jsonl' line 1: 'reference' is '', want what"),
    # Named by the file's row, though the split has put it among the held-out ones, which come last.
    "a reference": ([*SPLIT, "--reward=countdown"], "split.jsonl:3, '2+2=\\n': countdown: the reference is '4', want"),
    "a long problem": ([*SPLIT, "--reward=number", "--max_new_tokens=20"], "rollout: split.jsonl:4 has 15 tokens and wants"),
    "a language": (["--reward=language", "--language=xx"], "--reward 'language': make_language_reward: `language` is 'xx'"),
    "a long turn": (["--problems=turns.jsonl", "--heldout=0", "--prompts=2", "--reward=number", "--max_new_tokens=12"],
                    "turns.jsonl:1 has 12 tokens and wants room for 2 answers of 12, that is 36"),
    "temperature": (["--temperature=0"], "GrpoSettings: `temperature` is 0.0, want above 0"),
    "other settings": ([*QUICK, "--lr=0.02"], "`lr` is 0.02 here, 0.01 there"),
    "other explorations": ([*QUICK, "--explorations=2"], "`explorations` is 2 here, 1 there"),
    "a rate that rises": (["--lr=1e-3", "--lr_end=0.01"], "--lr is 0.001 and --lr_end 0.01, want --lr_end at most --lr"),
    "a file": (["--out=split.jsonl", "--max_new_tokens=4"], "cannot write to --out 'split.jsonl'"),
    "no time": (["--out=timeless", "--max_new_tokens=4"], "the `time` of timeless/run.json is 5, want one such as"),
    "no rate": (["--lr_end=nan"], "--lr_end is nan, want a number"),
    "a long warm-up": (["--warmup_steps=6", "--explorations=3", "--minibatches=2"],
                       "--warmup_steps is 6, want fewer than all steps of the optimiser, which are 6"),
    "no resuming": ([*QUICK, "--noresume"], "--noresume, but --out 'run' holds a run"),
    "fresh on its own model": (["--out=own", "--fresh", "--model=own/export", "--max_new_tokens=4"],
                               "--fresh would delete --model 'own/export', which lies in --out 'own'"),
    "fresh on another program's run": (["--out=tuned", "--fresh", "--max_new_tokens=4"], "'tuned' holds a run of sft.py"),
    "foreign files": (["--out=.", "--max_new_tokens=4"], "which is no part of a run"),
    "no drafts": ([*RUN, "--speculative=1"], "`speculative` is 1, but the model has no MTP module"),
}  # fmt: skip


def write_inputs(folder):
    """Models, their templates, and problems."""
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    save_sums_model(folder / "model", template, modules=0, length=32)
    for name, source in (
        ("failing", "{% if '3' in messages[0].content %}{{ raise_exception('no threes') }}{% endif %}" + template),
        ("breaking", "{{ messages.__class__ }}"), ("clock", "{{ strftime_now('%f') }}" + template),
    ):
        shutil.copytree(folder / "model", folder / name)
        (folder / name / "chat_template.jinja").write_text(source)
    numbers = {"numbers": [1, 1], "target": 2}
    split = [json.dumps({"prompt": asked, "reference": numbers}) for asked in ("1+1=", "3" * 12 + "=")]
    (folder / "split.jsonl").write_text("\n".join([split[0], "", '{"prompt": "2+2=", "reference": "4"}', split[1]]))
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "reference": 2}\n{"question": "2+2="}\n')
    (folder / "empty.jsonl").write_text('{"prompt": "1+1=", "reference": ""}\n')
    turns = [["1+1=", "2+2="], ["3+3="] * 8]
    rows = [json.dumps({"prompt": turn, "reference": 2}) for turn in turns]
    (folder / "turns.jsonl").write_text("\n".join(rows))
    shutil.copytree(folder / "model", folder / "own" / "export")
    (folder / "own" / "run.json").write_text('{"program": "grpo"}')
    (folder / "timeless").mkdir()
    (folder / "timeless" / "run.json").write_text('{"program": "grpo", "time": 5}')
    (folder / "tuned").mkdir()
    (folder / "tuned" / "run.json").write_text('{"program": "sft"}')


def run_all(folder, cases):
    """What each call gives, in one process."""
    write_inputs(folder)
    given = [["--model=model", *arguments] for arguments in cases.values()]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(given)], capture_output=True, text=True, timeout=400, cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A short run, and bad input."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("ended", "sent"):
        (folder / name).touch()
    return run_all(folder, {"quick": QUICK} | {what: arguments for what, (arguments, _) in BAD.items()})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("grpo"), GOOD)


def test_a_short_run_ends_with_a_model(few):
    folder, found = few
    code, out, err = found["quick"]
    assert code == 0, (out, err)
    rows = read_rows(folder / "run" / "log.jsonl")
    assert [(row["kind"], row["step"]) for row in rows if row["kind"] != "samples"] == [
        ("heldout", 0), ("grpo", 1), ("heldout", 1)
    ]  # fmt: skip
    assert (folder / "run" / "report.html").exists()
    cfg, params, _ = load_pretrained(folder / "run" / "export", dtype="float32")
    _, before, _ = load_pretrained(folder / "model", dtype="float32")
    assert cfg.vocab_size == 270 and float(abs(params.moe.ffn.router - before.moe.ffn.router).numpy().max()) > 0


@LONG
def test_a_run_that_was_stopped_goes_on_to_the_end(results):
    folder, found = results
    assert found["ended"][0] == 130 and found["ended"][2] == "grpo: interrupted; the same command goes on\n", found["ended"]
    code, out, err = found["stopped"]
    assert code == 128 + 15 and "SIGTERM: saved after 2 of 3 explorations; the same command goes on" in out, (out, err)
    code, out, err = found["gone on"]
    assert code == 0 and "going on after exploration 2" in out, (out, err)
    rows = read_rows(folder / "run" / "log.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("heldout", 0), ("grpo", 1), ("samples", 1), ("grpo", 2), ("samples", 2), ("heldout", 2), ("grpo", 3),
        ("samples", 3), ("heldout", 3),
    ]  # fmt: skip
    first = rows[1]
    assert set(first["parts"]) == {"language", "number"} and first["reward"] == 0.5 * first["parts"]["language"] > 0
    assert first["taken"] == 1 and len(rows[2]["samples"]) >= 2
    assert rows[2]["samples"][0]["prompt"].endswith("=")
    rates = [row["learning_rate"] for row in rows if row["kind"] == "grpo"]
    assert rates == pytest.approx([0.01, 0.01 - 0.009 / 4, 0.01 - 0.009 * 3 / 4]), "a cosine over all explorations"
    assert [checkpoint_step(path) for path in list_checkpoints(folder / "run" / "checkpoints")] == [2, 3]
    assert {path.name for path in (folder / "run" / "plots").iterdir()} == {
        "reward.png", "policy.png", "samples.png", "sampling.png"
    }  # fmt: skip
    assert len((folder / "polled").read_text()) >= 3, "a checkpoint is ended while the next exploration runs"
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert all((folder / "run" / "export" / name).read_text() == (folder / "clock" / name).read_text() for name in names)
    assert all(name not in row for row in rows for name in ("kl", "penalty")), "without a reference nothing is measured"
    page = (folder / "run" / "report.html").read_text()
    assert "accuracy, held-out problems" in page and "--- exploration 1, problem" in page and "group_size" in page
    assert "entropy</" in page and "kl</" not in page.replace("<td class=left>kl</td><td class=left>k3", "")
    cfg, params, _ = load_pretrained(folder / "run" / "export", dtype="float32")
    _, before, _ = load_pretrained(folder / "model", dtype="float32")
    moved = float(abs(params.moe.ffn.router - before.moe.ffn.router).numpy().max())
    assert cfg.vocab_size == 270 and moved > 0, "the export is what was trained"


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(few, what):
    folder, found = few
    code, _, err = found[what]
    assert (folder / "own" / "export" / "config.json").exists() and (folder / "tuned" / "run.json").exists()
    assert code == 2 and err.startswith("grpo: ") and err.count("\n") == 1 and BAD[what][1] in err, (code, err)
