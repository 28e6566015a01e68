"""Checkpoints looked at, compared and averaged, in NumPy and leaf by leaf, without the state that they belong to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.nn.model import ModelParams, RouterState, model_specs, router_init
from dsv3.train.checkpoint import flat_settings, list_checkpoints, read_meta
from dsv3.train.checkpoint_files import DTYPES, BlockReader, DamagedError
from dsv3.train.watch import component_of

SHARES = ("params", "ema", "opt", "router", "amax", "step", "tokens")


class CheckpointFile(NamedTuple):
    """An opened checkpoint: its `path`; `meta`, what `checkpoint.json` holds; `reader`, of its leaves."""

    path: Path
    meta: dict[str, Any]
    reader: BlockReader

    def read(self, leaf: str) -> np.ndarray:
        """Returns a whole leaf; `ValueError` if its digest is wrong."""
        shape = self.meta["leaves"][leaf]["shape"]
        try:
            return self.reader.read(leaf, [0] * len(shape), shape)
        except DamagedError as damage:
            raise ValueError(f"checkpoint {self.path} is damaged ({damage})") from None


class LeafNumbers(NamedTuple):
    """A component of a state: its `leaves`, `values`, `bytes`, Euclidean `norm`, and `bad`, values that are not finite."""

    leaves: int
    values: int
    bytes: int
    norm: float
    bad: int


class LeafChange(NamedTuple):
    """How a leaf differs: `change`, `‖b − a‖ / ‖a‖`; `largest`, of `|b − a|`; `bad`, values of b that are not finite."""

    path: str
    change: float
    largest: float
    bad: int


class CheckpointDiff(NamedTuple):
    """`settings`: name to the two values; `only`: leaves that one has and the other has not, or of another shape; `leaves`:
    `LeafChange` of the others; `steps`, of the two."""

    settings: dict[str, tuple[Any, Any]]
    only: list[str]
    leaves: list[LeafChange]
    steps: tuple[int, int]


def open_checkpoint(path: str | os.PathLike) -> CheckpointFile:
    """Opens a checkpoint's folder, or the latest one of a folder of checkpoints or of a run.

    Raises:
      ValueError: there is none, or it is damaged; leaves are checked as they are read.
    """
    given = Path(path)
    found = [given] if (given / "checkpoint.json").exists() else []
    found = found or list_checkpoints(given) or list_checkpoints(given / "checkpoints")
    check(bool(found), f"open_checkpoint: {str(given)!r} is no checkpoint and holds none")
    try:
        meta = read_meta(found[-1] / "checkpoint.json")
        return CheckpointFile(found[-1], meta, BlockReader(found[-1], meta["files"], meta["leaves"]))
    except DamagedError as damage:
        raise ValueError(f"checkpoint {found[-1]} is damaged ({damage})") from None


def checkpoint_numbers(file: CheckpointFile) -> dict[str, LeafNumbers]:
    """Reads every leaf, which checks its digest, and counts by component, as `params/attention` or `opt/mu/head`."""
    found: dict[str, LeafNumbers] = {}
    for leaf, about in file.meta["leaves"].items():
        values, name = file.read(leaf), _group(leaf)
        floats = values.astype(np.float64)
        finite = np.isfinite(floats)
        old = found.get(name, LeafNumbers(0, 0, 0, 0.0, 0))
        found[name] = LeafNumbers(
            old.leaves + 1, old.values + values.size, old.bytes + values.size * DTYPES[about["dtype"]].size,
            float(np.sqrt(old.norm**2 + np.square(floats[finite]).sum())), old.bad + int((~finite).sum()),
        )  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def checkpoint_diff(a: CheckpointFile, b: CheckpointFile, *, share: str = "") -> CheckpointDiff:
    """Compares two checkpoints.

    Args:
      a, b: the checkpoints.
      share: compare only leaves below this path, such as `"params"`; default: all.
    """
    old, new = (flat_settings(file.meta["settings"]) for file in (a, b))
    absent = "not set"
    names = [name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent)]
    mine, theirs = ({p: v for p, v in file.meta["leaves"].items() if _below(p, share)} for file in (a, b))
    same = [path for path in mine if path in theirs and mine[path]["shape"] == theirs[path]["shape"]]
    only = [f"{path} {about['shape']}" for side in (mine, theirs) for path, about in side.items() if path not in same]
    changes = []
    for path in same:
        x, y = (file.read(path).astype(np.float64) for file in (a, b))
        alike = (x == y) | (np.isnan(x) & np.isnan(y))
        gap = np.where(alike, 0.0, y) - np.where(alike, 0.0, x)
        change, size = np.linalg.norm(gap.ravel()), np.linalg.norm(x[np.isfinite(x)])
        relative = 0.0 if change == 0 else float(change / size) if size and np.isfinite(change) else float("inf")
        largest = float(np.abs(gap).max(initial=0.0)) if np.isfinite(change) else float("inf")
        changes.append(LeafChange(path, relative, largest, int((~np.isfinite(y)).sum())))
    settings = {name: (old.get(name, absent), new.get(name, absent)) for name in names}
    return CheckpointDiff(settings, only, changes, (a.meta["step"], b.meta["step"]))


def checkpoint_model(
    files: Sequence[CheckpointFile], cfg: ModelConfig, *, share: str = "params", weights: Sequence[float] | None = None
) -> tuple[ModelParams, RouterState]:
    """Returns the weighted mean of the parameters of checkpoints, with the selection biases averaged likewise.

    Args:
      files: checkpoints of one model.
      cfg: its configuration, see `checkpoint_config`.
      share: `"params"`, or `"ema"` for the averages that the runs kept.
      weights: of each checkpoint; default: equal ones.

    Returns:
      Parameters in float32 and `RouterState`, as NumPy arrays; one leaf of each checkpoint is in memory at a time.

    Raises:
      ValueError: no file, a checkpoint without such leaves or of another model, weights that do not sum to more than 0.
    """
    check(bool(files), "checkpoint_model: no checkpoint is given, want at least one")
    given = np.ones(len(files)) if weights is None else np.asarray(weights, np.float64)
    check(given.shape == (len(files),), f"checkpoint_model: {given.size} weights for {len(files)} checkpoints, want as many")
    check(given.sum() > 0 and (given >= 0).all(), f"checkpoint_model: `weights` are {given.tolist()}, want some above 0")
    given = given / given.sum()

    def mean(prefix: str, like: Any) -> Any:
        leaves = []
        for path, spec in tree.items(like):
            name, shape, total = f"{prefix}.{path}", list(spec.shape), np.zeros(spec.shape, np.float64)
            for file, weight in zip(files, given):
                about = file.meta["leaves"].get(name)
                check(about is not None, f"checkpoint_model: {str(file.path)!r} has no `{name}`")
                same = about["shape"] == shape
                check(same, f"checkpoint_model: `{name}` in {str(file.path)!r} has shape {about['shape']}, want {shape}")
                total += weight * file.read(name).astype(np.float64)
            leaves.append(total.astype(np.float32))
        return tree.unflatten_as(like, leaves)

    return mean(share, model_specs(cfg)), mean("router", router_init(cfg))


def _group(leaf: str) -> str:
    """`opt.mu.moe.mla.q_a` is part of `opt/mu/attention`."""
    parts = leaf.split(".")
    if parts[0] in ("params", "ema"):
        return f"{parts[0]}/{component_of('.'.join(parts[1:]))}"
    if parts[0] == "opt" and len(parts) > 2:
        return f"opt/{parts[1]}/{component_of('.'.join(parts[2:]))}"
    return parts[0] if parts[0] != "opt" else "/".join(parts)


def _order(name: str) -> tuple[int, str]:
    first = name.split("/")[0]
    return (SHARES.index(first) if first in SHARES else len(SHARES), name)


def _below(path: str, share: str) -> bool:
    return not share or path == share or path.startswith(f"{share}.")


def checkpoint_config(files: Sequence[CheckpointFile]) -> ModelConfig:
    """Returns the configuration that a run's checkpoints were trained with, which its stages may change.

    Raises:
      ValueError: they have none, or unlike ones.
    """
    found = [(file.meta["cursor"] or {}).get("config") for file in files]
    for file, config in zip(files, found):
        check(isinstance(config, dict), f"checkpoint_config: {str(file.path)!r} has no `config`, want one of pretrain.py")
    same = all(config == found[0] for config in found)
    check(same, "checkpoint_config: the checkpoints are of stages with unlike configurations, want those of one stage")
    return ModelConfig.from_hf(found[0])
