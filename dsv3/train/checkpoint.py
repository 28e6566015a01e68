"""Training checkpoints: the whole state and the settings of a run, written so that a kill at any moment costs no other one.

A checkpoint is a folder `step-00000400` with `state.safetensors` (every leaf of the state under its path) and
`checkpoint.json` (step, tokens, settings, digests). It is written beside under a hidden name, synced, and renamed: a folder
with the plain name is whole, and the digests show it if the disk has lost a part of it since.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_same_tree
from dsv3.typing import Tree

STATE_FILE, META_FILE = "state.safetensors", "checkpoint.json"
FORMAT = 1

# dtype names of the safetensors format; `as_numpy_dtype` of bfloat16 is ml_dtypes'.
_DTYPES = {
    "BOOL": tf.bool, "U8": tf.uint8, "I8": tf.int8, "I16": tf.int16, "I32": tf.int32, "I64": tf.int64,
    "F16": tf.float16, "BF16": tf.bfloat16, "F32": tf.float32, "F64": tf.float64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FOLDER = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """What `restore_checkpoint` found: the `state`, the `settings` it was saved with, and the folder's `path`."""

    state: Tree
    settings: dict[str, Any]
    path: Path


class _DamagedError(Exception):
    """A checkpoint that is not whole; the message says what is wrong with it."""


def save_checkpoint(
    directory: str | os.PathLike, state: Tree, settings: Mapping[str, Any], *, step: int, keep: int = 3
) -> Path:
    """Writes a checkpoint atomically and removes all but the last ones.

    Args:
      directory: the folder of checkpoints; made if it is not there.
      state: a tree of tensors or variables, as `TrainState`.
      settings: what a run must have in common with this one to go on from it; JSON values.
      step: optimiser steps done; it names the checkpoint.
      keep: how many of the latest checkpoints stay.

    Returns:
      The checkpoint's folder.

    Raises:
      ValueError: `keep` below 1, a negative step, settings that are not JSON, a leaf of another dtype, too little space.
      OSError: the folder cannot be written.
    """
    check(keep >= 1, f"save_checkpoint: `keep` is {keep}, want at least 1")
    check(step >= 0, f"save_checkpoint: `step` is {step}, want at least 0")
    try:
        settings = json.loads(json.dumps(dict(settings)))  # as they will be read: keys are strings, sequences are lists
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_checkpoint: `settings` cannot be written as JSON: {error}") from None
    head, size = _encode_header(state)
    root = Path(directory)
    final = root / f"step-{step:08d}"
    part = root / f".{final.name}.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _put_back(root)
        for left in root.glob(".step-*"):  # of a process that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(root).free
        check(free >= size, f"save_checkpoint: {root} wants {size:,} bytes, {free:,} are free")
        part.mkdir()
        meta = {"format": FORMAT, "step": step, "settings": settings, "bytes": size}
        meta["state"] = _write_state(part / STATE_FILE, head, state)
        meta["digest"] = _meta_digest(meta)
        with open(part / META_FILE, "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            _sync(file)
        _sync_folder(part)
        _exchange(part, final)
        for old in list_checkpoints(root)[:-keep]:
            if old != final:
                shutil.rmtree(old.rename(root / f".{old.name}.gone"), ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"save_checkpoint: cannot write to {str(root)!r} ({error.strerror or error})") from None
    return final


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
    settings: Mapping[str, Any] | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Checkpoint | None:
    """Reads the latest checkpoint that is whole.

    A damaged one is reported and the one before it taken. Once a whole one is found, the damaged ones are renamed to
    `step-....damaged`; while there is none, all stay as they are.

    Args:
      directory: the folder of checkpoints.
      like: a tree with the structure, shapes and dtypes of the state; its values are not looked at.
      settings: the settings of the run that wants to go on; `None`: any.
      on_skip: called with one line about each damaged checkpoint; default: a warning.

    Returns:
      `Checkpoint`, or `None` where there is no checkpoint at all, not even a damaged one.

    Raises:
      ValueError: checkpoints are there, but none is whole; other settings, or a state of another structure, by name.
      OSError: a file is there, but cannot be read now; that is no damage.
    """
    root, damaged = Path(directory), []
    _put_back(root)
    found = list_checkpoints(root)
    for path in reversed(found):
        try:
            meta = _read_meta(path / META_FILE)
            if settings is not None:
                check_settings(meta["settings"], settings, where=str(path))
            leaves = dict(_read_state(path / STATE_FILE, meta))
        except _DamagedError as damage:
            message = f"checkpoint {path} is damaged ({damage})" + ("; taking the one before it" if path != found[0] else "")
            warnings.warn(message, stacklevel=2) if on_skip is None else on_skip(message)
            damaged.append(path)
            continue
        except OSError as error:
            file = error.filename or str(path)
            raise OSError(f"restore_checkpoint: cannot read {file!r} ({error.strerror or error})") from None
        state = _tree_like(path, like, leaves)
        for other in damaged:
            _set_aside(other)
        return Checkpoint(state, meta["settings"], path)
    count = len(damaged) + len(list(root.glob("step-*.damaged*")))
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
    _sync_folder(final.parent)
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
    old, new = (_flat(json.loads(json.dumps(settings))) for settings in (saved, wanted))
    absent = object()
    names = [name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent)]
    if names:
        parts = [f"`{name}` is {new.get(name, 'not set')!r} here, {old.get(name, 'not set')!r} there" for name in names]
        more = f" (and {len(parts) - 3} more)" if len(parts) > 3 else ""
        raise ValueError(f"cannot go on from {where}, other settings: {'; '.join(parts[:3])}{more}")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _encode_header(state: Tree) -> tuple[bytes, int]:
    """Returns the head of the safetensors file of a state, and the size of the whole file."""
    header, offset = {}, 0
    for name, leaf in tree.items(state):
        check(leaf.dtype in _NAMES, f"save_checkpoint: `{name}` is {leaf.dtype.name}, want one of {sorted(_NAMES.values())}")
        end = offset + leaf.dtype.size * leaf.shape.num_elements()
        header[name] = {"dtype": _NAMES[leaf.dtype], "shape": leaf.shape.as_list(), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head, 8 + len(head) + offset


def _write_state(path: Path, head: bytes, state: Tree) -> str:
    """Streams the leaves into a safetensors file, one in memory at a time; returns its digest."""
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(head)
        for leaf in tree.flatten(state):
            put(np.ascontiguousarray(leaf.numpy()).reshape(-1).view(np.uint8))
        _sync(file)
    return digest.hexdigest()


def _read_state(path: Path, meta: Mapping[str, Any]) -> Iterator[tuple[str, tf.Tensor]]:
    """Yields (path, tensor) for every leaf; at the end the whole file must have had the digest of `meta`."""
    digest = hashlib.blake2b(digest_size=32)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != meta["bytes"]:
                raise _DamagedError(f"{path.name} has {os.fstat(file.fileno()).st_size} of {meta['bytes']} bytes")

            def take(size: int) -> bytearray:
                if not 0 <= size <= meta["bytes"]:
                    raise _DamagedError(f"{path.name} has a broken header")
                data = bytearray(size)
                if file.readinto(data) != size:
                    raise _DamagedError(f"{path.name} ends early")
                digest.update(data)
                return data

            header = take(int.from_bytes(take(8), "little"))
            for name, entry in json.loads(bytes(header)).items():
                begin, end = entry["data_offsets"]
                dtype = _DTYPES[entry["dtype"]].as_numpy_dtype
                yield name, tf.constant(np.frombuffer(take(end - begin), dtype).reshape(entry["shape"]))
    except FileNotFoundError:
        raise _DamagedError(f"{path.name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):  # a broken header: the digest is wrong, too
        raise _DamagedError(f"{path.name} has a broken header") from None
    if digest.hexdigest() != meta["state"]:
        raise _DamagedError(f"the checksum of {path.name} is wrong")


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        digest = meta.pop("digest")
        known = meta["format"] == FORMAT
    except FileNotFoundError:
        raise _DamagedError(f"{path.name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _DamagedError(f"{path.name} is not what was written") from None
    if digest != _meta_digest(meta):
        raise _DamagedError(f"the checksum of {path.name} is wrong")
    check(known, f"restore_checkpoint: {str(path)!r} has format {meta['format']}, want {FORMAT}")
    return meta


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=32).hexdigest()


def _tree_like(path: Path, like: Tree, leaves: dict[str, tf.Tensor]) -> Tree:
    want = tree.to_dict(like)
    check_same_tree("restore_checkpoint", str(path), leaves, want)
    for name, leaf in want.items():
        got = leaves[name]
        check(
            got.dtype == leaf.dtype and got.shape == leaf.shape,
            f"restore_checkpoint: `{name}` in {str(path)!r} is {got.dtype.name} {got.shape}, "
            f"want {leaf.dtype.name} {leaf.shape}",
        )
    return tree.unflatten_as(like, [leaves[name] for name in want])


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
