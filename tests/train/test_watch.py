"""Norms by component against sums over the leaves, on one device and on a mesh."""

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import adamw, make_train_step, train_init, tree
from dsv3.train.watch import COMPONENTS, bias_numbers, component_norms, component_of, make_watch, memory_numbers
from tests.compare import PLAIN, assert_close
from tests.small import KEY, model_config, random_tokens
from tests.train.test_mesh_step import ONE, layouts_of, one_device

CFG = model_config(num_hidden_layers=2, num_nextn_predict_layers=1)


def by_component(trees):
    """Norms in float64, from a tree."""
    sums = {}
    for path, leaf in tree.items(trees):
        sums[component_of(path)] = sums.get(component_of(path), 0.0) + (np.asarray(leaf, np.float64) ** 2).sum()
    return {name: value**0.5 for name, value in sums.items()}


def assert_same(got, want, tolerance=1e-5):
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=tolerance), name


def test_every_parameter_belongs_to_a_component():
    cfg = model_config(attention_bias=True, num_nextn_predict_layers=1)
    names = [component_of(path) for path in tree.to_dict(dsv3.model_specs(cfg))]
    assert set(names) == set(COMPONENTS)


def test_norms_of_components_make_the_norm():
    specs = dsv3.model_specs(CFG)
    squares = np.random.default_rng(0).uniform(0.5, 2.0, len(tree.flatten(specs)))
    norms = component_norms(squares, specs)
    assert sum(value**2 for value in norms.values()) == pytest.approx(squares.sum(), rel=1e-5)
    with pytest.raises(ValueError):
        component_norms(squares[1:], specs)


@pytest.mark.parametrize(("axes", "moments"), [(None, "float32"), (None, "bfloat16"), ("data:2,expert:2", "float32")])
def test_a_row_has_the_norms_of_the_step(axes, moments):
    optimizer = adamw(1e-2, weight_decay=0.3, clip_norm=0.5, moment_dtype=moments, fuse=False)
    cfg = CFG if axes is None else model_config(**ONE)
    layouts = None if axes is None else layouts_of(cfg, axes)
    state = train_init(KEY, cfg, optimizer, layouts)
    step = one_device(cfg, optimizer, 3, policy=PLAIN)
    if axes is not None:
        step = make_train_step(cfg, optimizer, layouts, policy=PLAIN)
    watch = make_watch(cfg, optimizer, layouts, policy=PLAIN)
    for seed in range(3):
        before = tree.map_leaves(lambda leaf: np.array(leaf.numpy()), dsv3.gather_state(state).params)
        state, metrics = step(state, random_tokens(cfg, 4, 6, seed))
    row = watch(state, metrics)
    after = tree.map_leaves(lambda leaf: leaf.numpy(), dsv3.gather_state(state).params)
    assert_same(row["param_norms"], by_component(after))
    change = by_component(tree.map_leaves(lambda a, b: a.astype(np.float64) - b, after, before))
    want = {name: change[name] / value for name, value in by_component(after).items()}
    # The update is that of the moments as they are stored, and p's change is rounded to p's last bit, 6e-8 of it.
    assert_same(row["update_ratios"], want, 1e-3 if moments == "float32" else 2**-7)
    assert sum(v**2 for v in row["grad_norms"].values()) == pytest.approx(float(metrics.optim.grad_norm) ** 2, rel=1e-4)
    biases = np.concatenate([np.asarray(part) for part in dsv3.gather_state(state).router])
    assert_close(row["bias_max"], biases.max(1), 1e-5)
    assert_close(row["bias_std"], biases.std(1), 1e-3)  # written with six digits after the point
    assert row["memory_bytes"] <= row["peak_memory_bytes"] * 1.01


def test_an_optimiser_that_cannot_tell_its_update_and_a_dense_model():
    cfg = model_config(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    optimizer = adamw(1e-2, fuse=False)._replace(last_update=None)
    state, metrics = make_train_step(cfg, optimizer, policy=PLAIN)(train_init(KEY, cfg, optimizer), random_tokens(cfg, 2, 5))
    row = make_watch(cfg, optimizer, policy=PLAIN)(state, metrics)
    assert "update_ratios" not in row and "bias_min" not in row and "experts" not in row["grad_norms"]
    assert bias_numbers(state) == {}


def test_memory_is_that_of_this_process():
    before = memory_numbers()
    held = tf.zeros([40 * 2**20]) + 1.0  # 160 MB
    after = memory_numbers()
    assert after["memory_bytes"] - before["memory_bytes"] > 100 * 2**20
    assert after["peak_memory_bytes"] >= before["peak_memory_bytes"]
    assert float(held[0]) == 1.0
