"""`examples/pretrain.py` as its user runs it: to the end, killed in the middle, and given bad input."""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from absl.testing import flagsaver
from tokenizers import Tokenizer

import dsv3
from dsv3.data import load_tokenizer, save_tokenizer, train_tokenizer
from dsv3.data.passkey import passkey_form
from dsv3.pretrained import load_pretrained
from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from dsv3.train.loop import LoopResult
from dsv3.train.records import read_rows
from dsv3.train.trouble import Cursor
from tests.more import MORE

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
CONFIG = f"--config={pathlib.Path(__file__).with_name('small.json')}"  # a layer of each kind, 300 ids: little to compile
SMALL = [CONFIG, *"--batch_size=4 --seq_len=16 --heldout=0.1 --eval_every=20 --save_every=5".split()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    words, rng = "to be or not that is the question whether tis nobler in mind suffer".split(), random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(500)))
    return path


@pytest.fixture(scope="module")
def pretrain():
    """The example as a module; its flags are absl's, which are the process's own."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import pretrain

        yield pretrain
    finally:
        sys.path.remove(str(EXAMPLES))


def call(pretrain, *arguments):
    """Runs `main` in this process; returns its exit code."""
    argv = ["pretrain.py", *map(str, arguments)]
    with flagsaver.flagsaver():
        try:
            return pretrain.main(pretrain.parse_flags(argv))
        except SystemExit as end:
            return end.code


def command(*arguments):
    return [sys.executable, str(EXAMPLES / "pretrain.py"), *map(str, arguments)]


def environment():
    """The threads of this process (`conftest.py`), so that sums are added up in the same order."""
    return os.environ | {"TF_NUM_INTRAOP_THREADS": "2", "TF_NUM_INTEROP_THREADS": "2", "PYTHONPATH": str(EXAMPLES.parent)}


def train_rows(out):
    return [row for row in read_rows(out / "log.jsonl") if row["kind"] == "train"]


def kill_after(rows, out, arguments):
    """Starts the program and kills it outright when it has written so many rows."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command(*arguments), env=environment(), **pipes) as process:
        log = out / "log.jsonl"
        deadline = time.monotonic() + 300
        while not log.exists() or log.read_bytes().count(b'"train"') < rows:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read().decode()
            time.sleep(0.002)
        process.kill()
    return len(train_rows(out))


@pytest.mark.skipif(not MORE, reason="a long case")
def test_killed_and_run_again_gives_the_curve_of_a_run_that_was_not(corpus, pretrain, tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    same = [f"--corpus={corpus}", "--steps=60", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "report", lambda *arguments: None)
        assert call(pretrain, *same, f"--out={straight}") == 0
    written = kill_after(17, broken, [*same, f"--out={broken}"])
    assert written < 60, "it was killed too late to show anything"
    latest = list_checkpoints(broken / "checkpoints")[-1]
    assert written - 5 <= checkpoint_step(latest) + 1, "at most the steps since the last checkpoint are lost"
    os.truncate(latest / "state.safetensors", 5000)  # and the disk has lost a part of that one

    ahead = [*same, "--read_ahead=2", f"--out={broken}"]  # how rows are read must not matter
    done = subprocess.run(command(*ahead), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{latest.name} is damaged (state.safetensors has 5000 of" in done.stdout
    assert f"going on from step {checkpoint_step(latest) - 5}" in done.stdout
    want, got = train_rows(straight), train_rows(broken)
    assert [row["step"] for row in got] == list(range(1, 61))
    for name in ("loss", "nll", "balance", "grad_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-4, err_msg=name)
    assert np.mean([row["nll"] for row in got[-10:]]) < got[0]["nll"] - 1.0
    check_results(broken, done.stdout)
    check_refusals(pretrain, same, broken)


def check_results(out, printed):
    """Everything that the program promises is there, and the export is the model of the last checkpoint."""
    results = json.loads((out / "results.json").read_text())
    held = [row for row in read_rows(out / "log.jsonl") if row["kind"] == "heldout"]
    assert [row["step"] for row in held] == [0, 20, 40, 60]
    assert results["heldout"]["nll"] < held[0]["nll"]
    assert 0 < results["heldout"]["bits_per_byte"] < 8 and set(results["compressors"]) >= {"gzip"}
    for line in ("byte, this model", "byte, gzip", "MTP guess agrees", "busiest expert", "tokens a second", "peak memory"):
        assert line in printed
    assert all(row["mfu"] > 0 for row in train_rows(out)) and results["training"]["peak_memory_bytes"] > 2**26
    for name in ("loss", "learning_rate", "speed", "mtp", "expert_load", "load_violation", "balance", "norms", "bias"):
        assert (out / "plots" / f"{name}.png").stat().st_size > 5000
    page = (out / "report.html").read_text()
    assert "bits per byte" in page and page.count("data:image/png;base64,") == 9 and "no step was left out" in page
    assert "greedy" in (out / "samples.txt").read_text() and list((out / "tensorboard").glob("events.*"))
    assert [checkpoint_step(path) for path in list_checkpoints(out / "checkpoints")] == [55, 60]
    cfg, params, router = load_pretrained(out / "export", dtype="float32")
    assert cfg.vocab_size == 300 and (cfg.bos_id, cfg.eos_ids) == (0, (1,))
    tokenizer = load_tokenizer(out / "export")
    text = tokenizer.encode("to be or not").ids
    assert dsv3.model_apply(params, router, [text], cfg=cfg).logits.shape == [1, len(text), 300]
    assert isinstance(tokenizer, Tokenizer)
    assert str(out / "export") in printed


def check_refusals(pretrain, same, out):
    """A run goes on with its own settings only, names the others, and is not overwritten by accident."""
    before = (out / "run.json").read_text()
    for change, message in [
        (["--seed=3"], "`seed` is 3 here, 0 there"),
        (["--lr=0.5", "--steps=9"], r"`steps` is 9 here, 60 there; `lr` is 0.5 here, 0.003 there"),
        (["--vocab_size=400"], "`config.vocab_size` is 400 here, 300 there"),
        (["--corpus=" + str(EXAMPLES)], "`corpus` is"),
        (["--noresume"], "--noresume, but --out"),
    ]:
        code, lines = refused(pretrain, [*same, f"--out={out}", *change])
        assert code == 2 and len(lines) == 1 and message in lines[0] and "--fresh" in lines[0], lines
    (out / "tokenizer" / "tokenizer.json").write_text(train_tokenizer(["another text"], 280).to_str())
    code, lines = refused(pretrain, [*same, f"--out={out}"])
    assert code == 2 and "`tokenizer` is" in lines[0]
    assert (out / "run.json").read_text() == before


def refused(pretrain, arguments):
    """Exit code and lines on standard error of a call that must not come to train."""

    def train(*arguments):
        raise AssertionError("this should have been refused")

    stream, kept = io.StringIO(), pretrain.train
    pretrain.train = train
    try:
        with contextlib.redirect_stderr(stream):
            return call(pretrain, *arguments), stream.getvalue().splitlines()
    finally:
        pretrain.train = kept


def other_tokenizer(folder):
    save_tokenizer(train_tokenizer([" ".join(map(str, range(2000)))], 400), folder / "large")
    return folder / "large"


BAD = {
    "no corpus": (["--corpus={tmp}/none.txt"], "read_corpus: '.*none.txt' does not exist"),
    "empty corpus": (["--corpus={tmp}/empty.txt"], "empty corpus"),
    "empty folder": (["--corpus={tmp}/folder"], "empty corpus"),
    "not text": (["--corpus={tmp}/binary.txt"], "is binary"),
    "bad row": (["--corpus={tmp}/rows.jsonl"], r"rows.jsonl' line 2: no `text` field"),
    "a corpus shorter than one sequence": (
        ["--corpus={tmp}/short.txt", "--seq_len=128"], "the corpus has .* tokens, want at least 129 for one sequence"
    ),
    "a corpus of one word": (["--corpus={tmp}/word.txt"], "has 4 bytes, too short to hold out a part"),
    "an unwritable folder": (["--out={tmp}/short.txt/run"], "cannot write to --out"),
    "a folder of something else": (["--out={tmp}/folder_of_others"], "holds 'letters.txt' but no run"),
    "a broken run": (["--out={tmp}/broken_run"], "run.json' cannot be read as JSON; --fresh starts anew"),
    "a run that is a list": (["--out={tmp}/list_run"], "run.json' holds a list, want an object; --fresh starts anew"),
    "beyond the model": (["--seq_len=129"], "--seq_len is 129, the model's maximum is 128"),
    "negative": (["--steps=-3"], "flag --steps=-3: .*must be >= 1|flag --steps=-3"),
    "zero": (["--batch_size=0"], "flag --batch_size=0"),
    "negative float": (["--clip=-1"], "flag --clip=-1"),
    "no number": (["--lr=nan"], "--lr is nan, want a number"),
    "rate of zero": (["--lr=0"], "--lr is 0.0, want above 0"),
    "a word": (["--steps=many"], "flag --steps=many"),
    "unknown flag": (["--stepz=3"], "Unknown command line flag 'stepz'"),
    "unknown preset": (["--preset=huge"], "flag --preset=huge"),
    "argument": (["text.txt"], r"unexpected argument \['text.txt'\]"),
    "odd parts": (["--accumulate=3"], "--batch_size 4 is not divisible by --accumulate 3"),
    "long warm-up": (["--warmup_steps=900"], "--warmup_steps is 900, want at most --steps"),
    "all held out": (["--heldout=1"], "--heldout is 1.0, want a share above 0 and below 1"),
    "no config": (["--preset=tiny"], "--config and --preset are both given"),
    "small vocabulary": (["--vocab_size=100"], "100 ids, too few for a trained tokenizer"),
    "a tokenizer that does not fit": (["--tokenizer={large}"], "the tokenizer's largest id is 399, want below .* 300"),
    "no tokenizer": (["--tokenizer={tmp}/none"], "load_tokenizer: .*none' is no folder"),
    "scales that a mesh does not have": (["--fp8=delayed", "--mesh=data:2"], "--fp8 delayed has delayed scales"),
    "unknown recipe": (["--fp8=e3m4"], "flag --fp8=e3m4"),
    "shares of one size": (["--batch_multiple=2"], "--batch_multiple is given, but --plan=cosine, want --plan=paper or"),
    "unknown moments": (["--moment_dtype=float16"], "flag --moment_dtype=float16"),
    "no weight": (["--passkey=0.5", "--passkey_weight=nan"], "--passkey_weight is nan, want a number"),
    "two wishes": (["--fresh", "--noresume"], "--fresh and --noresume are both given"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "rows.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    (folder / "short.txt").write_text("".join(random.Random(1).choices("abcdefghij ", k=130)))
    (folder / "word.txt").write_text("word")
    (folder / "folder").mkdir()
    (folder / "folder_of_others").mkdir()
    (folder / "folder_of_others" / "letters.txt").write_text("dear")
    for name, text in (("broken_run", "{"), ("list_run", "[1]")):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(text)
    return {"tmp": folder, "large": other_tokenizer(folder)}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(pretrain, corpus, bad_files, tmp_path, what):
    arguments, message = BAD[what]
    defaults = [f"--corpus={corpus}", f"--out={tmp_path / 'run'}", *SMALL]
    code, lines = refused(pretrain, [*defaults, *(a.format(**bad_files) for a in arguments)])
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("pretrain: ")
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "run" / "run.json").exists(), "the same folder takes the corrected command"


@pytest.mark.parametrize("ahead", [0, 1])
def test_keys_count_more_in_each_micro_batch(pretrain, corpus, tmp_path, ahead):
    """And other tokens once; a run without exercises has no such setting."""
    same = [f"--corpus={corpus}", *SMALL, "--seq_len=96", "--accumulate=2", f"--read_ahead={ahead}"]
    setup = prepared(pretrain, *same, "--passkey_weight=3", f"--out={tmp_path / 'plain'}")
    assert "passkey_weight" not in json.loads((tmp_path / "plain" / "run.json").read_text())
    with flagsaver.flagsaver():
        argv = ["pretrain.py", *same, "--passkey=1", f"--out={tmp_path / 'run'}"]
        setup = pretrain.prepare(pretrain.parse_flags(argv))
        feed = sys.modules["pretrain_train"].make_feed(setup)(None, 0)
        with contextlib.closing(feed):
            tokens, weights, *_ = next(feed)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["passkey_weight"] == 8
    assert tokens.shape == (2, 2, 97) and weights.shape == (2, 2, 96)
    form, keys = passkey_form(setup.data.tokenizer), 0
    asked, key = list(form.asked), len(form.key(0))
    for row, weight in zip(tokens.reshape(-1, 97).tolist(), weights.reshape(-1, 96)):
        want = np.ones(97)
        for at in range(len(asked), 97):
            if row[at - len(asked) : at] == asked:
                want[at : at + key], keys = 8, keys + 1
        np.testing.assert_array_equal(weight, want[1:])
    assert keys > 0


def prepared(pretrain, *arguments):
    """What `prepare` returns, in this process."""
    with flagsaver.flagsaver():
        return pretrain.prepare(pretrain.parse_flags(["pretrain.py", *map(str, arguments)]))


def test_fresh_deletes_a_run_and_nothing_else(pretrain, corpus, tmp_path):
    """Of a folder that is no run nothing is deleted; of a run what the program wrote, once all is known to be good."""
    out, short = tmp_path / "run", tmp_path / "short.txt"
    short.write_text("".join(random.Random(1).choices("abcdefghij ", k=130)))
    same = [f"--corpus={corpus}", f"--out={out}", "--fresh", *SMALL]
    (out / "plots").mkdir(parents=True)
    code, lines = refused(pretrain, same)
    assert code == 2 and "holds 'plots' but no run" in lines[0] and (out / "plots").exists()
    (out / "run.json").write_text('{"seed": 9}')
    (out / "checkpoints" / "step-00000005").mkdir(parents=True)
    (out / "tokenizer").mkdir()  # of which the tokenizer is missing
    (out / "mine.txt").write_text("keep")
    before = sorted(out.rglob("*"))
    code, lines = refused(pretrain, same)
    assert code == 2 and "holds 'mine.txt', which is no part of a run" in lines[0] and sorted(out.rglob("*")) == before
    (out / "mine.txt").unlink()
    (out / "plots" / "own.txt").write_text("a text that the run itself holds")
    before = sorted(out.rglob("*"))
    code, lines = refused(pretrain, [*same, f"--corpus={out / 'plots'}"])
    assert "--fresh would delete --corpus" in lines[0]
    (out / "run.json").write_text('{"program": "sft"}')
    assert "holds a run of sft.py, want another --out" in refused(pretrain, same)[1][0]
    (out / "run.json").write_text('{"seed": 9}')
    for bad in ([f"--corpus={tmp_path}/typo.txt"], [f"--corpus={short}", "--seq_len=128"]):
        code, lines = refused(pretrain, [*same, *bad])
        assert code == 2 and sorted(out.rglob("*")) == before, "nothing is deleted for a command that is refused"
    prepared(pretrain, *same)
    assert sorted(os.listdir(out)) == [".lock", "run.json", "tokenizer"]
    assert load_tokenizer(out / "tokenizer") and json.loads((out / "run.json").read_text())["seed"] == 0


def test_a_file_is_held_out_whole_or_not_at_all(pretrain, tmp_path):
    """Of 100 documents or more no piece of one is trained on and another held out; fewer are cut into pieces first."""
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text("".join(f"{n} is a line of file {i}\n" for n in range(3000)))

    def sides(corpus):
        with flagsaver.flagsaver():
            pretrain.parse_flags(["pretrain.py", f"--corpus={corpus}", "--heldout=0.2"])
            return sys.modules["pretrain_data"].read_text()[:2]

    names = [{document.name for document in side} for side in sides(tmp_path)]
    assert all("#" in name for side in names for name in side), "long ones are pieces by now"
    files = [{name.partition("#")[0] for name in side} for side in names]
    assert len(files[0] | files[1]) == 100 and len(files[1]) > 5 and not files[0] & files[1]
    train, heldout = sides(tmp_path / "7.txt")
    assert {document.name.partition("#")[0] for document in (*train, *heldout)} == {"7.txt"} and heldout


def ended(pretrain, monkeypatch, arguments, **parts):
    """Exit code and lines on standard error of a call in which functions of the program are exchanged."""
    stream = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stderr(stream):
        for name, part in parts.items():
            patch.setattr(pretrain, name, part)
        return call(pretrain, *arguments), stream.getvalue().splitlines()


def raises(error):
    def part(*arguments):
        raise error

    return part


def test_what_fails_after_the_start_is_one_line_and_says_how_to_go_on(pretrain, corpus, tmp_path, monkeypatch):
    same = [f"--corpus={corpus}", f"--out={tmp_path}", *SMALL]
    full, bad = OSError(28, "No space left on device", "log.jsonl"), ValueError("read_rows: 'log.jsonl' line 2\nis no row")
    bare = OSError(28, "No space left on device")  # as of a library that draws a plot
    done = LoopResult(None, 600, None, Cursor())
    for parts, message in [
        ({"train": raises(full)}, "No space left on device: 'log.jsonl'"),
        ({"train": raises(bare)}, f"cannot write in '{tmp_path}' (No space left on device)"),
        ({"train": raises(bad)}, "line 2 is no row"),
        ({"train": lambda *a: done, "report": raises(bad)}, "line 2 is no row"),
    ]:
        code, lines = ended(pretrain, monkeypatch, same, **parts)
        assert code == 1 and len(lines) == 1 and lines[0].startswith("pretrain: ") and message in lines[0], lines
        assert "run the same command again: " in lines[0]


def test_a_run_without_a_whole_checkpoint_is_refused_each_time(pretrain, corpus, tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    same = [f"--corpus={corpus}", f"--out={tmp_path}", *SMALL]
    monkeypatch.setattr("pretrain_setup.agree", lambda *arguments: None)
    for _ in range(2):
        code, lines = ended(pretrain, monkeypatch, same)
        assert code == 1 and len(lines) == 1 and "none of the 1 checkpoints" in lines[0], lines
        assert "--fresh starts anew, another --out" in lines[0]
    assert read_rows(tmp_path / "log.jsonl"), "the log is as it was"


def test_a_loss_that_is_no_number_tells_of_the_checkpoint_that_there_is(pretrain, corpus, tmp_path, monkeypatch):
    same = [f"--corpus={corpus}", f"--out={tmp_path}", *SMALL]
    diverged = raises(FloatingPointError("step 7: `loss` is nan"))
    code, lines = ended(pretrain, monkeypatch, same, train=diverged)
    assert code == 1 and "`loss` is nan; no checkpoint was saved before it; a lower --lr may help" in lines[0]
    assert "with --fresh or another --out" in lines[0]
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    code, lines = ended(pretrain, monkeypatch, same, train=diverged)
    assert code == 1 and "`loss` is nan; the last checkpoint is of step 5; a lower --lr may help" in lines[0]


def test_the_same_command_names_the_python_that_runs(pretrain, monkeypatch, tmp_path):
    (tmp_path / "env").mkdir()
    os.symlink(sys.executable, tmp_path / "env" / "python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--fresh", "--seed=1"])
    monkeypatch.chdir(tmp_path)
    assert pretrain.same_command() == "run the same command again: env/python pretrain.py --seed=1"
    for folder in ("env", "other"):  # a bare name would be looked for elsewhere
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        assert pretrain.same_command() == f"run the same command again: {sys.executable} pretrain.py --seed=1"


def test_a_folder_in_use_is_refused(pretrain, corpus, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, lines = refused(pretrain, [f"--corpus={corpus}", f"--out={tmp_path}", *SMALL])
    assert code == 2 and "is in use by another process" in lines[0]


def test_a_second_process_on_a_folder_is_refused(pretrain, corpus, tmp_path):
    """A real one, while this process has the run; what is there stays as it is."""
    same = [f"--corpus={corpus}", f"--out={tmp_path}", *SMALL]
    prepared(pretrain, *same)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = subprocess.run(command(*same, "--fresh"), env=environment(), capture_output=True, text=True, timeout=120)
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and line == f"pretrain: --out {str(tmp_path)!r} is in use by another process"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_bad_input_as_a_command(tmp_path):
    done = subprocess.run(
        command(f"--corpus={tmp_path}/none"), env=environment(), capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and "does not exist" in lines[0], done.stderr
