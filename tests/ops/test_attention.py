"""Attention: all scores at once, in unrolled blocks, and in loops over tiles are one function with one gradient."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.attention import NEVER, AttentionMask, attention, attention_naive, causal_mask
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, gradients, normal

KERNELS = {
    "naive": lambda q, k, v, mask, *, scale, causal, block, fuse: attention_naive(q, k, v, mask, scale=scale),
    "blocks": attention,
    "blocks, recomputed": lambda *args, **how: attention(*args, **how, keep=0),
    "tiles": lambda *args, **how: attention(*args, **how, max_unroll=0),
}


def run(kernel, q, k, v, mask, *, causal=False, block=3, fuse=False):
    return KERNELS[kernel](q, k, v, mask, scale=0.4, causal=causal, block=block, fuse=fuse)


def tensors(batch, heads, length, keys, qk_dim, v_dim):
    lengths_dims = (length, qk_dim), (keys, qk_dim), (keys, v_dim)
    return [normal(i, batch, heads, *rest) for i, rest in enumerate(lengths_dims)]


def index_mask(seed, rows, length, keys):
    """Random key and query indices and segments, with queries that see nothing and keys that nobody sees."""
    rng = np.random.default_rng(seed)
    k_index = np.where(rng.random((rows, keys)) < 0.2, NEVER, rng.integers(0, 6, (rows, keys)))
    segments = (rng.integers(0, 2, (rows, n)) for n in (length, keys))
    return AttentionMask(*(tf.constant(p, tf.int32) for p in (rng.integers(-1, 6, (rows, length)), k_index, *segments)))


def seen_by(mask):
    q_index, k_index, q_segment, k_segment = (m.numpy() for m in mask)
    return (k_index[:, None] <= q_index[:, :, None]) & (k_segment[:, None] == q_segment[:, :, None])


@SWEEP
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 9)),
    dims=st.sampled_from([(1, 1), (4, 3), (2, 5)]),
    block=st.integers(1, 10),
    segmented=st.booleans(),
)
def test_causal(sizes, dims, block, segmented):
    batch, heads, length = sizes
    q, k, v = tensors(batch, heads, length, length, *dims)
    segments = np.sort(np.random.default_rng(length).integers(0, 3, (batch, length))) if segmented else None
    want = oracles.attention(q, k, v, oracles.causal(length, segments), 0.4)
    for kernel in KERNELS:
        for causal in (True, False):
            assert_close(run(kernel, q, k, v, causal_mask(length, segments), causal=causal, block=block), want, what=kernel)


@SWEEP
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 8)),
    block=st.integers(1, 5),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_explicit_indices(sizes, block, shared, seed):
    batch, length, keys = sizes
    q, k, v = tensors(batch, 2, length, keys, 4, 3)
    mask = index_mask(seed, 1 if shared else batch, length, keys)
    want = oracles.attention(q, k, v, seen_by(mask), 0.4)
    for kernel in KERNELS:
        assert_close(run(kernel, q, k, v, mask, block=block), want, what=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length", [1, 4, 7])
def test_causal_gradient(kernel, length):
    segments = np.arange(length)[None] // 3
    mask = causal_mask(length, segments)
    check_gradient(
        lambda q, k, v: run(kernel, q, k, v, mask, causal=True),
        lambda q, k, v: oracles.attention(q, k, v, oracles.causal(length, segments), 0.4),
        tensors(1, 2, length, length, 4, 3),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (5, 8), (7, 2)])
def test_gradient_with_blind_queries_and_padding(kernel, length, keys):
    mask = index_mask(length, 2, length, keys)
    assert length == 1 or not seen_by(mask).any(-1).all()
    check_gradient(
        lambda q, k, v: run(kernel, q, k, v, mask),
        lambda q, k, v: oracles.attention(q, k, v, seen_by(mask), 0.4),
        tensors(2, 2, length, keys, 4, 3),
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_query_that_sees_no_key_gives_zeros_and_no_gradient(kernel):
    q, k, v = tensors(1, 1, 3, 4, 2, 2)
    q_index, k_index = tf.constant([[-1, 0, 3]]), tf.constant([[0, 1, 2, 3]])
    mask = AttentionMask(q_index, k_index, tf.zeros_like(q_index), tf.zeros_like(k_index))
    assert not run(kernel, q, k, v, mask)[0, 0, 0].numpy().any()
    pull = np.zeros([1, 1, 3, 2], np.float32)
    pull[0, 0, 0] = 1.0
    for g in gradients(lambda *x: run(kernel, *x, mask), [q, k, v], [tf.constant(pull)]):
        assert not g.numpy().any()


@pytest.mark.parametrize("kernel", ["blocks", "tiles"])
@pytest.mark.parametrize("length", [5, 36])
def test_fused_kernels_in_a_graph(kernel, length):
    """36 keys are enough for the compiled row sums and maxima to take their own form; 5 leave a ragged last block."""
    inputs = tensors(2, 1, length, length, 4, 3)
    mask = causal_mask(length, np.arange(length)[None] // 4)
    cotangent = [tf.constant(normal(3, 2, 1, length, 3))]

    def value_and_grad(fuse, causal):
        def fn(*x):
            return run(kernel, *x, mask, causal=causal, block=18 if length == 36 else 2, fuse=fuse)

        return [fn(*inputs), *gradients(fn, inputs, cotangent)]

    fn = tf.function(value_and_grad, autograph=False)
    for causal in (True, False):
        for got, want in zip(fn(True, causal), value_and_grad(False, causal)):
            assert_close(got, want)


def graph_shapes(graph):
    """Yields the shape of every tensor of a graph and of its loops' bodies."""
    for op in graph.get_operations():
        yield from ((op.type, out.shape.as_list()) for out in op.outputs if out.shape.rank)
        for name in ("body", "cond"):
            if op.type in ("While", "StatelessWhile"):
                yield from graph_shapes(graph._get_function(op.get_attr(name).name).graph)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_score_matrix_of_the_whole_sequence(kernel):
    length, block = 32, 4
    inputs = tensors(1, 1, length, length, 2, 2)

    def value_and_grad():
        return gradients(lambda *x: run(kernel, *x, causal_mask(length), causal=True, block=block), inputs)

    graph = tf.function(value_and_grad, autograph=False).get_concrete_function().graph
    whole = [name for name, shape in graph_shapes(graph) if shape[-2:] == [length, length]]
    assert bool(whole) == (kernel == "naive"), whole


@pytest.mark.parametrize("keep", [7, 8])
def test_probabilities_are_kept_up_to_a_length(keep):
    """Beyond it the backward has a softmax of its own, which waits for the gradient, so that nothing can merge the two."""
    inputs = tensors(1, 1, 8, 8, 2, 2)

    def value_and_grad(cotangent):
        how = {"scale": 1.0, "causal": True, "block": 4, "keep": keep}
        return gradients(lambda *x: attention(*x, causal_mask(8), **how), inputs, cotangent)

    graph = tf.function(value_and_grad, autograph=False).get_concrete_function(tf.TensorSpec([1, 1, 8, 2])).graph

    def needs_gradient(op):
        if op.type == "Placeholder":
            return True
        return any(needs_gradient(t.op) for t in op.inputs) or any(map(needs_gradient, op.control_inputs))

    softmaxes = [op for op in graph.get_operations() if op.type == "Softmax"]
    assert (len(softmaxes), sum(map(needs_gradient, softmaxes))) == ((2, 0) if keep == 8 else (4, 2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_stay_finite(kernel):
    q, k, v = tensors(1, 1, 6, 6, 4, 3)
    q *= 3000.0
    want = oracles.attention(q.astype(np.float64), k, v, oracles.causal(6), 0.4)
    # Scores of about 2e4 are rounded to 2e4·2^-24 = 1e-3, which is the error of a probability.
    assert_close(run(kernel, q, k, v, causal_mask(6), causal=True), want, 4e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel):
    inputs = [tf.cast(x, tf.bfloat16) for x in tensors(1, 2, 7, 7, 4, 3)]
    exact = [tf.cast(x, tf.float32) for x in inputs]
    want = oracles.attention(*(x.numpy() for x in exact), oracles.causal(7), 0.4)
    got = run(kernel, *inputs, causal_mask(7), causal=True)
    assert got.dtype == tf.bfloat16
    # Scores, probabilities and results are rounded to 2^-9, the first of them at a size of about 2.
    assert_close(got, want, 2e-2)
    for g, w in zip(*(gradients(lambda *x: run(kernel, *x, causal_mask(7), causal=True), i) for i in (inputs, exact))):
        assert g.dtype == tf.bfloat16
        assert_close(g, w, 4e-2)


@pytest.mark.parametrize("kernel", ["blocks", "tiles"])
def test_unknown_batch(kernel):
    q, k, v = tensors(3, 2, 5, 5, 4, 3)
    specs = [tf.TensorSpec([None, *x.shape[1:]]) for x in (q, k, v)]
    fn = tf.function(
        lambda *x: gradients(lambda *y: run(kernel, *y, causal_mask(5), causal=True), x),
        input_signature=specs,
        autograph=False,
    )
    for got, want in zip(fn(q, k, v), gradients(lambda *x: run("naive", *x, causal_mask(5)), [q, k, v])):
        assert_close(got, want)


def test_wrong_input_is_named():
    q, k, v = tensors(2, 2, 5, 5, 4, 3)
    mask = causal_mask(5)
    cases = [
        ((q[0], k, v, mask), {}, r"attention: `q` has shape \(2, 5, 4\), want \(\?, \?, \?, \?\) \[B, H, T, P\]"),
        ((q, k[..., :3], v, mask), {}, r"attention: `k` has shape .*, want \(2, 2, \?, 4\) \[B, H, S, P\]"),
        ((q, k, v[:, :, 1:], mask), {}, r"attention: `v` has shape .*, want \(2, 2, 5, \?\) \[B, H, S, U\]"),
        ((q, k, v, causal_mask(4)), {}, r"attention: `mask.q_index` has length 4, want 5 \[T\]"),
        ((q, k, v, mask._replace(k_segment=tf.zeros([5], tf.int32))), {}, "attention: `mask.k_segment` has rank 1"),
        ((q, k, v, causal_mask(5, np.zeros([3, 5]))), {}, r"attention: `mask.q_segment` has 3 rows, want 2 or 1"),
        ((q[:, :, :4], k, v, index_mask(0, 1, 4, 5)), {"causal": True}, "attention: causal=True wants T = S, but T=4"),
    ]
    for args, how, message in cases:
        with pytest.raises(ValueError, match=message):
            attention(*args, scale=1.0, **how)
    with pytest.raises(ValueError, match=r"causal_mask: `segments` has rank 1, want 2 \[B, T\]"):
        causal_mask(3, [0, 0, 1])

    spec = tf.TensorSpec([1, 1, None, 4])
    unknown = tf.function(lambda x: attention(x, x, x, causal_mask(5), scale=1.0), input_signature=[spec], autograph=False)
    with pytest.raises(ValueError, match="attention: `q` and `k` have unknown lengths, want static T and S"):
        unknown.get_concrete_function()
