"""Pipeline schedules as the planner sees them: who holds which stage, what waits in memory, and the bubble."""

from __future__ import annotations

from dsv3.checks import check_choice
from dsv3.pipeline import Times, expected

SCHEDULES = ("one_f_one_b", "zb1p", "dualpipe", "dualpipe_v")
OVERLAPPING = ("dualpipe", "dualpipe_v")  # a forward and a backward chunk run together, each hiding the other's all-to-all


def stage_count(schedule: str, pipe: int) -> int:
    """Returns into how many stages `schedule` cuts the model on `pipe` ranks: two a rank for `"dualpipe_v"`, else one."""
    check_choice("stage_count", "schedule", schedule, SCHEDULES)
    return 2 * pipe if schedule == "dualpipe_v" else pipe


def rank_stages(schedule: str, pipe: int) -> list[tuple[int, ...]]:
    """Returns the stages that each pipeline rank holds.

    DualPipe runs the pipeline in both directions, so rank r holds stages r and PP − 1 − r, and every stage exists twice.
    DualPipeV folds 2·PP stages: rank r holds r and 2·PP − 1 − r, each once.

    Args:
      schedule: one of `SCHEDULES`.
      pipe: PP, pipeline ranks.

    Returns:
      A tuple of stages for each rank.

    References: DeepSeek-V3 section 3.2.1; github.com/deepseek-ai/DualPipe for DualPipeV.
    """
    stages = stage_count(schedule, pipe)
    return [(r, stages - 1 - r) if schedule in OVERLAPPING else (r,) for r in range(pipe)]


def stage_copies(schedule: str) -> int:
    """Returns how many ranks hold each stage of `schedule`: two in DualPipe, else one."""
    return 2 if schedule == "dualpipe" else 1


def chunks_in_flight(schedule: str, pipe: int, stage: int, micro_batches: int) -> int:
    """Returns how many micro-batches' activations one stage keeps at its worst moment.

    Stage s of S waits for the S − s − 1 stages behind it, so it keeps S − s. In DualPipe each direction has half of the
    micro-batches; a rank's two stages together keep (S − r) + (r + 1) = S + 1, as in the paper's table 2. ZB1P puts weight
    gradients off until the end, so that every stage keeps S.

    Args:
      schedule: one of `SCHEDULES`.
      pipe: pipeline ranks.
      stage: s.
      micro_batches: of a step, for each data-parallel rank.

    Returns:
      The number of chunks, at most those that there are.
    """
    stages = stage_count(schedule, pipe)
    waiting = stages if schedule == "zb1p" else stages - stage
    return min(micro_batches // stage_copies(schedule), waiting)


def bubble_time(schedule: str, stages: int, *, forward: float, backward: float, weight: float, pair: float) -> float:
    """Returns a rank's idle time in a step, from equal chunk times.

    The published formulas of `dsv3.pipeline.formulas`.

    Args:
      schedule: one of `SCHEDULES`.
      stages: S.
      forward: F in seconds. backward: B, the full backward. weight: W, its part for the weights.
      pair: F&B, a forward and a backward chunk that run together.

    Returns:
      Seconds; never negative, though the formulas are when W is most of B.

    References: DeepSeek-V3 table 2; Qi et al., arXiv:2401.10241, for ZB1P.

    >>> bubble_time("one_f_one_b", 4, forward=1.0, backward=2.0, weight=1.0, pair=3.0)
    9.0
    """
    check_choice("bubble_time", "schedule", schedule, SCHEDULES)
    ranks = stages // 2 if schedule == "dualpipe_v" else stages
    times = Times(forward, backward, weight, pair)
    return max(0.0, expected(schedule, ranks, 1, times).bubble)


def schedule_problem(schedule: str, pipe: int, micro_batches: int) -> str | None:
    """Returns why a schedule cannot run, or `None`.

    Args:
      schedule: one of `SCHEDULES`.
      pipe: pipeline ranks.
      micro_batches: of a step.

    Returns:
      A clause without a subject, such as "dualpipe wants an even number of pipe ranks, not 3".
    """
    if schedule == "dualpipe" and pipe % 2:
        return f"dualpipe wants an even number of pipe ranks, not {pipe}"
    if schedule == "dualpipe" and micro_batches % 2:
        return f"dualpipe wants an even number of micro-batches, not {micro_batches}"
    if schedule in OVERLAPPING and micro_batches < 2 * pipe:
        return f"{schedule} wants at least {2 * pipe} micro-batches for {pipe} pipe ranks, not {micro_batches}"
    return None
