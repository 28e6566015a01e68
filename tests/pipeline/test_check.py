"""The validator passes what can be carried out and names the first fault of what cannot."""

import dataclasses

import pytest

from dsv3.pipeline import Task, Times, dualpipe, one_f_one_b, schedule_check, simulate, zb1p
from dsv3.pipeline.table import Schedule


def change(schedule, rank, edit):
    """A copy whose row of `rank` is what `edit` makes of a list of its entries."""
    rows = list(schedule.rows)
    row = list(rows[rank])
    rows[rank] = tuple(edit(row) or row)
    return dataclasses.replace(schedule, rows=tuple(rows))


def swap(i, j):
    def edit(row):
        row[i], row[j] = row[j], row[i]

    return edit


def put(i, *slots):
    def edit(row):
        row[i : i + 1] = slots

    return edit


F, B, W = Task("F", 1, 0), Task("B", 1, 0), Task("W", 1, 0)
PLAIN, SPLIT, DUAL = one_f_one_b(2, 3), zb1p(2, 3), dualpipe(2, 4)
# Row 1 of PLAIN is F0 B0 F1 B1 F2 B2, that of SPLIT F0 I0 F1 I1 W0 F2 I2 W1 W2.
CHAIN = tuple((Task(kind, stage, 0, stage),) for kind, stage in (("F", 0), ("F", 1), ("B", 1), ("B", 0)))
TWO_WAYS = Schedule("made up", 1, 2, 1, (CHAIN,), ((0, 0), (0, 0)))
FAULTS = {
    "rows": (dataclasses.replace(PLAIN, rows=PLAIN.rows[:1]), "`schedule.rows` has 1 rows, want 2, one a rank"),
    "stages": (dataclasses.replace(PLAIN, stages=3), "`schedule.placement` of direction 0 has 2 stages, want 3"),
    "ranks": (dataclasses.replace(PLAIN, placement=((0, 2),)), "names rank [2], want ranks below 2"),
    "directions": (dataclasses.replace(PLAIN, placement=()), "`schedule.placement` has 0 directions, want 1 or 2"),
    "no micro-batches": (dataclasses.replace(PLAIN, micro_batches=0), "`schedule.micro_batches` is 0, want an integer"),
    "kind": (change(PLAIN, 1, put(0, (F._replace(kind="X"),))), "rank 1, entry 0 has kinds ('X',)"),
    "pair": (change(PLAIN, 1, put(0, (F, F._replace(micro_batch=1)))), "entry 0 has kinds ('F', 'F'), want one task, or a"),
    "empty": (change(PLAIN, 1, put(0, ())), "rank 1, entry 0 has kinds (), want one task"),
    "stage": (change(PLAIN, 1, put(0, (F._replace(stage=2),))), "rank 1, entry 0: `stage` is 2, want an integer in [0, 2)"),
    "micro-batch": (change(PLAIN, 1, put(0, (F._replace(micro_batch=3),))), "`micro_batch` is 3, want an integer in [0, 3)"),
    "direction": (change(PLAIN, 1, put(0, (F._replace(direction=1),))), "`direction` is 1, want one of [0]"),
    "place": (change(PLAIN, 1, put(0, (Task("F", 0, 0),))), "F of micro-batch 0 in stage 0 is on rank 1, want rank 0"),
    "twice": (change(PLAIN, 1, put(2, (F,))), "rank 1, entry 2: F of micro-batch 0 in stage 1 is there again, want it once"),
    "no forward": (change(PLAIN, 1, put(0)), "F of micro-batch 0 in stage 1 is missing, want it on rank 1"),
    "no backward": (change(PLAIN, 1, put(1)), "I of micro-batch 0 in stage 1 is missing (as is a full backward), want"),
    "no weights": (change(SPLIT, 1, put(4)), "W of micro-batch 0 in stage 1 is missing (as is a full backward)"),
    "both": (change(PLAIN, 1, put(1, (B,), (W,))), "B of micro-batch 0 in stage 1 is there beside W of micro-batch 0"),
    "two ways": (TWO_WAYS, "micro-batch 0 goes in directions [0, 1], want one"),
    "B before F": (change(PLAIN, 1, swap(0, 1)), "rank 1: B of micro-batch 0 in stage 1 is in entry 0, want it after F of"),
    "W before I": (change(SPLIT, 1, swap(1, 4)), "rank 1: W of micro-batch 0 in stage 1 is in entry 1, want it after I of"),
    # Rank 0 wants the backward of 0 before it sends 1; rank 1 wants 1 first.
    "blocked": (
        change(change(one_f_one_b(2, 2), 0, swap(1, 2)), 1, lambda row: [row[2], row[0], row[1], row[3]]),
        "rank 0 waits for ever at entry 1 (B of micro-batch 0 in stage 0), want I of micro-batch 0 in stage 1 before it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_fault_is_named(what):
    schedule, message = FAULTS[what]
    with pytest.raises(ValueError) as caught:
        schedule_check(schedule)
    assert str(caught.value).startswith("schedule_check: ") and message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", [PLAIN, SPLIT, DUAL, dualpipe(4, 8)], ids=lambda s: s.name)
def test_memory_bound(schedule):
    peak = int(simulate(schedule, Times(1, 2, 1)).peak_activations.max())
    schedule_check(schedule, max_activations=peak)
    with pytest.raises(ValueError, match=f"holds {peak} activations, want at most `max_activations`, {peak - 1}"):
        schedule_check(schedule, max_activations=peak - 1)


def test_blocked_rows_are_shown_and_not_simulated():
    blocked = FAULTS["blocked"][0]
    with pytest.raises(ValueError, match="simulate: `schedule`: rank 0 waits for ever at entry 1"):
        simulate(blocked, Times(1, 2, 1))
    assert "0 | F0 B0 F1 B1" in str(blocked) and "they block each other" in str(blocked)


def test_an_overlapped_pair_of_one_micro_batch_blocks():
    schedule = Schedule("made up", 1, 1, 1, (((Task("F", 0, 0), Task("B", 0, 0)),),), ((0,),))
    with pytest.raises(ValueError, match="rank 0: B of micro-batch 0 in stage 0 is in entry 0, want it after F"):
        schedule_check(schedule)
