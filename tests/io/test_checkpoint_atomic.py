"""A save that is killed, at any of its system calls or at a random time, leaves the old checkpoint or the new one whole."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from dsv3.io.atomic import replace_directory
from dsv3.pretrained import load_pretrained

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_script(name: str, *args: object) -> dict:
    """Runs a script of this folder in a process of its own and returns what it prints."""
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name(name)), *map(str, args)],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_saves_leave_one_whole_checkpoint(tmp_path):
    found = run_script("kill_saves.py", tmp_path)
    calls, results = found["calls"], found["results"]
    assert {"open", "pwrite", "fsync", "_exchange", "rmtree"} <= set(calls) and len(calls) > 20
    assert all(result["killed"] for result in results)
    assert [result for result in results if result["holds"] == "neither"] == []
    swapped = calls.index("_exchange")
    at_calls = [result for result in results if result["call"] is not None]
    assert [r["holds"] for r in at_calls] == ["old" if r["call"] <= swapped else "new" for r in at_calls]
    assert collections.Counter(r["holds"] for r in results)["new"] > 2
    assert found["left"] == ["model", "new"]  # nothing of the killed ones is left after the next save
    for folder, value in (("model", 1.0), ("new", 2.0)):
        assert load_pretrained(tmp_path / folder)[1].embed.numpy().max() == value


def test_error_in_the_block_keeps_the_old_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(RuntimeError), replace_directory(tmp_path / "out") as fresh:
        (fresh / "a").write_text("new")
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_only_what_dead_processes_left_is_removed(tmp_path):
    host, dead = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [f".out.saving-{host}-{os.getpid()}-1", ".out.saving-elsewhere-1-1", f".other.saving-{host}-{dead.pid}-1"]
    gone = [f".out.saving-{host}-{dead.pid}-1", f".out.replaced-{host}-{dead.pid}-1"]
    for name in [*kept, *gone, "out"]:
        (tmp_path / name).mkdir()
    with replace_directory(tmp_path / "out") as fresh:
        (fresh / "a").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])
    assert (tmp_path / "out" / "a").read_text() == "new"
