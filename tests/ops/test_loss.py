"""Cross-entropy and log-probabilities in chunks."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.loss import target_logprobs, token_nll
from tests import oracles
from tests.compare import SWEEP, assert_close, check_gradient, gradients, normal


def inputs(tokens, width, vocab):
    targets = np.random.default_rng(tokens).integers(0, vocab, tokens)
    return normal(0, tokens, width), normal(1, width, vocab), targets


@SWEEP
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 40), st.integers(1, 12))
def test_matches_the_formula(tokens, width, vocab, chunk):
    hidden, head, targets = inputs(tokens, width, vocab)
    want = oracles.token_nll(hidden.astype(np.float64), head, targets)
    # A difference of two numbers of the size of the logits, here up to 10.
    assert_close(token_nll(hidden, head, targets, chunk=chunk), want, 1e-5)


@pytest.mark.parametrize("keep", [0, 5 * 256])
@pytest.mark.parametrize(
    ("chunk", "vocab", "fuse"), [(2, 7, False), (2, 64, True), (5, 7, True), (9, 7, False), (2, 256, True)]
)
def test_gradient(chunk, vocab, fuse, keep):
    hidden, head, targets = inputs(5, 3, vocab)
    check_gradient(
        lambda h, w: token_nll(h, w, targets, chunk=chunk, keep=keep, fuse=fuse),
        lambda h, w: oracles.token_nll(h, w, targets),
        [hidden, head],
    )


def oracle_logprobs(hidden, head, targets, temperature):
    """`[2, N]`: log-probability and entropy, from the softmax as it is written."""
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / temperature
    logp = z - z.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return np.stack([logp[np.arange(len(targets)), targets], -(np.exp(logp) * logp).sum(-1)])


@SWEEP
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.7]))
def test_log_probabilities_and_entropy_match_the_formula(tokens, width, vocab, chunk, temperature):
    hidden, head, targets = inputs(tokens, width, vocab)
    got = tf.stack(target_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk))
    # Differences of numbers of the size of the logits over the temperature, here up to 20; one token has entropy 0.
    np.testing.assert_allclose(got, oracle_logprobs(hidden, head, targets, temperature), atol=1e-5)
    if temperature == 1.0 and tokens:
        assert_close(-got[0], token_nll(hidden, head, targets, chunk=chunk), 1e-5)


@pytest.mark.parametrize("keep", [0, 5 * 64])
@pytest.mark.parametrize(("chunk", "vocab", "fuse"), [(2, 7, False), (2, 64, True), (9, 7, False)])
def test_gradient_of_log_probabilities_and_entropy(chunk, vocab, fuse, keep):
    hidden, head, targets = inputs(5, 3, vocab)
    check_gradient(
        lambda h, w: tf.stack(target_logprobs(h, w, targets, temperature=1.7, chunk=chunk, keep=keep, fuse=fuse)),
        lambda h, w: oracle_logprobs(h, w, targets, 1.7),
        [hidden, head],
    )


def test_large_logits_stay_finite():
    hidden, head, targets = inputs(4, 3, 8)
    logits = 1e4 * hidden @ head
    want = logits.max(-1) - logits[np.arange(4), targets]
    assert_close(token_nll(1e4 * hidden, head, targets), want, 1e-5)
    assert all(np.isfinite(g).all() for g in gradients(lambda h, w: token_nll(h, w, targets), [1e4 * hidden, head]))
    found = [*target_logprobs(1e4 * hidden, head, targets, temperature=0.1)]
    found += gradients(lambda h, w: target_logprobs(h, w, targets, temperature=0.1), [1e4 * hidden, head])
    assert all(np.isfinite(x).all() for x in found)


def test_bfloat16_logits_are_reduced_in_float32():
    hidden, head, targets = inputs(6, 4, 64)
    hidden, head = tf.cast(hidden, tf.bfloat16), tf.cast(head, tf.bfloat16)
    got = token_nll(hidden, head, targets, chunk=4)
    assert got.dtype == tf.float32
    logits = tf.cast(tf.matmul(hidden, head), tf.float64).numpy()
    want = oracles.token_nll(logits, np.eye(64), targets)
    assert_close(got, want, 1e-6)
    for value, want in zip(target_logprobs(hidden, head, targets, temperature=0.7), oracle_logprobs(
            logits, np.eye(64), targets, 0.7)):  # fmt: skip
        assert value.dtype == tf.float32
        assert_close(value, want, 1e-6)


@pytest.mark.parametrize("fn", [token_nll, target_logprobs])
def test_logits_of_all_tokens_never_exist(fn):
    hidden, head, targets = inputs(12, 3, 50)

    @tf.function(autograph=False)
    def value_and_grad():
        return gradients(lambda h, w: fn(h, w, targets, chunk=4), [hidden, head])

    def sizes(graph):
        for op in graph.get_operations():
            yield from (out.shape.num_elements() or 0 for out in op.outputs if out.shape.rank is not None)
            if op.type in ("While", "StatelessWhile"):
                yield from sizes(graph._get_function(op.get_attr("body").name).graph)

    largest = max(sizes(value_and_grad.get_concrete_function().graph))
    assert 4 * 50 <= largest < 12 * 50


@pytest.mark.parametrize("fn", [token_nll, target_logprobs])
def test_kept_logits_are_not_multiplied_again(fn):
    hidden, head, targets = inputs(4, 3, 50)

    def count(keep):
        run = tf.function(lambda: gradients(lambda h, w: fn(h, w, targets, keep=keep), [hidden, head]), autograph=False)
        return sum(op.type == "MatMul" for op in run.get_concrete_function().graph.get_operations())

    assert [count(keep) for keep in (0, 4 * 50 - 1, 4 * 50)] == [4, 4, 3]


@pytest.mark.parametrize("keep", [0, 4 * 50])
def test_gradients_may_be_taken_again(keep):
    hidden, head, targets = inputs(4, 3, 50)
    hidden = tf.constant(hidden)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(hidden)
        nll = token_nll(hidden, head, targets, chunk=2, keep=keep)
        total = tf.reduce_sum(nll)
    assert_close(tape.gradient(nll, hidden), tape.gradient(total, hidden))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_is_no_number_makes_a_loss_that_is_none(sign, fuse):
    """A compiled maximum may pass over it."""
    hidden = np.ones([3, 1], np.float32)
    hidden[1] = np.copysign(np.nan, sign)
    found = token_nll(tf.constant(hidden), tf.ones([1, 70]), [0, 1, 2], fuse=fuse).numpy()
    assert np.isnan(found).tolist() == [False, True, False]


def test_wrong_input_is_named():
    hidden, head, targets = inputs(4, 3, 8)
    for arguments, how, message in [
        ((hidden, head[1:], targets), {}, r"token_nll: `head` has shape \(2, 8\), want \(3, \?\) \[D, V\]"),
        ((hidden, head, targets[1:]), {}, r"token_nll: `targets` has shape \(3,\), want \(4,\) \[N\]"),
        ((hidden, head, targets.astype(np.float32)), {}, "token_nll: `targets` has dtype float32, want an integer dtype"),
        ((hidden, head, targets), {"chunk": 0}, "token_nll: `chunk` is 0, want > 0 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            token_nll(*arguments, **how)
    with pytest.raises(ValueError, match="target_logprobs: `temperature` is 0.0, want above 0"):
        target_logprobs(hidden, head, targets, temperature=0.0)
