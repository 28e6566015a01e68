"""Run by test_kills.py: saves checkpoints in processes that are killed at any moment, and looks what is left each time.

Prints the calls of a save, and for each killed process what it was doing and the step that a restore then finds.
Usage: kill_checkpoints.py FOLDER, which must be empty.
"""

from __future__ import annotations

import builtins
import json
import os
import pathlib
import random
import signal
import sys
import time

import numpy as np
import tensorflow as tf

from dsv3.train import checkpoint
from dsv3.train.checkpoint import Keep, restore_checkpoint, save_checkpoint
from dsv3.train.saving import BackgroundSaver
from tests.killing import count_calls, in_child

SHAPE, KEEP = [64, 1024], Keep(2)
CALLS = [(builtins, "open"), (os, "fsync"), (pathlib.Path, "rename"), (pathlib.Path, "mkdir"), (checkpoint.shutil, "rmtree")]


class Leaf:
    """A leaf that is no tensor, so that no kernel of TensorFlow runs and the process may fork."""

    dtype, shape = tf.float32, tf.TensorShape(SHAPE)

    def __init__(self, value: float):
        self._value = value

    def numpy(self) -> np.ndarray:
        return np.full(SHAPE, self._value, np.float32)


def save(folder: pathlib.Path, step: int) -> None:
    """A checkpoint whose values are all its step."""
    save_checkpoint(folder, {"x": Leaf(step)}, {}, step=step, cursor={"data": step}, keep=KEEP)


def told_by_child(action) -> object:
    """Runs `action` in a child and returns its result."""
    reading, writing = os.pipe()
    pid = in_child(lambda: os.write(writing, json.dumps(action()).encode()))
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    return json.loads(data) if data else "the child has failed"


def restored(folder: pathlib.Path) -> list:
    """What a run would go on from: its step, and whether values and cursor are those of that step."""
    skipped: list[str] = []
    found = restore_checkpoint(folder, {"x": tf.TensorSpec(SHAPE)}, on_skip=skipped.append)
    if found is None:
        return [0, True, skipped]
    step = int(found.path.name.split("-")[1])
    return [step, bool((found.state["x"].numpy() == step).all()) and found.cursor == {"data": step}, skipped]


def main(folder: pathlib.Path) -> None:
    """Kills saves before each of their calls, first of a new step, then of one that is there; then at random times."""
    calls, results = set(), []
    for again in (False, True):
        names = told_by_child(lambda a=again: recorded(folder / f"record-{a}", 2 if a else 3))
        calls |= set(names)
        for call, name in enumerate(names):
            place = folder / f"call-{again}-{call}"
            for step in (1, 2):
                save(place, step)
            step = 2 if again else 3
            pid = in_child(lambda p=place, s=step, c=call: (count_calls(CALLS, c, []), save(p, s)))
            killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            results.append({"call": name, "again": again, "killed": killed, "wanted": [2, step],
                            "found": told_by_child(lambda p=place: restored(p))})  # fmt: skip
            save(place, 4)
            results[-1]["left"] = sorted(path.name for path in place.iterdir())
    rng, place = random.Random(0), folder / "random"
    for _ in range(20):
        before = told_by_child(lambda: restored(place))[0]
        pid = in_child(lambda b=before: until_killed(place, b))
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = told_by_child(lambda: restored(place))
        results.append({"call": "random", "again": False, "killed": True, "wanted": [before, 10**9], "found": found})
    print(json.dumps({"calls": sorted(calls), "results": results}))


def recorded(folder: pathlib.Path, step: int) -> list[str]:
    """The calls of a save, after those of steps 1 and 2."""
    for before in (1, 2):
        save(folder, before)
    names: list[str] = []
    count_calls(CALLS, None, names)
    save(folder, step)
    return list(names)


def until_killed(folder: pathlib.Path, step: int) -> None:
    """Saves step after step in a thread, as a training does."""
    with BackgroundSaver(folder, {}, keep=KEEP) as saver:
        while True:
            step += 1
            saver.save({"x": Leaf(step)}, step, {"data": step})
            while saver.poll() is None:
                time.sleep(0.001)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
