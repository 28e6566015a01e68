"""SIGKILL at any moment: of saves, before each thing that they do to the disk, and of a whole training, many times."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from tests.more import MORE
from tests.train.test_pretrain_example import SMALL, call, command, corpus, environment, pretrain, train_rows  # noqa: F401

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


@pytest.mark.skipif(not MORE, reason="long")
def test_a_training_that_is_killed_many_times_has_the_losses_of_one_that_is_not(corpus, pretrain, tmp_path, monkeypatch):  # noqa: F811
    """Every process is killed at a random moment, while it starts, trains or saves; each goes on where a checkpoint is."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    same = [f"--corpus={corpus}", "--steps=250", "--ema_decay=0.9", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "report", lambda *arguments: None)
        assert call(pretrain, *same, f"--out={straight}") == 0
    rng, kills, steps = random.Random(1), 0, []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    while kills < 6:
        with subprocess.Popen(command(*same, f"--out={broken}"), env=environment(), **pipes) as process:
            begin = last = len(train_rows(broken)) if (broken / "log.jsonl").exists() else 0
            until = begin + rng.randrange(1, 40)
            deadline = time.monotonic() + 120
            while last < until and process.poll() is None and time.monotonic() < deadline:
                time.sleep(rng.uniform(0.001, 0.02))
                last = len(train_rows(broken)) if (broken / "log.jsonl").exists() else 0
            assert process.poll() is None, process.stdout.read()
            process.kill()
        kills += 1
        found = list_checkpoints(broken / "checkpoints")
        steps.append((last, checkpoint_step(found[-1]) if found else 0))
    # One checkpoint in five steps, which is there a step after it was written.
    assert all(rows - step <= 2 * 5 + 1 for rows, step in steps), steps
    done = subprocess.run(command(*same, f"--out={broken}"), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    want, got = train_rows(straight), train_rows(broken)
    assert [row["step"] for row in got] == list(range(1, 251))
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-4, err_msg=name)
    assert not [name for name in os.listdir(broken / "checkpoints") if name.startswith(".")]
