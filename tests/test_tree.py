"""Path-keyed trees."""

from typing import NamedTuple

import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.typing import LETTERS


class Pair(NamedTuple):
    first: object
    second: object


TREE = Pair({"b": 1, "a": (2, ())}, Pair(3, ()))


def test_paths_and_order():
    """Fields as declared, dict keys sorted, tuples by index; `()` has no leaves."""
    assert list(tree.items(TREE)) == [("first.a.0", 2), ("first.b", 1), ("second.first", 3)]
    assert tree.flatten(TREE) == [2, 1, 3] and tree.flatten(()) == []
    assert tree.to_dict(TREE) == {"first.a.0": 2, "first.b": 1, "second.first": 3}
    assert list(tree.items(5)) == [("", 5)]


def test_flatten_and_back():
    back = tree.unflatten_as(TREE, ["x", "y", "z"])
    assert back == Pair({"b": "y", "a": ("x", ())}, Pair("z", ())) and type(back.second) is Pair


def test_maps():
    assert tree.map_leaves(lambda a, b: a + b, TREE, TREE) == Pair({"b": 2, "a": (4, ())}, Pair(6, ()))
    assert tree.to_dict(tree.map_with_path(lambda path, leaf: f"{path}={leaf}", TREE))["first.b"] == "first.b=1"
    with pytest.raises((ValueError, TypeError)):
        tree.map_leaves(lambda a, b: a, TREE, Pair(1, 2))


def test_layers():
    stacked = {"a": tf.reshape(tf.range(6), [3, 2]), "b": (tf.range(3), ())}
    assert tree.leading_size(stacked) == 3 and tree.leading_size(()) == 0
    layer = tree.slice_leading(stacked, 1)
    assert layer["a"].numpy().tolist() == [2, 3] and int(layer["b"][0]) == 1


def test_hashes_are_stable_and_unlike():
    """They seed initial values, so they are part of what a seed means."""
    assert tree.path_hash("embed") == 1615049585
    for name in ("deepseek-v3", "tiny"):
        paths = list(tree.to_dict(dsv3.model_specs(dsv3.preset(name))))
        hashes = {tree.path_hash(path) for path in paths}
        assert len(hashes) == len(paths) and all(0 <= h < 2**31 for h in hashes)


def test_letters_are_documented_once():
    from dsv3 import typing

    assert len(set(LETTERS)) == len(LETTERS)
    for letter in LETTERS:
        assert f"\n{letter}      " in typing.__doc__
