"""The training step: accumulation, the router's bias, ways to compute, donation and tracing."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import ComputePolicy, adamw, make_train_step, model_specs, train_init, train_state, train_update, tree
from dsv3.compiled import snapshot
from dsv3.train.optim import Optimizer, OptimStats
from tests import oracles
from tests.compare import PLAIN, XLA, assert_close, assert_trees_close, error
from tests.more import LONG, more
from tests.small import KEY, model_config, random_params, random_router, random_tokens

CFG = model_config(num_hidden_layers=2, num_nextn_predict_layers=1)
LENGTH = 7


def sgd(rate=0.5):
    """`p − rate·g`: unlike Adam's, its step is as exact as the gradient."""

    def update(grads, state, params, tokens, norm, take):
        new = tree.map_leaves(lambda p, g: p - rate * tf.cast(g, p.dtype), params, grads)
        return new, state, OptimStats(tf.constant(0.0), tf.constant(rate))

    return Optimizer(lambda params: (), update)


def start(optimizer, cfg=CFG):
    return train_state(random_params(model_specs(cfg)), random_router(cfg), optimizer)


def batch(rows, seed=0):
    tokens = random_tokens(CFG, rows, LENGTH + 1, seed)
    weights = np.random.default_rng(seed).integers(0, 3, (rows, LENGTH)).astype(np.float32)
    return tokens, weights


def parts_of(values, parts):
    return values.reshape(parts, -1, values.shape[-1])


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_up_to_one_batch(parts):
    tokens, weights = batch(4)
    how = {"cfg": CFG, "optimizer": sgd(), "mtp_weight": 0.4, "balance_weight": 0.3, "bias_rate": 0.01, "policy": PLAIN}
    want, at_once = train_update(start(sgd()), tokens, weights, **how)
    got, added = train_update(start(sgd()), parts_of(tokens, parts), parts_of(weights, parts), **how)
    assert_trees_close(got, want, 1e-5)
    assert_trees_close(added, at_once, 1e-5)
    assert not np.allclose(got.params.embed, start(sgd()).params.embed, atol=1e-3)
    assert int(got.step) == 1 and int(got.tokens) == 4 * LENGTH


def test_accumulation_with_adamw():
    optimizer = adamw(0.01, eps=1e-2, clip_norm=0.5, fuse=False)
    tokens, weights = batch(4)
    how = {"cfg": CFG, "optimizer": optimizer, "policy": PLAIN}
    want, _ = train_update(start(optimizer), tokens, weights, **how)
    got, metrics = train_update(start(optimizer), parts_of(tokens, 2), parts_of(weights, 2), **how)
    assert float(metrics.optim.grad_norm) > 0.5
    assert_trees_close(got, want, 1e-5)


def test_bias_moves_once_by_the_load_of_all_micro_batches():
    tokens, _ = batch(4)
    state = start(sgd())
    new, metrics = train_update(
        state, parts_of(tokens, 4), cfg=CFG, optimizer=sgd(), bias_rate=0.125, balance_weight=0.0, policy=PLAIN
    )
    for name in ("moe", "mtp"):
        load = getattr(metrics.parts.load, name).numpy()
        assert (load.sum(1) == 4 * LENGTH * CFG.moe.router.top_k).all()
        want = oracles.update_bias(getattr(state.router, name).numpy().astype(np.float64), load, 0.125)
        assert_close(getattr(new.router, name), want)
    single = [train_update(state, rows[None], cfg=CFG, optimizer=sgd(), policy=PLAIN)[1].parts.load for rows in tokens]
    assert_close(metrics.parts.load.moe, sum(load.moe.numpy() for load in single))


def test_weights_of_the_loss_and_the_bias_may_be_schedules_of_tokens():
    tokens, _ = batch(2)
    state = start(sgd())._replace(tokens=tf.constant(100, tf.int64))
    plain = {"mtp_weight": 0.2, "balance_weight": 0.5, "bias_rate": 0.25}
    scheduled = {name: functools.partial(lambda value, seen: value * seen / 100.0, value) for name, value in plain.items()}
    how = {"cfg": CFG, "optimizer": sgd(), "policy": PLAIN}
    want, at_once = train_update(state, tokens, **plain, **how)
    got, metrics = train_update(state, tokens, **scheduled, **how)
    assert_trees_close(got, want)
    assert_close(metrics.loss, at_once.loss)
    assert int(got.tokens) == 100 + 2 * LENGTH


@pytest.fixture(scope="module")
def reference():
    """A gradient step of rate 1: the state before it, after it, and its metrics."""
    before = start(sgd(1.0))
    return before, *train_update(before, *batch(2), cfg=CFG, optimizer=sgd(1.0), policy=PLAIN)


@pytest.mark.parametrize(("name", "policy", "compiled", "tolerance"), [
    ("remat", PLAIN.replace(remat="block"), False, 1e-5),
    ("bfloat16", PLAIN.replace(dtype="bfloat16"), False, 0.1),
    ("fused", ComputePolicy(fuse=True), True, 1e-5),
    ("scan", PLAIN.replace(loop="scan"), True, 1e-5),
    pytest.param("xla", XLA, True, 1e-5, marks=LONG),
])  # fmt: skip
def test_policies_change_how_and_not_what(reference, name, policy, compiled, tolerance):
    """The change of each parameter agrees, relative to the largest change of all."""
    before, want, at_once = reference
    how = {"cfg": CFG, "optimizer": sgd(1.0), "policy": policy}
    step = make_train_step(**how) if compiled else functools.partial(train_update, **how)
    got, metrics = step(snapshot(before), *batch(2))
    assert_close(metrics.loss, at_once.loss, tolerance)
    steps = [tree.to_dict(tree.map_leaves(lambda a, b: a - b, new.params, before.params)) for new in (snapshot(got), want)]
    largest = max(float(tf.reduce_max(tf.abs(leaf))) for leaf in steps[1].values())
    for path, leaf in steps[1].items():
        off = error(steps[0][path], leaf) * float(tf.reduce_max(tf.abs(leaf))) / largest
        assert off <= tolerance, f"{path}: off by {off:.1e} of the largest change"
    if name != "bfloat16":
        assert_trees_close(snapshot(got.router), want.router)


@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=LONG)])
def test_step_is_the_pure_update_in_place_and_traced_once(fuse):
    optimizer = adamw(1e-2, eps=1e-3, fuse=fuse)
    first = start(optimizer)
    kept = snapshot(first)
    want, at_once = train_update(first, *batch(2), cfg=CFG, optimizer=optimizer, policy=PLAIN)
    step = make_train_step(CFG, optimizer, policy=PLAIN)
    state, metrics = step(first, *batch(2))
    assert_trees_close(state, want, 1e-5)
    assert_trees_close(metrics, at_once, 1e-5)
    variables = [leaf.ref() for leaf in tree.flatten(state)]
    after = snapshot(state)
    tokens, weights = batch(2, 1)
    for inputs in [(tf.constant(tokens), tf.constant(weights)), (tokens, weights.astype(np.float64)), (tokens,)]:
        state, _ = step(state, *inputs)
    assert step.traces() == 1
    assert [leaf.ref() for leaf in tree.flatten(state)] == variables, "updated in place"
    assert int(state.step) == 4 and int(after.step) == 1 and int(kept.step) == 0
    assert_trees_close(after, want, 1e-5)
    assert_trees_close(kept, start(optimizer), 0.0)


def test_loss_falls_to_nothing_on_one_batch():
    optimizer = adamw(2e-2, weight_decay=0.0, fuse=False)
    state, step = train_init(KEY, CFG, optimizer), make_train_step(CFG, optimizer, policy=PLAIN)
    tokens, _ = batch(2)
    losses = []
    for _ in range(60):
        state, metrics = step(state, tokens)
        losses.append([float(metrics.parts.nll), float(metrics.parts.mtp[0])])
    assert losses[0][0] == pytest.approx(np.log(CFG.vocab_size), rel=0.05)
    assert max(losses[-1]) < 0.1, "the model and its module know the batch by heart"


def test_wrong_input_is_named():
    optimizer = sgd()
    with pytest.raises(ValueError, match=r"train_update: `tokens` has rank 1, want 2 \[B, T\+1\] or 3 \[A, B, T\+1\]"):
        train_update(start(optimizer), np.zeros(4, np.int32), cfg=CFG, optimizer=optimizer)
    with pytest.raises(ValueError, match="mesh_of: `layouts` holds other things than layouts"):
        make_train_step(CFG, optimizer, layouts={})


def test_parameters_of_a_checkpoint_become_float32():
    """In bfloat16 an update of 1e-5 would be rounded away."""
    params = tree.map_leaves(lambda p: tf.cast(p, tf.bfloat16), random_params(model_specs(CFG)))
    optimizer = adamw(1e-5, fuse=False)
    state = train_state(params, random_router(CFG), optimizer)
    before = snapshot(state.params)
    state, _ = train_update(state, batch(2)[0], cfg=CFG, optimizer=optimizer, policy=PLAIN)
    for a, b in zip(tree.flatten(state.params), tree.flatten(before)):
        assert a.dtype == tf.float32 and np.any(a.numpy() != b.numpy())


def test_token_ids_are_looked_at_before_compiling():
    step = make_train_step(CFG, sgd())
    tokens = batch(2)[0]
    tokens[1, LENGTH] = CFG.vocab_size
    with pytest.raises(ValueError, match=rf"train_step: `tokens` holds token id {CFG.vocab_size}, want ids in"):
        step(start(sgd()), tokens)
    assert step.traces() == 0


def test_an_optimizer_of_another_library_is_refused():
    for name, make in (
        ("make_train_step", lambda other: make_train_step(CFG, other)),
        ("train_init", lambda other: train_init(KEY, CFG, other)),
    ):
        with pytest.raises(ValueError, match=rf"(train_state|{name}): `optimizer` is of type Adam, want Optimizer"):
            make(tf.keras.optimizers.Adam())


@pytest.mark.parametrize("parts", [1, 4])
def test_weights_of_other_micro_batches_are_refused(parts):
    tokens, weights = batch(4)
    with pytest.raises(ValueError, match=rf"train_update: `weights` has shape \({parts}, .*, want \(2, 2, 7\) \[A, B, T\]"):
        train_update(start(sgd()), parts_of(tokens, 2), np.ones([parts, 2, LENGTH]), cfg=CFG, optimizer=sgd())


@pytest.mark.parametrize("policy", [PLAIN, *more(XLA)])
def test_any_number_of_micro_batches_is_one_function(policy):
    """A batch that grows is more micro-batches of one shape, which compile once, and once more when they first change."""
    cfg = CFG.replace(num_hidden_layers=1, first_k_dense_replace=0) if policy is PLAIN else CFG  # short to trace
    step = make_train_step(cfg, sgd(), policy=policy)
    state, want = start(sgd(), cfg), start(sgd(), cfg)
    how = {"cfg": cfg, "optimizer": sgd(), "policy": PLAIN}
    for seed, parts in enumerate((1, 3, 2)):
        tokens, weights = batch(2 * parts, seed)
        state, metrics = step(state, parts_of(tokens, parts), parts_of(weights, parts))
        want, at_once = train_update(want, tokens, weights, **how)
        assert_close(metrics.loss, at_once.loss, 1e-5)
        assert_close(metrics.parts.balance, at_once.parts.balance, 1e-5)
        assert step.traces() <= 2
    assert_trees_close(state, want, 1e-4)
    state, _ = step(state, *batch(2))
    assert step.traces() == 3, "rows of another shape, or without micro-batches, compile anew"
