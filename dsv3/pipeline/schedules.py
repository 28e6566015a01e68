"""The schedules with one direction: GPipe, 1F1B, interleaved 1F1B and ZB1P; and the list of all generators."""

from __future__ import annotations

from collections.abc import Callable

from dsv3.checks import check
from dsv3.pipeline.dual import dualpipe, dualpipe_v
from dsv3.pipeline.table import BACKWARD, FORWARD, INPUT, WEIGHT, Schedule, Slot, Task, check_count


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards: bubble (PP − 1)(F + B), activations of every micro-batch.

    Args:
      ranks: PP, one stage each.
      micro_batches: of a step, at least 1.

    Returns:
      A `Schedule`; stage s is on rank s.

    Raises:
      ValueError: a size is no integer of at least 1.

    References: Huang et al., GPipe (arXiv:1811.06965), section 2.3.
    """
    _check_sizes("gpipe", ranks, micro_batches)
    rows = []
    for rank in range(ranks):
        forwards = [Task(FORWARD, rank, m) for m in range(micro_batches)]
        rows.append(_singles(forwards + [Task(BACKWARD, rank, m) for m in range(micro_batches)]))
    return _one_way("gpipe", ranks, micro_batches, rows)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """Forward and backward in turns, once the pipeline is full: bubble (PP − 1)(F + B), activations of PP micro-batches.

    Rank r starts with PP − 1 − r forwards, so that the backward of its first micro-batch arrives when it is due.

    Args:
      ranks: PP, one stage each.
      micro_batches: of a step, at least 1; with fewer than PP the same bubble and activations of all of them.

    Returns:
      A `Schedule`; stage s is on rank s.

    Raises:
      ValueError: a size is no integer of at least 1.

    References: Narayanan et al., Megatron-LM (arXiv:2104.04473), section 2.2.1.
    """
    _check_sizes("one_f_one_b", ranks, micro_batches)
    rows = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        tasks = [Task(FORWARD, rank, m) for m in range(ahead)]
        for m in range(micro_batches):
            if ahead + m < micro_batches:
                tasks.append(Task(FORWARD, rank, ahead + m))
            tasks.append(Task(BACKWARD, rank, m))
        rows.append(_singles(tasks))
    return _one_way("one_f_one_b", ranks, micro_batches, rows)


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """1F1B with split backwards (ZB-H1): bubble (PP − 1)(F + B − 2W), activations of PP micro-batches.

    The part for the input comes where 1F1B has the backward; the part for the weights follows r micro-batches later on
    rank r and fills the gaps at the end. Rank r has r forwards fewer ahead of the backwards than rank 0, so the r
    activations that wait for their weights' part make no rank hold more than PP.

    Args:
      ranks: PP, one stage each.
      micro_batches: of a step, at least 1. The bubble above wants at least PP, and W ≤ min(F, B − W);
        `dsv3.pipeline.formulas` has what it is for a longer W.

    Returns:
      A `Schedule`; stage s is on rank s.

    Raises:
      ValueError: a size is no integer of at least 1.

    References: Qi et al., Zero Bubble Pipeline Parallelism (arXiv:2401.10241), section 2 (ZB-H1); DeepSeek-V3
      (arXiv:2412.19437), table 2 (ZB1P).
    """
    _check_sizes("zb1p", ranks, micro_batches)
    rows = []
    for rank in range(ranks):
        ahead, late = min(ranks - 1 - rank, micro_batches), min(rank, micro_batches)
        tasks = [Task(FORWARD, rank, m) for m in range(ahead)]
        for m in range(micro_batches):
            if ahead + m < micro_batches:
                tasks.append(Task(FORWARD, rank, ahead + m))
            tasks.append(Task(INPUT, rank, m))
            if m >= late:
                tasks.append(Task(WEIGHT, rank, m - late))
        tasks += [Task(WEIGHT, rank, m) for m in range(micro_batches - late, micro_batches)]
        rows.append(_singles(tasks))
    return _one_way("zb1p", ranks, micro_batches, rows)


def interleaved(ranks: int, micro_batches: int, *, chunks: int = 2) -> Schedule:
    """1F1B over virtual stages, several on each rank: bubble (PP − 1)(F + B), with F and B of the shorter virtual stages.

    Micro-batches go in groups of PP: a group passes a rank's first virtual stage, then its second, and so on; backwards the
    same from the last one. Rank r starts with 2(PP − 1 − r) + (chunks − 1) PP forwards.

    Args:
      ranks: PP.
      micro_batches: of a step, a multiple of PP.
      chunks: virtual stages on each rank, at least 2.

    Returns:
      A `Schedule` of PP · chunks stages; stage s is on rank s mod PP.

    Raises:
      ValueError: a size is no integer in its range, or micro-batches do not fill groups of PP.

    References: Narayanan et al., Megatron-LM (arXiv:2104.04473), section 2.2.2.
    """
    _check_sizes("interleaved", ranks, micro_batches)
    check_count("interleaved", "chunks", chunks, 2)
    wanted = f"want a multiple of `ranks`, which is {ranks}"
    check(micro_batches % ranks == 0, f"interleaved: `micro_batches` is {micro_batches}, {wanted}")
    # (chunk, micro-batch) in the order of the forwards; a backward takes the same turn in the mirrored chunk.
    turns = [(chunk, group + m) for group in range(0, micro_batches, ranks) for chunk in range(chunks) for m in range(ranks)]
    rows = []
    for rank in range(ranks):
        forwards = [Task(FORWARD, chunk * ranks + rank, m) for chunk, m in turns]
        backwards = [Task(BACKWARD, (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in turns]
        ahead = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, len(turns))
        tasks = forwards[:ahead]
        for turn, backward in enumerate(backwards):
            tasks += [*forwards[ahead + turn : ahead + turn + 1], backward]
        rows.append(_singles(tasks))
    placement = (tuple(s % ranks for s in range(ranks * chunks)),)
    return Schedule("interleaved", ranks, ranks * chunks, micro_batches, tuple(rows), placement)


# Each takes (ranks, micro_batches); `interleaved` also chunks=2.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "one_f_one_b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipe_v": dualpipe_v,
}


def _check_sizes(function: str, ranks: int, micro_batches: int) -> None:
    check_count(function, "ranks", ranks)
    check_count(function, "micro_batches", micro_batches)


def _singles(tasks: list[Task]) -> tuple[Slot, ...]:
    return tuple((task,) for task in tasks)


def _one_way(name: str, ranks: int, micro_batches: int, rows: list[tuple[Slot, ...]]) -> Schedule:
    """The table of a schedule with stage s on rank s."""
    return Schedule(name, ranks, ranks, micro_batches, tuple(rows), (tuple(range(ranks)),))
