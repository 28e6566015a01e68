"""Groups of a mesh's devices that exchange among themselves, some of which may belong to other processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tensorflow.experimental import dtensor

from dsv3.checks import check
from dsv3.parallel.mesh import AXES, axis_size

GRID = ("pipe", "data", "node", "expert")
"""The axes of `device_grid`: the mesh's axis `expert` is cut into nodes of neighbouring devices."""


class Member(NamedTuple):
    """A device of this process in a group: its `place` there, the index `part` of what it holds, and its name."""

    place: int
    part: int
    device: str


class Group(NamedTuple):
    """Devices in the order in which they exchange: their numbers in the mesh, their processes, and those of this process."""

    devices: tuple[int, ...]
    clients: tuple[int, ...]
    here: tuple[Member, ...]

    @property
    def local(self) -> bool:
        """Whether all of them are this process's."""
        return len(self.here) == len(self.devices)


def device_grid(mesh: dtensor.Mesh, nodes: int = 1) -> np.ndarray:
    """Returns the devices' numbers, `[pipe, data, node, expert]`.

    Args:
      mesh: the devices.
      nodes: into how many the axis `expert` is cut; the grid's last axis is the place within a node.
    """
    sizes = [axis_size(mesh, axis) for axis in AXES]
    ways = sizes[-1]
    fits = nodes >= 1 and ways % nodes == 0
    check(fits, f"device_grid: `nodes` is {nodes}, want a divisor of {ways}, the size of the axis 'expert'")
    return np.asarray(mesh.global_device_ids()).reshape([*sizes[:-1], nodes, ways // nodes])


def mesh_groups(
    mesh: dtensor.Mesh, axes: Sequence[str], *, pipe: int | None = None, nodes: int = 1
) -> tuple[Group, ...]:
    """Returns the groups of devices that differ in some axes only, as far as this process takes part in them.

    Args:
      mesh: the devices.
      axes: of `GRID`, in its order. With one node, `expert` is the mesh's axis.
      pipe: a pipeline rank, to consider only its devices; parts are then counted among its local ones.
      nodes: see `device_grid`.
    """
    known = list(axes) == [axis for axis in GRID if axis in axes]
    check(known, f"mesh_groups: `axes` are {list(axes)}, want some of {', '.join(GRID)}, in this order")
    grid = device_grid(mesh, nodes)
    grid = grid if pipe is None else grid[pipe : pipe + 1]
    held = [(number, name) for number, name in zip(mesh.local_device_ids(), mesh.local_devices()) if (grid == number).any()]
    part_of = {number: (part, name) for part, (number, name) in enumerate(held)}
    inner = [GRID.index(axis) for axis in axes]
    order = [i for i in range(len(GRID)) if i not in inner] + inner
    found, each = [], len(mesh.local_devices())
    for devices in grid.transpose(order).reshape([-1, int(np.prod([grid.shape[i] for i in inner]))]).tolist():
        here = tuple(Member(place, *part_of[n]) for place, n in enumerate(devices) if n in part_of)
        if here:
            found.append(Group(tuple(devices), tuple(n // each for n in devices), here))
    return tuple(found)
