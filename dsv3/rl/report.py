"""What a run of GRPO writes down, beside what `dsv3.train.records` says of rows::

    {"kind": "grpo", "step": 3, "reward": 0.4, "parts": {"accuracy": 0.3}, "spread": 0.2, "kl": 0.01, "entropy": 1.2, ...}
    {"kind": "samples", "step": 3, "samples": [{"problem": 7, "sample": 2, "prompt": "...", "answer": "...", ...}, ...]}
    {"kind": "heldout", "step": 10, "accuracy": 0.35, "reward": 0.5, "parts": {...}, "length": 80.2, "truncated": 0.0}

What was not measured is not in a row: a run without a reference has no `kl` and no `penalty`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3.rl.explore import Explored, Task
from dsv3.rl.step import GrpoMetrics


def exploration_numbers(explored: Explored, group_size: int) -> dict[str, Any]:
    """Describes an exploration's samples.

    Args:
      explored: see `Explored`.
      group_size: samples of a problem.

    Returns:
      `reward` and `parts`, means over samples; `spread`, the mean over groups of the rewards' deviation within one; `drawn`
      problems, the share of them that was `saturated`, and how many of these were `filled` in; `length`, the mean of the
      answers' tokens, and `length_max`; the share that was `truncated`; with drafts their `acceptance`.
    """
    rollouts, graded = explored.rollouts, explored.graded
    groups = graded.total.reshape(-1, group_size)
    numbers = {
        "reward": float(graded.total.mean()),
        "parts": {name: float(values.mean()) for name, values in graded.parts.items()},
        "spread": float(groups.std(1).mean()),
        "drawn": explored.drawn,
        "saturated": explored.saturated / explored.drawn,
        "filled": explored.filled,
        "length": float(rollouts.lengths.mean()),
        "length_max": int(rollouts.lengths.max()),
        "truncated": float(rollouts.truncated.mean()),
    }
    drafted = int(rollouts.drafted.sum())
    return numbers | ({"acceptance": float(rollouts.accepted.sum() / drafted)} if drafted else {})


def learning_numbers(learnt: Sequence[GrpoMetrics]) -> dict[str, Any]:
    """Describes the optimiser's steps of an exploration: means over those that were taken, of `ratio_max` the largest.

    Args:
      learnt: what the steps returned.

    Returns:
      `taken` and `skipped` steps; `loss`, `policy`, `penalty`, `entropy`, `mtp` of each module; all of `GrpoStats`;
      `grad_norm`, and the `learning_rate` of the last step. Without a reference there is no `penalty` and no `kl`.
    """
    taken = [metrics for metrics in learnt if bool(metrics.taken)]
    counts = {"taken": len(taken), "skipped": len(learnt) - len(taken)}
    if not taken:
        return counts
    rows = [_step_numbers(metrics) for metrics in taken]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    means["ratio_max"] = max(row["ratio_max"] for row in rows)
    mtp = np.mean([np.asarray(m.parts.mtp) for m in taken], 0)
    means |= {"mtp": mtp.tolist()} if mtp.size else {}
    return counts | means | {"learning_rate": float(taken[-1].optim.learning_rate)}


def _step_numbers(metrics: GrpoMetrics) -> dict[str, float]:
    parts = metrics.parts
    found = {name: getattr(parts, name) for name in ("loss", "policy", "penalty", "entropy")} | parts.stats._asdict()
    found["grad_norm"] = metrics.optim.grad_norm
    return {name: float(value) for name, value in found.items() if not isinstance(value, tuple)}


def transcript(
    explored: Explored, tasks: Sequence[Task], advantages: np.ndarray, group_size: int, problems: int
) -> list[dict[str, Any]]:
    """Returns the best and the worst sample of the first few problems of an exploration, as JSON values.

    Args:
      explored: see `Explored`.
      tasks: all problems.
      advantages: `[N]`, of the samples.
      group_size: samples of a problem.
      problems: how many.
    """
    rollouts, graded, found = explored.rollouts, explored.graded, []
    for first in range(0, min(problems * group_size, len(advantages)), group_size):
        group = graded.total[first : first + group_size]
        for row in sorted({first + int(group.argmax()), first + int(group.argmin())}):
            number, total, advantage = int(rollouts.numbers[row]), float(graded.total[row]), float(advantages[row])
            found.append({
                "problem": number, "sample": int(rollouts.samples[row]), "prompt": tasks[number].text,
                "answer": tasks[number].opening + rollouts.answer(row), "reward": total,
                "parts": {name: float(values[row]) for name, values in graded.parts.items()},
                "advantage": advantage, "length": int(rollouts.lengths[row]), "finish": rollouts.finish[row],
            })  # fmt: skip
    return found


def progress_line(row: dict[str, Any], total: int) -> str:
    """Returns a `grpo` row as one line for people; `total`: explorations of the run."""
    parts = "".join(f" {name} {value:.3f}" for name, value in row["parts"].items())
    head = f"exploration {row['step']}/{total}  reward {row['reward']:.4f}{parts}  length {row['length']:.1f}"
    if "loss" not in row:
        return f"{head}  no step was taken"
    kl = f"kl {row['kl']:.4f}  " if "kl" in row else ""
    tail = f"{kl}entropy {row['entropy']:.3f}  clipped {row['clip_low'] + row['clip_high']:.2%}"
    drafts = f"  accepted {row['acceptance']:.0%}" if "acceptance" in row else ""
    agreed = row.get("router_agreement", math.nan)
    routed = "" if math.isnan(agreed) else f"  experts agree {agreed:.1%}"
    return f"{head}  {tail}{drafts}{routed}  {row['seconds']:.1f} s"
