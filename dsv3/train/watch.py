"""What to look at beside the loss: norms of gradients, parameters and updates by component, selection biases, memory."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.config import ModelConfig
from dsv3.layout import mesh_of
from dsv3.nn.model import model_specs
from dsv3.parallel.collectives import gather_mesh
from dsv3.parallel.mesh import on_device, unpack_tree, whole
from dsv3.policy import ComputePolicy, default_policy
from dsv3.train.mesh_params import leaf_shares
from dsv3.train.optim import Optimizer, square_sums
from dsv3.train.state import TrainMetrics, TrainState
from dsv3.typing import Tree

COMPONENTS = ("embed", "head", "norms", "attention", "dense", "router", "experts", "shared", "mtp")


def component_of(path: str) -> str:
    """Returns the component that a parameter belongs to: one of `COMPONENTS`.

    >>> [component_of(path) for path in ("moe.ffn.gate_up", "moe.ffn.shared.down", "dense.ffn.down", "moe.mla.q_norm")]
    ['experts', 'shared', 'dense', 'norms']
    """
    parts = path.split(".")
    if parts[0] in ("embed", "head", "mtp"):
        return parts[0]
    if parts[-1].endswith("norm"):
        return "norms"
    if "mla" in parts:
        return "attention"
    if parts[0] == "dense":
        return "dense"
    return "router" if parts[-1] == "router" else "shared" if "shared" in parts else "experts"


def component_norms(squares: np.ndarray, specs: Tree) -> dict[str, float]:
    """Returns the Euclidean norm of each component that a model has.

    Args:
      squares: `[leaves]`, the sum of squares of each parameter, in the tree's order.
      specs: the parameters, or a tree like them.
    """
    sums: dict[str, float] = {}
    for path, square in zip(tree.to_dict(specs), np.asarray(squares, np.float64), strict=True):
        name = component_of(path)
        sums[name] = sums.get(name, 0.0) + float(square)
    return {name: float(f"{sums[name] ** 0.5:.6g}") for name in COMPONENTS if name in sums}


def make_watch(
    cfg: ModelConfig, optimizer: Optimizer, layouts: Tree | None = None, *, policy: ComputePolicy | None = None
) -> Callable[[TrainState, TrainMetrics], Mapping[str, Any]]:
    """Compiles the numbers that are looked at now and then.

    Args:
      cfg, optimizer, layouts, policy: as of `make_train_step`.

    Returns:
      `watch(state, metrics) -> row`, of the state after a step and that step's metrics: `grad_norms`, `param_norms` by
      component; `update_ratios`, the norm of the last update over that of the parameters (if the optimiser tells its last
      update, see `Optimizer`); `bias_min`, `bias_max`, `bias_std` of the selection biases by layer; `memory_bytes`,
      resident, and `peak_memory_bytes` of this process. On a mesh every process calls it.
    """
    policy = policy or default_policy()
    specs = model_specs(cfg)

    @tf.function(autograph=False, jit_compile=policy.jit)
    def squares(params: Tree, opt: Tree, rate: tf.Tensor) -> tf.Tensor:
        found = [square_sums(params, fuse=policy.fuse)]
        if optimizer.last_update is not None:
            found.append(tf.stack([tf.reduce_sum(x * x) for x in optimizer.last_update(params, opt, rate)]))
        return tf.stack(found)

    def watch(state: TrainState, metrics: TrainMetrics) -> Mapping[str, Any]:
        rate = tf.cast(metrics.optim.learning_rate, tf.float32)
        if layouts is None:
            params, opt = (tree.map_leaves(tf.convert_to_tensor, part) for part in (state.params, state.opt))
            found = squares(params, opt, rate).numpy()
        else:
            found = _on_mesh(squares, state, rate, layouts)
        row = {"grad_norms": component_norms(metrics.grad_squares, specs), "param_norms": component_norms(found[0], specs)}
        if len(found) > 1:
            updates = component_norms(found[1], specs)
            row["update_ratios"] = {
                name: float(f"{updates[name] / max(row['param_norms'][name], 1e-30):.6g}") for name in updates
            }
        return row | bias_numbers(state) | memory_numbers()

    return watch


def _on_mesh(squares: Callable[..., tf.Tensor], state: TrainState, rate: tf.Tensor, layouts: Tree) -> np.ndarray:
    """Sums over the devices' parts; a leaf that several hold alike counts once."""
    mesh, parts = mesh_of(layouts), []
    shares = leaf_shares(layouts)
    for device, params, opt in zip(mesh.local_devices(), unpack_tree(state.params), unpack_tree(state.opt)):
        with on_device(device):
            parts.append(squares(params, opt, rate) * shares)
    found = gather_mesh(parts, mesh)
    return found.reshape(mesh.size, *parts[0].shape).sum(0)


def bias_numbers(state: TrainState) -> dict[str, list[float]]:
    """Smallest, largest and standard deviation of each layer's selection biases; layers as in the load."""
    rows = [row for part in state.router for row in np.asarray(whole(part))]
    numbers = {"bias_min": np.min, "bias_max": np.max, "bias_std": np.std}
    return {name: [round(float(fn(row)), 6) for row in rows] for name, fn in numbers.items()} if rows else {}


def memory_numbers() -> dict[str, int]:
    """This process's resident memory and its peak so far, in bytes; the first where the system tells it."""
    scale = 1 if sys.platform == "darwin" else 1024
    found = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    statm = Path("/proc/self/statm")
    if statm.exists():
        found["memory_bytes"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found
