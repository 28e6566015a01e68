"""The compiled step's edge: state in variables, donated, written in place."""

from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import tree
from dsv3.compiled import RowWrite, compile_step, place, snapshot, update_leaves
from tests.compare import normal

BOTH = pytest.mark.parametrize("jit", [False, True])


class Inner(NamedTuple):
    weight: tf.Tensor
    absent: tuple


class State(NamedTuple):
    count: tf.Tensor
    inner: Inner


def counting(state, x):
    """Adds `x` and returns the old weight."""
    new = Inner(state.inner.weight + x, ())
    return State(state.count + 1, new), {"before": state.inner.weight, "total": tf.reduce_sum(new.weight)}


def start():
    return State(tf.constant(0), Inner(tf.constant([1.0, 2.0]), ()))


@BOTH
def test_state_goes_on_from_step_to_step(jit):
    step = compile_step(counting, jit=jit)
    state = start()
    for i in range(3):
        state, outputs = step(state, tf.constant([1.0, 0.0]))
        assert outputs["before"].numpy().tolist() == [1.0 + i, 2.0] and float(outputs["total"]) == 4.0 + i
    assert isinstance(state, State) and state.inner.absent == ()
    assert int(state.count) == 3 and tf.convert_to_tensor(state.inner.weight).numpy().tolist() == [4.0, 2.0]
    assert step.traces() == 1


@BOTH
def test_the_given_tensors_stay_and_the_given_variables_are_donated(jit):
    step = compile_step(counting, jit=jit)
    first = start()
    second, _ = step(first, tf.constant([1.0, 1.0]))
    assert first.inner.weight.numpy().tolist() == [1.0, 2.0]
    assert all(isinstance(leaf, tf.Variable) and not leaf.trainable for leaf in tree.flatten(second))
    third, _ = step(second, tf.constant([1.0, 1.0]))
    assert all(a is b for a, b in zip(tree.flatten(second), tree.flatten(third)))
    assert second.inner.weight.numpy().tolist() == [3.0, 4.0]


def test_snapshot_is_left_alone():
    step = compile_step(counting)
    state, _ = step(start(), tf.constant([1.0, 1.0]))
    kept = snapshot(state)
    step(state, tf.constant([1.0, 1.0]))
    assert isinstance(kept, State) and kept.inner.weight.numpy().tolist() == [2.0, 3.0] and int(kept.count) == 1
    assert not any(isinstance(leaf, tf.Variable) for leaf in tree.flatten(kept))


def test_place_keeps_variables_and_names_them_by_path():
    placed = place(start())
    assert [leaf.name for leaf in tree.flatten(placed)] == ["count:0", "inner_weight:0"]
    again = place(placed)
    assert all(a is b for a, b in zip(tree.flatten(placed), tree.flatten(again)))


@pytest.mark.parametrize("owned", [False, True])
def test_a_leaf_that_nobody_else_holds_is_written_without_a_copy(owned):
    """Looked at by breaking the promise: the tensor that the variable was made of shows what is written."""
    step = compile_step(lambda state, x: ({"kv": RowWrite(x, tf.constant([1]))}, ()))
    tensor = tf.fill([1, 1, 3, 2], 5.0)
    state, _ = step(place({"kv": tensor}, owned=owned), tf.ones([1, 1, 1, 2]))
    assert state["kv"].numpy()[0, 0, :, 0].tolist() == [5.0, 1.0, 5.0]
    assert tensor.numpy()[0, 0, :, 0].tolist() == ([5.0, 1.0, 5.0] if owned else [5.0] * 3)


def test_a_step_serves_several_states():
    step = compile_step(counting)
    one, _ = step(start(), tf.constant([1.0, 1.0]))
    two, _ = step(start(), tf.constant([5.0, 5.0]))
    step(one, tf.constant([1.0, 1.0]))
    assert one.inner.weight.numpy().tolist() == [3.0, 4.0] and two.inner.weight.numpy().tolist() == [6.0, 7.0]


def test_traces_counts_shapes():
    step = compile_step(lambda state, x: (state, tf.reduce_sum(x)))
    state = {"a": tf.zeros([2])}
    for size in (1, 2, 2, 1):
        state, _ = step(state, tf.ones([size]))
    assert step.traces() == 2


def test_a_state_of_one_leaf():
    state, _ = compile_step(lambda state: (state + 1.0, ()))(tf.ones([2]))
    assert state.numpy().tolist() == [2.0, 2.0]


@BOTH
def test_leaves_may_change_places(jit):
    """Every new value is made of old ones, whatever the order in which variables are written."""
    step = compile_step(lambda s: ({"a": s["b"], "b": s["a"], "c": s["a"] + s["c"]}, ()), jit=jit)
    state = {"a": tf.fill([3], 1.0), "b": tf.fill([3], 2.0), "c": tf.fill([3], 3.0)}
    for want in ([2.0, 1.0, 4.0], [1.0, 2.0, 6.0]):
        state, _ = step(state)
        assert [float(state[name][0]) for name in "abc"] == want


@BOTH
def test_row_write(jit):
    """Each row is written from its own start, in the leaf's dtype; outputs see the old values."""

    def fn(state, values, starts):
        return {"kv": RowWrite(values, starts), "n": state["n"] + 2}, tf.reduce_sum(state["kv"])

    step = compile_step(fn, jit=jit)
    state = {"kv": tf.cast(normal(0, 2, 3, 6, 4), tf.bfloat16), "n": tf.constant([0, 4, 2])}
    want = tf.cast(state["kv"], tf.float32).numpy()
    for i in range(2):
        values, starts = normal(i + 1, 2, 3, 2, 4), np.array([0, 4, 2]) if i == 0 else np.array([3, 0, 1])
        before = want.sum()
        state, total = step(state, tf.constant(values), tf.constant(starts, tf.int32))
        assert float(total) == pytest.approx(before, abs=0.5)  # a bfloat16 sum
        for b, a in enumerate(starts):
            want[:, b, a : a + 2] = tf.cast(tf.cast(values[:, b], tf.bfloat16), tf.float32)
        np.testing.assert_array_equal(tf.cast(state["kv"], tf.float32), want)
    assert state["kv"].dtype == tf.bfloat16 and state["n"].numpy().tolist() == [4, 8, 6] and step.traces() == 1


@BOTH
def test_row_write_to_a_leaf_that_shares_its_values(jit):
    """After `a = b` both may lie in one buffer; a write to one of them must not be seen in the other."""
    share = compile_step(lambda s: ({"a": s["b"], "b": s["b"]}, ()), jit=jit)
    write = compile_step(lambda s: (s | {"a": RowWrite(tf.ones([1, 1, 1]), tf.constant([1]))}, ()), jit=jit)
    state, _ = share({"a": tf.ones([1, 1, 3]), "b": tf.zeros([1, 1, 3])})
    state, _ = write(state)
    assert state["a"].numpy().tolist() == [[[0.0, 1.0, 0.0]]] and not state["b"].numpy().any()


def test_row_write_beyond_the_end_is_an_error():
    step = compile_step(lambda s, starts: ({"kv": RowWrite(tf.ones([1, 1, 2]), starts)}, ()))
    with pytest.raises(tf.errors.InvalidArgumentError):
        step({"kv": tf.zeros([1, 1, 3])}, tf.constant([2]))


def test_wrong_new_state_is_named():
    state = {"a": tf.zeros([2]), "b": {"c": tf.zeros([3])}}
    for new, message in [
        (lambda s: {"a": s["a"]}, r"compile_step: `new state` does not have the expected structure: missing \['b.c'\]"),
        (lambda s: s | {"d": s["a"]}, r"missing nothing, unexpected \['d'\]"),
        (lambda s: s | {"a": tf.zeros([3])}, r"compile_step: new state `a` is float32 \(3,\), want float32 \(2,\)"),
        (lambda s: s | {"b": {"c": tf.zeros([3], tf.int32)}}, "new state `b.c` is int32 .*, want float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            compile_step(lambda s, new=new: (new(s), ()))(state)


def address(variable):
    """Where a variable's values lie; `numpy()` would copy them."""
    return np.asarray(memoryview(tf.convert_to_tensor(variable))).ctypes.data


def test_rows_are_written_where_the_cache_lies():
    step = compile_step(lambda s, x: ({"a": RowWrite(s["a"][:, :, :1] + x, tf.constant([1, 2]))}, ()))
    given = tf.zeros([2, 2, 3, 1])
    state, _ = step({"a": given}, tf.constant(1.0))
    where = address(state["a"])
    state, _ = step(state, tf.constant(2.0))
    assert address(state["a"]) == where
    assert state["a"].numpy()[:, :, :, 0].tolist() == [[[0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]] * 2
    assert not given.numpy().any()


def test_rows_beyond_the_end_are_refused():
    step = compile_step(lambda s, at: ({"a": RowWrite(tf.ones([1, 2, 2, 1]), at)}, ()))
    state, _ = step({"a": tf.zeros([1, 2, 3, 1])}, tf.constant([0, 1]))
    for wrong in ([0, 2], [-1, 0]):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"2 new slots of `a` end beyond its 3"):
            step(state, tf.constant(wrong))
    assert state["a"].numpy()[0, :, :, 0].tolist() == [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]


def test_rows_written_by_a_later_trace_only():
    """What the first trace did not announce is written another way."""

    def fn(s, x):
        return {"a": s["a"] + x if x.shape[0] == 1 else RowWrite(x[None, None], tf.constant([0]))}, ()

    step = compile_step(fn)
    given = tf.zeros([1, 1, 3])
    state, _ = step({"a": given}, tf.ones([1]))
    kept = tf.convert_to_tensor(state["a"])
    state, _ = step(state, tf.constant([5.0, 6.0]))
    assert state["a"].numpy().tolist() == [[[5.0, 6.0, 1.0]]] and kept.numpy().tolist() == [[[1.0, 1.0, 1.0]]]


@BOTH
def test_update_leaves_is_the_function(jit):
    """Old values that are used elsewhere stay the old ones, wherever the update is traced."""

    def fn(s, x):
        a, b = update_leaves(lambda a, b, x: (a + x, b * a), (s["a"], s["b"]), x)
        return {"a": a, "b": b, "old": s["a"] - 1.0}, (a, s["b"])

    start = {"a": tf.constant([1.0, 2.0]), "b": tf.constant([3.0, 4.0]), "old": tf.zeros([2])}
    step, state = compile_step(fn, jit=jit), start
    for x in (1.0, 10.0):
        want, out = fn(snapshot(state), tf.constant(x))
        state, got = step(state, tf.constant(x))
        for name in want:
            assert state[name].numpy().tolist() == want[name].numpy().tolist()
        assert [t.numpy().tolist() for t in got] == [t.numpy().tolist() for t in out]
    assert start["a"].numpy().tolist() == [1.0, 2.0]


@BOTH
def test_a_leaf_that_goes_back_after_its_update_is_as_it_came(jit):
    """Freezing: the updated value is dropped."""

    def fn(s):
        (tried,) = update_leaves(lambda a: (a + 1.0,), (s["a"],))
        (other,) = update_leaves(lambda a: (a + 10.0,), (s["a"],))
        return {"a": s["a"], "b": tried, "c": other}, ()

    step = compile_step(fn, jit=jit)
    state = {name: tf.zeros([2]) for name in "abc"}
    for _ in range(2):
        state, _ = step(state)
        assert {name: float(leaf[0]) for name, leaf in state.items()} == {"a": 0.0, "b": 1.0, "c": 10.0}


def test_update_leaves_overwrites():
    """A leaf of which nobody else holds the values is updated where it lies."""
    step = compile_step(lambda s: ({"a": update_leaves(lambda a: (a + 1.0,), (s["a"],))[0]}, ()))
    state = place({"a": tf.zeros([1024])})
    state, _ = step(state)
    where = address(state["a"])
    state, _ = step(state)
    assert address(state["a"]) == where and state["a"].numpy().tolist() == [2.0] * 1024


def test_leaves_of_one_shape_share_a_kernel():
    seen = []

    def add(a, x):
        seen.append(a.shape.as_list())
        return (a + x,)

    state = {"a": tf.zeros([2]), "b": tf.ones([2]), "c": tf.zeros([3])}
    for x in (1.0, 10.0):  # two steps of one function
        step = compile_step(lambda s, x: ({name: update_leaves(add, (leaf,), x)[0] for name, leaf in s.items()}, ()))
        state, _ = step(state, tf.constant(x))
    assert [leaf.numpy().tolist() for leaf in state.values()] == [[11.0] * 2, [12.0] * 2, [11.0] * 3]
    assert seen == [[2], [3]]


def row_write(state, x):
    return state | {"a": RowWrite(tf.fill([1, 1, 1], x), tf.constant([1]))}, ()


def test_rows_are_not_written_into_what_was_assigned_from_their_leaf():
    write = compile_step(row_write)
    copy = compile_step(lambda s: (s | {"b": s["a"]}, ()))
    state, _ = write({"a": tf.zeros([1, 1, 3]), "b": tf.zeros([1, 1, 3])}, tf.constant(1.0))
    state, _ = copy(state)
    state, _ = write(state, tf.constant(2.0))
    assert state["a"].numpy().tolist() == [[[0.0, 2.0, 0.0]]] and state["b"].numpy().tolist() == [[[0.0, 1.0, 0.0]]]


def test_outputs_and_copies_of_a_leaf_are_from_before_its_rows_are_written():
    def fn(state):
        new = {"a": RowWrite(tf.ones([2, 1, 1]), tf.constant([1])), "b": state["a"]}
        return new, (state["a"], state["a"][0], tf.reshape(state["a"], [6]), None)

    step = compile_step(fn)
    state, outputs = step({"a": tf.zeros([2, 1, 3]), "b": tf.ones([2, 1, 3])})
    assert state["a"].numpy()[:, 0].tolist() == [[0.0, 1.0, 0.0]] * 2
    assert not state["b"].numpy().any() and not any(out.numpy().any() for out in outputs[:3]) and outputs[3] is None


def test_rows_are_written_after_all_that_reads_them():
    """Every operation that reads the old values comes before the writing, whatever path its result takes."""
    inner = tf.function(lambda x: x * 2.0, autograph=False)

    def fn(state):
        more = RowWrite(tf.reduce_sum(state["a"], keepdims=True), tf.constant([0]))
        return {"a": RowWrite(tf.ones([1, 1, 1]), tf.constant([1])), "b": more, "c": inner(state["a"])}, state["a"] + 1.0

    graphs = []
    step = compile_step(lambda s: (graphs.append(tf.compat.v1.get_default_graph()), fn(s))[1])
    step({name: tf.zeros([1, 1, 3]) for name in "abc"})

    def before(op, seen):
        for other in [t.op for t in op.inputs] + list(op.control_inputs):
            if other not in seen:
                seen.add(other)
                before(other, seen)
        return seen

    for write in (op for op in graphs[0].get_operations() if op.type == "InplaceUpdate"):
        read = write.inputs[0].op
        while read.type != "ReadVariableOp":
            read = read.inputs[0].op
        done = before(write, set())
        for reader in read.outputs[0].consumers():
            assert reader in done or reader is write.inputs[0].op, reader
        # An edge from a call would, once that is inlined, wait for less than its results.
        assert not any("PartitionedCall" in other.type for op in done for other in op.control_inputs)


def test_nothing_is_written_where_rows_do_not_fit():
    step = compile_step(lambda s, at: ({"n": s["n"] + 1, "a": RowWrite(tf.ones([1, 1, 2]), at)}, ()))
    state, _ = step({"n": tf.constant(0), "a": tf.zeros([1, 1, 3])}, tf.constant([0]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="2 new slots of `a` end beyond its 3"):
        step(state, tf.constant([2]))
    assert int(state["n"]) == 1


def test_a_step_serves_states_with_and_without_a_leaf():
    def fn(s):
        new = {"n": s["n"] + 1}
        return new | ({"a": RowWrite(tf.ones([1, 1, 1]), tf.constant([0]))} if "a" in s else {}), ()

    step = compile_step(fn)
    step({"n": tf.constant(0), "a": tf.zeros([1, 1, 3])})
    state, _ = step({"n": tf.constant(4)})
    assert int(state["n"]) == 5
