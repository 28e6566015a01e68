"""`examples/pretrain.py --plan=paper --data=...`: the paper's whole plan, scaled, on a mixture; stopped in every stage."""

import contextlib
import functools
import gc
import io
import json
import re
import shutil
import signal
import sys
import weakref

import numpy as np
import pytest
from absl.testing import flagsaver

from dsv3 import tree
from dsv3.data import (
    Document,
    Manifest,
    encode_documents,
    manifest_digest,
    read_manifest,
    save_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    train_tokenizer,
    write_manifest,
    write_shard,
)
from dsv3.pretrained import load_pretrained
from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from dsv3.train.checkpoint_tools import open_checkpoint
from dsv3.train.records import read_rows
from dsv3.train.schedule_steps import schedule_runs
from tests.more import MORE, more
from tests.train.test_loop import toy_step
from tests.train.test_pretrain_example import CONFIG, call, pretrain, refused, train_rows

__all__ = ["pretrain"]

PLAN = (
    f"{CONFIG} --plan=paper --batch_size=32 --seq_len=8 --accumulate=8 --steps=90 --context_steps=3 --warmup_steps=2 "
    "--eval_every=0 --save_every=20 --keep=9 --watch_every=1 --ema_decay=0.9"
).split()
SHORT = f"{CONFIG} --steps=20 --batch_size=4 --seq_len=8 --eval_every=0 --save_every=5 --patience=3".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder of two sources with unlike words."""
    folder, rng = tmp_path_factory.mktemp("data") / "prepared", np.random.default_rng(0)
    words = {"verse": "to be or not to be that is the question".split(), "code": "def if else return for while in".split()}
    texts = {
        name: [" ".join(rng.choice(of, 40)) for _ in range(30 if name == "verse" else 60)] for name, of in words.items()
    }
    tokenizer = train_tokenizer([text for of in texts.values() for text in of], 290)
    splits = {"train": {}, "heldout": {}}
    for name, of in texts.items():
        for split, part in (("train", of[3:]), ("heldout", of[:3])):
            stream = encode_documents(tokenizer, [Document("", text) for text in part])
            bounds = zip(stream.starts[:-1], stream.starts[1:])
            rows = [(stream.tokens[a:b], len(text), i) for i, ((a, b), text) in enumerate(zip(bounds, part))]
            splits[split][name] = [write_shard(folder / split / name, 0, rows, vocab_size=300, window_tokens=500)]
    save_tokenizer(tokenizer, folder / "tokenizer")
    settings = {"mixture": {"weights": {"verse": 1, "code": 3}, "repeats": None, "epochs": None}}
    ids, name = special_ids(tokenizer), tokenizer_fingerprint(tokenizer)
    write_manifest(folder, Manifest(name, 300, ids, settings, {source: {} for source in texts}, splits))
    return folder


@pytest.fixture(scope="module")
def whole(pretrain, data, tmp_path_factory):  # noqa: F811
    """A run without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert call(pretrain, f"--data={data}", *PLAN, f"--out={out}") == 0
    return out


@pytest.mark.skipif(not MORE, reason="a long case")
def test_everything_changes_when_the_plan_says_so(whole, data):
    rows = train_rows(whole)
    tokens = np.diff([0, *(row["tokens"] for row in rows)])
    ramp, context = tokens[:-6] // 8, tokens[-6:]
    assert ramp[0] == 8 and ramp[-1] == 32 and (np.diff(ramp) >= 0).all() and set(ramp) >= {8, 12, 32}
    assert context.tolist() == [4 * 64] * 3 + [1 * 256] * 3
    rates = np.array([row["learning_rate"] for row in rows])
    assert rates[0] == 0 and rates[2] == pytest.approx(3e-3) and rates[-1] == pytest.approx(3e-3 * 7.3e-6 / 2.2e-4)
    assert (np.diff(rates[2:]) <= 1e-12).all()
    total = 90 * 32 * 8
    switch = next(i for i, row in enumerate(rows) if i and rows[i - 1]["tokens"] >= total * 10 / 14.8)
    for i, row in enumerate(rows):
        mtp = (row["loss"] - row["nll"] - 1e-4 * row["balance"]) / row["mtp"][0]
        assert mtp == pytest.approx(0.3 if i < switch else 0.1, rel=1e-3), "λ falls at 10T of 14.8T tokens"
    # γ is 0 for the last 0.5T of pretraining and in the context stages: the selection biases no longer move.
    seen = [[row[name] for name in ("bias_min", "bias_max", "bias_std")] for row in read_rows(whole / "log.jsonl")
            if row["kind"] == "watch"]  # fmt: skip
    assert len(seen) == len(rows)
    moved = [seen[i] != seen[i - 1] for i in range(1, len(rows))]  # by step i, counted from 0
    frozen = next(i for i in range(1, len(rows)) if rows[i - 1]["tokens"] >= total * 14.3 / 14.8)
    assert all(moved[: frozen - 1]) and not any(moved[frozen - 1 :])
    assert len(rows) - 6 - frozen >= 2, "some of these steps are of pretraining"
    cfg, *_ = load_pretrained(whole / "export", dtype="float32")
    yarn = cfg.mla.rope.yarn
    assert (yarn.factor, yarn.original_length, cfg.max_length) == (40.0, 8, 320)
    drawn = open_checkpoint(whole).meta["cursor"]["data"]
    assert drawn["steps"] == len(rows)
    names = ("report.html", "export_ema/config.json", "trouble.jsonl")
    assert [(whole / name).exists() for name in names] == [True, True, False]
    assert json.loads((whole / "run.json").read_text())["corpus"] == manifest_digest(read_manifest(data))


def cut(whole, out, step):
    """A copy of a run as if it had been killed after some of the steps that came after a checkpoint."""
    shutil.copytree(whole, out)
    found = list_checkpoints(out / "checkpoints")
    for path in found:
        if checkpoint_step(path) > step:
            shutil.rmtree(path)
    assert step in map(checkpoint_step, found)


# The pretraining is the longest: a plain test run begins at its end, where the first context stage does.
@pytest.mark.parametrize(("begin", "stop_after"), more((-6, -5), (None, 30), (None, -5), (None, -1)))
def test_stopped_in_any_stage_it_goes_on_to_the_same_losses(whole, pretrain, data, tmp_path, monkeypatch, begin, stop_after):  # noqa: F811
    total = len(train_rows(whole))
    stop_after %= total
    train_loop, out = sys.modules["pretrain_train"].train_loop, tmp_path / "run"
    monkeypatch.setattr(pretrain, "report", lambda *arguments: None)
    if begin is not None:
        cut(whole, out, total + begin)
    with monkeypatch.context() as patch:

        def stopped(*args, actions, **options):
            def stop():
                actions.stop()
                return signal.SIGTERM if len(train_rows(out)) == stop_after else None

            return train_loop(*args, actions=actions._replace(stop=stop), **options)

        patch.setattr("pretrain_train.train_loop", stopped)
        assert call(pretrain, f"--data={data}", *PLAN, f"--out={out}") == 128 + signal.SIGTERM
    assert len(train_rows(out)) == stop_after
    assert call(pretrain, f"--data={data}", *PLAN, f"--out={out}") == 0
    want, got = train_rows(whole), train_rows(out)
    for name in ("loss", "nll", "grad_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-5, err_msg=name)


def prepared(pretrain, *arguments):  # noqa: F811
    """The schedule of a command, and the shape that each of its batches is cut to by length of the sequences."""
    plan, shapes = sys.modules["pretrain_plan"], {}
    with flagsaver.flagsaver():
        schedule = pretrain.prepare(pretrain.parse_flags(["pretrain.py", *map(str, arguments)])).schedule
        cut = plan.batch_cutter(schedule)
        for run in schedule_runs(schedule):
            tokens = np.zeros([run.batch_size, run.seq_len + 1], np.int32)
            shapes.setdefault(run.seq_len, set()).add(cut(tokens, tokens[:, 1:])[0].shape[:2])
    return schedule, shapes


def test_a_plan_keeps_its_batches_on_another_mesh(pretrain, data, tmp_path):  # noqa: F811
    """It goes on on any mesh whose devices can share them, and is refused in one line on any other."""
    outs = [tmp_path / name for name in ("both", "mesh", "one")]
    both, mesh, one = ([f"--data={data}", *PLAN, f"--out={out}"] for out in outs)
    want, shapes = prepared(pretrain, *both, "--batch_multiple=2")
    assert want.multiples == (4, 2, 2) and max(shapes[8]) == (8, 4) and shapes[256] == {(2, 1)}
    for other in (["--mesh=data:2"], ["--batch_multiple=2", "--mesh=expert:2"]):
        assert prepared(pretrain, *both, *other) == (want, {**shapes, 64: {(2, 2)}, 256: {(1, 2)}}), "each device has a row"
    assert prepared(pretrain, *both) == (want, shapes)
    prepared(pretrain, f"--data={data}", *PLAN, "--batch_multiple=4", "--batch_size=64", f"--out={tmp_path / 'larger'}")
    four, shapes = prepared(pretrain, *mesh, "--mesh=data:2,expert:2", "--batch_size=64")
    assert four.multiples == (8, 4, 4) and shapes[64] == {(2, 4)} and shapes[256] == {(1, 4)}
    two, shapes = prepared(pretrain, *mesh, "--mesh=data:2", "--batch_size=64")
    assert two == four and shapes[64] == {(4, 2)} and shapes[256] == {(2, 2)}
    assert prepared(pretrain, *one)[0].multiples == (4, 1, 1)
    for arguments, message in [
        ([*both, "--mesh=data:4"], "32x' are multiples of 2, want of 4, .* --batch_multiple=4 and --batch_size=64$"),
        ([*one, "--mesh=data:2"], "'context 32x' are multiples of 1, want of 2, .* --mesh data:2; .* --batch_multiple=2$"),
        ([*both, "--batch_multiple=1"], r"`batch_multiple` is \[4, 1, 1\] here, \[4, 2, 2\] there"),
        ([*both, "--batch_multiple=4"], "`batch_size` is 1 sequences at its least, .* to batch_multiple=4; want at least 2"),
        ([*both, "--mesh=data:2", "--batch_size=64"], "`batch_size` is 64 here, 32 there"),
    ]:
        code, lines = refused(pretrain, arguments)
        assert code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines


def test_contexts_behind_a_training_keep_their_batches_too(pretrain, data, tmp_path):  # noqa: F811
    same = [f"--data={data}", *SHORT, "--plan=context", "--batch_size=32", "--context_steps=2", f"--out={tmp_path / 'run'}"]
    want, _ = prepared(pretrain, *same, "--mesh=data:2")
    assert want.multiples == (1, 4, 2)
    assert prepared(pretrain, *same)[0] == want == prepared(pretrain, *same, "--mesh=expert:2")[0]
    code, lines = refused(pretrain, [*same, "--mesh=data:4"])
    assert code == 2 and "stage 'context 32x' are multiples of 2, want of 4" in lines[0]
    assert lines[0].endswith(" begins with --batch_multiple=4"), "stages of contexts round up, whatever --batch_size is"


def test_rows_are_shuffled_in_small_groups_where_skipping_the_rest_would_end_a_source(pretrain, data, tmp_path):  # noqa: F811
    """Lengths change in a plan, and `verse` may give few epochs."""
    cases = {"cosine": [*SHORT, "--epochs=verse:90"], "free": PLAN, "limited": [*PLAN, "--epochs=verse:90"]}
    found = {}
    for name, arguments in cases.items():
        with flagsaver.flagsaver():
            argv = ["pretrain.py", f"--data={data}", *arguments, f"--out={tmp_path / name}"]
            found[name] = pretrain.prepare(pretrain.parse_flags(argv)).data
    verse = found["free"].sources["verse"].tokens
    assert {name: of.mixture.group_tokens for name, of in found.items()} == {
        "cosine": 2**20, "free": 2**20, "limited": verse // 8
    }  # fmt: skip


@pytest.mark.skipif(not MORE, reason="a long case")
def test_a_plan_begun_without_a_mesh_goes_on_on_one(pretrain, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pretrain, "report", lambda *arguments: None)
    same = [f"--data={data}", *PLAN, "--batch_multiple=2", "--watch_every=0"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert call(pretrain, *same, f"--out={straight}") == 0
    cut(straight, out, len(train_rows(straight)) - 6)  # the stages with longer contexts are left: two steps to compile
    assert call(pretrain, *same, "--mesh=data:2", f"--out={out}") == 0
    want, got = train_rows(straight), train_rows(out)
    assert len(want) > 90 and not any("dispatch_bytes" in row for row in want)
    assert [row["tokens"] for row in got] == [row["tokens"] for row in want], "the same batches"
    for name in ("loss", "nll", "grad_norm", "learning_rate"):  # sums in another order, over some steps of Adam
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-5, err_msg=name)


def test_another_folder_is_refused(pretrain, data, tmp_path):  # noqa: F811
    """Data is named by the digest of its manifest: with other weights, or other shards, it is other data."""
    same = [*PLAN, f"--out={tmp_path / 'run'}"]
    with flagsaver.flagsaver():
        pretrain.prepare(pretrain.parse_flags(["pretrain.py", f"--data={data}", *same]))
    before = (tmp_path / "run" / "run.json").read_bytes()
    other, manifest = shutil.copytree(data, tmp_path / "other"), read_manifest(data)
    (other / "manifest.json").unlink()
    write_manifest(other, manifest._replace(sources={**manifest.sources, "code": {"licence": "MIT"}}))
    code, lines = refused(pretrain, [f"--data={other}", *same])
    there, here = (manifest_digest(read_manifest(folder)) for folder in (data, other))
    assert code == 2 and len(lines) == 1 and f"`corpus` is {here!r} here, {there!r} there" in lines[0], lines
    assert "--fresh starts anew" in lines[0] and (tmp_path / "run" / "run.json").read_bytes() == before


def test_shares_are_those_of_the_folder_or_of_the_command(pretrain, data, tmp_path):  # noqa: F811

    for given, want in [([], (0.25, 0.75)), (["--mixture=verse:4,code:1"], (0.8, 0.2))]:
        with flagsaver.flagsaver():
            argv = ["pretrain.py", f"--data={data}", *PLAN, f"--out={tmp_path / str(len(given))}", *given]
            setup = pretrain.prepare(pretrain.parse_flags(argv))
        shares = dict(zip(setup.data.mixture.names, setup.data.mixture.weights))
        assert (shares["verse"], shares["code"]) == pytest.approx(want)
        text = setup.data.documents[0].text
        assert set(text.split()) <= set("to be or not that is the question def if else return for while in".split())


BAD = {
    "no folder": (["--data={tmp}/none"], "read_manifest: '.*none' has no manifest.json"),
    "an unknown source": (["--mixture=verse:1,books:2"], "names source 'books', --data has (verse, code|code, verse)"),
    "a source without a weight": (["--mixture=verse:1"], "make_mixture: `weights` has none for source .'code'."),
    "weights of zero": (["--mixture=verse:0,code:0"], "the weights of all sources sum to 0"),
    "no number": (["--mixture=verse:many"], "--mixture has 'verse:many', want source:number"),
    "a mixture that runs dry": (["--epochs=code:0.1"], "source 'code' runs dry: it has .* tokens, may give 0.1 epochs"),
    "two kinds of data": (["--corpus={tmp}"], "--data and --corpus are both given"),
    "another tokenizer": (["--tokenizer={tmp}"], "--data and --tokenizer are both given"),
    "held out twice": (["--heldout=0.1"], "--data and --heldout are both given"),
    "a small vocabulary": (["--vocab_size=280"], "--data has 300 ids, the model's vocabulary 280"),
    "too small a batch": (["--batch_size=8", "--accumulate=2"], "which makes 0.25 sequences of the smallest batch"),
    "too few steps": (["--steps=2"], "no step begins in|warm-up end at"),
    "λ of one's own": (["--mtp_weight=0.2"], "--mtp_weight is given, but --plan=paper has a curve for it"),
    "a flipped byte": (["--data={tmp}/flipped"], "have digest .*, want .*: the file has changed since it was written"),
    "a tokenizer of another folder": (["--data={tmp}/other"], "was made with tokenizer .*, want "),
}


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):

    folder = tmp_path_factory.mktemp("broken")
    for name in ("flipped", "other"):
        shutil.copytree(data, folder / name)
    file = folder / "flipped" / "train" / "code" / "00000.tokens.npy"
    values = bytearray(file.read_bytes())
    values[-2] ^= 1
    file.write_bytes(bytes(values))
    save_tokenizer(train_tokenizer(["other words"], 280), folder / "other" / "tokenizer")
    return folder


@pytest.mark.parametrize("what", [name for name in BAD if name != "a flipped byte"])
def test_bad_input_is_one_line(pretrain, data, broken, tmp_path, what):  # noqa: F811
    arguments, message = BAD[what]
    arguments = [argument.format(tmp=broken) for argument in arguments]
    code, lines = refused(pretrain, [f"--data={data}", *PLAN, f"--out={tmp_path / 'run'}", *arguments])
    assert code == 2 and len(lines) == 1 and lines[0].startswith("pretrain: "), lines
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_flipped_byte_ends_the_run_with_its_name(pretrain, broken, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Wherever the training is by then; nothing is computed here."""
    arguments, message = BAD["a flipped byte"]

    def step(state, tokens, weights, limits):
        return toy_step(state, np.float32(3.0), None, limits)

    monkeypatch.setattr("pretrain_train.make_train_step", lambda *arguments, **options: step)
    monkeypatch.setattr("pretrain_train.make_watch", lambda *arguments, **options: lambda state, metrics: {})
    arguments = [argument.format(tmp=broken) for argument in arguments]
    assert call(pretrain, *SHORT, "--steps=400", f"--out={tmp_path / 'run'}", *arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: ")]
    assert re.search(message, line) and "of source 'code'" in line


def poisoned(make_feed, bad):
    """A feed in which batches of these numbers, counted from 1, have weights that are no numbers."""

    def make(setup):
        feed = make_feed(setup)

        def poison(position, tokens):
            for fed in feed(position, tokens):
                yield fed._replace(weights=fed.weights * np.float32("inf" if fed.data["steps"] in bad else 1))

        return poison

    return make


def watched(module, left):
    """A step that notes what it is given, first and last, and a reader of checkpoints that notes how much of it is left."""
    make_step, restore, first, last = module.make_train_step, module.restore_checkpoint, [], []

    def make(*arguments, **options):
        step = make_step(*arguments, **options)

        def noting(state, *batch):
            last[:] = map(weakref.ref, tree.flatten(state.params))
            first[:] = first or last
            return step(state, *batch)

        return noting

    def restoring(*arguments, **options):
        gc.collect()
        left.append((len(first), sum(one() is not None for one in (*first, *last))))
        first.clear()
        return restore(*arguments, **options)

    return make, restoring


@pytest.fixture(scope="module")
def taken_back(pretrain, data, tmp_path_factory):
    """A run that goes back twice, to its start and to a checkpoint, on devices as the flags say; and its last lines."""
    module = sys.modules["pretrain_train"]

    @functools.cache
    def run(*flags):
        out, left, stream = tmp_path_factory.mktemp("back") / "run", [], io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stream):
            patch.setattr(module, "make_feed", poisoned(module.make_feed, {3, 4, 5, 18, 19, 20}))
            make, restoring = watched(module, left)
            patch.setattr(module, "make_train_step", make)
            patch.setattr(module, "restore_checkpoint", restoring)
            patch.setattr(pretrain, "report", lambda *arguments: None)
            assert call(pretrain, f"--data={data}", *SHORT, "--eval_every=20", f"--out={out}", *flags) == 0
        return out, left, stream.getvalue()

    return run


def test_bad_batches_take_the_run_back_and_are_not_seen_again(own_garbage, taken_back):
    """Left out, until the run is back at a checkpoint, before the first one at its start, and on behind them."""
    out, left, said = taken_back()
    rows, trouble = train_rows(out), read_rows(out / "trouble.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21)) and all(np.isfinite(row["loss"]) for row in rows)
    assert [row["kind"] for row in trouble] == 2 * (["skipped"] * 3 + ["rollback"])
    assert [row["data"] and row["data"]["steps"] for row in trouble] == [2, 3, 4, None, 17, 18, 19, 15]
    first, second = trouble[3], trouble[7]
    assert (first["step"], first["to"], first["data_after"]["steps"]) == (2, 0, 5)
    assert (second["step"], second["to"], second["data_after"]["steps"]) == (12, 10, 20)
    cursor = open_checkpoint(out).meta["cursor"]
    assert (cursor["data"]["steps"], cursor["rollbacks"], cursor["skipped"]) == (30, 2, 0)
    assert [row["step"] for row in read_rows(out / "log.jsonl") if row["kind"] == "heldout"] == [0, 20]
    assert "back from step 12 to the checkpoint of step 10" in said and "back from step 2 to the start" in said
    assert [count for _, count in left] == [0, 0, 0], "no checkpoint is read while the state that is left is still there"
    assert left[0][0] == 0 < left[1][0] == left[2][0], "it would have been noticed"


@pytest.mark.skipif(not MORE, reason="a long case")
def test_a_mesh_goes_back_as_one_device_does(own_garbage, taken_back):
    out, left, _ = taken_back("--mesh=data:2,expert:2")
    one, _, _ = taken_back()
    for name in ("loss", "grad_norm", "tokens"):
        want, got = ([row[name] for row in train_rows(run)] for run in (one, out))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)  # sums in another order, over twenty steps of Adam
    names = ("kind", "step", "to", "data", "data_after")
    want, got = ([[row.get(n) for n in names] for row in read_rows(run / "trouble.jsonl")] for run in (one, out))
    assert got == want
    want, got = (open_checkpoint(run).meta["cursor"] for run in (one, out))
    assert {**got, "losses": 0, "norms": 0} == {**want, "losses": 0, "norms": 0}
    assert [count for _, count in left] == [0, 0, 0] and left[2][0] > 0, "of what lies on devices nothing either"
