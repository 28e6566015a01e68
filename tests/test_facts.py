"""What TensorFlow does where dsv3 relies on it. A test that fails here says which assumption a new version broke."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import tree as dm_tree

from dsv3 import tree
from dsv3.compiled import RowWrite, compile_step, place
from dsv3.ops.norm import rms_norm
from dsv3.ops.router import take_experts
from tests.small import KEY


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: object


class Pair(NamedTuple):
    first: tf.Tensor
    second: tuple


# Trees


@pytest.mark.parametrize("library", [tf.nest, dm_tree])
def test_named_tuples_are_trees_and_dataclasses_are_leaves(library):
    pair = Pair(tf.constant(1.0), ())
    assert len(library.flatten({"a": pair, "b": [pair]})) == 2
    mapped = library.map_structure(lambda x: x + 1, pair)
    assert type(mapped) is Pair and mapped.second == ()
    assert library.flatten(Frozen(1)) == [Frozen(1)]
    assert library.flatten(Pair(None, ())) == [None], "None is a leaf"


def test_tf_function_refuses_a_dataclass_that_holds_tensors():
    for fn, argument in ((lambda c: c.value + 1, Frozen(tf.constant(1.0))), (lambda x: Frozen(x + 1), tf.constant(1.0))):
        with pytest.raises(TypeError):
            tf.function(fn, autograph=False)(argument)


def test_tf_function_takes_and_returns_named_tuples():
    out = tf.function(lambda p: Pair(p.first * 2, ()), autograph=False)(Pair(tf.constant(1.0), ()))
    assert type(out) is Pair and float(out.first) == 2.0 and out.second == ()


# Retracing


def test_fresh_objects_and_python_numbers_trace_anew_but_a_closure_does_not():
    x = tf.ones([2])
    with_object = tf.function(lambda c, x: x, autograph=False)
    with_number = tf.function(lambda n, x: x * n, autograph=False)
    for i in range(5):
        with_object(Frozen(1), x)  # equal, but the one of the call before is gone
        with_number(float(i), x)
    bound = Frozen(2.0)
    closure = tf.function(lambda n, x: x * n * bound.value, autograph=False)
    for i in range(5):
        closure(tf.constant(float(i)), x)
    counts = [f.experimental_get_tracing_count() for f in (with_object, with_number, closure)]
    assert counts == [5, 5, 1]


# Gradients


def test_unconnected_gradient_is_none_unless_asked_for_zeros():
    x = tf.ones([2])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tf.constant(1.0)
    assert tape.gradient(y, x) is None
    zeros = tape.gradient(y, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    assert zeros.numpy().tolist() == [0.0, 0.0]


def op_types(fn, *arguments):
    graph = tf.function(fn, autograph=False).get_concrete_function(*arguments).graph
    return {op.type for op in graph.get_operations()}


def test_gradient_of_a_batched_gather_is_a_scatter_which_take_experts_avoids():
    experts = tf.constant([[0, 2], [1, 0]])

    def gradient(take):
        def fn(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(take(x))
            return tf.convert_to_tensor(tape.gradient(y, x))

        return op_types(fn, tf.ones([2, 3]))

    def scatters(types):
        return [t for t in types if "Scatter" in t or "SegmentSum" in t]

    assert scatters(gradient(lambda x: tf.gather(x, experts, batch_dims=1)))
    assert not scatters(gradient(lambda x: take_experts(x, experts)))


# AutoGraph


def test_errors_of_a_callers_function_end_with_ours():
    """With autograph=False the error is ours alone; AutoGraph in a caller's function puts its trace before it."""

    def fn(x):
        return rms_norm(x, tf.ones([3]))

    message = "rms_norm: `weight` has shape (3,), want (4,) [D]"
    with pytest.raises(ValueError) as plain:
        tf.function(fn, autograph=False)(tf.ones([2, 4]))
    assert str(plain.value) == message
    with pytest.raises(ValueError) as converted:
        tf.function(fn)(tf.ones([2, 4]))
    lines = str(converted.value).strip().splitlines()
    assert len(lines) > 5 and lines[-1].strip() == f"ValueError: {message}"


def test_library_functions_are_not_converted(monkeypatch):
    """AutoGraph would run the source of every function that a caller's function calls through its converter."""
    from tensorflow.python.autograph.impl import api

    converted, convert = [], api._convert_actual
    monkeypatch.setattr(api, "_convert_actual", lambda entity, *rest: converted.append(entity) or convert(entity, *rest))
    tf.function(lambda x: rms_norm(x, tf.ones([4])))(tf.ones([2, 4]))
    assert {fn.__module__ for fn in converted} == {__name__}


# XLA


def test_random_numbers_differ_inside_xla():
    """Why initial parameters are drawn outside of compiled steps. If this fails, `model_init` may be compiled."""

    def draw():
        return tf.random.stateless_normal([8], KEY)

    graph, xla = (tf.function(draw, jit_compile=jit, autograph=False)() for jit in (False, True))
    np.testing.assert_array_equal(draw(), graph)
    assert np.abs(draw() - xla).max() > 0.1


def test_top_k_and_argsort_keep_the_order_of_ties():
    values = tf.constant([[1.0, 2.0, 2.0, 1.0, 2.0]])
    for jit in (False, True):
        fn = tf.function(
            lambda: (tf.math.top_k(values, 5).indices, tf.argsort(values, stable=True), tf.argmax(values, -1)),
            jit_compile=jit,
            autograph=False,
        )
        top, sort, best = (t.numpy().tolist() for t in fn())
        assert top == [[1, 2, 4, 0, 3]] and sort == [[0, 3, 1, 2, 4]] and best == [1]


# Memory


def address(variable):
    """Returns where a variable's values lie; holds no reference to them afterwards. (Small ones would be copied here.)"""
    return np.array(memoryview(variable.read_value()), copy=False).__array_interface__["data"][0]


def moves(fn, steps=12):
    """Runs a step on a leaf of 1.6 MB and counts how often its values moved."""
    step = compile_step(fn)
    state = place({"kv": tf.zeros([2, 2, 100_000])})
    state, _ = step(state, tf.ones([2, 2, 1]), tf.constant([0, 5]))
    found = [address(state["kv"])]
    for i in range(steps):
        state, _ = step(state, tf.ones([2, 2, 1]), tf.constant([i, 5 + i]))
        found.append(address(state["kv"]))
    return sum(a != b for a, b in zip(found, found[1:]))


def test_row_write_does_not_copy_the_leaf():
    """A step that reads its cache and writes some rows keeps the buffer; one that returns a new leaf does not."""

    def decode(state, values, starts):
        read = tf.reduce_sum(state["kv"], 2, keepdims=True)
        return {"kv": RowWrite(values + 0.0 * read, starts)}, read

    def whole(state, values, starts):
        return {"kv": state["kv"] + tf.reduce_sum(values)}, starts

    # A reader that is late in letting go of the old values may force a copy now and then.
    assert moves(decode) <= 3
    assert moves(whole) >= 9


def test_a_leaf_that_is_returned_as_it_came_is_not_written():
    step = compile_step(lambda s: ({"a": s["a"], "b": s["b"] + 1.0}, ()))
    state = place({"a": tf.ones([100_000]), "b": tf.ones([1])})
    state, _ = step(state)
    before = address(state["a"])
    state, _ = step(state)
    assert address(state["a"]) == before
    assert tree.map_leaves(lambda v: float(v[0]), state) == {"a": 1.0, "b": 3.0}


# FP8


def test_float8_is_sliced_and_gathered_but_neither_padded_nor_scattered_nor_taken_into_a_loop():
    """So products go through float32 or bfloat16 there, which have every value of FP8 (`ops/gemm_grouped.py`)."""
    x = tf.cast(tf.range(6.0)[:, None], tf.dtypes.experimental.float8_e4m3fn)
    for fn in (lambda: tf.split(x, [2, 4])[1], lambda: tf.concat([x, x], 0), lambda: tf.gather(x, [1]), lambda: x[:, :1]):
        assert fn().dtype == x.dtype
    for fn in (lambda: tf.pad(x, [[0, 1], [0, 0]]), lambda: tf.scatter_nd([[0]], x[:1], [2, 1])):
        with pytest.raises((tf.errors.NotFoundError, tf.errors.InvalidArgumentError)):
            fn()

    def add(x):
        return tf.while_loop(lambda i, y: i < 6, lambda i, y: (i + 1, y + tf.cast(x[i, 0], y.dtype)), [0, 0.0])[1]

    with pytest.raises((tf.errors.InternalError, tf.errors.InvalidArgumentError), match="Switch"):
        tf.function(add, autograph=False)(x)
    assert tf.function(add, autograph=False)(tf.cast(x, tf.bfloat16)) == 15
