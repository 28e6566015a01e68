"""Run by test_checkpoint_atomic.py: saves over a checkpoint again and again in processes that are killed at any moment.

Prints what a save calls, and for each killed process before which call it was killed and whose files the directory held.
Usage: kill_saves.py FOLDER, which must be empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import time

import numpy as np

from dsv3 import RouterState, model_specs, tree
from dsv3.io import atomic
from dsv3.pretrained import save_pretrained
from tests.killing import count_calls, in_child
from tests.small import model_config

CFG = model_config(num_nextn_predict_layers=0, num_hidden_layers=1, first_k_dense_replace=1)
CALLS = [(os, "open"), (os, "pwrite"), (os, "fsync"), (os, "rename"), (atomic, "_exchange"), (atomic.shutil, "rmtree")]


def save(directory: pathlib.Path, value: float) -> None:
    """Saves a model whose values are all `value`; no TensorFlow kernel runs, so that the process may fork."""
    params = tree.map_leaves(lambda spec: np.full(spec.shape, value, np.float32), model_specs(CFG))
    no_biases = np.zeros((0, 6), np.float32)
    save_pretrained(directory, CFG, params, RouterState(no_biases, no_biases), max_shard_bytes=4000)


def digest(directory: pathlib.Path) -> str:
    """One hash of all names and contents."""
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def main(folder: pathlib.Path) -> None:
    """Kills saves before each of their calls, and then at random times."""
    target = folder / "model"
    save(folder / "new", 2.0)
    save(target, 1.0)
    old, new = digest(target), digest(folder / "new")
    names: list[str] = []
    reading, writing = os.pipe()

    def record():
        count_calls(CALLS, None, names)
        save(target, 2.0)
        os.write(writing, json.dumps(names).encode())

    os.waitpid(in_child(record), 0)
    names = json.loads(os.read(reading, 1 << 16))
    results = []

    def attempt(action, call: int | None, delay: float | None) -> None:
        atomic._remove_left_behind(target)  # else the save would, which shifts its calls
        if digest(target) != old:
            save(target, 1.0)
        pid = in_child(action)
        if delay is not None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        held = {old: "old", new: "new"}.get(digest(target), "neither")
        results.append({"call": call, "killed": os.WIFSIGNALED(status), "holds": held})

    def killed_before(call: int):
        def action():
            count_calls(CALLS, call, [])
            save(target, 2.0)

        return action

    def until_killed():
        while True:
            save(target, 2.0)

    for call, name in enumerate(names):
        if name != "pwrite" or call % 4 == 0:
            attempt(killed_before(call), call, None)
    rng = random.Random(0)
    for _ in range(10):
        attempt(until_killed, None, rng.uniform(0, 0.1))
    os.waitpid(in_child(killed_before(len(names) // 2)), 0)
    save(target, 1.0)
    left = sorted(path.name for path in folder.iterdir())
    print(json.dumps({"calls": names, "results": results, "left": left}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
