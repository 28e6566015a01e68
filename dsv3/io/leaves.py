"""Parameters as host arrays: allocation that TensorFlow takes over without a copy, and the part that a tensor occupies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
import tensorflow as tf

from dsv3.io.names import Piece
from dsv3.ops.quantized import GROUP, QuantizedWeight
from dsv3.typing import TensorLike

ALIGNMENT = 64  # bytes; TensorFlow's kernels abort on less
STRIP = 1 << 20  # elements that are read, converted or written at a time
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array that `to_tensor` accepts."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def to_tensor(array: np.ndarray) -> tf.Tensor:
    """Hands an array of `allocate` to TensorFlow, on the CPU, without a copy. The array must not be written any more."""
    with tf.device("CPU:0"):
        if array.size == 0:
            return tf.zeros(array.shape, array.dtype)
        if array.dtype == BFLOAT16:  # NumPy exports no bfloat16
            return tf.bitcast(tf.experimental.dlpack.from_dlpack(array.view(np.uint16).__dlpack__()), tf.bfloat16)
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def to_array(leaf: TensorLike) -> np.ndarray:
    """Returns a tensor's or variable's values as an array: the tensor's own memory if it lies on the CPU."""
    return np.ascontiguousarray(leaf if isinstance(leaf, np.ndarray) else np.asarray(tf.convert_to_tensor(leaf)))


class QuantizedArrays(NamedTuple):
    """A `QuantizedWeight` as host arrays."""

    values: np.ndarray
    scale_inv: np.ndarray

    @property
    def kind(self) -> str:
        """`"fp8"` or `"int8"`."""
        return "fp8" if self.values.dtype == np.uint8 else "int8"


def leaf_array(leaf: TensorLike | QuantizedWeight) -> np.ndarray | QuantizedArrays:
    """Returns a parameter's values as `to_array` does, a quantised one's as two arrays."""
    return QuantizedArrays(*map(to_array, leaf)) if isinstance(leaf, QuantizedWeight) else to_array(leaf)


def part_scales(leaf: QuantizedArrays, piece: Piece) -> np.ndarray:
    """Returns a view of the scales that belong to a tensor, as it would be stored: `[outputs, inputs]` in blocks."""
    scale = leaf.scale_inv[piece.index]  # [m, P, n]
    if leaf.kind == "int8":
        return scale[:, 0, slice(*piece.columns) if piece.columns else slice(None)].T
    return scale[:, 1 if piece.columns and piece.columns[0] else 0].T


def decode_rows(leaf: QuantizedArrays, piece: Piece, first: int, end: int) -> np.ndarray:
    """Returns rows `[first, end)` of a tensor, float32, from a quantised leaf; `first` is a multiple of 128."""
    bits, scale = part(leaf.values, piece)[first:end], part_scales(leaf, piece)
    if leaf.kind == "fp8":
        scale = np.repeat(scale[first // GROUP : -(-end // GROUP)], GROUP, 0)[: end - first]
        bits = np.ascontiguousarray(bits).view(ml_dtypes.float8_e4m3fn)
    else:
        scale = scale[first:end]
    return bits.astype(np.float32) * np.repeat(scale, GROUP, 1)[:, : bits.shape[1]]


def part(leaf: np.ndarray, piece: Piece) -> np.ndarray:
    """Returns a view of the part of a leaf that a tensor holds, in the tensor's shape. bfloat16 is seen as uint16."""
    view = (leaf.view(np.uint16) if leaf.dtype == BFLOAT16 else leaf)[piece.index]
    if piece.inputs:
        view = view.reshape(math.prod(view.shape[: piece.inputs]), -1)
        view = view[:, slice(*piece.columns) if piece.columns else slice(None)].T
    return view


def strips(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yields ranges (first, end) of rows of about `STRIP` elements, each but the last a multiple of `multiple` rows."""
    rows = max(STRIP // max(math.prod(shape[1:]), 1) // multiple, 1) * multiple
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])


def all_finite(values: np.ndarray) -> bool:
    """Whether all values are finite; float32, bfloat16 or float16."""
    if values.dtype == BFLOAT16:
        return not bool(((values.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())
