"""Rotary position embedding with YaRN context extension."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dsv3.checks import Dims, check, check_choice
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.typing import TensorLike


class RopeTable(NamedTuple):
    """Cosines and sines for given positions, each `[B or 1, T, R/2]` float32."""

    cos: tf.Tensor
    sin: tf.Tensor


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns `0.1·mscale·ln(factor) + 1`, or 1 where the context is not stretched (`factor <= 1`)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_range(
    dim: int, theta: float, original_length: int, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> tuple[int, int]:
    """Returns the frequency indices between which YaRN's ramp runs.

    `dim(r) = dim·ln(original / (2πr)) / (2·ln θ)`; low = ⌊dim(beta_fast)⌋, high = ⌈dim(beta_slow)⌉, in [0, dim − 1].

    Args:
      dim: rotated width R. theta: base.
      original_length: tokens of the context before it was stretched.
      beta_fast, beta_slow: rotations over that context at the ramp's ends.

    >>> yarn_range(64, 10_000.0, 4096)
    (10, 23)
    """

    def index(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    return max(math.floor(index(beta_fast)), 0), min(math.ceil(index(beta_slow)), dim - 1)


@plain
def rope_frequencies(
    dim: int,
    theta: float = 10_000.0,
    *,
    factor: float | None = None,
    original_length: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """Returns the angular frequencies, radians per token.

    `f_i = θ^(−2i/dim)`; with a YaRN `factor`, `f' = f/factor·ramp + f·(1 − ramp)`.

    Args:
      dim: rotated width R, even.
      theta: base.
      factor: YaRN's stretch, or `None` for plain RoPE.
      original_length, beta_fast, beta_slow: see `yarn_range`.

    Returns:
      `[R/2]` float32 array.

    References: DeepSeek-V3 section 4.3; arXiv:2309.00071 section 3.2.
    """
    check(dim > 0 and dim % 2 == 0, f"rope_frequencies: `dim` is {dim}, want an even number > 0 [R]")
    # Rounded where torch rounds, so that long sequences turn by the same angles.
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    periods = (theta**exponents).astype(np.float32)
    freqs = np.float32(1.0) / periods
    if factor is not None:
        low, high = yarn_range(dim, theta, original_length, beta_fast, beta_slow)
        span = np.float32(max(high - low, 0) or 1e-3)
        kept = np.float32(1.0) - np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / span, 0.0, 1.0)
        stretched = np.float32(1.0) / (np.float32(factor) * periods)
        freqs = stretched * (np.float32(1.0) - kept) + freqs * kept
    return freqs.astype(np.float32)


@plain
def rope_table(positions: TensorLike, frequencies: TensorLike, *, factor: float = 1.0) -> RopeTable:
    """Returns cos and sin of `position·frequency`, times `factor` (YaRN's attention factor).

    Args:
      positions: `[B, T]` or `[T]`, integers, in tokens.
      frequencies: `[R/2]`, radians per token.
      factor: multiplies both.

    Returns:
      `RopeTable` of `[B, T, R/2]` (B is 1 for `[T]` positions), float32.
    """
    positions, frequencies = tf.convert_to_tensor(positions), tf.convert_to_tensor(frequencies)
    dims = Dims("rope_table")
    dims("positions", positions, "T" if positions.shape.rank == 1 else "B T")
    dims("frequencies", frequencies, "R/2")
    if positions.shape.rank == 1:
        positions = tf.expand_dims(positions, 0)
    angles = tf.expand_dims(tf.cast(positions, tf.float32), -1) * tf.cast(frequencies, tf.float32)
    return RopeTable(tf.cos(angles) * factor, tf.sin(angles) * factor)


@plain
def rope_apply(
    x: TensorLike, table: RopeTable, *, pairs: str = "interleaved", output: str = "interleaved", fuse: bool = False
) -> tf.Tensor:
    """Rotates pairs of the last dim: `(a, b) → (a·cos − b·sin, b·cos + a·sin)`.

    Args:
      x: `[B, T, R]`, or `[B, T, H, R]` with heads.
      table: cos and sin, `[B or 1, T, R/2]`.
      pairs: where a pair lies in the input: `"interleaved"` (x0,x1),(x2,x3).. or `"halves"` (x_i, x_{i+R/2}).
      output: the same for the output. The published code keeps pairs interleaved, HF writes halves.
      fuse: compile as one kernel.

    Returns:
      The rotated tensor, in `x`'s dtype and shape. cos and sin are rounded to that dtype first, as HF does.

    References: arXiv:2104.09864 section 3.4.2.
    """
    check_choice("rope_apply", "pairs", pairs, ("interleaved", "halves"))
    check_choice("rope_apply", "output", output, ("interleaved", "halves"))
    x = tf.convert_to_tensor(x)
    check(x.shape.rank in (3, 4), f"rope_apply: `x` has rank {x.shape.rank}, want 3 [B, T, R] or 4 [B, T, H, R]")
    cos, sin = table
    rows, length, half = cos.shape
    check(
        x.shape[-1] == 2 * half, f"rope_apply: `x` has last dim {x.shape[-1]}, want {2 * half} [R], twice the table's"
    )
    check(
        (length == x.shape[1] or None in (length, x.shape[1])) and (rows in (None, 1, x.shape[0]) or x.shape[0] is None),
        f"rope_apply: `table` is of {rows} rows and {length} positions, want {x.shape[0]} or 1 and {x.shape[1]} [B or 1, T]",
    )
    if x.shape.rank == 4:
        cos, sin = tf.expand_dims(cos, 2), tf.expand_dims(sin, 2)
    return _rotate(x, cos, sin, pairs=pairs, output=output, fuse=fuse)


@fused
def _rotate(x, cos, sin, *, pairs, output):
    cos, sin = tf.cast(cos, x.dtype), tf.cast(sin, x.dtype)
    if pairs == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = tf.split(x, 2, axis=-1)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    if output == "halves":
        return tf.concat(rotated, -1)
    return tf.reshape(tf.stack(rotated, -1), tf.shape(x))
