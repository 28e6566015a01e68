"""One step on a mesh over several processes: pipeline ranks, experts and rows of the batch in any of them."""

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dsv3 import pipeline, tree
from dsv3.parallel.mesh import parse_axes
from tests.compare import assert_close
from tests.small import model_config, random_tokens
from tests.train.test_pipeline_step import gradients

ROOT = pathlib.Path(__file__).resolve().parents[2]
CFG = model_config(num_hidden_layers=5, first_k_dense_replace=1, num_nextn_predict_layers=1, n_routed_experts=12)
MICRO, ROWS, LENGTH = 4, 12, 4


def batch():
    """Tokens `[A, B, T+1]`, and weights that leave some out."""
    tokens = np.stack([random_tokens(CFG, ROWS, LENGTH + 1, seed=m) for m in range(MICRO)])
    return tokens, np.random.default_rng(0).integers(0, 2, (MICRO, ROWS, LENGTH)).astype(np.float32)


CASES = [
    (2, 2, "pipe:4", "one_f_one_b", 1),  # two ranks a process
    (2, 2, "pipe:2,expert:2", "dualpipe", 1),  # a rank a process, both directions
    (4, 1, "pipe:2,data:2", "zb1p", 1),  # two processes a rank
    (3, 2, "pipe:2,expert:3", "dualpipe_v", 1),  # the second process has devices of both ranks
    (2, 2, "expert:4", "gpipe", 2),  # a node a process
    (4, 1, "expert:4", "gpipe", 2),  # two processes a node
]


@functools.cache
def on_one_device():
    return gradients(CFG, None, *batch())


@pytest.mark.parametrize(("clients", "devices", "axes", "schedule", "nodes"), CASES)
def test_gradients_are_those_of_one_device(clients, devices, axes, schedule, nodes, tmp_path):
    launch = [sys.executable, str(ROOT / "examples" / "launch.py"), f"--num_clients={clients}"]
    command = [*launch, str(ROOT / "tests/train/run_step.py"), str(tmp_path), str(devices), axes, schedule, str(nodes)]
    env = os.environ | {"DSV3_JOIN_SECONDS": "120", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    got = np.load(tmp_path / "step.npz")
    want, ref = on_one_device()
    assert_close(got["loss"], ref.loss)
    for path, leaf in tree.items(want):
        assert_close(got[path], leaf, 1e-5, path)
    table = getattr(pipeline, schedule)(parse_axes(axes).get("pipe", 1), MICRO)
    assert got["mesh.held"].tolist() == list(pipeline.peak_activations(table))
    _, here = gradients(CFG, axes, *batch(), schedule=getattr(pipeline, schedule), expert_nodes=nodes)
    for name, value in here.mesh._asdict().items():
        np.testing.assert_allclose(got[f"mesh.{name}"], value, err_msg=name)
