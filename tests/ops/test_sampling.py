"""Sampling against its statement in float64, one token at a time, and against its own distribution."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st

from dsv3.ops.random import key_fold
from dsv3.ops.sampling import greedy_accept, sample, sampling_probs, speculative_accept
from tests.chi_square import assert_follows
from tests.compare import SWEEP, assert_close


def oracle_probs(logits, temperature, top_k, top_p):
    """Returns (probabilities, how near a cumulative sum comes to `top_p`) of one row."""
    logits = np.asarray(logits, np.float64)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    probs = np.zeros(len(logits))
    if temperature == 0:
        probs[order[0]] = 1
        return probs, 1.0
    kept = order[: top_k or None]
    weights = np.exp((logits[kept] - logits[order[0]]) / temperature)
    weights /= weights.sum()
    sums = np.cumsum(weights)
    nucleus = next((i + 1 for i, s in enumerate(sums) if s >= top_p), len(kept)) if top_p < 1 else len(kept)
    probs[kept[:nucleus]] = weights[:nucleus] / weights[:nucleus].sum()
    return probs, np.abs(sums - top_p).min()


rows = st.tuples(
    st.lists(st.integers(-6, 6), min_size=7, max_size=7),  # few values: many ties
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.integers(0, 9),
    st.sampled_from([0.05, 0.37, 0.66, 0.93, 1.0]),
)


@SWEEP
@given(st.lists(rows, min_size=1, max_size=4))
def test_probs_match_the_statement(batch):
    logits, temperature, top_k, top_p = (np.array(x) for x in zip(*batch))
    want, margins = zip(*(oracle_probs(*row) for row in batch))
    assume(all(margin > 1e-4 or row[3] == 1.0 for margin, row in zip(margins, batch)))
    got = sampling_probs(logits.astype(np.float32), temperature=temperature, top_k=top_k, top_p=top_p)
    assert_close(got, np.array(want))
    for b, row in enumerate(batch):  # alone, and with numbers as settings
        alone = sampling_probs([row[0]], temperature=row[1], top_k=row[2], top_p=row[3])
        np.testing.assert_array_equal(alone[0].numpy(), got[b].numpy())


def test_probs_of_several_positions_share_a_row_s_settings():
    logits = np.random.default_rng(0).normal(size=(2, 3, 9)).astype(np.float32) * 3
    settings = {"temperature": np.array([0.7, 0.0]), "top_k": np.array([4, 0]), "top_p": np.array([0.8, 0.5])}
    run = tf.function(lambda x, how: sampling_probs(x, **how), jit_compile=True)
    columns = {name: value[:, None] for name, value in settings.items()}
    for got in (sampling_probs(logits, **columns), run(tf.constant(logits), columns)):
        for t in range(3):
            assert_close(got[:, t], sampling_probs(logits[:, t], **settings))


def test_equal_logits_keep_exactly_top_k_lowest_ids_first():
    got = sampling_probs(tf.zeros([1, 6]), top_k=[4]).numpy()[0]
    np.testing.assert_allclose(got, [0.25] * 4 + [0, 0])


def test_extreme_logits_and_temperatures_stay_finite():
    logits = [[1e38, -1e38, 0.0], [float("-inf"), 3.0, 2.0]]
    for temperature in (1e-30, 1e-3, 1.0, 1e30):
        got = sampling_probs(logits, temperature=temperature, top_p=0.9).numpy()
        assert np.isfinite(got).all() and np.allclose(got.sum(-1), 1) and got[1, 0] == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "`temperature` is -1.0, want at least 0"),
        ({"top_k": [3, -2]}, "`top_k` is -2, want at least 0"),
        ({"top_p": 0.0}, "`top_p` is 0.0, want above 0 and at most 1"),
        ({"top_p": tf.constant([0.5, 1.5])}, "`top_p` is 1.5, want above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"sampling_probs: {message}"):
        sampling_probs(tf.zeros([2, 4]), **settings)
    with pytest.raises(ValueError, match="`logits` has rank 1"):
        sampling_probs(tf.zeros([4]))


def test_sample_follows_the_probabilities():
    probs = np.array([[0.4, 0.0, 0.1, 0.5, 0.0], [0.0, 3.0, 1.0, 0.0, 0.0]])  # the second row does not sum to one
    for row in probs:
        drawn = sample([1, 2], np.tile(row, (20000, 1))).numpy()
        assert_follows(np.bincount(drawn, minlength=5), row / row.sum())


def test_sample_with_row_keys_does_not_look_at_neighbours():
    probs = np.random.default_rng(1).dirichlet(np.ones(50), 6)
    keys = key_fold([3, 4], tf.range(6))
    together = sample(keys, probs).numpy()
    assert len(set(together)) > 2
    for b in range(6):
        assert sample(keys[b : b + 1], probs[b : b + 1]).numpy()[0] == together[b]
    np.testing.assert_array_equal(sample([3, 4], probs).numpy(), together)


def test_sample_of_one_hot_is_that_token():
    np.testing.assert_array_equal(sample([0, 0], tf.one_hot(tf.range(300), 300)).numpy(), np.arange(300))


V = 4


def markov(rng, depth):
    """Random conditional distributions, some with zeros: `[V^i, V]` for the token after i tokens."""
    tables = []
    for i in range(depth):
        table = rng.dirichlet(np.full(V, 0.7), V**i)
        table[table < 0.05] = 0
        tables.append(table / table.sum(-1, keepdims=True))
    return tables


def test_speculative_output_is_distributed_as_the_target():
    rng, n, depth = np.random.default_rng(7), 40000, 2
    target, draft = markov(rng, depth + 1), markov(rng, depth)
    state, drafts, q, p = np.zeros(n, int), [], [], [np.tile(target[0], (n, 1))]
    for i in range(depth):
        q.append(draft[i][state])
        drafts.append((q[i].cumsum(-1) > rng.random((n, 1))).argmax(-1))
        state = state * V + drafts[i]
        p.append(target[i + 1][state])
    accepted, token = speculative_accept([8, 9], np.stack(drafts, 1), np.stack(q, 1), np.stack(p, 1))
    accepted, token = accepted.numpy(), token.numpy()
    assert {0, 1, 2} == set(accepted)
    out = [np.where(accepted > i, np.append(drafts, [token], 0)[i], token) for i in range(depth + 1)]
    assert_follows(np.bincount(out[0], minlength=V), target[0][0])
    for i in (1, 2):  # given the tokens before, of the rows that got so far
        here = accepted >= i
        before = sum(out[j][here] * V ** (i - 1 - j) for j in range(i))
        counts = np.bincount(before * V + out[i][here], minlength=V ** (i + 1)).reshape(-1, V)
        seen = counts.sum(-1) > 0
        assert_follows(counts[seen], target[i][seen])
    # The chance that the first draft stays is what the two distributions share.
    share = np.minimum(target[0][0], draft[0][0]).sum()
    assert_follows(np.bincount(accepted > 0, minlength=2), [1 - share, share])


def test_equal_distributions_accept_everything():
    probs = np.random.default_rng(0).dirichlet(np.ones(5), (300, 4)).astype(np.float32)
    drafts = probs[:, :3].argmax(-1)
    accepted, token = speculative_accept([1, 1], drafts, probs[:, :3], probs)
    np.testing.assert_array_equal(accepted.numpy(), np.full(300, 3))
    assert len(set(token.numpy())) == 5


def test_greedy_is_the_one_hot_case():
    rng = np.random.default_rng(3)
    drafts, target = rng.integers(0, 3, (64, 3)), rng.integers(0, 3, (64, 4))
    accepted, token = greedy_accept(drafts, target)
    for b in range(64):
        stays = 0
        while stays < 3 and drafts[b, stays] == target[b, stays]:
            stays += 1
        assert (accepted[b], token[b]) == (stays, target[b, stays])
    by_probs = speculative_accept([5, 5], drafts, tf.one_hot(drafts, 3), tf.one_hot(target, 3))
    for got, want in zip(by_probs, (accepted, token)):
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"sample: `probs` has shape \(3,\), want \(\?, \?\) \[B, V\]"):
        sample([0, 0], tf.zeros([3]))
    with pytest.raises(ValueError, match=r"sample: `key` has shape \(3, 2\), want \(4, 2\)"):
        sample(tf.zeros([3, 2], tf.int32), tf.ones([4, 5]))
    with pytest.raises(ValueError, match=r"`target_probs` has shape \(1, 2, 5\), want \(1, 3, 5\)"):
        speculative_accept([0, 0], [[1, 2]], tf.ones([1, 2, 5]), tf.ones([1, 2, 5]))
    with pytest.raises(ValueError, match=r"greedy_accept: `target_tokens` has shape \(1, 2\), want \(1, 3\)"):
        greedy_accept([[1, 2]], [[1, 2]])
