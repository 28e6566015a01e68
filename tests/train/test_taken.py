"""Steps that are not taken, and the average of the parameters: on one device, fused and not, and on a mesh."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import adamw, make_train_step, train_init, train_update, tree
from dsv3.compiled import snapshot
from dsv3.train.optim import square_sums
from dsv3.train.state import Limits, within_limits
from dsv3.train.step import train_specs
from tests.compare import PLAIN, assert_close, assert_trees_close
from tests.more import more
from tests.small import KEY, model_config, random_tokens
from tests.train.test_mesh_step import layouts_of

CFG = model_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
DECAY = 0.75
POLICIES = {"plain": PLAIN, "fused": PLAIN.replace(fuse=True)}


def tokens(seed, rows=4):
    return random_tokens(CFG, rows, 6, seed)


def start(optimizer, axes=None, **kwargs):
    """A state and how its parameters lie."""
    layouts = None if axes is None else layouts_of(CFG, axes)
    return train_init(KEY, CFG, optimizer, layouts, **kwargs), layouts


@functools.cache
def compiled(policy, axes, ema):
    """A step, which tests share, and how to make a state for it."""
    optimizer = adamw(1e-2, fuse=policy == "fused")
    layouts = None if axes is None else layouts_of(CFG, axes)
    step = make_train_step(CFG, optimizer, layouts, policy=POLICIES[policy], ema_decay=DECAY if ema else None)
    return step, lambda: train_init(KEY, CFG, optimizer, layouts, ema=ema)


def values(state):
    return tree.map_leaves(lambda leaf: np.array(leaf.numpy()), dsv3.gather_state(state))


@pytest.mark.parametrize(("policy", "axes"), [("fused", None), *more(("plain", None), ("plain", "data:2,expert:2"))])
def test_a_step_beyond_the_limits_leaves_the_state_as_it_was(policy, axes):
    step, begin = compiled(policy, axes, True)
    state, first = step(begin(), tokens(0))
    before = values(state)
    loss, norm = float(first.loss), float(first.optim.grad_norm)
    for limits in (Limits(loss=loss / 2), Limits(grad_norm=norm / 100), Limits(loss=float("nan"))):
        state, metrics = step(state, tokens(1), None, limits)
        assert not bool(metrics.taken)
        assert_trees_close(values(state), before, 0.0)
    state, metrics = step(state, tokens(1), None, Limits(2 * loss, 100 * norm))
    assert bool(metrics.taken) and bool(first.taken)
    want = begin()
    for seed in (0, 1):
        want, at_once = step(want, tokens(seed))
    assert_trees_close(values(state), values(want), 0.0)
    assert float(metrics.loss) == float(at_once.loss), "as if the steps between had not been"
    if axes is None:
        assert step.traces() == 1


@pytest.mark.parametrize(("policy", "axes"), [("plain", "expert:2"), *more(("plain", None), ("fused", None))])
def test_a_gradient_that_is_not_finite_changes_nothing(policy, axes):
    step, begin = compiled(policy, axes, False)
    state, _ = step(begin(), tokens(0))
    before = values(state)
    weights = np.ones((4, 5), np.float32)
    weights[1, 2] = np.inf
    state, metrics = step(state, tokens(1), weights)
    assert not bool(metrics.taken) and not np.isfinite(float(metrics.loss))
    assert_trees_close(values(state), before, 0.0)
    state, metrics = step(state, tokens(1))
    assert bool(metrics.taken) and int(dsv3.gather_state(state).step) == 2


def test_delayed_scales_forget_a_step_that_was_not_taken():
    recipe = dsv3.recipe.RECIPES["delayed"]
    optimizer, policy = adamw(1e-2, fuse=False), PLAIN.replace(dtype="bfloat16", fp8=recipe)
    state = train_init(KEY, CFG, optimizer, fp8=recipe)
    new, metrics = train_update(state, tokens(0), cfg=CFG, optimizer=optimizer, policy=policy, limits=Limits(loss=0.0))
    assert not bool(metrics.taken)
    assert_trees_close(new, state, 0.0)


@pytest.mark.parametrize(("policy", "axes"), [("fused", None), *more(("plain", None), ("plain", "data:2,expert:2"))])
def test_the_average_follows_the_parameters(policy, axes):
    step, begin = compiled(policy, axes, True)
    state = begin()
    want = values(state).params
    assert_trees_close(values(state).ema, want, 0.0)
    for seed in range(3):
        state, _ = step(state, tokens(seed))
        now = values(state)
        want = tree.map_leaves(lambda e, p: DECAY * e.astype(np.float64) + (1 - DECAY) * p, want, now.params)
    assert_trees_close(now.ema, want, 1e-6)  # three roundings of float32
    assert not np.allclose(now.ema.embed, now.params.embed, atol=1e-4)


def test_squares_of_each_parameter_make_the_norm():
    optimizer = adamw(1e-2, fuse=False)
    _, one = train_update(train_init(KEY, CFG, optimizer), tokens(0), cfg=CFG, optimizer=optimizer, policy=PLAIN)
    step, begin = compiled("plain", "expert:2", False)
    for metrics in (one, step(begin(), tokens(0))[1]):
        assert metrics.grad_squares.shape == [len(tree.flatten(dsv3.model_specs(CFG)))]
        assert_close(metrics.optim.grad_norm, np.sqrt(np.asarray(metrics.grad_squares, np.float64).sum()))
        assert_close(metrics.grad_squares, one.grad_squares, 1e-4)  # sums in another order, squared


def test_square_sums_are_those_of_each_leaf():
    leaves = {
        "a": tf.constant([3.0, 4.0]), "b": tf.constant([[2.0]], tf.bfloat16), "c": tf.constant(3.0, tf.bfloat16),
        "d": tf.zeros([0, 4], tf.bfloat16), "e": tf.zeros([4, 0]), "f": tf.fill([3, 5, 64], tf.constant(2.0, tf.bfloat16)),
        "g": tf.constant([[1.0, -2.0], [3.0, -4.0], [5.0, -6.0]], tf.bfloat16),
        "h": tf.constant([1.0, 2.0, 3.0], tf.bfloat16),
    }  # fmt: skip
    for fuse in (False, True):
        assert square_sums(leaves, fuse=fuse).numpy().tolist() == [25.0, 4.0, 9.0, 0.0, 0.0, 3840.0, 91.0, 14.0]
    long = tf.ones([20_000_000], tf.bfloat16)  # float32 adds ones up to 2^24 only
    assert float(square_sums({"long": long}, fuse=True)[0]) == 2e7


def test_limits_are_the_largest_that_pass():
    nan, inf = float("nan"), float("inf")
    for loss, norm, limits, want in [
        (2.0, 1.0, Limits(2.0, 1.0), True), (2.5, 1.0, Limits(2.0, 1.0), False), (2.0, 1.5, Limits(2.0, 1.0), False),
        (2.0, 1.0, Limits(), True), (nan, 1.0, Limits(), False), (1.0, nan, Limits(), False), (inf, 1.0, Limits(), False),
        (1.0, inf, Limits(), False), (1.0, 1.0, Limits(nan, 1.0), False),
    ]:  # fmt: skip
        assert bool(within_limits(tf.constant(loss), tf.constant(norm), limits)) == want, (loss, norm, limits)


def test_an_average_without_a_decay_is_refused_and_the_other_way_round():
    optimizer = adamw(1e-2, fuse=False)
    for ema, decay, message in [
        (True, None, "`state.ema` is filled and `ema_decay` is None, want both or neither"),
        (False, 0.5, "`state.ema` is empty and `ema_decay` is 0.5, want both or neither"),
    ]:
        state, _ = start(optimizer, ema=ema)
        with pytest.raises(ValueError, match=f"train_update: {message}"):
            train_update(state, tokens(0), cfg=CFG, optimizer=optimizer, policy=PLAIN, ema_decay=decay)
    with pytest.raises(ValueError, match="make_train_step: `ema_decay` is 1.5, want 0 < d < 1 or None"):
        make_train_step(CFG, optimizer, policy=PLAIN, ema_decay=1.5)


def test_specs_of_a_state_with_an_average():
    optimizer = adamw(1e-2, fuse=False)
    specs, (state, _) = train_specs(CFG, optimizer, ema=True), start(optimizer, ema=True)
    assert tree.to_dict(specs).keys() == tree.to_dict(state).keys()
    assert_trees_close(snapshot(state).ema, state.params, 0.0)
