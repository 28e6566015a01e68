"""The compiled step's edge: the one place where state lives in `tf.Variable`s.

Everything in dsv3 is a pure function `(state, inputs) -> (new state, outputs)`. Compiled as it stands, such a function holds
the old and the new state at once. `compile_step` keeps the state in variables that the step updates in place, and hands
them out as the tree that the function knows: the state that a call is given is donated to it, as in JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_same_tree
from dsv3.graph import plain
from dsv3.typing import Tree


@dataclasses.dataclass(frozen=True)
class RowWrite:
    """A new value for part of a state leaf: `leaf[:, b, starts[b] : starts[b] + T] = values[:, b]` for every row b.

    A step returns it instead of the whole new leaf, so that a large cache is not copied.

    Attributes:
      values: `[X, B, T, ...]`.
      starts: `[B]` int32; `starts[b] + T` must not exceed the leaf's dim 2.
    """

    values: tf.Tensor
    starts: tf.Tensor


def place(state: Tree) -> Tree:
    """Copies a tree of tensors into variables; variables stay as they are."""

    def one(path: str, leaf: Any) -> tf.Variable:
        return leaf if isinstance(leaf, tf.Variable) else tf.Variable(leaf, trainable=False, name=path.replace(".", "_"))

    return tree.map_with_path(one, state)


def snapshot(state: Tree) -> Tree:
    """Copies a tree into tensors that later steps leave alone."""
    return tree.map_leaves(lambda leaf: tf.identity(tf.convert_to_tensor(leaf)), state)


def compile_step(fn: Callable[..., tuple[Tree, Any]], *, jit: bool = False) -> Callable[..., tuple[Tree, Any]]:
    """Compiles a pure function of state and inputs into a step that updates the state in place.

    Args:
      fn: `fn(state, *inputs) -> (new_state, outputs)`. Leaves of the new state are tensors, or `RowWrite`s. A leaf that is
        returned as it came is not written.
      jit: compile the whole step with XLA.

    Returns:
      `step(state, *inputs) -> (state, outputs)`. The given state is donated: its tensors are copied into variables at the
      first call, and the returned tree holds those variables, which convert to tensors wherever one is wanted. Pass that
      tree on; take a `snapshot` to keep a value. `step.traces()` counts how often the function was traced.
    """

    @tf.function(jit_compile=jit, autograph=False)
    def run(state, inputs):
        values = tree.map_leaves(tf.convert_to_tensor, state)
        new, outputs = fn(values, *inputs)
        check_same_tree("compile_step", "new state", tree.to_dict(new), tree.to_dict(state))
        _write(tree.to_dict(state), tree.to_dict(values), tree.to_dict(new))
        return outputs

    def step(state: Tree, *inputs: Any) -> tuple[Tree, Any]:
        state = place(state)
        return state, run(state, inputs)

    step.traces = run.experimental_get_tracing_count
    return step


@plain
def _write(variables: dict[str, tf.Variable], old: dict[str, tf.Tensor], new: dict[str, Any]) -> None:
    for path, variable in variables.items():
        value = new[path]
        if value is old[path]:
            continue
        if isinstance(value, RowWrite):
            _write_rows(variable, value)
            continue
        check(
            value.dtype == variable.dtype and value.shape.is_compatible_with(variable.shape),
            f"compile_step: new state `{path}` is {value.dtype.name} {value.shape}, "
            f"want {variable.dtype.name} {variable.shape}",
        )
        variable.assign(value, read_value=False)


def _write_rows(variable: tf.Variable, write: RowWrite) -> None:
    """One strided assignment a row; the variable's buffer is written in place once its readers are done."""
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
