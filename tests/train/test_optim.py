"""AdamW against its equations in float64, what decays, and the schedules."""

import math

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import adamw, model_specs, tree
from dsv3.compiled import compile_step
from dsv3.train.optim import decays, global_norm
from dsv3.train.schedule import curve_schedule, warmup_cosine
from tests.compare import assert_close, error, memory_beside, normal
from tests.small import model_config

SHAPES = {"w": (5, 64), "attn_norm": (7,), "q_a_bias": (3,), "odd": (3, 11)}


def example(seed, scale=1.0):
    return {name: normal(seed, *shape, scale=scale) for name, shape in SHAPES.items()}


def oracle(params, steps, *, lr, b1=0.9, b2=0.95, eps=1e-8, wd=0.1, clip=1.0):
    """arXiv:1711.05101 algorithm 2 with the gradient clipped by its norm over all leaves; float64, one entry at a time."""
    params = {k: v.astype(np.float64) for k, v in params.items()}
    mu, nu = ({k: np.zeros(v.shape) for k, v in params.items()} for _ in range(2))
    for t, grads in enumerate(steps, 1):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        for k, g in grads.items():
            g = g.astype(np.float64) * (min(1.0, clip / norm) if clip is not None else 1.0)
            mu[k] = b1 * mu[k] + (1 - b1) * g
            nu[k] = b2 * nu[k] + (1 - b2) * g * g
            step = (mu[k] / (1 - b1**t)) / (np.sqrt(nu[k] / (1 - b2**t)) + eps)
            decay = wd if k in ("w", "odd") else 0.0
            params[k] = params[k] - lr(t - 1) * (step + decay * params[k])
    return params, mu, nu


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
def test_adamw_matches_the_equations(clip, fuse):
    params, steps = example(0), [example(s, scale=0.1 * s) for s in (1, 2, 3)]
    optimizer = adamw(lambda tokens: 0.01 * (1.0 + tokens / 100.0), clip_norm=clip, fuse=fuse)
    got, state = tree.map_leaves(tf.constant, params), optimizer.init(params)
    for t, grads in enumerate(steps):
        grads = tree.map_leaves(tf.constant, grads)
        norm, take = global_norm(grads), tf.constant(True)
        got, state, stats = optimizer.update(grads, state, got, tf.constant(100.0 * t, tf.float64), norm, take)
        assert_close(stats.grad_norm, np.linalg.norm(np.concatenate([g.numpy().ravel() for g in grads.values()])))
        assert_close(stats.learning_rate, 0.01 * (1 + t))
    want, mu, nu = oracle(params, steps, lr=lambda t: 0.01 * (1 + t), clip=clip)
    assert int(state.count) == 3
    for name in SHAPES:
        assert_close(got[name], want[name], what=name)
        assert_close(state.mu[name], mu[name], what=name)
        assert_close(state.nu[name], nu[name], what=name)


def test_a_schedule_of_updates_counts_those_that_were_taken():
    params, grads = ({"w": tf.constant([value])} for value in (1.0, 0.5))
    optimizer = adamw(lambda updates: 0.1 * (1.0 + updates), schedule_unit="updates")
    state, rates = optimizer.init(params), []
    for take in (True, False, True):
        params, state, stats = optimizer.update(
            grads, state, params, tf.constant(1e9, tf.float64), tf.constant(0.5), tf.constant(take)
        )
        rates.append(float(stats.learning_rate))
    assert_close(np.array(rates), np.array([0.1, 0.2, 0.2]))


def test_moments_in_bfloat16():
    params, grads = example(0), example(1)
    optimizer = adamw(0.01, moment_dtype=tf.bfloat16, clip_norm=None, fuse=False)
    leaves = tree.map_leaves(tf.constant, params)
    zero = tf.constant(0.0)
    tensors, take = tree.map_leaves(tf.constant, grads), tf.constant(True)
    got, state, _ = optimizer.update(tensors, optimizer.init(leaves), leaves, zero, zero, take)
    assert {leaf.dtype for leaf in tree.flatten((state.mu, state.nu))} == {tf.bfloat16}
    want, mu, _ = oracle(params, [grads], lr=lambda t: 0.01, clip=None)
    assert_close(state.mu["w"], mu["w"], 2**-8)
    step, wanted = leaves["w"] - got["w"], params["w"] - want["w"]
    assert 0.0 < error(step, wanted) <= 2**-7  # it is taken from the moments as they are stored
    told = tree.unflatten_as(got, optimizer.last_update(got, state, 0.01))["w"]
    assert_close(step, told, 1e-4)  # the parameters are a hundred times the step, and rounded to float32


def test_moments_in_float16_are_refused():
    with pytest.raises(ValueError, match="adamw: `moment_dtype` is 'float16', want one of"):
        adamw(0.01, moment_dtype=tf.float16)


def test_an_update_in_place_copies_no_leaf():
    """Old and new values of a leaf, and of its moments, are the same memory."""
    leaf = tf.fill([1024, 1024], 0.5)
    optimizer, zero, grads = adamw(0.01, clip_norm=None), tf.constant(0.0), {"w": tf.cast(leaf, tf.bfloat16)}

    def update(state, grads):
        params, opt = state
        return optimizer.update(grads, opt, params, zero, zero, tf.constant(True))[:2], ()

    step = compile_step(update)
    state = ({"w": leaf}, optimizer.init({"w": leaf}))
    for _ in range(2):
        state, _ = step(state, grads)
    more = memory_beside(lambda: step(state, grads))
    assert more < 1 << 20, f"{more:,} bytes beside a leaf of {4 << 20:,}"


def test_what_decays():
    paths = tree.to_dict(model_specs(model_config(attention_bias=True)))
    names = {path.rsplit(".", 1)[-1] for path in paths if not decays(path)}
    assert {"norm", "attn_norm", "ffn_norm", "q_norm", "kv_norm", "embed_norm", "hidden_norm"} < names
    assert names - {"q_a_bias", "kv_a_bias", "o_bias"} == {n for n in names if n.endswith("norm")}
    decayed = {path.rsplit(".", 1)[-1] for path in paths if decays(path)}
    assert {"embed", "head", "router", "gate_up", "down", "q_b", "kv_b", "o", "proj"} <= decayed
    assert all(len(spec.shape) > 1 for path, spec in paths.items() if decays(path))


def test_global_norm():
    leaves = example(5)
    want = np.linalg.norm(np.concatenate([leaf.ravel().astype(np.float64) for leaf in leaves.values()]))
    for fuse in (False, True):
        assert_close(global_norm(tree.map_leaves(tf.constant, leaves), fuse=fuse), want)


def test_schedule_has_its_phases():
    schedule = curve_schedule(warmup_cosine(2.0, warmup_tokens=10, constant_tokens=20, total_tokens=130, final=0.5))
    want = {0: 0.0, 5: 1.0, 10: 2.0, 30: 2.0, 80: 1.25, 130: 0.5, 10**9: 0.5}
    for tokens, value in want.items():
        assert_close(schedule(tf.constant(tokens)), value)
    quarter = 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4))
    assert_close(schedule(tf.constant(55)), quarter)
    for parts, at_start in {(0, 0, 10): 2.0, (0, 0, 0): 0.5, (10, 0, 10): 0.0}.items():
        warm, constant, total = parts
        curve = warmup_cosine(2.0, warmup_tokens=warm, constant_tokens=constant, total_tokens=total, final=0.5)
        assert [float(curve_schedule(curve)(tf.constant(t))) for t in (0, 10, 11)] == [at_start, 0.5, 0.5]


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"adamw: b1=1.0 and b2=0.95, want both in \[0, 1\)"):
        adamw(0.1, b1=1.0)
    with pytest.raises(ValueError, match="adamw: `clip_norm` is 0"):
        adamw(0.1, clip_norm=0)
    with pytest.raises(ValueError, match="adamw: `schedule_unit` is 'steps', want one of 'tokens', 'updates'"):
        adamw(0.1, schedule_unit="steps")
    with pytest.raises(ValueError, match="end at 30 tokens, want at most total_tokens=20"):
        warmup_cosine(1.0, warmup_tokens=10, constant_tokens=20, total_tokens=20)
    optimizer = adamw(0.1)
    params = tree.map_leaves(tf.constant, example(0))
    grads = {name: leaf for name, leaf in params.items() if name != "w"}
    with pytest.raises(ValueError, match=r"adamw.update: `grads` does not have the expected structure: missing \['w'\]"):
        zero = tf.constant(0.0, tf.float64)
        optimizer.update(grads, optimizer.init(params), params, zero, tf.constant(1.0), tf.constant(True))
