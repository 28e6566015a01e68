"""The training step on a mesh: the same function as on one device, with the state laid out and the batch sharded.

1. The parameters are gathered from how they are stored (DTensor) to how they are used: layers on their pipeline rank,
   experts sharded over `expert`, the rest whole on every device.
2. Each pipeline rank carries out its row of the schedule's table on its rows of the batch; rows for other devices' experts
   go there and back.
3. Gradients are summed to the layout of the stored parameters, and the optimiser updates what each device stores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.layout import mesh_of
from dsv3.nn.fp8 import MIN_GRADIENT
from dsv3.nn.model import RouterState, model_specs, next_ahead
from dsv3.ops.dispatch import dispatch_capacity
from dsv3.ops.fp8_tiles import MIN_AMAX
from dsv3.ops.fp8_wire import fp8_pack, fp8_unpack
from dsv3.ops.segments import SegmentInputs, segment_count, segment_inputs
from dsv3.parallel.collectives import Mail, all_to_all, gather_mesh, gather_parts
from dsv3.parallel.groups import Group, mesh_groups
from dsv3.parallel.mesh import axis_size, local_places, on_device
from dsv3.parallel.tape import Capacity, Exchange, Value
from dsv3.pipeline import Schedule, schedule_check
from dsv3.policy import ComputePolicy
from dsv3.recipe import sends_fp8
from dsv3.train.executor import Rank, RankResult, Seeds, run_schedule
from dsv3.train.loss import LossParts, mtp_targets
from dsv3.train.mesh_params import (
    check_layouts,
    check_placed,
    make_apply,
    make_gather,
    make_reduce,
    pack_gradients,
)
from dsv3.train.optim import Optimizer
from dsv3.train.pieces import StageBatch, model_pieces
from dsv3.train.stages import StageCut, cut_stages
from dsv3.train.state import Limits, MeshStats, TrainMetrics, TrainState, check_ema
from dsv3.typing import Tree

SHARDS = ("data", "expert")
"""The axes that the batch is sharded over."""


MakeTable = Callable[[int, int], Schedule]
"""From pipeline ranks and micro-batches to a table: one of `dsv3.pipeline`'s generators."""


class Rates(NamedTuple):
    """The step's scalars: MTP weight λ, balance weight α, router bias speed γ."""

    mtp: float
    balance: float
    bias: float


class MeshPlan(NamedTuple):
    """How a step runs on a mesh.

    Attributes:
      schedule: see `MakeTable`.
      stage_layers: layers of each stage, or `None` for an even cut.
      dispatch_dtype, nodes: see `model_pieces`.
      ema_decay: see `train_update`.
    """

    schedule: MakeTable
    stage_layers: Sequence[int] | None
    dispatch_dtype: tf.DType | None
    nodes: int
    ema_decay: float | None = None


def make_mesh_update(
    cfg: ModelConfig, optimizer: Optimizer, layouts: Tree, policy: ComputePolicy, plan: MeshPlan
) -> Callable[..., tuple[TrainState, TrainMetrics]]:
    """Returns `update(state, tokens, weights, segments, rates, limits) -> (state, TrainMetrics)` on the mesh of `layouts`;
    all batches are `[A, B, ...]`, `segments` perhaps `None`.

    Args:
      cfg, optimizer, policy: as in `train_update`.
      layouts: how the parameters are stored.
      plan: see `MeshPlan`.
    """
    mesh, specs = mesh_of(layouts), model_specs(cfg)
    ways, ranks = axis_size(mesh, "expert"), axis_size(mesh, "pipe")
    experts = cfg.moe.router.num_experts
    check_layouts(specs, layouts)
    mixtures = cfg.num_moe_layers + cfg.num_mtp_layers
    check(
        experts % ways == 0 or not mixtures,
        f"make_train_step: {experts} experts are not divisible by the mesh's {ways} devices on 'expert'",
    )
    check(
        plan.nodes >= 1 and ways % plan.nodes == 0,
        f"make_train_step: `expert_nodes` is {plan.nodes}, want a divisor of {ways}, the mesh's devices on 'expert'",
    )
    pieces = model_pieces(cfg, policy, ways=ways, nodes=plan.nodes, dispatch_dtype=plan.dispatch_dtype)
    apply = make_apply(optimizer, layouts, policy, ema_decay=plan.ema_decay)
    shards = int(np.prod([axis_size(mesh, axis) for axis in SHARDS]))
    programs: dict[tuple, tuple] = {}

    def programs_for(schedule: Schedule, cut: StageCut) -> tuple:
        """Gather and reduce depend on where layers are, not on the number of micro-batches."""
        if schedule.placement not in programs:
            rows = [cut.rows(cfg, schedule, d) for d in range(schedule.copies)]
            programs[schedule.placement] = (
                rows, make_gather(specs, layouts, rows, policy), make_reduce(specs, layouts, rows),
            )  # fmt: skip
        return programs[schedule.placement]

    def update(
        state: TrainState, tokens: np.ndarray, weights: np.ndarray, segments: np.ndarray | None, rates: Rates, limits: Limits
    ):
        micro, rows = tokens.shape[:2]
        check(
            rows % shards == 0,
            f"train_step: `tokens` has {rows} rows, want a multiple of {shards}, the devices on data and expert",
        )
        check_placed(state, layouts)
        check_ema("train_step", state, plan.ema_decay)
        check(not state.amax, "train_step: `state.amax` is filled, want a state without: a mesh has no delayed scales")
        schedule = _checked(plan.schedule(ranks, micro), ranks, micro)
        cut = cut_stages(cfg, schedule.stages, plan.stage_layers)
        stack_rows, gather, reduce = programs_for(schedule, cut)
        stats = [_Counter() for _ in range(ranks)]
        batch = _Batch(tokens, weights, segments, cfg, mesh)
        exchange = functools.partial(_exchange, policy)
        made = _make_ranks(gather(state.params), state.router, batch, mesh, plan.nodes, stats, exchange)
        spec = tf.TensorSpec([rows // shards, tokens.shape[2] - 1, cfg.hidden_size], policy.compute_dtype or tf.float32)
        found = run_schedule(
            schedule, cut, pieces, made, Mail(mesh, spec),
            Seeds(1.0, rates.mtp / max(cfg.num_mtp_layers, 1), rates.balance / (micro * shards)), cfg,
        )  # fmt: skip
        parts = _loss_parts(found, cfg, mesh, micro * shards)
        mesh_stats = _mesh_stats(stats, found, mesh)
        grads = pack_gradients(_by_device([r.grads for r in found], mesh), specs, layouts, stack_rows)
        del found  # with the parameters that were used and the devices' sums
        counted = micro * rows * (tokens.shape[2] - 1)
        loss = parts.nll + rates.balance * parts.balance
        if cfg.num_mtp_layers:
            loss += rates.mtp * tf.reduce_mean(parts.mtp)
        done = apply(reduce(grads), state, loss, limits, parts.load, counted, rates.bias)
        return done.state, TrainMetrics(loss, parts, done.optim, done.taken, done.grad_squares, mesh_stats)

    update.traces = lambda: sum(len(piece.programs) for piece in pieces.made)
    return update


def _checked(schedule: Schedule, ranks: int, micro: int) -> Schedule:
    """Returns a table that fits the step; a faulty one would drop micro-batches or wait for ever."""
    check(
        (schedule.ranks, schedule.micro_batches) == (ranks, micro),
        f"train_step: `schedule` made a table of {schedule.ranks} ranks and {schedule.micro_batches} micro-batches, "
        f"want {ranks} and {micro}",
    )
    schedule_check(schedule)
    stages = [[stage for _, stage in schedule.rank_stages(rank)] for rank in range(ranks)]
    check(
        all(len(set(held)) == len(held) for held in stages),
        f"train_step: `schedule` made a table in which a rank has a stage in both directions: {stages}, want each once",
    )
    return schedule


class _Counter:
    """Counts what a rank's exchanges move: bytes that a device sends, to other nodes too; rows, and room for rows; tokens of
    mixtures, and the nodes that they go to."""

    def __init__(self):
        self.values = dict.fromkeys(("bytes", "node_bytes", "rows", "room", "tokens", "nodes"), 0)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] += int(value)


def _mesh_stats(stats: Sequence[_Counter], found: Sequence[RankResult], mesh: dtensor.Mesh) -> MeshStats:
    """Every process learns what all ranks have counted."""
    mine = [[*stats[place["pipe"]].values.values(), found[place["pipe"]].held] for place in local_places(mesh)]
    ranks = gather_mesh([tf.constant(row, tf.int64) for row in mine], mesh)[:, 0, 0]
    total = dict(zip(stats[0].values, ranks[:, :-1].sum(0)))
    sent = ranks[ranks[:, 0].argmax()]
    padding = 1.0 - total["rows"] / total["room"] if total["room"] else 0.0
    nodes = total["nodes"] / total["tokens"] if total["tokens"] else 1.0
    floats = (tf.constant(padding, tf.float32), tf.constant(nodes, tf.float32))
    return MeshStats(tf.constant(sent[0]), tf.constant(sent[1]), *floats, tf.constant(ranks[:, -1], tf.int32))


def _make_ranks(
    params, router: RouterState, batch: _Batch, mesh: dtensor.Mesh, nodes: int, stats: Sequence[_Counter],
    exchange: Callable[..., tuple[Value, int]],
) -> list[Rank | None]:  # fmt: skip
    """The pipeline's ranks: their local devices, with parameters and biases; `None` for ranks without any."""
    places, devices = local_places(mesh), mesh.local_devices()
    biases = [dtensor.unpack(leaf) for leaf in router]
    ranks = []
    for number, counter in enumerate(stats):
        here = [i for i, place in enumerate(places) if place["pipe"] == number]
        if not here:
            ranks.append(None)
            continue

        def values(parts: Sequence[tf.Tensor], here: Sequence[int] = here) -> list[Value]:
            layers = [tf.unstack(parts[i]) if parts[i].shape[0] else [] for i in here]
            return [Value(tuple(layer)) for layer in zip(*layers)]

        answer = _answers(mesh, number, nodes, batch.tokens_a_device, counter, exchange)
        ranks.append(
            Rank(
                tuple(devices[i] for i in here), [[trees[i] for i in here] for trees in params],
                RouterState(*map(values, biases)), batch.on(here), answer,
            )  # fmt: skip
        )
    return ranks


def _answers(
    mesh: dtensor.Mesh, pipe: int, nodes: int, tokens: int, stats: _Counter, exchange: Callable[..., tuple[Value, int]]
) -> Callable[[Any], Any]:
    """Answers the requests of a rank's programs by exchanges among its devices."""
    axes = {axis: mesh_groups(mesh, (axis,), pipe=pipe, nodes=nodes) for axis in ("expert", "node")}
    (everyone,) = mesh_groups(mesh, ("data", "node", "expert"), pipe=pipe, nodes=nodes)
    grid = [axis_size(mesh, "data"), nodes, axis_size(mesh, "expert") // nodes]

    def capacities(request: Capacity):
        load = gather_parts(request.load.parts, everyone)
        stats.add(rows=load.sum(), tokens=tokens * len(load))
        if request.to_nodes is None:
            capacity = dispatch_capacity(int(load.max()), tokens)
            stats.add(room=capacity * load.size, nodes=tokens * len(load))
            return capacity
        to_nodes = gather_parts(request.to_nodes.parts, everyone)
        first = dispatch_capacity(int(to_nodes.max()), tokens)
        forwarded = load.reshape([*grid, -1]).sum(1)  # of each forwarder: one place of every node
        second = dispatch_capacity(int(forwarded.max()), tokens * nodes)
        stats.add(rows=to_nodes.sum(), nodes=to_nodes.sum(), room=first * to_nodes.size + second * forwarded.size)
        return first, second

    def answer(request):
        if isinstance(request, Capacity):
            return capacities(request)
        value, moved = exchange(request, axes[request.over])
        stats.add(bytes=moved, node_bytes=moved if request.over == "node" else 0)
        return value

    return answer


def _exchange(policy: ComputePolicy, request: Exchange, groups: Sequence[Group]) -> tuple[Value, int]:
    """Makes an exchange; returns its result and the bytes that a device has sent to others."""
    parts, ways = request.value.parts, len(groups[0].devices)
    like = parts[0]
    compact = request.compact and sends_fp8(policy.fp8)
    if compact:
        fmt = {"fmt": policy.fp8.backward if request.backward else policy.fp8.forward, "fuse": policy.fuse}
        floor = MIN_GRADIENT if request.backward else MIN_AMAX
        parts = _each(lambda part: fp8_pack(part, min_amax=floor, **fmt), parts)
    moved = int(np.prod(parts[0].shape)) * parts[0].dtype.size // ways * (ways - 1)
    found = all_to_all(parts, groups)
    if compact:
        found = _each(lambda part: fp8_unpack(part, like.shape[-1], dtype=like.dtype, **fmt), found)
    return Value(tuple(found)), moved


def _each(fn: Callable[[tf.Tensor], tf.Tensor], parts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """A function of each device's part, on its device."""
    found = []
    for part in parts:
        with on_device(part.device):
            found.append(fn(part))
    return found


class _Batch:
    """The micro-batches of a step, cut into the rows of each device."""

    def __init__(
        self, tokens: np.ndarray, weights: np.ndarray, segments: np.ndarray | None, cfg: ModelConfig, mesh: dtensor.Mesh
    ):
        self._mesh, self._places, self._modules = mesh, local_places(mesh), cfg.num_mtp_layers
        self._packed = None if segments is None else [SegmentInputs(*map(np.asarray, segment_inputs(s))) for s in segments]
        if self._packed is not None:
            weights = weights * np.stack([packed.inside for packed in self._packed])
            self._documents = sum(float(segment_count(packed.inside)) for packed in self._packed)
        self._total = np.maximum(np.float32(weights.sum(dtype=np.float64)), np.float32(1e-9))
        self._tokens, self._weights = tokens, weights
        self._rows = tokens.shape[1] // (axis_size(mesh, "data") * axis_size(mesh, "expert"))
        self.tokens_a_device = self._rows * (tokens.shape[2] - 1)

    def on(self, here: Sequence[int]) -> Callable[[int], StageBatch]:
        """Returns the function that gives a micro-batch on some of the local devices."""
        return lambda micro: self._micro_batch(micro, here)

    def _micro_batch(self, micro: int, here: Sequence[int]) -> StageBatch:
        tokens, weights = self._tokens[micro], self._weights[micro]
        packed = None if self._packed is None else self._packed[micro]
        ahead = [tokens[:, 1:]]
        told = [(tokens[:, 1:], weights), *mtp_targets(tokens[:, 1:], weights, packed, self._modules)]
        for _ in range(1, self._modules):
            ahead.append(next_ahead(ahead[-1], None if packed is None else packed.inside))

        def values(arrays: Iterable[Any]) -> list[Value]:
            return [self._value(np.asarray(array), here) for array in arrays]

        where = () if packed is None else values((*packed, self._shares(packed)))
        return StageBatch(
            self._value(tokens[:, :-1], here), *map(values, zip(*told)), values(ahead[: self._modules]),
            self._value(np.asarray(self._total), here), where,
        )  # fmt: skip

    def _shares(self, packed: SegmentInputs) -> np.ndarray:
        """What a device multiplies the mean over its documents by, so that the mean over devices and micro-batches is that
        of all documents: `[B]`, the same for all rows of a device."""
        cuts = packed.inside.reshape(-1, self._rows, packed.inside.shape[1])
        documents = np.array([float(segment_count(cut)) for cut in cuts], np.float32)
        shares = documents * np.float32(len(self._packed) * len(cuts) / max(self._documents, 1.0))
        return np.repeat(shares, self._rows)

    def _value(self, array: np.ndarray, here: Sequence[int]) -> Value:
        parts, devices, ways = [], self._mesh.local_devices(), axis_size(self._mesh, "expert")
        for i in here:
            start = (self._places[i]["data"] * ways + self._places[i]["expert"]) * self._rows
            with on_device(devices[i]):
                parts.append(tf.constant(array[start : start + self._rows] if array.ndim else array))
        return Value(tuple(parts))


def _by_device(of_ranks: Sequence[dict], mesh: dtensor.Mesh) -> list[dict]:
    """From a dict of lists by device for each pipeline rank to a dict for each local device."""
    counts, found = [0] * len(of_ranks), []
    for place in local_places(mesh):
        rank = place["pipe"]
        found.append({key: parts[counts[rank]] for key, parts in of_ranks[rank].items()})
        counts[rank] += 1
    return found


def _loss_parts(found: Sequence[RankResult], cfg: ModelConfig, mesh: dtensor.Mesh, shards: int) -> LossParts:
    """Sums the devices' losses and loads, in one exchange."""
    modules, layers = cfg.num_mtp_layers, cfg.num_moe_layers + cfg.num_mtp_layers
    experts = cfg.moe.router.num_experts
    rows = []
    for sums in _by_device([r.sums for r in found], mesh):
        row = [sums.get(("main", 0), 0.0), *(sums.get(("mtp", k), 0.0) for k in range(modules))]
        row += [sums.get(("balance", layer), 0.0) for layer in range(layers)]
        loads = [sums.get(("load", layer), np.zeros(experts, np.float32)) for layer in range(layers)]
        rows.append(tf.concat([tf.stack(row), *loads], 0))
    total = gather_mesh(rows, mesh).astype(np.float64).reshape(mesh.size, -1).sum(0)
    balance = total[1 + modules : 1 + modules + layers].sum() / shards
    load = total[1 + modules + layers :].reshape(layers, experts).astype(np.float32)
    loads = RouterState(tf.constant(load[: cfg.num_moe_layers]), tf.constant(load[cfg.num_moe_layers :]))
    nll, mtp = tf.constant(total[0], tf.float32), tf.constant(total[1 : 1 + modules], tf.float32)
    return LossParts(nll, mtp, tf.constant(balance, tf.float32), loads)
