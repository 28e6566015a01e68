"""Exchanges between the devices of a mesh, of tensors that each device holds as plain parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3.checks import check
from dsv3.parallel.mesh import AXES, axis_size, is_local, make_layout, on_device, pack


def all_to_all(parts: Sequence[tf.Tensor], mesh: dtensor.Mesh, axis: str) -> list[tf.Tensor]:
    """Sends row g of each device's part to device g of an axis; the result's row g came from device g.

    Args:
      parts: `[G, ...]` for each local device, G being the axis's size; the same shape on all devices.
      mesh: the devices. Groups of devices that differ in other axes exchange separately.
      axis: the axis.

    Returns:
      `[G, ...]` for each local device.
    """
    ways = axis_size(mesh, axis)
    shape = parts[0].shape
    check(shape.rank >= 1 and shape[0] == ways, f"all_to_all: a part has shape {shape}, want [{ways}, ...] for {axis!r}")
    if ways == 1:
        return list(parts)
    # Dim 0 takes part: between two other dims an all-to-all of DTensor (TensorFlow 2.21) permutes rows in most ranks.
    others, devices = [other for other in AXES if other != axis], mesh.local_devices()
    flat = []
    for device, part in zip(devices, parts, strict=True):
        with on_device(device):
            flat.append(tf.reshape(part, [1, ways, *([1] * (len(others) - 1)), -1]))
    sent = pack(flat, make_layout(mesh, [axis, None, *others]))
    received = dtensor.unpack(dtensor.relayout(sent, make_layout(mesh, [None, axis, *others])))
    found = []
    for device, part in zip(devices, received):
        with on_device(device):
            found.append(tf.reshape(part, shape))
    return found


def gather_parts(parts: Sequence[tf.Tensor], mesh: dtensor.Mesh) -> np.ndarray:
    """Returns every device's part, `[pipe, data, expert, ...]`, on the host of every process.

    Args:
      parts: a small tensor for each local device, of the same shape everywhere.
    """
    sizes = [axis_size(mesh, axis) for axis in AXES]
    if is_local(mesh):
        return np.stack([part.numpy() for part in parts]).reshape([*sizes, *parts[0].shape])
    rank = parts[0].shape.rank
    lead = [tf.reshape(part, [1, 1, 1, *part.shape]) for part in parts]
    sharded = pack(lead, make_layout(mesh, [*AXES, *([None] * rank)]))
    replicated = dtensor.relayout(sharded, dtensor.Layout.replicated(mesh, 3 + rank))
    return dtensor.unpack(replicated)[0].numpy()


@contextlib.contextmanager
def together(mesh: dtensor.Mesh | None, *kinds: type[Exception]) -> Iterator[None]:
    """A block at whose end the processes wait for each other, and which fails on all of them if it fails on one.

    The process that fails raises its own error, the others one of its kind with the client's number. When several fail, all
    raise the last of `kinds` among theirs.

    Args:
      mesh: the devices; on `None`, or where all of them are this process's, the block is run as it stands.
      kinds: the kinds of error that are shared.
    """
    if mesh is None or is_local(mesh):
        yield
        return
    error, code = None, 0
    try:
        yield
    except kinds as caught:
        error, code = caught, 1 + max(i for i, kind in enumerate(kinds) if isinstance(caught, kind))
    mine = tf.constant([code, dtensor.client_id()], tf.int32)
    found = gather_parts([mine] * len(mesh.local_devices()), mesh).reshape(-1, 2)
    worst, client = max(map(tuple, found.tolist()))
    if worst == code and error is not None:
        raise error
    if worst:
        raise kinds[worst - 1](f"client {client} has failed, and says why")
