"""Pieces: the published order, every piece once, what a pair hides, and both simulators beside each other."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.pipeline import (
    PieceTimes,
    Schedule,
    Task,
    Times,
    chunk_times,
    dualpipe,
    expand_pieces,
    one_f_one_b,
    piece_needs,
    simulate,
    simulate_pieces,
    zb1p,
)
from dsv3.pipeline.pieces import COMMUNICATION, COMPUTE, slot_pieces
from tests.pipeline.sizes import schedules

PAIR = (Task("F", 0, 0), Task("B", 1, 1))
EVEN = PieceTimes(1, 1, 1, 1)


def short(pieces, resource=None):
    """Pieces as "part kind layer", of one resource or of both."""
    return [f"{p.part} {p.kind}{p.layer}" for p in pieces if resource in (None, p.resource)]


def turned(items, first):
    """A cycle that begins with `first`."""
    at = items.index(first)
    return items[at:] + items[:at]


def test_pair_has_the_order_of_figure_4():
    """The figure shows a round: computation from MLP(B) to ATTN(F), communication from DISPATCH(F) to COMBINE(B)."""
    pieces = slot_pieces(PAIR, 1)
    computation = ["experts I0", "experts W0", "experts F0", "attention I0", "attention W0", "attention F0"]
    assert turned(short(pieces, COMPUTE), "experts I0") == computation
    communication = ["dispatch F0", "dispatch I0", "combine F0", "combine I0"]
    assert turned(short(pieces, COMMUNICATION), "dispatch F0") == communication


def test_layers_of_a_pair_go_in_opposite_order():
    pieces = slot_pieces(PAIR, 3)
    assert [p.layer for p in pieces if (p.kind, p.part) == ("F", "experts")] == [0, 1, 2]
    assert [p.layer for p in pieces if (p.kind, p.part) == ("I", "experts")] == [2, 1, 0]


def test_tasks_alone():
    assert short(slot_pieces((PAIR[0],), 1)) == ["attention F0", "dispatch F0", "experts F0", "combine F0"]
    whole = ["combine I0", "experts I0", "dispatch I0", "experts W0", "attention I0", "attention W0"]
    assert short(slot_pieces((PAIR[1],), 1)) == whole
    assert short(slot_pieces((Task("I", 0, 0),), 1)) == [name for name in whole if "W" not in name]
    assert short(slot_pieces((Task("W", 0, 0),), 1)) == [name for name in whole if "W" in name]


@settings(max_examples=50)
@given(schedules(most_ranks=4, most_extra=4), st.integers(1, 3))
def test_every_piece_is_there_once_after_all_that_it_needs(schedule, layers):
    table = expand_pieces(schedule, layers=layers)
    counts = Counter(piece._replace(entry=-1) for row in table.rows for piece in row)
    assert set(counts.values()) == {1}
    assert len(counts) == schedule.stages * schedule.micro_batches * layers * (4 + 4 + 2)
    needs = {piece: piece_needs(piece, schedule.stages, layers) for piece in counts}
    assert all(need in counts for all_needs in needs.values() for need in all_needs)
    # A rank's own pieces come in an order in which it can start them, the entries one after the other.
    for row in table.rows:
        place = {piece._replace(entry=-1): i for i, piece in enumerate(row)}
        assert all(place[need] < i for piece, i in place.items() for need in needs[piece] if need in place)
        assert [piece.entry for piece in row] == sorted(piece.entry for piece in row)


def test_needs_across_stages():
    table = expand_pieces(one_f_one_b(2, 1), layers=2)
    first, last = table.rows[1][0], table.rows[0][-2]
    assert short([first]) == ["attention F0"] and short([last]) == ["attention I0"]
    assert short(piece_needs(first, 2, 2)) == ["combine F1"] and piece_needs(first, 2, 2)[0].stage == 0
    back = next(piece for piece in table.rows[0] if short([piece]) == ["combine I1"])
    assert sorted((p.stage, *short([p])) for p in piece_needs(back, 2, 2)) == [(0, "combine F1"), (1, "attention I0")]


def test_pair_hides_its_communication():
    """Four pieces each of length 1, backwards six: computation takes 6, and all communication fits beside it."""
    assert chunk_times(EVEN) == Times(4.0, 6.0, 2.0, 6.0)
    assert chunk_times(EVEN, layers=3) == Times(12.0, 18.0, 6.0, 18.0)
    # Twice as slow, communication is the bound: 8, and attention's piece before the first dispatch.
    slow = chunk_times(PieceTimes(1, 2, 1, 2))
    assert slow.forward == 6 and 8 <= slow.overlapped < slow.forward + slow.backward


def test_one_rank_by_hand():
    """A forward, a pair, a backward: only the first dispatch and the pair's first combine have nothing beside them."""
    rows = (((Task("F", 0, 0, 0),), (Task("F", 0, 1, 1), Task("B", 0, 0, 0)), (Task("B", 0, 1, 1),)),)
    table = expand_pieces(Schedule("made up", 1, 1, 2, rows, ((0,), (0,))))
    found = simulate_pieces(table, EVEN)
    start = {(piece.micro_batch, *short([piece])): begin for piece, begin in zip(table.rows[0], found.start[0].tolist())}
    assert [start[0, f"{part} F0"] for part in ("attention", "dispatch", "experts", "combine")] == [0, 1, 2, 3]
    assert [start[1, f"{part} F0"] for part in ("attention", "dispatch", "experts", "combine")] == [3, 5, 7, 8]
    back = ["combine I0", "experts I0", "dispatch I0", "experts W0", "attention I0", "attention W0"]
    assert [start[0, name] for name in back] == [4, 5, 6, 6, 8, 9]
    assert [start[1, name] for name in back] == [9, 10, 11, 11, 12, 13]
    assert found.makespan == 14 and (found.compute, found.communication, found.exposed) == ([12], [8], [2])
    assert found.hidden_fraction == 0.75


@settings(max_examples=50)
@given(schedules(most_ranks=4, most_extra=4), st.integers(1, 3), st.tuples(*[st.integers(0, 4)] * 4), st.integers(0, 3))
def test_pieces_are_never_slower_than_whole_tasks(schedule, layers, parts, send):
    times = PieceTimes(*parts, send=send)
    found = simulate_pieces(expand_pieces(schedule, layers=layers), times)
    assert found.makespan <= simulate(schedule, chunk_times(times, layers=layers)).makespan
    attention, dispatch, experts, combine = parts
    tasks = schedule.micro_batches * layers * schedule.stages
    assert found.compute.sum() == tasks * 3 * (attention + experts)
    assert found.communication.sum() == tasks * 2 * (dispatch + combine)
    assert (found.exposed >= 0).all() and (found.exposed <= found.communication).all()


@settings(max_examples=30)
@given(schedules(most_ranks=3, most_extra=3), st.tuples(*[st.integers(0, 3)] * 4))
def test_exposed_communication_by_counting_steps(schedule, parts):
    """Times are whole numbers, so what runs in each step can be counted."""
    table = expand_pieces(schedule)
    found = simulate_pieces(table, PieceTimes(*parts))
    for rank, row in enumerate(table.rows):
        running = {resource: set() for resource in (COMPUTE, COMMUNICATION)}
        for piece, start, end in zip(row, found.start[rank], found.end[rank]):
            steps = set(range(int(start), int(end)))
            assert not steps & running[piece.resource], "two pieces at once"
            running[piece.resource] |= steps
        assert found.exposed[rank] == len(running[COMMUNICATION] - running[COMPUTE])
        assert found.compute[rank] == len(running[COMPUTE])


def test_nothing_is_hidden_without_a_partner():
    """One micro-batch, backwards split: each piece waits for the one before it."""
    found = simulate_pieces(expand_pieces(zb1p(2, 1)), EVEN)
    np.testing.assert_array_equal(found.exposed, found.communication)
    assert found.hidden_fraction == 0.0
    assert simulate_pieces(expand_pieces(zb1p(2, 1)), PieceTimes(1, 0, 1, 0)).hidden_fraction == 1.0


def test_overlapped_pairs_hide_more_than_1f1b():
    hidden = {
        schedule.name: simulate_pieces(expand_pieces(schedule), EVEN).hidden_fraction
        for schedule in (one_f_one_b(8, 40), dualpipe(8, 40))
    }
    assert hidden["dualpipe"] > 2 * hidden["one_f_one_b"], hidden


def test_times_by_stage_and_defaults():
    times = chunk_times(PieceTimes([1, 2], 1, [1, 0], 1))
    assert times.forward.tolist() == [4, 4] and times.overlapped.shape == (2, 2)
    assert simulate(dualpipe(2, 4), times).makespan > 0
    # The gradient of a dispatch takes as long as a combine, and the reverse.
    assert chunk_times(PieceTimes(0, 3, 0, 5)).backward == 8
    assert chunk_times(PieceTimes(0, 3, 0, 5, dispatch_back=1, combine_back=1)).backward == 2
    assert chunk_times(PieceTimes(1, 0, 1, 0, 2, 3, 4, 5)).backward == 2 + 3 + 4 + 5


WRONG = [
    (lambda: expand_pieces(zb1p(2, 2), layers=0), "expand_pieces: `layers` is 0, want an integer of at least 1"),
    (
        lambda: chunk_times(PieceTimes([1, 1], [1, 1, 1], 1, 1)),
        "chunk_times: `times` has values for [2, 3] stages, want one",
    ),
    (lambda: chunk_times(PieceTimes(1, -1, 1, 1)), "chunk_times: `times.dispatch` holds -1.0, want finite numbers"),
    (
        lambda: simulate_pieces(expand_pieces(zb1p(2, 2)), PieceTimes(1, 1, [1] * 3, 1)),
        "simulate_pieces: `times.experts` has shape (3,), want () or (2,) [stage]",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_are_one_line(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
