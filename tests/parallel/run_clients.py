"""Run as one of several clients by test_clients.py: saves a sharded checkpoint, restores it, then exchanges.

Usage: run_clients.py FOLDER SECONDS [SLEEP]; each client writes FOLDER/client-N.pid when it has begun to exchange; client 0
first sleeps, while the others wait for it.
"""

import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf

from dsv3 import tree
from dsv3.parallel.clients import start_clients
from dsv3.parallel.collectives import gather_mesh
from dsv3.parallel.mesh import layout_of, make_layout, make_mesh, place, whole
from dsv3.train.checkpoint import restore_checkpoint, save_checkpoint

DIMS = {"whole": [None, None], "rows": ["expert", None], "both": ["expert", "data"], "step": []}


def example():
    """The state as plain tensors."""
    values = {name: tf.random.stateless_normal([16, 4], [i, 3]) for i, name in enumerate(("rows", "both"))}
    return values | {"whole": tf.cast(tf.range(8) * 3, tf.bfloat16)[:, None] * tf.ones([1, 2], tf.bfloat16),
                     "step": tf.constant(5, tf.int64)}  # fmt: skip


def main(folder: pathlib.Path, seconds: float, sleep: float = 0.0) -> None:
    """One client with two devices."""
    with start_clients(2) as clients:
        mesh = make_mesh({"data": 2, "expert": clients.count})
        layouts = {name: make_layout(mesh, dims) for name, dims in DIMS.items()}
        state = tree.map_leaves(place, example(), dict(sorted(layouts.items())))
        for step in (4, 5):
            save_checkpoint(folder / "checkpoints", state, {"clients": clients.count}, step=step)
        turned = {name: make_layout(mesh, dims[::-1]) for name, dims in DIMS.items()}
        found = restore_checkpoint(folder / "checkpoints", example(), layouts=turned).state
        for name, leaf in found.items():
            assert layout_of(leaf) == turned[name] and bool(tf.reduce_all(whole(leaf) == whole(state[name]))), name
        (folder / f"client-{clients.index}.pid").write_text(str(os.getpid()))
        time.sleep(sleep if clients.index == 0 else 0)
        count, end = len(mesh.local_devices()), time.monotonic() + seconds
        while gather_mesh([tf.constant(int(time.monotonic() < end))] * count, mesh).all():
            time.sleep(0.01)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *map(float, sys.argv[2:]))
