"""The GRPO loss against NumPy in float64, its gradient against the oracle's, and cases done by hand."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import tree
from dsv3.rl.grpo import AVERAGES, KL_ESTIMATORS, grpo_loss, grpo_totals, kl_estimate, token_weights
from tests.compare import SWEEP, assert_close, assert_trees_close, check_gradient, gradients, normal


def oracle_kl(lp, ref, kind):
    d = ref - lp
    return {"k1": -d, "k2": d * d / 2, "k3": np.exp(d) - d - 1}[kind]


def oracle(lp, old, ref, advantages, mask, *, low=0.2, high=0.2, dual=None, kl="k3", beta=0.0, average="sequence",
           length=None):  # fmt: skip
    """The loss, token by token as the papers write it."""
    total, tokens, sequences = 0.0, mask.sum(), int((mask.sum(1) > 0).sum())
    for i, t in zip(*np.nonzero(mask)):
        ratio, a = np.exp(lp[i, t] - old[i, t]), advantages[i]
        gain = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        if dual is not None and a < 0:
            gain = max(gain, dual * a)
        gain -= beta * oracle_kl(lp[i, t], ref[i, t], kl) if beta else 0.0
        total -= gain / {"token": tokens, "sequence": mask[i].sum() * sequences, "fixed": sequences * (length or 1)}[average]
    return total


def inputs(rows, length, spread=0.4):
    mask = np.random.default_rng([rows, length]).integers(0, 2, (rows, length)).astype(np.float32)
    mask[0, 0] = 1
    if rows > 2:
        mask[1] = 0  # a sequence that does not count
    apart = [normal(seed, rows, length, scale=spread) for seed in range(3)]
    lp = -2.0 + apart[0]
    return lp, lp + apart[1], lp + apart[2], normal(3, rows), mask


CASES = list(itertools.product(KL_ESTIMATORS, AVERAGES, [None, 1.5], [(0.2, 0.2), (0.1, 0.4), (10.0, 10.0)]))


@SWEEP
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_matches_the_oracle(rows, length, data):
    kl, average, dual, (low, high) = data.draw(st.sampled_from(CASES))
    given_ = inputs(rows, length)
    long = 7 if average == "fixed" else None
    beta = data.draw(st.sampled_from([0.0, 0.3]))
    out = grpo_loss(
        *given_, clip_low=low, clip_high=high, dual_clip=dual, kl=kl, kl_weight=beta, average=average, length=long
    )
    how = {"low": low, "high": high, "dual": dual, "average": average, "length": long}
    want = oracle(*(x.astype(np.float64) for x in given_), kl=kl, beta=beta, **how)
    assert abs(float(out.loss) - want) <= 3e-6  # a sum of some ten terms of size 1 in float32
    policy = oracle(*(x.astype(np.float64) for x in given_), **how)
    assert abs(float(out.policy) - policy) <= 3e-6
    assert_close(out.policy + beta * out.penalty, out.loss)


@pytest.mark.parametrize("kl, average, dual, clip", CASES)
def test_gradient(kl, average, dual, clip):
    lp, *rest = inputs(3, 5)
    how = {"average": average, "length": 7 if average == "fixed" else None}
    check_gradient(
        lambda x: grpo_loss(
            x, *rest, kl=kl, kl_weight=0.3, dual_clip=dual, clip_low=clip[0], clip_high=clip[1], **how
        ).loss,
        lambda x: np.asarray(oracle(x, *rest, kl=kl, beta=0.3, dual=dual, low=clip[0], high=clip[1], **how)),
        [lp],
    )  # fmt: skip


def by_hand(ratio, advantage, **how):
    return grpo_loss([[np.float32(np.log(ratio))]], [[0.0]], None, [advantage], [[1.0]], **how)


@pytest.mark.parametrize(
    "ratio, advantage, how, loss, gradient",
    [
        (1.1, 1.0, {}, -1.1, -1.1),  # within the limits: −ρA, whose derivative by log π is itself
        (1.5, 1.0, {}, -1.2, 0.0),  # better, but already far above
        (1.5, -1.0, {}, 1.5, 1.5),  # worse and too likely: no limit
        (0.5, -1.0, {}, 0.8, 0.0),
        (0.5, 1.0, {}, -0.5, -0.5),
        (1.25, 1.0, {"clip_high": 0.28}, -1.25, -1.25),
        (1.5, 1.0, {"clip_high": 0.28}, -1.28, 0.0),
        (0.85, -1.0, {"clip_low": 0.1}, 0.9, 0.0),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0, 0.0),
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0, 2.0),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.2, 0.0),
        (0.01, -1.0, {"clip_low": 10.0, "clip_high": 10.0}, 0.01, 0.01),  # R1's: hardly a limit
    ],
)
def test_one_token_by_hand(ratio, advantage, how, loss, gradient):
    assert_close(by_hand(ratio, advantage, **how).loss, loss, 1e-6)
    (found,) = gradients(lambda x: by_hand_of(x, advantage, **how), [np.float32(np.log(ratio))])
    assert_close(found, gradient, 1e-6)


def by_hand_of(logprob, advantage, **how):
    return grpo_loss(tf.reshape(logprob, [1, 1]), [[0.0]], None, [advantage], [[1.0]], **how).loss


def test_only_the_policy_gets_a_gradient():
    lp, old, ref, advantages, mask = inputs(3, 5)
    found = gradients(lambda *x: grpo_loss(*x, mask, kl_weight=0.1).loss, [lp, old, ref, advantages])
    assert [bool(np.abs(g.numpy()).max() > 0) for g in found] == [True, False, False, False]


def test_averages_by_hand():
    """Two sequences of one and three tokens, advantages 1 and −1, every ratio 1."""
    zeros, mask = np.zeros([3, 3], np.float32), np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], np.float32)
    advantages = np.array([1.0, -1.0, 5.0], np.float32)
    for how, want in (
        ({"average": "token"}, (3 - 1) / 4),
        ({"average": "sequence"}, 0.0),
        ({"average": "fixed", "length": 10}, (3 - 1) / 20),
    ):
        assert_close(grpo_loss(zeros, zeros, None, advantages, mask, **how).loss, want)
    assert_close(token_weights(mask, average="sequence"), [[1 / 2, 0, 0], [1 / 6] * 3, [0] * 3])


def test_statistics_by_hand():
    ratio = np.array([[1.5, 0.5, 1.1, 9.0], [0.5, 4.0, 0.9, 2.0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.float32)
    lp = np.log(ratio).astype(np.float32)
    ref = np.full_like(lp, 0.5)
    stats = grpo_loss(lp, np.zeros_like(lp), ref, [1.0, -1.0], mask, dual_clip=3.0, kl="k1", kl_weight=0.1).stats
    assert_close(stats.clip_high, 1 / 7)
    assert_close(stats.clip_low, 1 / 7)
    assert_close(stats.dual_clip, 1 / 7)
    assert_close(stats.ratio_max, 4.0)
    assert_close(stats.ratio_mean, (1.5 + 0.5 + 1.1 + 0.5 + 4 + 0.9 + 2) / 7)
    assert_close(stats.kl, (lp * mask).sum() / 7 - 0.5)
    assert_close(stats.drift, ((ratio - np.log(ratio) - 1) * mask).sum() / 7)  # of samples of the old one


def test_without_a_reference_no_divergence_is_told():
    lp, old, ref, advantages, mask = inputs(3, 5)
    none, unweighted = (grpo_loss(lp, old, policy, advantages, mask) for policy in (None, ref))
    assert none.penalty == none.stats.kl == ()
    assert float(unweighted.penalty) > 0 and float(unweighted.stats.kl) > 0
    assert_close(none.loss, unweighted.loss)
    assert_trees_close(none.stats._replace(kl=unweighted.stats.kl), unweighted.stats)


def test_zero_advantages_give_no_gradient_but_the_penalty_s():
    lp, old, ref, _, mask = inputs(3, 5)
    zero = np.zeros(3, np.float32)
    (none,) = gradients(lambda x: grpo_loss(x, old, None, zero, mask).loss, [lp])
    np.testing.assert_array_equal(none, np.zeros_like(lp))
    (some,) = gradients(lambda x: grpo_loss(x, old, ref, zero, mask, kl_weight=0.1).loss, [lp])
    assert np.abs(some.numpy()).max() > 0


def test_on_fresh_samples_the_policy_itself_will_do_as_the_old_one():
    """Then the gradient is that of −Σ w·A·log π."""
    lp, _, _, advantages, mask = inputs(3, 5)
    (got,) = gradients(lambda x: grpo_loss(x, tf.stop_gradient(x), None, advantages, mask).loss, [lp])
    assert_close(got, -token_weights(mask).numpy() * advantages[:, None])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_padding_holds_does_not_matter(bad):
    lp, old, ref, advantages, mask = inputs(3, 5)
    want, (gradient,) = (f(lambda *x: grpo_loss(*x, advantages, mask, kl_weight=0.2).loss) for f in (
        lambda fn: fn(lp, old, ref), lambda fn: gradients(lambda x: fn(x, old, ref), [lp])))  # fmt: skip
    dirty = [np.where(mask > 0, x, np.float32(bad)) for x in (lp, old, ref)]
    dirty.append(np.where(mask.any(1), advantages, np.float32(bad)))
    assert_close(grpo_loss(*dirty, mask, kl_weight=0.2).loss, want)
    (got,) = gradients(lambda x: grpo_loss(x, *dirty[1:], mask, kl_weight=0.2).loss, [dirty[0]])
    assert_close(got, gradient)


@pytest.mark.parametrize("average", AVERAGES)
def test_parts_of_a_batch_add_up(average):
    given_ = inputs(4, 5)
    how = {"average": average, "length": 9 if average == "fixed" else None, "kl_weight": 0.1}
    whole = grpo_loss(*given_, **how)
    totals = grpo_totals(given_[-1])
    parts = [grpo_loss(*(x[rows] for x in given_), totals=totals, **how) for rows in (slice(0, 1), slice(1, 4))]
    summed = tree.map_leaves(lambda a, b: a + b, *parts)
    largest = max(float(part.stats.ratio_max) for part in parts)
    summed = summed._replace(stats=summed.stats._replace(ratio_max=largest))
    for path, value in tree.items(whole):
        assert_close(tree.to_dict(summed)[path], value, 1e-6, path)


def test_nothing_that_counts_is_a_loss_of_zero():
    lp, old, ref, advantages, mask = inputs(3, 5)
    for average in AVERAGES:
        length = 9 if average == "fixed" else None
        out = grpo_loss(lp, old, ref, advantages, 0 * mask, kl_weight=0.1, average=average, length=length)
        assert all(float(leaf) == 0.0 for leaf in tree.flatten(out))


def test_k3_is_never_negative_and_its_mean_is_the_divergence():
    """Over all tokens of two distributions, weighted with the first: k1 and k3 give the divergence, k2 something near it."""
    p, q = (np.exp(normal(seed, 7)) for seed in (0, 1))
    p, q = p / p.sum(), q / q.sum()
    want = float((p * np.log(p / q)).sum())
    found = {kind: kl_estimate(np.log(p)[None], np.log(q)[None], estimator=kind).numpy()[0] for kind in KL_ESTIMATORS}
    assert (found["k3"] >= 0).all() and (found["k1"] < 0).any()
    for kind in ("k1", "k3"):
        assert abs((p * found[kind]).sum() - want) < 1e-6
    # Beside zero r − d − 1 would be all rounding.
    small = kl_estimate([[0.0]], [[1e-4]]).numpy()[0, 0]
    assert_close(small, 5e-9, 2e-3)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"clip_low": -0.1}, "`clip_low` is -0.1, want at least 0"),
        ({"clip_high": -1.0}, "`clip_high` is -1.0"),
        ({"dual_clip": 1.0}, "`dual_clip` is 1.0, want above 1 or None"),
        ({"kl": "k4"}, "`kl` is 'k4', want one of 'k1', 'k2', 'k3'"),
        ({"kl_weight": -1.0}, "`kl_weight` is -1.0"),
        ({"kl_weight": 0.1, "ref_logprobs": None}, "`kl_weight` is 0.1, but there is no `ref_logprobs`"),
        ({"average": "row"}, "`average` is 'row', want one of 'token', 'sequence', 'fixed'"),
        ({"average": "fixed"}, "`length` is None, want tokens > 0 with average='fixed'"),
        ({"average": "token", "length": 4}, "`length` is 4, want None with average='token'"),
        ({"advantages": np.zeros([3, 5])}, r"`advantages` has shape \(3, 5\), want \(3,\) \[N\]"),
        ({"mask": np.zeros([3, 4])}, r"`mask` has shape \(3, 4\), want \(3, 5\) \[N, T\]"),
        ({"old_logprobs": np.zeros([3])}, r"`old_logprobs` has shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(how, message):
    names = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "mask")
    with pytest.raises(ValueError, match=f"grpo_loss: {message}"):
        grpo_loss(**dict(zip(names, inputs(3, 5))) | how)


@pytest.mark.parametrize("kl", KL_ESTIMATORS)
@pytest.mark.parametrize("apart", [200.0, -200.0])
def test_policies_that_are_far_apart_give_numbers(apart, kl):
    """exp(200) is infinite in float32, and infinity times an advantage of zero is no number."""
    lp = tf.zeros([2, 3])
    with tf.GradientTape() as tape:
        tape.watch(lp)
        out = grpo_loss(lp, lp - apart, lp + apart, [0.0, -1.0], np.ones([2, 3]), kl=kl, kl_weight=0.1)
    for value in (*tree.flatten(out), tape.gradient(out.loss, lp)):
        assert np.isfinite(value).all()
