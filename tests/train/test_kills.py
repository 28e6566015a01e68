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


# How a training runs → (processes, flags, when it is killed, steps). Each start on a mesh takes a while.
TRAININGS = {
    "on one device": (1, [], "step start step step step report".split(), 250),
    "on a mesh": (1, [MESH], "step start step".split(), 60),
    "in two processes": (2, [MESH], "step start".split(), 60),
}
REPORT = ("samples.txt", "results.json", "plots/norms.png", "export")  # in the order in which it makes them


class Killing:
    """A training that is killed again and again: processes of it, steps that it has, seconds until a start has its first."""

    def __init__(self, processes, out, most):
        self.processes, self.out, self.most, self.starting = processes, out, most, None
        seed = random.SystemRandom().randrange(2**32)  # where a process is at a time of the clock is not the same anyway
        self.rng = random.Random(seed)
        print(f"seed of the moments: {seed}")

    def rows(self):
        log = self.out / "log.jsonl"
        return log.read_bytes().count(b'"train"') if log.exists() else 0

    def wait(self, process, there):
        deadline = time.monotonic() + 300
        while not there():
            assert process.poll() is None and time.monotonic() < deadline, (self.out.parent / "printed").read_text()
            time.sleep(0.005)

    def wait_steps(self, process):
        """Some steps, and a part of the next one or of what comes before it, any moment of which is as likely as another."""
        begin, launched = self.rows(), time.monotonic()
        # A start cuts the rows after its checkpoint, at most those of two saves.
        self.wait(process, lambda: self.rows() > begin)
        self.starting = self.starting or time.monotonic() - launched
        more = self.rng.randrange(4, self.most)
        self.wait(process, lambda: self.rows() >= begin + more)
        return self.rng.uniform(0, np.median([row["seconds"] for row in train_rows(self.out)[-3:]]))

    def wait_start(self, process):
        """Any moment until the first step: loading, restoring, compiling."""
        end, begin = time.monotonic() + self.rng.uniform(0, self.starting), self.rows()
        self.wait(process, lambda: time.monotonic() > end or self.rows() > begin)
        return 0

    def wait_report(self, process):
        """Any file that it writes, or the scores before them."""
        name = self.rng.choice([None, *REPORT])
        if name is None:
            self.wait(process, lambda: "scoring the held-out text" in (self.out.parent / "printed").read_text())
            return self.rng.uniform(0, 1)
        self.wait(process, lambda: (self.out / name).exists())
        return self.rng.uniform(0, 0.1)

    def kill(self, process, when):
        """Kills a process, one of several, at a moment of what it does; returns the steps that are done."""
        children = []
        if self.processes > 1:
            path = f"/proc/{process.pid}/task/{process.pid}/children"
            self.wait(process, lambda: len(open(path).read().split()) == self.processes)
            children = open(path).read().split()
        time.sleep({"step": self.wait_steps, "start": self.wait_start, "report": self.wait_report}[when](process))
        if when == "report" and process.poll() == 0:
            return self.rows()  # it was quicker
        assert process.poll() is None, (when, (self.out.parent / "printed").read_text())
        if not children:
            process.kill()
            process.wait()
            return self.rows()
        os.kill(int(self.rng.choice(children)), signal.SIGKILL)
        assert process.wait(60) == 128 + signal.SIGKILL
        assert not [child for child in children if os.path.exists(f"/proc/{child}")], "the launcher ends the others"
        return self.rows()


@pytest.mark.skipif(not MORE, reason="long")
@pytest.mark.parametrize("how", TRAININGS)
def test_a_training_that_is_killed_many_times_has_the_losses_of_one_that_is_not(
    corpus, pretrain, tmp_path, monkeypatch, how
):
    """A process is killed at a random moment, while it starts, trains, saves or reports; the same command goes on."""
    straight, broken = tmp_path / "straight", tmp_path / "broken" / "run"
    broken.mkdir(parents=True)
    processes, flags, kills, count = TRAININGS[how]
    same = [f"--corpus={corpus}", f"--steps={count}", "--ema_decay=0.9", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "report", lambda *arguments: None)
        assert call(pretrain, *same, f"--out={straight}") == 0
    killing, steps = Killing(processes, broken, most=(count - 20) // len(kills)), []
    for when in kills:
        process = launched(broken.parent, processes, [*same, *flags, f"--out={broken}"])
        last = killing.kill(process, when)
        found = list_checkpoints(broken / "checkpoints")
        steps.append((when, last, checkpoint_step(found[-1]) if found else 0))
    # One checkpoint in five steps, which is there a step after it was written.
    assert all(rows - step <= 2 * 5 + 1 for _, rows, step in steps), steps
    process = launched(broken.parent, processes, [*same, *flags, f"--out={broken}"])
    assert wait(process, 300) == 0, (broken.parent / "printed").read_text()
    want, got = train_rows(straight), train_rows(broken)
    assert [row["step"] for row in got] == list(range(1, count + 1))
    # On one device it is the same to the bit. Devices add up in another order, 6e-8 a sum, of which Adam's steps make more:
    # after 60 of them 1.6e-7 of a loss and 1.2e-6 of a gradient's norm, measured.
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-5, err_msg=name)
    assert not [name for name in os.listdir(broken / "checkpoints") if name.startswith(".")]
    assert json.loads((broken / "results.json").read_text())["training"]["steps"] == count
