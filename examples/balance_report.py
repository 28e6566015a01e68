"""What `compare_balance.py` shows of its runs: a table, numbers as JSON, curves, a page, the table of the docs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from balance_runs import (
    VARIANCE,
    WITHIN,
    Arm,
    Balance,
    Rows,
    Run,
    arms_of,
    base_of,
    check_same,
    compare,
    is_finished,
    read_run,
    worst_layer,
)
from command import aligned, write_text

from dsv3.checks import check
from dsv3.page import Table, write_page

DOCS = re.compile(r"(<!-- table -->\n```\n).*?(```\n)", re.S)


def table_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The table, head first."""
    rows = [["arm", "γ", "α", "seeds", "bits/byte", "perplexity", "cost %", "busiest", "idlest", "variance", "entropy",
             "unused", "even", "since"]]  # fmt: skip
    for name, found in results.items():
        since = found["since"]
        rows.append([
            name.partition(":")[0], f"{found['bias_rate']:g}", f"{found['balance_weight']:g}", str(len(found["seeds"])),
            f"{np.mean(found['bits_per_byte']):.4f}", f"{np.mean(found['perplexity']):.2f}", cost_cell(found["cost"]),
            f"{max(found['busiest']):.3f}", f"{min(found['idlest']):.3f}", f"{max(found['variance']):.4f}",
            f"{min(found['entropy']):.4f}", str(max(found["unused"])), "yes" if all(found["even"]) else "no",
            "-" if None in since else f"{max(since):,}",
        ])  # fmt: skip
    return rows


def cost_cell(cost: Sequence[float]) -> str:
    """Mean and range in percent."""
    if not cost:
        return "-"
    mean = f"{100 * np.mean(cost):+.2f}"
    return mean if len(cost) == 1 else f"{mean} ({100 * min(cost):+.2f} to {100 * max(cost):+.2f})"


def layer_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The balance of every layer, head first; the last layer may be an MTP module's."""
    rows = [["arm", "seed", "layer", "busiest", "idlest", "variance", "entropy", "unused"]]
    for name, found in results.items():
        for seed, numbers in zip(found["seeds"], found["by_layer"]):
            columns = (numbers[key] for key in ("max_load", "min_load", "load_variance", "load_entropy", "unused"))
            for layer, (most, least, variance, entropy, unused) in enumerate(zip(*columns), 1):
                cells = [f"{most:.3f}", f"{least:.3f}", f"{variance:.4f}", f"{entropy:.4f}", str(unused)]
                rows.append([name, str(seed), str(layer), *cells])
    return rows


def notes(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the table's window is, and of which runs not all of it was found."""
    windows = sorted({steps for found in results.values() for steps in found["window"]})
    lines = [f"load: of the last {' or '.join(f'{steps:,}' for steps in windows)} steps"]
    for name, found in results.items():
        for seed, steps, summed in zip(found["seeds"], found["window"], found["summed"]):
            if steps != summed:
                lines.append(f"{name}, seed {seed}: the rows of the log that lie in them have {summed:,} steps")
    return "\n".join(lines)


def write_report(out: Path, window: float, docs: Path | None) -> str:
    """Compares the finished runs of a folder and writes everything; returns the table and its notes."""
    runs = [read_run(folder) for folder in (out / "runs").iterdir() if is_finished(folder)]
    runs.sort(key=lambda run: (run.arm.rank, run.seed))
    check(bool(runs), f"{str(out / 'runs')!r} holds no finished run, want one at least")
    check_same(runs)
    results = compare(runs, window)
    rows = table_rows(results)
    text = f"{aligned(rows)}\n{notes(results)}"
    write_text(out / "balance.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "balance.txt", text + "\n")
    draw(runs, out / "balance.png")
    write_page(out / "report.html", "Balance of the experts", [
        ("Arms", [Table(rows), notes(results)]),
        ("Over the steps", [out / "balance.png"]),
        ("Layers", [Table(layer_rows(results))]),
        ("Settings", [Table([("setting", "value"), *common_settings(runs)], left=2)]),
    ])  # fmt: skip
    if docs is not None:
        write_docs(docs, text, out / "balance.png")
    return text


def common_settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the runs have in common, without the model's configuration, which each run's own report has."""
    same = [(name, value) for name, value in runs[0].settings.items() if all(run.settings[name] == value for run in runs)]
    return [(name, str(value)) for name, value in same if name != "config"]


def write_docs(docs: Path, text: str, plot: Path) -> None:
    """Puts the table into balance.md, where that is marked, and the plot beside it."""
    page = docs / "balance.md"
    old = page.read_text(encoding="utf-8")
    new, count = DOCS.subn(lambda found: f"{found[1]}{text}\n{found[2]}", old)
    check(count == 1, f"{str(page)!r} has {count} places marked for the table, want one: <!-- table -->, then a block")
    write_text(page, new)
    shutil.copyfile(plot, docs / "balance.png")


def draw(runs: Sequence[Run], file: Path) -> None:
    """Load and held-out loss over the steps, the mean over an arm's seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 2)
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms_of(runs)}
    draw_load(above, by_arm)
    draw_loss(below, by_arm)
    for axis in (*above, *below):
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
    figure.savefig(file, dpi=110)


def draw_load(axes, by_arm: Mapping[Arm, Sequence[Run]]) -> None:
    """Left: busiest and idlest expert of each row of loads. Right: the variance. Both of the worst layer."""
    extremes, variance = axes
    for i, (arm, runs) in enumerate(by_arm.items()):
        style = {"color": f"C{i}", "linewidth": 1.3}
        steps = [row["step"] for row in runs[0].loads]
        found = [[worst_layer(np.array(row["load"], np.float64)) for row in run.loads] for run in runs]
        busiest, idlest, spread = (
            np.mean([[getattr(one, name) for one in rows] for rows in found], 0) for name in Balance._fields[:3]
        )
        extremes.plot(steps, busiest, label=arm.name, **style)
        extremes.plot(steps, idlest, **style)
        variance.semilogy(steps, np.maximum(spread, 1e-6), **style)
    extremes.axhspan(1 - WITHIN, 1 + WITHIN, color="tab:green", alpha=0.15)
    extremes.set(ylabel="load / mean", title="Busiest and idlest expert, worst layer (band: within 20%)")
    extremes.legend(fontsize="small")
    variance.axhline(VARIANCE, color="black", linewidth=0.8, linestyle="--")
    variance.set(ylabel="variance of load / mean", title="Variance of the load, worst layer (line: 0.1)")


def draw_loss(axes, by_arm: Mapping[Arm, Sequence[Run]]) -> None:
    """Left: held-out loss during the training. Right: the perplexity over that of the base, with the same seeds."""
    loss, apart = axes
    base = base_of(list(by_arm))
    curves = {arm: {run.seed: column(run.curve, "nll") for run in runs} for arm, runs in by_arm.items()}
    for i, (arm, runs) in enumerate(by_arm.items()):
        style = {"color": f"C{i}", "linewidth": 1.3}
        steps = column(runs[0].curve, "step")
        loss.plot(steps, np.mean(list(curves[arm].values()), 0), label=arm.name, **style)
        common = curves[arm].keys() & curves.get(base, {}).keys()
        if arm != base and common:
            higher = [np.expm1(curves[arm][seed] - curves[base][seed]) for seed in common]
            apart.plot(steps, 100 * np.mean(higher, 0), **style)
    loss.set(ylabel="nats a token", title="Held-out loss, a part of the text")
    loss.legend(fontsize="small")
    apart.axhline(0.0, color="black", linewidth=0.8)
    apart.set(ylabel="%", title=f"Its perplexity above that of {base.name if base else 'loss_free'}")


def column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)
