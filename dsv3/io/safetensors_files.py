"""The safetensors format: headers, and the tensors of a directory of such files.

A file is the header's length (8 bytes, little endian), the header (JSON: name → dtype, shape, offsets) and the tensors'
bytes. It is read and written here, and not by the `safetensors` package, which maps files into memory and writes a file's
tensors all at once: loading and saving hold a few rows at a time. The tests compare both.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv3.io.problems import Problems

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the format's own limit

# Names in a header → NumPy dtypes of what dsv3 reads; other tensors are listed, never read.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class Stored(NamedTuple):
    """One tensor in a file: `dtype` as in the header, `shape`, and its bytes `[start, start + size)` of `file`."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Directory(NamedTuple):
    """The tensors of a checkpoint by name, and the names whose file is missing or broken."""

    tensors: dict[str, Stored]
    unreadable: frozenset[str]


def read_header(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """Reads the header of one file and checks it against the file's size.

    Raises:
      ValueError: not a safetensors file, a header that contradicts itself, or a file that is cut off.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"{path.name} is no safetensors file, or cut off in its header ({size} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path.name} has a bad header: {type(e).__name__}: {e}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise ValueError(f"{path.name} has a bad header: {name} starts at byte {tensor.start}, want {end}")
        end += tensor.size
    if size != end:
        cut = "is cut off" if size < end else "is too long"
        raise ValueError(f"{path.name} {cut}: it has {size} bytes, its header accounts for {end}")
    return tensors


def _stored(path: pathlib.Path, entry: dict[str, Any], data: int) -> Stored:
    dtype, shape, (first, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, end)) or end < first:
        raise ValueError(f"shape {shape} at bytes {first} to {end}")
    if dtype in DTYPES and end - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{dtype} {shape} in {end - first} bytes")
    return Stored(path, str(dtype), shape, data + first, end - first)


def encode_header(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Returns a file's first bytes and where each tensor starts, for tensors (name, dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    starts = {name: first + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, starts


def open_directory(directory: pathlib.Path, problems: Problems) -> Directory:
    """Reads the headers of `model.safetensors`, or of the files that the index names.

    Missing and broken files are noted in `problems`.

    Raises:
      FileNotFoundError: neither is there.
      ValueError: both are, or the index is not one.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"load_pretrained: {directory} holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if single.is_file():
        try:
            return Directory(read_header(single), frozenset())
        except ValueError as e:
            problems.add("unreadable file", str(e))
            problems.raise_if_any()
    if not index.is_file():
        raise FileNotFoundError(f"load_pretrained: {directory} holds no weights: neither {SINGLE} nor {INDEX}")
    return _open_shards(directory, _read_index(index), problems)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(name and name == os.path.basename(name) for name in files.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"load_pretrained: {path} is no index: want a JSON object whose `weight_map` maps tensors to files")
    return files


def _open_shards(directory: pathlib.Path, files: dict[str, str], problems: Problems) -> Directory:
    headers: dict[str, dict[str, Stored] | None] = {}
    for file in sorted(set(files.values())):
        headers[file] = None
        if not (directory / file).is_file():
            count = sum(f == file for f in files.values())
            problems.add("missing file", f"{file}, where the index has {count} tensors")
            continue
        try:
            headers[file] = read_header(directory / file)
        except ValueError as e:
            problems.add("unreadable file", str(e))
    tensors, unreadable = {}, set()
    for name, file in files.items():
        header = headers[file]
        if header is None:
            unreadable.add(name)
        elif name in header:
            tensors[name] = header[name]
        else:
            unreadable.add(name)
            problems.add("missing", f"{name} is not in {file}, where the index has it")
    for file, header in headers.items():
        for name in header or ():
            if files.get(name) != file:
                problems.add("unexpected", f"{name} in {file} is not there in the index")
    return Directory(tensors, frozenset(unreadable))
