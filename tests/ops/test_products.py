"""Products with matrices that are stored transposed."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3.ops.products import matmul_linear, matmul_transposed
from tests.compare import assert_close, check_gradient, memory_beside, normal


def products(fn, *shapes, dtype=tf.float32):
    """The graph's products as they are written: whether each has a transposed operand on the right."""
    graph = tf.function(fn, autograph=False).get_concrete_function(*(tf.TensorSpec(s, dtype) for s in shapes))
    graph(*(tf.zeros([2 if d is None else d for d in s], dtype) for s in shapes))
    return [op.get_attr("transpose_b") for op in graph.graph.get_operations() if op.type == "MatMul"]


@pytest.mark.parametrize(("m", "n", "k"), [(3, 512, 512), (1030, 5, 7), (260, 3, 512), (4, 6, 512), (5, 3, 4)])
def test_is_the_product(m, n, k):
    x, w = normal(0, m, k), normal(1, n, k)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    for fuse in (False, True):
        assert_close(matmul_transposed(tf.constant(x), tf.constant(w), fuse=fuse), want, 1e-5)  # sums of 512 terms


def test_a_copy_is_made_where_it_pays():
    def copied(m, n, k, rows=None, dtype=tf.float32, fuse=True):
        found = products(lambda x, w: matmul_transposed(x, w, fuse=fuse, rows=rows), [m, k], [n, k], dtype=dtype)
        assert len(found) == 1
        return not found[0]

    assert copied(3, 512, 512) and copied(1024, 8, 8) and copied(256, 8, 512) and copied(None, 8, 512, rows=300)
    assert not copied(255, 8, 512) and not copied(3, 512, 500) and not copied(None, 8, 512)
    assert not copied(3, 512, 512, dtype=tf.bfloat16) and not copied(3, 512, 512, fuse=False)


def test_a_copy_stays_one():
    """A graph optimiser folds a transposition into the product that reads it, unless it is of three dims."""
    x, w = tf.constant(normal(0, 4, 512)), tf.constant(normal(1, 512, 512))
    fn = tf.function(lambda x, w: matmul_transposed(x, w, fuse=True), autograph=False)
    run = fn.get_concrete_function(tf.TensorSpec(x.shape), tf.TensorSpec(w.shape))
    options = tf.compat.v1.ConfigProto()
    options.graph_options.rewrite_options.min_graph_nodes = -1
    tf_optimizer = pytest.importorskip("tensorflow.python.grappler.tf_optimizer")  # not public
    saver = pytest.importorskip("tensorflow.python.training.saver")
    meta = saver.export_meta_graph(graph_def=run.graph.as_graph_def(), graph=run.graph)
    meta.collection_def["train_op"].node_list.value.extend([run.outputs[0].name])
    nodes = tf_optimizer.OptimizeGraph(options, meta).node
    assert [n.attr["transpose_b"].b for n in nodes if n.op in ("MatMul", "_MklMatMul")] == [False]
    assert any("Transpose" in n.op for n in nodes)


def test_copies_do_not_wait_beside_each_other():
    """Eight layers' matrices are not all copied at the beginning of a step."""
    layers, x = [tf.fill([1024, 1024], 1e-3) for _ in range(8)], tf.ones([64, 1024])

    @tf.function(autograph=False)
    def grads(x, layers):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for w in layers:
                y = tf.tanh(matmul_linear(y, w, fuse=True))
        return tape.gradient(y, x)

    grads(x, layers)
    more = memory_beside(lambda: grads(x, layers))
    assert more < 5 * (4 << 20), f"{more:,} bytes, where the copies of all eight are {32 << 20:,}"


@pytest.mark.parametrize("fuse", [False, True])
def test_gradient_of_a_linear_product(fuse):
    check_gradient(
        lambda x, w: matmul_linear(x, w, fuse=fuse), lambda x, w: x @ w, [normal(0, 260, 2), normal(1, 2, 512, scale=0.1)]
    )


def test_a_linear_product_goes_back_by_the_faster_way():
    def grads(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = matmul_linear(x, w, fuse=True)
        return tape.gradient(y, [x, w])

    assert products(grads, [260, 8], [8, 512]) == [False, False, False]
    assert products(grads, [20, 8], [8, 512]) == [False, True, False]
