"""SIGKILL at any moment: of saves, before each thing that they do to the disk, and of whole trainings, many times."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from tests.more import MORE
from tests.train.test_pretrain_example import SMALL, call, corpus, environment, pretrain, train_rows
from tests.train.test_pretrain_mesh import MESH, launched, wait

__all__ = ["corpus", "pretrain"]

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_killed_save_costs_no_other_checkpoint(tmp_path):
    script = [sys.executable, str(ROOT / "tests" / "train" / "kill_checkpoints.py"), str(tmp_path)]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"open", "fsync", "rename", "mkdir", "rmtree"} <= set(found["calls"])
    results = found["results"]
    assert all(result["killed"] for result in results) and len(results) >= 40
    for result in results:
        step, whole, skipped = result["found"]
        low, high = result["wanted"]
        assert low <= step <= high and whole and not skipped, result
        left = result.get("left", ["step-00000004"])
        assert left[-1] == "step-00000004" and not left[0].startswith("."), "what the killed one left is removed"
    steps = [result["found"][0] for result in results if result["call"] == "random"]
    assert steps == sorted(steps) and steps[-1] > 0, "saves were ended between the kills"


# How a training runs → (processes, flags, kills, steps). Each start on a mesh takes a while.
TRAININGS = {
    "on one device": (1, [], 6, 250),
    "on a mesh": (1, [MESH], 3, 60),
    "in two processes": (2, [MESH], 2, 60),
}


def rows_of(out):
    return len(train_rows(out)) if (out / "log.jsonl").exists() else 0


def kill_at_random(process, processes, out, rng):
    """Waits for a few steps more than are there, kills a process at some moment of the next, and returns the steps done."""
    begin = last = rows_of(out)
    until, deadline = begin + rng.randrange(1, 40 if processes == 1 else 15), time.monotonic() + 300
    while last < until and process.poll() is None and time.monotonic() < deadline:
        time.sleep(rng.uniform(0.001, 0.02))
        last = rows_of(out)
    assert process.poll() is None and last >= until, (out.parent / "printed").read_text()
    if processes == 1:
        process.kill()
        process.wait()
        return last
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(rng.choice(children)), signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL
    assert not [child for child in children if os.path.exists(f"/proc/{child}")], "the launcher ends the others"
    return last


@pytest.mark.skipif(not MORE, reason="long")
@pytest.mark.parametrize("how", TRAININGS)
def test_a_training_that_is_killed_many_times_has_the_losses_of_one_that_is_not(
    corpus, pretrain, tmp_path, monkeypatch, how
):
    """A process is killed at a random moment, while it trains or saves; the same command goes on where a checkpoint is."""
    straight, broken = tmp_path / "straight", tmp_path / "broken" / "run"
    broken.mkdir(parents=True)
    processes, flags, kills, count = TRAININGS[how]
    same = [f"--corpus={corpus}", f"--steps={count}", "--ema_decay=0.9", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "report", lambda *arguments: None)
        assert call(pretrain, *same, f"--out={straight}") == 0
    rng, steps = random.Random(1), []
    for _ in range(kills):
        process = launched(broken.parent, processes, [*same, *flags, f"--out={broken}"])
        last = kill_at_random(process, processes, broken, rng)
        found = list_checkpoints(broken / "checkpoints")
        steps.append((last, checkpoint_step(found[-1]) if found else 0))
    # One checkpoint in five steps, which is there a step after it was written.
    assert all(rows - step <= 2 * 5 + 1 for rows, step in steps), steps
    process = launched(broken.parent, processes, [*same, *flags, f"--out={broken}"])
    assert wait(process, 300) == 0, (broken.parent / "printed").read_text()
    want, got = train_rows(straight), train_rows(broken)
    assert [row["step"] for row in got] == list(range(1, count + 1))
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-4, err_msg=name)
    assert not [name for name in os.listdir(broken / "checkpoints") if name.startswith(".")]
