"""What `compare_balance.py` reads from its runs: the load of the experts in a window of steps, held-out numbers, costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.checks import check
from dsv3.train.records import load_numbers, read_rows
from dsv3.train.schedule_paper import PAPER_START

LOSS_FREE, NONE, AUXILIARY = "loss_free", "none", "auxiliary"
WITHIN, VARIANCE = 0.2, 0.1  # what counts as even
FREE = ("bias_rate", "balance_weight")  # settings that arms differ in
Rows = Sequence[Mapping[str, Any]]


class Arm(NamedTuple):
    """How experts are kept balanced: γ of the selection bias, α of the sequence-wise loss."""

    bias_rate: float
    balance_weight: float

    @property
    def name(self) -> str:
        if self.bias_rate:
            return f"{LOSS_FREE}:{self.bias_rate:g}"
        return f"{AUXILIARY}:{self.balance_weight:g}" if self.balance_weight else NONE

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-")

    @property
    def rank(self) -> tuple[Any, ...]:
        """Where an arm stands in the table."""
        return (0 if self.bias_rate else 1, *self)


PAPER = Arm(PAPER_START.bias_rate, PAPER_START.balance_weight)


class Run(NamedTuple):
    """A finished run. `nll`: nats a token of held-out text; `loads`, `curve`: rows of kind `load` and `heldout`."""

    arm: Arm
    seed: int
    settings: dict[str, Any]
    steps: int
    bits_per_byte: float
    nll: float
    loads: Rows
    curve: Rows


class Balance(NamedTuple):
    """How even a load `[layers, E]` is in its worst layer, see `load_numbers`."""

    busiest: float
    idlest: float
    variance: float
    entropy: float
    unused: int

    @property
    def even(self) -> bool:
        return self.busiest <= 1 + WITHIN and self.idlest >= 1 - WITHIN and self.variance < VARIANCE


def is_finished(folder: Path) -> bool:
    """Whether a run has written its report, which it does last."""
    return (folder / "results.json").exists() and (folder / "report.html").exists()


def read_run(folder: Path) -> Run:
    """Reads a finished run of `pretrain.py`.

    Raises:
      ValueError: it has no mixture layer, or a file is not what that program writes.
    """
    rows = read_rows(folder / "log.jsonl")
    loads, curve = ([row for row in rows if row["kind"] == kind] for kind in ("load", "heldout"))
    check(bool(loads), f"{str(folder)!r} has no loads of experts, want a model with a mixture layer")
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        held = json.loads((folder / "results.json").read_text(encoding="utf-8"))["heldout"]
        arm = Arm(*(float(settings[name]) for name in FREE))
        return Run(arm, int(settings["seed"]), settings, loads[-1]["step"], held["bits_per_byte"], held["nll"], loads, curve)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} is no run of pretrain.py ({type(error).__name__}: {error})") from None


def check_same(runs: Sequence[Run]) -> None:
    """Refuses runs that differ in more than their arm and their seed: in the model, the data or a flag."""

    def common(run: Run, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name, value in run.settings.items() if name not in names}

    by_seed = ("seed", "corpus", "tokenizer", "mixture")  # they are a seed's own, and the same for all of its arms
    first: dict[int, Run] = {}
    for run in runs:
        pairs = [(runs[0], (*FREE, *by_seed)), (first.setdefault(run.seed, run), FREE)]
        for other, names in pairs:
            a, b = common(run, names), common(other, names)
            wrong = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
            what = f"{run.arm.name}, seed {run.seed}, and {other.arm.name}, seed {other.seed}"
            check(not wrong, f"the runs {what}, differ in {', '.join(wrong)}; want the same but for the balance")


def window_load(loads: Rows, end: int, steps: int) -> tuple[np.ndarray, int]:
    """Sums the loads of the rows that lie in the `steps` steps up to `end`.

    Returns:
      Tokens by layer and expert, and of how many steps: fewer where a row begins before the window. If no row lies in it,
      those of the last row up to `end`.
    """
    before = [row for row in loads if row["step"] <= end]
    inside = [row for row in before if row["step"] - row["steps"] >= end - steps] or before[-1:]
    return np.sum([row["load"] for row in inside], 0, dtype=np.float64), sum(row["steps"] for row in inside)


def worst_layer(load: np.ndarray) -> Balance:
    """Each number of the layer where it is worst."""
    found = load_numbers(load)
    return Balance(
        max(found["max_load"]), min(found["min_load"]), max(found["load_variance"]), min(found["load_entropy"]),
        max(found["unused"]),
    )  # fmt: skip


def even_since(loads: Rows, steps: int) -> int | None:
    """The end of the first window of `steps` steps from which on all are even, `None` if the last is not."""
    since = None
    for row in reversed(loads):
        if row["step"] < steps or not worst_layer(window_load(loads, row["step"], steps)[0]).even:
            break
        since = row["step"]
    return since


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """The arms in the table's order."""
    return sorted({run.arm for run in runs}, key=lambda arm: arm.rank)


def base_of(arms: Sequence[Arm]) -> Arm | None:
    """What the others are compared with: loss-free with the paper's γ, else with the smallest, `None` if there is none."""
    free = [arm for arm in arms if arm.bias_rate]
    return PAPER if PAPER in free else next(iter(free), None)


def compare(runs: Sequence[Run], window: float) -> dict[str, dict[str, Any]]:
    """The numbers of each arm; those of the balance are lists, by seed."""
    by_arm = {arm: sorted((r for r in runs if r.arm == arm), key=lambda r: r.seed) for arm in arms_of(runs)}
    base = base_of(arms_of(runs))
    against = {run.seed: run.nll for run in by_arm.get(base, [])}
    results = {}
    for arm, found in by_arm.items():
        steps = [max(1, round(window * run.steps)) for run in found]
        loads = [window_load(run.loads, run.steps, count) for run, count in zip(found, steps)]
        balance = [worst_layer(load) for load, _ in loads]
        results[arm.name] = {
            **arm._asdict(),
            "seeds": [run.seed for run in found],
            "bits_per_byte": [run.bits_per_byte for run in found],
            "perplexity": [math.exp(run.nll) for run in found],
            "cost": [] if arm == base else [math.exp(r.nll - against[r.seed]) - 1 for r in found if r.seed in against],
            **{name: [getattr(one, name) for one in balance] for name in (*Balance._fields, "even")},
            "since": [even_since(run.loads, count) for run, count in zip(found, steps)],
            "window": steps,
            "summed": [count for _, count in loads],
            "by_layer": [load_numbers(load) for load, _ in loads],
        }
    return results
