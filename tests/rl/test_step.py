"""The policy's step: its gradient, its parts, what it leaves alone; and the pass that only looks."""

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import adamw, train_state, tree
from dsv3.rl import score, step
from dsv3.rl.grpo import grpo_loss
from dsv3.rl.logprobs import token_logprobs
from dsv3.rl.score import make_score, mismatch_numbers, router_agreement
from dsv3.rl.step import GrpoBatch, grpo_update, make_grpo_step, micro_batches
from dsv3.train.state import Limits
from tests.compare import PLAIN, assert_close, assert_trees_close, normal
from tests.more import LONG
from tests.rl.model import model
from tests.small import random_tokens

# Plain descent: beside such an eps the second moment is nothing, and a step takes 0.1 times the gradient.
SGD = adamw(1e5, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=None, fuse=False)
N, T = 6, 7


def samples(experts=True, ref=True):
    """N samples as one batch `[N, ...]`; one counts nowhere."""
    cfg, params, router = model()
    tokens = random_tokens(cfg, N, T + 1)
    mask = np.random.default_rng(3).integers(0, 2, (N, T)).astype(np.float32)
    mask[1], mask[:, -1] = 0, [1, 0, 1, 0, 0, 1]
    own = token_logprobs(params, router, tokens, mask, cfg=cfg, temperature=0.8, policy=PLAIN)
    old, others = own.logprobs + normal(1, N, T, scale=0.3), own.logprobs + normal(2, N, T, scale=0.3)
    chosen = np.array((own.experts + 1) % 6, np.int16) if experts else ()
    return GrpoBatch(tokens, mask, np.array(old), np.array(others) if ref else (), normal(3, N), chosen)


HOW = {"temperature": 0.8, "clip_low": 0.1, "clip_high": 0.3, "kl_weight": 0.2, "policy": PLAIN}


def updated(batch, **how):
    cfg, params, router = model()
    state = train_state(params, router, SGD)
    return state, *grpo_update(state, batch, cfg=cfg, optimizer=SGD, **HOW | how)


def whole(batch):
    return micro_batches(batch, np.arange(N), N, N)


def test_the_step_descends_the_loss_of_the_replayed_pass():
    cfg, params, router = model()
    batch = samples()
    leaves = tree.flatten(params)
    with tf.GradientTape() as tape:
        tape.watch(leaves)
        got = token_logprobs(
            params, router, batch.tokens, batch.mask, cfg=cfg, temperature=0.8, experts=batch.experts, policy=PLAIN
        )
        given = (batch.old_logprobs, batch.ref_logprobs, batch.advantages, batch.mask)
        want = grpo_loss(got.logprobs, *given, clip_low=0.1, clip_high=0.3, kl_weight=0.2)
    gradients = tape.gradient(want.loss, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    gradients = [tf.convert_to_tensor(g).numpy() for g in gradients]
    state, new, metrics = updated(whole(batch))
    assert_close(metrics.parts.loss, want.loss, 1e-5)
    assert_trees_close(metrics.parts.stats, want.stats, 1e-5)
    entropy = (np.array(got.entropy) * batch.mask).sum() / batch.mask.sum()
    assert_close(metrics.parts.entropy, entropy, 1e-5)
    squares = [float((g * g).sum()) for g in gradients]
    assert_close(metrics.grad_squares, squares, 1e-4)
    assert_close(metrics.optim.grad_norm, np.sqrt(sum(squares)), 1e-5)
    largest = max(np.abs(g).max() for g in gradients)
    for (path, before), after, g in zip(tree.items(params), tree.flatten(new.params), gradients):
        # Parameters of size 1 in float32 are known to 6e-8, and so are the updates.
        assert np.abs((before - after) - 0.1 * g).max() < 3e-7 + 1e-5 * largest, path
    assert np.abs(gradients[list(tree.to_dict(params)).index("moe.ffn.router")]).max() > 0
    assert int(new.step) == 1 and int(new.tokens) == batch.mask.sum()
    assert_trees_close(new.router, router)  # frozen


def test_micro_batches_add_up():
    """Parts of two and of four rows, of which two are filled in, give the whole's gradient."""
    batch = samples()
    _, _, want = updated(whole(batch), mtp_weight=0.3)
    _, _, balanced = updated(whole(batch), mtp_weight=0.3, balance_weight=0.1)
    for size in (2, 4):
        cut = micro_batches(batch, np.arange(N)[::-1], size, N)
        assert cut.tokens.shape == (-(-N // size), size, T + 1) and cut.experts.shape == (-(-N // size), 2, size, T, 2)
        _, _, got = updated(cut, mtp_weight=0.3, balance_weight=0.1)
        # A sum in another order: float32 gradients of size 1, squared.
        assert_trees_close(got, balanced, 2e-4)
    assert_close(balanced.parts.loss, want.parts.loss + 0.1 * want.parts.balance, 1e-5)


def test_micro_batches_add_up_without_a_reference():
    batch = samples(ref=False)
    _, _, want = updated(whole(batch), kl_weight=0.0)
    _, _, got = updated(micro_batches(batch, np.arange(N), 2, N), kl_weight=0.0)
    assert got.parts.penalty == got.parts.stats.kl == ()
    assert_trees_close(got, want, 2e-4)  # as above


UNEVEN = {"mtp_weight": 0.3, "balance_weight": 0.1}


@pytest.fixture
def uneven(monkeypatch):
    """Rows that end at 0 (none), 2, 3, 5, 6 and 7 of 12 columns, two a micro-batch; what a step gives at 12 columns; and the
    lengths, of 3, 6 and 12, that micro-batches are cut to from here on."""
    batch = samples()
    mask = batch.mask * (np.arange(T) < np.array([5, 0, 2, 6, 3, 7])[:, None])
    mask[[0, 2, 3, 4, 5], [4, 1, 5, 2, 6]] = 1
    wide = [[0, 0], [0, 12 - T]]
    padded = {name: np.pad(getattr(batch, name), wide) for name in ("tokens", "old_logprobs", "ref_logprobs")}
    batch = batch._replace(**padded, mask=np.pad(mask, wide), experts=np.pad(batch.experts, [[0, 0], *wide, [0, 0]]))
    cut, sizes = micro_batches(batch, np.arange(N), 2, N), []
    _, _, want = updated(cut, **UNEVEN)
    trim = step.trim_batch
    monkeypatch.setattr(step, "trimmed_lengths", lambda length: (3, 6, length))
    monkeypatch.setattr(step, "trim_batch", lambda batch, size: sizes.append(size) or trim(batch, size))
    return cut, want, sizes


def test_micro_batches_are_as_long_as_their_samples(uneven):
    cut, want, sizes = uneven
    _, _, got = updated(cut, **UNEVEN)
    assert sizes == [3, 6, 12]
    assert_trees_close(got, want, 2e-4)  # sums in another order, squared


@LONG
@pytest.mark.parametrize("policy", [PLAIN, PLAIN.replace(jit=True, experts="blocks")], ids=["plain", "xla"])
def test_a_graph_has_the_branches_of_all_lengths(uneven, policy):
    cut, want, sizes = uneven
    cfg, params, router = model()
    compiled = make_grpo_step(cfg, SGD, **HOW | UNEVEN | {"policy": policy})
    _, got = compiled(train_state(params, router, SGD), cut)
    assert_trees_close(got, want, 2e-4)
    assert compiled.traces() == 1 and set(sizes) == {3, 6, 12}


def test_bias_moves_only_when_asked():
    _, frozen, _ = updated(whole(samples()))
    state, moved, metrics = updated(whole(samples()), bias_rate=0.25)
    np.testing.assert_array_equal(frozen.router.moe, state.router.moe)
    apart = np.abs(np.array(moved.router.moe - state.router.moe))
    assert_close(apart[apart > 1e-3], np.full((apart > 1e-3).sum(), 0.25), 1e-5)
    # Each row counts up to its last drawn token.
    ends = [row.nonzero()[0].max(initial=-1) + 1 for row in samples().mask]
    assert float(tf.reduce_sum(metrics.parts.load.moe[0])) == 2 * sum(ends)


def test_the_modules_learn_beside_the_policy_and_do_not_touch_it():
    start, plain, _ = updated(whole(samples()))
    _, drafting, metrics = updated(whole(samples()), mtp_weight=0.3)
    assert metrics.parts.mtp.shape == (1,) and float(metrics.parts.mtp[0]) > 0
    for (path, before), a, b in zip(tree.items(start.params), *map(tree.flatten, (plain.params, drafting.params))):
        if path.startswith("mtp."):
            np.testing.assert_array_equal(a, before, err_msg=path)
            assert np.abs(b - before).max() > 0, path
        else:
            assert_close(a, b, 1e-6, path)


def test_a_loss_that_is_not_finite_changes_nothing():
    batch = samples()
    bad = batch._replace(advantages=np.where(np.arange(N) == 0, np.nan, batch.advantages).astype(np.float32))
    for given, limits in ((bad, Limits()), (batch, Limits(grad_norm=1e-6))):
        state, new, metrics = updated(whole(given), limits=limits)
        assert not bool(metrics.taken)
        for a, b in zip(tree.flatten(new), tree.flatten(state)):
            np.testing.assert_array_equal(a, b)


def test_the_compiled_step_is_the_function_and_is_traced_once():
    cfg, params, router = model()
    batch = whole(samples())
    _, want, want_metrics = updated(batch, mtp_weight=0.3, bias_rate=0.1)
    how = {name: value for name, value in HOW.items()} | {"mtp_weight": 0.3, "bias_rate": 0.1}
    step = make_grpo_step(cfg, SGD, **how)
    state, metrics = step(train_state(params, router, SGD), batch)
    assert_trees_close(metrics, want_metrics, 1e-4)
    assert_trees_close((state.params, state.router), (want.params, want.router), 1e-6)
    assert int(state.step) == 1
    step(state, batch)
    assert step.traces() == 1


def test_score_is_token_logprobs_whatever_the_number_of_rows():
    cfg, params, router = model()
    batch = samples()
    score = make_score(cfg, temperature=0.8, rows=4, policy=PLAIN)
    for experts in (None, batch.experts):
        got = score(params, router, batch.tokens, batch.mask, experts)
        want = token_logprobs(
            params, router, batch.tokens, batch.mask, cfg=cfg, temperature=0.8, experts=experts, policy=PLAIN
        )
        for name in ("logprobs", "entropy", "experts"):
            assert_close(getattr(got, name), getattr(want, name), 1e-5, name)
        assert_close(got.load.moe, want.load.moe)


def test_score_computes_short_samples_at_their_length(monkeypatch):
    cfg, params, router = model()
    batch = samples()
    mask = batch.mask * (np.arange(T) < np.array([2, 7, 2, 6, 3, 1])[:, None])
    look = make_score(cfg, rows=3, policy=PLAIN)
    want = look(params, router, batch.tokens, mask, batch.experts)
    monkeypatch.setattr(score, "trimmed_lengths", lambda length: (3, length))
    got = look(params, router, batch.tokens, mask, batch.experts)
    assert_close(got.logprobs * mask, want.logprobs * mask, 1e-5)
    assert_close(got.entropy * mask, want.entropy * mask, 1e-5)
    assert_trees_close(got.load, want.load)
    at = np.cumsum(mask[:, ::-1], 1)[:, ::-1] > 0
    short = np.argsort(at.sum(1), kind="stable")[:3]
    assert (got.logprobs[short, 3:] == 0).all() and (want.logprobs[short, 3:] != 0).all()
    np.testing.assert_array_equal(got.experts[:, at], want.experts[:, at])


def test_how_far_passes_are_apart_by_hand():
    mask = np.array([[1, 1, 0]])
    found = mismatch_numbers(np.array([[-1.0, -2.0, -3.0]]), np.array([[-1.5, -1.8, 5.0]]), mask)
    assert found["mean"] == pytest.approx(0.35) and found["max"] == pytest.approx(0.5)
    assert found["kl"] == pytest.approx(((np.exp(0.5) - 1.5) + (np.exp(-0.2) - 0.8)) / 2)
    chosen, sampled = np.array([[[[0, 1], [2, 3], [0, 1]]]]), np.array([[[[1, 0], [3, 4], [4, 5]]]])
    assert router_agreement(chosen, sampled, mask) == 0.75
    assert router_agreement(chosen[:0], sampled[:0], mask) == 1.0
    assert mismatch_numbers(np.zeros([1, 3]), np.zeros([1, 3]), 0 * mask) == {"mean": 0.0, "max": 0.0, "kl": 0.0}


def test_wrong_arguments_are_named():
    cfg, params, router = model()
    for how, message in [
        ({"clip_low": -1.0}, "`clip_low` is -1.0, want at least 0"),
        ({"average": "fixed"}, "`length` is None"),
        ({"temperature": 0.0}, "`temperature` is 0.0, want above 0"),
        ({"mtp_weight": -1.0}, "`mtp_weight` is -1.0, want at least 0"),
    ]:
        with pytest.raises(ValueError, match=f"make_grpo_step: {message}"):
            make_grpo_step(cfg, SGD, **how)
    with pytest.raises(ValueError, match="make_grpo_step: `mtp_weight` is 0.1, but the model has no MTP module"):
        make_grpo_step(model(0)[0], SGD, mtp_weight=0.1)
    batch = whole(samples())
    for given, message in [
        (batch._replace(ref_logprobs=()), "`kl_weight` is 0.2, but the batch has no `ref_logprobs`"),
        (batch._replace(tokens=batch.tokens[..., 1:]), r"`tokens` has shape \(1, 6, 6\), want \(1, 6, 7\)"),
        (batch._replace(experts=batch.experts[:, :1]), r"`experts` has shape \(1, 1, 6, 7, 2\), want \(1, 2, 6, 7, 2\)"),
        (batch._replace(advantages=batch.advantages[0]), r"`advantages` has shape \(6,\)"),
    ]:
        with pytest.raises(ValueError, match=f"grpo_update: {message}"):
            updated(given)
