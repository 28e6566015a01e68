"""Run by test_checkpoint_memory.py: loads and saves a checkpoint and prints the memory that this took, in bytes.

Usage: measure_memory.py FOLDER, with checkpoints `small-` and `large-` `float32` and `float8`. The small ones come first,
so that what is set up once is not counted.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

import tensorflow as tf

from dsv3 import tree
from dsv3.pretrained import load_pretrained, save_pretrained

DTYPE = "bfloat16"


def resident(field: str) -> int:
    """`VmRSS`, what is in memory now, or `VmHWM`, the most since `reset`."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def reset() -> int:
    """Sets `VmHWM` back and returns what is in memory now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def main(folder: pathlib.Path) -> None:
    """Measures loading from float32 and from FP8, then saving in FP8 and in bfloat16."""
    os.fsync = lambda _: None  # the disk's speed is not what is measured
    for form in ("float32", "float8"):
        save_pretrained(folder / "warm", *load_pretrained(folder / f"small-{form}", dtype=DTYPE), dtype="float8")
    found = {}
    for form in ("float32", "float8"):
        params = router = None
        before = reset()
        cfg, params, router = load_pretrained(folder / f"large-{form}", dtype=DTYPE)
        found |= {f"load {form}": resident("VmHWM") - before, f"loaded {form}": resident("VmRSS") - before}
    found["params"] = sum(leaf.shape.num_elements() * leaf.dtype.size for leaf in tree.flatten((params, router)))
    for form in ("float8", "bfloat16"):
        before = reset()
        save_pretrained(folder / "out", cfg, params, router, dtype=form)
        found[f"save {form}"] = resident("VmHWM") - before
    found["sum"] = float(sum(tf.reduce_sum(tf.cast(leaf[:1], tf.float32)) for leaf in tree.flatten(params)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
