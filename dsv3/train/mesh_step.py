"""The training step on a mesh: the same function as on one device, with the state laid out and the batch sharded.

1. The parameters are gathered from how they are stored (DTensor) to how they are used: experts sharded over `expert`, the
   rest whole on every device.
2. Each device runs the pieces of the model on its rows of the batch; rows for other devices' experts go there and back.
3. Gradients are summed to the layout of the stored parameters, and the optimiser updates what each device stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.layout import expert_dim, mesh_of
from dsv3.nn.model import ModelParams, RouterState, cast_params, model_specs
from dsv3.ops.dispatch import dispatch_capacity
from dsv3.ops.router import router_update_bias
from dsv3.parallel.collectives import all_to_all, gather_parts
from dsv3.parallel.mesh import AXES, axis_size, local_places, make_layout, on_device, pack, unpack_tree
from dsv3.parallel.tape import Capacity, Gradients, Tape, Value, backward, drive
from dsv3.policy import ComputePolicy
from dsv3.train.loss import LossParts
from dsv3.train.optim import Optimizer, square_sum
from dsv3.train.pieces import StageBatch, StageLosses, model_forward, model_pieces
from dsv3.train.state import DispatchStats, TrainMetrics, TrainState
from dsv3.typing import Tree

SHARDS = ("data", "expert")
"""The axes that the batch is sharded over."""


class Rates(NamedTuple):
    """The step's scalars: MTP weight λ, balance weight α, router bias speed γ."""

    mtp: float
    balance: float
    bias: float


def make_mesh_update(
    cfg: ModelConfig, optimizer: Optimizer, layouts: Tree, policy: ComputePolicy, dispatch_dtype: tf.DType | None
) -> Callable[..., tuple[TrainState, TrainMetrics]]:
    """Returns `update(state, tokens, weights, rates) -> (state, TrainMetrics)` on the mesh of `layouts`.

    Args:
      cfg, optimizer, policy: as in `train_update`.
      layouts: how the parameters are stored.
      dispatch_dtype: see `model_pieces`.
    """
    mesh = mesh_of(layouts)
    check(axis_size(mesh, "pipe") == 1, "make_train_step: the mesh's axis 'pipe' has more than one device; want 1")
    ways, shards = axis_size(mesh, "expert"), [axis_size(mesh, axis) for axis in SHARDS]
    experts = cfg.moe.router.num_experts
    check(experts % ways == 0, f"make_train_step: {experts} experts are not divisible by the mesh's {ways} on 'expert'")
    specs = model_specs(cfg)
    pieces = model_pieces(cfg, policy, ways=ways, dispatch_dtype=dispatch_dtype)
    gather, reduce, apply = _gather(specs, mesh, policy), _reduce(layouts), _apply(optimizer, layouts, policy)

    def update(state: TrainState, tokens: np.ndarray, weights: np.ndarray, rates: Rates):
        rows, total_shards = tokens.shape[1], int(np.prod(shards))
        check(
            rows % total_shards == 0,
            f"train_step: `tokens` has {rows} rows, want a multiple of {total_shards}, the devices on data and expert",
        )
        params = unpack_tree(gather(state.params))
        bias = RouterState(*(_per_layer(leaf, mesh) for leaf in state.router))
        stats = _Counter(ways)
        total = np.maximum(np.float32(weights.sum(dtype=np.float64)), np.float32(1e-9))
        grads: Gradients = {}
        losses: list[StageLosses] = []
        for micro in range(tokens.shape[0]):
            batch = _shard_batch(tokens[micro], weights[micro], total, cfg, mesh)
            tape = Tape(tuple(mesh.local_devices()))
            answer = _answers(mesh, batch, stats)
            out = drive(model_forward(tape, pieces, params, bias, batch, cfg), answer)
            seeds = _seeds(out, rates, tokens.shape[0] * total_shards, tape.devices)
            drive(backward(tape, seeds, grads), answer)
            losses.append(out)
        parts = _loss_parts(losses, cfg, mesh)
        packed = _pack_gradients(grads, specs, mesh, params[0])
        counted = tokens.shape[0] * tokens.shape[1] * (tokens.shape[2] - 1)
        state, optim = apply(reduce(packed), state, parts.load, counted, rates.bias)
        loss = parts.nll + rates.balance * parts.balance
        if cfg.num_mtp_layers:
            loss += rates.mtp * tf.reduce_mean(parts.mtp)
        return state, TrainMetrics(loss, parts, optim, stats.result())

    update.traces = gather.experimental_get_tracing_count
    return update


class _Counter:
    """Counts what the exchanges of a step move."""

    def __init__(self, ways: int):
        self._ways, self._sent, self._rows, self._room = ways, 0, 0.0, 0

    def sent(self, part: tf.Tensor) -> None:
        size = int(np.prod(part.shape)) * part.dtype.size
        self._sent += size // self._ways * (self._ways - 1)

    def routed(self, rows: float, room: int) -> None:
        self._rows, self._room = self._rows + rows, self._room + room

    def result(self) -> DispatchStats:
        padding = 1.0 - self._rows / self._room if self._room else 0.0
        return DispatchStats(tf.constant(self._sent, tf.int64), tf.constant(padding, tf.float32))


def _answers(mesh: dtensor.Mesh, batch: StageBatch, stats: _Counter) -> Callable[[Any], Any]:
    tokens = int(np.prod(batch.tokens.parts[0].shape))

    def answer(request):
        if isinstance(request, Capacity):
            load = gather_parts(request.load.parts, mesh)
            capacity = dispatch_capacity(int(load.max()), tokens)
            stats.routed(float(load.sum()), capacity * load.size)
            return capacity
        stats.sent(request.value.parts[0])
        return Value(tuple(all_to_all(request.value.parts, mesh, "expert")))

    return answer


def _gather(specs: ModelParams, mesh: dtensor.Mesh, policy: ComputePolicy):
    """A function from the stored parameters to those that are used: stacks become tuples of layers."""

    @tf.function(autograph=False)
    def gather(params: ModelParams) -> ModelParams:
        params = cast_params(params, policy)
        used = {}
        for (path, leaf), spec in zip(tree.items(params), tree.flatten(specs)):
            dims = ["expert" if dim == expert_dim(spec) else None for dim in range(len(spec.shape))]
            if spec.axes[0] == "layer":
                leaf = dtensor.relayout(leaf, make_layout(mesh, dims))  # the dim to unstack must be whole
                used[path] = [dtensor.relayout(x, make_layout(mesh, dims[1:])) for x in tf.unstack(leaf)]
            else:
                used[path] = dtensor.relayout(leaf, make_layout(mesh, dims))

        def layers(name: str, stack: Tree) -> Tree:
            flat = [used[f"{name}.{path}"] for path, _ in tree.items(stack)]
            return tuple(tree.unflatten_as(stack, list(layer)) for layer in zip(*flat))

        stacks = {name: layers(name, getattr(params, name)) for name in ("dense", "moe", "mtp") if getattr(params, name)}
        rest = {name: used[name] for name in ("embed", "norm", "head") if name in used}
        return params._replace(**stacks, **rest)

    return gather


def _per_layer(leaf: tf.Tensor, mesh: dtensor.Mesh) -> list[Value]:
    """`[X, E]`, the same on all devices, as a `Value` for each layer."""
    parts = dtensor.unpack(leaf)
    layers = [tf.unstack(part) if part.shape[0] else [] for part in parts]
    return [Value(tuple(layer)) for layer in zip(*layers)]


def _shard_batch(tokens: np.ndarray, weights: np.ndarray, total: np.float32, cfg: ModelConfig, mesh) -> StageBatch:
    """Cuts `[B, T+1]` tokens into the local devices' rows."""
    inputs, targets, counted = tokens[:, :-1], [tokens[:, 1:]], [weights]
    ahead = [tokens[:, 1:]]
    for _ in range(cfg.num_mtp_layers):
        targets.append(_shift(targets[-1]))
        counted.append(_shift(counted[-1]))
        ahead.append(np.concatenate([ahead[-1][:, 1:], ahead[-1][:, -1:]], 1))
    devices, places = mesh.local_devices(), local_places(mesh)
    rows = tokens.shape[0] // (axis_size(mesh, "data") * axis_size(mesh, "expert"))

    def value(array: np.ndarray) -> Value:
        parts = []
        for device, where in zip(devices, places):
            start = (where["data"] * axis_size(mesh, "expert") + where["expert"]) * rows if array.ndim else 0
            with on_device(device):
                parts.append(tf.constant(array[start : start + rows] if array.ndim else array))
        return Value(tuple(parts))

    return StageBatch(
        value(inputs), [value(t) for t in targets], [value(w) for w in counted],
        [value(t) for t in ahead[: cfg.num_mtp_layers]], value(np.asarray(total)),
    )  # fmt: skip


def _shift(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], 1)


def _seeds(out: StageLosses, rates: Rates, parts: int, devices: Sequence[str]) -> dict[Value, list]:
    """The gradients of the total loss with respect to its parts; each device's balance is that of a part of the batch."""

    def scalars(value: float) -> list[tf.Tensor]:
        return [tf.constant(value, tf.float32)] * len(devices)

    seeds = {out.main: scalars(1.0)}
    seeds |= {loss: scalars(rates.mtp / len(out.mtp)) for loss in out.mtp}
    return seeds | {loss: scalars(rates.balance / parts) for loss in out.balance}


def _loss_parts(losses: list[StageLosses], cfg: ModelConfig, mesh: dtensor.Mesh) -> LossParts:
    """Sums the devices' and micro-batches' losses and loads, in one exchange."""
    count = len(mesh.local_devices())
    rows, layers = [], len(losses[0].load)
    for i in range(count):
        scalars = [tf.add_n([v.parts[i] for v in values]) for values in zip(*(_scalars(out) for out in losses))]
        loads = [tf.add_n([v.parts[i] for v in values]) for values in zip(*(out.load for out in losses))]
        rows.append(tf.concat([tf.stack(scalars), *loads], 0))
    found = gather_parts(rows, mesh).astype(np.float64)
    shards = found.size // found.shape[-1]
    found = found.reshape(shards, -1).sum(0)
    modules = cfg.num_mtp_layers
    nll, mtp = found[0], found[1 : 1 + modules]
    balance = found[1 + modules : 1 + modules + layers].sum() / (shards * len(losses))
    load = found[1 + modules + layers :].reshape(layers, -1).astype(np.float32)
    moe, of_mtp = load[: cfg.num_moe_layers], load[cfg.num_moe_layers :]
    experts = cfg.moe.router.num_experts
    loads = RouterState(tf.constant(moe.reshape(-1, experts)), tf.constant(of_mtp.reshape(-1, experts)))
    return LossParts(tf.constant(nll, tf.float32), tf.constant(mtp, tf.float32), tf.constant(balance, tf.float32), loads)


def _scalars(out: StageLosses) -> list[Value]:
    return [out.main, *out.mtp, *out.balance]


def _pack_gradients(grads: Gradients, specs: ModelParams, mesh: dtensor.Mesh, used: Tree) -> dict[str, tf.Tensor]:
    """The devices' sums as DTensors with a leading dim for each axis that they are still to be summed over."""
    packed = {}
    for path, leaf in tree.items(used):
        parts = grads.get(path) or [tf.zeros(leaf.shape)] * len(mesh.local_devices())
        sharded = _sharded_dim(path, specs)
        lead = [axis for axis in AXES if axis != "expert" or sharded is None]
        dims = ["expert" if dim == sharded else None for dim in range(leaf.shape.rank)]
        parts = [tf.reshape(part, [*([1] * len(lead)), *part.shape]) for part in parts]
        packed[path] = pack(parts, make_layout(mesh, [*lead, *dims]))
    return packed


def _sharded_dim(path: str, specs: ModelParams) -> int | None:
    """The dim of a parameter, as the devices use it, that is sharded over `expert`."""
    layer, _, rest = path.partition(".")
    number, _, rest = rest.partition(".")
    if not number.isdigit():
        return None
    dim = expert_dim(tree.subtree(getattr(specs, layer), rest))
    return None if dim is None else dim - 1


def _reduce(layouts: Tree):
    """A function that sums packed gradients over devices, to the layouts of the stored parameters."""
    mesh = mesh_of(layouts)

    @tf.function(autograph=False)
    def reduce(packed: dict) -> Tree:
        return tree.map_with_path(lambda path, layout: dtensor.relayout(total(packed, path, layout), layout), layouts)

    def total(packed: dict, path: str, layout: dtensor.Layout) -> tf.Tensor:
        rank = len(layout.sharding_specs)
        if path in packed:
            return _sum_lead(packed[path], rank)
        name, _, rest = path.partition(".")
        count = sum(key.startswith(f"{name}.") and key.split(".", 2)[2] == rest for key in packed)
        layers = [_sum_lead(packed[f"{name}.{i}.{rest}"], rank - 1) for i in range(count)]
        inner = layout.sharding_specs[1:]
        layers = [dtensor.relayout(x, dtensor.Layout(inner, mesh)) for x in layers]
        # Else the stack would be given the layout that it gets next, which it cannot have where layers are sharded.
        return dtensor.relayout(tf.stack(layers), dtensor.Layout([dtensor.UNSHARDED, *inner], mesh))

    return reduce


def _sum_lead(x: tf.Tensor, rank: int) -> tf.Tensor:
    return tf.reduce_sum(x, list(range(len(x.shape) - rank)))


def _apply(optimizer: Optimizer, layouts: Tree, policy: ComputePolicy):
    """A function that updates each device's part of the state."""
    mesh = mesh_of(layouts)
    # A leaf that several devices hold alike counts once in the norm.
    shares = [1.0 / (mesh.size // _shards(layout)) for layout in tree.flatten(layouts)]

    @tf.function(autograph=False, jit_compile=policy.jit)
    def squares(grads: Tree) -> tf.Tensor:
        return tf.add_n([square_sum(g, fuse=policy.fuse) * share for g, share in zip(tree.flatten(grads), shares)])

    @tf.function(autograph=False, jit_compile=policy.jit)
    def update(grads, state: TrainState, load: RouterState, counted, rate, norm):
        seen = tf.cast(state.tokens, tf.float32)
        params, opt, stats = optimizer.update(grads, state.opt, state.params, seen, norm)
        router = RouterState(
            *(router_update_bias(b, n, rate=rate) if b.shape[0] else b for b, n in zip(state.router, load))
        )
        return TrainState(state.step + 1, state.tokens + counted, params, router, opt), stats

    def call(grads: Tree, state: TrainState, load: RouterState, counted: int, rate: float):
        placed = state_layouts(state, layouts)
        grads, states, devices = unpack_tree(grads), unpack_tree(state), mesh.local_devices()
        norm = tf.constant(np.sqrt(gather_parts([squares(g) for g in grads], mesh).sum()), tf.float32)
        given = (load, tf.constant(counted, tf.int64), tf.constant(rate, tf.float32), norm)
        new = []
        for i, device in enumerate(devices):
            with on_device(device):
                part, stats = update(grads[i], states[i], *given)
            new.append(tree.flatten(part))
        leaves = [pack(parts, layout) for parts, layout in zip(zip(*new), tree.flatten(placed))]
        return tree.unflatten_as(state, leaves), stats

    return call


def _shards(layout: dtensor.Layout) -> int:
    return int(np.prod([layout.mesh.dim_size(a) for a in layout.sharding_specs if a != dtensor.UNSHARDED]))


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
            if layout is not None and parts[0] in ("params", "opt") and len(layout.sharding_specs) == len(leaf.shape):
                return layout
        return dtensor.Layout.replicated(mesh, len(leaf.shape))

    return tree.map_with_path(one, state)
