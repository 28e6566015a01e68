"""Plots of a run of GRPO from the rows of its log, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.checks import check
from dsv3.train.plots import new_figure

Rows = Sequence[Mapping[str, Any]]


def plot_grpo(rows: Rows, directory: str | os.PathLike) -> list[Path]:
    """Draws what a log holds.

    `reward.png`: reward and its parts, accuracy on held-out problems; spread within groups and the saturated ones.
    `policy.png`: divergence from the reference and from the policy that sampled, entropy; clipped tokens; gradient, ratio.
    `samples.png`: length of answers and the truncated ones. `sampling.png`: accepted drafts, and how far sampling and
    training are apart. What the log has no numbers for is left out.

    Args:
      rows: see `dsv3.rl.report`.
      directory: where to; made if it is not there.

    Returns:
      The files' paths.

    Raises:
      ValueError: no exploration.
    """
    found = [row for row in rows if row["kind"] == "grpo"]
    check(bool(found), "plot_grpo: `rows` has no exploration, want at least one")
    held = [row for row in rows if row["kind"] == "heldout"]
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    drawings = {
        "reward": (_draw_reward, 2), "policy": (_draw_policy, 3), "samples": (_draw_samples, 2),
        "sampling": (_draw_sampling, 2),
    }  # fmt: skip
    paths = []
    for name, (draw, columns) in drawings.items():
        figure, axes = new_figure((5.5 * columns, 4), columns)
        draw(axes, found, held)
        for axis in axes:
            axis.set_xlabel("exploration")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small")
        paths.append(root / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _curve(axis, rows: Rows, name: str, label: str, **style: Any) -> None:
    """One number over the explorations that have it; `a/b` is the part b of a."""
    outer, _, inner = name.partition("/")
    points = [(row["step"], row[outer][inner] if inner else row[outer]) for row in rows if _has(row, outer, inner)]
    if points:
        steps, values = np.array(points, np.float64).T
        axis.plot(steps, values, label=label, linewidth=1.3, **style)


def _has(row: Mapping[str, Any], outer: str, inner: str) -> bool:
    return row.get(outer) is not None and (not inner or inner in row[outer])


def _parts(rows: Rows) -> list[str]:
    return sorted({name for row in rows for name in row["parts"]})


def _draw_reward(axes, rows, held):
    _curve(axes[0], rows, "reward", "reward", color="black")
    for name in _parts(rows):
        _curve(axes[0], rows, f"parts/{name}", name, alpha=0.7)
    _curve(axes[0], held, "accuracy", "accuracy, held-out problems", marker="o", color="tab:red")
    axes[0].set(title="Reward of the samples, mean")
    _curve(axes[1], rows, "spread", "deviation within a group, mean")
    _curve(axes[1], rows, "saturated", "groups with equal rewards, share")
    axes[1].set(title="Spread of the groups", ylim=(0, None))


def _draw_policy(axes, rows, held):
    _curve(axes[0], rows, "kl", "from the reference")
    _curve(axes[0], rows, "drift", "from the policy that sampled")
    _curve(axes[0], rows, "entropy", "entropy")
    axes[0].set(title="Divergence and entropy, nats a token")
    axes[0].set_yscale("symlog", linthresh=1e-3)
    for name, label in (("clip_low", "below"), ("clip_high", "above"), ("dual_clip", "by the dual limit")):
        _curve(axes[1], rows, name, f"clipped {label}, share of tokens")
    axes[1].set(title="Clipped tokens", ylim=(0, None))
    _curve(axes[2], rows, "grad_norm", "gradient norm, mean")
    _curve(axes[2], rows, "ratio_max", "largest ratio to the policy that sampled")
    axes[2].set(title="Gradient and ratio")
    axes[2].set_yscale("log")


def _draw_samples(axes, rows, held):
    _curve(axes[0], rows, "length", "mean")
    _curve(axes[0], rows, "length_max", "longest", alpha=0.6)
    _curve(axes[0], held, "length", "held-out problems, mean", marker="o", color="tab:red")
    axes[0].set(title="Length of the answers, tokens", ylim=(0, None))
    _curve(axes[1], rows, "truncated", "samples without an end, share")
    axes[1].set(title="Truncated samples", ylim=(0, None))


def _draw_sampling(axes, rows, held):
    _curve(axes[0], rows, "acceptance", "drafts accepted, share")
    _curve(axes[0], rows, "router_agreement", "experts that training would choose, too, share")
    axes[0].set(title="Drafts and experts", ylim=(0, 1.05))
    _curve(axes[1], rows, "mismatch/mean", "mean, with replay")
    _curve(axes[1], rows, "free_mismatch/mean", "mean, without")
    _curve(axes[1], rows, "mismatch/max", "largest, with replay", linestyle=":")
    _curve(axes[1], rows, "free_mismatch/max", "largest, without", linestyle=":")
    axes[1].set(title="Log-probabilities: training − sampling, absolute")
    axes[1].set_yscale("log")
