"""Packing streams into rows and rows into batches."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3.data import (
    BatchPlan,
    PackedDocuments,
    TokenStream,
    batch_at,
    batch_rows,
    heldout_batches,
    pack_documents,
    pack_sequences,
    take_rows,
)


def stream_of(sizes):
    """Documents of the given numbers of tokens; every token is its own place in the stream."""
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    return TokenStream(np.arange(starts[-1], dtype=np.int32), starts, np.array(sizes, np.int64))


@given(st.integers(2, 60), st.integers(1, 20))
def test_every_target_counts_once_and_follows_its_input(count, length):
    assume(count > length)
    packed = pack_sequences(np.arange(count, dtype=np.uint32), length)
    batch = take_rows(packed, range(len(packed.starts)))
    assert batch.tokens.shape == (-(-(count - 1) // length), length + 1) and batch.tokens.dtype == np.int32
    assert batch.weights.shape == (len(packed.starts), length) and batch.weights.dtype == np.float32
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.tokens[:, :-1] + 1)
    assert batch.tokens[:, 1:][batch.weights == 1].tolist() == list(range(1, count))
    assert set(batch.weights.ravel()) <= {0.0, 1.0}
    assert (batch.weights[:-1] == 1).all()


def test_rows_overlap_by_one():
    packed = pack_sequences(np.arange(10), 3)
    assert take_rows(packed, [0, 1, 2]).tokens.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_last_row_ends_with_the_stream():
    batch = take_rows(pack_sequences(np.arange(9), 3), [2])
    assert batch.tokens.tolist() == [[5, 6, 7, 8]] and batch.weights.tolist() == [[0, 1, 1]]


def test_a_stream_packs_as_its_tokens():
    stream = stream_of([4, 3, 5])
    assert (pack_sequences(stream, 4).starts == pack_sequences(stream.tokens, 4).starts).all()


@pytest.mark.parametrize("count", [0, 1, 128])
def test_short_corpus_says_how_short(count):
    with pytest.raises(
        ValueError, match=f"the corpus has {count} tokens, want at least 129 for one sequence of length 128"
    ):
        pack_sequences(np.zeros(count, np.int32), 128)
    assert len(pack_sequences(np.zeros(129, np.int32), 128).starts) == 1


@pytest.mark.parametrize(
    "tokens, length, message",
    [
        (np.arange(9), 0, "`length` is 0, want at least 1"),
        (np.zeros([3, 3], np.int32), 2, r"`tokens` has shape \(3, 3\) and dtype int32, want a vector"),
        (np.zeros(9), 2, r"`tokens` has shape \(9,\) and dtype float64, want a vector of integers"),
        (np.array([1, -1, 2]), 2, "`tokens` has ids from -1 to 2"),
        (np.array([1, 2**31, 2]), 2, "`tokens` has ids from 1 to 2147483648"),
    ],
)
def test_bad_streams(tokens, length, message):
    with pytest.raises(ValueError, match=f"pack_sequences: {message}"):
        pack_sequences(tokens, length)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 2**32))
def test_documents_stay_apart_and_lose_nothing(sizes, length, seed):
    stream = stream_of(sizes)
    assume(max(sizes) > 1)
    learned = np.random.default_rng(seed).random(sum(sizes)) < 0.5
    packed = pack_documents(stream, length, learned=learned)
    assert packed.tokens.shape == packed.segments.shape == (len(packed.weights), length + 1)
    assert packed.weights.shape[1] == length and packed.weights.dtype == np.float32
    # Each pair of neighbours within a document is one (input, target) of one segment, and there is no other.
    inside = (packed.segments[:, :-1] == packed.segments[:, 1:]) & (packed.segments[:, 1:] > 0)
    pairs = list(zip(packed.tokens[:, :-1][inside].tolist(), packed.tokens[:, 1:][inside].tolist(), strict=True))
    firsts = [i for a, b in zip(stream.starts[:-1], stream.starts[1:], strict=True) for i in range(a, b - 1)]
    assert sorted(pairs) == [(i, i + 1) for i in firsts]
    assert (packed.weights[~inside] == 0).all()
    assert sorted(packed.tokens[:, 1:][packed.weights == 1].tolist()) == [i + 1 for i in firsts if learned[i + 1]]
    document_of = np.searchsorted(stream.starts, packed.tokens, side="right")
    for row, segments in enumerate(packed.segments):
        count = (segments > 0).sum()
        assert count and (segments[:count] > 0).all()  # filled from the left
        assert segments[0] == 1 and set(np.diff(segments[:count])) <= {0, 1}
        for segment in range(1, segments[:count].max() + 1):
            here = segments == segment
            assert here.sum() > 1 and len(set(document_of[row, here])) == 1
    assert packed.tokens.dtype == packed.segments.dtype == np.int32 and (packed.tokens[packed.segments == 0] == 0).all()


def test_first_fit_fills_the_first_row_with_room():
    packed = pack_documents(stream_of([4, 4, 2, 3, 6]), 5)
    assert packed.segments.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6]
    assert packed.tokens[:, 4].tolist() == [8, 0, 0, 17]
    assert packed.weights.tolist() == [[1, 1, 1, 0, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5]


def test_long_document_is_cut_into_segments():
    packed = pack_documents(stream_of([6]), 4)
    assert packed.tokens.tolist() == [[0, 1, 2, 3, 4], [4, 5, 0, 0, 0]]
    assert packed.weights.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_documents_refuse():
    with pytest.raises(ValueError, match="pack_documents: `length` is 0"):
        pack_documents(stream_of([3]), 0)
    with pytest.raises(ValueError, match="pack_documents: empty corpus: no document with at least two"):
        pack_documents(stream_of([1, 0, 1]), 4)
    with pytest.raises(ValueError, match=r"pack_documents: `learned` has shape \(2,\), want \(3,\) as the stream \[N\]"):
        pack_documents(stream_of([3]), 2, learned=np.ones(2, bool))


def test_held_out_documents_are_counted_once():
    packed = pack_documents(stream_of([5, 5, 5]), 4)
    batches = list(heldout_batches(packed, 2))
    assert [batch.tokens.shape for batch in batches] == [(2, 5)] * 2
    assert sum(batch.weights.sum() for batch in batches) == 12 and (batches[1].weights[1] == 0).all()


@given(st.integers(1, 25), st.integers(1, 9), st.integers(-(2**65), 2**65), st.integers(0, 4))
def test_every_epoch_is_a_permutation(rows, batch_size, seed, epoch):
    plan = BatchPlan(rows, batch_size, seed)
    steps = -(-rows * (epoch + 1) // batch_size)
    order = np.concatenate([batch_rows(plan, step) for step in range(steps)])
    for first in range(0, rows * (epoch + 1), rows):
        assert sorted(order[first : first + rows].tolist()) == list(range(rows))


@given(st.integers(1, 25), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_a_large_batch_is_small_batches_in_a_row(rows, batch_size, parts, step, seed):
    whole = batch_rows(BatchPlan(rows, batch_size * parts, seed), step)
    small = [batch_rows(BatchPlan(rows, batch_size, seed), step * parts + part) for part in range(parts)]
    np.testing.assert_array_equal(whole, np.concatenate(small))


def test_epochs_and_seeds_have_orders_of_their_own():
    plans = [BatchPlan(50, 50, seed) for seed in (-1, 0, 1, 2)]
    orders = {tuple(batch_rows(plan, step).tolist()) for plan in plans for step in range(5)}
    assert len(orders) == 20
    firsts = np.array([batch_rows(BatchPlan(10, 10, 0), step)[0] for step in range(4000)])
    counts = np.bincount(firsts, minlength=10)  # each row is first in a tenth of the epochs: 400 +- 19
    assert counts.min() > 300 and counts.max() < 500


def test_the_order_never_changes():
    assert batch_rows(BatchPlan(10, 10, 0), 0).tolist() == [4, 8, 0, 1, 7, 6, 2, 5, 3, 9]
    assert batch_rows(BatchPlan(10, 4, 7), 123_456_789).tolist() == [8, 2, 3, 6]


def test_batch_at_gives_rows_of_either_kind():
    rows = batch_rows(BatchPlan(4, 3, 5), 6)
    packed = pack_sequences(np.arange(13), 3)
    batch = batch_at(packed, 6, 3, seed=5)
    assert batch.tokens.tolist() == [[3 * r, 3 * r + 1, 3 * r + 2, 3 * r + 3] for r in rows]
    documents = pack_documents(stream_of([5, 5, 5, 5]), 4)
    batch = batch_at(documents, 6, 3, seed=5)
    assert isinstance(batch, PackedDocuments)
    for got, field in zip(batch, documents, strict=True):
        np.testing.assert_array_equal(got, field[rows])


def test_a_batch_is_a_copy():
    packed = pack_sequences(np.arange(13), 3)
    batch_at(packed, 0, 4).tokens[:] = -1
    batch_rows(BatchPlan(4, 4), 0)[:] = -1
    assert sorted(batch_at(packed, 0, 4).tokens[:, 0].tolist()) == [0, 3, 6, 9]


@pytest.mark.parametrize(
    "plan, step, message",
    [
        (BatchPlan(4, 2), -1, "`step` is -1, want at least 0"),
        (BatchPlan(4, 0), 0, "`batch_size` is 0, want at least 1"),
        (BatchPlan(0, 2), 0, "`rows` is 0, want at least 1"),
    ],
)
def test_bad_plans(plan, step, message):
    with pytest.raises(ValueError, match=f"batch_rows: {message}"):
        batch_rows(plan, step)


@given(st.integers(2, 60), st.integers(1, 10), st.integers(1, 5))
def test_heldout_batches_count_every_target_once(count, length, batch_size):
    assume(count > length)
    batches = list(heldout_batches(pack_sequences(np.arange(count), length), batch_size))
    assert {batch.tokens.shape for batch in batches} == {(batch_size, length + 1)}
    targets = [batch.tokens[:, 1:][batch.weights == 1].tolist() for batch in batches]
    assert sum(targets, []) == list(range(1, count))


def test_heldout_batches_refuse_at_once():
    with pytest.raises(ValueError, match="heldout_batches: `batch_size` is 0"):
        heldout_batches(pack_sequences(np.arange(9), 3), 0)
