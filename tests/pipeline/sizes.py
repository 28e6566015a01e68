"""Schedules of random sizes for property sweeps, and a slow simulator of its own."""

import numpy as np
from hypothesis import strategies as st

from dsv3.pipeline import SCHEDULES


@st.composite
def schedules(draw, names=tuple(SCHEDULES), *, most_ranks=6, most_extra=9):
    """A schedule of any kind and of sizes that its generator takes."""
    name = draw(st.sampled_from(names))
    ranks, extra = draw(st.integers(1, most_ranks)), draw(st.integers(0, most_extra))
    if name == "dualpipe":
        ranks += ranks % 2
        return SCHEDULES[name](ranks, 2 * ranks + 2 * (extra // 2))
    if name == "dualpipe_v":
        ranks = (ranks + 1) // 2
        return SCHEDULES[name](ranks, 2 * ranks + extra)
    if name == "interleaved":
        return SCHEDULES[name](ranks, ranks * (1 + extra % 4), chunks=draw(st.integers(2, 4)))
    return SCHEDULES[name](ranks, 1 + extra + draw(st.integers(0, ranks)))


def ends_by_relaxation(schedule, forward, backward, weight, pair, send):
    """End of each (rank, entry), written from the definition: the least times that satisfy all inequalities.

    An entry starts no sooner than the one before it in its row has ended, nor than each input's end, plus `send` if that is
    on another rank. Times are by stage, `pair` by the stages of forward and backward. Starting from zero, raising what
    violates an inequality until nothing does gives the least solution.
    """
    entries = [(rank, i) for rank, row in enumerate(schedule.rows) for i in range(len(row))]
    maker = {}
    for rank, i in entries:
        for kind, *what in schedule.rows[rank][i]:
            for part in {"F": "F", "B": "IW", "I": "I", "W": "W"}[kind]:
                maker[part, *what] = (rank, i)
    length, before = {}, {}
    for rank, i in entries:
        slot = schedule.rows[rank][i]
        alone = {"F": forward, "B": backward, "I": np.subtract(backward, weight), "W": weight}
        stages = tuple(task.stage for task in slot)
        length[rank, i] = pair[stages] if len(slot) == 2 else alone[slot[0].kind][stages[0]]
        needed = []
        for kind, stage, micro_batch, direction in slot:
            if kind == "W":
                needed.append(("I", stage, micro_batch, direction))
            elif kind == "F":
                needed += [("F", stage - 1, micro_batch, direction)] * (stage > 0)
            else:
                needed.append(("F", stage, micro_batch, direction))
                needed += [("I", stage + 1, micro_batch, direction)] * (stage + 1 < schedule.stages)
        before[rank, i] = [(maker[need], send * (maker[need][0] != rank)) for need in needed]
        before[rank, i] += [((rank, i - 1), 0)] * (i > 0)
    end = dict(length)
    for _ in range(len(entries) + 1):
        changed = False
        for entry in entries:
            late = max((end[other] + wait for other, wait in before[entry]), default=0) + length[entry]
            if late > end[entry]:
                end[entry], changed = late, True
        if not changed:
            return end
    raise AssertionError("no least solution: the rows block each other")
