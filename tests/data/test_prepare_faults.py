"""What may go wrong in `examples/prepare_data.py`: sources that lose their text, processes that die, a killed deletion."""

import importlib
import json
import random
import shutil
import sys

import pytest

from dsv3.data import heldout_place, make_mixture, open_shards, read_manifest
from tests.data.test_prepare_example import PROGRAM, ROOT, call, documents, sentence

FLAGS = "--processes=1 --vocab_size=300 --heldout=0.2 --near=0 --fim=0 --filters=none".split()


@pytest.fixture
def two_sources(tmp_path):
    """Flags of two sources; what the second one has to train on is all in the first, what it holds out is its own."""
    rng = random.Random(0)
    texts = [sentence(rng, 30) for _ in range(60)]
    train = [text for text in texts if heldout_place(text) >= 0.2]
    held = [text for text in texts if heldout_place(text) < 0.2]
    assert len(held) > 5
    for name, rows in (("first", [*train, *held[:2]]), ("second", [*train[:9], *held[2:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    flags = [f"--source={name}={tmp_path}/{name}.jsonl" for name in ("first", "second")]
    return [sys.executable, str(PROGRAM), *flags, *FLAGS, f"--out={tmp_path}/out"], held


def test_a_source_with_nothing_but_held_out_text_keeps_that(two_sources, tmp_path):
    arguments, held = two_sources
    done = call(arguments)
    assert done.returncode == 0, done.stderr
    assert "source 'second' has nothing to train on: only what is held out stays" in done.stdout
    out, report = tmp_path / "out", json.loads((tmp_path / "out" / "report.json").read_text())
    for source in report["sources"].values():
        assert source["read"]["documents"] == source["documents"] + sum(source["dropped"].values())
    manifest = read_manifest(out)
    assert list(manifest.splits["train"]) == ["first"] and list(manifest.splits["heldout"]) == ["first", "second"]
    assert manifest.sources["second"]["documents"] == len(held) - 2 and manifest.sources["second"]["dropped"] == {
        "exact duplicate": 9
    }  # fmt: skip
    assert documents(out, "heldout") == {"first": held[:2], "second": held[2:]}
    assert make_mixture(open_shards(out), **manifest.settings["mixture"]).names == ("first",)


def test_weights_that_are_left_must_make_a_mixture_before_any_tokenising(two_sources, tmp_path):
    done = call([*two_sources[0], "--weight=first=0", "--weight=second=1"])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("prepare_data: mixture_settings: the weights sum to zero") and "only first have" in last
    assert not (tmp_path / "out" / "tokenizer").exists() and not (tmp_path / "out" / "train").exists()


DIED = """
import os, pathlib, signal, sys, time
from prepare_pool import Stage, open_pool, run_stage

with open_pool(2, pathlib.Path(sys.argv[1])) as pool:
    os.kill(pool.submit(os.getpid).result(), signal.SIGKILL)
    while not pool._broken:
        time.sleep(0.01)
    try:
        run_stage(pool, 2, Stage("stage", abs, [1], int, lambda task: False), lambda: None)
    except MemoryError as error:
        print(error)
"""


def test_a_process_that_died_idle_is_one_line(tmp_path):
    done = call([sys.executable, "-c", DIED, str(tmp_path)], cwd=ROOT / "examples")
    assert done.stdout == "a process died, perhaps for want of memory: try fewer --processes\n", done.stderr


NO_MEMORY = """
import sys
import prepare_data

def run(setup, stop):
    raise MemoryError

prepare_data.run = run
sys.exit(prepare_data.main(prepare_data.parse_flags(sys.argv)))
"""


def test_an_error_without_a_message_gets_one(two_sources):
    done = call([sys.executable, "-c", NO_MEMORY, *two_sources[0][2:]], cwd=ROOT / "examples")
    assert (done.returncode, done.stderr) == (1, "prepare_data: memory is short: try fewer --processes\n")


@pytest.mark.parametrize("kill", range(4))
def test_a_deletion_that_is_killed_leaves_no_shard_marked_done(tmp_path, monkeypatch, kill):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    setup = importlib.import_module("prepare_setup")
    for name in ("work/shards/train/a/00000.json", "train/a/00000.tokens.npy", "heldout/a/x", "run.json", "manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    remove, calls = shutil.rmtree, []

    def killed(path, *rest, **options):
        calls.append(path)
        if len(calls) == kill:
            raise KeyboardInterrupt
        remove(path, *rest, **options)

    monkeypatch.setattr(setup.shutil, "rmtree", killed)
    try:
        setup.delete(tmp_path)
        assert not list(tmp_path.iterdir())
    except KeyboardInterrupt:
        assert not (tmp_path / "manifest.json").exists() and (tmp_path / "run.json").exists()
        done, shards = tmp_path / "work" / "shards", tmp_path / "train" / "a" / "00000.tokens.npy"
        assert shards.exists() or not done.exists()
        setup.sweep(tmp_path)
        assert not (tmp_path / setup.DELETED).exists()
        setup.delete(tmp_path)
        assert not list(tmp_path.iterdir())
