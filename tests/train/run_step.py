"""Run as one of several clients by test_step_clients.py: gradients of one step on a mesh over all of them.

Usage: run_step.py FOLDER DEVICES MESH SCHEDULE NODES DTYPE MODEL
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np

from dsv3 import tree
from dsv3.parallel.clients import start_clients


def main(folder: str, devices: str, mesh: str, schedule: str, nodes: str, dtype: str, model: str) -> None:
    """One client; the first writes the gradients and what the step reports."""
    with start_clients(int(devices)) as clients:
        from tests.train.test_step_clients import on_a_mesh  # importing it starts TensorFlow

        grads, metrics = on_a_mesh(mesh, schedule, int(nodes), dtype, model, times=2)
        if clients.index == 0:
            found = {path: leaf.numpy() for path, leaf in tree.items(grads)}
            reported = {f"mesh.{name}": np.asarray(value) for name, value in metrics.mesh._asdict().items()}
            np.savez(pathlib.Path(folder) / "step.npz", loss=metrics.loss.numpy(), **found, **reported)


if __name__ == "__main__":
    main(*sys.argv[1:])
