"""Training checkpoints: the whole state and the settings of a run, written so that a kill at any moment costs no other one.

A checkpoint is a folder `step-00000400` with `checkpoint.json` (step, settings, digests) and the state in safetensors files,
one for each process: `state.safetensors`, or `state-00000-of-00004.safetensors` and so on. A state on a mesh is written as
it lies there, each part once, and is restored to any other layout. All is written beside under a hidden name, synced, and
renamed: a folder with the plain name is whole, and the digests show it if the disk has lost a part of it since.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3 import tree
from dsv3.checks import check, check_same_tree
from dsv3.parallel.collectives import together
from dsv3.parallel.mesh import layout_of, pack, shard_box
from dsv3.train.checkpoint_files import (
    DTYPES,
    NAMES,
    Block,
    BlockReader,
    DamagedError,
    block_values,
    digest_of,
    held_blocks,
    state_bytes,
    sync_file,
    sync_folder,
    write_blocks,
)
from dsv3.typing import Tree

META_FILE = "checkpoint.json"
FORMAT = 3

_FOLDER = re.compile(r"step-(\d{8,})")
_FAILURES = (DamagedError, ValueError, OSError)


class Checkpoint(NamedTuple):
    """What `restore_checkpoint` found: the `state`, the `settings` and the `cursor` it was saved with, and its `path`."""

    state: Tree
    settings: dict[str, Any]
    cursor: Any
    path: Path


class Keep(NamedTuple):
    """Which checkpoints stay: the `last` ones, those of every `every`-th step (0: none of them), and the latest of a step
    that is an `anchor`, which a run may have to go back to."""

    last: int = 3
    every: int = 0
    anchor: Callable[[int], bool] = lambda step: False


def save_checkpoint(
    directory: str | os.PathLike, state: Tree, settings: Mapping[str, Any], *, step: int, cursor: Any = None,
    keep: Keep = Keep(),
) -> Path:  # fmt: skip
    """Writes a checkpoint atomically and removes those that need not stay.

    Several processes call it at the same time with the same arguments and a folder that all of them see; each writes what
    its devices hold, and the first puts the parts together when all are there. `BackgroundSaver` does the same while the
    training goes on.

    Args:
      directory: the folder of checkpoints; made if it is not there.
      state: a tree of tensors, variables or DTensors, as `TrainState`.
      settings: what a run must have in common with this one to go on from it; JSON values.
      step: optimiser steps done; it names the checkpoint.
      cursor: where the run is beside its state, such as in its data; a JSON value that is given back.
      keep: which checkpoints stay.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: `keep` below 1, a negative step, settings that are not JSON, a leaf of another dtype, too little space.
      OSError: the folder cannot be written, by this process or by another one.
    """
    job = begin_save(directory, state, settings, step=step, cursor=cursor, keep=keep)
    with job.failing():
        with together(job.mesh, *_FAILURES):
            job.write(block_values(job.blocks, state))
        return job.commit()


class SaveJob:
    """A checkpoint that is being written: `write` puts this process's part into the hidden folder, `commit` ends it when all
    processes have done so. Made by `begin_save`."""

    def __init__(self, root: Path, meta: Mapping[str, Any], blocks: list[Block], mesh: dtensor.Mesh | None, keep: Keep):
        self.root, self.meta, self.blocks, self.mesh, self.keep = root, meta, blocks, mesh, keep
        self.first = dtensor.client_id() == 0
        self.final = root / f"step-{meta['step']:08d}"
        self.part = root / f".{self.final.name}.part"
        self._about: dict[str, Any] = {}

    def write(self, values: Iterable[np.ndarray]) -> None:
        """Writes this process's blocks."""
        name = _file_name(dtensor.client_id())
        self._about = write_blocks(self.part / name, self.blocks, values)
        if not self.first:
            _write_json(self.part / f"{name}.json", self._about)

    def agree(self, failures: list[BaseException]) -> None:
        """Raises the failure of this process or of another one. Every process calls it."""
        with together(self.mesh, *_FAILURES):
            if failures:
                raise failures.pop()

    def commit(self) -> Path:
        """Puts the parts together, gives the checkpoint its name, and removes old ones. Every process calls it."""
        with together(self.mesh, *_FAILURES):
            if self.first:
                others = [_file_name(client) for client in range(1, dtensor.num_clients())]
                files = {_file_name(0): self._about}
                files |= {other: json.loads((self.part / f"{other}.json").read_text()) for other in others}
                meta = {**self.meta, "files": files}
                _write_json(self.part / META_FILE, meta | {"digest": _meta_digest(meta)})
                for other in others:
                    (self.part / f"{other}.json").unlink()
                sync_folder(self.part)
                _exchange(self.part, self.final)
                _remove_old(self.root, self.final, self.keep)
        return self.final

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Removes what was written, and makes one line of what the system says, when something cannot be written."""
        try:
            yield
        except OSError as error:
            if self.first:
                shutil.rmtree(self.part, ignore_errors=True)
            raise OSError(f"save_checkpoint: cannot write to {str(self.root)!r} ({error.strerror or error})") from None


def begin_save(
    directory: str | os.PathLike, state: Tree, settings: Mapping[str, Any], *, step: int, cursor: Any = None,
    keep: Keep = Keep(),
) -> SaveJob:  # fmt: skip
    """Checks everything and makes room for a checkpoint; the arguments are those of `save_checkpoint`."""
    check(keep.last >= 1, f"save_checkpoint: `keep.last` is {keep.last}, want at least 1")
    check(keep.every >= 0, f"save_checkpoint: `keep.every` is {keep.every}, want at least 0")
    check(step >= 0, f"save_checkpoint: `step` is {step}, want at least 0")
    given = {"settings": dict(settings), "cursor": cursor}
    for name, value in given.items():
        try:
            given[name] = json.loads(json.dumps(value))  # as it will be read: keys are strings, sequences are lists
        except (TypeError, ValueError) as error:
            raise ValueError(f"save_checkpoint: `{name}` cannot be written as JSON: {error}") from None
    size, mesh = state_bytes(state), _mesh_of(state, "save_checkpoint")
    leaves = {path: {"dtype": NAMES[x.dtype], "shape": x.shape.as_list()} for path, x in tree.items(state)}
    meta = {"format": FORMAT, "step": step, **given, "leaves": leaves}
    job = SaveJob(Path(directory), meta, list(held_blocks(state)), mesh, keep)
    with job.failing(), together(mesh, *_FAILURES):
        if job.first:
            _make_room(job.root, job.part, size)
    return job


def _mesh_of(leaves: Tree, function: str) -> dtensor.Mesh | None:
    """The mesh of DTensors or layouts, `None` for plain tensors."""
    layouts = [leaf if isinstance(leaf, dtensor.Layout) else layout_of(leaf) for leaf in tree.flatten(leaves)]
    placed = [layout for layout in layouts if layout is not None]
    few, all_ = len(placed), len(layouts)
    check(few in (0, all_), f"{function}: only {few} of {all_} leaves are on a mesh, want all or none")
    count = dtensor.num_clients()
    check(bool(placed) or count == 1, f"{function}: the state is not on a mesh, want that with {count} processes")
    return placed[0].mesh if placed else None


def _file_name(client: int) -> str:
    count = dtensor.num_clients()
    return "state.safetensors" if count == 1 else f"state-{client:05d}-of-{count:05d}.safetensors"


def _make_room(root: Path, part: Path, size: int) -> None:
    """Makes an empty folder to write to, after removing what killed processes have left."""
    root.mkdir(parents=True, exist_ok=True)
    _put_back(root)
    for left in root.glob(".step-*"):  # of a process that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(root).free
    check(free >= size, f"save_checkpoint: {root} wants {size:,} bytes, {free:,} are free")
    part.mkdir()


def _remove_old(root: Path, final: Path, keep: Keep) -> None:
    found = list_checkpoints(root)
    anchors = [path for path in found if keep.anchor(checkpoint_step(path))]
    for old in found[: -keep.last]:
        if old not in (final, *anchors[-1:]) and not (keep.every and checkpoint_step(old) % keep.every == 0):
            _remove(old)


def drop_checkpoints(directory: str | os.PathLike, *, after: int) -> None:
    """Removes the checkpoints of later steps than `after`, to which a run has gone back. One process calls it."""
    for path in list_checkpoints(directory):
        if checkpoint_step(path) > after:
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.gone")), ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        sync_file(file)


def list_checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Returns the folders of a directory that are named as checkpoints, the latest last; empty without a directory."""
    root = Path(directory)
    found = [path for path in root.iterdir() if _FOLDER.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Returns the step in a checkpoint's name.

    >>> checkpoint_step(Path("runs/demo/checkpoints/step-00000400"))
    400
    """
    return int(_FOLDER.fullmatch(path.name)[1])


def restore_checkpoint(
    directory: str | os.PathLike,
    like: Tree,
    *,
    layouts: Tree | None = None,
    settings: Mapping[str, Any] | None = None,
    accept: Callable[[int], bool] | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Checkpoint | None:
    """Reads the latest checkpoint that is whole, in whatever layout and by however many processes it was written.

    A damaged one is reported and the one before it taken. Once a whole one is found, the damaged ones are renamed to
    `step-....damaged`; while there is none, all stay as they are.

    Args:
      directory: the folder of checkpoints; several processes must see the same.
      like: a tree with the structure, shapes and dtypes of the state, tensors or specs; its values are not looked at.
      layouts: a tree like it of layouts (`state_layouts`), in which each process reads only what its devices hold; `None`:
        plain tensors.
      settings: the settings of the run that wants to go on; `None`: any.
      accept: whether a checkpoint of a step may be taken; default: any.
      on_skip: called with one line about each damaged checkpoint; default: a warning.

    Returns:
      `Checkpoint`, or `None` where there is no checkpoint to take at all, not even a damaged one.

    Raises:
      ValueError: checkpoints are there, but none is whole; other settings, or a state of another structure, by name.
      OSError: a file is there, but cannot be read now; that is no damage.
    """
    root, damaged = Path(directory), []
    mesh, first = _mesh_of(() if layouts is None else layouts, "restore_checkpoint"), dtensor.client_id() == 0
    with together(mesh, *_FAILURES):
        if first:
            _put_back(root)
    found = [path for path in list_checkpoints(root) if accept is None or accept(checkpoint_step(path))]
    for path in reversed(found):
        try:
            with together(mesh, *_FAILURES):
                meta = read_meta(path / META_FILE)
                if settings is not None:
                    check_settings(meta["settings"], settings, where=str(path))
                state = _read_state(path, meta, like, layouts)
        except DamagedError as damage:
            message = f"checkpoint {path} is damaged ({damage})" + ("; taking the one before it" if path != found[0] else "")
            warnings.warn(message, stacklevel=2) if on_skip is None else on_skip(message)
            damaged.append(path)
            continue
        except OSError as error:
            file = error.filename or str(path)
            raise OSError(f"restore_checkpoint: cannot read {file!r} ({error.strerror or error})") from None
        for other in damaged if first else ():
            _set_aside(other)
        return Checkpoint(state, meta["settings"], meta["cursor"], path)
    count = len(damaged) + (0 if accept else len(list(root.glob("step-*.damaged*"))))
    check(
        not count,
        f"restore_checkpoint: none of the {count} checkpoints in {os.fspath(directory)!r} is whole, "
        "want this folder emptied or another folder",
    )
    return None


def _put_back(root: Path) -> None:
    """Ends what a kill has left undone while a step was saved again: the old one had made way, the new one had not come."""
    for old in root.glob(".step-*.old"):
        final = root / old.name[1 : -len(".old")]
        if not final.exists():
            old.rename(final)


def _exchange(part: Path, final: Path) -> None:
    """Gives a checkpoint its name; an older one of that name stays until then, if under a hidden one (see `_put_back`)."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    try:
        part.rename(final)
    except OSError:
        _put_back(final.parent)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Renames a damaged checkpoint to a free name; it may stay where that cannot be."""
    names = (path.with_name(f"{path.name}.damaged" + (f"-{n}" if n > 1 else "")) for n in itertools.count(1))
    with contextlib.suppress(OSError):
        path.rename(next(name for name in names if not name.exists()))


def check_settings(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> None:
    """Raises `ValueError` that names each setting in which a run differs from the one it wants to go on from.

    Args:
      saved: settings of the run that is there. wanted: settings of this run. Values as JSON keeps them; nested mappings
        are compared field by field.
      where: what the message calls the run that is there.
    """
    old, new = (flat_settings(json.loads(json.dumps(settings))) for settings in (saved, wanted))
    absent = object()
    names = [name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent)]
    if names:
        parts = [f"`{name}` is {new.get(name, 'not set')!r} here, {old.get(name, 'not set')!r} there" for name in names]
        more = f" (and {len(parts) - 3} more)" if len(parts) > 3 else ""
        raise ValueError(f"cannot go on from {where}, other settings: {'; '.join(parts[:3])}{more}")


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _read_state(path: Path, meta: Mapping[str, Any], like: Tree, layouts: Tree | None) -> Tree:
    """Reads the leaves, one after the other."""
    want, stored = tree.to_dict(like), meta["leaves"]
    check_same_tree("restore_checkpoint", str(path), stored, want)
    for name, leaf in want.items():
        dtype, shape = DTYPES[stored[name]["dtype"]], tf.TensorShape(stored[name]["shape"])
        check(
            dtype == leaf.dtype and shape == leaf.shape,
            f"restore_checkpoint: `{name}` in {str(path)!r} is {dtype.name} {shape}, want {leaf.dtype.name} {leaf.shape}",
        )
    reader = BlockReader(path, meta["files"], stored)
    places = itertools.repeat(None) if layouts is None else tree.flatten(layouts)
    leaves = [_read_leaf(reader, name, leaf.shape.as_list(), layout) for (name, leaf), layout in zip(want.items(), places)]
    return tree.unflatten_as(like, leaves)


def _read_leaf(reader: BlockReader, path: str, shape: list[int], layout: dtensor.Layout | None) -> tf.Tensor:
    """Reads a leaf whole, or as a DTensor; a box that several devices hold alike is read once."""
    if layout is None:
        return tf.constant(reader.read(path, [0] * len(shape), shape))
    boxes = [shard_box(shape, layout, place) for place in layout.mesh.local_device_locations()]
    values = {box: tf.constant(reader.read(path, *box)) for box in dict.fromkeys(boxes)}
    return pack([values[box] for box in boxes], layout)


def read_meta(path: Path) -> dict[str, Any]:
    """Reads a `checkpoint.json`; `DamagedError` unless it is what was written."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        digest = meta.pop("digest")
        known = meta["format"] == FORMAT
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"{path.name} is not what was written") from None
    if digest != _meta_digest(meta):
        raise DamagedError(f"the checksum of {path.name} is wrong")
    check(known, f"restore_checkpoint: {str(path)!r} has format {meta['format']}, want {FORMAT}")
    return meta


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(meta, sort_keys=True).encode())
