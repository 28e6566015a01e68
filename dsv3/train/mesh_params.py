"""A training state on a mesh: from how parameters are stored to how they are used, and back for gradients.

Stored, a leaf is sharded over any axes, whatever the pipeline's schedule. Used, a device has the layers of its pipeline
rank, with its part of their experts and all of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3 import tree
from dsv3.checks import check, check_same_tree
from dsv3.layout import expert_dim, mesh_of
from dsv3.nn.model import ModelParams, RouterState, cast_params
from dsv3.parallel.collectives import gather_mesh
from dsv3.parallel.mesh import AXES, layout_of, local_places, make_layout, may_exchange, on_device, pack, unpack_tree
from dsv3.parallel.tape import Gradients
from dsv3.policy import ComputePolicy
from dsv3.spec import ParamSpec
from dsv3.train.optim import Optimizer, OptimStats, square_sums
from dsv3.train.stages import StackRows
from dsv3.train.state import Limits, Taken, TrainState, advance_state, within_limits
from dsv3.typing import Tree

STACKS = ("dense", "moe")
Rows = Sequence[dict[str, StackRows]]
"""For each direction of a schedule, the layers of each stack on each pipeline rank."""


def make_gather(
    specs: ModelParams, layouts: Tree, rows: Rows, policy: ComputePolicy
) -> Callable[[ModelParams], list[list[Tree]]]:
    """Returns `gather(params)`, the trees that the local devices use: for each direction, one for each device.

    Their `dense` and `moe` are dicts from a layer's index to its tree, with the layers of the device's pipeline rank; their
    `mtp` is a tuple. Leaves are in the compute dtype.

    Args:
      specs, layouts: of the parameters, as they are stored.
      rows: the layers of each rank.
      policy: for the compute dtype.
    """
    mesh = mesh_of(layouts)

    @tf.function(autograph=False)
    def relayout(params: ModelParams) -> tuple[dict, list[dict]]:
        params = cast_params(params, policy)
        rest, stacks = {}, [{} for _ in rows]
        for (path, leaf), spec, layout in zip(tree.items(params), tree.flatten(specs), tree.flatten(layouts)):
            dims = ["expert" if dim == expert_dim(spec) else None for dim in range(len(spec.shape))]
            name = path.split(".")[0]
            # First what leaves its dim is gathered, as an exchange between two dims permutes rows in DTensor unless one of
            # them is the first. Only `pipe` stays: rows change places within a device, then ranks exchange them.
            pipe = "pipe" if name in STACKS and layout.sharding_specs[0] != "pipe" else None
            stays = [at if at in (use, pipe) else None for at, use in zip(layout.sharding_specs, dims)]
            leaf = dtensor.relayout(leaf, make_layout(mesh, stays))
            if name not in STACKS:
                rest[path] = dtensor.relayout(leaf, make_layout(mesh, dims))
                continue
            for direction, found in enumerate(rows):
                if found[name].room:
                    taken = leaf
                    if not _is_identity(found[name], spec.shape[0]):  # laid out at once, or it would get the next layout
                        taken = dtensor.relayout(tf.gather(leaf, found[name].flat), make_layout(mesh, stays))
                    moved = ["pipe", *(None if axis == "pipe" else axis for axis in stays[1:])]
                    taken = _relayout(taken, mesh, stays, moved)  # one exchange, then slices
                    stacks[direction][path] = dtensor.relayout(taken, make_layout(mesh, ["pipe", *dims[1:]]))
        return rest, stacks

    def gather(params: ModelParams) -> list[list[Tree]]:
        rest, stacks = relayout(params)
        rest, places = unpack_tree(rest), local_places(mesh)
        found = []
        for direction, stack in zip(rows, map(unpack_tree, stacks)):
            trees = []
            for i, (leaves, place) in enumerate(zip(rest, places)):
                layers = stack[i] if stack else {}
                trees.append(_used_tree(specs, leaves, layers, {n: direction[n].ranks[place["pipe"]] for n in STACKS}))
            found.append(trees)
        return found

    return gather


def _is_identity(rows: StackRows, layers: int) -> bool:
    return rows.flat == list(range(layers))


def _used_tree(specs: ModelParams, rest: dict, stacks: dict, layers: dict[str, Sequence[int]]) -> ModelParams:
    """One device's tree, from its parts of the leaves by path."""

    def stack(name: str) -> dict[int, Tree]:
        spec = getattr(specs, name)
        parts = [tf.unstack(stacks[f"{name}.{path}"]) for path, _ in tree.items(spec)] if layers[name] else []
        return {layer: tree.unflatten_as(spec, [leaf[i] for leaf in parts]) for i, layer in enumerate(layers[name])}

    modules = tree.leading_size(specs.mtp)
    flat = [tf.unstack(rest[f"mtp.{path}"]) for path, _ in tree.items(specs.mtp)] if specs.mtp else []
    mtp = tuple(tree.unflatten_as(specs.mtp, [leaf[k] for leaf in flat]) for k in range(modules))
    single = {name: rest[name] for name in ("embed", "norm", "head") if name in rest}
    return specs._replace(dense=stack("dense"), moe=stack("moe"), mtp=mtp, **single)


def pack_gradients(grads: Sequence[Gradients], specs: ModelParams, layouts: Tree, rows: Rows) -> list[dict[str, tf.Tensor]]:
    """Makes DTensors of the devices' sums, with a leading dim for each axis that they are still to be summed over.

    Args:
      grads: of each local device.
      specs, layouts: of the parameters, as they are stored.
      rows: the layers of each rank.

    Returns:
      For each direction a dict by the path of a leaf; stacks have the rows of the ranks, what is outside of them is in the
      first dict.
    """
    mesh = mesh_of(layouts)
    places, devices, packed = local_places(mesh), mesh.local_devices(), [{} for _ in rows]
    for path, spec in tree.items(specs):
        name, _, inner = path.partition(".")
        sharded = expert_dim(spec)
        shape = [n // mesh.dim_size("expert") if d == sharded else n for d, n in enumerate(spec.shape)]
        for direction in range(len(rows) if name in STACKS else 1):
            if name in STACKS:
                found = rows[direction][name]
                keys = [[f"{name}.{layer}.{inner}" for layer in found.ranks[place["pipe"]]] for place in places]
                taken = zip(devices, grads, keys)
                parts = [_on(device, _stack, g, key, shape[1:], found.room) for device, g, key in taken]
            elif name == "mtp":
                keys = [f"mtp.{k}.{inner}" for k in range(shape[0])]
                parts = [_on(device, _stack, g, keys, shape[1:], shape[0]) for device, g in zip(devices, grads)]
            else:
                parts = [g[path] if path in g else tf.zeros(shape) for g in grads]
            if parts[0].shape[0] == 0:
                continue
            lead = _lead_axes(name, spec)
            dims = ["expert" if dim == sharded else None for dim in range(len(shape))]
            dims = ["pipe", *dims[1:]] if name in STACKS else dims
            ones = [1] * len(lead)
            parts = [_on(device, tf.reshape, part, [*ones, *part.shape]) for device, part in zip(devices, parts)]
            packed[direction][path] = pack(parts, make_layout(mesh, [*lead, *dims]))
    return packed


def _on(device: str, fn: Callable[..., tf.Tensor], *args: Any) -> tf.Tensor:
    with on_device(device):
        return fn(*args)


def _stack(grads: dict[str, tf.Tensor], paths: Sequence[str], shape: Sequence[int], room: int) -> tf.Tensor:
    """A device's gradients of some layers, with zeros in rows that have none."""
    leaves = [grads[path] if path in grads else tf.zeros(shape) for path in paths]
    leaves += [tf.zeros(shape)] * (room - len(leaves))
    return tf.stack(leaves) if leaves else tf.zeros([0, *shape])


def make_reduce(specs: ModelParams, layouts: Tree, rows: Rows) -> Callable[[list[dict]], Tree]:
    """Returns `reduce(packed)`, which sums packed gradients over devices, to the layouts of the stored parameters."""
    mesh = mesh_of(layouts)

    def layout_but_rows(layout: dtensor.Layout) -> dtensor.Layout:
        return dtensor.Layout([dtensor.UNSHARDED, *layout.sharding_specs[1:]], mesh)

    @tf.function(autograph=False)
    def reduce(packed: list[dict]) -> Tree:
        def total(path: str, spec, layout: dtensor.Layout) -> tf.Tensor:
            name = path.split(".")[0]
            lead = _lead_axes(name, spec)
            if name not in STACKS:
                return dtensor.relayout(_sum_lead(packed[0][path], lead, spec, layout)[0], layout)
            sums, layers = [], spec.shape[0]
            for found, group in zip(rows, packed):
                if path not in group:
                    continue
                x, lies = _sum_lead(group[path], lead, spec, layout, first="pipe")
                x = _relayout(x, mesh, lies, layout_but_rows(layout).sharding_specs)
                if not _is_identity(found[name], layers):
                    x = dtensor.relayout(tf.gather(x, found[name].places(layers)), layout_but_rows(layout))
                sums.append(x)
            return dtensor.relayout(tf.add_n(sums), layout)

        return tree.map_with_path(total, specs, layouts)

    return reduce


def _lead_axes(name: str, spec: ParamSpec) -> list[str]:
    """The axes that a leaf's gradients are summed over: those on which devices use the same values of it."""
    axes = AXES if name not in STACKS else ("data", "expert")
    return [axis for axis in axes if axis != "expert" or expert_dim(spec) is None]


def _sum_lead(
    x: tf.Tensor, lead: Sequence[str], spec: ParamSpec, layout: dtensor.Layout, first: str | None = None
) -> tuple[tf.Tensor, list[str | None]]:
    """Sums over the leading dims, of which each is sharded over its axis; `first` is the axis of the leaf's own first dim.

    Returns the sum and the mesh axis of each of its dims. Where the result is sharded over the axis, parts are exchanged
    before they are added: a reduce-scatter. (DTensor's own would be an all-reduce and a slice on a CPU.)
    """
    mesh, stored = layout.mesh, list(layout.sharding_specs)
    own = ["expert" if dim == expert_dim(spec) else None for dim in range(len(stored))]
    own[0] = first or own[0]
    for i, axis in enumerate(lead):
        if axis in stored and own[stored.index(axis)] is None and may_exchange(mesh, axis):
            own[stored.index(axis)] = axis
            x = dtensor.relayout(x, make_layout(mesh, [None, *lead[i + 1 :], *own]))
        x = dtensor.relayout(tf.reduce_sum(x, 0), make_layout(mesh, [*lead[i + 1 :], *own]))
    # What was sharded by use and is stored on another dim is gathered first (see `make_gather`).
    stays = [axis if axis == at or (dim == 0 and axis == first) else None for dim, (axis, at) in enumerate(zip(own, stored))]
    return dtensor.relayout(x, make_layout(mesh, stays)), stays


def _relayout(x: tf.Tensor, mesh: dtensor.Mesh, now: Sequence[str | None], then: Sequence[str | None]) -> tf.Tensor:
    """Lays out anew; what may not be exchanged from one dim to another is gathered first (see `may_exchange`)."""
    fixed = {axis for axis, to in zip(now, then) if axis == to}
    kept = [axis if axis in fixed or axis not in then or may_exchange(mesh, axis) else None for axis in now]
    if kept != list(now):
        x = dtensor.relayout(x, make_layout(mesh, kept))
    return dtensor.relayout(x, make_layout(mesh, then))


class Applied(NamedTuple):
    """What `make_apply`'s function returns: see `TrainMetrics`."""

    state: TrainState
    optim: OptimStats
    taken: tf.Tensor
    grad_squares: tf.Tensor


def make_apply(optimizer: Optimizer, layouts: Tree, policy: ComputePolicy, *, ema_decay: float | None = None):
    """Returns `apply(grads, state, loss, limits, load, counted, rate) -> Applied`: each device updates its part of a state.

    Args:
      optimizer: see `Optimizer`.
      layouts: how the parameters, and their gradients, are stored.
      policy: how to compute.
      ema_decay: see `advance_state`.
    """
    mesh = mesh_of(layouts)
    shares = leaf_shares(layouts)

    @tf.function(autograph=False, jit_compile=policy.jit)
    def squares(grads: Tree) -> tf.Tensor:
        return square_sums(grads, fuse=policy.fuse) * shares

    @tf.function(autograph=False, jit_compile=policy.jit)
    def update(state: TrainState, grads: Tree, taken: Taken):
        return advance_state(state, grads, taken, optimizer, ema_decay=ema_decay, fuse=policy.fuse)

    def call(
        grads: Tree, state: TrainState, loss: tf.Tensor, limits: Limits, load: RouterState, counted: int, rate: float
    ) -> Applied:
        placed = state_layouts(state, layouts)
        grads, states, devices = unpack_tree(grads), unpack_tree(state), mesh.local_devices()
        sums = gather_mesh([_on(device, squares, g) for device, g in zip(devices, grads)], mesh)
        sums = sums.reshape(mesh.size, -1).sum(0)
        norm = tf.constant(np.sqrt(sums.sum()), tf.float32)
        take = within_limits(loss, norm, Limits(*(tf.cast(x, tf.float32) for x in limits)))
        given = Taken(norm, take, load, tf.constant(counted, tf.int64), tf.constant(rate, tf.float32))
        new = []
        for i, device in enumerate(devices):
            with on_device(device):
                part, stats = update(states[i], grads[i], given)
            new.append(tree.flatten(part))
        leaves = [pack(parts, layout) for parts, layout in zip(zip(*new), tree.flatten(placed))]
        return Applied(tree.unflatten_as(state, leaves), stats, take, tf.constant(sums, tf.float32))

    return call


def leaf_shares(layouts: Tree) -> np.ndarray:
    """Returns for each leaf one over the number of devices that hold the same part of it, so that in a sum over devices it
    counts once; `[leaves]` float32."""
    size = mesh_of(layouts).size
    return np.array([_shards(layout) / size for layout in tree.flatten(layouts)], np.float32)


def _shards(layout: dtensor.Layout) -> int:
    return int(np.prod([layout.mesh.dim_size(a) for a in layout.sharding_specs if a != dtensor.UNSHARDED]))


def check_layouts(specs: ModelParams, layouts: Tree) -> None:
    """Raises `ValueError` unless layouts mirror the parameters and the mesh is one that a step runs on."""
    mesh = mesh_of(layouts)
    names = list(mesh.dim_names)
    check(
        names == [axis for axis in AXES if axis in names],
        f"make_train_step: the mesh has the axes {names}, want some of {', '.join(AXES)}, in this order (see make_mesh)",
    )
    want = tree.to_dict(specs)
    check_same_tree("make_train_step", "layouts", tree.to_dict(layouts), want)
    for path, layout in tree.items(layouts):
        shape, axes = want[path].shape, layout.sharding_specs
        sizes = [1 if axis == dtensor.UNSHARDED else mesh.dim_size(axis) for axis in axes]
        check(
            len(axes) == len(shape) and not any(n % ways for n, ways in zip(shape, sizes)),
            f"make_train_step: `layouts` has {axes} for `{path}` of shape {shape}, which it does not divide",
        )


def check_placed(state: TrainState, layouts: Tree) -> None:
    """Raises `ValueError` unless a state lies on the mesh as `layouts` say."""
    for (path, leaf), layout in zip(tree.items(state), tree.flatten(state_layouts(state, layouts))):
        found = layout_of(leaf)
        check(
            found is not None and found == layout,
            f"train_step: `state.{path}` lies as {found.sharding_specs if found else 'one tensor'}, "
            f"want {layout.sharding_specs} as in the step's layouts: use place_state(state, layouts)",
        )


def state_layouts(state: TrainState, layouts: Tree) -> TrainState:
    """Returns a tree of layouts that mirrors a state: what mirrors a parameter is laid out as it, the rest is replicated.

    Args:
      state: tensors or specs.
      layouts: how the parameters are stored.
    """
    mesh, of_params = mesh_of(layouts), tree.to_dict(layouts)

    def one(path: str, leaf: Any) -> dtensor.Layout:
        parts = path.split(".")
        for start in range(1, len(parts)):
            layout = of_params.get(".".join(parts[start:]))
            if layout is not None and parts[0] in ("params", "opt", "ema") and len(layout.sharding_specs) == len(leaf.shape):
                return layout
        return dtensor.Layout.replicated(mesh, len(leaf.shape))

    return tree.map_with_path(one, state)
