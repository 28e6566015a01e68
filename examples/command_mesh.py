"""What the programs that take a --mesh have in common."""

from __future__ import annotations

import math

import dsv3
from dsv3 import pipeline
from dsv3.checks import check
from dsv3.parallel.mesh import parse_axes


def check_axes(
    mesh: str, cfg: dsv3.ModelConfig, *, rows: int, micro_batches: int, schedule: str, nodes: int, processes: int, what: str
) -> None:
    """Checks a mesh, as `data:2,expert:2`, before any work.

    Args:
      mesh: its axes.
      cfg: the model that is to be trained on it.
      rows: of a micro-batch; `what` says where they come from.
      micro_batches: of a step.
      schedule: name of a pipeline schedule.
      nodes: that the axis `expert` is cut into.
      processes: that share its devices.
      what: the flags that give `rows`.

    Raises:
      ValueError: the mesh does not fit one of them.
    """
    sizes = parse_axes(mesh)
    devices, experts, ways = math.prod(sizes.values()), cfg.moe.router.num_experts, sizes.get("expert", 1)
    check(devices % processes == 0, f"--mesh {mesh} has {devices} devices, want a multiple of the {processes} processes")
    pipeline.SCHEDULES[schedule](sizes.get("pipe", 1), micro_batches)  # refuses numbers that it cannot order
    shards = sizes.get("data", 1) * ways
    check(
        rows % shards == 0,
        f"{what} has {rows} rows in a micro-batch, want a multiple of {shards}, the devices on data and expert of {mesh}",
    )
    check(experts % ways == 0, f"the model has {experts} experts, want a multiple of the {ways} devices on expert of {mesh}")
    check(ways % nodes == 0, f"--expert_nodes is {nodes}, want a divisor of {ways}, the devices on expert of {mesh}")
