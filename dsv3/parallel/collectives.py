"""Exchanges between the devices of a mesh, of tensors that each device holds as plain parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3.checks import check
from dsv3.parallel.mesh import AXES, axis_size, is_local, make_layout, pack


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
    shape, dtype = parts[0].shape, parts[0].dtype
    check(shape.rank >= 1 and shape[0] == ways, f"all_to_all: a part has shape {shape}, want [{ways}, ...] for {axis!r}")
    if ways == 1:
        return list(parts)
    # The exchanged dims come first: with a sharded dim before them DTensor (TensorFlow 2.21) permutes the rows.
    others = [other for other in AXES if other != axis]
    flat = [tf.reshape(part, [1, ways, *([1] * (len(others) - 1)), -1]) for part in parts]
    sent = pack(flat, make_layout(mesh, [axis, None, *others]))
    received = dtensor.relayout(sent, make_layout(mesh, [None, axis, *others]))
    return [tf.ensure_shape(tf.cast(tf.reshape(part, shape), dtype), shape) for part in dtensor.unpack(received)]


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
