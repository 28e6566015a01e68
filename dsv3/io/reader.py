"""Fills stacked parameters from the tensors of a checkpoint, a few rows at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from dsv3.io.leaves import all_finite, allocate, part, strips, to_tensor
from dsv3.io.names import Piece
from dsv3.io.problems import Problems
from dsv3.io.safetensors_files import DTYPES, Stored
from dsv3.ops.fp8 import fp8_dequantize


def read_leaves(
    leaves: Mapping[str, tf.TensorSpec],
    pieces: Sequence[Piece],
    tensors: Mapping[str, Stored],
    *,
    block: tuple[int, int],
    problems: Problems,
) -> dict[str, tf.Tensor]:
    """Reads all leaves of a model. The tensors have been accounted for.

    It holds the leaves and at any time about 2²⁰ values more (FP8: at least a block's rows), however large a tensor is.

    Args:
      leaves: path → shape and dtype of every leaf, float32 or bfloat16.
      pieces: what each tensor holds. Copies are compared with what they repeat; a difference is a warning.
      tensors: the tensors by name.
      block: rows and columns of an FP8 block.
      problems: where values that are not finite, in the file or in the leaf's dtype, are noted; raised at the end.

    Returns:
      Path → tensor, on the CPU.
    """
    arrays = {path: allocate(tuple(leaf.shape), np.dtype(leaf.dtype.as_numpy_dtype)) for path, leaf in leaves.items()}
    present = [piece for piece in pieces if piece.name in tensors]
    present.sort(key=lambda piece: (piece.copy, tensors[piece.name].file, tensors[piece.name].start))
    with contextlib.closing(_Files()) as files:
        for piece in present:
            leaf = arrays[piece.leaf]
            finite, same = True, True
            for first, values in _read_strips(files, piece, tensors, leaf.dtype, block):
                here = part(leaf, piece)[first : first + len(values)]
                bits = values.view(here.dtype)
                if piece.copy:
                    same = same and np.array_equal(here, bits)
                else:
                    here[...] = bits
                    finite = finite and all_finite(values)
            if not finite:
                problems.add("non-finite", f"{piece.name} holds NaN or infinity in {leaf.dtype.name}")
            if not same:
                message = f"load_pretrained: {piece.name} differs from the tensor that it should repeat; it is not used"
                warnings.warn(message, stacklevel=3)
    problems.raise_if_any()
    return {path: to_tensor(leaf) for path, leaf in arrays.items()}


def _read_strips(files: _Files, piece: Piece, tensors: Mapping[str, Stored], dtype: np.dtype, block: tuple[int, int]):
    """Yields (first row, rows of the tensor in `dtype`)."""
    stored = tensors[piece.name]
    if stored.dtype != "F8_E4M3":
        for first, end in strips(stored.shape):
            yield first, files.rows(stored, first, end).astype(dtype, copy=False)
        return
    scales = tensors[piece.scale_name]
    for first, end in strips(stored.shape, block[0]):
        scale = files.rows(scales, first // block[0], -(-end // block[0])).astype(np.float32)
        with tf.device("CPU:0"):
            values = fp8_dequantize(files.rows(stored, first, end), scale, block=block, dtype=dtype.name)
        yield first, np.asarray(values)


class _Files:
    """Open files of a checkpoint."""

    def __init__(self):
        self._open: dict[pathlib.Path, int] = {}

    def rows(self, stored: Stored, first: int, end: int) -> np.ndarray:
        """Reads rows `[first, end)` of a tensor."""
        if stored.file not in self._open:
            self._open[stored.file] = os.open(stored.file, os.O_RDONLY)
        row = stored.size // stored.shape[0]
        buffer = np.empty((end - first) * row, np.uint8)
        done = 0
        while done < buffer.size:
            got = os.preadv(self._open[stored.file], [buffer[done:]], stored.start + first * row + done)
            if got == 0:
                raise ValueError(f"load_pretrained: {stored.file} was cut off while it was read")
            done += got
        return buffer.view(DTYPES[stored.dtype]).reshape(end - first, *stored.shape[1:])

    def close(self) -> None:
        """Closes them all."""
        while self._open:
            os.close(self._open.popitem()[1])
