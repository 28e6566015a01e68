"""A tape of pieces: functions that run on every local device alike, and the exchanges between them.

The forward pass of a stage is a generator that calls pieces and yields each `Exchange` that it needs; whoever drives it
makes the exchange and sends the result back. Thus several stages can take turns, and one exchange can serve all of them.
The backward pass walks the tape in reverse, again as a generator, with every piece split in two (see `vjp`).
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
    """What each local device holds of one thing: a tensor a device. Two values are the same only if they are one object."""

    parts: tuple[tf.Tensor, ...]


@dataclasses.dataclass(eq=False, frozen=True)
class Exchange:
    """A request: part i's row g goes to device g of the expert axis. It is its own inverse and its own gradient."""

    value: Value


@dataclasses.dataclass(eq=False, frozen=True)
class Capacity:
    """A request: for the load of each device's experts, `[E]` tokens, the capacity that all devices use."""

    load: Value


@dataclasses.dataclass(eq=False, frozen=True)
class Piece:
    """A pure function `fn(params, *inputs) -> tree` with its programs, one set for each signature.

    Attributes:
      name: what it is called in a schedule's table.
      fn: the function.
      jit: compile it with XLA.
    """

    name: str
    fn: Callable[..., Tree]
    jit: bool = False
    cache: dict = dataclasses.field(default_factory=dict)

    def programs(self, params: Tree, inputs: Sequence[tf.Tensor]) -> SplitVjp:
        """Returns the programs for arguments of these shapes and dtypes."""
        key = tuple((str(x.shape), x.dtype) for x in (*tree.flatten(params), *inputs))
        if key not in self.cache:
            self.cache[key] = split_vjp(self.fn, params, inputs, jit=self.jit)
        return self.cache[key]


@dataclasses.dataclass(eq=False)
class _Call:
    vjp: SplitVjp
    params: list[list[tf.Tensor]]  # by device
    names: list[str]
    inputs: tuple[Value, ...]
    outputs: list[Value]
    residuals: list[list]  # by device


@dataclasses.dataclass(eq=False)
class _Swap:
    source: Value
    result: Value


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
        vjp = piece.programs(taken[0], [v.parts[0] for v in inputs])
        leaves = [tree.flatten(p) for p in taken]
        outputs, residuals = [], []
        for i, device in enumerate(self.devices):
            with on_device(device):
                out, kept = vjp.forward(leaves[i], [v.parts[i] for v in inputs])
            outputs.append(out)
            residuals.append(kept)
        values = [Value(parts) for parts in zip(*outputs)]
        names = [where[top] + rest for top, rest in (_split_name(name) for name, _ in tree.items(taken[0]))]
        self.records.append(_Call(vjp, leaves, names, inputs, values, residuals))
        return tree.unflatten_as(vjp.outputs, values)

    def swap(self, value: Value) -> Generator[Exchange, Value, Value]:
        """Yields an exchange of `value` and returns its result."""
        result = yield Exchange(value)
        self.records.append(_Swap(value, result))
        return result


def _split_name(name: str) -> tuple[str, str]:
    top, dot, rest = name.partition(".")
    return top, dot + rest


Gradients = dict[str, list[tf.Tensor]]
"""By a parameter's path, the devices' sums so far."""


def backward(
    tape: Tape, seeds: dict[Value, Any], grads: Gradients, *, deferred: list[Callable[[], None]] | None = None
) -> Generator[Exchange, Value, dict[int, list]]:
    """Walks a tape in reverse; yields the exchanges of gradients.

    Args:
      tape: a finished forward pass. Its records are taken off, so that what they hold is freed.
      seeds: the gradients of values: a list of tensors, one a device.
      grads: to add the parameters' gradients to, in float32.
      deferred: if given, the weights' part of the work is not done but put into this list, to be called later.

    Returns:
      By `id` of a value that nothing on the tape made, its gradient.
    """
    cotangents: dict[int, list] = {id(value): list(parts) for value, parts in seeds.items()}
    while tape.records:
        record = tape.records.pop()
        if isinstance(record, _Swap):
            d = cotangents.pop(id(record.result), None)
            if d is not None:
                back = yield Exchange(Value(tuple(d)))
                _accumulate(cotangents, record.source, list(back.parts))
            continue
        d_outputs = [cotangents.pop(id(v), None) for v in record.outputs if v.parts[0].dtype.is_floating]
        if any(d is not None for d in d_outputs):
            _call_backward(tape.devices, record, d_outputs, cotangents, grads, deferred)
    return cotangents


def _call_backward(devices, record: _Call, d_outputs, cotangents, grads: Gradients, deferred) -> None:
    d_inputs, messages = [], []
    for i, device in enumerate(devices):
        inputs = [v.parts[i] for v in record.inputs]
        with on_device(device):
            d, left = record.vjp.backward(
                record.params[i], inputs, record.residuals[i], [None if d is None else d[i] for d in d_outputs]
            )
        d_inputs.append(d)
        messages.append(left)
        kept = set(record.vjp.weight_residuals)
        record.residuals[i] = [r if j in kept else None for j, r in enumerate(record.residuals[i])]
    for value, parts in zip(record.inputs, zip(*d_inputs)):
        if parts[0] is not None:
            _accumulate(cotangents, value, list(parts))

    def weights() -> None:
        for i, device in enumerate(devices):
            inputs = [v.parts[i] for v in record.inputs]
            with on_device(device):
                found = record.vjp.weights(record.params[i], inputs, record.residuals[i], messages[i])
                for name, g in zip(record.names, found):
                    if g is not None:
                        _add_gradient(grads, name, i, len(devices), g)

    if deferred is None:
        weights()
    else:
        deferred.append(weights)


def _accumulate(cotangents: dict[int, list], value: Value, parts: list) -> None:
    before = cotangents.get(id(value))
    cotangents[id(value)] = parts if before is None else [a + b for a, b in zip(before, parts)]


def _add_gradient(grads: Gradients, name: str, i: int, count: int, g: tf.Tensor) -> None:
    sums = grads.setdefault(name, [None] * count)
    sums[i] = tf.cast(g, tf.float32) if sums[i] is None else sums[i] + tf.cast(g, tf.float32)


def drive(program: Generator[Any, Any, Any], answer: Callable[[Any], Any]) -> Any:
    """Runs a generator of requests to its end and returns its result."""
    try:
        request = next(program)
        while True:
            request = program.send(answer(request))
    except StopIteration as stop:
        return stop.value
