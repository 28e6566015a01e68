"""Distillation: the loss by hand, a student that is its teacher, micro-batches, isolation, what is refused."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import dsv3.train.distill
import dsv3.train.loss
from dsv3 import adamw, model_apply, model_specs, pretrain_loss, train_state, tree
from dsv3.data import TokenStream, pack_documents
from dsv3.nn.model import head_weight
from dsv3.ops.divergence import TopK, top_k_logprobs
from dsv3.ops.segments import segment_count, segment_inputs
from dsv3.recipe import RECIPES
from dsv3.train.distill import DistillBatch, Teacher, distill_loss, distill_update, make_distill_step
from dsv3.train.state import Limits
from tests.compare import FUSED, PLAIN, XLA, assert_close, assert_trees_close, loops
from tests.more import more
from tests.small import model_config, random_params, random_router

CFG = model_config(num_hidden_layers=2, num_nextn_predict_layers=1)
LARGER = model_config(num_hidden_layers=2, num_nextn_predict_layers=0, hidden_size=16)
# Plain descent: beside such an eps the second moment is nothing, and a step takes 0.1 times the gradient.
SGD = adamw(1e5, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=None, fuse=False)
HOW = {"kind": "reverse", "temperature": 2.0, "nll_weight": 0.5, "mtp_weight": 0.3, "balance_weight": 0.1, "policy": PLAIN}


@functools.cache
def student():
    return random_params(model_specs(CFG)), random_router(CFG)


@functools.cache
def teacher():
    return Teacher(random_params(model_specs(LARGER), seed=1), random_router(LARGER, seed=1))


@functools.cache
def rows():
    """Four packed rows of documents, of which some tokens are learned."""
    sizes = [5, 4, 7, 3, 6, 8, 4]
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    stream = TokenStream(rng.integers(0, 40, starts[-1]).astype(np.int32), starts, np.diff(starts))
    packed = pack_documents(stream, 9, learned=rng.random(starts[-1]) < 0.7)
    count = len(packed.tokens) // 2 * 2
    assert count >= 4 and (packed.segments == 0).any()
    return DistillBatch(*(field[:count] for field in packed))


def stored(batch, model, cfg, k, temperature):
    """What a model says of rows, as it would be stored: through whole logits."""
    packed = segment_inputs(batch.segments)
    out = model_apply(
        *model, batch.tokens[:, :-1], cfg=cfg, segments=packed.segments, positions=packed.positions, mask=packed.inside,
        policy=PLAIN,
    )  # fmt: skip
    found = top_k_logprobs(
        tf.reshape(out.hidden, [-1, cfg.hidden_size]), head_weight(model[0]), k=k, temperature=temperature
    )
    lead = batch.weights.shape
    return TopK(*(x.numpy().reshape(*lead, *x.shape[1:]) for x in found))


def micro(batch, count):
    return tree.map_leaves(lambda x: np.reshape(x, [count, -1, *x.shape[1:]]), batch)


def taped(fn):
    params, router = student()
    leaves = tree.flatten(params)
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        loss, parts = fn(params, router)
    grads = tape.gradient(loss, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return loss, parts, [tf.convert_to_tensor(g).numpy() for g in grads]


def test_the_loss_is_its_parts():
    """Divergence of whole rows, and the other parts as pretraining has them."""
    params, router = student()
    batch = rows()
    loss, parts, _ = taped(lambda p, r: distill_loss(p, r, batch, teacher(), cfg=CFG, teacher_cfg=LARGER, **HOW))
    _, want = pretrain_loss(params, router, *batch[:2], segments=batch.segments, cfg=CFG, policy=PLAIN)
    for name in ("nll", "mtp", "balance", "load"):
        assert_trees_close(getattr(parts, name), getattr(want, name), 1e-5)
    packed = segment_inputs(batch.segments)
    where = {"segments": packed.segments, "positions": packed.positions, "mask": packed.inside, "policy": PLAIN}
    own = model_apply(params, router, batch.tokens[:, :-1], cfg=CFG, **where).logits
    said = model_apply(*teacher(), batch.tokens[:, :-1], cfg=LARGER, **where).logits
    logq, logp = (tf.nn.log_softmax(tf.cast(x, tf.float64) / 2.0).numpy() for x in (own, said))
    weights = batch.weights * packed.inside.numpy()
    apart = (weights * (np.exp(logq) * (logq - logp)).sum(-1)).sum() / weights.sum()
    assert_close(parts.divergence, apart, 1e-5)
    assert_close(loss, 4 * apart + 0.5 * want.nll + 0.3 * tf.reduce_mean(want.mtp) + 0.1 * want.balance, 1e-5)
    plain = distill_loss(params, router, batch, teacher(), cfg=CFG, teacher_cfg=LARGER, **HOW, squared=False)[0]
    assert_close(loss - plain, 3 * apart, 1e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    """Probabilities are known to 1e-7; a gradient of the same student against another teacher has the size of 1."""
    batch = rows()
    how = {"cfg": CFG, "kind": kind, "temperature": 2.0, "policy": PLAIN}
    same = taped(lambda p, r: distill_loss(p, r, batch, Teacher(p, r), teacher_cfg=CFG, **how))
    kept = batch._replace(teacher=stored(batch, student(), CFG, 5, 2.0))
    for loss, parts, grads in (same, taped(lambda p, r: distill_loss(p, r, kept, **how))):
        assert abs(float(loss)) < 1e-5 and float(parts.nll) > 1
        assert max(np.abs(g).max() for g in grads) < 1e-5
    _, parts, grads = taped(lambda p, r: distill_loss(p, r, batch, teacher(), teacher_cfg=LARGER, **how))
    assert float(parts.divergence) > 0.01 and max(np.abs(g).max() for g in grads) > 1e-2


def test_all_stored_probabilities_are_the_teacher_itself():
    batch = rows()
    how = HOW | {"cfg": CFG}
    want = taped(lambda p, r: distill_loss(p, r, batch, teacher(), teacher_cfg=LARGER, **how))
    kept = batch._replace(teacher=stored(batch, teacher(), LARGER, 40, 2.0))
    got = taped(lambda p, r: distill_loss(p, r, kept, **how))
    assert_close(got[0], want[0], 1e-5)
    largest = max(np.abs(g).max() for g in want[2])
    assert max(np.abs(a - b).max() for a, b in zip(got[2], want[2])) < 1e-5 * largest
    few = batch._replace(teacher=stored(batch, teacher(), LARGER, 3, 2.0))
    assert 0 < float(distill_loss(*student(), few, **how)[1].divergence) < float(want[1].divergence)


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_add_up(packed):
    kept = rows()._replace(teacher=stored(rows(), teacher(), LARGER, 4, 2.0))
    kept = kept if packed else kept._replace(segments=())
    state = train_state(*student(), SGD)
    whole, want = distill_update(state, micro(kept, 1), cfg=CFG, optimizer=SGD, bias_rate=0.1, **HOW)
    got, metrics = distill_update(state, micro(kept, 2), cfg=CFG, optimizer=SGD, bias_rate=0.1, **HOW)
    # A sum in another order: float32 gradients of size 1, squared.
    assert_trees_close(metrics, want, 2e-4)
    assert_trees_close((got.params, got.router), (whole.params, whole.router), 1e-6)
    assert int(got.tokens) == kept.weights.size and int(got.step) == 1
    for moved, before, load in zip(got.router, state.router, metrics.parts.load):
        np.testing.assert_allclose(moved - before, 0.1 * np.sign(np.mean(load, -1, keepdims=True) - load), atol=1e-6)
    loss, parts, grads = taped(lambda p, r: distill_loss(p, r, kept, cfg=CFG, **HOW))
    assert_close(want.loss, loss, 1e-5)
    for before, after, g in zip(tree.flatten(state.params), tree.flatten(whole.params), grads):
        # Parameters of size 1 in float32 are known to 6e-8, and so are the updates.
        assert np.abs((before - after) - 0.1 * g).max() < 3e-7 + 1e-5 * max(np.abs(g).max() for g in grads)
    assert_close(parts.nll, want.parts.nll, 1e-5)


def test_what_is_stored_beside_a_document_does_not_matter():
    """Padding and borders may have anything stored, also what is no distribution."""
    kept = rows()._replace(teacher=stored(rows(), teacher(), LARGER, 4, 2.0))
    beside = (kept.weights == 0) | ~segment_inputs(kept.segments).inside.numpy()
    bad = TopK(*(np.where(beside.reshape(*beside.shape, *[1] * (x.ndim - 2)), 0, x) for x in kept.teacher))
    bad.rest[beside] = np.inf
    how = HOW | {"cfg": CFG}
    want, got = (taped(lambda p, r, b=b: distill_loss(p, r, b, **how)) for b in (kept, kept._replace(teacher=bad)))
    assert_close(got[0], want[0], 1e-6)
    for a, b in zip(got[2], want[2]):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_micro_batch_of_padding_changes_nothing():
    kept = rows()._replace(teacher=stored(rows(), teacher(), LARGER, 4, 2.0))
    half = tree.map_leaves(lambda x: x[:2], kept)
    padded = tree.map_leaves(np.array, kept)
    padded.segments[2:] = 0
    padded.teacher.logprobs[2:] = np.nan
    how = HOW | {"cfg": CFG, "optimizer": SGD, "bias_rate": 0.1}
    want, got = (distill_update(train_state(*student(), SGD), micro(b, n), **how) for b, n in ((half, 1), (padded, 2)))
    assert bool(got[1].taken)
    assert_trees_close(got[1].parts, want[1].parts, 1e-6)
    assert_trees_close((got[0].params, got[0].router), (want[0].params, want[0].router), 1e-6)
    # Nothing at all to learn: no division by zero.
    nothing = padded._replace(segments=np.zeros_like(padded.segments))
    _, metrics = distill_update(train_state(*student(), SGD), micro(nothing, 2), **how)
    assert bool(metrics.taken) and float(metrics.loss) == 0


def test_documents_of_a_row_are_learned_as_if_alone():
    """By student and teacher: each document as a row of its own, with the whole batch's count."""
    batch = tree.map_leaves(lambda x: x[:2], rows())
    inside = segment_inputs(batch.segments).inside
    total, documents = float((batch.weights * inside.numpy()).sum()), float(segment_count(inside))
    how = HOW | {"cfg": CFG, "teacher_cfg": LARGER}
    share = how | {"balance_weight": how["balance_weight"] / documents, "normalizer": total}
    alone = []
    for row, segments in enumerate(batch.segments):
        borders = [0, *(np.flatnonzero(np.diff(segments)) + 1), len(segments)]
        for a, b in zip(borders, borders[1:]):
            if segments[a] and b - a > 1:
                one = DistillBatch(batch.tokens[row : row + 1, a:b], batch.weights[row : row + 1, a : b - 1])
                alone.append(taped(lambda p, r, one=one: distill_loss(p, r, one, teacher(), **share)))
    assert len(alone) == documents >= 3
    loss, parts, grads = taped(lambda p, r: distill_loss(p, r, batch, teacher(), sequences=documents, **how))
    assert_close(loss, sum(found[0] for found in alone), 1e-5)
    assert_close(parts.divergence, sum(found[1].divergence for found in alone), 1e-5)
    largest = max(np.abs(g).max() for g in grads)
    for got, *want in zip(grads, *(found[2] for found in alone)):
        assert np.abs(got - sum(want)).max() < 1e-5 * largest


def test_all_parts_of_the_loss_use_one_head(monkeypatch):
    made, real = [], dsv3.train.loss.head_weight
    for module in (dsv3.train.loss, dsv3.train.distill):
        monkeypatch.setattr(module, "head_weight", lambda params: made.append(1) or real(params))
    kept = rows()._replace(teacher=stored(rows(), teacher(), LARGER, 4, 2.0))
    distill_loss(*student(), kept, cfg=CFG, **HOW)
    assert len(made) == 1


def test_few_logits_are_computed_at_once():
    def loss(policy):
        return distill_loss(*student(), rows(), teacher(), cfg=CFG, teacher_cfg=LARGER, **HOW | {"policy": policy})[0]

    assert loops(lambda: loss(PLAIN.replace(loss_chunk=5))) == 0
    assert loops(lambda: loss(PLAIN.replace(loss_chunk=5, loss_keep=0))) == 3  # the divergence, the tokens' loss, a module's


@pytest.mark.parametrize("policy", [PLAIN, *more(FUSED, XLA)])
def test_the_compiled_step_is_the_function_and_learns(policy):
    batch = micro(rows(), 2)
    few = {"num_hidden_layers": 1, "first_k_dense_replace": 0} if policy is PLAIN else {}  # short to trace
    cfg, larger = CFG.replace(**few), LARGER.replace(**few)
    start = train_state(random_params(model_specs(cfg)), random_router(cfg), SGD)
    teacher = Teacher(random_params(model_specs(larger), seed=1), random_router(larger, seed=1))
    how = HOW | {"teacher_cfg": larger, "policy": policy}
    _, want = distill_update(start, batch, teacher, cfg=cfg, optimizer=SGD, **how)
    step = make_distill_step(cfg, SGD, **how)
    before = [x.numpy().copy() for x in tree.flatten(teacher)]
    state, metrics = step(start, batch, teacher)
    assert_trees_close(metrics, want, 2e-4)
    for _ in range(5):
        state, last = step(state, batch, teacher)
    assert float(last.parts.divergence) < float(metrics.parts.divergence)
    assert step.traces() == 1
    for count in (1, 3, 2):  # of unlike numbers of micro-batches only the first one is traced
        several = tree.map_leaves(lambda x, count=count: np.concatenate([x, x])[:count], batch)
        state, last = step(state, several, teacher)
        assert bool(last.taken) and step.traces() == 2
    for a, b in zip(tree.flatten(teacher), before):
        np.testing.assert_array_equal(a, b)
    _, last = step(state, batch, teacher, Limits(grad_norm=1e-9))
    assert not bool(last.taken)


def test_wrong_arguments_are_named():
    other = model_config(num_hidden_layers=2, vocab_size=39)
    for how, message in [
        ({"teacher_cfg": other}, "`teacher_cfg` has a vocabulary of 39 tokens, want the student's, 40"),
        ({"kind": "both"}, "`kind` is 'both', want one of"),
        ({"mix": 0.0}, "`mix` is 0.0, want above 0 and below 1"),
        ({"temperature": 0.0}, "`temperature` is 0.0, want above 0"),
        ({"nll_weight": -1.0}, "`nll_weight` is -1.0, want at least 0"),
        ({"policy": PLAIN.replace(fp8=RECIPES["delayed"])}, "the policy's FP8 recipe has delayed scales"),
    ]:
        with pytest.raises(ValueError, match=f"make_distill_step: {message}"):
            make_distill_step(CFG, SGD, **how)
    step = make_distill_step(CFG, SGD, policy=PLAIN)
    state = train_state(*student(), SGD)
    batch = micro(rows(), 1)
    ids = np.zeros([*batch.weights.shape, 2], np.int32)
    said = TopK(ids, ids.astype(np.float32), batch.weights)
    for given, model, message in [
        (batch, None, "distill_step: `teacher` is given neither in the batch nor as a model"),
        (batch._replace(teacher=said), teacher(), "distill_step: `teacher` is given both in the batch and as a model"),
        (batch, teacher(), "distill_step: `teacher_cfg` is of type NoneType, want ModelConfig"),
        (batch._replace(teacher=said._replace(ids=said.ids + 40)), None, "distill_step: `teacher.ids` holds token id 40"),
        (
            batch._replace(teacher=TopK(*(np.repeat(x, 21, -1) for x in said[:2]), said.rest)), None,
            "distill_step: `batch.teacher` has 42 tokens at a place, want at most the vocabulary's, 40",
        ),
        (batch._replace(teacher=said, tokens=batch.tokens + 40), None, "distill_step: `tokens` holds token id"),
        (batch._replace(teacher=said, weights=batch.weights[..., 1:]), None, "distill_update: `tokens` has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            step(state, given, model)
