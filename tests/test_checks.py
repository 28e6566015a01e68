"""Named errors, and the little that the bottom layer has beside them."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3.checks import (
    Dims,
    check,
    check_choice,
    check_integer,
    check_same_tree,
    check_token_ids,
    is_concrete,
    static_shape,
)


def test_dims_remember_and_compare():
    dims = Dims("f", D=4)
    dims("x", tf.zeros([2, 3, 4]), "B T D")
    dims("y", np.zeros([3, 2]), "T 2")
    dims("z", [[1, 2, 3]], "1 T")
    assert (dims.B, dims.T, dims.D) == (2, 3, 4)
    with pytest.raises(ValueError) as caught:
        dims("w", tf.zeros([2, 5]), "B T")
    assert str(caught.value) == "f: `w` has shape (2, 5), want (2, 3) [B, T]"


@pytest.mark.parametrize(
    ("shape", "letters", "message"),
    [
        ([4], "E", "f: `x` has shape (4,), want (3,) [E]"),
        ([], "E", "f: `x` has shape (), want (3,) [E]"),
        ([3], "N E", "f: `x` has shape (3,), want (?, 3) [N, E]"),
        ([2, 4], "N E", "f: `x` has shape (2, 4), want (?, 3) [N, E]"),
        ([3, 3], "E 2", "f: `x` has shape (3, 3), want (3, 2) [E, 2]"),
    ],
)
def test_messages(shape, letters, message):
    with pytest.raises(ValueError) as caught:
        Dims("f", E=3)("x", tf.zeros(shape), letters)
    assert str(caught.value) == message


def test_unknown_dims_pass_and_are_none():
    dims = Dims("f")

    def fn(x, y, any_rank):
        dims("x", x, "B T")
        assert dims.B is None and dims.T == 3
        dims("y", y, "B")
        assert dims.B == 5
        dims("any_rank", any_rank, "B T D")
        with pytest.raises(ValueError, match=r"f: `x` has shape \(\?, 3\), want \(5, 3, \?\) \[B, T, D\]"):
            dims("x", x, "B T D")
        return x

    specs = [tf.TensorSpec([None, 3]), tf.TensorSpec([5]), tf.TensorSpec(None)]
    tf.function(fn, input_signature=specs, autograph=False).get_concrete_function()
    with pytest.raises(AttributeError):
        dims.Q  # noqa: B018


def test_a_known_dim_is_not_forgotten():
    dims = Dims("f", T=3)
    fn = tf.function(lambda x: dims("x", x, "T") or x, input_signature=[tf.TensorSpec([None])], autograph=False)
    fn.get_concrete_function()
    assert dims.T == 3


def test_static_shape():
    assert static_shape(tf.zeros([2, 0])) == (2, 0)
    assert static_shape(np.zeros([3])) == (3,)
    assert static_shape([[1, 2]]) == (1, 2)
    assert static_shape(1.0) == ()
    assert static_shape(tf.TensorSpec(None)) is None
    assert static_shape(tf.TensorSpec([None, 2])) == (None, 2)
    assert static_shape(tf.Variable([1.0])) == (1,)


def test_choices_and_conditions():
    check(True, "fine")
    with pytest.raises(ValueError, match="^no$"):
        check(False, "no")
    check_choice("f", "side", "a", ("a", "b"))
    with pytest.raises(ValueError, match="^f: `side` is 'c', want one of 'a', 'b'$"):
        check_choice("f", "side", "c", ("a", "b"))


def test_integers():
    for value in (tf.constant(1), np.int64(1), [1, 2], 3):
        check_integer("f", "n", value)
    for value, dtype in ((tf.constant(1.0), "float32"), ([0.5], "float32"), (np.float64(1), "float64"), (True, "bool")):
        with pytest.raises(ValueError, match=f"^f: `n` has dtype {dtype}, want an integer dtype$"):
            check_integer("f", "n", value)


def test_same_tree():
    check_same_tree("f", "t", {"a": 1}, {"a": 2})
    with pytest.raises(ValueError, match=r"f: `t` does not .*: missing \['b'\], unexpected \['c'\]"):
        check_same_tree("f", "t", {"a": 1, "c": 1}, {"a": 2, "b": 1})


def test_token_ids():
    check_token_ids("f", "tokens", tf.constant([[0, 9]]), 10)
    check_token_ids("f", "tokens", np.zeros([2, 0], np.int32), 10)
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=rf"f: `tokens` holds token id {bad}, want ids in \[0, 10\) \[V\]"):
            check_token_ids("f", "tokens", [[3, bad]], 10)
    with pytest.raises(ValueError, match="f: `tokens` has dtype float32, want an integer dtype"):
        check_token_ids("f", "tokens", tf.zeros([1]), 10)
    symbolic = tf.function(lambda t: check_token_ids("f", "tokens", t, 10) or t, autograph=False)
    assert int(symbolic(tf.constant([11]))[0]) == 11


def test_concrete_is_what_can_be_looked_at():
    assert is_concrete(tf.constant(1)) and is_concrete(np.ones(1)) and is_concrete([1]) and is_concrete(tf.Variable(1))
    found = []
    tf.function(lambda x: found.append(is_concrete(x)) or x, autograph=False)(tf.constant(1))
    assert found == [False]
