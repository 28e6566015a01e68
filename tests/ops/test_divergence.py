"""Divergences between a student and a teacher: the formulas, their gradients, K + 1 outcomes, sizes of what exists."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.divergence import KINDS, TopK, divergence, top_k_logprobs
from tests.compare import SWEEP, assert_close, check_gradient, gradients, normal

MIX = 0.3


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def inputs(tokens, width, vocab, teacher_width=4):
    """Student and teacher, each as hidden states and head."""
    student = normal(0, tokens, width), normal(1, width, vocab)
    return *student, normal(2, tokens, teacher_width), normal(3, teacher_width, vocab)


def probs(hidden, head, temperature):
    return softmax(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / temperature)


def oracle(p, q, kind):
    """The definition, as it is written, on probabilities `[N, J]`."""

    def kl(a, b):
        return np.where(a > 0, a * (np.log(np.where(a > 0, a, 1)) - np.log(np.where(a > 0, b, 1))), 0).sum(-1)

    if kind == "jsd":
        mixed = MIX * p + (1 - MIX) * q
        return MIX * kl(p, mixed) + (1 - MIX) * kl(q, mixed)
    return kl(p, q) if kind == "forward" else kl(q, p)


def bucketed(p, ids):
    """Probabilities of the ids, and of all other tokens together."""
    rest = np.ones(p.shape, bool)
    np.put_along_axis(rest, ids, False, -1)
    return np.concatenate([np.take_along_axis(p, ids, -1), (p * rest).sum(-1, keepdims=True)], -1)


def best(p, k):
    return np.argsort(-p, -1, kind="stable")[:, :k]


@SWEEP
@given(
    st.integers(0, 7), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from(KINDS), st.data(),
)  # fmt: skip
def test_matches_the_formula(tokens, width, vocab, chunk, temperature, kind, data):
    k = data.draw(st.integers(1, vocab))
    hidden, head, *teacher = inputs(tokens, width, vocab)
    p, q = probs(*teacher, temperature), probs(hidden, head, temperature)
    ids = best(p, k)
    stored = top_k_logprobs(*teacher, k=k, temperature=temperature, chunk=chunk)
    np.testing.assert_array_equal(stored.ids, ids)
    # Differences of numbers of the size of the logits over the temperature, here up to 30, each rounded to 6e-8 of itself.
    np.testing.assert_allclose(stored.logprobs, np.log(np.take_along_axis(p, ids, -1)), atol=1e-5)
    if k < vocab:
        np.testing.assert_allclose(stored.rest, np.log(bucketed(p, ids)[:, -1]), atol=1e-5)
    else:
        assert np.isneginf(stored.rest).all()
    how = {"kind": kind, "mix": MIX, "temperature": temperature, "chunk": chunk}
    of_all, of_stored = divergence(hidden, head, tuple(teacher), **how), divergence(hidden, head, stored, **how)
    np.testing.assert_allclose(of_all, oracle(p, q, kind), atol=3e-5, rtol=1e-5)
    np.testing.assert_allclose(of_stored, oracle(bucketed(p, ids), bucketed(q, ids), kind), atol=3e-5, rtol=1e-5)
    if k == vocab:
        np.testing.assert_allclose(of_stored, of_all, atol=3e-5, rtol=1e-5)
    assert (of_stored.numpy() <= of_all.numpy() + 1e-4).all()  # outcomes put together tell less apart


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("chunk", "vocab", "k", "fuse", "keep"),
    [(2, 7, 3, False, 0), (3, 7, 1, False, 0), (9, 7, 7, False, 0), (2, 7, 3, False, 35), (2, 64, 5, True, 0)],
)
def test_gradient(kind, chunk, vocab, k, fuse, keep):
    hidden, head, *teacher = inputs(5, 3, vocab)
    p = probs(*teacher, 1.7)
    ids = best(p, k)
    stored = top_k_logprobs(*teacher, k=k, temperature=1.7)
    how = {"kind": kind, "mix": MIX, "temperature": 1.7, "chunk": chunk, "keep": keep, "fuse": fuse}
    for given_teacher, outcomes in ((tuple(teacher), lambda x: x), (stored, lambda x: bucketed(x, ids))):
        check_gradient(
            lambda h, w, t=given_teacher: divergence(h, w, t, **how),
            lambda h, w, of=outcomes: oracle(of(p), of(probs(h, w, 1.7)), kind),
            [hidden, head],
        )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_where_both_agree(kind):
    hidden, head, *_ = inputs(6, 3, 11)
    stored = top_k_logprobs(hidden, head, k=4, temperature=2.0)
    for teacher in ((hidden, head), stored, stored._replace(logprobs=stored.logprobs - 0.5, rest=stored.rest - 0.5)):
        run = functools.partial(divergence, teacher=teacher, kind=kind, temperature=2.0, chunk=4)
        # Probabilities are known to 1e-7.
        np.testing.assert_allclose(run(hidden, head), 0, atol=1e-6)
        assert max(np.abs(g).max() for g in gradients(run, [hidden, head])) < 3e-6
    other = divergence(hidden, head[:, ::-1].copy(), stored, kind=kind, temperature=2.0)
    assert (other.numpy() > 1e-3).all()


def test_the_teacher_gets_no_gradient():
    hidden, head, *teacher = (tf.constant(x) for x in inputs(4, 3, 9))
    with tf.GradientTape() as tape:
        tape.watch(teacher)
        found = divergence(hidden, head, tuple(teacher))
        stored = divergence(hidden, head, top_k_logprobs(*teacher, k=3))
    assert tape.gradient([found, stored], teacher) == [None, None]


@pytest.mark.parametrize(("kind", "fuse"), [("forward", False), ("reverse", False), ("jsd", False), ("reverse", True)])
def test_probabilities_near_zero_stay_finite(kind, fuse):
    """Logits of ±1e4: most probabilities are 0 in float32, and so is what the rest has."""
    hidden, head, *teacher = inputs(4, 3, 8)
    hidden, teacher = 1e4 * hidden, (1e4 * teacher[0], teacher[1])
    stored = top_k_logprobs(*teacher, k=3)
    assert np.isfinite(stored.rest).all()
    for given_teacher in (teacher, stored, top_k_logprobs(*teacher, k=8)):
        run = functools.partial(divergence, teacher=given_teacher, kind=kind, mix=MIX, fuse=fuse)
        found = run(hidden, head)
        assert np.isfinite(found).all() and (found.numpy() > -1e-6).all()
        assert all(np.isfinite(g).all() for g in gradients(run, [hidden, head]))
        if kind == "jsd":
            assert (found.numpy() <= np.log(2)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_does_not_count_has_no_gradient_whatever_is_stored(kind):
    hidden, head, *teacher = inputs(3, 3, 6)
    stored = top_k_logprobs(*teacher, k=6)
    bad, worse = (TopK(stored.ids, np.array(stored.logprobs), np.array(stored.rest)) for _ in range(2))
    bad.rest[1] = 0.0  # an outcome that the student does not have: infinite
    worse.logprobs[1] = np.nan
    counts = tf.constant([1.0, 0.0, 1.0])
    assert np.isposinf(divergence(hidden, head, bad)[1])
    assert np.isnan(divergence(hidden, head, worse, kind=kind)[1])
    for given_teacher in (stored, bad, worse):
        found = gradients(lambda h, w, t=given_teacher: divergence(h, w, t, kind=kind), [hidden, head], [counts])
        if given_teacher is stored:
            want = found
        for a, b in zip(found, want):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_is_not_taken_for_agreement(kind):
    hidden, head, *teacher = inputs(3, 3, 6)
    lost = [np.where(np.arange(3)[:, None] == 1, np.nan, x).astype(np.float32) for x in (hidden, teacher[0])]
    stored = top_k_logprobs(*teacher, k=2)
    for student, given_teacher in (
        (lost[0], tuple(teacher)), (lost[0], stored), (hidden, (lost[1], teacher[1])),
        (hidden, top_k_logprobs(lost[1], teacher[1], k=2)),
    ):  # fmt: skip
        found = divergence(student, head, given_teacher, kind=kind)
        np.testing.assert_array_equal(np.isnan(found), [False, True, False])


def test_bfloat16_logits_are_reduced_in_float32():
    hidden, head, *teacher = (tf.cast(x, tf.bfloat16) for x in inputs(6, 4, 32))
    p, q = (softmax(tf.cast(tf.matmul(*of), tf.float64).numpy()) for of in (teacher, (hidden, head)))
    got = divergence(hidden, head, tuple(teacher), chunk=4)
    assert got.dtype == tf.float32
    assert_close(got, oracle(p, q, "forward"), 1e-5)
    as_float32 = [tf.cast(x, tf.float32) for x in (hidden, head, *teacher)]
    want = gradients(lambda h, w: divergence(h, w, tuple(as_float32[2:]), chunk=4), as_float32[:2])
    for a, b in zip(gradients(lambda h, w: divergence(h, w, tuple(teacher), chunk=4), [hidden, head]), want):
        assert a.dtype == tf.bfloat16
        assert_close(a, b, 2e-2)  # logits up to 8 are known to 2^-6 of one, probabilities to as much of themselves


def test_logits_of_all_tokens_never_exist():
    hidden, head, *teacher = inputs(12, 3, 50)
    stored = top_k_logprobs(*teacher, k=3)

    @tf.function(autograph=False)
    def value_and_grad():
        found = [gradients(lambda h, w, t=t: divergence(h, w, t, chunk=4), [hidden, head]) for t in (stored, tuple(teacher))]
        return found, top_k_logprobs(*teacher, k=3, chunk=4)

    def sizes(graph):
        for op in graph.get_operations():
            yield from (out.shape.num_elements() or 0 for out in op.outputs if out.shape.rank is not None)
            if op.type in ("While", "StatelessWhile"):
                yield from sizes(graph._get_function(op.get_attr("body").name).graph)

    largest = max(sizes(value_and_grad.get_concrete_function().graph))
    assert 4 * 50 <= largest < 12 * 50


def test_wrong_input_is_named():
    hidden, head, *teacher = inputs(4, 3, 8)
    stored = top_k_logprobs(*teacher, k=3)
    for given_teacher, how, message in [
        ((teacher[0], teacher[1][:, 1:]), {}, r"divergence: `teacher head` has shape \(4, 7\), want \(4, 8\) \[E, V\]"),
        ((teacher[0][1:], teacher[1]), {}, r"divergence: `teacher hidden` has shape \(3, 4\), want \(4, \?\) \[N, E\]"),
        (stored._replace(rest=stored.rest[1:]), {}, r"divergence: `teacher.rest` has shape \(3,\), want \(4,\) \[N\]"),
        (stored._replace(ids=stored.ids + 8), {}, "divergence: `teacher.ids` holds token id"),
        (teacher[0], {}, "divergence: `teacher` is of type ndarray, want TopK or"),
        (top_k_logprobs(*inputs(4, 3, 9)[2:], k=9)._replace(ids=np.zeros([4, 9], np.int32)), {}, "has 9 tokens at a place"),
        (stored, {"kind": "both"}, "divergence: `kind` is 'both', want one of 'forward', 'reverse', 'jsd'"),
        (stored, {"kind": "jsd", "mix": 1.0}, "divergence: `mix` is 1.0, want above 0 and below 1"),
        (stored, {"temperature": 0.0}, "divergence: `temperature` is 0.0, want above 0"),
        (stored, {"chunk": 0}, "divergence: `chunk` is 0, want > 0 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            divergence(hidden, head, given_teacher, **how)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"top_k_logprobs: `k` is {k}, want 1 to 8"):
            top_k_logprobs(*teacher, k=k)
