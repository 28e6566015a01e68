"""A packed row is its documents: the same losses, loads and gradients, on one device and on meshes."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dsv3
from dsv3 import make_train_step, model_specs, pretrain_loss, train_update, tree
from dsv3.data import TokenStream, pack_documents
from tests.compare import PLAIN, XLA, assert_close, assert_trees_close
from tests.more import GROWS, LONG, MORE, more
from tests.small import model_config, random_params, random_router
from tests.train.test_mesh_step import assert_same_run, layouts_of, one_device, optimizer
from tests.train.test_step import parts_of, sgd, start

RATES = {"mtp_weight": 0.7, "balance_weight": 0.3}
CFG = model_config(num_hidden_layers=2, num_nextn_predict_layers=2)


def documents_of(sizes, seed=0, cfg=CFG):
    """Documents, and which of their tokens are learned."""
    rng = np.random.default_rng([seed, *sizes])
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    tokens = rng.integers(0, cfg.vocab_size, starts[-1]).astype(np.int32)
    return TokenStream(tokens, starts, np.diff(starts)), rng.random(len(tokens)) < 0.7


def taped(params, fn):
    """A loss of parameters, its parts and its gradients."""
    with tf.GradientTape() as tape:
        leaves = tree.flatten(params)
        tape.watch(leaves)
        loss, parts = fn()
    grads = tape.gradient(loss, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return loss, parts, [tf.convert_to_tensor(g) for g in grads]


def assert_gradients_close(got, want):
    """Sums of some tens of terms of mixed sign, 6e-8 each, in another order, through four layers; 2e-6 was measured. A
    document of one input has nothing to attend to: where a gradient is 0 but for rounding, the largest of all counts."""
    largest = max(float(tf.reduce_max(tf.abs(g))) for g in want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        size = max(float(tf.reduce_max(tf.abs(b))), 0.01 * largest)
        off = float(tf.reduce_max(tf.abs(a - b))) / size
        assert off < 1e-5, f"gradient {number}: off by {off:.1e}"


def added(values):
    return tree.map_leaves(lambda *leaves: sum(leaves[1:], leaves[0]), *values)


# MTP modules, and whether YaRN is used; half of them have all numbers of modules, with it and without.
MODELS = [
    pytest.param(modules, yarn, marks=() if yarn == (modules != 1) else LONG)
    for modules, yarn in itertools.product((0, 1, 2), (False, True))
]


def model_of(modules, yarn):
    fields = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}} if yarn else {}
    cfg = model_config(num_hidden_layers=2, num_nextn_predict_layers=modules, **fields)
    return cfg, random_params(model_specs(cfg)), random_router(cfg)


def together_and_apart(sizes, length, model, policy):
    """Loss, parts and gradients of packed rows; and the same of each document as a row of its own, without segments and
    without padding: what is meant by isolation."""
    cfg, params, router = model
    stream, learned = documents_of(sizes, cfg=cfg)
    packed = pack_documents(stream, length, learned=learned)
    how = {"cfg": cfg, "policy": policy, "normalizer": 5.0, "mtp_weight": 0.7}
    got = taped(
        params, lambda: pretrain_loss(
            params, router, packed.tokens, packed.weights, segments=packed.segments, balance_weight=0.3, **how
        )
    )  # fmt: skip
    how["balance_weight"] = 0.3 / len(sizes)
    apart = []
    for a, b in zip(stream.starts[:-1], stream.starts[1:]):
        row = (stream.tokens[None, a:b], learned[None, a + 1 : b].astype(np.float32))
        apart.append(taped(params, functools.partial(pretrain_loss, params, router, *row, **how)))
    return got, apart


def assert_isolated(got, apart, tolerance, gradients):
    """Packed rows give the sums of their documents; `gradients`: how these are compared."""
    loss, parts, grads = zip(*apart)
    assert_close(got[0], sum(loss), tolerance)
    for name in ("nll", "mtp"):
        assert_close(getattr(got[1], name), sum(getattr(part, name) for part in parts), tolerance, name)
    assert_close(got[1].balance, sum(part.balance for part in parts) / len(parts), tolerance)
    for a, b in zip(got[1].load, added([part.load for part in parts])):
        np.testing.assert_array_equal(a, b)
    gradients(got[2], list(added(grads)))


@GROWS
@pytest.mark.parametrize("modules, yarn", MODELS)
@settings(deadline=None, max_examples=8 if MORE else 1, derandomize=True)
@example(sizes=[4, 2, 6, 3], length=8)
@given(sizes=st.lists(st.integers(2, 6), min_size=2, max_size=4), length=st.integers(5, 11))
def test_a_packed_row_gives_what_its_documents_give(modules, yarn, sizes, length):
    assert_isolated(*together_and_apart(sizes, length, model_of(modules, yarn), PLAIN), 1e-5, assert_gradients_close)


@pytest.mark.parametrize("modules, yarn, sizes, length", [(0, True, [12, 12], 24), *more((2, False, [12, 2, 9, 3], 15))])
def test_the_default_policy_keeps_documents_apart(modules, yarn, sizes, length):
    """Its kernels are others for few tokens than for many, so a document takes another one than the row it is in."""
    policy = dsv3.default_policy("CPU")
    assert 2 * max(sizes) <= policy.max_rows < 2 * sum(sizes), "two choices of each token"
    assert_isolated(*together_and_apart(sizes, length, model_of(modules, yarn), policy), 1e-5, assert_gradients_close)


def assert_gradients_near(got, want):
    """Products give gradients in bfloat16, each known to 2^-8 = 4e-3: one for all documents here, one for each there. 4.3e-3
    was measured."""
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        off = float(tf.norm(a - b) / tf.norm(b))
        assert off < 1e-2, f"gradient {number}: off by {off:.1e} of its norm"


@pytest.mark.parametrize("policy", [PLAIN, *more(dsv3.default_policy("CPU"))])
@pytest.mark.parametrize("modules, yarn", [(2, True), *more((0, False), (1, True))])
def test_bfloat16_keeps_documents_apart(modules, yarn, policy):
    got, apart = together_and_apart([6, 2, 5, 3], 9, model_of(modules, yarn), policy.replace(dtype="bfloat16"))
    # A position's sums are over its own document and rounded alike: no difference was measured. Where a kernel adds up in
    # another order, some of the activations are rounded the other way: by 4e-3, in a mean over positions less.
    assert_isolated(got, apart, 2e-3, assert_gradients_near)


def test_what_stands_beside_a_document_does_not_matter():
    """Other documents and other padding, in any place of the row; weights across borders change nothing."""
    stream, _ = documents_of([5, 4, 6])
    packed = pack_documents(stream, 16)
    params, router = random_params(model_specs(CFG)), random_router(CFG)

    def of_second(tokens, weights, segments):
        weights = weights * (segments[:, 1:] == 2)
        return taped(params, lambda: pretrain_loss(params, router, tokens, weights, segments=segments, cfg=CFG, policy=PLAIN,
                                                   balance_weight=0.0))  # fmt: skip

    want = of_second(*packed)
    others = np.where(packed.segments == 2, packed.tokens, (packed.tokens + 7) % CFG.vocab_size)
    got = of_second(others, np.ones_like(packed.weights), packed.segments)
    assert_close(got[0], want[0], 1e-6)
    assert_gradients_close(got[2], want[2])
    moved = [np.concatenate([field[:, :5], np.zeros([1, 3], field.dtype), field[:, 5:-3]], 1) for field in packed]
    got = of_second(*moved)
    assert_close(got[0], want[0], 1e-5)
    assert_gradients_close(got[2], want[2])


def test_a_number_that_comes_again_is_another_document():
    stream, _ = documents_of([5, 4, 6])
    tokens, weights, segments = pack_documents(stream, 16)
    params, router = random_params(model_specs(CFG)), random_router(CFG)
    losses = [
        pretrain_loss(params, router, tokens, weights, segments=numbers, cfg=CFG, policy=PLAIN)[0]
        for numbers in (segments, np.where(segments == 3, 1, segments))
    ]
    assert_close(losses[1], losses[0], 1e-6)


def rows_of_their_own(stream, learned, length):
    """Each document in a row, the rest of which is padding."""
    rows = [
        pack_documents(TokenStream(stream.tokens[a:b], np.array([0, b - a]), np.array([1])), length, learned=learned[a:b])
        for a, b in zip(stream.starts[:-1], stream.starts[1:])
    ]
    return [np.concatenate(parts) for parts in zip(*rows)]


SIZES = [5, 4, 3, 8, 2, 5, 7, 3]


def test_the_step_takes_packed_rows():
    """In micro-batches, which have unlike numbers of documents, as in one batch, and as one document a row."""
    stream, learned = documents_of(SIZES)
    packed = pack_documents(stream, 9, learned=learned)
    assert len(packed.tokens) == 4
    how = {"cfg": CFG, "optimizer": sgd(), "bias_rate": 0.01, "policy": PLAIN, **RATES}
    tokens, weights, segments = rows_of_their_own(stream, learned, 9)
    want, apart = train_update(start(sgd(), CFG), tokens, weights, segments=segments, **how)
    want = want._replace(tokens=want.tokens * 0)
    for parts in (1, 2, 4):
        cut = packed if parts == 1 else type(packed)(*(parts_of(field, parts) for field in packed))
        got, together = train_update(start(sgd(), CFG), cut.tokens, cut.weights, segments=cut.segments, **how)
        assert int(got.tokens) == 4 * 9
        assert_trees_close(got._replace(tokens=got.tokens * 0), want, 1e-5)
        assert_trees_close(together, apart, 1e-5)


@pytest.mark.parametrize("policy", [dsv3.default_policy("CPU"), *more(XLA)])
def test_the_compiled_step_takes_packed_rows(policy):
    stream, learned = documents_of(SIZES)
    packed = pack_documents(stream, 9, learned=learned)
    cfg = CFG.replace(num_hidden_layers=1, first_k_dense_replace=0)
    how = {"cfg": cfg, "optimizer": sgd(), **RATES}
    step = make_train_step(**how, policy=policy)
    given = {"segments": packed.segments}
    got, metrics = step(start(sgd(), cfg), packed.tokens, packed.weights, **given)
    want, at_once = train_update(start(sgd(), cfg), packed.tokens, packed.weights, **given, **how, policy=PLAIN)
    assert_close(metrics.loss, at_once.loss, 1e-5)
    for (path, a), b in zip(tree.items(got.params), tree.flatten(want.params)):
        assert_close(a, b, 1e-4, path)
    assert step.traces() == 1
    got, _ = step(got, packed.tokens, packed.weights, **given)
    assert step.traces() == 1


MESHES = [(1, "data:2,expert:2", 1), *more((2, "data:4", 2), (2, "pipe:2,expert:2", 2), (2, "expert:4", 1, 2))]


@pytest.mark.parametrize("case", MESHES, ids=str)
def test_any_mesh_gives_the_numbers_of_one_device(case):
    layers, axes, micro, *nodes = case
    fields = {"num_hidden_layers": layers, "first_k_dense_replace": layers - 1, "num_nextn_predict_layers": layers}
    cfg = CFG.replace(**fields, n_routed_experts=12)
    state = dsv3.train_init([1, 2], cfg, optimizer())
    rates = {"mtp_weight": 0.3, "balance_weight": 0.5, "bias_rate": 0.01}
    batches = []
    for seed in range(layers):
        stream, learned = documents_of([5, 4, 3, 8, 2, 6, 7, 3, 9, 9, 9, 2, 2, 2], seed, cfg)
        packed = pack_documents(stream, 9, learned=learned)
        rows = 4 * micro
        packed = [np.concatenate([field, np.zeros([-len(field) % rows, *field.shape[1:]], field.dtype)]) for field in packed]
        batches.append([field.reshape(micro, -1, field.shape[-1]) for field in packed])

    def run(layouts, **how):
        now = state if layouts is None else dsv3.place_state(state, layouts)
        how |= {"policy": PLAIN, **rates}
        if layouts is None:
            step, found = one_device(cfg, optimizer(), micro * layers, **how), []
        else:
            step, found = make_train_step(cfg, optimizer(), layouts, **how), []
        for tokens, weights, segments in batches:
            now, metrics = step(now, tokens, weights, segments=segments)
            found.append(metrics)
        return (now if layouts is None else dsv3.gather_state(now)), found

    state = dsv3.compiled.snapshot(state)
    want = run(None)
    state = dsv3.train_init([1, 2], cfg, optimizer())
    assert_same_run(run(layouts_of(cfg, axes), **({"expert_nodes": nodes[0]} if nodes else {})), want)


def test_refusals():
    stream, _ = documents_of(SIZES)
    tokens, weights, segments = pack_documents(stream, 9)
    with pytest.raises(ValueError, match=r"train_update: `segments` has shape \(4, 9\), want that of `tokens`, \(4, 10\)"):
        train_update(start(sgd(), CFG), tokens, weights, segments=segments[:, 1:], cfg=CFG, optimizer=sgd(), policy=PLAIN)
    with pytest.raises(ValueError, match=r"pretrain_loss: `segments` has shape \(4, 9\), want \(4, 10\) \[B, T\]"):
        pretrain_loss(random_params(model_specs(CFG)), random_router(CFG), tokens, segments=weights, cfg=CFG)
    layouts = layouts_of(CFG, "data:2")
    step = make_train_step(CFG, optimizer(), layouts, policy=PLAIN)
    state = dsv3.place_state(dsv3.train_init([1, 2], CFG, optimizer()), layouts)
    with pytest.raises(ValueError, match=r"train_step: `segments` has shape \(4, 9\), want that of `tokens`, \(4, 10\)"):
        step(state, tokens, weights, segments=segments[:, 1:])
