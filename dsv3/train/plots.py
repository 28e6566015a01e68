"""Plots of a run from the rows of its log, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.checks import check

Rows = Sequence[Mapping[str, Any]]


def plot_run(rows: Rows, directory: str | os.PathLike, *, mtp_layers: int = 0) -> list[Path]:
    """Draws what a log holds.

    `loss.png`: training and held-out loss; `divergence.png`: of distillation, the same; `learning_rate.png`; `speed.png`:
    tokens a second, and model FLOPs utilisation where rows have it; `mtp.png`: how often the MTP guess for a held-out token
    is the model's own choice, by which greedy drafts are accepted; `expert_load.png`: each layer's share by expert at the
    end and over time; `load_violation.png`: max/mean − 1 over steps; `balance.png`: the busiest and the idlest expert and
    the variance of the load over windows of steps; `norms.png`: gradient norms and update ratios by component; `bias.png`:
    range of the selection biases. What the log has no rows for is left out.

    Args:
      rows: see `dsv3.train.records`.
      directory: where to; made if it is not there.
      mtp_layers: how many of the last layers of the load are MTP modules, for their names.

    Returns:
      The files' paths.

    Raises:
      ValueError: no training row.
    """
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "heldout", "load", "watch")}
    check(bool(kinds["train"]), "plot_run: `rows` has no training row, want at least one")
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, tuple[Callable[..., None], tuple[float, float], int]] = {
        "loss": (_draw_loss, (7.5, 4.5), 1),
        "learning_rate": (_draw_rate, (7.5, 3.5), 1),
    }
    if "tokens_per_second" in kinds["train"][-1]:
        drawings["speed"] = (_draw_speed, (7.5, 3.5), 1)
    if any("mtp_agreement" in row for row in kinds["heldout"]):
        drawings["mtp"] = (_draw_agreement, (7.5, 3.5), 1)
    if "divergence" in kinds["train"][-1]:
        drawings["divergence"] = (_draw_divergence, (7.5, 4.5), 1)
    if kinds["load"]:
        layers = len(kinds["load"][-1]["load"])
        drawings["expert_load"] = (_draw_load, (11, 2.5 + 0.45 * layers), 2)
        drawings["load_violation"] = (_draw_violation, (7.5, 4), 1)
        drawings["balance"] = (_draw_balance, (11, 4), 2)
    if kinds["watch"]:
        drawings["norms"] = (_draw_norms, (11, 4.5), 2)
        if kinds["watch"][-1].get("bias_max"):
            drawings["bias"] = (_draw_bias, (7.5, 4), 1)
    paths = []
    for name, (draw, size, columns) in drawings.items():
        figure, axes = new_figure(size, columns)
        draw(axes, kinds, mtp_layers)
        paths.append(root / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def new_figure(size: tuple[float, float], columns: int):
    """Returns a figure of `size` inches and its axes, side by side, on the Agg canvas, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a fiftieth of the run, over fewer values at its beginning."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - width)
    return (sums[ends] - sums[begins]) / (ends - begins)


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def _draw_loss(axes, kinds, mtp_layers):
    (axis,), train, held = axes, kinds["train"], kinds["heldout"]
    steps, nll = _column(train, "step"), _column(train, "nll")
    axis.plot(steps, nll, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smooth(nll), color="tab:blue", label="training, next token")
    for k in range(len(train[-1]["mtp"])):
        mtp = np.array([row["mtp"][k] for row in train])
        axis.plot(steps, _smooth(mtp), color="tab:gray", linewidth=1, label=f"training, MTP module {k + 1}")
    held = [row for row in held if "nll" in row]
    if held:
        axis.plot(_column(held, "step"), _column(held, "nll"), "o-", color="tab:red", label="held out, next token")
    axis.set(xlabel="step", ylabel="cross-entropy, nats a token", title="Loss")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_divergence(axes, kinds, mtp_layers):
    (axis,), train = axes, kinds["train"]
    steps, apart = _column(train, "step"), _column(train, "divergence")
    axis.plot(steps, apart, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smooth(apart), color="tab:blue", label="training")
    held = [row for row in kinds["heldout"] if "divergence" in row]
    if held:
        axis.plot(_column(held, "step"), _column(held, "divergence"), "o-", color="tab:red", label="held out")
    axis.set(xlabel="step", ylabel="nats a token", title="Divergence from the teacher", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_rate(axes, kinds, mtp_layers):
    (axis,), train = axes, kinds["train"]
    axis.plot(_column(train, "step"), _column(train, "learning_rate"), color="tab:green")
    axis.set(xlabel="step", ylabel="learning rate", title="Learning rate", ylim=(0, None))
    axis.grid(alpha=0.3)


def _draw_speed(axes, kinds, mtp_layers):
    (axis,), train = axes, kinds["train"]
    steps, speed = _column(train, "step"), _column(train, "tokens_per_second")
    axis.plot(steps, speed, color="tab:blue", alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smooth(speed), color="tab:blue")
    axis.set(xlabel="step", ylabel="tokens a second", title="Speed", ylim=(0, None))
    axis.grid(alpha=0.3)
    found = [row for row in train if "mfu" in row]
    if found:
        used = axis.twinx()
        used.plot(_column(found, "step"), 100 * _smooth(_column(found, "mfu")), color="tab:orange", linewidth=1)
        used.set(ylim=(0, None))
        used.set_ylabel("model FLOPs utilisation, %", color="tab:orange")


def _draw_agreement(axes, kinds, mtp_layers):
    (axis,), held = axes, [row for row in kinds["heldout"] if "mtp_agreement" in row]
    axis.plot(_column(held, "step"), 100 * _column(held, "mtp_agreement"), "o-", color="tab:purple")
    axis.set(xlabel="step", ylabel="% of tokens", title="MTP guess is the model's own choice (held out)", ylim=(0, 100))
    axis.grid(alpha=0.3)


def _layer_names(layers: int, mtp_layers: int) -> list[str]:
    trunk = layers - mtp_layers
    return [f"MoE {i + 1}" if i < trunk else f"MTP {i - trunk + 1}" for i in range(layers)]


def _shares(row: Mapping[str, Any]) -> np.ndarray:
    """Load by layer and expert in units of the fair share, `[layers, E]`: 1 is balanced."""
    load = np.array(row["load"], np.float64)
    return load / np.maximum(load.mean(1, keepdims=True), 1e-9)


def _draw_load(axes, kinds, mtp_layers):
    """Left: layer × expert at the end. Right: the same over time, one row an expert, layers from top to bottom."""
    final, over_time = axes
    rows = kinds["load"]
    last = np.mean([_shares(row) for row in rows[-5:]], 0)
    layers, experts = last.shape
    names = _layer_names(layers, mtp_layers)
    shade = {"cmap": "RdBu_r", "vmin": 0.0, "vmax": 2.0, "aspect": "auto", "interpolation": "nearest"}
    final.imshow(last, **shade)
    final.set(xlabel="expert", title=f"Load at the end (mean of the last {min(5, len(rows))} rows)")
    final.set_yticks(range(layers), names)
    table = np.concatenate([_shares(row).T[None] for row in rows]).transpose(2, 1, 0).reshape(layers * experts, -1)
    image = over_time.imshow(table, **shade, extent=(0, len(rows), layers * experts, 0))
    over_time.set_yticks([experts * (i + 0.5) for i in range(layers)], names)
    for i in range(1, layers):
        over_time.axhline(experts * i, color="black", linewidth=0.8)
    marks = sorted({0, len(rows) // 2, len(rows) - 1})
    over_time.set_xticks([m + 0.5 for m in marks], [str(rows[m]["step"]) for m in marks])
    over_time.set(xlabel="step", title="Load over time, one line an expert")
    bar = over_time.figure.colorbar(image, ax=list(axes), extend="max", shrink=0.9)
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "0.5", "1 = fair share", "1.5", "2"])


def _draw_violation(axes, kinds, mtp_layers):
    (axis,), train = axes, kinds["train"]
    steps = _column(train, "step")
    violation = np.array([row["load_violation"] for row in train])
    for values, name in zip(violation.T, _layer_names(violation.shape[1], mtp_layers)):
        axis.plot(steps, _smooth(values), linewidth=1.2, label=name)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set(xlabel="step", ylabel="max load / mean load − 1", title="Load violation (0 = every expert has its fair share)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _draw_balance(axes, kinds, mtp_layers):
    """Left: the busiest and the idlest expert of each window, over the fair share. Right: the variance of those shares."""
    (extremes, variance), rows = axes, kinds["load"]
    steps, names = _column(rows, "step"), _layer_names(len(rows[-1]["load"]), mtp_layers)
    table = {name: np.array([row[name] for row in rows]) for name in ("max_load", "min_load", "load_variance")}
    for i, name in enumerate(names):
        (line,) = extremes.plot(steps, table["max_load"][:, i], linewidth=1.2, label=name)
        extremes.plot(steps, table["min_load"][:, i], linewidth=1.2, color=line.get_color())
        variance.semilogy(steps, np.maximum(table["load_variance"][:, i], 1e-6), linewidth=1.2, label=name)
    extremes.axhspan(0.8, 1.2, color="tab:green", alpha=0.12)
    extremes.set(xlabel="step", ylabel="load / fair share", title="Busiest and idlest expert (band: within 20%)")
    variance.axhline(0.1, color="black", linewidth=0.8, linestyle="--")
    variance.set(xlabel="step", ylabel="variance of load / fair share", title="Variance of the load (line: 0.1)")
    for axis in axes:
        axis.grid(alpha=0.3)
    extremes.legend(fontsize="small")


def _draw_norms(axes, kinds, mtp_layers):
    """Left: gradient norms by component. Right: norm of the update over that of the parameters."""
    rows = kinds["watch"]
    for axis, name, title in zip(axes, ("grad_norms", "update_ratios"), ("Gradient norm", "Update / parameters")):
        found = [row for row in rows if name in row]
        for component in found[-1][name] if found else ():
            values = [max(row[name].get(component, 0.0), 1e-12) for row in found]
            axis.semilogy(_column(found, "step"), values, linewidth=1.2, label=component)
        axis.set(xlabel="step", ylabel="Euclidean norm" if axis is axes[0] else "ratio of norms", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small", ncols=2)


def _draw_bias(axes, kinds, mtp_layers):
    (axis,), rows = axes, kinds["watch"]
    steps, names = _column(rows, "step"), _layer_names(len(rows[-1]["bias_max"]), mtp_layers)
    low, high = (np.array([row[name] for row in rows]) for name in ("bias_min", "bias_max"))
    for i, name in enumerate(names):
        axis.fill_between(steps, low[:, i], high[:, i], alpha=0.2)
        axis.plot(steps, high[:, i], linewidth=1, label=name)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set(xlabel="step", ylabel="selection bias", title="Range of the selection biases")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
