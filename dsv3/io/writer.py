"""Writes a checkpoint directory: shards of bounded size, an index, `config.json`; all of it or nothing."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dsv3.checks import check
from dsv3.io.atomic import replace_directory, write_synced
from dsv3.io.leaves import QuantizedArrays, all_finite, decode_rows, leaf_array, part, part_scales, strips
from dsv3.io.names import Piece, stored_dtype
from dsv3.io.problems import Problems
from dsv3.io.safetensors_files import DTYPES, INDEX, SINGLE, encode_header
from dsv3.ops.fp8 import WEIGHT_BLOCK, fp8_quantize
from dsv3.ops.quantized import QuantizedWeight
from dsv3.typing import TensorLike

CONFIG = "config.json"
OWN_FILES = re.compile(r"config\.json|model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors")


class Entry(NamedTuple):
    """A tensor as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    pieces: Sequence[Piece],
    leaves: Mapping[str, TensorLike | QuantizedWeight],
    *,
    dtype: str,
    max_shard_bytes: int,
    extra_files: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Writes tensors and `config.json` into a new directory that then takes the place of `directory`.

    Args:
      directory: where to. It may exist if it holds nothing but a checkpoint and what `extra_files` names.
      config: the contents of `config.json`.
      pieces: the tensors; those with `written` are.
      leaves: path → values, float32 or bfloat16, or a `QuantizedWeight`. One in FP8 is written to the bit as it is where the
        stored dtype is FP8.
      dtype: `"bfloat16"`, `"float32"` or `"float8"`.
      max_shard_bytes: the tensors' bytes in one file. A larger tensor gets a file of its own.
      extra_files: paths of files to put beside, or names of files in the old directory to keep.

    Raises:
      ValueError: bad arguments, a directory with other files, too little space, values that are not finite. The old
        directory then is as it was.
      FileNotFoundError: an extra file is not there.
    """
    directory = pathlib.Path(directory)
    extras = _find_extras(directory, extra_files)
    _check_replaceable(directory, extras)
    shards = _plan([piece for piece in pieces if piece.written], dtype, max_shard_bytes)
    total = sum(entry.size for shard in shards for piece in shard for entry in _entries(piece, dtype))
    arrays = {path: leaf_array(leaf) for path, leaf in leaves.items()}
    problems = Problems("save_pretrained", directory)
    with replace_directory(directory) as fresh:
        free = shutil.disk_usage(fresh).free
        check(free >= total, f"save_pretrained: {directory} wants {total:,} bytes, {free:,} are free")
        weights: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weights |= dict.fromkeys(_write_shard(fresh / name, shard, arrays, dtype, problems), name)
        problems.raise_if_any()
        if len(shards) > 1:
            write_synced(fresh / INDEX, _json({"metadata": {"total_size": total}, "weight_map": weights}))
        write_synced(fresh / CONFIG, _json(config))
        for name, path in extras.items():
            write_synced(fresh / name, path.read_bytes())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _find_extras(directory: pathlib.Path, files: Sequence[str | os.PathLike[str]]) -> dict[str, pathlib.Path]:
    """Name → path of every extra file. A bare name is that of the old directory's file, if there is one."""
    check(not isinstance(files, (str, os.PathLike)), "save_pretrained: `extra_files` is one path, want a list of paths")
    found = {}
    for name in map(os.fspath, files):
        file = pathlib.Path(name)
        places = (directory / file.name, file) if os.path.basename(name) == name else (file, directory / file.name)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"save_pretrained: extra file {file} is neither there nor in {directory}")
        check(not OWN_FILES.fullmatch(file.name), f"save_pretrained: extra file {file}: the save itself writes one so named")
        check(file.name not in found, f"save_pretrained: two extra files are named {file.name}")
        found[file.name] = path
    return found


def _check_replaceable(directory: pathlib.Path, extras: Mapping[str, pathlib.Path]) -> None:
    if not directory.exists():
        return
    check(directory.is_dir(), f"save_pretrained: {directory} is no directory")
    names = sorted(path.name for path in directory.iterdir())
    lost = [name for name in names if not OWN_FILES.fullmatch(name) and name not in extras]
    check(
        not lost,
        f"save_pretrained: {directory} holds files that a save would remove: {', '.join(lost[:5])}"
        f"{' and more' if len(lost) > 5 else ''}; name what is to stay in `extra_files`, or save elsewhere",
    )


def _entries(piece: Piece, dtype: str) -> list[Entry]:
    """The stored tensors of a piece: itself, and its scales."""
    own = Entry(piece.name, stored_dtype(piece, dtype), piece.shape)
    scaled = own.dtype == "F8_E4M3"
    return [own, Entry(piece.scale_name, "F32", piece.scale_shape(WEIGHT_BLOCK))] if scaled else [own]


def _plan(pieces: Sequence[Piece], dtype: str, max_shard_bytes: int) -> list[list[Piece]]:
    """Fills one shard after the other, in order."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        size = sum(entry.size for entry in _entries(piece, dtype))
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += size
    return shards


def _write_shard(
    path: pathlib.Path, pieces: Sequence[Piece], arrays: Mapping[str, np.ndarray | QuantizedArrays], dtype: str,
    problems: Problems,
) -> list[str]:  # fmt: skip
    """Writes one file, a few rows at a time, and returns the names of its tensors."""
    entries = [entry for piece in pieces for entry in _entries(piece, dtype)]
    entries.sort(key=lambda entry: -DTYPES[entry.dtype].itemsize)  # so that every tensor starts aligned
    header, starts = encode_header(entries)
    with path.open("wb", buffering=0) as file:
        _write_at(file.fileno(), header, 0)
        file.truncate(len(header) + sum(entry.size for entry in entries))
        for piece in pieces:
            for name, first_byte, data in _encode(piece, arrays[piece.leaf], dtype, problems):
                _write_at(file.fileno(), data, starts[name] + first_byte)
        os.fsync(file.fileno())
    return [entry.name for entry in entries]


def _encode(
    piece: Piece, leaf: np.ndarray | QuantizedArrays, dtype: str, problems: Problems
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields (tensor, first byte in it, bytes) for a piece and its scales."""
    stored, finite = stored_dtype(piece, dtype), True
    held = isinstance(leaf, QuantizedArrays)
    if held and leaf.kind == "fp8" and stored == "F8_E4M3":
        yield from _encode_stored(piece, leaf, problems)
        return
    view = None if held else part(leaf, piece)
    for first, end in strips(piece.shape, WEIGHT_BLOCK[0]):
        if held:
            rows = decode_rows(leaf, piece, first, end)
        else:
            rows = np.ascontiguousarray(view[first:end]).view(leaf.dtype)
        if stored == "F8_E4M3":
            finite = finite and all_finite(rows)
            with tf.device("CPU:0"):
                quantized = fp8_quantize(rows)
            scales = np.asarray(quantized.scale_inv)
            yield piece.scale_name, first // WEIGHT_BLOCK[0] * scales[0].nbytes, scales
            rows = np.asarray(quantized.values)
        else:
            rows = rows.astype(DTYPES[stored], copy=False)
            finite = finite and all_finite(rows)
        yield piece.name, first * rows[0].nbytes, rows
    if not finite:
        problems.add("non-finite", f"{piece.name} would hold NaN or infinity in {stored}")


def _encode_stored(
    piece: Piece, leaf: QuantizedArrays, problems: Problems
) -> Iterator[tuple[str, int, np.ndarray]]:
    """The same for what is in the checkpoint's own FP8 already: nothing is rounded."""
    scales, view = np.ascontiguousarray(part_scales(leaf, piece)), part(leaf.values, piece)
    finite = all_finite(scales)
    yield piece.scale_name, 0, scales
    for first, end in strips(piece.shape):
        rows = np.ascontiguousarray(view[first:end])
        finite = finite and not bool(((rows & 0x7F) == 0x7F).any())
        yield piece.name, first * rows[0].nbytes, rows
    if not finite:
        problems.add("non-finite", f"{piece.name} would hold NaN or infinity in F8_E4M3")


def _write_at(fd: int, data: bytes | np.ndarray, start: int) -> None:
    view = memoryview(data.reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else data)
    while view:
        done = os.pwrite(fd, view, start)
        view, start = view[done:], start + done
