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
from tensorflow.python.eager import context
from tensorflow.python.framework import errors

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
    for group in groups if ways > 1 else ():
        if group.local:
            rows = [tf.unstack(parts[member.part]) for member in group.here]
            for member in group.here:
                with on_device(member.device):
                    found[member.part] = tf.stack([row[member.place] for row in rows])
    apart = tuple(group for group in groups if not group.local)
    if apart:
        for group, received in zip(apart, _run("all_to_all", apart, [_to_processes(parts, group) for group in apart])):
            for i, member in enumerate(group.here):
                found[member.part] = _by_device(received[:, :, i], group)
    return found


def gather_parts(parts: Sequence[tf.Tensor], group: Group) -> np.ndarray:
    """Returns the part of every device of a group, `[devices, ...]`, on the host of every process.

    Args:
      parts: a small tensor for each local device, of the same shape everywhere; int32, int64, float32 or float64.
      group: from `mesh_groups`.
    """
    mine = [parts[member.part] for member in group.here]
    if group.local:
        return np.stack([part.numpy() for part in mine])
    mine += [mine[0]] * (_most(group) - len(mine))
    (received,) = _run("gather", (group,), [tf.expand_dims(tf.stack(mine), 0)])
    return _by_device(received, group).numpy()


# Between processes a group's devices exchange through one of them in each process: TensorFlow's all-to-all names what goes
# from device 1 to 10 and from 11 to 0 alike, so that a process may not have both.


def _most(group: Group) -> int:
    """The most devices that a process has in the group."""
    return max(map(group.clients.count, group.clients))


def _places(group: Group) -> list[list[int]]:
    """The places of each process's devices, the processes in the order of TensorFlow's ranks."""
    return [[place for place, owner in enumerate(group.clients) if owner == client] for client in _rank_order(group)]


def _to_processes(parts: Sequence[tf.Tensor], group: Group) -> tf.Tensor:
    """`[processes, i, j, ...]`: what device i of this process has for device j of another; filled up to `_most`."""
    most, shape = _most(group), parts[0].shape[1:]
    index = [place for places in _places(group) for place in (*places, *places[:1] * (most - len(places)))]
    rows = [tf.reshape(tf.gather(parts[member.part], index), [-1, most, *shape]) for member in group.here]
    return tf.stack(rows + rows[:1] * (most - len(rows)), 1)


def _by_device(received: tf.Tensor, group: Group) -> tf.Tensor:
    """`[processes, i, ...]`, by rank, to `[devices, ...]`."""
    most = _most(group)
    rows = {place: rank * most + i for rank, places in enumerate(_places(group)) for i, place in enumerate(places)}
    flat = tf.reshape(received, [-1, *received.shape[2:]])
    return tf.gather(flat, [rows[place] for place in range(len(group.devices))])


@functools.cache
def _rank_order(group: Group) -> list[int]:
    """Returns a group's processes by their ranks: TensorFlow goes by the tasks' names, `10` before `2`.

    It asks the group itself, so all of its processes have to come here at the same time.
    """
    mine = tf.constant([group.clients[group.here[0].place]])
    return _run("gather", (group,), [mine])[0].numpy().tolist()


def _run(kind: str, groups: tuple[Group, ...], sent: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return _collective(kind, groups, tuple(tf.TensorSpec(part.shape, part.dtype) for part in sent))(*sent)


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
def _collective(kind: str, groups: tuple[Group, ...], specs: tuple[tf.TensorSpec, ...]):
    """A program of the operations of all groups, which wait for each other, as they do for those of other processes.

    So it must not run one after the other, as a `tf.function` runs operations with a state.
    """
    op = {"gather": tf.raw_ops.CollectiveGatherV2, "all_to_all": tf.raw_ops.CollectiveAllToAllV2}[kind]

    def run(*sent):
        found = []
        for group, part in zip(groups, sent):
            instance = collective_key(kind, part.shape, part.dtype)  # another shape under the same key would be an error
            given = {"group_size": len(set(group.clients)), "group_key": collective_key(group.devices)}
            with tf.device(group.here[0].device):
                found.append(op(input=tf.identity(part), instance_key=instance, ordering_token=[], **given))
        return found

    return tf.compat.v1.wrap_function(run, list(specs))


def collective_key(*identity: object) -> int:
    """Returns a number for a group, or for what it exchanges: the same in every process, far from DTensor's."""
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
            for group in mesh_groups(mesh, ("data", "node", "expert"), pipe=pipe) or [Group((), (), ())]
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
        """Returns, for each local device of rank `target`, what rank `source` has sent; waits for it.

        Raises:
          Exception: what an earlier sending has failed with.
        """
        for sent in [sent for sent in self._sending if sent.done()]:
            self._sending.remove(sent)
            sent.result()
        near, found = self._arrived.pop((target, tag), {}), []
        for member in self._ranks[target].values():
            if member.place in near:
                found.append(near[member.place])
                continue
            given = self._keys(source, target, tag, member.place)
            with tf.device("CPU:0"):
                part = tf.raw_ops.CollectiveBcastRecvV2(shape=self._spec.shape, T=_wire_dtype(self._spec.dtype), **given)
                part = tf.bitcast(part, self._spec.dtype)
            with on_device(member.device):
                found.append(tf.identity(part))
        return found

    def finish(self) -> None:
        """Waits until all that was sent has been received."""
        while self._sending:
            self._sending.pop().result()

    def _post(self, part: tf.Tensor, *where: int) -> None:
        with tf.device("CPU:0"):
            part = tf.bitcast(tf.identity(part), _wire_dtype(self._spec.dtype))
            tf.raw_ops.CollectiveBcastSendV2(input=part, **self._keys(*where))

    def _keys(self, source: int, target: int, tag: int, place: int) -> dict[str, int]:
        clients = (int(self._clients[source, place]), int(self._clients[target, place]))
        key = collective_key("mail", *clients, source, target, place, self._spec.shape, self._spec.dtype)
        return {"group_size": 2, "group_key": key, "instance_key": tag}


def _wire_dtype(dtype: tf.DType) -> tf.DType:
    """A dtype of the same width that TensorFlow's sending operation takes, which does not take bfloat16."""
    return tf.float16 if dtype == tf.bfloat16 else dtype


def _in_thread(fn, *args) -> concurrent.futures.Future:
    """Runs a function in a thread of its own: one that waited for another would keep what it has to send for ever."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(fn(*args))
        except BaseException as error:
            future.set_exception(error)
            # Whoever waits here for something that depends on it would wait for ever.
            context.context().abort_collective_ops(errors.INTERNAL, f"sending to another process has failed: {error}")

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
