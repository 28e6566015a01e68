"""Documents in packed rows: borders, positions, inputs with a target of their own document, and a balance loss for each."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.ops.router import sequence_balance_loss
from dsv3.ops.segments import segment_count, segment_inputs, segment_positions, segment_runs
from tests import oracles
from tests.compare import assert_close, check_gradient

ROW = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6)


def row_of(parts, length):
    values = [value for value, count in parts for _ in range(count)]
    return (values + [0] * length)[:length]


def walk(row):
    """Runs and positions of one row, token by token."""
    runs, positions = [0], [0]
    for before, value in zip(row, row[1:]):
        runs.append(runs[-1] + (value != before))
        positions.append(positions[-1] + 1 if value == before else 0)
    return runs, positions


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4), st.integers(2, 12))
def test_what_a_row_holds(rows, length):
    segments = np.array([row_of(row, length) for row in rows], np.int64)
    runs, positions = zip(*(walk(row.tolist()) for row in segments))
    np.testing.assert_array_equal(segment_runs(segments), runs)
    np.testing.assert_array_equal(segment_positions(segments), positions)
    got = segment_inputs(segments)
    np.testing.assert_array_equal(got.segments, [row[:-1] for row in runs])
    np.testing.assert_array_equal(got.positions, [row[:-1] for row in positions])
    documents = 0
    for row, inside in zip(segments.tolist(), got.inside.numpy().tolist()):
        assert inside == [a == b != 0 for a, b in zip(row, row[1:])]
        documents += len({run for run, i in zip(walk(row)[0], inside) if i})
    assert float(segment_count(got.inside)) == documents


@settings(deadline=None, max_examples=30)
@given(st.lists(ROW, min_size=1, max_size=3), st.integers(1, 9), st.integers(2, 5), st.booleans(), st.integers(0, 99))
def test_balance_of_packed_documents_is_that_of_rows(rows, length, experts, masked, seed):
    segments = np.array([row_of(row, length) for row in rows], np.int32)
    rng = np.random.default_rng(seed)
    scores = rng.permutation(len(rows) * length * experts).reshape(len(rows), length, experts).astype(np.float32) + 1
    mask = rng.random(segments.shape) < 0.6 if masked else np.ones(segments.shape, bool)
    runs = np.array([walk(row.tolist())[0] for row in segments])
    losses = []
    for row, run in {(r, run) for r, run_of in enumerate(runs) for run in run_of}:
        here = mask[row] & (runs[row] == run)
        if here.any():
            losses.append(oracles.balance_loss(scores[row, here][None].astype(np.float64), top_k=2))
    got = sequence_balance_loss(scores, top_k=2, mask=mask if masked else None, segments=segments)
    assert_close(got, np.mean(losses) if losses else 0.0)


def test_gradient_of_a_packed_balance_loss():
    scores = np.random.default_rng(0).random([2, 5, 3]).astype(np.float32)
    segments, mask = np.array([[1, 1, 2, 2, 2], [1, 0, 0, 1, 1]]), np.array([[1, 1, 1, 0, 1], [1, 1, 0, 1, 1]], bool)

    def packed(s):
        return sequence_balance_loss(s, top_k=2, mask=mask, segments=segments)

    def apart(s):
        parts = [(0, slice(0, 2)), (0, slice(2, 5)), (1, slice(0, 1)), (1, slice(1, 3)), (1, slice(3, 5))]
        return sum(oracles.balance_loss(s[b, t][mask[b, t]][None], top_k=2) for b, t in parts) / len(parts)

    check_gradient(packed, lambda s: np.array(apart(s)), [scores])


def test_refusals():
    for segments, message in [
        (np.zeros([2, 3, 4], np.int32), r"`segments` has rank 3, want 2 \[B, T\+1\]"),
        (np.zeros([2, 1], np.int32), "`segments` has 1 columns, want at least 2"),
        (np.zeros([2, 3], np.float32), "`segments` has dtype float32, want an integer dtype"),
    ]:
        with pytest.raises(ValueError, match=f"segment_inputs: {message}"):
            segment_inputs(segments)
    with pytest.raises(ValueError, match=r"sequence_balance_loss: `segments` has shape \(1, 2\), want \(1, 3\) \[B, T\]"):
        sequence_balance_loss(tf.ones([1, 3, 2]), top_k=1, segments=tf.ones([1, 2], tf.int32))
