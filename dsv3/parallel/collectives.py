"""Exchanges between the devices of a mesh, of tensors that each device holds as plain parts.

Within a process parts are copied. Groups over several processes use TensorFlow's collective operations with keys of their
own: DTensor numbers the groups of a part of a mesh alike in all processes, so that different ones would meet.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3.checks import check
from dsv3.parallel.groups import Group, mesh_groups
from dsv3.parallel.mesh import AXES, axis_size, is_local, on_device


def all_to_all(parts: Sequence[tf.Tensor], groups: Sequence[Group]) -> list[tf.Tensor]:
    """Sends row g of each device's part to device g of its group; the result's row g came from device g.

    Args:
      parts: `[G, ...]` for each local device, G being the size of the groups; the same shape on all devices.
      groups: from `mesh_groups`.

    Returns:
      `[G, ...]` for each local device.
    """
    shape, ways = parts[0].shape, len(groups[0].devices)
    fits = shape.rank >= 1 and shape[0] == ways
    check(fits, f"all_to_all: a part has shape {shape}, want [{ways}, ...] for groups of {ways}")
    found = list(parts)
    apart = tuple(group for group in groups if not group.local)
    for group in groups if ways > 1 else ():
        if group.local:
            rows = [tf.unstack(parts[member.part]) for member in group.here]
            for member in group.here:
                with on_device(member.device):
                    found[member.part] = tf.stack([row[member.place] for row in rows])
    if apart:
        members = [member for group in apart for member in group.here]
        sent = [parts[member.part] for member in members]
        for member, part in zip(members, _collective("all_to_all", apart, shape, sent[0].dtype)(*sent)):
            found[member.part] = part
    return found


def gather_parts(parts: Sequence[tf.Tensor], group: Group) -> np.ndarray:
    """Returns the part of every device of a group, `[devices, ...]`, on the host of every process.

    Args:
      parts: a small tensor for each local device, of the same shape everywhere.
      group: from `mesh_groups`.
    """
    if group.local:
        return np.stack([parts[member.part].numpy() for member in group.here])
    parts = [tf.cast(parts[member.part], tf.int32 if parts[0].dtype == tf.bool else parts[0].dtype) for member in group.here]
    sent = [tf.expand_dims(part, 0) for part in parts]
    return _collective("gather", (group,), sent[0].shape, sent[0].dtype)(*sent)[0].numpy()


def gather_mesh(parts: Sequence[tf.Tensor], mesh: dtensor.Mesh) -> np.ndarray:
    """Returns every device's part, `[pipe, data, expert, ...]`, on the host of every process.

    Args:
      parts: as of `gather_parts`.
      mesh: the devices.
    """
    (group,) = mesh_groups(mesh, ("pipe", "data", "node", "expert"))
    found = gather_parts(parts, group)
    return found.reshape([*(axis_size(mesh, axis) for axis in AXES), *found.shape[1:]])


@functools.cache
def _collective(kind: str, groups: tuple[Group, ...], shape: tf.TensorShape, dtype: tf.DType):
    """A program of all local devices' operations, which wait for each other, as they do for those of other processes.

    So it must not run one after the other, as a `tf.function` runs operations with a state.
    """

    def run(*parts):
        found = []
        for group in groups:
            key = collective_key(kind, group.devices, shape, dtype)
            for member in group.here:
                with tf.device(member.device):
                    part = tf.identity(parts[len(found)])
                    given = {"input": part, "group_size": len(group.devices), "group_key": key, "instance_key": 1}
                    op = tf.raw_ops.CollectiveGatherV2 if kind == "gather" else tf.raw_ops.CollectiveAllToAllV2
                    found.append(op(**given, ordering_token=[]))
        return found

    count = sum(len(group.here) for group in groups)
    return tf.compat.v1.wrap_function(run, [tf.TensorSpec(shape, dtype)] * count)


def collective_key(*identity: object) -> int:
    """Returns the number under which TensorFlow's runtime knows a group: the same in every process, far from DTensor's."""
    return zlib.crc32(repr(identity).encode()) & 0x3FFFFFFF | 0x40000000


class Mail:
    """Brings tensors from the devices of one pipeline rank to those of another, also of other processes.

    A part goes from a device to the one at the same place of the other rank. Sending does not wait for the receiver.
    Between processes a part goes from host to host.

    Args:
      mesh: the devices.
      spec: shape and dtype of all parts.
    """

    def __init__(self, mesh: dtensor.Mesh, spec: tf.TensorSpec):
        self._spec, self._ranks = spec, [
            {place.place: place for place in group.here}
            for pipe in range(axis_size(mesh, "pipe"))
            for group in mesh_groups(mesh, ("data", "node", "expert"), pipe=pipe) or [Group((), ())]
        ]
        each = len(mesh.local_devices())
        self._clients = np.asarray(mesh.global_device_ids()).reshape(axis_size(mesh, "pipe"), -1) // each
        self._arrived: dict[tuple[int, int], dict[int, tf.Tensor]] = {}
        self._sending: list[concurrent.futures.Future] = []

    def send(self, parts: Sequence[tf.Tensor], source: int, target: int, tag: int) -> None:
        """Sends the local devices' parts from rank `source` to rank `target`; `tag` is unique among what is under way."""
        for member in self._ranks[source].values():
            part, to = parts[member.part], self._ranks[target].get(member.place)
            if to is None:
                self._sending.append(_in_thread(self._post, part, source, target, tag, member.place))
                continue
            with on_device(to.device):
                self._arrived.setdefault((target, tag), {})[member.place] = tf.identity(part)

    def receive(self, source: int, target: int, tag: int) -> list[tf.Tensor]:
        """Returns, for each local device of rank `target`, what rank `source` has sent; waits for it."""
        near, found = self._arrived.pop((target, tag), {}), []
        for member in self._ranks[target].values():
            if member.place in near:
                found.append(near[member.place])
                continue
            given = self._keys(source, target, tag, member.place)
            with tf.device("CPU:0"):
                part = tf.raw_ops.CollectiveBcastRecvV2(shape=self._spec.shape, T=self._spec.dtype, **given)
            with on_device(member.device):
                found.append(tf.identity(part))
        return found

    def finish(self) -> None:
        """Waits until all that was sent has been received."""
        while self._sending:
            self._sending.pop().result()

    def _post(self, part: tf.Tensor, *where: int) -> None:
        with tf.device("CPU:0"):
            tf.raw_ops.CollectiveBcastSendV2(input=tf.identity(part), **self._keys(*where))

    def _keys(self, source: int, target: int, tag: int, place: int) -> dict[str, int]:
        clients = (int(self._clients[source, place]), int(self._clients[target, place]))
        key = collective_key("mail", *clients, source, target, place, self._spec.shape, self._spec.dtype)
        return {"group_size": 2, "group_key": key, "instance_key": tag}


def _in_thread(fn, *args) -> concurrent.futures.Future:
    """Runs a function in a thread of its own: one that waited for another would keep what it has to send for ever."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(fn(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


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
    found = gather_mesh([mine] * len(mesh.local_devices()), mesh).reshape(-1, 2)
    worst, client = max(map(tuple, found.tolist()))
    if worst == code and error is not None:
        raise error
    if worst:
        raise kinds[worst - 1](f"client {client} has failed, and says why")
