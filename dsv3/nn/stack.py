"""Applying a stack of equal layers: unrolled, unrolled with recomputation, or as one loop with recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dsv3 import tree
from dsv3.graph import plain
from dsv3.typing import Tree

LayerFn = Callable[[Tree, Tree, tf.Tensor], tuple[tf.Tensor, Tree]]
"""`fn(params, extra, x) -> (x, aux)`: one layer; `extra` is its slice of state and gets no gradient."""


@plain
def stack_apply(
    fn: LayerFn, params: Tree, extra: Tree, x: tf.Tensor, *, loop: str = "unroll", remat: str = "none"
) -> tuple[tf.Tensor, Tree]:
    """Applies `fn` once for each element of the leading dim that all leaves of `params` and `extra` share.

    Args:
      fn: one layer. It may close over tensors that need no gradient (masks, tables).
      params: a tree of `[X, ...]` tensors.
      extra: a tree of `[X, ...]` tensors without gradient, or `()`.
      x: the first layer's input.
      loop: `"unroll"` or `"scan"` (a `tf.while_loop` whose backward recomputes each layer from its input).
      remat: `"block"` recomputes also when unrolled.

    Returns:
      The last layer's output, and the layers' `aux` stacked along a new leading dim.
    """
    layers = tree.leading_size(params)
    if layers == 0:
        return x, ()
    if loop == "scan" and layers > 1:
        return _scan(fn, params, extra, x, layers)
    step = remat_apply(fn) if remat == "block" else fn
    per_layer = [tf.unstack(leaf, num=layers) for leaf in tree.flatten(params)]
    extras = [tf.unstack(leaf, num=layers) for leaf in tree.flatten(extra)]
    auxes = []
    for i in range(layers):
        p = tree.unflatten_as(params, [leaf[i] for leaf in per_layer])
        e = tree.unflatten_as(extra, [leaf[i] for leaf in extras])
        x, aux = step(p, e, x)
        auxes.append(aux)
    return x, tree.map_leaves(lambda *leaves: tf.stack(leaves), *auxes)


def remat_apply(fn: LayerFn) -> LayerFn:
    """Returns `fn` with a backward that recomputes it from its inputs, instead of keeping what is in between.

    The recomputation waits for the incoming gradient, so that a graph optimiser cannot merge it with the forward pass.
    """

    def wrapped(params: Tree, extra: Tree, x: tf.Tensor) -> tuple[tf.Tensor, Tree]:
        structure: list[Any] = []

        @tf.custom_gradient
        def run(x, *leaves):
            out, aux = fn(tree.unflatten_as(params, leaves), extra, x)
            structure.append(aux)

            def grad(d_out, *d_aux):
                with tf.control_dependencies([d_out]):
                    inputs = [tf.identity(t) for t in (x, *leaves)]
                return _vjp(fn, params, extra, inputs, d_out, d_aux)

            return (out, *tree.flatten(aux)), grad

        out, *aux = run(x, *tree.flatten(params))
        return out, tree.unflatten_as(structure[0], aux)

    return wrapped


def _vjp(fn: LayerFn, params: Tree, extra: Tree, inputs: list[tf.Tensor], d_out, d_aux) -> list[tf.Tensor]:
    """Recomputes a layer and returns the gradients of its input and parameters."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out, aux = fn(tree.unflatten_as(params, inputs[1:]), extra, inputs[0])
    pairs = [(a, d) for a, d in zip(tree.flatten(aux), d_aux) if a.dtype.is_floating and d is not None]
    targets, grads = [out, *(a for a, _ in pairs)], [d_out, *(d for _, d in pairs)]
    return tape.gradient(targets, inputs, grads, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def _scan(fn: LayerFn, params: Tree, extra: Tree, x: tf.Tensor, layers: int) -> tuple[tf.Tensor, Tree]:
    extras = tree.flatten(extra)
    structure: list[Any] = []

    def layer_extra(i):
        return tree.unflatten_as(extra, [e[i] for e in extras])

    @tf.custom_gradient
    def run(x, *leaves):
        def one(i, x):
            return fn(tree.unflatten_as(params, [leaf[i] for leaf in leaves]), layer_extra(i), x)

        out, inputs, aux = _scan_forward(one, x, layers, structure)

        def grad(d_out, *d_aux):
            def body(i, d_x, d_leaves):
                here = [tf.identity(inputs[i]), *(tf.identity(leaf[i]) for leaf in leaves)]
                found = _vjp(fn, params, layer_extra(i), here, d_x, [None if d is None else d[i] for d in d_aux])
                return i - 1, found[0], [a.write(i, g) for a, g in zip(d_leaves, found[1:])]

            arrays = [tf.TensorArray(t.dtype, layers, element_shape=t.shape[1:]) for t in leaves]
            start = [tf.constant(layers - 1), d_out, arrays]
            _, d_x, arrays = tf.while_loop(lambda i, *_: i >= 0, body, start, parallel_iterations=1)
            return [d_x, *(a.stack() for a in arrays)]

        return (out, *aux), grad

    out, *aux = run(x, *tree.flatten(params))
    return out, tree.unflatten_as(structure[0], aux)


def _scan_forward(one, x, layers: int, structure: list[Any]):
    """Runs the loop; keeps each layer's input and aux. The first layer is traced once more to learn aux's structure."""
    probe = tf.function(lambda i, x: one(i, x), autograph=False)
    out_spec = probe.get_concrete_function(
        tf.TensorSpec([], tf.int32), tf.TensorSpec(x.shape, x.dtype)
    ).structured_outputs
    structure.append(out_spec[1])
    specs = tree.flatten(out_spec[1])
    inputs = tf.TensorArray(x.dtype, layers, element_shape=x.shape)
    arrays = [tf.TensorArray(s.dtype, layers, element_shape=s.shape) for s in specs]

    def body(i, x, inputs, arrays):
        y, aux = one(i, x)
        return i + 1, y, inputs.write(i, x), [a.write(i, t) for a, t in zip(arrays, tree.flatten(aux))]

    start = [tf.constant(0), x, inputs, arrays]
    _, out, inputs, arrays = tf.while_loop(lambda i, *_: i < layers, body, start, parallel_iterations=1)
    return out, inputs.stack(), [a.stack() for a in arrays]
