"""What a run writes down: JSON lines, and TensorBoard events that are made from them.

A row is a flat mapping with a `kind` and a `step`::

    {"kind": "train", "step": 12, "tokens": 49152, "loss": 7.9, "nll": 6.1, "mtp": [6.2], "load_violation": [0.4, 0.3], ...}
    {"kind": "heldout", "step": 100, "nll": 5.2, "bits_per_byte": 2.4, ...}
    {"kind": "load", "step": 100, "steps": 20, "load": [[512, 498, ...], ...], "max_load": [1.1, ...], ...}
    {"kind": "watch", "step": 100, "grad_norms": {"attention": 0.4, ...}, "update_ratios": {...}, ...}

A run that goes on from step n cuts the rows after n, so that no step stands there twice. What went wrong (`skipped` and
`rollback` rows) is in `trouble.jsonl`, of which nothing is ever cut: it tells what happened, in its order.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dsv3.checks import check
from dsv3.train.state import TrainMetrics

LOG_FILE, TROUBLE_FILE, EVENTS_FOLDER = "log.jsonl", "trouble.jsonl", "tensorboard"
TROUBLE = ("skipped", "rollback")  # kinds of rows that go to `TROUBLE_FILE`


class RunLog:
    """Appends rows to `log.jsonl` and to the events of TensorBoard; a context manager.

    Args:
      directory: the run's folder; made if it is not there.
      step: the step that the run goes on from; rows after it are cut. `None`: a new run, whose log begins anew.

    Raises:
      ValueError: the log has something that is not a row.
      OSError: it cannot be written; also of `write`, `sync` and `close`.
    """

    def __init__(self, directory: str | os.PathLike, *, step: int | None = None):
        root = Path(directory)
        self._path, self._trouble, self._folder = root / LOG_FILE, root / TROUBLE_FILE, root / EVENTS_FOLDER
        with _writing(self._path):
            root.mkdir(parents=True, exist_ok=True)
            if step is None:
                self._trouble.unlink(missing_ok=True)
            elif self._trouble.exists():  # without what a crash has left unfinished at its end
                _write_rows(self._trouble, read_rows(self._trouble))
        self._open(step)

    def _open(self, step: int | None) -> None:
        with _writing(self._path):
            rows = cut_rows(self._path, step)
            self._file = open(self._path, "a", encoding="utf-8")
        with _writing(self._folder):
            for old in self._folder.glob("events.out.tfevents.*"):  # whole once more from the rows that stay
                old.unlink()
            with tf.device("CPU:0"):
                self._events = tf.summary.create_file_writer(str(self._folder))
            for row in rows:
                self._write_event(row)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row; whoever reads the file sees it whole."""
        if row["kind"] in TROUBLE:
            with _writing(self._trouble), open(self._trouble, "a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"time": round(time.time(), 1)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            return
        with _writing(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        with _writing(self._folder):
            self._write_event(row)

    def rewind(self, step: int) -> None:
        """Cuts the rows after a step that the run has gone back to; with 0 those of before the first step stay."""
        self.close()
        self._open(step)

    def sync(self) -> None:
        """Makes sure that what was written outlives a crash of the machine; to be called before a checkpoint is saved."""
        with _writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        with _writing(self._folder):
            self._events.flush()

    def close(self) -> None:
        """Closes both."""
        try:
            with _writing(self._path):
                self._file.close()
        finally:
            with _writing(self._folder):
                self._events.close()

    def _write_event(self, row: Mapping[str, Any]) -> None:
        scalars = row_scalars(row)
        values = [tf.compat.v1.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        if values:
            with self._events.as_default():
                summary = tf.compat.v1.Summary(value=values).SerializeToString()
                tf.summary.experimental.write_raw_pb(summary, step=row["step"])


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes one line of what the system, or TensorFlow's writer of events, says when `path` cannot be written."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.message
        raise OSError(f"RunLog: cannot write to {str(path)!r} ({' '.join((reason or str(error)).split())})") from None


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a log. What a crash left unfinished at its end is no row; a file that is not there has none.

    Raises:
      ValueError: something that is not a row stands before a row.
    """
    file = Path(path)
    rows: list[dict[str, Any]] = []
    broken = None
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else [], 1):
        try:
            row = json.loads(line)
            row = {"kind": str(row["kind"]), "step": int(row["step"]), **row}
        except (ValueError, KeyError, TypeError):
            broken = broken or number
            continue
        check(broken is None, f"read_rows: {os.fspath(path)!r} line {broken} is not a row of a log")
        rows.append(row)
    return rows


def cut_rows(path: str | os.PathLike, step: int | None) -> list[dict[str, Any]]:
    """Removes the rows after `step` from a log, atomically, and returns those that stay: with `None` none."""
    file, rows = Path(path), read_rows(path)
    stay = [] if step is None else [row for row in rows if row["step"] <= step]
    if file.exists():
        _write_rows(file, stay)
    return stay


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, file)


def row_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the scalars of a row under TensorBoard's tags; lists of scalars are numbered from 1, tables left out.

    >>> row_scalars({"kind": "train", "step": 1, "loss": 2.0, "mtp": [3.0], "norms": {"head": 4.0}})
    {'train/loss': 2.0, 'train/mtp_1': 3.0, 'train/norms/head': 4.0}
    """
    scalars = {}
    for name, value in row.items():
        if name in ("kind", "step") or isinstance(value, str):
            continue
        if isinstance(value, Mapping):
            scalars |= {f"{row['kind']}/{name}/{key}": float(v) for key, v in value.items()}
        elif isinstance(value, int | float):
            scalars[f"{row['kind']}/{name}"] = float(value)
        elif isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
            scalars |= {f"{row['kind']}/{name}_{i}": float(v) for i, v in enumerate(value, 1)}
    return scalars


class StepNumbers(NamedTuple):
    """A step's metrics as Python numbers: `row` for the log, and `load` `[X + modules, E]`, tokens by layer and expert."""

    row: dict[str, Any]
    load: np.ndarray


def step_numbers(step: int, metrics: TrainMetrics) -> StepNumbers:
    """Fetches a step's metrics.

    `load_violation` of a layer is `max(load) / mean(load) − 1`: 0 when every expert gets its fair share.

    Args:
      step: optimiser steps done.
      metrics: what the step returned.

    Returns:
      `StepNumbers`; layers in the order mixture layers, then MTP modules. From a mesh also the bytes and the padding of
      exchanges, `node_bytes` between nodes and `token_nodes`, the nodes that a token's experts are on.

    References: the violation is that of arXiv:2408.15664, section 4.1.
    """
    parts, optim = metrics.parts, metrics.optim
    load = np.concatenate([np.asarray(part) for part in parts.load])
    violation = load.max(1) / np.maximum(load.mean(1), 1e-9) - 1.0 if load.size else np.zeros(0)
    row = {
        "kind": "train",
        "step": step,
        "loss": float(metrics.loss),
        "nll": float(parts.nll),
        "mtp": [float(x) for x in np.asarray(parts.mtp)],
        "balance": float(parts.balance),
        "grad_norm": float(optim.grad_norm),
        "learning_rate": float(optim.learning_rate),
        "load_violation": [round(float(x), 6) for x in violation],
    }
    if "divergence" in parts._fields:  # of distillation
        row["divergence"] = float(parts.divergence)
    if metrics.mesh:
        row |= {"dispatch_bytes": int(metrics.mesh.bytes), "dispatch_padding": round(float(metrics.mesh.padding), 4)}
        row |= {"node_bytes": int(metrics.mesh.node_bytes), "token_nodes": round(float(metrics.mesh.token_nodes), 4)}
    return StepNumbers(row, load)


def load_numbers(load: np.ndarray) -> dict[str, Any]:
    """Describes how evenly tokens went to experts.

    Args:
      load: `[X + modules, E]`, tokens by layer and expert, of one step or the sum of several.

    Returns:
      `load`, as integers, and by layer: `max_load` and `min_load`, the busiest and the idlest expert's share over the fair
      share; `load_variance`, of the shares over the fair share; `load_entropy`, over that of fair shares, so that 1 is even
      and 0 all on one; `unused`, experts that got no token.

    >>> numbers = load_numbers(np.array([[3.0, 1.0, 0.0, 4.0]]))
    >>> numbers["max_load"], numbers["min_load"], numbers["load_variance"], numbers["unused"]
    ([2.0], [0.0], [0.625], [1])
    """
    share = load / np.maximum(load.sum(1, keepdims=True), 1e-9)
    fair = share * load.shape[1]
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(1) / max(math.log(load.shape[1]), 1e-9)
    numbers = {"max_load": fair.max(1), "min_load": fair.min(1), "load_variance": fair.var(1), "load_entropy": entropy}
    rounded = {name: [round(float(x), 6) for x in value] for name, value in numbers.items()}
    return {"load": load.astype(int).tolist(), **rounded, "unused": (load == 0).sum(1).tolist()}
