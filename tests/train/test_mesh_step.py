"""The step on a mesh is the step on one device: same losses, loads, biases and parameters, in any layout."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.experimental import dtensor

import dsv3
from dsv3 import tree
from dsv3.layout import local_bytes
from dsv3.parallel.mesh import axis_size, make_mesh, whole
from dsv3.parallel.tape import Capacity, Exchange, Tape, Value, drive
from dsv3.train.mesh_step import state_layouts
from dsv3.train.pieces import model_pieces
from tests.compare import PLAIN, assert_close
from tests.small import KEY, model_config, random_tokens

RATES = {"mtp_weight": 0.3, "balance_weight": 0.01, "bias_rate": 0.01}
STEPS = 10
# Rounding of sums in another order, 6e-8 a sum, grows over ten steps of Adam, whose division by √v makes small gradients
# count as much as large ones (the larger eps bounds that).
LOSS, PARAMS = 1e-5, 1e-4


def optimizer():
    return dsv3.adamw(2e-3, eps=1e-5, fuse=False)


def layouts_of(cfg, axes, zero=True):
    specs = dsv3.model_specs(cfg)
    layouts = dsv3.make_layouts(specs, make_mesh(axes))
    return dsv3.zero_layouts(specs, layouts) if zero else layouts


def train(cfg, axes, batches, *, policy=PLAIN, zero=True, **kwargs):
    """Returns the state after the batches, as plain tensors, and all metrics."""
    state, layouts = dsv3.train_init(KEY, cfg, optimizer()), None
    if axes is not None:
        layouts = layouts_of(cfg, axes, zero)
        state = dsv3.place_state(state, layouts)
    step = dsv3.make_train_step(cfg, optimizer(), layouts, policy=policy, **RATES, **kwargs)
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(metrics)
    return (state if layouts is None else dsv3.gather_state(state)), found


def batches_of(cfg, micro, rows, length, steps=STEPS):
    return [
        np.stack([random_tokens(cfg, rows, length + 1, seed=s * micro + m) for m in range(micro)]) for s in range(steps)
    ]


@functools.cache
def on_one_device(cfg, micro, rows, length):
    return train(cfg, None, batches_of(cfg, micro, rows, length))


def assert_same_run(got, want):
    (state, metrics), (ref, ref_metrics) = got, want
    for m, r in zip(metrics, ref_metrics, strict=True):
        assert_close(m.loss, r.loss, LOSS, "loss")
        assert_close(m.parts.nll, r.parts.nll, LOSS, "nll")
        assert_close(m.parts.mtp, r.parts.mtp, LOSS, "mtp")
        assert_close(m.parts.balance, r.parts.balance, LOSS, "balance")
        assert_close(m.optim.grad_norm, r.optim.grad_norm, 1e-3, "norm")
        assert_close(m.optim.learning_rate, r.optim.learning_rate)
        for a, b in zip(m.parts.load, r.parts.load):
            np.testing.assert_array_equal(a, b, "the experts that were chosen")
    for a, b in zip(state.router, ref.router):
        np.testing.assert_array_equal(a, b, "the router's biases")
    assert (int(state.step), int(state.tokens)) == (int(ref.step), int(ref.tokens))
    for (path, a), b in zip(tree.items(state.params), tree.flatten(ref.params)):
        assert_close(a, b, PARAMS, path)


CONFIGS = [
    {"num_nextn_predict_layers": 1},
    {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "q_lora_rank": None, "n_shared_experts": 2},
    {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 2, "n_shared_experts": 0,
     "n_routed_experts": 12, "tie_word_embeddings": True},
]  # fmt: skip


@settings(max_examples=5)
@given(
    st.sampled_from(CONFIGS), st.sampled_from(["data:2", "expert:2", "data:2,expert:3", "expert:6", "data:4,expert:2"]),
    st.integers(1, 2), st.integers(1, 2), st.integers(2, 7),
)  # fmt: skip
def test_any_mesh_gives_the_numbers_of_one_device(fields, axes, micro, per_device, length):
    cfg = model_config(**fields)
    rows = per_device * 24
    want = on_one_device(cfg, micro, rows, length)
    assert_same_run(train(cfg, axes, batches_of(cfg, micro, rows, length)), want)


def test_without_zero_with_recomputation_and_kernels():
    cfg = model_config(**CONFIGS[0])
    policy = dsv3.default_policy("CPU").replace(remat="block", max_rows=0)
    want = on_one_device(cfg, 1, 24, 5)
    assert_same_run(train(cfg, "data:2,expert:2", batches_of(cfg, 1, 24, 5), policy=policy, zero=False), want)


def test_weights_leave_targets_out():
    cfg = model_config(**CONFIGS[0])
    tokens, weights = batches_of(cfg, 2, 4, 5, 1)[0], np.random.default_rng(0).integers(0, 2, (2, 4, 5))
    layouts = layouts_of(cfg, "expert:2")
    state = dsv3.train_init(KEY, cfg, optimizer())
    _, got = dsv3.make_train_step(cfg, optimizer(), layouts, policy=PLAIN)(dsv3.place_state(state, layouts), tokens, weights)
    _, want = dsv3.make_train_step(cfg, optimizer(), policy=PLAIN)(state, tokens, weights)
    assert_close(got.loss, want.loss, LOSS)
    assert_close(got.parts.mtp, want.parts.mtp, LOSS)


def test_a_state_lies_as_its_layouts_say_and_takes_the_bytes_of_the_formula():
    """ZeRO-1: 12 bytes a parameter (float32 master and moments), divided by the devices that share a leaf."""
    even = {"hidden_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 4, "moe_intermediate_size": 8}
    cfg = model_config(**even, n_routed_experts=8, n_group=4, vocab_size=64, intermediate_size=16)
    layouts = layouts_of(cfg, "data:2,expert:4")
    state = dsv3.train_init(KEY, cfg, optimizer())
    placed = dsv3.place_state(state, layouts)
    step = dsv3.make_train_step(cfg, optimizer(), layouts, policy=PLAIN)
    after, _ = step(placed, batches_of(cfg, 1, 8, 5, 1)[0])
    for one in (placed, after):
        held = [dtensor.unpack(leaf)[0] for leaf in tree.flatten((one.params, one.opt.mu, one.opt.nu))]
        assert sum(int(np.prod(leaf.shape)) for leaf in held) * 4 == 3 * local_bytes(dsv3.model_specs(cfg), layouts)
        for (path, leaf), layout in zip(tree.items(one), tree.flatten(state_layouts(one, layouts))):
            assert dtensor.fetch_layout(leaf) == layout, path
    experts = layouts.moe.ffn.gate_up.sharding_specs
    assert experts[1] == "expert" and "data" in experts, "experts over expert, their optimiser's part over data"
    assert set(layouts.embed.sharding_specs) == {"data", "expert"}
    whole_bytes = dsv3.count_params(dsv3.model_specs(cfg)) * 4
    ratio = local_bytes(dsv3.model_specs(cfg), layouts) / (whole_bytes / 8)
    assert 1 <= ratio < 1.25, "an eighth, but for leaves with one dim that divides, as norms"
    np.testing.assert_array_equal(whole(placed.params.embed), state.params.embed)


def test_bytes_and_padding_are_those_of_the_formula():
    """Rows there and back, forward and backward, with a gate value: ways − 1 of ways parts of each buffer leave a device."""
    cfg = model_config(**CONFIGS[0])
    ways, length, rows, d = 3, 6, 6, 12
    _, (metrics,) = train(cfg, f"expert:{ways}", batches_of(cfg, 1, rows, length, 1))
    tokens, experts, k, layers = rows // ways * length, 6, 2, 3
    load = tf.concat([metrics.parts.load.moe, metrics.parts.load.mtp], 0).numpy()
    sizes = {8 * n for n in range(1, 9)} | {tokens}
    assert load.sum() == layers * rows * length * k
    a_row = 4 * (2 * d + 2 * d + 2)
    capacities = float(metrics.dispatch.bytes) / (experts * a_row * (ways - 1) / ways)
    assert capacities in {a + b + c for a in sizes for b in sizes for c in sizes}, "three layers with a size of the ladder"
    assert_close(metrics.dispatch.padding, 1 - load.sum() / (capacities * experts * ways))


def test_nothing_is_dropped_when_all_tokens_want_one_expert():
    """The worst case: the capacity is the number of tokens."""
    cfg = model_config(**CONFIGS[0], n_group=1, topk_group=1, num_experts_per_tok=1)
    state = dsv3.train_init(KEY, cfg, optimizer())
    bias = tree.map_leaves(lambda b: b + 10.0 * tf.one_hot(1, 6), state.router)
    state = state._replace(router=bias)
    layouts, tokens = layouts_of(cfg, "expert:2"), batches_of(cfg, 1, 4, 9, 1)[0]
    _, got = dsv3.make_train_step(cfg, optimizer(), layouts, policy=PLAIN)(dsv3.place_state(state, layouts), tokens)
    _, want = dsv3.make_train_step(cfg, optimizer(), policy=PLAIN)(state, tokens)
    assert got.parts.load.moe[0, 1] == 4 * 9
    assert_close(got.loss, want.loss, LOSS)
    assert_close(got.optim.grad_norm, want.optim.grad_norm, 1e-5)
    assert_close(got.dispatch.padding, 1 - 1 / 6)


def test_group_limited_routing_keeps_tokens_within_their_nodes():
    """With a node's experts in one group, a token's rows go to at most `groups_kept` nodes; without groups to more."""
    reached = {}
    for kept in (2, 4):
        fields = {"n_routed_experts": 16, "n_group": 4, "topk_group": kept, "num_experts_per_tok": 4}
        cfg = model_config(**CONFIGS[0], **fields)
        pieces = model_pieces(cfg, PLAIN, ways=4)
        params = dsv3.model_init(KEY, cfg)
        block = tree.slice_leading(params.moe, 0)
        mixed = pieces.attention.fn({"block": block}, tf.zeros([16]), tf.random.stateless_normal([3, 40, 12], KEY))
        device = mixed.experts.numpy() // 4  # experts of a device, which here is a node
        reached[kept] = max(len(set(row)) for row in device)
    assert reached[2] == 2 and reached[4] > 2


def test_rows_may_travel_in_bfloat16():
    cfg = model_config(**CONFIGS[0])
    batch = batches_of(cfg, 1, 4, 5, 1)
    _, (full,) = train(cfg, "expert:2", batch)
    _, (half,) = train(cfg, "expert:2", batch, dispatch_dtype="bfloat16")
    gate = 8 / (4 * (4 * 12 + 2))  # gate values and their gradients stay float32, results come back in float32
    assert 0.5 < float(half.dispatch.bytes) / float(full.dispatch.bytes) < 1 - gate
    assert 0 < abs(float(half.loss - full.loss)) < 1e-3


@pytest.mark.parametrize(
    ("axes", "rows", "message"),
    [
        ("data:2,expert:2", 6, "train_step: `tokens` has 6 rows, want a multiple of 4, the devices on data and expert"),
        ("expert:4", 4, "not divisible by the axis's 4 devices"),
        ("pipe:2", 4, "'pipe' has more than one device"),
    ],
)
def test_what_cannot_be_is_named(axes, rows, message):
    cfg = model_config(**CONFIGS[0])
    with pytest.raises(ValueError, match=message):
        train(cfg, axes, batches_of(cfg, 1, rows, 5, 1))


def test_wrong_batches_are_named():
    cfg = model_config(**CONFIGS[0])
    layouts = layouts_of(cfg, "data:2")
    state = dsv3.place_state(dsv3.train_init(KEY, cfg, optimizer()), layouts)
    step = dsv3.make_train_step(cfg, optimizer(), layouts, policy=PLAIN)
    for tokens, weights, message in (
        (np.zeros([4], np.int32), None, r"`tokens` has shape \(4,\), want \[B, T\+1\] or \[A, B, T\+1\]"),
        (np.zeros([4, 1], np.int32), None, r"want at least one row of two tokens"),
        (np.zeros([4, 5], np.int32), np.ones([4, 5]), r"`weights` has shape \(4, 5\), want \(4, 4\)"),
        (np.full([4, 5], 40), None, r"holds token id 40, want ids in \[0, 40\)"),
    ):
        with pytest.raises(ValueError, match=message):
            step(state, tokens, weights)
    with pytest.raises(ValueError, match="`dispatch_dtype` is given, but without `layouts` nothing is dispatched"):
        dsv3.make_train_step(cfg, optimizer(), dispatch_dtype="bfloat16")


def test_a_generator_of_requests_is_driven_to_its_end():
    value = Value((tf.constant([1.0, 2.0]),))

    def program(tape):
        size = yield Capacity(value)
        got = yield from tape.swap(value)
        return size, got

    seen = []

    def answer(request):
        seen.append(type(request))
        return 8 if isinstance(request, Capacity) else request.value

    assert drive(program(Tape(("CPU:0",))), answer) == (8, value) and seen == [Capacity, Exchange]
    assert axis_size(make_mesh("data:2"), "data") == 2
