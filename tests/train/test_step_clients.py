"""One step on a mesh over several processes: pipeline ranks, experts and rows of the batch in any of them."""

import functools

import numpy as np
import pytest

from dsv3 import pipeline, tree
from dsv3.parallel.mesh import parse_axes
from tests.compare import PLAIN, assert_close
from tests.launched import run_clients
from tests.more import LONG, more
from tests.small import model_config, random_tokens
from tests.train.test_pipeline_step import gradients

CFG = model_config(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1, n_routed_experts=12)
ROWS, LENGTH = 12, 4
# Models by name, with their micro-batches; the second has little to compile.
MODELS = {"whole": (CFG, 4), "few": (CFG.replace(num_nextn_predict_layers=0), 2)}


def batch(model="whole"):
    """Tokens `[A, B, T+1]`, and weights that leave some out."""
    cfg, micro = MODELS[model]
    tokens = np.stack([random_tokens(cfg, ROWS, LENGTH + 1, seed=m) for m in range(micro)])
    return tokens, np.random.default_rng(0).integers(0, 2, (micro, ROWS, LENGTH)).astype(np.float32)


CASES = [
    (2, 1, "pipe:2", "zb1p", 1, "bfloat16", "few"),  # a dtype which TensorFlow does not send
    pytest.param((2, 1, "pipe:2", "zb1p", 1, "bfloat16"), marks=LONG),
    *more(
        (2, 2, "expert:4", "gpipe", 2),  # a node a process
        (2, 6, "pipe:12", "one_f_one_b", 1),  # six ranks a process; more than DTensor exchanges between two dims
        (2, 2, "pipe:2,expert:2", "dualpipe", 1),  # a rank a process, both directions
        (3, 2, "pipe:2,expert:3", "dualpipe_v", 1),  # the second process has devices of both ranks
        (4, 1, "pipe:2,data:2", "zb1p", 1),  # two processes a rank
        (4, 1, "expert:4", "gpipe", 2),  # two processes a node
    ),
]


@functools.cache
def on_one_device(model):
    return gradients(MODELS[model][0], None, *batch(model))


def on_a_mesh(axes, schedule, nodes, dtype, model, times=1):
    kwargs = {"schedule": getattr(pipeline, schedule), "expert_nodes": nodes, "policy": PLAIN.replace(dtype=dtype)}
    return gradients(MODELS[model][0], axes, *batch(model), times=times, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_device(case, tmp_path):
    clients, devices, axes, schedule, nodes, dtype, model = (*case, *("float32", "whole")[len(case) - 5 :])
    run_clients(clients, "tests/train/run_step.py", [tmp_path, devices, axes, schedule, nodes, dtype, model])
    got = np.load(tmp_path / "step.npz")
    inside, here = on_a_mesh(axes, schedule, nodes, dtype, model) if devices * clients <= 4 else (None, None)
    want, ref = on_one_device(model) if dtype == "float32" else (inside, here)
    assert_close(got["loss"], ref.loss)
    for path, leaf in tree.items(want):
        assert_close(got[path], leaf, 1e-5, path)
    table = getattr(pipeline, schedule)(parse_axes(axes).get("pipe", 1), MODELS[model][1])
    assert got["mesh.held"].tolist() == list(pipeline.peak_activations(table))
    for name, value in here.mesh._asdict().items() if inside else ():
        np.testing.assert_allclose(got[f"mesh.{name}"], value, err_msg=name)
