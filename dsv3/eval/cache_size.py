"""What caches really take: latents, and the keys and values that plain attention with the same heads would keep.

Both are allocated, filled from the same tokens, and read by one step of attention.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_choice
from dsv3.compiled import RowWrite, compile_step, place
from dsv3.config import MLAConfig
from dsv3.eval.context import RUNTIME_BYTES
from dsv3.nn.mla import LayerCache, MLAParams, mla_absorb, mla_apply, mla_expand, mla_rope, mla_specs
from dsv3.nn.mla_plain import PlainCache, plain_apply, plain_cache_values
from dsv3.ops.latent import latent_bytes
from dsv3.policy import ComputePolicy, default_policy
from dsv3.resident import measure_growth
from dsv3.spec import count_params
from dsv3.typing import Tree

KINDS = ("latent", "plain")
DTYPES = ("float32", "bfloat16", "float8")
CHUNK = 512  # tokens that are written at a time
TURNS = 10  # steps of attention that are timed


class CacheSize(NamedTuple):
    """One cache of all layers.

    Attributes:
      kind, dtype: see `measure_caches`.
      computed: bytes, by arithmetic.
      measured: bytes by which the process's memory grew when the cache was made.
      step_seconds: of the last layer's attention of a new token, the median.
      out: `[D]` float32, what that attention gave.
    """

    kind: str
    dtype: str
    computed: int
    measured: int
    step_seconds: float
    out: np.ndarray


def token_bytes(cfg: MLAConfig, kind: str, dtype: str) -> int:
    """Returns the bytes that a layer's cache of a kind (`"latent"`, `"plain"`) keeps of a token.

    >>> import dsv3
    >>> [token_bytes(dsv3.preset("deepseek-v3").mla, kind, "bfloat16") for kind in ("latent", "plain")]
    [1152, 81920]
    """
    check_choice("token_bytes", "kind", kind, KINDS)
    check_choice("token_bytes", "dtype", dtype, DTYPES if kind == "latent" else DTYPES[:2])
    if dtype == "float8":
        return latent_bytes(cfg.kv_latent, cfg.rope_dim)
    return tf.as_dtype(dtype).size * (cfg.cache_width if kind == "latent" else plain_cache_values(cfg))


def caches_bytes(cfg: MLAConfig, size: int, caches: Sequence[tuple[str, str]], *, layers: int) -> int:
    """Estimates the memory that `measure_caches` needs with the same arguments: rather too much than too little."""
    a_layer = size * sum(token_bytes(cfg, kind, dtype) for kind, dtype in caches)
    params = 6 * layers * count_params(mla_specs(cfg, std=1.0))  # in float32, and in what products are in
    return RUNTIME_BYTES + params + (layers + 1) * a_layer  # a layer's cache once more, as products read it


def measure_caches(
    make_layers: Callable[[], Sequence[MLAParams]],
    cfg: MLAConfig,
    size: int,
    caches: Sequence[tuple[str, str]],
    *,
    layers: int,
    on_chunk: Callable[[int, int], None] | None = None,
) -> list[CacheSize]:
    """Allocates caches of one sequence, fills them, and lets a new token attend over each.

    They are filled in chunks, as the engine fills its own, from random hidden states through the layers' weights: keys and
    values of plain attention are expanded from the very latents that the other caches hold. All are made before anything is
    computed and stay until the end, since TensorFlow takes what was given up before it asks for more memory: so call this
    in a fresh process. The bookkeeping of TensorFlow's allocator, 1/32 of the room that it takes, is not counted.

    Args:
      make_layers: makes the layers' parameters, float32; it is called when the caches are there.
      cfg: their configuration.
      size: S, tokens.
      caches: pairs of a kind, `"latent"` or `"plain"` (keys and values of every head, in each layer), and a dtype,
        `"float32"`, `"bfloat16"`, or for latents `"float8"`. Products are in it, with FP8 in bfloat16.
      layers: how many there are, one or more.
      on_chunk: is called after each chunk with the tokens that are written, of all caches, and how many there will be.

    Raises:
      ValueError: another kind or dtype, no layers or another number of them, or a size that is not positive.
    """
    check(size > 0 and layers > 0, f"measure_caches: `layers` is {layers} and `size` {size}, want both > 0")
    computed = [size * layers * token_bytes(cfg, kind, dtype) for kind, dtype in caches]
    _reserve(sum(computed))
    made, found = [], []
    for kind, dtype in caches:
        made.append(measure_growth(functools.partial(_make, _shapes(cfg, kind, dtype, layers, size))))
    params = make_layers()
    check(len(params) == layers, f"measure_caches: `make_layers` gives {len(params)} layers, want {layers}")
    for number, ((kind, dtype), (state, growth)) in enumerate(zip(caches, made)):
        policy = default_policy().replace(cache="float8" if dtype == "float8" else None)
        products = "bfloat16" if dtype == "float8" else dtype
        cast = [_cast(layer, products) for layer in params]
        fill = _fill(cfg, policy, kind)
        for at in range(0, size, CHUNK):
            count = min(CHUNK, size - at)
            state, _ = fill(state, cast, _hidden(at, count, cfg.hidden_size, products), tf.constant([at]))
            if on_chunk is not None:
                on_chunk(number * size + at + count, len(caches) * size)
        last = mla_absorb(cast[-1], cfg=cfg) if kind == "latent" else cast[-1]
        attend = _attend(cfg, policy, kind)
        seconds, out = _timed(functools.partial(attend, state, last, _hidden(size, 1, cfg.hidden_size, products)))
        found.append(CacheSize(kind, dtype, computed[number], growth.kept, seconds, out))
    return found


def _timed(function: Callable[[], tf.Tensor]) -> tuple[float, np.ndarray]:
    """The median of some calls' seconds after the first, and what they give, as one float32 vector."""
    times, out = [], None
    for _ in range(TURNS + 1):
        start = time.monotonic()
        out = function().numpy()
        times.append(time.monotonic() - start)
    return statistics.median(times[1:]), np.reshape(out, [-1]).astype(np.float32)


def _reserve(size: int) -> None:
    """Lets TensorFlow's allocator take room for so many bytes and more, which nothing touches yet.

    It keeps 8 bytes for every 256 of a region that it takes, which would count for the cache that happens to be the first.
    """
    tf.raw_ops.Empty(shape=[size // 12 + (1 << 20)], dtype=tf.complex128, init=False)  # 16 bytes each


def _make(shapes: Sequence[tuple[list[int], tf.DType]]) -> Tree:
    return place([tf.zeros(shape, dtype) for shape, dtype in shapes], owned=True)


def _cast(layer: MLAParams, dtype: str) -> MLAParams:
    return tree.map_with_path(lambda path, leaf: leaf if path.endswith("norm") else tf.cast(leaf, dtype), layer)


def _hidden(at: int, count: int, width: int, dtype: str) -> tf.Tensor:
    """Hidden states `[1, count, D]` of tokens from `at` on, as a norm leaves them."""
    return tf.cast(np.random.default_rng([at, 1]).standard_normal([1, count, width], np.float32), dtype)


def _shapes(cfg: MLAConfig, kind: str, dtype: str, layers: int, size: int) -> list[tuple[list[int], tf.DType]]:
    """Shapes and dtypes of a cache's tensors: one of latents, or keys and values, in which heads stand beside layers."""
    if kind == "plain":
        return [([layers * cfg.num_heads, 1, size, width], tf.as_dtype(dtype)) for width in (cfg.qk_dim, cfg.v_dim)]
    width, kept = (latent_bytes(cfg.kv_latent, cfg.rope_dim), "uint8") if dtype == "float8" else (cfg.cache_width, dtype)
    return [([layers, 1, size, width], tf.as_dtype(kept))]


def _fill(cfg: MLAConfig, policy: ComputePolicy, kind: str) -> Callable:
    """A compiled step that writes a chunk into all layers' caches."""

    def step(state, layers, hidden, start):
        table = mla_rope(cfg, tf.expand_dims(start, 1) + tf.range(hidden.shape[1]))
        # Only the entries are wanted: of the attention nothing is computed.
        entries = [mla_apply(layer, hidden, cfg=cfg, table=table, policy=policy).entry for layer in layers]
        if kind == "latent":
            return [RowWrite(tf.stack(entries), start)], ()
        pairs = [mla_expand(layer, entry, cfg=cfg, policy=policy) for layer, entry in zip(layers, entries)]
        return [RowWrite(tf.expand_dims(tf.concat([part[0] for part in parts], 0), 1), start) for parts in zip(*pairs)], ()

    return compile_step(step, jit=policy.jit)


def _attend(cfg: MLAConfig, policy: ComputePolicy, kind: str) -> Callable:
    """A compiled step of the last layer's attention: of one token, which comes behind the whole cache."""
    policy = policy if policy.jit else policy.replace(fuse=False)  # as the engine decodes

    @tf.function(autograph=False, jit_compile=policy.jit)
    def step(state, params, x):
        parts = [tf.convert_to_tensor(leaf) for leaf in state]
        length = tf.constant([parts[0].shape[2]])
        if kind == "latent":
            cache = LayerCache(parts[0][-1], length)
            return mla_apply(params, x, cfg=cfg, cache=cache, form="absorbed", policy=policy).out
        k, v = (tf.reshape(part[-cfg.num_heads :], [1, cfg.num_heads, *part.shape[2:]]) for part in parts)  # no copy
        entry = mla_apply(params, x, cfg=cfg, table=mla_rope(cfg, tf.expand_dims(length, 1)), policy=policy).entry
        return plain_apply(params, x, entry, PlainCache(k, v, length), cfg=cfg, policy=policy)

    return step
