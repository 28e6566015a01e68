"""The latent cache: 576 values a token and layer at 671B, against 32,768 for plain attention with the same heads."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.ops.latent import latent_bytes
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike


class Cache(NamedTuple):
    """The past of a batch of sequences in all layers.

    Attributes:
      kv: `[X, B, S, L+R]`, normalised latents and rotated keys; slots from `length` on are undefined. In FP8
        `[X, B, S, bytes]` `uint8`, see `ops.latent`.
      length: `[B]` int32, tokens that a row holds.
    """

    kv: tf.Tensor
    length: tf.Tensor


def cache_specs(
    cfg: ModelConfig, batch: int, size: int, *, dtype: tf.DType | str = tf.bfloat16, layers: int | None = None
) -> Cache:
    """Describes a cache, e.g. to lay out its rows: `make_layouts(cache_specs(cfg, 8, 100), mesh, {"batch": "data"})`.

    Args:
      cfg, batch, size, dtype, layers: see `cache_init`.

    Returns:
      `Cache` of `ParamSpec`s with the logical axes `"layer"`, `"batch"`, `"time"` and `"latent"`.
    """
    check(batch > 0 and size > 0, f"cache_specs: batch={batch} and size={size}, want both > 0")
    width, dtype = entry_format(cfg, dtype)
    shape = (cfg.num_layers if layers is None else layers, batch, size, width)
    return Cache(
        ParamSpec(shape, ("layer", "batch", "time", "latent"), init="zeros", dtype=dtype.name),
        ParamSpec((batch,), ("batch",), init="zeros", dtype="int32"),
    )


def cache_init(
    cfg: ModelConfig, batch: int, size: int, *, dtype: tf.DType | str = tf.bfloat16, layers: int | None = None
) -> Cache:
    """Returns an empty cache.

    Args:
      cfg: the model's configuration.
      batch: B, rows. size: S, tokens that a row can hold.
      dtype: of the entries; `"float8"` for latents in E4M3 with a scale for each 128, and rotary keys in bfloat16.
      layers: X; default: the trunk's layers. An MTP module's cache has one layer.

    Returns:
      `Cache` of `[X, B, S, L+R]` zeros, `[X, B, S, bytes]` in FP8.
    """
    check(batch > 0 and size > 0, f"cache_init: batch={batch} and size={size}, want both > 0")
    specs = cache_specs(cfg, batch, size, dtype=dtype, layers=layers)
    return Cache(*(tf.zeros(spec.shape, spec.dtype) for spec in specs))


@plain
def cache_append(cache: Cache, entries: TensorLike, counts: TensorLike | None = None) -> Cache:
    """Writes new entries behind each row's tokens.

    Args:
      cache: see `Cache`.
      entries: `[X, B, T, L+R]`, from `ModelOutput.entries`; for a cache in FP8 bytes, as a model with such a cache computes
        them.
      counts: `[B]` int: how many of the T tokens of a row are real (its rest is padding on the right); default: all T.

    Returns:
      The new cache. Rows are written where their length says; writing beyond S is the caller's error and is refused when
      the lengths can be looked at.
    """
    entries, kv = tf.convert_to_tensor(entries), tf.convert_to_tensor(cache.kv)
    packed = [t.dtype == tf.uint8 for t in (entries, kv)]
    check(
        packed[0] == packed[1],
        f"cache_append: `entries` has dtype {entries.dtype.name}, want {kv.dtype.name}, as `cache.kv` has",
    )
    dims = Dims("cache_append")
    dims("cache.kv", cache.kv, "X B S W")
    dims("cache.length", cache.length, "B")
    dims("entries", entries, "X B T W")
    entries = tf.cast(entries, cache.kv.dtype)
    new = entries.shape[2]
    check(new != 0, "cache_append: `entries` has no token, want at least one [X, B, T, W]")
    counts = tf.fill(tf.shape(cache.length), new) if counts is None else tf.cast(counts, tf.int32)
    dims("counts", counts, "B")
    if hasattr(counts, "numpy"):
        most = int(tf.reduce_max(counts))
        check(most <= new, f"cache_append: `counts` holds {most}, want at most {new} [T], the tokens of `entries`")
    if hasattr(cache.length, "numpy") and hasattr(counts, "numpy"):
        most = int(tf.reduce_max(cache.length + counts))
        check(most <= cache.kv.shape[2], f"cache_append: a row would hold {most} tokens, the cache has room for {dims.S}")
    slots = tf.range(cache.kv.shape[2]) - tf.expand_dims(cache.length, -1)
    is_new = tf.logical_and(slots >= 0, slots < tf.expand_dims(counts, -1))
    source = tf.clip_by_value(slots, 0, new - 1)
    moved = tf.gather(entries, tf.broadcast_to(source, [entries.shape[0], *source.shape]), batch_dims=2)
    kv = tf.where(tf.expand_dims(tf.expand_dims(is_new, -1), 0), moved, cache.kv)
    return Cache(kv, cache.length + counts)


def cache_bytes(cfg: ModelConfig, tokens: int, *, dtype: tf.DType | str = tf.bfloat16) -> int:
    """Returns the bytes that `tokens` cached tokens take in all layers of the trunk.

    >>> import dsv3
    >>> cache_bytes(dsv3.preset("deepseek-v3"), 1) // 61 // 2
    576
    """
    width, dtype = entry_format(cfg, dtype)
    return cfg.num_layers * tokens * width * dtype.size


def entry_format(cfg: ModelConfig, dtype: tf.DType | str) -> tuple[int, tf.DType]:
    """Returns the last dim and dtype of a cache that `cache_init` calls `dtype`: bytes for `"float8"`."""
    if dtype == "float8":
        return latent_bytes(cfg.mla.kv_latent, cfg.mla.rope_dim), tf.uint8
    return cfg.mla.cache_width, tf.as_dtype(dtype)
