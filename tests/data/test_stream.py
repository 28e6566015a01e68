"""The input stream: every token once an epoch, the same rows for any hosts, and exactly so after a resume."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import source_of, stream_of, windows_of

from dsv3.data import (
    check_mixture,
    host_rows,
    input_init,
    input_state,
    make_mixture,
    next_rows,
    open_shards,
    read_rows,
    shards,
    stream,
    write_manifest,
    write_shard,
)
from dsv3.data.manifest import Manifest
from dsv3.data.mixture import source_rows
from dsv3.data.shuffle import permute
from dsv3.data.tokenizer import SpecialIds

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=14)


def draw(sources, mixture, shapes, state=None):
    """Rows and states of steps: [(plan, batch, state after it)]."""
    state, steps = state or input_init(mixture), []
    for batch_size, seq_len in shapes:
        plan, state = next_rows(mixture, state, batch_size, seq_len)
        steps.append((plan, read_rows(sources, mixture, plan), state))
    return steps


def resumed(state, mixture):
    """The state as a checkpoint gives it back."""
    return input_state(json.loads(json.dumps(state._asdict())), mixture)


# One source: the order of its tokens


@settings(max_examples=150)
@given(SIZES, st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 60), st.integers(-3, 3))
def test_every_token_of_an_epoch_is_a_target_once_before_any_is_repeated(sizes, window, seq_len, rows, group, seed):
    total = sum(sizes)
    sources = {"a": source_of("a", sizes, window)}
    mixture = make_mixture(sources, seed=seed, group_tokens=group)
    steps = -(-3 * total // (rows * seq_len))
    want = np.array(stream_of("a", sizes, window, seed, 4 + (rows * seq_len + group) // total))
    targets, positions = [], []
    for plan, batch, _ in draw(sources, mixture, [(rows, seq_len)] * steps):
        assert batch.tokens.shape == (rows, seq_len + 1) and batch.tokens.dtype == np.int32
        assert batch.weights.shape == (rows, seq_len) and batch.weights.dtype == np.float32 and (batch.weights == 1).all()
        targets += batch.tokens[:, 1:].ravel().tolist()
        positions += plan.position.tolist()
        places = plan.position[:, None] + np.arange(seq_len + 1)  # the stream's list begins at place -1
        np.testing.assert_array_equal(batch.tokens, want[places])
    for epoch in range(3):
        assert sorted(targets[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert len(set(positions)) == len(positions)


@given(SIZES, st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_keeps_documents_whole_and_windows_together(sizes, window, seed):
    tokens = stream_of("a", sizes, window, seed, 1)[1:]
    windows = windows_of(sizes, window)
    documents = {document[0]: document for w in windows for document in w}
    at, order = 0, []
    while at < len(tokens):
        document = documents[tokens[at]]
        assert tokens[at : at + len(document)] == document
        order.append(next(i for i, w in enumerate(windows) if document in w))
        at += len(document)
    runs = [w for i, w in enumerate(order) if i == 0 or order[i - 1] != w]
    assert sorted(runs) == list(range(len(windows)))


def test_orders_differ_between_epochs_seeds_and_names():
    sizes = [3] * 40
    orders = [tuple(stream_of(n, sizes, 30, seed, 3)[1 + e * 120 : 121 + e * 120]) for n, seed, e in (
        ("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("a", 1, 0), ("b", 0, 0),
    )]  # fmt: skip
    assert len(set(orders)) == 5


def test_rows_are_shuffled_within_groups():
    sources = {"a": source_of("a", [100] * 100, 1000)}
    mixture = make_mixture(sources, group_tokens=2000)
    positions = np.concatenate([plan.position for plan, *_ in draw(sources, mixture, [(10, 20)] * 50)])
    groups = positions.reshape(5, 100)
    for i, group in enumerate(groups):
        assert sorted(group) == list(range(2000 * i, 2000 * (i + 1), 20))
        assert (np.abs(np.diff(group)) == 20).mean() < 0.1  # neighbours of the stream are seldom drawn together
    assert len({tuple(group - group.min()) for group in groups}) == 5


def test_the_order_never_changes():
    sources = {"a": source_of("a", [3, 5, 2, 4, 6], 6), "b": source_of("b", [7, 7], 7)}
    mixture = make_mixture(sources, weights={"a": 1, "b": 1}, seed=3, group_tokens=8)
    steps = draw(sources, mixture, [(4, 4)] * 3)
    assert [plan.source.tolist() for plan, *_ in steps] == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert [plan.position.tolist() for plan, *_ in steps] == [[0, 0, 4, 4], [8, 8, 12, 12], [16, 20, 16, 20]]
    assert steps[0][1].tokens.tolist() == [[6, 0, 1, 2, 3], [2, 0, 1, 2, 3], [3, 4, 5, 6, 7], [3, 4, 5, 6, 7]]
    assert steps[2][1].tokens.tolist() == [[15, 16, 17, 18, 19], [12, 13, 0, 1, 2], [8, 9, 10, 11, 12], [19, 8, 9, 10, 11]]


# Several sources, hosts and resumes

SOURCES = st.lists(st.tuples(SIZES, st.integers(1, 5)), min_size=1, max_size=4)


def several(drawn, window, seed, group, **limits):
    sources = {f"s{i}": source_of(f"s{i}", sizes, window) for i, (sizes, _) in enumerate(drawn)}
    weights = {f"s{i}": weight for i, (_, weight) in enumerate(drawn)}
    return sources, make_mixture(sources, weights=weights, seed=seed, group_tokens=group, **limits)


SHAPES = st.lists(st.tuples(st.sampled_from([12, 24]), st.sampled_from([1, 2, 3, 8])), min_size=2, max_size=6)


@settings(max_examples=60)
@given(SOURCES, st.integers(1, 30), st.integers(0, 3), st.integers(1, 40), SHAPES, st.integers(0, 5))
def test_any_hosts_and_any_resume_give_the_same_rows(drawn, window, seed, group, shapes, cut):
    sources, mixture = several(drawn, window, seed, group)
    want = draw(sources, mixture, shapes)
    cut = min(cut, len(shapes) - 1)
    state = input_init(mixture) if cut == 0 else resumed(want[cut - 1][2], mixture)
    fresh, _ = several(drawn, window, seed, group)
    for (batch_size, seq_len), (_, whole, after) in zip(shapes[cut:], want[cut:], strict=True):
        plan, state = next_rows(mixture, state, batch_size, seq_len)
        assert state == after
        for hosts in (1, 2, 3, 4):
            parts = [read_rows(fresh, mixture, plan, host_rows(batch_size, host, hosts)) for host in range(hosts)]
            assert {len(part.tokens) for part in parts} == {batch_size // hosts}
            np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)


@settings(max_examples=100)
@given(SOURCES, st.integers(1, 30), st.integers(1, 40), SHAPES)
def test_changing_shapes_repeat_nothing_and_count_what_is_left_out(drawn, window, group, shapes):
    sources, mixture = several(drawn, window, 0, group)
    steps = draw(sources, mixture, shapes)
    state, given_out = steps[-1][2], 0
    for index, name in enumerate(mixture.names):
        places = [
            place + offset
            for plan, *_ in steps
            for place in plan.position[plan.source == index].tolist()
            for offset in range(plan.seq_len)
        ]
        assert len(set(places)) == len(places)
        assert max(places, default=0) < state.taken[index] + max(group, state.seq_len), name
        given_out += len(places)
    drawn_from = sum(state.taken) + sum(state.used) * state.seq_len
    assert given_out + state.left_out == drawn_from
    if len({seq_len for _, seq_len in shapes}) == 1:
        assert state.left_out == 0


def test_a_source_is_drawn_in_the_same_order_whatever_is_beside_it():
    alone = {"a": source_of("a", [5] * 30, 20)}
    beside = {"b": source_of("b", [4] * 30, 20), **alone}
    one = make_mixture(alone, group_tokens=40)
    two = make_mixture(beside, weights={"a": 1, "b": 2}, group_tokens=40)
    want = [p for plan, *_ in draw(alone, one, [(6, 5)] * 4) for p in plan.position.tolist()]
    got = [p for plan, *_ in draw(beside, two, [(6, 5)] * 12) for p in plan.position[plan.source == 1].tolist()]
    assert got == want


@settings(max_examples=150)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(1, 500), st.integers(0, 10**6), st.integers(0, 9))
def test_shares_are_within_one_row_in_every_step(weights, batch_size, step, seed):
    sources = {str(i): source_of(str(i), [2], 2) for i in range(len(weights))}
    if not sum(weights):
        return
    mixture = make_mixture(sources, weights={str(i): w for i, w in enumerate(weights)}, seed=seed)
    for s in (step, step + 1):
        rows = source_rows(mixture, s, batch_size)
        assert sum(rows) == batch_size and min(rows) >= 0
        for count, weight in zip(rows, mixture.weights, strict=True):
            assert abs(count - weight * batch_size) < 1
            assert weight or not count


def test_shares_stay_within_some_rows_over_many_steps():
    rng = np.random.default_rng(0)
    for batch_size in (1, 3, 8, 60):
        weights = rng.dirichlet(np.ones(4))
        sources = {str(i): source_of(str(i), [2], 2) for i in range(4)}
        mixture = make_mixture(sources, weights={str(i): w for i, w in enumerate(weights)})
        rows = np.cumsum([source_rows(mixture, step, batch_size) for step in range(3000)], axis=0)
        want = np.outer(np.arange(1, 3001) * batch_size, mixture.weights)
        # A random u would be off by 0.5 √3000 = 27 rows.
        assert np.abs(rows - want).max() < 5


def test_slots_of_the_sources_are_mixed():
    sources = {name: source_of(name, [50] * 10, 100) for name in "ab"}
    mixture = make_mixture(sources, weights={"a": 1, "b": 1})
    halves = [plan.source[:8].sum() for plan, *_ in draw(sources, mixture, [(16, 4)] * 50)]
    assert 3 < np.mean(halves) < 5 and len(set(halves)) > 3


# Weights, epochs and running dry


def test_weights_from_tokens_and_repeats():
    sources = {"a": source_of("a", [10] * 10, 20), "b": source_of("b", [10] * 30, 20)}
    assert make_mixture(sources).weights == (0.25, 0.75)
    assert make_mixture(sources, repeats={"a": 6}).weights == pytest.approx((2 / 3, 1 / 3))
    assert make_mixture(sources, weights={"b": 1, "a": 3}).weights == (0.75, 0.25)
    assert make_mixture(sources, weights={"a": 0, "b": 2}).weights == (0, 1)
    mixture = make_mixture(sources, repeats={"a": 6}, epochs={"a": 7})
    assert mixture.epochs == (7, None) and mixture.tokens == (100, 300)
    use = check_mixture(mixture, lambda tokens: (6, 5), 900)
    assert use.steps == 30 and use.left_out == 0 and sum(use.tokens.values()) == 900
    assert use.epochs == pytest.approx({"a": 6, "b": 1}, abs=0.2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": {"a": 1}}, r"`weights` has none for source \['b'\], want one for each; 0 leaves it out"),
        ({"weights": {"a": 1, "b": 1, "c": 1}}, "`weights` names source 'c', want one of a, b"),
        ({"weights": {"a": 0, "b": 0}}, "the weights of all sources sum to 0, want one above 0"),
        ({"repeats": {"a": 0, "b": 0}}, "the weights of all sources sum to 0"),
        ({"weights": {"a": -1, "b": 2}}, "`weights` of source 'a' is -1, want a number >= 0"),
        ({"repeats": {"a": float("nan")}}, "`repeats` of source 'a' is nan, want a number >= 0"),
        ({"epochs": {"a": 0}}, "`epochs` of source 'a' is 0, want a number > 0"),
        ({"epochs": {"x": 1}}, "`epochs` names source 'x', want one of a, b"),
        ({"weights": {"a": 1, "b": 1}, "repeats": {}}, "`weights` and `repeats` are both given"),
        ({"group_tokens": 0}, "`group_tokens` is 0, want at least 1"),
    ],
)
def test_bad_mixtures(arguments, message):
    sources = {name: source_of(name, [5], 5) for name in "ab"}
    with pytest.raises(ValueError, match=f"make_mixture: {message}"):
        make_mixture(sources, **arguments)
    with pytest.raises(ValueError, match="make_mixture: `sources` is empty"):
        make_mixture({})


@settings(max_examples=60)
@given(SOURCES, st.sampled_from([0.5, 1, 1.5, 2.3]), st.integers(1, 40), st.integers(1, 7), st.integers(1, 6))
def test_a_source_runs_dry_at_its_last_whole_row(drawn, epochs, group, batch_size, seq_len):
    sources, mixture = several(drawn, 10, 1, group, epochs={"s0": epochs})
    state, most = input_init(mixture), int(epochs * mixture.tokens[0])
    shape, taken, tokens = (batch_size, seq_len), 0, 0
    while True:
        wanted = source_rows(mixture, state.steps, batch_size)[0]
        if (taken + wanted) * seq_len > most:
            break
        plan, state = next_rows(mixture, state, *shape)
        if epochs == 1:  # of a part of an epoch any rows may be drawn first
            assert plan.position[plan.source == 0].max(initial=-seq_len) + seq_len <= most
        taken, tokens = taken + wanted, tokens + batch_size * seq_len
    assert check_mixture(mixture, lambda t: shape, tokens).tokens["s0"] == taken * seq_len
    with pytest.raises(ValueError, match=f"next_rows: source 's0' runs dry: it has .* {epochs:g} epochs .*; want more data"):
        next_rows(mixture, state, *shape)
    message = f"check_mixture: source 's0' runs dry: .* after {tokens:,} of {tokens + 1:,} tokens"
    with pytest.raises(ValueError, match=message):
        check_mixture(mixture, lambda t: shape, tokens + 1)


def test_bad_steps_and_hosts():
    sources = {"a": source_of("a", [5], 5)}
    mixture = make_mixture(sources)
    for sizes, message in (((0, 4), "`batch_size` is 0"), ((4, 0), "`seq_len` is 0")):
        with pytest.raises(ValueError, match=f"next_rows: {message}, want at least 1"):
            next_rows(mixture, input_init(mixture), *sizes)
    two = make_mixture({**sources, "b": source_of("b", [5], 5)})
    with pytest.raises(ValueError, match=r"next_rows: `state` has \(1, 1\) sources, want 2"):
        next_rows(two, input_init(mixture), 4, 4)
    _, state = next_rows(mixture, input_init(mixture), 3, 1)
    smaller = make_mixture(sources, group_tokens=2)
    with pytest.raises(ValueError, match="next_rows: `state` has drawn 3 rows from a group of 2: it is of another mixture"):
        next_rows(smaller, state, 3, 1)
    with pytest.raises(ValueError, match="host_rows: `batch_size` is 10, want a multiple of the 4 hosts"):
        host_rows(10, 0, 4)
    with pytest.raises(ValueError, match="host_rows: `host` is 4, want 0 to 3"):
        host_rows(8, 4, 4)


def test_other_data_than_the_mixtures():
    sources = {"a": source_of("a", [5], 5)}
    mixture = make_mixture(sources)
    plan, _ = next_rows(mixture, input_init(mixture), 2, 2)
    with pytest.raises(ValueError, match="read_rows: source 'a' has 6 tokens, want the mixture's 5: other data"):
        read_rows({"a": source_of("a", [6], 5)}, mixture, plan)
    with pytest.raises(ValueError, match="read_rows: `sources` has no source 'a'"):
        read_rows({"b": sources["a"]}, mixture, plan)


@pytest.mark.parametrize(
    "change",
    [
        *({"steps": -1}, {"steps": 1.0}, {"steps": None}, {"taken": [1]}, {"taken": 3}, {"used": [0, True]}),
        *({"used": [0, 1]}, {"more": 1}),
    ],
)
def test_states_that_are_none(change):
    mixture = make_mixture({name: source_of(name, [5], 5) for name in "ab"})
    fields = {**input_init(mixture)._asdict(), **change}
    with pytest.raises(ValueError, match="input_state: `fields` is .*, want those of an InputState, of 2 sources"):
        input_state(fields, mixture)


def test_a_state_is_small():
    mixture = make_mixture({name: source_of(name, [5], 5) for name in "abc"})
    late = input_init(mixture)._replace(steps=240_000, seq_len=131_072, taken=(4_930_000_000_000,) * 3, used=(3000,) * 3)
    assert len(json.dumps(late._asdict())) < 150
    assert resumed(late, mixture) == late


# What is read


def written(folder, sizes_by_shard, window_tokens):
    """The same documents as `source_of` for all shards together, on the disk."""
    first, entries = 0, []
    for number, sizes in enumerate(sizes_by_shard):
        documents = []
        for size in sizes:
            documents.append((np.arange(first, first + size), size, 0))
            first += size
        entries.append(
            write_shard(folder / "train" / "a", number, documents, vocab_size=70_000, window_tokens=window_tokens)
        )
    write_manifest(folder, Manifest("f" * 32, 70_000, SpecialIds(0, 1, 2), {}, {"a": {}}, {"train": {"a": entries}}))
    return open_shards(folder)


def test_files_give_the_rows_of_memory(tmp_path):
    sizes = [5, 9, 3, 30, 2, 2, 8]
    memory, files = {"a": source_of("a", sizes, 12)}, written(tmp_path, [sizes], 12)
    mixture = make_mixture(memory, seed=1, group_tokens=20)
    assert mixture == make_mixture(files, seed=1, group_tokens=20)
    for shapes in ([(4, 6)] * 9, [(2, 50)] * 3):
        for (_, want, _), (_, got, _) in zip(draw(memory, mixture, shapes), draw(files, mixture, shapes), strict=True):
            np.testing.assert_array_equal(got.tokens, want.tokens)


def test_shards_are_shuffled_as_one(tmp_path):
    files = written(tmp_path, [[10] * 20, [10] * 20, [10] * 20], 40)
    mixture = make_mixture(files, group_tokens=200)
    _, batch, _ = draw(files, mixture, [(20, 10)])[0]
    assert len({int(token) // 200 for token in batch.tokens.ravel()}) == 3
    targets = [t for _, batch, _ in draw(files, mixture, [(20, 10)] * 3) for t in batch.tokens[:, 1:].ravel().tolist()]
    assert sorted(targets) == list(range(600))


def test_a_resume_reads_only_what_its_rows_need(monkeypatch):
    reads = []

    def read_window(source, window):
        reads.append(window)
        return shards.read_window(source, window)

    monkeypatch.setattr(stream, "read_window", read_window)
    sources = {"a": source_of("a", [10] * 1000, 100)}  # 100 windows
    mixture = make_mixture(sources, group_tokens=200)
    state = input_init(mixture)._replace(steps=900, seq_len=10, taken=(53_600,), used=(0,))
    plan, state = next_rows(mixture, state, 20, 10)
    read_rows(sources, mixture, plan)
    assert len(reads) <= 4  # a group of two windows, and the token before it
    for _ in range(50):
        plan, state = next_rows(mixture, state, 20, 10)
        read_rows(sources, mixture, plan)
    assert len(reads) <= 4 + 50 * 2  # each window once
    assert sum(map(len, sources["a"].recent["windows"].values())) <= 200 + 2 * 100


def test_a_batch_is_a_copy():
    sources = {"a": source_of("a", [10] * 10, 100)}
    mixture = make_mixture(sources)
    plan, _ = next_rows(mixture, input_init(mixture), 5, 4)
    first = read_rows(sources, mixture, plan)
    kept = first.tokens.copy()
    first.tokens[:] = -1
    np.testing.assert_array_equal(read_rows(sources, mixture, plan).tokens, kept)
    assert sources["a"].memory.tokens.tolist() == list(range(100))


@pytest.mark.parametrize("sizes", [[1] * 300, [200, 100, 65], [3, 200, 1]])
def test_short_and_long_documents_are_shuffled_alike(sizes):
    starts = np.cumsum([0, *sizes])
    tokens = np.arange(starts[-1], dtype=np.uint16)
    got = stream.shuffle_documents(tokens, starts, key=5)
    want = np.concatenate([tokens[starts[d] : starts[d + 1]] for d in permute(len(sizes), 5)])
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.uint16
