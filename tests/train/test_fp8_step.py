"""The training step in FP8: the same in every way to compute it, on one device and on a mesh."""

import functools

import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.recipe import RECIPES
from tests.compare import PLAIN, assert_close
from tests.more import MORE, more
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


@pytest.mark.parametrize("how", [{"remat": "block"}, {"loop": "scan"}], ids=str)
def test_recomputation_changes_nothing(how):
    metrics, grads = gradients(PAPER.replace(**how))
    assert_close(metrics.loss, reference()[0].loss, 1e-6)
    assert distance(grads, reference()[1]) < 1e-5


def test_fp8_is_what_the_step_computes_in():
    """About 4% of each product; more where routing has changed."""
    assert 0.02 < distance(reference()[1], gradients(PLAIN)[1])


def test_accumulation():
    """The forward pass is the same: its tiles lie within a token. Gradients of weights have tiles over other tokens."""
    metrics, grads = gradients(PAPER, tokens=TOKENS.reshape(2, 2, -1))
    assert_close(metrics.loss, reference()[0].loss, 1e-6)
    assert 1e-4 < distance(grads, reference()[1]) < 0.05


@pytest.mark.parametrize(
    ("axes", "nodes"), [("data:2,expert:2", 1), *more(("data:2", 1), ("expert:2", 1), ("expert:4", 2), ("expert:4", 4))]
)
def test_meshes(axes, nodes):
    """Rows that travel in FP8 arrive as they are quantised on one device; sums over tokens have other tiles."""
    metrics, grads = gradients(PAPER, axes, expert_nodes=nodes)
    assert_close(metrics.loss, reference()[0].loss, 1e-6)
    assert distance(grads, reference()[1]) < 0.05
    if "expert" in axes:
        plain, _ = gradients(PAPER.replace(fp8=PAPER.fp8.replace(dispatch=False)), axes, expert_nodes=nodes)
        saved = 1 - int(metrics.mesh.bytes) / int(plain.mesh.bytes)
        # There and back, forward and backward, a row has 64 bytes; two of the four ways take 20. Gate values are 8 more.
        assert saved == pytest.approx(2 * 44 / (4 * 64 + 8)) if nodes == 1 else saved > 0.2, saved


@pytest.mark.skipif(not MORE, reason="long")
def test_pipelines():
    tokens = TOKENS.reshape(2, 2, -1)
    metrics, grads = gradients(PAPER, "pipe:2", tokens=tokens, schedule=dsv3.pipeline.zb1p)
    want, exact = gradients(PAPER, tokens=tokens)
    assert_close(metrics.loss, want.loss, 1e-6)
    assert distance(grads, exact) < 1e-5


def test_rows_do_not_travel_in_two_dtypes():
    with pytest.raises(ValueError, match="`dispatch_dtype` is 'bfloat16', but by `policy.fp8` rows travel in FP8"):
        dsv3.make_train_step(CFG, sgd(), layouts_of(CFG, "expert:2"), policy=PAPER, dispatch_dtype="bfloat16")
