"""Counts the matrix products of a traced graph: nothing is computed, all sizes are read from shapes.

Called functions are looked into. A loop is counted by running what its end depends on, its counters, and nothing else of it.
Whatever cannot be counted for certain is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

from dsv3.checks import check

PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
CALLS = ("PartitionedCall", "StatefulPartitionedCall")
LOOPS = ("While", "StatelessWhile")
MOST_ROUNDS = 10_000
BRANCHES = ("If", "StatelessIf")
# The beginnings of the names of other operations that multiply matrices.
OTHER_PRODUCTS = (
    "Conv2D", "Conv3D", "DepthwiseConv", "XlaDot", "XlaConv", "XlaCallModule", "Quantized", "UniformQuantized", "_Fused",
)  # fmt: skip

_ARITHMETIC = {
    "Add": operator.add, "AddV2": operator.add, "Sub": operator.sub, "Mul": operator.mul, "FloorDiv": operator.floordiv,
    "Maximum": max, "Minimum": min, "Neg": operator.neg, "ZerosLike": lambda _: 0, "Less": operator.lt,
    "LessEqual": operator.le, "Greater": operator.gt, "GreaterEqual": operator.ge, "Equal": operator.eq,
    "NotEqual": operator.ne, "LogicalAnd": lambda a, b: a and b, "LogicalOr": lambda a, b: a or b,
    "LogicalNot": operator.not_, "Identity": lambda a: a, "StopGradient": lambda a: a,
}  # fmt: skip


def graph_flops(graph: tf.Graph) -> int:
    """Returns the FLOPs of all matrix products of a graph: `2·m·k·n` for `[m, k] @ [k, n]`.

    Element-wise operations, reductions and gathers are not counted, as in `count.unit_flops`. In a function that the graph
    calls, only what its results depend on counts. Where a branch's condition is not known, both sides have to cost the same.

    Args:
      graph: a graph whose placeholders have static shapes.

    Returns:
      FLOPs, exactly.

    Raises:
      ValueError: a product with an unknown size, a loop whose number of rounds depends on data, an operation with functions
        that is neither call, loop nor branch, or one that multiplies and is none of those that are counted.
    """
    return _Counter(graph).count(graph.get_operations(), {})


class _Counter:
    def __init__(self, graph: tf.Graph):
        self._graph = graph
        self._library = {f.signature.name: f for f in graph.as_graph_def().library.function}
        self._made: dict[tuple, tf.Graph] = {}
        self._needed: dict[str, list[tf.Operation]] = {}
        self._flat: dict[str, int] = {}  # of functions without loops and branches

    def count(self, ops: Iterable[tf.Operation], args: dict[str, Any]) -> int:
        """FLOPs of operations of one graph; `args` has values of its placeholders, as far as they are known."""
        return sum(self._operation(op, args) for op in ops)

    def _operation(self, op: tf.Operation, args: dict[str, Any]) -> int:
        if op.type in PRODUCTS:
            return _product(op)
        if op.type == "Einsum":
            return _einsum(op)
        if op.type in CALLS:
            return self._call(op, "f", op.inputs, args)
        if op.type in LOOPS:
            return self._loop(op, args)
        if op.type in BRANCHES:
            return self._branch(op, args)
        check(
            not op.type.startswith(OTHER_PRODUCTS) and "MatMul" not in op.type,
            f"graph_flops: {op.name} is a {op.type}, which is not counted, want products of {', '.join(PRODUCTS)} or Einsum",
        )
        functions = [a.name for a in op.op_def.attr if a.type in ("func", "list(func)")]
        check(
            not functions,
            f"graph_flops: {op.name} is a {op.type}, whose functions are not counted, want calls, loops and branches only",
        )
        return 0

    def _function(self, op: tf.Operation, attr: str, inputs: Sequence[tf.Tensor]) -> tf.Graph:
        """The graph of a function, with the shapes of what it is called with."""
        name = op.get_attr(attr).name
        key = (name, *(str(x.shape) for x in inputs))
        if key not in self._made:
            with self._graph.as_default():
                self._made[key] = function_def_to_graph(self._library[name], input_shapes=[x.shape for x in inputs])
            self._made[key].name = f"{name}/{len(self._made)}"
        return self._made[key]

    def _call(self, op: tf.Operation, attr: str, inputs: Sequence[tf.Tensor], args: dict[str, Any]) -> int:
        values = [_known(x, args) for x in inputs]
        return self._run(self._function(op, attr, inputs), values)

    def _run(self, graph: tf.Graph, values: Sequence[Any]) -> int:
        if graph.name in self._flat:
            return self._flat[graph.name]
        if graph.name not in self._needed:
            self._needed[graph.name] = _ancestors(graph.outputs)
        ops = self._needed[graph.name]
        found = self.count(ops, _arguments(graph, values))
        if not any(op.type in (*CALLS, *LOOPS, *BRANCHES) for op in ops):
            self._flat[graph.name] = found
        return found

    def _loop(self, op: tf.Operation, args: dict[str, Any]) -> int:
        goes_on, body = (self._function(op, attr, op.outputs) for attr in ("cond", "body"))
        state, total = [_known(x, args) for x in op.inputs], 0
        for _ in range(MOST_ROUNDS):
            again = _known(goes_on.outputs[0], _arguments(goes_on, state))
            check(again is not None, f"graph_flops: the rounds of the loop {op.name} depend on data, want counter and bound")
            if not again:
                return total
            total += self._run(body, state)
            here = _arguments(body, state)
            state = [_known(y, here) for y in body.outputs]
        raise ValueError(f"graph_flops: the loop {op.name} has no end after {MOST_ROUNDS:,} rounds, want a counter")

    def _branch(self, op: tf.Operation, args: dict[str, Any]) -> int:
        condition, inputs = _known(op.inputs[0], args), list(op.inputs)[1:]
        sides = {"then_branch": True, "else_branch": False}
        taken = [attr for attr, side in sides.items() if condition is None or bool(condition) == side]
        found = [self._call(op, attr, inputs, args) for attr in taken]
        check(
            len(set(found)) == 1,
            f"graph_flops: the branches of {op.name} cost {found} FLOPs and its condition depends on data, want a known one",
        )
        return found[0]


def _arguments(graph: tf.Graph, values: Sequence[Any]) -> dict[str, Any]:
    return {x.name: value for x, value in zip(graph.inputs, values) if value is not None}


def _known(x: tf.Tensor, args: dict[str, Any]) -> Any:
    """The value of an integer or boolean scalar, if it follows from constants and `args`, else `None`."""
    if x.name in args:
        return args[x.name]
    if x.shape.rank != 0 or not (x.dtype.is_integer or x.dtype.is_bool):
        return None
    if x.op.type in _ARITHMETIC:
        values = [_known(y, args) for y in x.op.inputs]
        if x.op.type == "ZerosLike" or all(v is not None for v in values):
            return _ARITHMETIC[x.op.type](*values)
        return None
    value = tf.get_static_value(x)
    return None if value is None else value.item()


def _ancestors(tensors: Iterable[tf.Tensor]) -> list[tf.Operation]:
    """The operations that tensors are computed by."""
    seen: dict[str, tf.Operation] = {}
    stack = [x.op for x in tensors]
    while stack:
        op = stack.pop()
        if op.name not in seen:
            seen[op.name] = op
            stack += [x.op for x in op.inputs]
    return list(seen.values())


def _sizes(op: tf.Operation, x: tf.Tensor) -> list[int]:
    sizes = None if x.shape.rank is None else x.shape.as_list()
    check(
        sizes is not None and None not in sizes,
        f"graph_flops: the product {op.name} has an operand of shape {x.shape}, want static sizes",
    )
    return sizes


def _product(op: tf.Operation) -> int:
    transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
    left, out = _sizes(op, op.inputs[0]), _sizes(op, op.outputs[0])
    return 2 * math.prod(out) * left[-2 if transposed else -1]


def _einsum(op: tf.Operation) -> int:
    equation = op.get_attr("equation").decode()
    terms = equation.partition("->")[0].split(",")
    check("." not in equation, f"graph_flops: {op.name} is an Einsum of {equation}, want letters without '...'")
    if len(terms) == 1:
        return 0
    sizes = {letter: n for term, x in zip(terms, op.inputs) for letter, n in zip(term, _sizes(op, x))}
    return 2 * math.prod(sizes.values())
