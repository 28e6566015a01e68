"""Element-wise chains compiled inside a plain graph, and the reductions in them."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.fuse import fused
from dsv3.ops.reduce import cpu_kernel, dim_max, halving_max, row_max, row_parts, row_sum
from tests.compare import SWEEP, assert_close, check_gradient, gradients, normal

runs = []


@fused
def chain(x, y, shift, *, power):
    runs.append(power)
    return tf.sin(x) * y**power + tf.cast(shift, tf.float32), tf.reduce_sum(x * x, -1)


INPUTS = [normal(0, 2, 5), normal(1, 2, 5), np.array([1, 2, 3, 4, 5], np.int32)]


@pytest.mark.parametrize("power", [1, 2])
def test_values_and_gradients_of_several_results(power):
    x, y, shift = map(tf.constant, INPUTS)
    for got, want in zip(chain(x, y, shift, power=power, fuse=True), chain(x, y, shift, power=power)):
        assert_close(got, want)

    def both(fuse):
        return gradients(lambda a, b: chain(a, b, shift, power=power, fuse=fuse), [x, y])

    for got, want in zip(both(True), both(False)):
        assert_close(got, want)


def test_integers_get_no_gradient():
    x, y, shift = map(tf.constant, INPUTS)
    with tf.GradientTape() as tape:
        tape.watch([x, shift])
        out = chain(x, y, shift, power=1, fuse=True)[0]
    d_x, d_shift = tape.gradient(out, [x, shift])
    assert d_x is not None and d_shift is None


def test_one_result_alone():
    double = fused(lambda x: 2.0 * x)
    assert_close(double(tf.constant(INPUTS[0]), fuse=True), 2.0 * INPUTS[0])
    assert_close(gradients(lambda x: double(x, fuse=True), INPUTS[:1])[0], np.full([2, 5], 2.0))


def test_a_gradient_written_by_hand_is_taken_where_the_kernel_is():
    def gradient(x, shift, d, *, power):
        return tf.fill(x.shape, 7.0) * d * power, None

    square = fused(lambda x, shift, *, power: x**power + tf.cast(shift, tf.float32), gradient=gradient)
    x, shift = tf.constant([3.0, 4.0]), tf.constant([1, 2])
    assert_close(square(x, shift, power=2, fuse=True), np.array([10.0, 18.0]))
    assert_close(gradients(lambda x: square(x, shift, power=2, fuse=True), [x])[0], np.array([14.0, 14.0]))
    assert_close(gradients(lambda x: square(x, shift, power=2), [x])[0], np.array([6.0, 8.0]))
    decorated = fused(gradient=lambda x, d: (3.0 * d,))(lambda x: x)
    assert_close(gradients(lambda x: decorated(x, fuse=True), [x])[0], np.full([2], 3.0))


def test_each_signature_is_traced_once():
    x, y, shift = map(tf.constant, INPUTS)
    chain(x, y, shift, power=3, fuse=True)
    runs.clear()
    for _ in range(3):
        chain(x + 1.0, y, shift, power=3, fuse=True)
    assert runs == []
    chain(x, y, shift, power=4, fuse=True)
    assert runs == [4]


def test_inside_a_graph_with_unknown_rows_and_under_xla():
    spec = [tf.TensorSpec([None, 5]), tf.TensorSpec([None, 5]), tf.TensorSpec([5], tf.int32)]
    want = chain(*map(tf.constant, INPUTS), power=2)
    for jit in (False, True):
        fn = tf.function(lambda *t: chain(*t, power=2, fuse=True), input_signature=spec, jit_compile=jit, autograph=False)
        for got, expected in zip(fn(*INPUTS), want):
            assert_close(got, expected)


def test_arrays_alone_are_not_compiled():
    runs.clear()
    chain(*INPUTS, power=5, fuse=True)
    chain(*INPUTS, power=5, fuse=True)
    assert runs == [5, 5]


@SWEEP
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from([1, 5, 33, 64, 65, 96, 131]), st.integers(0, 99))
def test_reductions_are_the_same_in_a_kernel(lead, width, seed):
    x = normal(seed, *lead, width)
    with cpu_kernel():
        total, top = row_sum(tf.constant(x)), row_max(tf.constant(x))
    # A sum of terms of mixed sign is compared with the sum of their sizes.
    assert np.abs(total - x.sum(-1, keepdims=True)).max() <= 2e-6 * np.abs(x).sum(-1).max()
    np.testing.assert_array_equal(top, x.max(-1, keepdims=True))
    np.testing.assert_array_equal(row_max(tf.constant(x)), top)
    assert np.abs(row_sum(tf.constant(x)) - total).max() <= 2e-6 * np.abs(x).sum(-1).max()


@SWEEP
@given(st.sampled_from([1, 32, 255, 256, 512, 768]), st.integers(0, 99))
def test_parts_make_up_the_row(size, seed):
    x = normal(seed, 2, size)
    with cpu_kernel():
        parts = row_parts(tf.constant(x))
    assert len(parts) == (8 if size % 256 == 0 else 1)
    np.testing.assert_array_equal(tf.concat(parts, -1), x)
    np.testing.assert_array_equal(row_parts(tf.constant(x))[0], x)


@SWEEP
@given(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 6, 8, 64]), st.sampled_from([1, 2, 5, 16])), st.integers(0, 99))
def test_a_maximum_by_halves_is_the_maximum(shape, seed):
    x = normal(seed, *shape)
    for dim in (-1, -2):
        with cpu_kernel():
            found, plain = halving_max(tf.constant(x), dim), dim_max(tf.constant(x), dim)
        np.testing.assert_array_equal(found, x.max(dim))
        np.testing.assert_array_equal(plain, found)
        np.testing.assert_array_equal(halving_max(tf.constant(x), dim), found)


@pytest.mark.parametrize("width", [3, 65])
def test_a_maximum_of_what_is_infinite_or_no_number(width):
    x = np.full([5, width], -np.inf, np.float32)
    x[1, 1], x[2, 2], x[3, 0], x[4] = np.inf, np.nan, -0.0, np.nan
    with cpu_kernel():
        top = row_max(tf.constant(x))[:, 0].numpy()
        assert np.isnan(row_max(tf.constant(-x))[4, 0])
    assert np.isneginf(top[0]) and np.isposinf(top[1]) and top[3] == 0 and np.isnan(top[4])


def test_a_kernel_ends_with_its_block():
    x = tf.ones([1, 64])

    def products():
        graph = tf.function(lambda: row_sum(x)).get_concrete_function().graph
        return sum(op.type == "MatMul" for op in graph.get_operations())

    with pytest.raises(KeyError), cpu_kernel():
        assert products() == 1
        raise KeyError
    assert products() == 0


def test_gradient_of_a_sum_in_a_kernel():
    sine_sum = fused(lambda x: row_sum(tf.sin(x)))
    check_gradient(lambda x: sine_sum(x, fuse=True), lambda x: np.sin(x).sum(-1, keepdims=True), [normal(0, 2, 40)])
