"""A long context for real: a prompt that an engine reads in chunks and continues, and the same tokens in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.nn.cache import cache_bytes
from dsv3.nn.linear import linear_apply
from dsv3.nn.model import ModelParams, RouterState, cast_params, head_weight, model_apply, model_specs
from dsv3.policy import ComputePolicy, default_policy
from dsv3.serve import Engine, Request
from dsv3.spec import count_params

BEST = 512  # tokens whose log-probabilities an engine is asked for
RUNTIME_BYTES = 250 << 20  # graphs and compiled kernels
_TILE = 1024  # tokens of the past whose keys a chunk sees at a time


class Continued(NamedTuple):
    """What an engine made of a long prompt.

    Attributes:
      tokens: `[N]`, the new ones, greedy.
      best: `[N, K]`, ids of the best `BEST` tokens, or of all, at their places. logprobs: `[N, K]` float32, of these.
      read_seconds: until the whole prompt was in the cache, tracing included.
      read_rate: tokens a second from the third chunk on, before which there is tracing; of fewer chunks, of all.
      step_seconds: of a new token, the median without the first.
    """

    tokens: np.ndarray
    best: np.ndarray
    logprobs: np.ndarray
    read_seconds: float
    read_rate: float
    step_seconds: float


class Whole(NamedTuple):
    """One forward pass: `logprobs` `[last, V]` float32, the seconds that it took, and those that tracing took before."""

    logprobs: np.ndarray
    seconds: float
    trace_seconds: float


def continue_context(
    cfg: ModelConfig,
    params: ModelParams,
    router: RouterState,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    policy: ComputePolicy | None = None,
    chunk: int = 512,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Continued:
    """Reads a prompt into the latent cache in chunks and draws greedy tokens after it, with `serve.Engine`.

    Args:
      cfg, params, router: the model.
      prompt: token ids.
      new_tokens: N, two or more.
      policy: how to compute; default: the device's.
      chunk: tokens of a chunk.
      on_chunk: see `Engine`.

    Raises:
      ValueError: a prompt that with its new tokens is longer than the model's maximum, or too few new tokens.
    """
    check(new_tokens > 1, f"continue_context: `new_tokens` is {new_tokens}, want 2 or more")
    read: list[tuple[int, float]] = []

    def note(done: int, total: int) -> None:
        read.append((done, time.monotonic()))
        if on_chunk is not None:
            on_chunk(done, total)

    how = {"policy": policy, "max_length": len(prompt) + new_tokens, "max_batch": 1}
    engine = Engine(cfg, params, router, chunk_sizes=(chunk,), on_chunk=note, **how)
    request = Request(prompt, max_new_tokens=new_tokens, stop_tokens=(), top_logprobs=min(cfg.vocab_size, BEST))
    start, steps, done = time.monotonic(), [], None
    for event in engine.stream([request]):
        steps.append(time.monotonic())
        done = event.completion
    best = np.array(done.top_logprobs)  # [N, K, 2]
    first = read[1] if len(read) > 2 else (0, start)
    last = read[-1] if read else (len(prompt), steps[0])
    rate = (last[0] - first[0]) / max(last[1] - first[1], 1e-9)
    pairs = best[..., 0].astype(np.int64), best[..., 1].astype(np.float32)
    return Continued(np.array(done.tokens), *pairs, last[1] - start, rate, float(np.median(np.diff(steps))))


def whole_logprobs(
    cfg: ModelConfig,
    params: ModelParams,
    router: RouterState,
    tokens: Sequence[int],
    *,
    last: int,
    policy: ComputePolicy | None = None,
) -> Whole:
    """Computes one forward pass over all tokens, without a cache, and the log-probabilities at its end.

    The logits of other places, `[T, V]` in all, are never made.

    Args:
      cfg, params, router: the model.
      tokens: `[T]` ids.
      last: positions at the end whose log-probabilities are wanted.
      policy: how to compute; default: the device's.

    Raises:
      ValueError: more positions than tokens.
    """
    check(0 < last <= len(tokens), f"whole_logprobs: `last` is {last}, want 1 to the {len(tokens)} `tokens`")
    policy = policy or default_policy()

    @tf.function(autograph=False, jit_compile=policy.jit)
    def run(params: ModelParams, router: RouterState, ids: tf.Tensor) -> tf.Tensor:
        out = model_apply(params, router, ids, cfg=cfg, policy=policy)
        logits = linear_apply(out.hidden[:, -last:], head_weight(cast_params(params, policy)))
        return tf.nn.log_softmax(tf.cast(logits[0], tf.float32))

    ids, start = tf.constant([list(tokens)], tf.int32), time.monotonic()
    run.get_concrete_function(params, router, ids)
    traced = time.monotonic()
    logprobs = run(params, router, ids).numpy()
    return Whole(logprobs, time.monotonic() - traced, traced - start)


def context_bytes(cfg: ModelConfig, tokens: int, *, chunk: int | None, dtype: str, cache: str | None = None) -> int:
    """Estimates the memory that a context needs beside a program that is loaded: parameters, cache, what is there meanwhile.

    Both ways are linear in `tokens`: reading in chunks needs the cache and a fixed part, one pass the widest layer's values.

    Args:
      cfg: the model's configuration.
      tokens: of the whole context, one sequence.
      chunk: tokens of a chunk, of `continue_context`; `None` for `whole_logprobs`.
      dtype: of parameters and products. cache: `"float8"`, as of `ComputePolicy`.

    Returns:
      Bytes, rather too many than too few.
    """
    check(tokens > 0, f"context_bytes: `tokens` is {tokens}, want > 0")
    size, m, experts = tf.as_dtype(dtype).size, cfg.mla, cfg.moe
    top = experts.router.top_k if cfg.num_moe_layers else 0
    widest = max(
        m.num_heads * (4 * m.qk_dim + 3 * m.v_dim),  # queries and keys in two layouts, values and outputs
        top * (2 * cfg.hidden_size + 4 * experts.intermediate_size),  # rows in and out, gate and up, their product
        3 * cfg.intermediate_size if cfg.num_dense_layers else 0,
    )
    a_token = size * (2 * cfg.hidden_size + widest)
    fixed = RUNTIME_BYTES + size * count_params(model_specs(cfg))
    if chunk is None:
        return fixed + tokens * (a_token + size * cfg.num_layers * m.cache_width)
    decoding = 4 * 4 * m.num_heads + (2 * size * m.cache_width if cache else 0)  # scores, and a layer's latents decoded
    tiles = 4 * 4 * m.num_heads * chunk * (chunk + _TILE)
    return fixed + chunk * a_token + tiles + tokens * decoding + cache_bytes(cfg, tokens, dtype=cache or dtype)
