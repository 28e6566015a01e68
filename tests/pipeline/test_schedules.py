"""Generators: every table is valid; bubble and activations are those of the formulas, on both sides of conditions."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3.pipeline import SCHEDULES, Times, dualpipe, dualpipe_v, expected, schedule_check, schedule_grid, simulate
from dsv3.pipeline.schedules import gpipe, interleaved, one_f_one_b, zb1p
from tests.pipeline.sizes import schedules

WHOLE = st.integers(1, 8)  # times: sums of whole numbers are exact, so formulas are compared with ==


def formula(schedule, times):
    chunks = schedule.stages // schedule.ranks if schedule.name == "interleaved" else 2
    return expected(schedule.name, schedule.ranks, schedule.micro_batches, times, chunks=chunks)


@settings(max_examples=120)
@given(schedules())
def test_tables_are_valid_and_hold_what_the_formula_says(schedule):
    want = formula(schedule, Times(1, 2, 1))
    schedule_check(schedule, max_activations=want.activations)
    assert simulate(schedule, Times(1, 2, 1)).peak_activations.max() == want.activations
    assert {len(schedule.rank_stages(rank)) for rank in range(schedule.ranks)} == {want.stages_per_rank}
    assert schedule.copies == want.copies


@settings(max_examples=120)
@given(schedules(("gpipe", "one_f_one_b", "interleaved")), WHOLE, WHOLE)
def test_one_way_bubbles(schedule, f, b):
    want = (schedule.ranks - 1) * (f + b)
    found, stated = simulate(schedule, Times(f, b, 0)), formula(schedule, Times(f, b, 0))
    assert set(found.idle) == {want} and stated.bubble == stated.exact == want


@settings(max_examples=150)
@given(schedules(("zb1p",)), WHOLE, WHOLE, WHOLE)
def test_zb1p_bubble(schedule, f, i, w):
    times, n = Times(f, i + w, w), schedule.ranks - 1
    found, stated = simulate(schedule, times).bubble, formula(schedule, times)
    assert stated.bubble == n * (f + (i + w) - 2 * w)
    if schedule.micro_batches < schedule.ranks:
        assert stated.exact is None
        return
    assert found == stated.exact == stated.bubble + n * max(0, w - min(f, i))
    assert (found == stated.bubble) == (n == 0 or w <= min(f, i))


def test_zb1p_with_few_micro_batches_has_a_larger_bubble():
    assert simulate(zb1p(4, 3), Times(1, 2, 1)).bubble == 4 > formula(zb1p(4, 3), Times(1, 2, 1)).bubble == 3


@settings(max_examples=250)
@given(schedules(("dualpipe", "dualpipe_v"), most_ranks=10), WHOLE, WHOLE, WHOLE, st.integers(0, 8))
def test_dualpipe_bubble(schedule, f, i, w, hidden):
    b = i + w
    pair = f + b - min(hidden, f, b)
    times, n = Times(f, b, w, pair), schedule.stages // 2 - 1
    found, stated = simulate(schedule, times), formula(schedule, times)
    assert stated.bubble == n * (pair + b - 3 * w)
    assert found.bubble == stated.exact
    # Ranks nearer to the ends have fewer pairs: they do more of the same work one after the other, and are less idle.
    depths = [min(rank, schedule.stages - 1 - rank) for rank in range(schedule.ranks)]
    assert found.idle.tolist() == [stated.exact - max(0, n - 1 - depth) * (f + b - pair) for depth in depths]
    if w <= i:  # the published formula's error, as the docstring of `formulas` says it
        assert stated.exact - stated.bubble == (n * (f - i) if i <= f else -min(n * (i - f), f))


@settings(max_examples=60)
@given(schedules(("dualpipe", "dualpipe_v"), most_ranks=10), WHOLE, st.integers(0, 8), st.integers(0, 8))
def test_published_dualpipe_bubble_for_equal_forward_and_input_times(schedule, f, w, hidden):
    w = min(w, f)
    times = Times(f, f + w, w, 2 * f + w - min(hidden, f))
    stated = formula(schedule, times)
    assert simulate(schedule, times).bubble == stated.bubble == stated.exact


def test_example_of_a_published_bubble_that_the_table_does_not_have():
    times = Times(1, 2.5, 1)
    assert simulate(dualpipe(8, 20), times).bubble == 8 and formula(dualpipe(8, 20), times).bubble == 9


def test_exact_bubble_is_not_stated_outside_its_conditions():
    for times in (Times(1, 2, 1, 3.5), Times(1, 2, 1, 1.5), Times(1, 2, 1, send=0.1)):
        stated, found = formula(dualpipe(8, 20), times), simulate(dualpipe(8, 20), times).bubble
        assert stated.exact is None
        n, f, i, w, pair = 3, 1, 1, 1, 3 if times.overlapped is None else times.overlapped
        assert found != n * (pair - w - min(w, i)) + max(n * f, n * i - f), "so the condition is needed"


@settings(max_examples=40)
@given(schedules(("dualpipe",), most_ranks=8))
def test_dualpipe_is_symmetric_and_its_half_is_dualpipe_v(schedule):
    each, half = schedule.micro_batches // 2, schedule.ranks // 2
    folded = dualpipe_v(half, each)
    for rank in range(half):
        mirrored = [
            tuple(t._replace(micro_batch=(t.micro_batch + each) % (2 * each), direction=1 - t.direction) for t in slot)
            for slot in schedule.rows[schedule.ranks - 1 - rank]
        ]
        assert list(schedule.rows[rank]) == mirrored
        # Both have the same kinds in the same lanes: direction 1 is the way up.
        lanes = [[(t.kind, t.direction, t.micro_batch % each) for t in slot] for slot in schedule.rows[rank]]
        assert lanes == [[(t.kind, int(t.stage >= half), t.micro_batch) for t in slot] for slot in folded.rows[rank]]


# Rows of the published picture (figure 5), read off it: "." is an idle step, direction 1 has no numbers there.
PICTURE = {
    0: "F0 F1 F2 F3 F4 F5 F6 f i w f i w f i w f F7 &b - . . . f &B0 - F8 &b - f &B1 - F9 &b - f &B2 - b - . f &B3 - b - . "
    "f &B4 - b - . f &B5 - b - I6 W6 I7 W7 I8 W8 I9 W9",
    1: ". F0 F1 F2 F3 F4 f F5 f i w f i w f F6 &b - . . f &B0 - F7 &b - f &B1 - F8 &b - f &B2 - F9 &b - f &B3 - b - . "
    "f &B4 - b - . f &B5 - b - B6 - . i I7 w I8 W7 I9 W8 W9",
    3: ". . . F0 f F1 f F2 f F3 f F4 b - f &B0 - F5 &b - f &B1 - F6 &b - f &B2 - F7 &b - f &B3 - F8 &b - f &B4 - F9 &b - "
    "f &B5 - b - B6 - . b - B7 - . i I8 . i I9 w W8 w W9",
    7: "f f f f f f f F0 I0 W0 F1 I1 W1 F2 I2 W2 F3 f &B3 - . . . F4 &b - f &B4 - F5 &b - f &B5 - F6 &b - B6 - . F7 &b - "
    "B7 - . F8 &b - B8 - . F9 &b - B9 - i w i w i w i w",
}


def test_published_example():
    grid = schedule_grid(dualpipe(8, 20))
    assert len(grid[0]) == 66
    for rank, want in PICTURE.items():
        got = [re.sub(r"([a-z])\d+", r"\1", cell) or "." for cell in grid[rank]]
        assert got == want.split(), f"rank {rank}"


def test_printed_table():
    assert str(one_f_one_b(2, 2)).splitlines() == [
        "one_f_one_b: 2 ranks, 2 stages, 2 micro-batches; unit times",
        "0 | F0 F1 .  .  B0 -  .  B1 -",
        "1 | .  F0 B0 -  F1 B1 -  .  .",
        "F forward, B backward, I backward for the input, W for the weights, F &B overlapped, . idle",
    ]
    assert "small letters: not the rank's first stage" in str(dualpipe_v(1, 2))
    assert repr(gpipe(2, 3)) == "Schedule(gpipe, ranks=2, stages=2, micro_batches=3)"


BAD = [
    (dualpipe, (3, 12), {}, "dualpipe: `ranks` is 3, want an even number"),
    (dualpipe, (4, 6), {}, "dualpipe: `micro_batches` is 6, want an integer of at least 8"),
    (dualpipe, (4, 9), {}, "dualpipe: `micro_batches` is 9, want an even number"),
    (dualpipe_v, (4, 7), {}, "dualpipe_v: `micro_batches` is 7, want an integer of at least 8"),
    (interleaved, (4, 6), {}, "interleaved: `micro_batches` is 6, want a multiple of `ranks`, which is 4"),
    (interleaved, (4, 8), {"chunks": 1}, "interleaved: `chunks` is 1, want an integer of at least 2"),
    (zb1p, (0, 8), {}, "zb1p: `ranks` is 0, want an integer of at least 1"),
    (gpipe, (2, 2.0), {}, "gpipe: `micro_batches` is 2.0, want an integer of at least 1"),
    (one_f_one_b, (True, 2), {}, "one_f_one_b: `ranks` is True, want an integer of at least 1"),
    (expected, ("pipedream", 2, 2, Times(1, 2, 1)), {}, "expected: `name` is 'pipedream', want one of 'gpipe'"),
    (expected, ("zb1p", 2, 2, Times([1, 1], 2, 1)), {}, "expected: `times.forward` has shape (2,), want one number"),
]


@pytest.mark.parametrize(("fn", "sizes", "more", "message"), BAD, ids=range(len(BAD)))
def test_bad_sizes_are_one_line(fn, sizes, more, message):
    with pytest.raises(ValueError) as caught:
        fn(*sizes, **more)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 4))
def test_interleaved_shrinks_the_bubble_by_its_chunks(ranks, groups, chunks):
    assume(ranks * groups * chunks < 60)
    plain = simulate(one_f_one_b(ranks, ranks * groups), Times(chunks, 2 * chunks, 0))
    shorter = simulate(interleaved(ranks, ranks * groups, chunks=chunks), Times(1, 2, 0))
    assert shorter.bubble * chunks == plain.bubble and shorter.busy.tolist() == plain.busy.tolist()


def test_registry_takes_the_common_sizes():
    for name, make in SCHEDULES.items():
        assert make(4, 8).name == name
