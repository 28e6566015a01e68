"""Fills stacked parameters from the tensors of a checkpoint, a few rows at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from dsv3.io.leaves import QuantizedArrays, all_finite, allocate, part, part_scales, strips, to_tensor
from dsv3.io.names import Piece
from dsv3.io.problems import Problems
from dsv3.io.safetensors_files import DTYPES, Stored
from dsv3.ops.fp8 import fp8_dequantize
from dsv3.ops.quantized import GROUP, QuantizedWeight, quantized_encode


def read_leaves(
    leaves: Mapping[str, tf.TensorSpec | QuantizedWeight],
    pieces: Sequence[Piece],
    tensors: Mapping[str, Stored],
    *,
    block: tuple[int, int],
    problems: Problems,
) -> dict[str, tf.Tensor | QuantizedWeight]:
    """Reads all leaves of a model. The tensors have been accounted for.

    It holds the leaves and at any time about 2²⁰ values more (FP8: at least a block's rows), however large a tensor is.

    Args:
      leaves: path → shape and dtype of every leaf, float32 or bfloat16; for one that is to be quantised a `QuantizedWeight`
        of them. FP8 in blocks of 128×128 is then taken as it is stored, anything else is quantised.
      pieces: what each tensor holds. Copies are compared with what they repeat; a difference is a warning.
      tensors: the tensors by name.
      block: rows and columns of an FP8 block.
      problems: where values that are not finite, in the file or in the leaf's dtype, are noted; raised at the end.

    Returns:
      Path → tensor, on the CPU.
    """
    arrays = {path: _arrays(leaf) for path, leaf in leaves.items()}
    present = [piece for piece in pieces if piece.name in tensors]
    present.sort(key=lambda piece: (piece.copy, tensors[piece.name].file, tensors[piece.name].start))
    with contextlib.closing(_Files()) as files:
        for piece in present:
            leaf = arrays[piece.leaf]
            if isinstance(leaf, QuantizedArrays):
                if not _read_quantized(files, piece, tensors, leaf, block):
                    problems.add("non-finite", f"{piece.name} holds NaN or infinity")
                continue
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
    return {path: _tensors(leaf) for path, leaf in arrays.items()}


def _arrays(leaf: tf.TensorSpec | QuantizedWeight) -> np.ndarray | QuantizedArrays:
    if isinstance(leaf, QuantizedWeight):
        return QuantizedArrays(*map(_arrays, leaf))
    return allocate(tuple(leaf.shape), np.dtype(leaf.dtype.as_numpy_dtype))


def _tensors(leaf: np.ndarray | QuantizedArrays) -> tf.Tensor | QuantizedWeight:
    return QuantizedWeight(*map(to_tensor, leaf)) if isinstance(leaf, QuantizedArrays) else to_tensor(leaf)


def _read_quantized(
    files: _Files, piece: Piece, tensors: Mapping[str, Stored], leaf: QuantizedArrays, block: tuple[int, int]
) -> bool:
    """Fills a tensor's part of a quantised leaf; returns whether all of it is finite."""
    stored, values, scales = tensors[piece.name], part(leaf.values, piece), part_scales(leaf, piece)
    if leaf.kind == "fp8" and stored.dtype == "F8_E4M3":
        scale = files.rows(tensors[piece.scale_name], 0, scales.shape[0]).astype(np.float32)
        scales[...] = scale
        finite = all_finite(scale)
        for first, end in strips(stored.shape):
            bits = files.rows(stored, first, end).view(np.uint8)
            values[first:end] = bits
            finite = finite and not bool(((bits & 0x7F) == 0x7F).any())
        return finite
    finite = True
    for first, rows in _read_strips(files, piece, tensors, np.dtype(np.float32), block, multiple=GROUP):
        with tf.device("CPU:0"):
            q = quantized_encode(rows.T, kind=leaf.kind)
        found = np.asarray(q.scale_inv)[:, 0].T
        values[first : first + len(rows)] = np.asarray(q.values).T
        at = first // GROUP if leaf.kind == "fp8" else first
        scales[at : at + len(found)] = found
        finite = finite and all_finite(rows)
    return finite


def _read_strips(
    files: _Files, piece: Piece, tensors: Mapping[str, Stored], dtype: np.dtype, block: tuple[int, int], multiple: int = 1
):
    """Yields (first row, rows of the tensor in `dtype`), of a tensor that is not FP8 a `multiple` of rows each."""
    stored = tensors[piece.name]
    if stored.dtype != "F8_E4M3":
        for first, end in strips(stored.shape, multiple):
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
