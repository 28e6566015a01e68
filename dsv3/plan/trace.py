"""The training step traced: the programs of one device of each pipeline rank, from shapes alone.

What drives the trace is the step's own code: `stage_forward` and `backward` walk every stage of the plan's cut on a tape
whose pieces are stand-ins. A stand-in traces the real piece's three programs (`parallel.vjp`) once for each signature,
counts their matrix products and gives placeholders of the right shapes. So which pieces run, how often, which parameters
they read, which get a gradient and what is kept for the backward pass is read off the step, and no number is computed.

The routed experts' load is data. It is taken as balanced: every expert gets tokens·K/E tokens of each device, every node
its share of those that `Plan.routing` sends there; capacities are rounded from it as in the step.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.layout import expert_dim
from dsv3.nn.model import RouterState, cast_params
from dsv3.ops.dispatch import dispatch_capacity
from dsv3.parallel.tape import Capacity, Exchange, Piece, Tape, Value, backward
from dsv3.parallel.vjp import SplitVjp
from dsv3.pipeline import SCHEDULES as TABLES
from dsv3.pipeline import Schedule
from dsv3.plan.graph_flops import graph_flops
from dsv3.plan.mesh import Plan, check_plan, plan_stages
from dsv3.plan.traffic import parts_reached
from dsv3.policy import ACCELERATOR, ComputePolicy
from dsv3.spec import ParamSpec
from dsv3.train.pieces import ModelPieces, StageBatch, StageOutput, model_pieces, stage_forward
from dsv3.train.stages import cut_stages
from dsv3.typing import Tree

DEVICE = "/device:CPU:0"  # where the placeholders would be


class Products(NamedTuple):
    """FLOPs of matrix products: of a forward pass, and of a backward pass for inputs and for weights."""

    forward: int = 0
    inputs: int = 0
    weights: int = 0

    def plus(self, other: Products) -> Products:
        """Adds pass by pass."""
        return Products(*(a + b for a, b in zip(self, other)))

    def times(self, factor: int) -> Products:
        """Multiplies each."""
        return Products(*(factor * a for a in self))


class PieceTrace(NamedTuple):
    """One piece at the plan's shapes: `flops` of one call, and the bytes that one keeps for its backward pass, `kept`.

    A tensor that several pieces keep is counted for the first. `gathered` is the part of `kept` that are weights, laid out
    anew for each block of rows.
    """

    flops: Products
    kept: int
    gathered: int


class StageTrace(NamedTuple):
    """One stage: `calls` of each piece for a micro-batch, `params` (a device's scalars by path), bytes `kept` by piece."""

    calls: dict[str, int]
    params: dict[str, int]
    kept: dict[str, int]


class StepTrace(NamedTuple):
    """A traced step.

    Attributes:
      pieces: by name: fields of `train.pieces.ModelPieces` and `train.expert_pieces.ExpertPieces`.
      stages: the stages, in order.
      ranks: for each pipeline rank its `Products` in a step, on one device.
      capacity: rows of an expert's buffer for each sender, 0 where experts are not shared out. first: rows of a node's
        buffer, 0 with one node.
      policy: how the traced step computes.
    """

    pieces: dict[str, PieceTrace]
    stages: tuple[StageTrace, ...]
    ranks: tuple[Products, ...]
    capacity: int
    first: int
    policy: ComputePolicy

    def rank_params(self, plan: Plan, rank: int) -> dict[str, int]:
        """Returns the parameters of a device of a `rank` of `plan`, scalars by path."""
        found: dict[str, int] = {}
        for stage, ranks in _holders(plan).items():
            if rank in ranks:
                found |= self.stages[stage].params
        return found


def trace_policy(plan: Plan) -> ComputePolicy:
    """Returns how an accelerator computes the step of `plan`: in bfloat16, compiled, recomputing blocks if the plan does.

    The step has no FP8 products, and it recomputes either whole pieces (`"block"`) or nothing: for `"paper"` it keeps what
    the plan computes again.
    """
    return ACCELERATOR.replace(
        dtype="bfloat16", loss_chunk=plan.loss_chunk, remat="block" if plan.recompute == "block" else "none"
    )


def plan_nodes(plan: Plan) -> int:
    """Returns into how many nodes the expert axis of `plan` is cut."""
    return plan.expert // plan.experts_in_node


def trace_step(cfg: ModelConfig, specs: Tree, plan: Plan, policy: ComputePolicy | None = None) -> StepTrace:
    """Traces the training step of a plan, without a device and without memory for what it would compute.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: a possible plan.
      policy: how to compute; default: `trace_policy`.

    Returns:
      `StepTrace`.

    Raises:
      ValueError: an impossible plan, a policy that recomputes other things than the plan's, or a piece whose products cannot
        be counted from shapes (see `graph_flops`).
    """
    check_plan(cfg, plan)
    policy, want = policy or trace_policy(plan), trace_policy(plan).remat
    check(policy.remat == want, f"trace_step: `policy` has remat={policy.remat!r}, want {want!r} for {plan.recompute!r}")
    if not plan.mtp and cfg.num_mtp_layers:
        cfg, specs = cfg.replace(num_nextn_predict_layers=0), specs._replace(mtp=())
    ways = plan.expert if cfg.num_moe_layers or cfg.num_mtp_layers else 1
    recorder = _Recorder(cfg, plan, model_pieces(cfg, policy, ways=ways, nodes=plan_nodes(plan) if ways > 1 else 1))
    params = _device_params(specs, plan, policy)
    counts = [stage.dense + stage.moe for stage in plan_stages(cfg, plan)]
    cut = cut_stages(cfg, len(counts), counts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting sparse IndexedSlices")  # it warns of memory that nothing takes here
        stages = tuple(
            recorder.stage(params, cut.layers(s), first=s == 0, last=s == len(counts) - 1, policy=policy)
            for s in range(len(counts))
        )
    ranks = tuple(_rank_products(plan, rank, recorder.pieces, stages) for rank in range(plan.pipe))
    return StepTrace(recorder.pieces, stages, ranks, *recorder.capacities, policy)


def _device_params(specs: Tree, plan: Plan, policy: ComputePolicy) -> Tree:
    """One device's parameters, as `mesh_params.make_gather` makes them: shapes and dtypes only, of all layers."""

    def leaf(spec: ParamSpec) -> tf.Tensor:
        sharded = expert_dim(spec)
        return _placeholder(
            tf.TensorSpec([n // plan.expert if d == sharded else n for d, n in enumerate(spec.shape)], tf.float32)
        )

    def layers(stack: Tree) -> dict[int, Tree]:
        one = tree.map_leaves(lambda s: tf.TensorSpec(s.shape[1:], s.dtype), stack)
        return dict.fromkeys(range(tree.leading_size(stack)), one)

    with _graph().as_default():
        found = tree.map_leaves(lambda p: tf.TensorSpec(p.shape, p.dtype), cast_params(tree.map_leaves(leaf, specs), policy))
    return found._replace(dense=layers(found.dense), moe=layers(found.moe), mtp=tuple(layers(found.mtp).values()))


@functools.lru_cache(maxsize=16)
def _table(plan: Plan) -> Schedule:
    return TABLES[plan.schedule](plan.pipe, plan.micro_batches)


def _holders(plan: Plan) -> dict[int, set[int]]:
    """The pipeline ranks that hold each stage."""
    found: dict[int, set[int]] = {}
    for ranks in _table(plan).placement:
        for stage, rank in enumerate(ranks):
            found.setdefault(stage, set()).add(rank)
    return found


def _rank_products(plan: Plan, rank: int, pieces: dict[str, PieceTrace], stages: Sequence[StageTrace]) -> Products:
    """The products of all tasks of a rank's row in the schedule's table."""
    tasks = collections.Counter((task.stage, task.kind) for slot in _table(plan).rows[rank] for task in slot)
    total = Products()
    for (stage, kind), times in tasks.items():
        calls = stages[stage].calls.items()
        each = sum_products(pieces[name].flops.times(count) for name, count in calls)
        runs = {"F": (1, 0, 0), "B": (0, 1, 1), "I": (0, 1, 0), "W": (0, 0, 1)}[kind]
        total = total.plus(Products(*(times * run * flops for run, flops in zip(runs, each))))
    return total


def sum_products(items) -> Products:
    """Returns the sum of `Products`."""
    total = Products()
    for item in items:
        total = total.plus(item)
    return total


class _Programs(NamedTuple):
    """The stand-in of one piece at one signature. Results are templates: an input's index, or a tensor's name and spec."""

    name: str
    vjp: SplitVjp
    flops: Products
    outputs: list
    residuals: list
    d_inputs: list
    messages: list
    d_params: list


class _StandIn(NamedTuple):
    """What the tape takes for a piece."""

    piece: Piece
    recorder: _Recorder

    def split(self, params: Tree, inputs: Sequence[tf.Tensor]) -> SplitVjp:
        found = self.recorder.programs(self.piece, params, inputs)
        log = self.recorder.log

        def forward(params, inputs):
            log.append((found.name, "forward"))
            made: dict[str, tf.Tensor] = {}
            return _fresh(found.outputs, inputs, made), _fresh(found.residuals, inputs, made)

        def backward(params, inputs, residuals, d_outputs):
            log.append((found.name, "inputs"))
            return _fresh(found.d_inputs, (), {}), _fresh(found.messages, (), {})

        def weights(params, inputs, residuals, messages):
            log.append((found.name, "weights"))
            return _fresh(found.d_params, (), {})

        return found.vjp._replace(forward=forward, backward=backward, weights=weights)


@dataclasses.dataclass(eq=False)
class _Tape(Tape):
    """A tape whose pieces are stand-ins."""

    recorder: Any = None

    def call(self, piece: Piece, where: Mapping[str, str], params: Sequence[Tree], *inputs: Value) -> Tree:
        return super().call(_StandIn(piece, self.recorder), where, params, *inputs)


def _graph() -> tf.Graph:
    """A graph as of a function: in a plain `tf.Graph` tensors compare by identity, as in TensorFlow 1."""
    return tf.__internal__.FuncGraph("trace")


def _placeholder(x: tf.Tensor | tf.TensorSpec) -> tf.Tensor:
    return tf.compat.v1.placeholder(x.dtype, x.shape)


def _template(values: Sequence[tf.Tensor | None], inputs: Sequence[tf.Tensor] = ()) -> list:
    places = {x.name: i for i, x in enumerate(inputs)}
    return [None if v is None else places.get(v.name, (v.name, tf.TensorSpec(v.shape, v.dtype))) for v in values]


def _fresh(template: Sequence[Any], inputs: Sequence[tf.Tensor], made: dict[str, tf.Tensor]) -> list[tf.Tensor | None]:
    """Placeholders for a program's results: what was the same tensor in the program is the same one here."""
    found = []
    for item in template:
        if item is None or isinstance(item, int):
            found.append(None if item is None else inputs[item])
            continue
        name, spec = item
        if name not in made:
            made[name] = _placeholder(spec)
        found.append(made[name])
    return found


class _Recorder:
    """Traces pieces, and drives the step's code through one stage at a time."""

    def __init__(self, cfg: ModelConfig, plan: Plan, pieces: ModelPieces):
        self._cfg, self._plan, self._pieces = cfg, plan, pieces
        self._names = {id(piece): name for name, piece in pieces._asdict().items() if isinstance(piece, Piece)}
        self._programs: dict[tuple, _Programs] = {}
        self.pieces: dict[str, PieceTrace] = {}
        self.log: list[tuple[str, str]] = []
        self.capacities = (0, 0)

    def programs(self, piece: Piece, params: Tree, inputs: Sequence[tf.Tensor]) -> _Programs:
        """The stand-in of a piece; made once for each signature."""
        leaves = tree.flatten(params)
        key = (id(piece), *((str(x.shape), x.dtype) for x in (*leaves, *inputs)))
        if key not in self._programs:
            self._programs[key] = self._measure(piece, params, inputs)
        return self._programs[key]

    def _measure(self, piece: Piece, params: Tree, inputs: Sequence[tf.Tensor]) -> _Programs:
        vjp = piece.split(params, inputs)
        leaves = tree.flatten(params)
        flops = []

        def run(program: Callable[..., Any], *args: Sequence[tf.Tensor]):
            """A program's results, in a graph that has nothing else."""
            with _graph().as_default() as graph:
                given = [[_placeholder(x) for x in group] for group in args]
                found = program(*given)
            flops.append(graph_flops(graph))
            return found, given

        (outputs, residuals), given = run(vjp.forward, leaves, inputs)
        d_outputs = [y for y in outputs if y.dtype.is_floating]
        (d_inputs, messages), _ = run(vjp.backward, leaves, inputs, residuals, d_outputs)
        d_params, _ = run(vjp.weights, leaves, inputs, residuals, messages)
        templates = (_template(outputs, given[1]), _template(residuals, given[1]))
        templates += (_template(d_inputs), _template(messages), _template(d_params))
        return _Programs(self._name(piece), vjp, Products(*flops), *templates)

    def _name(self, piece: Piece) -> str:
        if id(piece) not in self._names and self._pieces.routed is not None:
            for name, made in self._pieces.routed._asdict().items():
                if isinstance(made, Piece):
                    self._names[id(made)] = name
                elif made is not None:  # it is made for one of the two capacities, and making the other costs nothing
                    self._names |= {id(made(rows)): name for rows in self.capacities if rows}
        return self._names[id(piece)]

    def stage(self, params: Tree, layers: range, *, first: bool, last: bool, policy: ComputePolicy) -> StageTrace:
        """Walks one stage forward and backward, as `train.executor` does."""
        cfg, plan = self._cfg, self._plan
        self.log = []
        with _graph().as_default():
            hidden = tf.TensorSpec([plan.micro_batch, plan.length, cfg.hidden_size], policy.compute_dtype or tf.float32)
            x = None if first else _value(hidden)
            tape = _Tape((DEVICE,), recorder=self)
            forward = stage_forward(
                tape, self._pieces, [params], self._router(), x, self._batch(), layers=layers, last=last, cfg=cfg
            )
            out = self._drive(forward)
            read = self._read(tape)
            kept = self._kept(tape)
            seeds = {value.key: [_placeholder(value.parts[0])] for value in _ends(out)}
            grads: dict[str, list[tf.Tensor]] = {}
            deferred: list[Callable[[], None]] = []
            found = self._drive(backward(tape, seeds, grads, deferred=deferred))
            for weights in deferred:
                weights()
            check(first or x.key in found, "trace_step: the stage has no gradient for its input, want one")
            trained = {path: int(sums[0].shape.num_elements()) for path, sums in grads.items()}
        check(
            read == trained,
            f"trace_step: parameters {sorted(set(read.items()) ^ set(trained.items()))} are read or trained, want both",
        )
        return StageTrace(self._calls(), read, kept)

    def _calls(self) -> dict[str, int]:
        runs = {run: collections.Counter(name for name, what in self.log if what == run) for run in Products._fields}
        check(
            len({tuple(sorted(c.items())) for c in runs.values()}) == 1,
            f"trace_step: the passes run pieces unlike often: {runs}, want each as often",
        )
        return dict(runs["forward"])

    def _drive(self, program: Generator) -> Any:
        reply = None
        try:
            while True:
                request, reply = program.send(reply), None
                if isinstance(request, Capacity):
                    reply = self._capacity(request)
                elif isinstance(request, Exchange):
                    reply = Value((_placeholder(request.value.parts[0]),))
        except StopIteration as end:
            return end.value

    def _capacity(self, request: Capacity) -> int | tuple[int, int]:
        """The step's answer under a balanced load."""
        plan, router, nodes = self._plan, self._cfg.moe.router, plan_nodes(self._plan)
        each = -(-plan.tokens * router.top_k // router.num_experts)
        if request.to_nodes is None:
            self.capacities = (dispatch_capacity(each, plan.tokens), 0)
            return self.capacities[0]
        reached = parts_reached(router, nodes, routing=plan.routing)
        first = dispatch_capacity(int(-(-plan.tokens * reached // nodes)), plan.tokens)
        each = -(-nodes * plan.tokens * router.top_k // router.num_experts)
        self.capacities = (dispatch_capacity(each, nodes * plan.tokens), first)
        return first, self.capacities[0]

    def _router(self) -> RouterState:
        experts = tf.TensorSpec([self._cfg.moe.router.num_experts], tf.float32)
        counts = (self._cfg.num_moe_layers, self._cfg.num_mtp_layers)
        return RouterState(*([_value(experts) for _ in range(count)] for count in counts))

    def _batch(self) -> StageBatch:
        shape, modules = [self._plan.micro_batch, self._plan.length], self._cfg.num_mtp_layers
        tokens, weights = tf.TensorSpec(shape, tf.int32), tf.TensorSpec(shape, tf.float32)
        return StageBatch(
            _value(tokens), [_value(tokens) for _ in range(modules + 1)], [_value(weights) for _ in range(modules + 1)],
            [_value(tokens) for _ in range(modules)], _value(tf.TensorSpec([], tf.float32)),
        )  # fmt: skip

    def _read(self, tape: Tape) -> dict[str, int]:
        calls = [record for record in tape.records if hasattr(record, "names")]
        return {name: int(p.shape.num_elements()) for call in calls for name, p in zip(call.names, call.params[0])}

    def _kept(self, tape: Tape) -> dict[str, int]:
        """Bytes of what the tape holds, by the first piece that keeps it."""
        seen: set[int] = set()
        found: collections.Counter[str] = collections.Counter()
        names = iter([name for name, what in self.log if what == "forward"])
        for call in (record for record in tape.records if hasattr(record, "names")):
            name, before = next(names), sum(found.values())
            gathered = 0
            for x in (*call.inputs[0], *call.residuals[0]):
                if x is not None and id(x) not in seen:
                    seen.add(id(x))
                    size = int(x.shape.num_elements()) * x.dtype.size
                    found[name] += size
                    gathered += size * any(x.shape.rank == 3 and x.shape[1:] == p.shape[1:] for p in call.params[0])
            (flops,) = {p.flops for p in self._programs.values() if p.name == name}
            self.pieces.setdefault(name, PieceTrace(flops, sum(found.values()) - before, gathered))
        return dict(found)


def _value(spec: tf.TensorSpec) -> Value:
    return Value((_placeholder(spec),))


def _ends(out: StageOutput) -> list[Value]:
    """What a stage's backward pass starts from."""
    ends = [*out.mtp, *out.balance.values()]
    return ends + [value for value in (out.x, out.main) if value is not None]
