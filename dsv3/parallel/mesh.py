"""Meshes of devices with the axes `pipe`, `data` and `expert`, and what a process holds of them.

Tokens are sharded over `data` and `expert`, experts over `expert`, stages of layers over `pipe`. DTensor carries the state
and the communication; what one device computes runs as a plain function on that device's parts of the DTensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3 import tree
from dsv3.checks import check
from dsv3.layout import MESH_AXES
from dsv3.typing import Tree

AXES = MESH_AXES


def parse_axes(text: str) -> dict[str, int]:
    """Returns the axes that a flag such as `"data:2,expert:4"` names, in the order of `AXES`.

    >>> parse_axes("expert:4,data:2")
    {'data': 2, 'expert': 4}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = part.partition(":")
        known = name in AXES and size.isdigit() and int(size) > 0
        check(known, f"parse_axes: {part!r} in {text!r}, want axis:size with axis one of {', '.join(AXES)} and size >= 1")
        check(name not in sizes, f"parse_axes: axis {name!r} stands twice in {text!r}")
        sizes[name] = int(size)
    check(bool(sizes), f"parse_axes: {text!r} names no axis, want e.g. data:2,expert:4")
    return {name: sizes[name] for name in AXES if name in sizes}


def start_devices(count: int) -> None:
    """Gives this process `count` devices: its GPUs, or as many virtual ones of its CPU. Call it before anything is computed.

    Raises:
      ValueError: fewer GPUs than that, or TensorFlow has already started with fewer devices.
    """
    check(count >= 1, f"start_devices: `count` is {count}, want >= 1")
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        check(len(gpus) >= count, f"start_devices: {count} devices are wanted, this machine has {len(gpus)} GPUs")
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or [None]) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as e:
        have = len(tf.config.list_logical_devices("CPU"))
        raise ValueError(
            f"start_devices: {count} devices are wanted, but TensorFlow has started with {have}: call it first of all"
        ) from e


def make_mesh(axes: str | Mapping[str, int]) -> dtensor.Mesh:
    """Returns a mesh over the devices of all processes, with all of `AXES`; those not named have size 1.

    Args:
      axes: `"data:2,expert:4"` or `{"data": 2, "expert": 4}`.

    Raises:
      ValueError: an unknown axis, or not as many devices as the axes' product.
    """
    text = axes if isinstance(axes, str) else ",".join(f"{name}:{size}" for name, size in axes.items())
    sizes = {name: 1 for name in AXES} | parse_axes(text)
    want = math.prod(sizes.values())
    kind = dtensor.preferred_device_type()
    clients = dtensor.num_clients()
    here = len(tf.config.list_logical_devices(kind)) if clients == 1 else dtensor.num_local_devices(kind)
    dims = list(sizes.items())
    if clients > 1:
        have = dtensor.num_global_devices(kind)
        check(want == have, f"make_mesh: {text!r} has {want} devices, the {clients} processes have {have}")
        return dtensor.create_distributed_mesh(dims, device_type=kind)
    check(
        want <= here,
        f"make_mesh: {text!r} has {want} devices, this process has {here}: call dsv3.start_devices({want}) first",
    )
    return dtensor.create_mesh(dims, devices=[f"{kind}:{i}" for i in range(want)])


def axis_size(mesh: dtensor.Mesh, axis: str) -> int:
    """Returns an axis's devices, 1 for an axis that the mesh does not have."""
    return mesh.dim_size(axis) if axis in mesh.dim_names else 1


def is_local(mesh: dtensor.Mesh) -> bool:
    """Whether all devices belong to this process."""
    return len(mesh.local_devices()) == mesh.size


def local_places(mesh: dtensor.Mesh) -> list[dict[str, int]]:
    """Returns the coordinates of each local device, with all of `AXES`."""
    return [{axis: 0 for axis in AXES} | dict(place) for place in mesh.local_device_locations()]


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """Computes on a mesh's device.

    A process's virtual CPU devices share its cores and its memory, so all of them compute as the first: otherwise each
    would compile everything for itself.
    """
    spec = tf.DeviceSpec.from_string(device)
    with tf.device((spec.replace(device_index=0) if spec.device_type == "CPU" else spec).to_string()):
        yield


def may_exchange(mesh: dtensor.Mesh, axis: str) -> bool:
    """Whether DTensor may shard a tensor over an axis on another dim, in one exchange.

    With more than ten devices it gives wrong rows, as it orders processes by number and TensorFlow's all-to-all by name, or
    fails, as that takes what goes from device 1 to 10 and from 11 to 0 for the same. Gathers and sums are right.
    """
    return axis_size(mesh, axis) <= 10


def make_layout(mesh: dtensor.Mesh, axes: Sequence[str | None]) -> dtensor.Layout:
    """Returns a layout with a mesh axis, or `None`, for each dim; axes that the mesh does not have shard nothing."""
    return dtensor.Layout([a if a in mesh.dim_names else dtensor.UNSHARDED for a in axes], mesh)


def pack(parts: Sequence[tf.Tensor], layout: dtensor.Layout) -> tf.Tensor:
    """Makes a DTensor of the local devices' parts."""
    placed = []
    for device, part in zip(layout.mesh.local_devices(), parts, strict=True):
        with tf.device(device):
            placed.append(tf.identity(part))
    return dtensor.pack(placed, layout)


def shard_box(
    shape: Sequence[int], layout: dtensor.Layout, where: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns where the part of a device begins, and its shape.

    Args:
      shape: of the whole tensor. layout: how it lies. where: the device's coordinates, by axis.
    """
    begin, size = [0] * len(shape), list(shape)
    for dim, axis in enumerate(layout.sharding_specs):
        if axis != dtensor.UNSHARDED:
            ways = layout.mesh.dim_size(axis)
            fits = size[dim] % ways == 0
            check(fits, f"shard_box: shape {tuple(shape)} is not divisible by the {ways} devices of {axis!r}")
            size[dim] //= ways
            begin[dim] = where[axis] * size[dim]
    return tuple(begin), tuple(size)


def place(value: tf.Tensor, layout: dtensor.Layout) -> tf.Tensor:
    """Makes a DTensor of a tensor that every process holds whole, without communication."""
    value = tf.convert_to_tensor(value)
    boxes = [shard_box(value.shape.as_list(), layout, where) for where in layout.mesh.local_device_locations()]
    return pack([tf.slice(value, *(tf.constant(part, tf.int32) for part in box)) for box in boxes], layout)


def unpack_tree(values: Tree) -> list[Tree]:
    """Returns the local devices' parts of a tree of DTensors, as one tree for each device."""
    parts = [dtensor.unpack(leaf) for leaf in tree.flatten(values)]
    return [tree.unflatten_as(values, list(leaves)) for leaves in zip(*parts)]


def layout_of(value: Any) -> dtensor.Layout | None:
    """Returns a DTensor's layout, `None` for anything else."""
    # `dtensor.is_dtensor` would start DTensor where it is not used.
    placed = isinstance(value, tf.Tensor) and tf.executing_eagerly() and "CUSTOM" in (value.device or "")
    return dtensor.fetch_layout(value) if placed else None


def whole(value: tf.Tensor) -> tf.Tensor:
    """Returns a DTensor's values as one tensor on the host; every process of the mesh must take part.

    A plain tensor, or a variable, is returned as it is.
    """
    layout = layout_of(value)
    if layout is None:
        return value
    if any(axis != dtensor.UNSHARDED for axis in layout.sharding_specs):
        value = dtensor.relayout(value, dtensor.Layout.replicated(layout.mesh, len(value.shape)))
    with tf.device("CPU:0"):
        return tf.identity(dtensor.unpack(value)[0])
