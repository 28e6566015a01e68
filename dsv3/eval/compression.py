"""What compressed weights and caches cost beside a reference: bytes, errors of logits, greedy tokens that differ, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.nn.cache import cache_bytes
from dsv3.nn.model import ModelParams, RouterState, model_apply
from dsv3.policy import ComputePolicy
from dsv3.serve import Completion, Engine, Request
from dsv3.typing import Tree


class Variant(NamedTuple):
    """One way to hold a model: its parameters, and how it is computed (`policy.cache` is that of the cache)."""

    name: str
    params: ModelParams
    policy: ComputePolicy


class LogitDifference(NamedTuple):
    """How far logits are from a reference's.

    Attributes:
      error: `|logits − reference| / |reference|`, norms over all positions and the vocabulary.
      agreement: share of positions whose best token is the same, each after the text's own tokens.
    """

    error: float
    agreement: float


class Speed(NamedTuple):
    """Tokens a second: of prompts that are read, and of tokens that are drawn after them."""

    prefill: float
    decode: float


def tree_bytes(values: Tree) -> int:
    """Returns the bytes of all tensors of a tree."""
    return sum(int(leaf.shape.num_elements()) * leaf.dtype.size for leaf in tree.flatten(values))


def variant_cache_bytes(variant: Variant, cfg: ModelConfig) -> int:
    """Returns the bytes that the variant's cache takes for one token in all layers."""
    dtype = variant.policy.cache or variant.policy.dtype or variant.params.embed.dtype
    return cache_bytes(cfg, 1, dtype=dtype)


def compare_logits(
    variants: Sequence[Variant], router: RouterState, rows: np.ndarray, *, cfg: ModelConfig, references: Sequence[int]
) -> list[list[LogitDifference]]:
    """Compares the logits of variants with those of some among them, over the same text.

    Args:
      variants: see `Variant`.
      router: the model's selection biases.
      rows: `[N, T]` int32, texts; they are computed one at a time.
      cfg: the configuration.
      references: numbers of variants.

    Returns:
      For each variant and reference a `LogitDifference`.

    Raises:
      ValueError: no text, or a reference that is none of the variants.
    """
    check(rows.ndim == 2 and rows.size > 0, f"compare_logits: `rows` has shape {rows.shape}, want [N, T], not empty")
    check(
        all(0 <= i < len(variants) for i in references),
        f"compare_logits: `references` is {list(references)}, want numbers below {len(variants)}",
    )

    def compiled(policy: ComputePolicy):
        def logits(params, tokens):
            return tf.cast(model_apply(params, router, tokens, cfg=cfg, policy=policy).logits[0], tf.float32)

        return tf.function(logits, jit_compile=policy.jit, autograph=False)

    text = tf.TensorSpec([1, rows.shape[1]], tf.int32)
    functions = [compiled(variant.policy).get_concrete_function(variant.params, text) for variant in variants]
    sums = np.zeros([len(variants), len(references), 3])  # |difference|², |reference|², positions that agree
    for row in rows:
        found = [fn(v.params, tf.constant(row[None])).numpy() for fn, v in zip(functions, variants)]
        for i, mine in enumerate(found):
            for j, reference in enumerate(references):
                other = found[reference]
                same = np.sum(mine.argmax(-1) == other.argmax(-1))
                sums[i, j] += np.sum(np.square(mine - other), dtype=np.float64), np.sum(other**2, dtype=np.float64), same
    return [[LogitDifference(float(np.sqrt(d / r)), float(n / rows.size)) for d, r, n in line] for line in sums]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two sequences begin with in common.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def measure_speed(
    engines: Sequence[Engine], prompts: Sequence[Sequence[int]], *, new_tokens: int, turns: int
) -> list[Speed]:
    """Times engines in turns, so that all of them meet the same disturbances; what is compiled was so before.

    Args:
      engines: of models with one vocabulary.
      prompts: token ids, each of at least two.
      new_tokens: tokens that are drawn greedily after each prompt, at least 2.
      turns: of each engine.

    Returns:
      The engines' `Speed`: medians. Reading is timed with one new token, drawing by the difference.
    """
    check(new_tokens >= 2, f"measure_speed: `new_tokens` is {new_tokens}, want at least 2")
    check(turns >= 1, f"measure_speed: `turns` is {turns}, want at least 1")
    read = sum(len(prompt) for prompt in prompts)
    cases = [[Request(prompt, max_new_tokens=n, stop_tokens=()) for prompt in prompts] for n in (1, new_tokens)]
    times = np.zeros([turns + 1, len(engines), 2])
    for turn in range(turns + 1):  # the first compiles
        for i, engine in enumerate(engines):
            for j, requests in enumerate(cases):
                start = time.monotonic()
                engine.generate(requests)
                times[turn, i, j] = time.monotonic() - start
    drawn = len(prompts) * (new_tokens - 1)
    speeds = []
    for i in range(len(engines)):
        first, both = times[1:, i].T
        drawing = statistics.median(np.maximum(both - first, 1e-9))
        speeds.append(Speed(read / statistics.median(first), drawn / drawing))
    return speeds


def generate_greedy(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Completion]:
    """Continues `prompts` with the `engine`'s best tokens, `new_tokens` of them, whatever ends a text: completions."""
    return engine.generate([Request(prompt, max_new_tokens=new_tokens, stop_tokens=()) for prompt in prompts])
