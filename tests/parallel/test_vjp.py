"""A function split into forward, backward for the input and backward for the weights gives the gradients of the whole."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import tree
from dsv3.nn.block import block_apply, block_specs
from dsv3.nn.mla import mla_rope
from dsv3.ops.loss import token_nll
from dsv3.parallel.vjp import split_vjp
from dsv3.policy import ComputePolicy
from tests.compare import FUSED, PLAIN, assert_close, normal
from tests.small import model_config, random_params


def run_split(fn, params, inputs, d_outputs, **kwargs):
    """Runs the three programs; returns outputs, gradients of inputs and of parameters."""
    leaves = tree.flatten(params)
    vjp = split_vjp(fn, params, inputs, **kwargs)
    outputs, residuals = vjp.forward(leaves, inputs)
    assert not (kwargs.get("remat") and residuals)
    inputs = [x if i in vjp.reads else None for i, x in enumerate(inputs)]
    d_inputs, messages = vjp.backward(leaves, inputs, residuals, d_outputs)
    kept = [r if i in vjp.weight_residuals else None for i, r in enumerate(residuals)]
    return outputs, d_inputs, vjp.weights(leaves, inputs, kept, messages)


def run_whole(fn, params, inputs, d_outputs):
    watched = [x for x in (*tree.flatten(params), *inputs) if x.dtype.is_floating]
    with tf.GradientTape() as tape:
        tape.watch(watched)
        outputs = tree.flatten(fn(params, *inputs))
    floating = [y for y in outputs if y.dtype.is_floating]
    d_outputs = [tf.zeros_like(y) if d is None else d for d, y in zip(d_outputs, floating)]
    return outputs, dict(zip(map(id, watched), tape.gradient(floating, watched, d_outputs)))


def check_split(fn, params, inputs, d_outputs, tolerance=2e-6, **kwargs):
    params = tree.map_leaves(tf.convert_to_tensor, params)
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    outputs, d_inputs, d_params = run_split(fn, params, inputs, d_outputs, **kwargs)
    want, grads = run_whole(fn, params, inputs, d_outputs)
    for got, y in zip(outputs, want, strict=True):
        assert_close(got, y, tolerance)
    for x, got in zip((*inputs, *tree.flatten(params)), (*d_inputs, *d_params), strict=True):
        expected = grads.get(id(x))
        assert (got is None) == (expected is None)
        if got is not None:
            assert_close(got, expected, tolerance)
    return d_inputs, d_params


BLOCKS = [(dense, policy) for dense in (True, False) for policy in (PLAIN, FUSED)]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(("dense", "policy"), [*BLOCKS, (False, PLAIN.replace(attention_keep=0))])
def test_a_block(dense, policy: ComputePolicy, remat):
    cfg = model_config()
    params = random_params(block_specs(cfg, dense=dense))

    def fn(p, bias, x):
        out = block_apply(p, () if dense else bias, x, cfg=cfg, table=mla_rope(cfg.mla, tf.range(5)), policy=policy)
        return (out.out, *out.stats) if out.stats else out.out

    d = [tf.constant(normal(1, 2, 5, 12)), *([] if dense else [None, tf.constant(0.3)])]
    check_split(fn, params, [np.zeros(6, np.float32), normal(0, 2, 5, 12)], d, remat=remat)


def test_what_only_weights_need_waits():
    """In a chain of two products the backward for the input does one product a layer, and so does that for the weights."""

    def fn(p, x):
        return tf.matmul(tf.tanh(tf.matmul(x, p["a"])), p["b"])

    params = {"a": tf.constant(normal(0, 3, 4)), "b": tf.constant(normal(1, 4, 5))}
    x = tf.constant(normal(2, 7, 3))
    check_split(fn, params, [x], [tf.constant(normal(3, 7, 5))])
    counts = count_products(split_vjp(fn, params, [x]))
    assert counts == {"forward": 2, "backward": 2, "weights": 2}


def count_products(vjp) -> dict[str, int]:
    """Matrix products of each program, from the closures' compiled functions."""
    found = {}
    for name, program in (("forward", vjp.forward), ("backward", vjp.backward), ("weights", vjp.weights)):
        pruned = next(c.cell_contents for c in program.__closure__ if callable(c.cell_contents))
        run = next(c.cell_contents for c in pruned.__closure__ if hasattr(c.cell_contents, "graph"))
        found[name] = sum(op.type == "MatMul" for op in run.graph.get_operations())
    return found


def test_integers_unused_and_passed_through():
    def fn(p, index, x):
        return tf.gather(p["table"], index), x, index + 1, x * p["scale"]

    params = {"table": normal(0, 4, 3), "scale": np.float32(2.0), "unused": normal(1, 2)}
    d = [tf.constant(normal(2, 5, 3)), None, tf.constant(normal(3, 3))]
    d_inputs, d_params = check_split(fn, params, [np.array([0, 3, 3, 1, 0], np.int32), normal(4, 3)], d)
    assert d_inputs[0] is None and d_params[2] is None  # in the order of names: scale, table, unused


def test_reading_tensors_from_outside_is_refused():
    outside = tf.Variable([1.0, 2.0])
    with pytest.raises(ValueError, match="split_vjp: `fn` reads tensors from outside"):
        split_vjp(lambda p, x: x * outside, {}, [tf.TensorSpec([2])])


def test_operations_with_a_state_are_refused():
    """Random numbers would be drawn anew for the backward pass."""
    with pytest.raises(ValueError, match="split_vjp: `fn` has the operation .*, which has a state: want pure operations"):
        split_vjp(lambda p, x: x * tf.random.uniform([2]), {}, [tf.TensorSpec([2])])


def test_jit_compiles():
    """What XLA cannot compile is refused, so what is accepted has been compiled."""
    params, x = {"w": tf.constant(normal(0, 3, 3))}, tf.constant(normal(1, 2, 3))
    check_split(lambda p, x: tf.tanh(tf.matmul(x, p["w"])), params, [x], [x], 1e-5, jit=True)
    vjp = split_vjp(lambda p, x: tf.strings.length(tf.strings.as_string(x)), {}, [x], jit=True)
    with pytest.raises(tf.errors.InvalidArgumentError):
        vjp.forward([], [x])


@pytest.mark.parametrize("how", [{"chunk": 2}, {"keep": 6 * 16}])
def test_a_loss_leaves_only_tensors_for_the_backward(how):
    """What is in a list of tensors could not cross from one compiled program to another."""
    inputs = [normal(1, 6, 8), np.array([0, 5, 15, 2, 1, 7], np.int32)]
    check_split(
        lambda p, x, t: token_nll(x, p["w"], t, **how), {"w": normal(0, 8, 16)}, inputs, [tf.constant(normal(2, 6))], 1e-5,
        jit=True,
    )  # fmt: skip


def test_what_depends_on_parameters_alone_is_computed_again_and_not_kept():
    params, x = {"w": tf.constant(normal(0, 300, 3))}, tf.constant(normal(1, 2, 300))
    vjp = split_vjp(lambda p, x: tf.matmul(tf.nn.relu(x), 2.0 * tf.transpose(p["w"]), transpose_b=True), params, [x])
    _, residuals = vjp.forward([params["w"]], [x])
    assert sum(int(tf.size(r)) for r in residuals) <= 2 * x.shape[0] * x.shape[1]


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_several_outputs_of_one_operation(rows, width, swap):
    """Parts of a split that the backward pass needs and parts that it does not."""

    def fn(p, x):
        a, b, c = tf.split(tf.matmul(x, p["w"]), 3, axis=-1)
        a, b = (b, a) if swap else (a, b)
        return a * tf.sigmoid(b) + c, tf.reduce_sum(b)

    params = {"w": normal(rows, width, 3 * width)}
    check_split(fn, params, [normal(1, rows, width)], [tf.constant(normal(2, rows, width)), tf.constant(0.5)])
