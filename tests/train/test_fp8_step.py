"""The training step in FP8: the same in every way to compute it, on one device and on a mesh."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.nn.fp8_delayed import GRADIENT, INPUT, MATRICES, WEIGHT, delayed_attach
from dsv3.recipe import RECIPES
from tests.compare import PLAIN, assert_close
from tests.more import LONG, more
from tests.small import model_config, random_params, random_router, random_tokens
from tests.train.test_mesh_step import layouts_of
from tests.train.test_step import sgd

CFG = model_config(num_hidden_layers=3, num_nextn_predict_layers=0, hidden_size=16, n_routed_experts=8, n_group=4)
PAPER = PLAIN.replace(fp8=RECIPES["paper"])
TOKENS = random_tokens(CFG, 4, 9)


def start():
    return dsv3.train_state(random_params(dsv3.model_specs(CFG)), random_router(CFG), sgd(1.0))


def gradients(policy, axes=None, *, tokens=TOKENS, **options):
    """The loss, and the gradients as what gradient descent of rate 1 has taken from the parameters."""
    state, layouts = start(), None
    if axes is not None:
        layouts = layouts_of(CFG, axes)
        state = dsv3.place_state(state, layouts)
    if layouts is None and policy.loop != "scan":  # one step takes less time than to compile it
        step = functools.partial(dsv3.train_update, cfg=CFG, optimizer=sgd(1.0), policy=policy, bias_rate=0.0)
    else:
        step = dsv3.make_train_step(CFG, sgd(1.0), layouts, policy=policy, bias_rate=0.0, **options)
    new, metrics = step(state, tokens)
    params = new.params if layouts is None else dsv3.gather_state(new).params
    return metrics, tree.to_dict(tree.map_leaves(tf.subtract, start().params, params))


@functools.cache
def reference():
    return gradients(PAPER)


def distance(got, want):
    """‖a − b‖ / ‖b‖ of all gradients together."""
    apart, size = (
        sum(float(tf.reduce_sum(tf.square(t))) for t in leaves)
        for leaves in ([got[path] - want[path] for path in want], want.values())
    )
    return (apart / size) ** 0.5


@pytest.mark.parametrize("how", [pytest.param({"loop": "scan"}, marks=LONG), {"remat": "block"}], ids=str)
def test_recomputation_changes_nothing(how):
    metrics, grads = gradients(PAPER.replace(**how))
    assert_close(metrics.loss, reference()[0].loss, 1e-6)
    assert distance(grads, reference()[1]) < 1e-5


def test_fp8_is_what_the_step_computes_in():
    """About 4% of each product; more where routing has changed."""
    assert 0.02 < distance(reference()[1], gradients(PLAIN)[1])


@LONG
def test_accumulation():
    """The forward pass is the same: its tiles lie within a token. Gradients of weights have tiles over other tokens."""
    metrics, grads = gradients(PAPER, tokens=TOKENS.reshape(2, 2, -1))
    assert_close(metrics.loss, reference()[0].loss, 1e-6)
    assert 1e-4 < distance(grads, reference()[1]) < 0.05


@functools.cache
def on_a_mesh(axes, nodes):
    return gradients(PAPER, axes, expert_nodes=nodes)


@pytest.mark.parametrize(
    ("axes", "nodes"), [("data:2,expert:2", 1), *more(("data:2", 1), ("expert:2", 1), ("expert:4", 2), ("expert:4", 4))]
)
def test_meshes(axes, nodes):
    """Rows that travel in FP8 arrive as they are quantised on one device; sums over tokens have other tiles."""
    metrics, grads = on_a_mesh(axes, nodes)
    assert_close(metrics.loss, reference()[0].loss, 1e-6)
    assert distance(grads, reference()[1]) < 0.05


@LONG
@pytest.mark.parametrize(("axes", "nodes"), [("data:2,expert:2", 1), ("expert:2", 1), ("expert:4", 2), ("expert:4", 4)])
def test_rows_in_fp8_take_fewer_bytes(axes, nodes):
    plain, _ = gradients(PAPER.replace(fp8=PAPER.fp8.replace(dispatch=False)), axes, expert_nodes=nodes)
    saved = 1 - int(on_a_mesh(axes, nodes)[0].mesh.bytes) / int(plain.mesh.bytes)
    # There and back, forward and backward, a row has 64 bytes; two of the four ways take 20. Gate values are 8 more.
    assert saved == pytest.approx(2 * 44 / (4 * 64 + 8)) if nodes == 1 else saved > 0.2, saved


@LONG
def test_pipelines():
    tokens = TOKENS.reshape(2, 2, -1)
    metrics, grads = gradients(PAPER, "pipe:2", tokens=tokens, schedule=dsv3.pipeline.zb1p)
    want, exact = gradients(PAPER, tokens=tokens)
    assert_close(metrics.loss, want.loss, 1e-6)
    assert distance(grads, exact) < 1e-5


DELAYED = PLAIN.replace(fp8=RECIPES["delayed"].replace(history=2))
PRESENT = PLAIN.replace(fp8=DELAYED.fp8.replace(scaling="tensor"))


def delayed_state(policy=DELAYED):
    return dsv3.train_state(random_params(dsv3.model_specs(CFG)), random_router(CFG), sgd(0.0), fp8=policy.fp8)


@functools.cache
def delayed_update(policy):
    """The step with rate 0, which tests share; other policies make one step, which takes less time than to compile it."""

    def update(state, tokens):
        return dsv3.train_update(state, tokens, cfg=CFG, optimizer=sgd(0.0), policy=policy, bias_rate=0.0)

    return tf.function(update) if policy == DELAYED or policy.loop == "scan" else update


def delayed_steps(*batches, policy=DELAYED, state=None):
    """The states after each batch, with rate 0: parameters stay."""
    state, update = state or delayed_state(policy), delayed_update(policy)
    found = []
    for tokens in batches:
        state, metrics = update(state, tokens)
        found.append((state, metrics))
    return found


def test_delayed_scales_look_back():
    """The first step has present scales. Its largest values decide those of the next, and fall out after `history` steps."""
    other = random_tokens(CFG, 4, 9, seed=5)
    (one, first), (two, again), (three, _), (four, _) = delayed_steps(TOKENS, TOKENS, other, other)
    _, want = delayed_steps(TOKENS, policy=PRESENT)[0]
    assert_close(first.loss, want.loss, 1e-6)
    assert_close(again.loss, want.loss, 1e-6)
    path = "moe.ffn.gate_up"
    assert sorted(one.amax) == sorted(p for p, _ in tree.items(start().params) if p.rpartition(".")[2] in MATRICES)
    weight = tf.reduce_max(tf.abs(start().params.moe.ffn.gate_up), [1, 2, 3])
    np.testing.assert_array_equal(one.amax[path][:, WEIGHT, 0], weight)
    assert (one.amax[path][..., 0] > 0).numpy().all() and not one.amax[path][..., 1].numpy().any()
    np.testing.assert_array_equal(two.amax[path][..., 1], one.amax[path][..., 0])
    assert not np.array_equal(three.amax[path][..., 0], two.amax[path][..., 0])
    assert_close(four.amax[path][:, INPUT, 0], three.amax[path][:, INPUT, 0], 0.2)
    assert not np.isin(one.amax[path][:, GRADIENT, 0], four.amax[path][:, GRADIENT]).any()


def test_what_is_larger_than_before_saturates():
    small = delayed_state()
    small = small._replace(amax=tree.map_leaves(lambda t: t + 1e-3, small.amax))
    ((_, flat),) = delayed_steps(TOKENS, state=small)
    ((_, whole),) = delayed_steps(TOKENS)
    assert abs(float(flat.parts.nll - whole.parts.nll)) > 0.01, "a model of values that are all cut off"


@pytest.mark.parametrize("how", [{"remat": "block"}, *more({"loop": "scan"})], ids=str)
def test_delayed_scales_in_every_way(how):
    """Also with micro-batches, of whose largest values the largest counts."""
    (first, _), (want, exact) = delayed_steps(TOKENS, TOKENS)
    ((state, metrics),) = delayed_steps(TOKENS.reshape(2, 2, -1), policy=DELAYED.replace(**how), state=first)
    assert_close(metrics.loss, exact.loss, 1e-6)
    for path in want.amax:
        assert_close(state.amax[path][..., 0], want.amax[path][..., 0], 1e-5, path)


def test_recipes_of_state_and_step_must_agree():
    with pytest.raises(ValueError, match="train_update: `state.amax` is empty, want it as `policy.fp8` has it"):
        dsv3.train_update(start(), TOKENS, cfg=CFG, optimizer=sgd(), policy=DELAYED)
    with pytest.raises(ValueError, match="make_train_step: the recipe has delayed scales"):
        dsv3.make_train_step(CFG, sgd(), layouts_of(CFG, "data:2"), policy=DELAYED)
    with pytest.raises(ValueError, match="linear_apply: a weight has no history, want one of `delayed_attach`"):
        dsv3.model_apply(start().params, start().router, TOKENS, cfg=CFG, policy=DELAYED)
    params = delayed_attach(start().params, delayed_state().amax)
    with pytest.raises(ValueError, match="linear_apply: a weight has a history, want a plain one with scaling='tensor'"):
        dsv3.model_apply(params, start().router, TOKENS, cfg=CFG, policy=PRESENT)
    state = dsv3.place_state(delayed_state(), layouts_of(CFG, "data:2"))
    step = dsv3.make_train_step(CFG, sgd(0.0), layouts_of(CFG, "data:2"), policy=PAPER)
    with pytest.raises(ValueError, match="train_step: `state.amax` is filled, want a state without"):
        step(state, TOKENS)


def test_rows_do_not_travel_in_two_dtypes():
    with pytest.raises(ValueError, match="`dispatch_dtype` is 'bfloat16', but by `policy.fp8` rows travel in FP8"):
        dsv3.make_train_step(CFG, sgd(), layouts_of(CFG, "expert:2"), policy=PAPER, dispatch_dtype="bfloat16")
