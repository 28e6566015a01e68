"""DualPipe and DualPipeV: micro-batches enter from both ends of the ranks, forwards overlap with backwards.

Every rank has two lanes. In DualPipe they are the two directions; in DualPipeV the way down and the way up of one direction,
since a micro-batch goes from the first rank to the last and back. Lane 0 is the one that reaches the rank first. A rank at
depth 0 is at an end where micro-batches enter; the innermost ranks have depth `half - 1`. Seen so, both schedules have the
same rows: DualPipeV is one half of DualPipe, which is symmetric about its middle.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dsv3.checks import check
from dsv3.pipeline.table import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule, Slot, Task, check_count


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """Two directions that overlap: bubble (PP/2 − 1)(F&B + B − 3W), activations PP + 1, parameters twice.

    Micro-batches `0 .. micro_batches/2 - 1` go from the first rank to the last, the others from the last to the first. The
    bubble is exact for F = B − W and W ≤ F; `dsv3.pipeline.formulas` says what it is for other times. The activations are
    those of one stage for one micro-batch, both directions together.

    Args:
      ranks: PP, even. Each has two stages, one for each direction.
      micro_batches: of a step, even, at least 2 PP.

    Returns:
      A `Schedule` of PP stages; stage s is on rank s in direction 0 and on rank PP − 1 − s in direction 1.

    Raises:
      ValueError: `ranks` is odd, or `micro_batches` odd or too few.

    References: DeepSeek-V3 (arXiv:2412.19437), section 3.2.1, figure 5 (8 ranks, 20 micro-batches).
    """
    check_count("dualpipe", "ranks", ranks, 2)
    check(ranks % 2 == 0, f"dualpipe: `ranks` is {ranks}, want an even number")
    check_count("dualpipe", "micro_batches", micro_batches, 2 * ranks)
    check(micro_batches % 2 == 0, f"dualpipe: `micro_batches` is {micro_batches}, want an even number")
    each = micro_batches // 2
    placement = (tuple(range(ranks)), tuple(reversed(range(ranks))))

    def task(rank: int, kind: str, lane: int, index: int) -> Task:
        direction = lane if rank < ranks // 2 else 1 - lane
        return Task(kind, placement[direction][rank], direction * each + index, direction)

    depths = [min(rank, ranks - 1 - rank) for rank in range(ranks)]
    rows = tuple(lane_row(depth, ranks // 2, each, partial(task, rank)) for rank, depth in enumerate(depths))
    return Schedule("dualpipe", ranks, ranks, micro_batches, rows, placement)


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe cut in half, with a V of stages: bubble (PP/2 − 1)(F&B + B − 3W) and activations PP + 1 on PP/2 ranks.

    PP counts stages. A rank has two of them, as in DualPipe, but no parameter is held twice. For the bubble's
    conditions see `dualpipe`.

    Args:
      ranks: PP/2, at least 1.
      micro_batches: of a step, at least PP.

    Returns:
      A `Schedule` of PP stages; stage s is on rank s, and from the middle on on rank PP − 1 − s.

    Raises:
      ValueError: a size is no integer in its range.

    References: the cut-in-half of Sea AI Lab, as in github.com/deepseek-ai/DualPipe.
    """
    check_count("dualpipe_v", "ranks", ranks)
    check_count("dualpipe_v", "micro_batches", micro_batches, 2 * ranks)
    stages = 2 * ranks

    def task(rank: int, kind: str, lane: int, index: int) -> Task:
        return Task(kind, stages - 1 - rank if lane else rank, index)

    rows = tuple(lane_row(rank, ranks, micro_batches, partial(task, rank)) for rank in range(ranks))
    placement = (tuple(min(s, stages - 1 - s) for s in range(stages)),)
    return Schedule("dualpipe_v", ranks, stages, micro_batches, rows, placement)


def lane_row(depth: int, half: int, each: int, task: Callable[[str, int, int], Task]) -> tuple[Slot, ...]:
    """Returns the row of a rank at `depth`.

    Within a lane the forwards are in the order of the micro-batches, as are the backwards; weights' parts come in the order
    of their inputs' parts, over both lanes. With `outer = half - 1 - depth`, the number of ranks between this one and the
    middle:

    1. `2 outer` forwards of lane 0;
    2. `depth + 1` times a forward of either lane;
    3. `outer` times lane 1's backward, split, and its next forward: nothing else is there to be done yet;
    4. until the forwards of lane 0 are used up: lane 0's forward over lane 1's backward, then the reverse. In the
       middle the first two of them are not overlapped, as the neighbour waits for the forward;
    5. `outer` times a backward of lane 1, then lane 1's forward over lane 0's backward;
    6. `depth + 1` times a backward of either lane; those of the second half are split,
    7. and their weights' parts fill the gaps between the last `outer` backwards of lane 0, which are split too;
    8. `depth + 1` weights' parts that are left.

    Args:
      depth: of the rank, from 0 at the outer end. half: number of depths.
      each: micro-batches of a lane, at least `2 half`.
      task: makes a task of a kind, a lane and the micro-batch's number in it.

    Returns:
      Entries in order.
    """
    outer, row = half - 1 - depth, []
    forwards, backwards, delayed = [0, 0], [0, 0], []

    def forward(lane: int) -> Task:
        forwards[lane] += 1
        return task(FORWARD, lane, forwards[lane] - 1)

    def backward(lane: int, split: bool = False) -> Task:
        index, backwards[lane] = backwards[lane], backwards[lane] + 1
        if split:
            delayed.append(task(WEIGHT, lane, index))
        return task(INPUT if split else BACKWARD, lane, index)

    def add(*slots: Slot) -> None:
        row.extend(slots)

    for _ in range(2 * outer):
        add((forward(0),))
    for _ in range(depth + 1):
        add((forward(0),), (forward(1),))
    for _ in range(outer):
        add((backward(1, split=True),), (delayed.pop(0),), (forward(1),))
    for i in range(each - forwards[0]):
        pair = (forward(0), backward(1))
        add(*([(part,) for part in pair] if outer == 0 and i == 0 else [pair]))
        add((forward(1), backward(0)))
    for _ in range(outer):
        add((backward(1),), (forward(1), backward(0)))
    for i in range(2 * (depth + 1)):
        add((backward(1 - i % 2, split=i > depth),))
    for _ in range(outer):
        add((delayed.pop(0),), (backward(0, split=True),))
    add(*[(late,) for late in delayed])
    assert forwards == backwards == [each, each], (forwards, backwards)
    return tuple(row)
