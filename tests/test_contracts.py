"""Contracts of every public function, over the catalogue of `tests/catalogue.py`."""

import inspect
import re

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import tree
from tests.catalogue import CATALOGUE, EXEMPT, public_functions
from tests.catalogue_entry import Entry, name_of
from tests.compare import assert_close

COMPUTED = [entry for entry in CATALOGUE if not entry.python]


def over(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda e: e.name.removeprefix("dsv3."))


def tensors(values):
    return tree.map_leaves(tf.convert_to_tensor, values)


def assert_same(got, want, tolerance):
    """Leaves that are tensors are close, integers equal; the trees have the same paths."""
    got, want = tree.to_dict(got), tree.to_dict(want)
    assert list(got) == list(want)
    for path, leaf in want.items():
        if leaf.dtype.is_floating and leaf.dtype.size == 1:
            got[path], leaf = (tf.cast(t, tf.float32) for t in (got[path], leaf))
        assert got[path].dtype == leaf.dtype
        assert_close(got[path], leaf, tolerance, path)


def compiled(entry: Entry, *, jit: bool):
    """The function of its inputs, all else bound; inputs are leaves, as a tree may be of arrays."""
    static = entry.bound | (entry.xla if jit else {})
    return tf.function(lambda inputs: entry.fn(**inputs, **static), jit_compile=jit, autograph=False)


def test_catalogue_is_complete():
    """Every public function has an entry or a reason to have none, and nothing else does."""
    listed = [entry.name for entry in CATALOGUE]
    assert len(set(listed)) == len(listed)
    assert set(listed).isdisjoint(EXEMPT)
    missing = sorted(public_functions() - {*listed, *EXEMPT})
    assert not missing, f"not in tests/catalogue.py: {missing}"
    gone = sorted({*listed, *EXEMPT} - public_functions())
    assert not gone, f"in tests/catalogue.py, but not public: {gone}"


def test_entries_say_what_contracts_need():
    for entry in CATALOGUE:
        assert name_of(entry.fn) == entry.name
        assert entry.python == (not entry.inputs()), f"{entry.name}: inputs, or python=True"
        if not entry.python:
            assert entry.any_shape != bool(entry.wrong()), f"{entry.name}: a wrong shape for an input, or any_shape=True"


@over(CATALOGUE)
def test_documented(entry):
    """One line of what it does; every parameter by name; what it returns."""
    text = inspect.getdoc(entry.fn)
    assert text, "no docstring"
    first = text.splitlines()[0]
    assert first.endswith((".", ":", "]")) and len(first) <= 125, f"the first line is no sentence: {first}"
    signature = inspect.signature(entry.fn)
    if signature.return_annotation not in (None, "None"):
        assert re.search(r"\bReturns?\b", text), "does not say what it returns"
    for name in signature.parameters:
        assert re.search(rf"(^|\W){re.escape(name)}(\W|$)", text), f"does not mention `{name}`"


@over(COMPUTED)
def test_graph_is_eager_without_a_second_trace(entry):
    inputs = tensors(entry.inputs())
    want = entry.fn(**inputs, **entry.bound)
    fn = compiled(entry, jit=False)
    assert_same(fn(inputs), want, entry.tolerance)
    fn(tree.map_leaves(tf.identity, inputs))
    assert fn.experimental_get_tracing_count() == 1


@over([entry for entry in COMPUTED if not entry.no_xla])
def test_xla_is_eager(entry):
    inputs = tensors(entry.inputs())
    assert_same(compiled(entry, jit=True)(inputs), entry.fn(**inputs, **entry.bound), entry.tolerance)


@over([entry for entry in COMPUTED if entry.unknown])
def test_leading_dims_may_be_unknown(entry):
    inputs = tensors(entry.inputs())
    free = {n: tree.map_leaves(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), inputs[n]) for n in entry.unknown}
    specs = tree.map_leaves(lambda t: tf.TensorSpec(t.shape, t.dtype), inputs) | free
    fn = tf.function(lambda i: entry.fn(**i, **entry.bound), input_signature=[specs], autograph=False)
    assert_same(fn(inputs), entry.fn(**inputs, **entry.bound), entry.tolerance)


@over(COMPUTED)
def test_inputs_are_not_modified(entry):
    inputs = entry.inputs()
    before = {path: np.array(leaf) for path, leaf in tree.items(inputs)}
    # Data may come as arrays; trees of parameters and states hold tensors.
    data = {name: v if isinstance(v, np.ndarray) else tensors(v) for name, v in inputs.items()}
    for values in (data, tensors(inputs)):
        entry.fn(**values, **entry.bound)
        for path, leaf in tree.items(values):
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)


@over([entry for entry in COMPUTED if not entry.any_shape])
def test_wrong_shape_is_named(entry):
    for name, value in entry.wrong().items():
        with pytest.raises(ValueError, match=rf"{entry.fn.__name__}: .*`{name}") as caught:
            entry.fn(**(entry.inputs() | {name: value}), **entry.bound)
        assert "\n" not in str(caught.value)


@over([entry for entry in CATALOGUE if entry.python])
def test_python_functions_give_the_same_again(entry):
    first, second = (tree.flatten(entry.fn(**entry.bound)) for _ in range(2))
    assert len(first) == len(second)
    for a, b in zip(first, second):
        if not callable(a):  # an optimiser or a step, made anew
            assert np.all(a == b)
