"""A function's forward pass, its backward pass for the inputs and its backward pass for the weights, as three programs.

A pipeline runs the three at different times, perhaps with other micro-batches in between, so what one leaves for another has
to be explicit. The function and its gradient are traced into one graph; the graph is cut where the forward part ends, and
again where what only the weights' gradients need begins. No layer has to know of it, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.typing import Tree


class SplitVjp(NamedTuple):
    """The programs of one function at one signature. All take and return flat lists of tensors.

    Attributes:
      forward: `(params, inputs) -> (outputs, residuals)`.
      backward: `(params, inputs, residuals, d_outputs) -> (d_inputs, messages)`. `d_outputs` has an entry for each floating
        output, `None` for a zero; `d_inputs` one for each input, `None` where there is no gradient.
      weights: `(params, inputs, residuals, messages) -> d_params`, one for each parameter, `None` where there is none. It
        reads only those residuals that `weight_residuals` lists (the others may be gone, as `None`).
      weight_residuals: indices of residuals. reads: indices of the inputs that the backward programs read.
      outputs: the structure of the function's outputs.
    """

    forward: Callable[..., tuple[list[tf.Tensor], list[tf.Tensor]]]
    backward: Callable[..., tuple[list[tf.Tensor | None], list[tf.Tensor]]]
    weights: Callable[..., list[tf.Tensor | None]]
    weight_residuals: tuple[int, ...]
    reads: frozenset[int]
    outputs: Tree


class _Traced(NamedTuple):
    """One graph with a function and its gradient."""

    graph: tf.Graph
    params: list[tf.Tensor]
    inputs: list[tf.Tensor]
    outputs: list[tf.Tensor]
    d_outputs: list[tf.Tensor]  # of the floating outputs
    d_inputs: list[tf.Tensor | None]
    d_params: list[tf.Tensor | None]
    structure: Tree


def split_vjp(
    fn: Callable[..., Tree], params: Tree, inputs: Sequence[tf.Tensor], *, jit: bool = False, remat: bool = False
) -> SplitVjp:
    """Splits `fn(params, *inputs)`.

    Args:
      fn: a pure function of a tree of tensors and tensors; returns a tree of tensors. Assertions in it are left out.
      params, inputs: tensors or `tf.TensorSpec`s that give the signature. Integer inputs and outputs have no gradient.
      jit: compile the three programs with XLA.
      remat: keep no residuals; the backward program computes again what it needs, from the inputs.

    Returns:
      `SplitVjp`. Each program is compiled at its first call.

    Raises:
      ValueError: `fn` reads tensors from outside, or has operations with a state, such as random ones, which could not be
        computed again to the same values.
    """
    t = _trace(fn, params, inputs)
    forward_ops = set() if remat else _ancestors(t.outputs)
    given = {x.name for x in (*t.params, *t.inputs)}
    chain_ops = _ancestors(_present(t.d_inputs)) - forward_ops
    weight_ops = _ancestors(_present(t.d_params)) - forward_ops - chain_ops
    depends = _dependent(t.graph, [*t.inputs, *t.d_outputs])

    def crossing(ops: set, sources: set, also: Iterable[tf.Tensor]) -> list[tf.Tensor]:
        """What `ops`, or the results `also`, read of `sources`; what depends on parameters alone, as casts, is repeated."""
        read = [x for op in sorted(ops, key=lambda op: op.name) for x in op.inputs] + list(also)
        found = {x.name: x for x in read if x.op in sources and x.op in depends and x.name not in given}
        return list(found.values())

    chain_reads = crossing(chain_ops, forward_ops, _present(t.d_inputs))
    weight_reads = crossing(weight_ops, forward_ops, _present(t.d_params))
    d_ops = {x.op for x in t.d_outputs}
    messages = crossing(weight_ops, chain_ops | d_ops, _present(t.d_params))
    residuals = list({x.name: x for x in (*chain_reads, *weight_reads)}.values())
    kept = {x.name for x in weight_reads}
    weight_residuals = tuple(i for i, x in enumerate(residuals) if x.name in kept)
    return _programs(t, residuals, weight_residuals, messages, jit)


CALLS = {"PartitionedCall", "StatefulPartitionedCall", "While", "StatelessWhile", "If", "StatelessIf", "Placeholder"}


def _check_pure(graph: tf.Graph) -> None:
    for op in graph.get_operations():
        check(
            not op.op_def.is_stateful or op.type in CALLS,
            f"split_vjp: `fn` has the operation {op.name} of type {op.type}, which has a state: want pure operations only",
        )


def _trace(fn: Callable[..., Tree], params: Tree, inputs: Sequence[tf.Tensor]) -> _Traced:
    leaves = tree.flatten(params)
    parts: list = []

    def whole(*args):
        p, x = list(args[: len(leaves)]), list(args[len(leaves) :])
        watched = [v for v in (*p, *x) if v.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            result = fn(tree.unflatten_as(params, p), *x)
        outputs = tree.flatten(result)
        floating = [y for y in outputs if y.dtype.is_floating]
        d_outputs = [tf.compat.v1.placeholder(y.dtype, y.shape) for y in floating]
        found = iter(tape.gradient(floating, watched, d_outputs) if floating else [None] * len(watched))
        grads = [next(found) if v.dtype.is_floating else None for v in (*p, *x)]
        grads = [None if g is None else tf.convert_to_tensor(g) for g in grads]
        parts.extend((outputs, d_outputs, grads, result))
        return outputs

    signature = [tf.TensorSpec(v.shape, v.dtype) for v in (*leaves, *inputs)]
    traced = tf.compat.v1.wrap_function(whole, signature)
    outputs, d_outputs, grads, result = parts
    check(not traced.captured_inputs, "split_vjp: `fn` reads tensors from outside: make them inputs")
    _check_pure(traced.graph)
    n, given = len(leaves), traced.inputs
    structure = tree.map_leaves(lambda y: tf.TensorSpec(y.shape, y.dtype), result)
    return _Traced(traced.graph, given[:n], given[n:], outputs, d_outputs, grads[n:], grads[:n], structure)


def _programs(t: _Traced, residuals, weight_residuals, messages, jit: bool) -> SplitVjp:
    given = [*t.params, *t.inputs]
    kept = [residuals[i] for i in weight_residuals]
    forward_fn, _ = _prune(t.graph, given, [*t.outputs, *residuals], jit)
    backward_fn, read = _prune(t.graph, [*given, *residuals, *t.d_outputs], [*_present(t.d_inputs), *messages], jit)
    weight_fn, also = _prune(t.graph, [*given, *kept, *messages], _present(t.d_params), jit)
    reads = frozenset(i for i, x in enumerate(t.inputs) if x.name in read | also)
    shapes = [(y.shape, y.dtype) for y in t.d_outputs]

    def forward(params, inputs):
        found = forward_fn([*params, *inputs])
        return found[: len(t.outputs)], found[len(t.outputs) :]

    def backward(params, inputs, residuals, d_outputs):
        seeds = [tf.zeros(shape, dtype) if d is None else d for d, (shape, dtype) in zip(d_outputs, shapes, strict=True)]
        found = backward_fn([*params, *inputs, *residuals, *seeds])
        count = len(_present(t.d_inputs))
        return _fill(t.d_inputs, found[:count]), found[count:]

    def weights(params, inputs, residuals, messages):
        found = weight_fn([*params, *inputs, *(residuals[i] for i in weight_residuals), *messages])
        return _fill(t.d_params, found)

    return SplitVjp(forward, backward, weights, weight_residuals, reads, t.structure)


def _prune(
    graph: tf.Graph, feeds: list[tf.Tensor], fetches: list[tf.Tensor], jit: bool
) -> tuple[Callable[[list], list], set[str]]:
    """A compiled function from `feeds`, which may be any tensors of the graph, to `fetches`, and which feeds it reads.

    What is both passes through. A feed that is not read may be `None`.
    """
    places = {x.name: i for i, x in enumerate(feeds)}
    computed = list(dict.fromkeys(x.name for x in fetches if x.name not in places))
    slots = {name: i for i, name in enumerate(computed)}
    through = {x.name for x in fetches if x.name in places}
    if not computed:
        return lambda args: [args[places[x.name]] for x in fetches], through
    part, read = _subgraph(graph, set(places), computed)
    taken = [x for x in feeds if x.name in read]

    def body(*args):
        return tf.graph_util.import_graph_def(part, dict(zip((x.name for x in taken), args)), computed, name="")

    signature = [tf.TensorSpec(x.shape, x.dtype) for x in taken]
    chosen = [places[x.name] for x in taken]
    run = tf.function(body, jit_compile=jit, autograph=False).get_concrete_function(*signature)

    dtypes = [y.dtype for y in run.outputs]

    def call(args):
        # As an operation: calling the function object costs seven times as much, a large part of a small piece's time. But
        # the operation would not be compiled with XLA.
        given = [args[i] for i in chosen]
        found = run(*given) if jit else tf.raw_ops.StatefulPartitionedCall(args=given, Tout=dtypes, f=run)
        return [args[places[x.name]] if x.name in places else found[slots[x.name]] for x in fetches]

    return call, read | through


def _subgraph(graph: tf.Graph, feeds: set[str], fetches: list[str]) -> tuple[tf.compat.v1.GraphDef, set[str]]:
    """What lies between tensors, and those of `feeds` that it reads. Order among operations is not kept: they are pure."""
    needed, read = set(), set()
    stack = [graph.get_tensor_by_name(name).op for name in fetches]
    while stack:
        op = stack.pop()
        if op.name not in needed:
            needed.add(op.name)
            read |= {x.name for x in op.inputs if x.name in feeds}
            stack += [x.op for x in op.inputs if x.name not in feeds]
    part = graph.as_graph_def()
    nodes = [node for node in part.node if node.name in needed]
    for node in nodes:
        node.attr.pop("_class", None)
        data = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        node.input.extend(data)
    library = part.library
    part = tf.compat.v1.GraphDef(versions=part.versions, library=library)
    part.node.extend(nodes)
    return part, read


def _ancestors(tensors: Iterable[tf.Tensor]) -> set[tf.Operation]:
    seen: set[tf.Operation] = set()
    stack = [x.op for x in tensors]
    while stack:
        op = stack.pop()
        if op not in seen:
            seen.add(op)
            stack += [x.op for x in op.inputs] + list(op.control_inputs)
    return seen


def _dependent(graph: tf.Graph, sources: Iterable[tf.Tensor]) -> set[tf.Operation]:
    """The operations that depend on `sources`; operations are listed in the order of their creation."""
    found = {x.op for x in sources}
    for op in graph.get_operations():
        if any(x.op in found for x in op.inputs):
            found.add(op)
    return found


def _present(values: Iterable[tf.Tensor | None]) -> list[tf.Tensor]:
    return [v for v in values if v is not None]


def _fill(pattern: Iterable[tf.Tensor | None], values: Sequence[tf.Tensor]) -> list[tf.Tensor | None]:
    rest = iter(values)
    return [None if p is None else next(rest) for p in pattern]
