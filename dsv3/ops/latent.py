"""Cache entries in FP8: 656 bytes for the 512 latent values and 64 rotary ones of a token, where bfloat16 takes 1,152.

    byte   0 …          L bytes          the latent in E4M3
           L …          4·⌈L/128⌉ bytes  a float32 scale for each 128 of its values
           L+4·⌈L/128⌉  2·R bytes        the rotary key in bfloat16, which is not normalised and stays as it is

One tensor of bytes, so a cache is written, gathered, grown and looped over as any other. The layout is that of the public
FP8 kernels for latent attention.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import Dims, check
from dsv3.graph import plain
from dsv3.ops.fp8 import ROW_BLOCK, fp8_quantize
from dsv3.ops.fp8_bits import BITS_SCALE, fp8_to_bits, from_bytes, half_bits, to_bytes
from dsv3.ops.fuse import fused
from dsv3.typing import TensorLike

_TILE = ROW_BLOCK[1]


def latent_bytes(latent: int, rope: int) -> int:
    """Returns the bytes of one entry of a `latent` of so many values and a rotary key of `rope`.

    >>> latent_bytes(512, 64)
    656
    """
    return latent + 4 * -(-latent // _TILE) + 2 * rope


@plain
def latent_pack(entries: TensorLike, *, rope: int, fuse: bool = False) -> tf.Tensor:
    """Quantises cache entries.

    Args:
      entries: `[..., T, L+R]`, floating: latents, then rotary keys.
      rope: R.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[..., T, bytes]` `uint8`, see `latent_bytes`. A tile with a value that is not finite becomes NaN.

    Raises:
      ValueError: an integer dtype, or entries that are not wider than `rope`.

    References: DeepSeek-V3 section 3.3.2 (tiles of 1×128).
    """
    entries = tf.convert_to_tensor(entries)
    check(entries.dtype.is_floating, f"latent_pack: `entries` has dtype {entries.dtype.name}, want a floating dtype")
    rank, width = entries.shape.rank, entries.shape[-1]
    check(
        rank is not None and rank >= 2 and width > rope,
        f"latent_pack: `entries` has shape {entries.shape}, want [..., T, L+R] with R = {rope}",
    )
    latent, key = tf.split(entries, [width - rope, rope], axis=-1)
    q = fp8_quantize(latent, block=ROW_BLOCK, fuse=fuse)
    bits = fp8_to_bits(q.values, fuse=fuse)
    return tf.concat([bits, to_bytes(q.scale_inv), to_bytes(tf.cast(key, tf.bfloat16))], -1)


@plain
def latent_unpack(
    packed: TensorLike, *, latent: int, rope: int, dtype: tf.DType | str = tf.bfloat16, fuse: bool = False
) -> tf.Tensor:
    """Returns the entries that `latent_pack` quantised.

    Args:
      packed: `[..., T, bytes]` `uint8`.
      latent, rope: L and R.
      dtype: of the result, rounded to once.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[..., T, L+R]`.

    Raises:
      ValueError: another dtype, or another number of bytes.

    >>> latent_unpack(latent_pack([[448.0, 3.1, 1.0]], rope=1), latent=2, rope=1).numpy().astype(float).tolist()
    [[448.0, 3.0, 1.0]]
    """
    packed = tf.convert_to_tensor(packed)
    check(packed.dtype == tf.uint8, f"latent_unpack: `packed` has dtype {packed.dtype.name}, want uint8")
    lead = [f"d{i}" for i in range(packed.shape.rank - 1)]
    Dims("latent_unpack", bytes=latent_bytes(latent, rope))("packed", packed, " ".join([*lead, "bytes"]))
    tiles = -(-latent // _TILE)
    bits, scale, key = tf.split(packed, [latent, 4 * tiles, 2 * rope], axis=-1)
    scale, key = from_bytes(scale, tf.float32), from_bytes(key, tf.bfloat16)
    values = _scaled(bits, scale, dtype=tf.as_dtype(dtype), fuse=fuse)
    return tf.concat([values, tf.cast(key, dtype)], -1)


@fused
def _scaled(bits, scale, *, dtype):
    by_value = tf.repeat(scale * BITS_SCALE, _TILE, axis=-1)[..., : bits.shape[-1]]
    return tf.cast(half_bits(bits) * by_value, dtype)
