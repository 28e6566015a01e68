"""Experts on several nodes: a row goes to each of its nodes once and is forwarded there; the numbers stay the same."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import RouterState, pipeline, tree
from dsv3.ops.dispatch import dispatch_capacity
from tests.compare import PLAIN, assert_close
from tests.more import LONG, more
from tests.small import model_config, random_params, random_router, random_tokens
from tests.train.test_mesh_step import layouts_of
from tests.train.test_pipeline_step import gradients, recorder

# Eight groups of two experts: with four nodes each has two groups, with two each has four.
FIELDS = {
    "num_hidden_layers": 2, "n_routed_experts": 16, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 5,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
ONE = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}  # one mixture: little to compile
CFG = model_config(**FIELDS)
MICRO, ROWS, LENGTH = 2, 8, 5


def tokens_of(cfg):
    return np.stack([random_tokens(cfg, ROWS, LENGTH + 1, seed=m) for m in range(MICRO)])


def weights_of():
    return np.random.default_rng(0).integers(0, 2, (MICRO, ROWS, LENGTH)).astype(np.float32)


@functools.cache
def on_one_device(cfg):
    return gradients(cfg, None, tokens_of(cfg), weights_of())


# As many experts, groups and choices as DeepSeek-V3 has, a group a node.
PUBLISHED = {
    "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
}  # fmt: skip
CASES = [
    pytest.param("expert:4", 2, {}, {}, marks=LONG),
    # One device a node: nothing to forward to.
    pytest.param("data:2,expert:4", 4, ONE, {"dispatch_dtype": "float32"}, marks=LONG),
    ("expert:8", 4, ONE, {"policy": PLAIN.replace(remat="block")}),
    *more(
        ("pipe:2,expert:4", 2, {"n_shared_experts": 0, "num_nextn_predict_layers": 0}, {"schedule": pipeline.zb1p}),
        ("expert:8", 8, ONE | PUBLISHED, {"policy": PLAIN.replace(experts="blocks")}),
    ),
]


@pytest.mark.parametrize(("axes", "nodes", "fields", "kwargs"), CASES)
def test_loss_and_every_gradient(axes, nodes, fields, kwargs):
    cfg = model_config(**FIELDS | fields)
    want, ref = on_one_device(cfg)
    got, metrics = gradients(cfg, axes, tokens_of(cfg), weights_of(), expert_nodes=nodes, **kwargs)
    assert_close(metrics.loss, ref.loss)
    for a, b in zip(metrics.parts.load, ref.parts.load):
        np.testing.assert_array_equal(a, b)
    for (path, a), b in zip(tree.items(got), tree.flatten(want)):
        assert_close(a, b, 1e-5, path)


def chosen(cfg, tokens):
    """The experts of each mixture, `[tokens, K]`, in every micro-batch."""
    params, router = random_params(dsv3.model_specs(cfg)), random_router(cfg)
    for batch in tokens:
        out = dsv3.model_apply(params, router, batch[:, :-1], cfg=cfg, policy=PLAIN)
        yield from out.stats.experts.numpy()


def test_a_token_stays_within_its_nodes_and_bytes_are_those_of_the_formula():
    """With a group a node, a token reaches at most `groups_kept`; between nodes a row goes once for each of them."""
    nodes, each, ways, d, k = 4, 2, 8, CFG.hidden_size, 5
    cfg = model_config(**FIELDS | ONE | {"n_group": 4, "topk_group": 2})
    tokens = tokens_of(cfg)
    _, metrics = gradients(cfg, "expert:8", tokens, expert_nodes=nodes)
    here, between, within, reached, rows, room = ROWS // ways * LENGTH, 0, 0, [], 0, 0
    for experts in chosen(cfg, tokens):
        device = experts.reshape(ways, here, k)
        on = (device[..., None] // 4 == np.arange(nodes)).any(2)  # [device, token, node]
        reached.append(on.sum(-1))
        first = dispatch_capacity(int(on.sum(1).max()), here)
        load = np.stack([np.bincount(part.reshape(-1), minlength=16) for part in device])
        second = dispatch_capacity(int(load.reshape(nodes, each, 16).sum(0).max()), here * nodes)
        # A row there and back, its gate values, and the gradients of all; the experts' numbers have none.
        between += (nodes - 1) * first * 4 * (2 * d + 2 * d + 2 * k + k)
        within += (each - 1) * second * (16 // nodes // each) * 4 * (2 * d + 2 * d + 2)
        rows += on.sum() + load.sum()
        room += nodes * first * ways + second * 16 * each
    reached = np.stack(reached)
    assert reached.max() == 2, "the groups that are kept"
    assert_close(metrics.mesh.token_nodes, reached.mean())
    assert int(metrics.mesh.node_bytes) == between and int(metrics.mesh.bytes) == between + within
    assert_close(metrics.mesh.padding, 1 - rows / room)


def test_nothing_is_dropped_when_all_tokens_want_one_expert():
    """The forwarder's capacity is the tokens of all nodes then."""
    cfg = model_config(**FIELDS | ONE | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1})
    state = dsv3.train_init([1, 2], cfg, recorder())
    state = state._replace(router=RouterState(state.router.moe + 10.0 * tf.one_hot(9, 16), state.router.mtp))
    _, want = dsv3.train_update(state, tokens_of(cfg), cfg=cfg, optimizer=recorder(), policy=PLAIN)
    layouts = layouts_of(cfg, "expert:4")
    step = dsv3.make_train_step(cfg, recorder(), layouts, policy=PLAIN, expert_nodes=2)
    _, got = step(dsv3.place_state(state, layouts), tokens_of(cfg))
    assert got.parts.load.moe[0, 9] == MICRO * ROWS * LENGTH and got.mesh.token_nodes == 1
    assert_close(got.loss, want.loss, 1e-5)
    assert_close(got.optim.grad_norm, want.optim.grad_norm, 1e-5)


def test_nodes_that_cannot_be_are_named():
    layouts = dsv3.make_layouts(dsv3.model_specs(CFG), dsv3.make_mesh("expert:4"))
    with pytest.raises(ValueError, match="make_train_step: `expert_nodes` is 3, want a divisor of 4, the mesh's devices on"):
        dsv3.make_train_step(CFG, dsv3.adamw(1e-3), layouts, expert_nodes=3)
    with pytest.raises(ValueError, match="`expert_nodes` is given, but no `layouts`"):
        dsv3.make_train_step(CFG, dsv3.adamw(1e-3), expert_nodes=2)
