"""The simulator: tiny cases by hand, a slow one of its own over random tables, times by stage, messages, activations."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.pipeline import Task, Times, dualpipe, gpipe, one_f_one_b, peak_activations, schedule_check, simulate, zb1p
from dsv3.pipeline.table import Schedule, execution_order
from tests.pipeline.sizes import ends_by_relaxation, schedules


def test_two_ranks_by_hand():
    """F 2, B 3, messages 1. Rank 0: F 0–2, 2–4; rank 1: F 3–5, B 5–8, F 8–10, B 10–13; rank 0: B 9–12, B 14–17."""
    found = simulate(one_f_one_b(2, 2), Times(2, 3, 1, send=1))
    assert found.start[0].tolist() == [0, 2, 9, 14] and found.end[0].tolist() == [2, 4, 12, 17]
    assert found.start[1].tolist() == [3, 5, 8, 10] and found.end[1].tolist() == [5, 8, 10, 13]
    assert found.makespan == 17 and found.busy.tolist() == [10, 10] and found.idle.tolist() == [7, 7]
    assert found.bubble == 7 and found.bubble_fraction == 7 / 17
    assert found.peak_activations.tolist() == [2, 1]


def test_overlapped_pair_by_hand():
    """One rank, two stages of one micro-batch each in its own direction: F0, then F1 over B0, then B1."""
    tasks = [(Task("F", 0, 0, 0),), (Task("F", 0, 1, 1), Task("B", 0, 0, 0)), (Task("B", 0, 1, 1),)]
    schedule = Schedule("made up", 1, 1, 2, (tuple(tasks),), ((0,), (0,)))
    schedule_check(schedule, max_activations=2)
    assert simulate(schedule, Times(2, 5, 1)).end[0].tolist() == [2, 9, 14]
    assert simulate(schedule, Times(2, 5, 1, overlapped=6)).end[0].tolist() == [2, 8, 13]
    split = (tasks[0], (tasks[1][0], Task("I", 0, 0, 0)), (Task("W", 0, 0, 0),), tasks[2])
    schedule = Schedule("made up", 1, 1, 2, (split,), ((0,), (0,)))
    schedule_check(schedule)
    assert simulate(schedule, Times(2, 5, 1, overlapped=6)).end[0].tolist() == [2, 7, 8, 13]


@settings(max_examples=80)
@given(schedules(most_ranks=4, most_extra=4), st.integers(0, 2**32 - 1), st.booleans(), st.integers(0, 5))
def test_equals_the_least_solution_of_its_inequalities(schedule, seed, overlapped, send):
    random = np.random.default_rng(seed)
    forward, inputs, weight = random.integers(0, 6, [3, schedule.stages])
    pair = random.integers(0, 9, [schedule.stages] * 2) if overlapped else np.add.outer(forward, inputs + weight)
    found = simulate(schedule, Times(forward, inputs + weight, weight, pair if overlapped else None, send))
    want = ends_by_relaxation(schedule, forward, inputs + weight, weight, pair, send)
    for rank in range(schedule.ranks):
        assert found.end[rank].tolist() == [want[rank, i] for i in range(len(schedule.rows[rank]))]
    assert found.makespan == max(want.values())
    np.testing.assert_array_equal(found.busy + found.idle, found.makespan)


def test_all_that_wait_for_one_result_go_on():
    for queues in (["a"], ["b"], ["c"]), (["b"], ["c"], ["a"]), (["b"], ["a"], ["c"]):
        order = execution_order(queues, lambda item: [] if item == "a" else ["a"], lambda item: [item])
        assert not order.stuck and sorted(order.steps) == [(0, 0), (1, 0), (2, 0)]
        assert order.steps[0] == (queues.index(["a"]), 0)
    assert execution_order([["b"], ["c"]], lambda item: ["a"], list).stuck == {0: (0, "a"), 1: (0, "a")}


def test_times_by_stage():
    """Stage 1 takes twice as long, so rank 1 is never idle between its first and its last entry."""
    found = simulate(one_f_one_b(2, 4), Times([1, 2], [2, 4], [1, 2]))
    assert found.busy.tolist() == [12, 24] and found.makespan == 1 + 24 + 2
    uniform = simulate(dualpipe(4, 8), Times(1, 2, 1))
    by_stage = simulate(dualpipe(4, 8), Times([1] * 4, [2] * 4, [1] * 4, np.full((4, 4), 3)))
    assert all(np.array_equal(a, b) for a, b in zip(uniform.end, by_stage.end))
    # An overlapped pair has its time by (stage of the forward, stage of the backward): both ways exist.
    pairs = np.full((4, 4), 3.0)
    pairs[3, 0] = 30
    assert simulate(dualpipe(4, 8), Times(1, 2, 1, pairs)).makespan > uniform.makespan
    schedule = dualpipe(4, 8)
    met = {(slot[0].stage, slot[1].stage) for row in schedule.rows for slot in row if len(slot) == 2}
    assert met == {(s, 3 - s) for s in range(4)}


def test_activations_by_size_and_where_the_peak_is():
    assert peak_activations(gpipe(3, 5)).tolist() == [5, 5, 5]
    assert peak_activations(one_f_one_b(4, 9)).tolist() == [4, 3, 2, 1]
    assert peak_activations(zb1p(4, 9)).tolist() == [4, 4, 4, 4]
    assert peak_activations(dualpipe(8, 20)).tolist() == [9] * 8
    assert peak_activations(one_f_one_b(4, 9), [1, 10, 100, 0.5]).tolist() == [4, 30, 200, 0.5]
    assert peak_activations(one_f_one_b(4, 9)).dtype.kind == "i"


WRONG = [
    (Times([1, 2, 3], 2, 1), "simulate: `times.forward` has shape (3,), want () or (2,) [stage]"),
    (Times(1, 2, 1, [3, 3]), "simulate: `times.overlapped` has shape (2,), want () or (2, 2) [stage, stage]"),
    (Times(1, [2, 2], [1, 3]), "simulate: `times.weight` is 3.0 in stage 1, want at most backward, 2.0"),
    (Times(-1, 2, 1), "simulate: `times.forward` holds -1.0, want finite numbers of at least 0"),
    (Times(1, float("nan"), 1), "simulate: `times.backward` holds nan, want finite numbers of at least 0"),
    (Times(1, 2, 1, send=-1), "simulate: `times.send` is -1, want a finite number of at least 0"),
]


@pytest.mark.parametrize(("times", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_times_are_one_line(times, message):
    with pytest.raises(ValueError) as caught:
        simulate(one_f_one_b(2, 2), times)
    assert str(caught.value) == message


def test_large_tables_are_quick(own_garbage):
    start = time.thread_time()  # other tests' threads may go on
    schedule = dualpipe(16, 120)
    found = simulate(schedule, Times(1, 2, 1))
    schedule_check(schedule, max_activations=17)
    assert found.bubble == 7 * 2
    assert time.thread_time() - start < 1.0  # measured: 0.15 s; a planner asks for many of them
