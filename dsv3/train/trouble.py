"""Trouble in a run: which steps are not taken, when to go back, and what of it a run has to remember.

A step is not taken when its loss or gradient is not finite, or far above those of the steps before it. Its batch is left
out, and recorded. After several such steps in a row the run goes back to its last checkpoint and goes on with the data that
comes after the bad batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsv3.checks import check
from dsv3.train.state import Limits


class Trouble(NamedTuple):
    """What counts as a spike, and what happens then.

    Attributes:
      window: steps that a loss is compared with.
      least: steps before anything but what is not finite counts as a spike.
      deviations: a loss may be so many deviations above the window's median; the deviation is 1.4826 times the median
        absolute one, which for normal losses is their standard deviation, and at least `least_deviation` nats.
      least_deviation: see there.
      norm_factor: a gradient's norm may be so many times the window's median.
      patience: steps in a row that are not taken, until the run goes back to its last checkpoint.
      rollbacks: how often it may go back in all.

    References: arXiv:2204.02311 section 5.1 goes back 100 steps and leaves out 200 to 500 batches.
    """

    window: int = 128
    least: int = 32
    deviations: float = 8.0
    least_deviation: float = 0.1
    norm_factor: float = 20.0
    patience: int = 4
    rollbacks: int = 8


class Cursor(NamedTuple):
    """Where a run is, beside its state; of JSON values, so that a checkpoint can hold it.

    Attributes:
      data: where the data is: what the feed gave with the last batch, `None` at the start.
      losses, norms: of the last steps taken, at most `Trouble.window`.
      skipped: steps in a row that were not taken. rollbacks: how often the run has gone back.
    """

    data: Any = None
    losses: Sequence[float] = ()
    norms: Sequence[float] = ()
    skipped: int = 0
    rollbacks: int = 0


def check_trouble(trouble: Trouble) -> None:
    """Raises `ValueError` for settings that cannot be."""
    low = {"window": 1, "least": 1, "patience": 1, "rollbacks": 0}
    for name, least in low.items():
        check(getattr(trouble, name) >= least, f"Trouble: `{name}` is {getattr(trouble, name)}, want at least {least}")
    check(trouble.least <= trouble.window, f"Trouble: `least` is {trouble.least}, want at most window={trouble.window}")
    for name in ("deviations", "least_deviation"):
        check(getattr(trouble, name) > 0, f"Trouble: `{name}` is {getattr(trouble, name)}, want above 0")
    check(trouble.norm_factor > 1, f"Trouble: `norm_factor` is {trouble.norm_factor}, want above 1")


def spike_limits(trouble: Trouble, cursor: Cursor) -> Limits:
    """Returns the largest loss and gradient norm with which the next step is taken.

    `loss ≤ median + deviations·max(1.4826·median|loss − median|, least_deviation)` and `norm ≤ norm_factor·median`.

    Args:
      trouble: see there.
      cursor: for the losses and norms of the steps before.

    >>> history = Cursor(losses=[2.0] * 32, norms=[0.5] * 32)
    >>> spike_limits(Trouble(deviations=5.0), history)
    Limits(loss=2.5, grad_norm=10.0)
    >>> spike_limits(Trouble(), Cursor(losses=[2.0], norms=[0.5]))
    Limits(loss=inf, grad_norm=inf)
    """
    if len(cursor.losses) < trouble.least:
        return Limits()
    median = statistics.median(cursor.losses)
    spread = 1.4826 * statistics.median(abs(loss - median) for loss in cursor.losses)
    loss = median + trouble.deviations * max(spread, trouble.least_deviation)
    return Limits(loss, trouble.norm_factor * statistics.median(cursor.norms))


def cursor_taken(cursor: Cursor, data: Any, row: Mapping[str, Any], trouble: Trouble) -> Cursor:
    """Returns where the run is after a step that was taken, with the loss and the norm of its `row`."""
    keep = trouble.window - 1
    losses = [*cursor.losses[max(0, len(cursor.losses) - keep) :], row["loss"]] if keep else [row["loss"]]
    norms = [*cursor.norms[max(0, len(cursor.norms) - keep) :], row["grad_norm"]] if keep else [row["grad_norm"]]
    return cursor._replace(data=data, losses=losses, norms=norms, skipped=0)


def cursor_skipped(cursor: Cursor, data: Any) -> Cursor:
    """Returns where the run is after a step that was not taken: only the data has moved."""
    return cursor._replace(data=data, skipped=cursor.skipped + 1)


def skip_reason(row: Mapping[str, Any], limits: Limits) -> str:
    """Says why a step was not taken.

    >>> skip_reason({"loss": 9.0, "grad_norm": 1.0}, Limits(4.5, 10.0))
    'loss 9.000 is above 4.500'
    """
    for name, label, limit in (("loss", "loss", limits.loss), ("grad_norm", "gradient norm", limits.grad_norm)):
        value = row[name]
        if not value - value == 0:
            return f"{label} {value} is not finite"
        if value > limit:
            return f"{label} {value:.3f} is above {limit:.3f}"
    return "not taken"
