"""The compiled step's edge: the one place where state lives in `tf.Variable`s.

Everything in dsv3 is a pure function `(state, inputs) -> (new state, outputs)`. Compiled as it stands, such a function holds
the old and the new state at once. `compile_step` keeps the state in variables that the step updates in place, and hands
them out as the tree that the function knows: the state that a call is given is donated to it.

Two ways of writing need no second copy of a leaf: `RowWrite` for the part of a cache that is new, `update_leaves` for
element-wise updates such as an optimiser's.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_same_tree
from dsv3.graph import plain
from dsv3.typing import Tree


@dataclasses.dataclass(frozen=True)
class RowWrite:
    """A new value for part of a state leaf: `leaf[:, b, starts[b] : starts[b] + T] = values[:, b]` for every row b.

    A step returns it instead of the whole new leaf, so that a large cache is neither copied nor read through a copy: the
    rows are written into the buffer that the step has read. What shares that buffer changes with it: a tensor or variable
    that somebody made of the variable without computing (`tf.convert_to_tensor(variable)`, `tf.Variable(variable)`), or a
    new value of another leaf that is a view of this one (`leaf[0]`). `snapshot` copies, and so do a step's outputs.

    Attributes:
      values: `[X, B, T, ...]`.
      starts: `[B]` int32; a step fails if `starts[b] + T` exceeds the leaf's dim 2.
    """

    values: tf.Tensor
    starts: tf.Tensor


_State = dict[int, tuple[tf.Tensor, tf.Variable]]  # by the identity of a tensor that was read: the tensor, its variable


@dataclasses.dataclass
class _Edge:
    """The step that is being traced: its leaves as they were read, and those that `update_leaves` has already written."""

    read: _State
    written: _State


_EDGE: contextvars.ContextVar[_Edge | None] = contextvars.ContextVar("dsv3_edge", default=None)


def place(state: Tree, *, owned: bool = False) -> Tree:
    """Puts a tree of tensors into variables, which share the tensors' memory until they change; variables stay as they are.

    A state that is placed before its first step, with no other reference to its tensors left, never exists twice:
    `state = place(state)`. Leaves that are written by rows are an exception: their first step copies them, unless they are
    `owned`, which promises that nothing else holds the tensors or their memory, as after `place(make_cache(), owned=True)`.
    """

    def one(path: str, leaf: Any) -> tf.Variable:
        if isinstance(leaf, tf.Variable):
            return leaf
        variable = tf.Variable(leaf, trainable=False, name=path.replace(".", "_"))
        variable.shares_memory = not owned
        return variable

    return tree.map_with_path(one, state)


def snapshot(state: Tree) -> Tree:
    """Copies a tree into tensors that later steps leave alone."""
    return tree.map_leaves(lambda leaf: tf.raw_ops.DeepCopy(x=tf.convert_to_tensor(leaf)), state)


def compile_step(
    fn: Callable[..., tuple[Tree, Any]], *, jit: bool = False, relax: bool = False
) -> Callable[..., tuple[Tree, Any]]:
    """Compiles a pure function of state and inputs into a step that updates the state in place.

    Args:
      fn: `fn(state, *inputs) -> (new_state, outputs)`. Leaves of the new state are tensors, or `RowWrite`s. A leaf that is
        returned as it came is not written.
      jit: compile the whole step with XLA.
      relax: trace a dim of an input that has changed once as an unknown one, so that it may change again without a trace.

    Returns:
      `step(state, *inputs) -> (state, outputs)`. The given state is donated: its tensors are put into variables at the
      first call (see `place`), and the returned tree holds those variables, which convert to tensors wherever one is
      wanted. Pass that tree on; take a `snapshot` to keep a value. `step.traces()` counts how often the function was
      traced.
    """
    by_rows: set[str] = set()  # paths that the first trace writes through RowWrite
    assigned: set[str] = set()  # paths that some trace assigns as a whole

    @tf.function(jit_compile=jit, autograph=False, reduce_retracing=relax)
    def run(state, inputs):
        values = tree.map_leaves(tf.convert_to_tensor, state)
        variables, old = tree.to_dict(state), tree.to_dict(values)
        edge = _Edge({id(old[path]): (old[path], variable) for path, variable in variables.items()}, {})
        token = _EDGE.set(None if jit else edge)
        try:
            new, outputs = fn(values, *inputs)
        finally:
            _EDGE.reset(token)
        new = tree.to_dict(new)
        check_same_tree("compile_step", "new state", new, old)
        if not run.experimental_get_tracing_count() and not jit:  # the first trace: it is not counted yet
            by_rows.update(path for path, value in new.items() if isinstance(value, RowWrite))
        assigned.update(path for path, value in new.items() if not isinstance(value, RowWrite) and value is not old[path])
        return _write(variables, old, new, outputs, edge, by_rows)

    def step(state: Tree, *inputs: Any) -> tuple[Tree, Any]:
        state = place(state)
        if not run.experimental_get_tracing_count():
            run.get_concrete_function(state, inputs)
        variables = tree.to_dict(state)
        _own(variable for path, variable in variables.items() if path in by_rows)
        try:
            return state, run(state, inputs)
        finally:
            if assigned:  # what was assigned may share memory with any leaf that the step has read
                for path, variable in variables.items():
                    if path not in by_rows or path in assigned:
                        variable.shares_memory = True

    step.traces = run.experimental_get_tracing_count
    return step


@plain
def update_leaves(fn: Callable[..., Sequence[tf.Tensor]], leaves: Sequence[tf.Tensor], *args: tf.Tensor) -> list[tf.Tensor]:
    """Returns `fn(*leaves, *args)`, the new values of leaves of a state, which have the leaves' shapes and dtypes.

    In a function that `compile_step` traces (without `jit`), leaves that are the step's state as it came are overwritten by
    one compiled kernel, so that old and new values never exist side by side. Anywhere else this just calls `fn`. The
    result is the same, and whoever reads the old tensors still gets the old values.

    Args:
      fn: a pure element-wise function that XLA can compile. The same one for many leaves, also of several steps, is compiled
        once for each shape; it must not read tensors of the graph that is traced.
      leaves: tensors of the state.
      args: more tensors for `fn`.
    """
    edge, graph = _EDGE.get(), tf.compat.v1.get_default_graph()
    if edge is None or any(id(leaf) not in edge.read or leaf.graph is not graph for leaf in leaves):
        return list(fn(*leaves, *args))
    variables = [edge.read.pop(id(leaf))[1] for leaf in leaves]  # once only: after that a leaf is not as it came
    _leaf_kernel(fn)(variables, args)
    new = [variable.read_value() for variable in variables]
    edge.written.update((id(tensor), (tensor, variable)) for tensor, variable in zip(new, variables))
    return new


@functools.lru_cache(maxsize=32)
def _leaf_kernel(fn: Callable[..., Sequence[tf.Tensor]]) -> Callable[..., None]:
    """One function for all leaves that `fn` updates, in all steps: those of one shape are compiled once."""

    @tf.function(jit_compile=True, autograph=False)
    def kernel(variables, args):
        for variable, value in zip(variables, fn(*[v.read_value() for v in variables], *args), strict=True):
            variable.assign(value, read_value=False)

    return kernel


def _own(variables: Iterable[tf.Variable]) -> None:
    """Gives variables whose memory is going to be written memory of their own.

    A variable shares memory with what it was assigned from; those are marked that were copied since, or are `owned`.
    """
    for variable in variables:
        if getattr(variable, "shares_memory", True):
            variable.assign(tf.raw_ops.DeepCopy(x=variable), read_value=False)
            variable.shares_memory = False


@plain
def _write(
    variables: dict[str, tf.Variable], old: dict, new: dict, outputs: Any, edge: _Edge, by_rows: set[str]
) -> Any:
    """Writes the new state; returns the outputs, as copies if memory is written that they may be views of."""
    by_rows = {path for path in by_rows if isinstance(new.get(path), RowWrite)}
    if by_rows:
        outputs = tree.map_leaves(lambda leaf: tf.raw_ops.DeepCopy(x=leaf) if tf.is_tensor(leaf) else leaf, outputs)
        views = {id(leaf) for leaf in old.values()}
        new = {
            path: tf.raw_ops.DeepCopy(x=value) if value is not old[path] and id(value) in views else value
            for path, value in new.items()
        }
    # Identities: an edge from a function's call would, once that is inlined, no longer wait for its results.
    done = [tf.identity(leaf) for leaf in _computed(new, outputs)] if by_rows else []
    with tf.control_dependencies([_check_rows(path, variables[path], new[path]) for path in sorted(by_rows)]):
        for path, variable in variables.items():
            _write_leaf(path, variable, old[path], new[path], edge, done if path in by_rows else None)
    return outputs


def _computed(new: dict, outputs: Any) -> list[tf.Tensor]:
    """All tensors that a step computes: what they read has been read when they are there."""
    parts = [(v.values, v.starts) if isinstance(v, RowWrite) else v for v in new.values()]
    return [leaf for leaf in tree.flatten((parts, outputs)) if tf.is_tensor(leaf)]


def _write_leaf(path: str, variable: tf.Variable, old: tf.Tensor, value: Any, edge: _Edge, done: list | None) -> None:
    overwritten = any(variable is written for _, written in edge.written.values())
    if edge.written.get(id(value), (None, None))[1] is variable or (value is old and not overwritten):
        return
    if isinstance(value, RowWrite) and done is not None:
        _write_rows(variable, old, value, done)
    elif isinstance(value, RowWrite):
        _slice_rows(variable, value)
    else:
        check(
            value.dtype == variable.dtype and value.shape.is_compatible_with(variable.shape),
            f"compile_step: new state `{path}` is {value.dtype.name} {value.shape}, "
            f"want {variable.dtype.name} {variable.shape}",
        )
        variable.assign(value, read_value=False)


def _check_rows(path: str, variable: tf.Variable, write: RowWrite) -> tf.Operation:
    """Fails before anything is written if rows are to be written beyond a leaf's end."""
    slots, new = variable.shape[2], write.values.shape[2]
    fits = tf.reduce_all(tf.logical_and(write.starts >= 0, write.starts + new <= slots))
    message = f"compile_step: {new} new slots of `{path}` end beyond its {slots}; the rows start at"
    return tf.raw_ops.Assert(condition=fits, data=[message, write.starts])


def _write_rows(variable: tf.Variable, old: tf.Tensor, write: RowWrite, done: list[tf.Tensor]) -> None:
    """Writes into the memory that was read, once all that is computed of it is `done`."""
    layers, rows, slots = variable.shape[:3]
    new = write.values.shape[2]
    row = tf.expand_dims(tf.range(layers) * rows, 1) + tf.range(rows)
    places = tf.reshape(tf.expand_dims(row * slots + write.starts, -1) + tf.range(new), [-1])
    with tf.control_dependencies(done):
        flat = tf.raw_ops.InplaceUpdate(
            x=tf.reshape(old, [layers * rows * slots, -1]),
            i=places,
            v=tf.reshape(tf.cast(write.values, variable.dtype), [layers * rows * new, -1]),
        )
        variable.assign(tf.reshape(flat, variable.shape), read_value=False)


def _slice_rows(variable: tf.Variable, write: RowWrite) -> None:
    """The same by assignments to slices: for XLA, and for a leaf that the first trace did not write. Later reads copy."""
    values = tf.cast(write.values, variable.dtype)
    layers, rows, new = values.shape[:3]
    rest = values.shape[3:].as_list()
    for b in range(rows):
        start = write.starts[b]
        begin = tf.stack([0, b, start, *([0] * len(rest))])
        end = tf.stack([layers, b + 1, start + new, *rest])
        tf.raw_ops.ResourceStridedSliceAssign(
            ref=variable.handle, begin=begin, end=end, strides=[1] * (3 + len(rest)), value=values[:, b : b + 1]
        )
