"""A tape of pieces: functions that run on every local device alike, and the exchanges between them.

The forward pass of a stage is a generator that calls pieces and yields each `Exchange` that it needs; whoever drives it
makes the exchange and sends the result back. The backward pass walks the tape in reverse, again as a generator, with every
piece split in two (see `vjp`). Where a forward and a backward pass may take turns, both yield a `Turn`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from dsv3 import tree
from dsv3.parallel.mesh import on_device
from dsv3.parallel.vjp import SplitVjp, split_vjp
from dsv3.typing import Tree


@dataclasses.dataclass(eq=False, frozen=True)
class Value:
    """What each local device holds of one thing: a tensor a device. `key` stands for it where the tensors may go."""

    parts: tuple[tf.Tensor, ...]
    key: object = dataclasses.field(default_factory=object)


@dataclasses.dataclass(eq=False, frozen=True)
class Exchange:
    """A request: part i's row g goes to device g of its node, or over `"node"` to that at the same place of node g.

    It is its own inverse and its own gradient. With `backward` it is that of a gradient. `compact`: rows may be rounded to a
    narrow format for the way; what is differentiated is the exchange of unrounded ones.
    """

    value: Value
    over: str = "expert"
    compact: bool = False
    backward: bool = False


@dataclasses.dataclass(eq=False, frozen=True)
class Capacity:
    """A request: for each device's tokens by expert, `[E]`, and by node, `[nodes]`, the capacities that all devices use.

    The answer is the rows for each expert; with `to_nodes` a pair, of the rows for each node and those for each expert.
    """

    load: Value
    to_nodes: Value | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A request without an answer: here another pass may go on first."""


@dataclasses.dataclass(eq=False, frozen=True)
class Piece:
    """A pure function `fn(params, *inputs) -> tree`.

    Attributes:
      fn: the function.
      jit: compile it with XLA. remat: keep nothing for the backward pass but the inputs.
      programs: those that were made so far, by signature.
    """

    fn: Callable[..., Tree]
    jit: bool = False
    remat: bool = False
    programs: dict[tuple, SplitVjp] = dataclasses.field(default_factory=dict)

    def split(self, params: Tree, inputs: Sequence[tf.Tensor]) -> SplitVjp:
        """Returns the programs for arguments of these shapes and dtypes."""
        key = tuple((str(x.shape), x.dtype) for x in (*tree.flatten(params), *inputs))
        if key not in self.programs:
            self.programs[key] = split_vjp(self.fn, params, inputs, jit=self.jit, remat=self.remat)
        return self.programs[key]


@dataclasses.dataclass(eq=False)
class _Call:
    """Holds no more than the backward programs read."""

    vjp: SplitVjp
    params: list[list[tf.Tensor]]  # by device, as are the next two
    inputs: list[list[tf.Tensor | None]]
    residuals: list[list[tf.Tensor | None]]
    names: list[str]  # of the parameters
    sources: list[object]  # keys of the inputs
    results: list[object]  # keys of the floating outputs


@dataclasses.dataclass(eq=False)
class _Swap:
    source: object
    result: object
    over: str
    compact: bool


@dataclasses.dataclass(frozen=True)
class _Mark:
    turn: bool


@dataclasses.dataclass(eq=False)
class Tape:
    """The calls and exchanges of one forward pass, for the devices that it ran on."""

    devices: tuple[str, ...]
    records: list = dataclasses.field(default_factory=list)

    def call(self, piece: Piece, where: Mapping[str, str], params: Sequence[Tree], *inputs: Value) -> Tree:
        """Runs a piece on every device.

        Args:
          piece: what to run; its function's first argument is a dict of parameter trees.
          where: from a name in that dict to the path of a subtree of the parameters, such as `{"block": "moe.3"}`.
          params: the devices' parameters, whole trees.
          inputs: values.

        Returns:
          The piece's outputs, as a tree of `Value`s.
        """
        taken = [{name: tree.subtree(p, path) for name, path in where.items()} for p in params]
        vjp = piece.split(taken[0], [v.parts[0] for v in inputs])
        leaves = [tree.flatten(p) for p in taken]
        outputs, residuals = [], []
        for i, device in enumerate(self.devices):
            with on_device(device):
                out, kept = vjp.forward(leaves[i], [v.parts[i] for v in inputs])
            outputs.append(out)
            residuals.append(kept)
        values = [Value(parts) for parts in zip(*outputs)]
        names = [where[top] + rest for top, rest in (_split_name(name) for name, _ in tree.items(taken[0]))]
        kept = [[v.parts[i] if j in vjp.reads else None for j, v in enumerate(inputs)] for i in range(len(self.devices))]
        results = [v.key for v in values if v.parts[0].dtype.is_floating]
        self.records.append(_Call(vjp, leaves, kept, residuals, names, [v.key for v in inputs], results))
        return tree.unflatten_as(vjp.outputs, values)

    def swap(
        self, value: Value, over: str = "expert", *, compact: bool = False, compact_back: bool = False
    ) -> Generator[Exchange, Value, Value]:
        """Yields an exchange of `value` (see `Exchange`), returns its result; `compact_back`: `compact` of its gradient."""
        result = yield Exchange(value, over, compact)
        self.records.append(_Swap(value.key, result.key, over, compact_back))
        return result

    def mark(self, *, turn: bool) -> None:
        """Marks where the backward pass does the weights' work that has come up; with `turn` it yields one then."""
        self.records.append(_Mark(turn))


def _split_name(name: str) -> tuple[str, str]:
    top, dot, rest = name.partition(".")
    return top, dot + rest


Gradients = dict[str, list[tf.Tensor]]
"""By a parameter's path, the devices' sums so far."""


def backward(
    tape: Tape, seeds: dict[object, Any], grads: Gradients, *, deferred: list[Callable[[], None]] | None = None
) -> Generator[Any, Any, dict[object, list]]:
    """Walks a tape in reverse; yields the exchanges of gradients, and turns.

    The weights' part of a piece's work comes at the next mark, so that a gradient's exchange can start before it.

    Args:
      tape: a finished forward pass. Its records are taken off, so that what they hold is freed.
      seeds: by a value's key, its gradient: tensors, one a device.
      grads: to add the parameters' gradients to, in float32.
      deferred: if given, the weights' part of the work is not done but put into this list, to be called later.

    Returns:
      By the key of a value that nothing on the tape made, its gradient.
    """
    cotangents: dict[object, list] = {key: list(parts) for key, parts in seeds.items()}
    pending: list[Callable[[], None]] = []
    while tape.records:
        record = tape.records.pop()
        if isinstance(record, _Mark):
            _finish(pending)
            if record.turn:
                yield Turn()
            continue
        if isinstance(record, _Swap):
            d = cotangents.pop(record.result, None)
            if d is not None:
                back = yield Exchange(Value(tuple(d)), record.over, record.compact, backward=True)
                _accumulate(tape.devices, cotangents, record.source, list(back.parts))
            continue
        d_outputs = [cotangents.pop(key, None) for key in record.results]
        if any(d is not None for d in d_outputs):
            later = pending if deferred is None else deferred
            later.append(_call_backward(tape.devices, record, d_outputs, cotangents, grads))
    _finish(pending)
    return cotangents


def _finish(pending: list[Callable[[], None]]) -> None:
    while pending:
        pending.pop(0)()


def _call_backward(devices, record: _Call, d_outputs, cotangents, grads: Gradients) -> Callable[[], None]:
    """Adds the gradients of a call's inputs to `cotangents`; returns what adds those of its weights to `grads`."""
    vjp, params, inputs, names = record.vjp, record.params, record.inputs, record.names
    d_inputs, messages, kept = [], [], []
    for i, device in enumerate(devices):
        with on_device(device):
            d, left = vjp.backward(
                params[i], inputs[i], record.residuals[i], [None if d is None else d[i] for d in d_outputs]
            )
        d_inputs.append(d)
        messages.append(left)
        kept.append([r if j in vjp.weight_residuals else None for j, r in enumerate(record.residuals[i])])
    for key, parts in zip(record.sources, zip(*d_inputs)):
        if parts[0] is not None:
            _accumulate(devices, cotangents, key, list(parts))

    def weights() -> None:
        for i, device in enumerate(devices):
            with on_device(device):
                found = vjp.weights(params[i], inputs[i], kept[i], messages[i])
                for name, g in zip(names, found):
                    if g is not None:
                        _add_gradient(grads, name, i, len(devices), g)

    return weights


def _accumulate(devices, cotangents: dict[object, list], key: object, parts: list) -> None:
    before = cotangents.get(key)
    if before is not None:
        for i, device in enumerate(devices):
            with on_device(device):
                parts[i] = before[i] + parts[i]
    cotangents[key] = parts


def _add_gradient(grads: Gradients, name: str, i: int, count: int, g: tf.Tensor) -> None:
    sums = grads.setdefault(name, [None] * count)
    sums[i] = tf.cast(g, tf.float32) if sums[i] is None else sums[i] + tf.cast(g, tf.float32)
