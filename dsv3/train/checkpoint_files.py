"""The files of a checkpoint: each has blocks of leaves, and is read by box, whatever boxes were written.

A block is what one device holds of a leaf. A file is plain safetensors, in which a whole leaf stands under its path and a
block of one under its path and place: `params.embed[0:20,0:6]`. Groups of a block's rows have digests of their own, so that
a reader checks what it reads without reading more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3 import tree
from dsv3.checks import check
from dsv3.parallel.mesh import layout_of, shard_box
from dsv3.typing import Tree

GROUP_BYTES = 1 << 24  # rows up to this size share a digest

# dtype names of the safetensors format; `as_numpy_dtype` of bfloat16 is ml_dtypes'.
DTYPES = {
    "BOOL": tf.bool, "U8": tf.uint8, "I8": tf.int8, "I16": tf.int16, "I32": tf.int32, "I64": tf.int64,
    "F16": tf.float16, "BF16": tf.bfloat16, "F32": tf.float32, "F64": tf.float64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedError(Exception):
    """A checkpoint that is not whole; the message says what is wrong with it."""


class Block(NamedTuple):
    """A part of a leaf: its `path`, `dtype`, where it begins, its `shape`, and the local `device` that has it."""

    path: str
    dtype: tf.DType
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    device: int
    name: str


def state_bytes(state: Tree) -> int:
    """Returns the bytes of a whole state, after a check of its dtypes."""
    size = 0
    for path, leaf in tree.items(state):
        check(leaf.dtype in NAMES, f"save_checkpoint: `{path}` is {leaf.dtype.name}, want one of {sorted(NAMES.values())}")
        size += leaf.dtype.size * math.prod(leaf.shape.as_list())
    return size


def held_blocks(state: Tree) -> Iterator[Block]:
    """Yields the blocks that this process has to write: of devices that hold the same one the first writes it."""
    for path, leaf in tree.items(state):
        layout, full = layout_of(leaf), tuple(leaf.shape.as_list())
        if layout is None:
            yield Block(path, leaf.dtype, (0,) * len(full), full, 0, path)
            continue
        sharded = layout.sharding_specs if math.prod(full) else ()
        for device, place in enumerate(layout.mesh.local_device_locations()):
            if all(index == 0 for axis, index in place.items() if axis not in sharded):
                begin, shape = shard_box(full, layout, place)
                ranges = ",".join(f"{b}:{b + n}" for b, n in zip(begin, shape))
                yield Block(path, leaf.dtype, begin, shape, device, path if shape == full else f"{path}[{ranges}]")


def block_values(blocks: Sequence[Block], state: Tree) -> Iterator[np.ndarray]:
    """Yields the bytes of each block, one in memory at a time; they may change with the state."""
    leaves, last, parts = tree.to_dict(state), None, []
    for block in blocks:
        if block.path != last:
            leaf, last = leaves[block.path], block.path
            parts = [leaf] if layout_of(leaf) is None else dtensor.unpack(leaf)
        yield np.ascontiguousarray(parts[block.device].numpy()).reshape(-1).view(np.uint8)


def write_blocks(path: Path, blocks: Sequence[Block], values: Iterable[np.ndarray]) -> dict[str, Any]:
    """Streams this process's blocks into a safetensors file.

    Args:
      path: the file. blocks: from `held_blocks`. values: the bytes of each, from `block_values`.

    Returns:
      What `BlockReader` wants to know of the file: its size, the digest of its head, place and digests of each block.
    """
    head, offset = _encode_header(blocks)
    described = []
    with open(path, "wb") as file:
        file.write(head)
        for block, data in zip(blocks, values, strict=True):
            group, digests = _group_bytes(block.shape, block.dtype), []
            for start in range(0, len(data), group):
                digests.append(digest_of(data[start : start + group]))
                file.write(data[start : start + group])
            place = {"leaf": block.path, "begin": block.begin, "shape": block.shape, "offset": offset}
            described.append(place | {"group": group, "digests": digests})
            offset += len(data)
        sync_file(file)
    return {"bytes": offset, "head": digest_of(head), "head_bytes": len(head), "blocks": described}


def _encode_header(blocks: Sequence[Block]) -> tuple[bytes, int]:
    header, offset = {}, 0
    for block in blocks:
        end = offset + block.dtype.size * math.prod(block.shape)
        header[block.name] = {"dtype": NAMES[block.dtype], "shape": list(block.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    return head, len(head)


def _group_bytes(shape: Sequence[int], dtype: tf.DType) -> int:
    """The bytes of a group: whole rows of a block, as many as fit, at least one."""
    row = math.prod(shape[1:]) * dtype.size
    return max(1, row) * max(1, GROUP_BYTES // max(1, row)) if shape else dtype.size


class BlockReader:
    """Reads boxes of leaves from a checkpoint's files; of each block only the rows that a box has a part in.

    Args:
      folder: the checkpoint.
      files: from name to what `write_blocks` has returned for it.
      leaves: from path to `{"dtype": ..., "shape": ...}`.

    Raises:
      DamagedError: a file is missing, has another size or another head.
    """

    def __init__(self, folder: Path, files: Mapping[str, Any], leaves: Mapping[str, Any]):
        self._leaves, self._blocks = leaves, {path: [] for path in leaves}
        for name, about in files.items():
            path = folder / name
            try:
                with open(path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != about["bytes"]:
                        raise DamagedError(f"{name} has {size} of {about['bytes']} bytes")
                    if digest_of(file.read(about["head_bytes"])) != about["head"]:
                        raise DamagedError(f"{name} has a broken header")
            except FileNotFoundError:
                raise DamagedError(f"{name} is missing") from None
            for block in about["blocks"]:
                self._blocks[block["leaf"]].append((path, block))

    def read(self, path: str, begin: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Returns a box of a leaf.

        Raises:
          DamagedError: what was read has another digest, or the files lack a part of the box.
        """
        dtype = DTYPES[self._leaves[path]["dtype"]]
        box, filled = np.empty(shape, dtype.as_numpy_dtype), 0
        for file, block in self._blocks[path]:
            low = [max(b, o) for b, o in zip(begin, block["begin"])]
            high = [min(b + n, o + m) for b, n, o, m in zip(begin, shape, block["begin"], block["shape"])]
            if all(a < b for a, b in zip(low, high)):
                self._copy(file, block, dtype, low, high, begin, box)
                filled += math.prod(b - a for a, b in zip(low, high))
        if filled != box.size:
            raise DamagedError(f"`{path}` has {filled} of {box.size} values")
        return box

    def _copy(self, path: Path, block: Mapping[str, Any], dtype, low, high, begin, box: np.ndarray) -> None:
        """Copies what lies between `low` and `high` from a block into the box, a group of rows at a time."""
        shape, origin = block["shape"], block["begin"]
        group = block["group"]
        total = math.prod(shape) * dtype.size
        rows = group // max(1, math.prod(shape[1:]) * dtype.size) if shape else 1
        first, last = (low[0] - origin[0], high[0] - origin[0]) if shape else (0, 1)
        with open(path, "rb") as file:
            for number in range(first // rows, (last - 1) // rows + 1):
                file.seek(block["offset"] + number * group)
                data = file.read(min(group, total - number * group))
                if digest_of(data) != block["digests"][number]:
                    raise DamagedError(f"the checksum of {path.name} is wrong in `{block['leaf']}`")
                values = np.frombuffer(data, dtype.as_numpy_dtype)
                if not shape:
                    box[()] = values[0]
                    continue
                values = values.reshape([-1, *shape[1:]])
                a, b = max(first, number * rows), min(last, (number + 1) * rows)
                inner = list(zip(low[1:], high[1:]))
                take = [slice(a - number * rows, b - number * rows)]
                take += [slice(i - o, j - o) for (i, j), o in zip(inner, origin[1:])]
                put = [slice(a + origin[0] - begin[0], b + origin[0] - begin[0])]
                put += [slice(i - o, j - o) for (i, j), o in zip(inner, begin[1:])]
                box[tuple(put)] = values[tuple(take)]


def digest_of(data: Any) -> str:
    """Returns the digest of bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sync_file(file: Any) -> None:
    """Writes what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Writes a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
