"""What `fp8_report.py` makes of the losses of its runs: a table, a JSON file, curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command import aligned, write_text

from dsv3.checks import check

WINDOW = 10  # steps of a running mean
Losses = dict[int, np.ndarray]  # by seed
PEERS = ("bfloat16", "float32")


def write_report(out: Path, order: Sequence[str]) -> str:
    """Compares all runs of a folder; writes report.json, report.txt and curves.png, and returns the table."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / "runs").glob("*.json"))]
    names = [name for name in order if any(run["variant"] == name for run in runs)]
    check(bool(names), f"{str(out / 'runs')!r} holds no finished run, want one at least")
    losses = {name: {r["seed"]: np.array(r["loss"]) for r in runs if r["variant"] == name} for name in names}
    results = {name: compare(losses[name], losses) for name in names}
    for name in names:
        results[name]["heldout"] = float(np.mean([run["heldout"] for run in runs if run["variant"] == name]))
    table = format_table(results)
    write_text(out / "report.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "report.txt", table + "\n")
    draw(losses, out / "curves.png")
    return table


def compare(losses: Losses, every: dict[str, Losses]) -> dict[str, Any]:
    """One variant's numbers; relative ones as fractions, by seed."""
    found: dict[str, Any] = {
        "seeds": sorted(losses),
        "loss": float(np.mean([tail(values).mean() for values in losses.values()])),
        "spike": max(spike(values) for values in losses.values()),
    }
    for peer in PEERS:
        common = sorted(set(losses) & set(every.get(peer, {})))
        pairs = [(losses[seed], every[peer][seed]) for seed in common]
        if pairs and losses is not every[peer]:
            found[f"to_{peer}"] = [float(tail(a).mean() / tail(b).mean() - 1) for a, b in pairs]
            found[f"apart_{peer}"] = [float(np.mean(np.abs(tail(smooth(a) / smooth(b) - 1)))) for a, b in pairs]
    return found


def tail(values: np.ndarray) -> np.ndarray:
    """The last tenth."""
    return values[-max(1, len(values) // 10) :]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running means; the first is over the first `WINDOW` values."""
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")


def spike(values: np.ndarray) -> float:
    """The most that a value after the warm-up exceeds the mean of those before it, as a part of that."""
    start = max(0, len(values) // 20 - WINDOW)
    return float(np.max(values[start + WINDOW :] / smooth(values)[start:-1] - 1))


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """The table as aligned text."""
    head = ["variant", "seeds", "loss", "to bfloat16 %", "apart %", "to float32 %", "apart %", "spike %", "held out"]
    rows = [head]
    for name, found in results.items():
        cells = [name, str(len(found["seeds"])), f"{found['loss']:.4f}"]
        for peer in PEERS:
            to = found.get(f"to_{peer}")
            cells.append("-" if to is None else f"{signed(np.mean(to))} ({signed(min(to))} to {signed(max(to))})")
            cells.append("-" if to is None else f"{100 * np.mean(found[f'apart_{peer}']):.2f}")
        rows.append([*cells, f"{100 * found['spike']:.1f}", f"{found['heldout']:.4f}"])
    return aligned(rows)


def signed(value: float) -> str:
    return f"{100 * value:+.2f}"


def draw(losses: dict[str, Losses], file: Path) -> None:
    """Losses of all variants, the mean over seeds, and their differences to the first peer that is there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    peer = next((name for name in PEERS if name in losses), None)
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for i, (name, runs) in enumerate(losses.items()):
        style = {"color": f"C{i}", "linewidth": 1.2, "label": name}
        above.plot(steps(runs), np.mean([smooth(run) for run in runs.values()], 0), **style)
        common = sorted(set(runs) & set(losses.get(peer, {})))
        if name != peer and common:
            apart = np.mean([smooth(runs[seed]) / smooth(losses[peer][seed]) - 1 for seed in common], 0)
            below.plot(steps(runs), 100 * apart, **style)
    above.set_ylabel("next-token loss, nats")
    above.set_yscale("log")
    below.set_xlabel("step")
    below.set_ylabel(f"above {peer}, %")
    below.set_ylim(-2, 2)
    for height in (-0.25, 0.0, 0.25):
        below.axhline(height, color="grey", linewidth=0.8, linestyle=":" if height else "-")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    above.legend()
    figure.savefig(file, dpi=120)


def steps(runs: Losses) -> np.ndarray:
    """The last step of each running mean."""
    return np.arange(WINDOW, len(next(iter(runs.values()))) + 1)
