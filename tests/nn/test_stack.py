"""Stacks of layers: unrolled, with recomputation, and as a loop are one function with one gradient."""

from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import tree
from dsv3.nn.stack import stack_apply
from tests.compare import assert_close, gradients, normal

HOWS = {
    "unroll": {},
    "remat": {"remat": "block"},
    "scan": {"loop": "scan"},
    "scan and remat": {"loop": "scan", "remat": "block"},
}


class Layer(NamedTuple):
    weight: tf.Tensor
    inner: dict
    absent: tuple


class Aux(NamedTuple):
    mean: tf.Tensor
    top: tf.Tensor
    out: tf.Tensor


def layer(params, extra, x):
    """A layer with a floating, an integer and a differentiable auxiliary result."""
    h = tf.tanh(x @ params.weight + params.inner["shift"]) * extra["scale"]
    return x + h, Aux(tf.reduce_mean(tf.sin(h)), tf.argmax(h, -1, tf.int32), tf.square(h))


def stack(layers, dtype=tf.float32):
    weight, shift = normal(0, layers, 4, 4), normal(1, layers, 4)
    params = Layer(tf.constant(weight), {"shift": tf.constant(shift)}, ())
    return tree.map_leaves(lambda p: tf.cast(p, dtype), params), {"scale": tf.constant(normal(2, layers, 1), dtype)}


def by_hand(params, extra, x):
    auxes = []
    for i in range(params.weight.shape[0]):
        x, aux = layer(tree.slice_leading(params, i), tree.slice_leading(extra, i), x)
        auxes.append(aux)
    return x, Aux(*(tf.stack(leaves) for leaves in zip(*auxes)))


def values_and_gradients(run, params, extra, x, use):
    """Values, and the gradient of what `use` picks of the results, for the input and all parameters."""

    def fn(x, *leaves):
        return use(*run(tree.unflatten_as(params, leaves), extra, x))

    out, aux = run(params, extra, x)
    return [out, *aux, *gradients(fn, [x, *tree.flatten(params)])]


USES = {
    "output": lambda out, aux: tf.reduce_sum(tf.sin(out)),
    "aux": lambda out, aux: tf.reduce_sum(aux.mean * [1.0, 2.0, 3.0]),
    "all": lambda out, aux: tf.reduce_sum(out * out) + tf.reduce_sum(aux.mean) + tf.reduce_sum(aux.out[1]),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", HOWS)
def test_values_and_gradients(how, use, compiled):
    params, extra = stack(3)
    x = tf.constant(normal(3, 2, 4))

    def computed():
        return values_and_gradients(lambda p, e, x: stack_apply(layer, p, e, x, **HOWS[how]), params, extra, x, USES[use])

    fn = tf.function(computed, autograph=False) if compiled else computed
    for got, want in zip(fn(), values_and_gradients(by_hand, params, extra, x, USES[use])):
        assert_close(got, want)


@pytest.mark.parametrize("how", HOWS)
def test_under_xla(how):
    params, extra = stack(3)
    x = tf.constant(normal(3, 2, 4))
    fn = tf.function(
        lambda: values_and_gradients(
            lambda p, e, x: stack_apply(layer, p, e, x, **HOWS[how]), params, extra, x, USES["all"]
        ),
        jit_compile=True,
        autograph=False,
    )
    for got, want in zip(fn(), values_and_gradients(by_hand, params, extra, x, USES["all"])):
        assert_close(got, want)


@pytest.mark.parametrize("how", HOWS)
def test_one_layer_and_none(how):
    params, extra = stack(1)
    x = tf.constant(normal(3, 2, 4))
    out, aux = stack_apply(layer, params, extra, x, **HOWS[how])
    assert_close(out, by_hand(params, extra, x)[0])
    assert aux.top.shape == (1, 2)
    out, aux = stack_apply(layer, (), (), x, **HOWS[how])
    assert aux == ()
    assert_close(out, x)


@pytest.mark.parametrize("how", HOWS)
def test_bfloat16(how):
    params, extra = stack(3, tf.bfloat16)
    x = tf.cast(normal(3, 2, 4), tf.bfloat16)

    def fn(x, *leaves):
        return stack_apply(layer, tree.unflatten_as(params, leaves), extra, x, **HOWS[how])[0]

    assert fn(x, *tree.flatten(params)).dtype == tf.bfloat16
    for got, want in zip(
        gradients(fn, [x, *tree.flatten(params)]),
        gradients(lambda x, *leaves: by_hand(tree.unflatten_as(params, leaves), extra, x)[0], [x, *tree.flatten(params)]),
    ):
        assert got.dtype == tf.bfloat16
        assert_close(got, want, 1e-2)  # the order of two roundings to 2^-9


def traced_graph(layers, how):
    """Returns the graph of a stack's gradient and how often the layer was traced for it."""
    params, extra = stack(layers)
    calls = []

    def counted(*args):
        calls.append(1)
        return layer(*args)

    def fn(x, *leaves):
        return stack_apply(counted, tree.unflatten_as(params, leaves), extra, x, **HOWS[how])[0]

    inputs = [tf.constant(normal(3, 2, 4)), *tree.flatten(params)]
    graph = tf.function(lambda: gradients(fn, inputs), autograph=False).get_concrete_function().graph
    return graph, len(calls)


def test_recomputation_traces_each_layer_again():
    assert [traced_graph(3, how)[1] for how in ("unroll", "remat")] == [3, 6]


def test_scan_costs_the_same_for_any_depth():
    shallow, deep = traced_graph(2, "scan"), traced_graph(6, "scan")
    assert shallow[1] == deep[1] <= 3
    assert len(shallow[0].get_operations()) == len(deep[0].get_operations())


def test_recomputation_waits_for_the_gradient():
    """Each recomputed tanh depends, through control inputs, on the gradient that arrives; else it could run at once."""
    graph, _ = traced_graph(2, "remat")
    waiting = [op for op in graph.get_operations() if op.type == "Identity" and op.control_inputs]
    assert len(waiting) >= 2 * 2


def test_extra_may_be_empty():
    params, _ = stack(2)
    x = tf.constant(normal(3, 2, 4))
    outs = [
        stack_apply(lambda p, e, x: (tf.tanh(x @ p.weight), ()), params, (), x, **how)[0].numpy() for how in HOWS.values()
    ]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=1e-6)
