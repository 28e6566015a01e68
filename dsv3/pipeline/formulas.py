"""Bubble and activations of each schedule by formula: as published, and as the tables have them.

F, B, W are the times of a forward, a full backward and its weights' part, I = B − W that of its input's part, F&B that of
an overlapped pair. All stages take the same time and messages take none. PP counts stages (for `interleaved` ranks), and
n = PP/2 − 1.

| schedule | published bubble | the table's bubble | holds for | activations |
|---|---|---|---|---|
| gpipe | (PP−1)(F+B) | the same | any micro-batches | micro-batches |
| one_f_one_b | (PP−1)(F+B) | the same | any micro-batches | PP |
| interleaved | (PP−1)(F+B) | the same | multiples of PP | PP·chunks + PP − 1 |
| zb1p | (PP−1)(F+B−2W) | (PP−1)(F + I − min(W, F, I)) | at least PP | PP |
| dualpipe, dualpipe_v | n(F&B+B−3W) | n(F&B − W − min(W, I)) + max(nF, nI − F) | max(F, B) ≤ F&B ≤ F+B | PP + 1 |

So the published bubble of ZB1P is exact for W ≤ min(F, I); for a longer W the real one is larger by (PP−1)(W − min(F, I)).

That of DualPipe is exact for F = I ≥ W. In the table I > F gives less, by min(n(I−F), F); I < F more, by n(F−I); and W > I
adds n(W−I). For PP = 8, F = W = 1, I = 1.5 and F&B = 3.5, say, 9 is published and the table has 8. A pair that takes longer
than its two tasks one after the other is in neither formula. The number of micro-batches does not matter. The second formula
of DualPipe is no publication's: it was read off simulations and is tested against them. Both are for the rank that is idle
longest, one in the middle; a rank d steps from the end has n − 1 − d pairs fewer, and each makes it F + B − F&B less idle.

Interleaved times are those of a virtual stage, 1/chunks of a rank's.

Activations count stages times micro-batches at the rank that holds most; with few micro-batches there are fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsv3.checks import check, check_choice
from dsv3.pipeline.schedules import SCHEDULES
from dsv3.pipeline.simulation import Times
from dsv3.pipeline.table import check_count


class Expected(NamedTuple):
    """What formulas say of a schedule.

    bubble: idle time of a rank, as published.
    exact: idle time of a rank in the table, or None where the conditions of the formula do not hold.
    activations: the most that a rank holds, in stages times micro-batches.
    stages_per_rank: stages whose parameters a rank holds. copies: how often each parameter is held.
    """

    bubble: float
    exact: float | None
    activations: int
    stages_per_rank: int
    copies: int


def expected(name: str, ranks: int, micro_batches: int, times: Times, *, chunks: int = 2) -> Expected:
    """Returns a schedule's bubble, activations and parameters by formula, without making the schedule.

    Args:
      name: of a schedule, a key of `SCHEDULES`.
      ranks: devices; PP, but PP/2 for `dualpipe_v`.
      micro_batches: of a step.
      times: of tasks, one number each; of a virtual stage for `interleaved`. `times.send` must be 0 for an exact bubble.
      chunks: virtual stages on each rank of `interleaved`; without meaning for the others.

    Returns:
      An `Expected`; the formulas are in this module's docstring.

    Raises:
      ValueError: an unknown name, a size that is no integer of at least 1, or times by stage.

    References: DeepSeek-V3 (arXiv:2412.19437), table 2; Qi et al. (arXiv:2401.10241), section 2; Narayanan et al.
      (arXiv:2104.04473), section 2.2.
    """
    check_choice("expected", "name", name, tuple(SCHEDULES))
    for argument, value in (("ranks", ranks), ("micro_batches", micro_batches), ("chunks", chunks)):
        check_count("expected", argument, value)
    f, b, w = (_number(times, field) for field in ("forward", "backward", "weight"))
    pair = f + b if times.overlapped is None else _number(times, "overlapped")
    i = b - w
    if name in ("dualpipe", "dualpipe_v"):
        stages = ranks if name == "dualpipe" else 2 * ranks
        n = stages // 2 - 1
        exact = n * (pair - w - min(w, i)) + max(n * f, n * i - f)
        holds = max(f, b) <= pair <= f + b
        found = Expected(n * (pair + b - 3 * w), exact, stages + 1, 2, 2 if name == "dualpipe" else 1)
    elif name == "zb1p":
        bubble, exact = (ranks - 1) * (f + b - 2 * w), (ranks - 1) * (f + i - min(w, f, i))
        holds = micro_batches >= ranks
        found = Expected(bubble, exact, min(ranks, micro_batches), 1, 1)
    else:
        bubble = (ranks - 1) * (f + b)
        most = {"gpipe": micro_batches, "one_f_one_b": ranks, "interleaved": ranks * chunks + ranks - 1}[name]
        held = chunks if name == "interleaved" else 1
        holds = name != "interleaved" or micro_batches % ranks == 0
        found = Expected(bubble, bubble, min(most, micro_batches * held), held, 1)
    return found if holds and times.send == 0 else found._replace(exact=None)


def _number(times: Times, field: str) -> float:
    value = np.asarray(getattr(times, field), np.float64)
    check(value.shape == (), f"expected: `times.{field}` has shape {value.shape}, want one number for all stages")
    return float(value)
