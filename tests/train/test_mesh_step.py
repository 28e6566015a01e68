"""The step on a mesh is the step on one device: same losses, loads, biases and parameters, in any layout."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.experimental import dtensor

import dsv3
from dsv3 import tree
from dsv3.layout import local_bytes
from dsv3.ops.dispatch import dispatch_capacity
from dsv3.parallel.mesh import make_mesh, whole
from dsv3.recipe import RECIPES
from dsv3.train.mesh_params import state_layouts
from tests.compare import PLAIN, assert_close
from tests.more import GROWS, LONG, MORE, more
from tests.small import KEY, model_config, random_tokens

RATES = {"mtp_weight": 0.3, "balance_weight": 0.01, "bias_rate": 0.01}
STEPS = 10 if MORE else 4
# Rounding of sums in another order, 6e-8 a sum, grows over the steps of Adam, whose division by √v makes small gradients
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
    state = dsv3.train_init(KEY, cfg, optimizer())
    if axes is None:
        step = one_device(cfg, optimizer(), sum(map(len, batches)), policy=policy, **RATES)
    else:
        layouts = layouts_of(cfg, axes, zero)
        state = dsv3.place_state(state, layouts)
        step = dsv3.make_train_step(cfg, optimizer(), layouts, policy=policy, **RATES, **kwargs)
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(metrics)
    return (state if axes is None else dsv3.gather_state(state)), found


def one_device(cfg, optimizer, micro_batches, **kwargs):
    """The step on one device; for a few micro-batches not compiled, which changes nothing (test_step.py) and takes long."""
    if micro_batches > 12:
        return dsv3.make_train_step(cfg, optimizer, **kwargs)
    return functools.partial(dsv3.train_update, cfg=cfg, optimizer=optimizer, **kwargs)


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


# One mixture, of which a mesh compiles a third: where layers, blocks and modules are not what a test is about.
ONE = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
CONFIGS = [
    {"num_hidden_layers": 3 if MORE else 2, "num_nextn_predict_layers": 1},
    {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "q_lora_rank": None, "n_shared_experts": 2},
    {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 2, "n_shared_experts": 0,
     "n_routed_experts": 12, "tie_word_embeddings": True},
]  # fmt: skip


@GROWS
@pytest.mark.parametrize(
    ("fields", "axes", "micro", "rows", "length"),
    [
        pytest.param(CONFIGS[0], "data:2,expert:3", 2, 6, 5, marks=LONG),
        (CONFIGS[1], "expert:6", 1, 6, 3),
    ],
)
def test_any_mesh_gives_the_numbers_of_one_device(fields, axes, micro, rows, length):
    cfg = model_config(**fields)
    want = on_one_device(cfg, micro, rows, length)
    assert_same_run(train(cfg, axes, batches_of(cfg, micro, rows, length)), want)


DENSE = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "num_nextn_predict_layers": 0}
BLOCKS = PLAIN.replace(experts="blocks", remat="block", loss_chunk=7)
KERNELS = dsv3.default_policy("CPU").replace(max_rows=0)
STORED = [
    pytest.param(CONFIGS[2], "data:2,expert:2", None, KERNELS, marks=LONG),
    (DENSE, "data:2", {}, PLAIN),
    *more(
        (CONFIGS[0], "data:2,expert:2", {"embed": "expert"}, BLOCKS),  # experts used on another dim than they are stored
        (CONFIGS[0], "pipe:2,expert:2", {"embed": "expert", "expert": "pipe"}, PLAIN),
        (CONFIGS[0], "pipe:2,data:2,expert:2", {"layer": "data", "kv_latent": "pipe"}, PLAIN),
    ),
]


@pytest.mark.parametrize(("fields", "axes", "rules", "policy"), STORED)
def test_however_parameters_are_stored_and_computed(fields, axes, rules, policy):
    """Without ZeRO, by odd rules, with other kernels and recomputation."""
    cfg, specs = model_config(**fields, num_attention_heads=2), dsv3.model_specs(model_config(**fields))
    known = {axis for spec in tree.flatten(specs) for axis in spec.axes}
    if rules and "layer" in rules:
        cfg = model_config(**fields | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "num_nextn_predict_layers": 2})
        rules = {axis: to for axis, to in rules.items() if axis in known}
    args = () if rules is None else (rules,)
    layouts = dsv3.make_layouts(dsv3.model_specs(cfg), make_mesh(axes), *args)
    state = dsv3.place_state(dsv3.train_init(KEY, cfg, optimizer()), layouts)
    step = dsv3.make_train_step(cfg, optimizer(), layouts, policy=policy, **RATES)
    batches, found = batches_of(cfg, 2, 4, 5, 3), []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(metrics)
    assert_same_run((dsv3.gather_state(state), found), train(cfg, None, batches))


def test_bfloat16_products():
    """Each side rounds to 8 bits, in sums of another order."""
    cfg, policy = model_config(**ONE), PLAIN.replace(dtype="bfloat16")
    batches = batches_of(cfg, 1, 4, 5, 1)
    _, (got,) = train(cfg, "data:2,expert:2", batches, policy=policy)
    _, (want,) = train(cfg, None, batches, policy=policy)
    assert_close(got.loss, want.loss, 2**-8)
    assert_close(got.optim.grad_norm, want.optim.grad_norm, 2**-4)


def test_a_state_lies_as_its_layouts_say_and_takes_the_bytes_of_the_formula():
    """ZeRO-1: 12 bytes a parameter (float32 master and moments), divided by the devices that share a leaf."""
    even = {"hidden_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 4, "moe_intermediate_size": 8}
    cfg = model_config(**even, n_routed_experts=8, n_group=4, vocab_size=64, intermediate_size=16)
    layouts = layouts_of(cfg, "data:2,expert:4")
    state = dsv3.train_init(KEY, cfg, optimizer())
    placed = dsv3.place_state(state, layouts)
    assert_lies(placed, cfg, layouts)
    experts = layouts.moe.ffn.gate_up.sharding_specs
    assert experts[1] == "expert" and "data" in experts, "experts over expert, their optimiser's part over data"
    assert set(layouts.embed.sharding_specs) == {"data", "expert"}
    whole_bytes = dsv3.count_params(dsv3.model_specs(cfg)) * 4
    ratio = local_bytes(dsv3.model_specs(cfg), layouts) / (whole_bytes / 8)
    assert 1 <= ratio < 1.25, "an eighth, but for leaves with one dim that divides, as norms"
    np.testing.assert_array_equal(whole(placed.params.embed), state.params.embed)
    small = cfg.replace(**ONE)
    layouts = layouts_of(small, "data:2,expert:4")
    placed = dsv3.place_state(dsv3.train_init(KEY, small, optimizer()), layouts)
    step = dsv3.make_train_step(small, optimizer(), layouts, policy=PLAIN)
    assert_lies(step(placed, batches_of(small, 1, 8, 5, 1)[0])[0], small, layouts)


def test_a_state_of_given_parameters_is_that_of_one_device_laid_out():
    cfg = model_config(**ONE)
    layouts = layouts_of(cfg, "data:2,expert:2")
    state = dsv3.train_init(KEY, cfg, optimizer(), ema=True)
    got = dsv3.train_state(state.params, state.router, optimizer(), layouts, ema=True)
    want = dsv3.place_state(state, layouts)
    for (path, a), b in zip(tree.items(got), tree.flatten(want), strict=True):
        assert dtensor.fetch_layout(a) == dtensor.fetch_layout(b), path
        np.testing.assert_array_equal(whole(a), whole(b), err_msg=path)
    with pytest.raises(ValueError, match="train_state: the recipe has delayed scales"):
        dsv3.train_state(state.params, state.router, optimizer(), layouts, fp8=RECIPES["delayed"])


def assert_lies(state, cfg, layouts):
    """Each leaf as its layout says, a device with the bytes of the formula."""
    held = [dtensor.unpack(leaf)[0] for leaf in tree.flatten((state.params, state.opt.mu, state.opt.nu))]
    assert sum(int(np.prod(leaf.shape)) for leaf in held) * 4 == 3 * local_bytes(dsv3.model_specs(cfg), layouts)
    for (path, leaf), layout in zip(tree.items(state), tree.flatten(state_layouts(state, layouts))):
        assert dtensor.fetch_layout(leaf) == layout, path


def test_bytes_and_padding_are_those_of_the_formula():
    """Rows there and back, forward and backward, with a gate value: ways − 1 of ways parts of each buffer leave a device."""
    cfg = model_config(**ONE)
    ways, length, rows, d = 3, 6, 6, 12
    _, (metrics,) = train(cfg, f"expert:{ways}", batches_of(cfg, 1, rows, length, 1))
    tokens, experts, k, layers = rows // ways * length, 6, 2, 1
    load = metrics.parts.load.moe.numpy()
    assert load.sum() == layers * rows * length * k
    capacity = sum(dispatch_capacity(n, tokens) for n in fullest(cfg, batches_of(cfg, 1, rows, length, 1)[0][0], ways))
    a_row = 4 * (2 * d + 2 * d + 2)
    assert float(metrics.mesh.bytes) == capacity * experts * a_row * (ways - 1) / ways
    assert_close(metrics.mesh.padding, 1 - load.sum() / (capacity * experts * ways))


def fullest(cfg, tokens, ways):
    """Tokens of the fullest expert of each mixture, counted on each of `ways` devices."""
    state = dsv3.train_init(KEY, cfg, optimizer())
    out = dsv3.model_apply(state.params, state.router, tokens[:, :-1], cfg=cfg, policy=PLAIN)
    for experts in out.stats.experts.numpy():
        yield max(int(np.bincount(part.reshape(-1)).max()) for part in np.split(experts, ways))


def test_nothing_is_dropped_when_all_tokens_want_one_expert():
    """The worst case: the capacity is the number of tokens."""
    cfg = model_config(**ONE, n_group=1, topk_group=1, num_experts_per_tok=1)
    state = dsv3.train_init(KEY, cfg, optimizer())
    bias = tree.map_leaves(lambda b: b + 10.0 * tf.one_hot(1, 6), state.router)
    state = state._replace(router=bias)
    layouts, tokens = layouts_of(cfg, "expert:2"), batches_of(cfg, 1, 4, 9, 1)[0]
    _, got = dsv3.make_train_step(cfg, optimizer(), layouts, policy=PLAIN)(dsv3.place_state(state, layouts), tokens)
    _, want = dsv3.train_update(state, tokens, cfg=cfg, optimizer=optimizer(), policy=PLAIN)
    assert got.parts.load.moe[0, 1] == 4 * 9
    assert_close(got.loss, want.loss, LOSS)
    assert_close(got.optim.grad_norm, want.optim.grad_norm, 1e-5)
    assert_close(got.mesh.padding, 1 - 1 / 6)


def test_rows_may_travel_in_bfloat16():
    cfg = model_config(**ONE)
    batch = batches_of(cfg, 1, 4, 5, 1)
    _, (full,) = train(cfg, "expert:2", batch)
    _, (half,) = train(cfg, "expert:2", batch, dispatch_dtype="bfloat16")
    gate = 8 / (4 * (4 * 12 + 2))  # gate values and their gradients stay float32, results come back in float32
    assert 0.5 < float(half.mesh.bytes) / float(full.mesh.bytes) < 1 - gate
    assert 0 < abs(float(half.loss - full.loss)) < 1e-3


@pytest.mark.parametrize(
    ("axes", "rows", "message"),
    [
        ("data:2,expert:2", 6, "train_step: `tokens` has 6 rows, want a multiple of 4, the devices on data and expert"),
        ("expert:4", 4, "not divisible by the axis's 4 devices"),
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
    with pytest.raises(ValueError, match="`dispatch_dtype` or `expert_nodes` is given, but no `layouts`"):
        dsv3.make_train_step(cfg, optimizer(), dispatch_dtype="bfloat16")


def test_states_and_layouts_that_do_not_fit_are_named():
    cfg = model_config(**CONFIGS[0])
    layouts, other = layouts_of(cfg, "data:2,expert:2"), layouts_of(cfg, "data:2,expert:2", zero=False)
    state = dsv3.train_init(KEY, cfg, optimizer())
    step = dsv3.make_train_step(cfg, optimizer(), layouts, policy=PLAIN)
    tokens = np.zeros([4, 5], np.int32)
    with pytest.raises(ValueError, match="train_step: `state.step` lies as one tensor, want"):
        step(state, tokens)
    with pytest.raises(ValueError, match=r"train_step: `state.params.embed` lies as \['unsharded', 'unsharded'\], want"):
        step(dsv3.place_state(state, other), tokens)
    with pytest.raises(ValueError, match=r"make_train_step: `layouts` does not have the expected structure"):
        dsv3.make_train_step(cfg, optimizer(), layouts._replace(mtp=()), policy=PLAIN)
    with pytest.raises(ValueError, match=r"make_train_step: `layouts` has .* for `embed` of shape \(41, 12\)"):
        dsv3.make_train_step(cfg.replace(vocab_size=41), optimizer(), layouts, policy=PLAIN)
    mesh = dtensor.create_mesh([("data", 2), ("model", 2)], devices=[f"CPU:{i}" for i in range(4)])
    with pytest.raises(ValueError, match=r"make_train_step: the mesh has the axes \['data', 'model'\], want some of"):
        dsv3.make_train_step(cfg, optimizer(), dsv3.make_layouts(dsv3.model_specs(cfg), mesh, {}))
    turned = dtensor.create_mesh([("expert", 2), ("data", 2)], devices=[f"CPU:{i}" for i in range(4)])
    with pytest.raises(ValueError, match=r"make_train_step: the mesh has the axes \['expert', 'data'\], want some of"):
        dsv3.make_train_step(cfg, optimizer(), dsv3.make_layouts(dsv3.model_specs(cfg), turned))
    with pytest.raises(ValueError, match="`schedule` or `stage_layers` is given, but without `layouts`"):
        dsv3.make_train_step(cfg, optimizer(), stage_layers=[3])
    with pytest.raises(ValueError, match="make_train_step: 6 experts are not divisible by the mesh's 4 devices on 'expert'"):
        dsv3.make_train_step(cfg, optimizer(), dsv3.make_layouts(dsv3.model_specs(cfg), make_mesh("expert:4"), {}))
    with pytest.raises(ValueError, match=r"zero_layouts: `axes` has \['dta'\], want some of pipe, data, expert"):
        dsv3.zero_layouts(dsv3.model_specs(cfg), layouts, axes=("dta",))
    with pytest.raises(ValueError, match="make_train_step: `dispatch_dtype` is 'int32', want one of None, 'float32'"):
        dsv3.make_train_step(cfg, optimizer(), layouts, dispatch_dtype="int32")
