"""Dispatch: every row has its place, whatever the distribution."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.ops.dispatch import (
    combine_rows,
    dispatch_capacity,
    dispatch_combine,
    dispatch_gather,
    dispatch_nodes,
    dispatch_rows,
    dispatch_size,
    dispatch_slots,
    gather_rows,
    scatter_weights,
)
from tests.compare import assert_close, check_gradient, normal


@st.composite
def routings(draw):
    """Experts `[N, K]`, distinct within a token, drawn from a subset of all; `num_experts`; `multiple`."""
    num_experts = draw(st.integers(1, 7))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, unique=True))
    top_k = draw(st.integers(1, len(used)))
    rows = draw(st.lists(st.permutations(used).map(lambda p: p[:top_k]), max_size=9))
    return np.array(rows, np.int32).reshape(-1, top_k), num_experts, draw(st.sampled_from([1, 2, 5, 16]))


@settings(max_examples=60)
@given(routings(), st.booleans())
def test_every_row_once_grouped_by_expert(case, fuse):
    experts, num_experts, multiple = case
    n, k = experts.shape
    plan = dispatch_rows(experts, num_experts, multiple=multiple, fuse=fuse)
    slots, tokens, starts, rows, load = (t.numpy() for t in plan)

    assert len(tokens) == dispatch_size(n * k, num_experts, multiple) and len(tokens) % multiple == 0
    assert len(set(slots.reshape(-1))) == n * k, "a row was dropped or shares its place"
    np.testing.assert_array_equal(load, np.bincount(experts.reshape(-1), minlength=num_experts))
    np.testing.assert_array_equal(rows, -(-load // multiple) * multiple)
    np.testing.assert_array_equal(starts, np.cumsum(rows) - rows)
    assert rows.sum() <= len(tokens)
    for e in range(num_experts):
        mine = np.sort(slots[experts == e])
        np.testing.assert_array_equal(mine, starts[e] + np.arange(load[e]), "a group is contiguous from its start")
        np.testing.assert_array_equal(tokens[mine], np.nonzero(experts == e)[0], "tokens keep their order")
    padding = np.setdiff1d(np.arange(len(tokens)), slots)
    assert not tokens[padding].any()


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from([1, 2, 16]))
def test_size_is_enough_for_the_worst_case_and_no_more(rows, num_experts, multiple):
    """The worst case has as many groups as it can, each with one row more than whole multiples."""
    size = dispatch_size(rows, num_experts, multiple)
    groups = min(rows, num_experts)
    rest = rows - groups
    worst = (groups + rest // multiple) * multiple
    assert worst <= size <= rows + groups * (multiple - 1) + multiple - 1


@settings(max_examples=40)
@given(routings(), st.integers(0, 3))
def test_every_row_once_in_its_experts_slots(case, spare):
    experts, num_experts, _ = case
    n, k = experts.shape
    load = np.bincount(experts.reshape(-1), minlength=num_experts)
    capacity = max(int(load.max()), 1) + spare
    slots, tokens = (t.numpy() for t in dispatch_slots(experts, num_experts, capacity=capacity))
    assert tokens.shape == (num_experts * capacity,) and len(set(slots.reshape(-1))) == n * k
    np.testing.assert_array_equal(slots // capacity, experts)
    for e in range(num_experts):
        np.testing.assert_array_equal(np.sort(slots[experts == e]), e * capacity + np.arange(load[e]))
    np.testing.assert_array_equal(tokens[slots], np.repeat(np.arange(n)[:, None], k, 1))
    if not n:
        return
    x = normal(0, n, 3)
    rows = dispatch_gather(x, tokens, slots)
    assert_close(dispatch_combine(rows, tokens, slots), k * x)


@settings(max_examples=40)
@given(routings(), st.integers(0, 2**32 - 1))
def test_some_entries_may_stand_for_none(case, seed):
    """They get no row; what is gathered and combined is the sum over the others, and so are both gradients."""
    experts, num_experts, _ = case
    n, k = experts.shape
    experts = np.where(np.random.default_rng(seed).random((n, k)) < 0.4, num_experts, experts)
    capacity = max(int(np.bincount(experts.reshape(-1), minlength=num_experts + 1)[:num_experts].max()), 1)
    slots, tokens = (t.numpy() for t in dispatch_slots(experts, num_experts, capacity=capacity, partial=True))
    some = experts < num_experts
    assert tokens.shape == (num_experts * capacity,) and (slots[~some] == -1).all()
    np.testing.assert_array_equal(slots[some] // capacity, experts[some])
    np.testing.assert_array_equal(tokens[slots[some]], np.repeat(np.arange(n)[:, None], k, 1)[some])
    assert len(set(slots[some])) == some.sum()
    if not n:
        return
    x, count = tf.constant(normal(0, n, 3)), some.sum(1, keepdims=True).astype(np.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        rows = dispatch_gather(x, tokens, slots, partial=True)
        out = dispatch_combine(rows, tokens, slots, partial=True)
    assert_close(out, count * x)
    d = normal(1, n, 3)
    assert_close(tape.gradient(out, x, d), count * d)


@settings(max_examples=40)
@given(routings(), st.integers(1, 4))
def test_the_nodes_of_a_token(case, nodes):
    experts, num_experts, _ = case
    if num_experts % nodes:
        with pytest.raises(ValueError, match=f"dispatch_nodes: `nodes` is {nodes}, want a divisor of {num_experts}"):
            dispatch_nodes(experts, num_experts, nodes)
        return
    each = num_experts // nodes
    want = [[n if n in set(row // each) else nodes for n in range(nodes)] for row in experts]
    np.testing.assert_array_equal(dispatch_nodes(experts, num_experts, nodes), np.reshape(want, [len(experts), nodes]))


@settings(max_examples=60)
@given(st.integers(0, 5000), st.integers(0, 5000))
def test_capacities_are_enough_few_and_not_too_large(load, more):
    tokens = load + more
    size = dispatch_capacity(load, tokens)
    assert load <= size <= max(tokens, 1) and size <= max(8, 1.25 * load)
    sizes = {dispatch_capacity(n, tokens) for n in range(0, tokens + 1, max(1, tokens // 500))} | {size}
    assert len(sizes) <= 8 + 4 * max(0, tokens.bit_length() - 6) + 1 and dispatch_capacity(tokens, tokens) == max(tokens, 1)


@settings(max_examples=40)
@given(routings())
def test_none_is_an_expert_whose_rows_come_last(case):
    """The number of experts stands for none: those rows are in no group, and all others lie as without them."""
    experts, num_experts, multiple = case
    none = np.where(experts == num_experts - 1, num_experts, experts)
    ref = dispatch_rows(experts, num_experts, multiple=multiple)
    plan = dispatch_rows(none, num_experts, multiple=multiple, fuse=True)
    np.testing.assert_array_equal(plan.load[:-1], ref.load[:-1])
    np.testing.assert_array_equal(plan.starts, ref.starts)
    assert plan.load[-1] == 0 and plan.rows[-1] == 0
    kept = none < num_experts
    np.testing.assert_array_equal(plan.slots.numpy()[kept], ref.slots.numpy()[kept])
    assert len(set(plan.slots.numpy().reshape(-1))) == experts.size and (plan.slots.numpy() < len(plan.tokens)).all()


def test_gather_and_combine_are_inverse():
    experts = np.array([[2, 0], [2, 1], [0, 2]], np.int32)
    x = normal(0, 3, 4)
    plan = dispatch_rows(experts, 4, multiple=4)
    rows = gather_rows(tf.constant(x), plan.tokens)
    assert_close(combine_rows(rows, plan.slots), 2 * x)
    assert_close(tf.gather(rows, plan.slots), np.repeat(x[:, None], 2, 1))
    weights = scatter_weights(tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), plan.slots, size=rows.shape[0])
    assert weights.numpy()[plan.slots.numpy()].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert weights.numpy().sum() == 21.0


@pytest.mark.parametrize("fuse", [False, True])
def test_gradients(fuse):
    plan = dispatch_rows(np.array([[2, 0], [2, 1], [0, 2]], np.int32), 4, multiple=2)
    tokens, slots = plan.tokens.numpy(), plan.slots.numpy()

    def scattered(w):
        out = np.zeros(len(tokens))
        out[slots.reshape(-1)] = w.reshape(-1)
        return out

    check_gradient(lambda x: gather_rows(x, plan.tokens, fuse=fuse), lambda x: x[tokens], [normal(0, 3, 4)])
    full = normal(1, 3, 4)
    slots3, tokens3 = dispatch_slots(np.array([[0, 1], [0, 1], [0, 1]]), 2, capacity=3)  # no row stays empty
    check_gradient(lambda x: dispatch_gather(x, tokens3, slots3), lambda x: x[tokens3.numpy()], [full])
    check_gradient(lambda b: dispatch_combine(b, tokens3, slots3), lambda b: b[slots3.numpy()].sum(1), [normal(1, 6, 4)])
    rows = normal(1, len(tokens), 4)
    check_gradient(lambda b: combine_rows(b, plan.slots, fuse=fuse), lambda b: b[slots].sum(1), [rows])
    check_gradient(lambda w: scatter_weights(w, plan.slots, size=len(tokens), fuse=fuse), scattered, [normal(2, 3, 2)])


def test_bfloat16_rows_are_summed_in_float32():
    buffer = tf.cast(tf.constant([[256.0], [1.0], [1.0]]), tf.bfloat16)
    total = combine_rows(buffer, tf.constant([[0, 1, 2]]))
    assert total.dtype == tf.bfloat16 and float(total[0, 0]) == 258.0  # in bfloat16 256 + 1 is 256


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"dispatch_rows: `experts` has shape \(3,\), want \(\?, \?\) \[N, K\]"):
        dispatch_rows(tf.zeros([3], tf.int32), 2)
    with pytest.raises(ValueError, match="dispatch_rows: `experts` has dtype float32, want an integer dtype"):
        dispatch_rows(tf.zeros([3, 1]), 2)
    with pytest.raises(ValueError, match="dispatch_rows: `multiple` is 0, want >= 1"):
        dispatch_rows(tf.zeros([3, 1], tf.int32), 2, multiple=0)
    spec = tf.TensorSpec([None, 1], tf.int32)
    unknown = tf.function(lambda e: dispatch_rows(e, 2), input_signature=[spec], autograph=False)
    with pytest.raises(ValueError, match="dispatch_rows: `experts` has an unknown number of tokens"):
        unknown.get_concrete_function()
