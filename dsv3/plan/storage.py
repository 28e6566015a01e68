"""Bytes of stored values, scales included."""

from __future__ import annotations

from dsv3.checks import check_choice

TILE = 128  # values that share a scale: 1×128 of an activation, 128×128 of a weight

_BITS = {"float32": 32, "bfloat16": 16, "e5m6": 12, "fp8": 8}
_SCALED = ("e5m6", "fp8")


def row_bytes(width: int, dtype: str) -> int:
    """Returns the bytes of one token's row of `width` activations in `dtype`.

    `"fp8"` (E4M3) and `"e5m6"` have a float32 scale for each 1×128 tile.

    >>> row_bytes(7168, "fp8"), row_bytes(7168, "bfloat16")
    (7392, 14336)

    References: DeepSeek-V3 sections 3.3.2 and 3.3.3.
    """
    check_choice("row_bytes", "dtype", dtype, tuple(_BITS))
    scales = 4 * -(-width // TILE) if dtype in _SCALED else 0
    return -(-width * _BITS[dtype] // 8) + scales


def weight_bytes(size: int, dtype: str) -> int:
    """Returns the bytes of `size` weights in `dtype`; in `"fp8"` each 128×128 block has a float32 scale.

    Ragged blocks are not looked at, so a matrix whose sides are no multiples of 128 has a few scales more.
    """
    check_choice("weight_bytes", "dtype", dtype, ("float32", "bfloat16", "fp8"))
    scales = 4 * -(-size // TILE**2) if dtype in _SCALED else 0
    return size * _BITS[dtype] // 8 + scales
