"""FP8 in NumPy: formats enumerated as fractions, rounding by comparison with midpoints, block quantisers in loops."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import tensorflow as tf

from dsv3.ops.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK

BLOCKS = [WEIGHT_BLOCK, ROW_BLOCK, COLUMN_BLOCK, None]
NUMPY = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e5m6": np.float16}
BITS = {"e4m3": (4, 3), "e5m2": (5, 2), "e5m6": (5, 6)}
MODES = {
    "eager": lambda fn: fn,
    "graph": lambda fn: tf.function(fn, autograph=False),
    "xla": lambda fn: tf.function(fn, autograph=False, jit_compile=True),
}


def grid(fmt: str) -> np.ndarray:
    """Every finite value from 0 up, float64. NaN takes E4M3's last value only, of the others all with the last exponent."""
    exponent_bits, mantissa_bits = BITS[fmt]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = [Fraction(k, steps) * Fraction(2) ** (1 - bias) for k in range(steps)]
    for exponent in range(1, 2**exponent_bits - (fmt != "e4m3")):
        found += [Fraction(steps + k, steps) * Fraction(2) ** (exponent - bias) for k in range(steps)]
    return np.array(found[:-1] if fmt == "e4m3" else found, np.float64)  # all are exact


def round_oracle(x: np.ndarray, fmt: str) -> np.ndarray:
    """The nearest value of the grid, float32, saturated; of two that are as near, the one at an even place in the grid."""
    values, size = grid(fmt), np.abs(x.astype(np.float64))
    middle = (values[1:] + values[:-1]) / 2
    place = np.searchsorted(middle, size)  # NaN comes last
    up = (size == np.append(middle, -1)[place]) & (place % 2 == 1)
    return np.where(np.isnan(x), np.nan, np.copysign(values[place + up], x)).astype(np.float32)


def awkward(fmt: str) -> np.ndarray:
    """Every value, the midpoints, the float32 on both sides of these, of both signs; all finite."""
    values = grid(fmt)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    around = [np.nextafter(points, np.float32(to), dtype=np.float32) for to in (np.inf, -np.inf)]
    top = np.float32(values[-1])
    rest = np.array([1.03 * top, 2 * top, 3e38, 1e-30, values[1] / 4, values[1] / 2 * 0.999], np.float32)
    points = np.concatenate([points, *around, rest])
    points[np.abs(points) < np.finfo(np.float32).tiny] = 0  # TensorFlow takes subnormal float32 for 0
    return np.concatenate([points, -points])


def spread(scale: np.ndarray, block: tuple[int, int] | None, shape: tuple[int, ...]) -> np.ndarray:
    """Repeats each scale over its block, cut to `shape`."""
    if block is None:
        return np.broadcast_to(scale, shape)
    return scale.repeat(block[0], -2).repeat(block[1], -1)[..., : shape[-2], : shape[-1]]


def scale_oracle(x: np.ndarray, block: tuple[int, int] | None, kind: str, top: float = 448.0) -> np.ndarray:
    """`max(amax, 1e-4) / top`, block by block, each quotient rounded to float32."""
    rows, cols = x.shape[-2:]
    if block is None:
        amax = np.abs(x).max().reshape([1] * x.ndim)
    else:
        amax = np.zeros((*x.shape[:-2], -(-rows // block[0]), -(-cols // block[1])), np.float32)
        for i, j in np.ndindex(amax.shape[-2:]):
            part = x[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            amax[..., i, j] = np.abs(part).max((-2, -1))
    scale = np.maximum(amax, np.float32(1e-4)) / np.float32(top)
    return np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32) if kind == "power_of_two" else scale


def quantize_oracle(
    x: np.ndarray, block: tuple[int, int] | None, kind: str = "float32", fmt: str = "e4m3"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values as float32, scales)."""
    scale = scale_oracle(x, block, kind, grid(fmt)[-1])
    return round_oracle(x / spread(scale, block, x.shape), fmt), scale


def wide(seed: int, *shape: int) -> np.ndarray:
    """Numbers of very different sizes, so that blocks have both saturated scales and values that underflow."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape))).astype(np.float32)


def assert_bits(got: tf.Tensor | np.ndarray, want: np.ndarray) -> None:
    """Asserts equal bits of values in any floating dtype, signs of zeros included."""
    got = tf.cast(got, tf.float32).numpy()
    np.testing.assert_array_equal(got.view(np.uint32), np.asarray(want, np.float32).view(np.uint32))
