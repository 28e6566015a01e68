"""How well a model answers: held-out conversations, packed, of which the learned tokens are scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_token_ids
from dsv3.config import ModelConfig
from dsv3.data import PackedDocuments, heldout_batches
from dsv3.eval.text import window_sums
from dsv3.nn.model import ModelParams, RouterState
from dsv3.policy import ComputePolicy, default_policy


class AnswerScore(NamedTuple):
    """How a model predicts the tokens that count.

    Attributes:
      nll: nats a token. top1: share of tokens that were the most likely one.
      mtp_nll, mtp_agreement: of the first MTP module, see `TextScore`; NaN without one, or where nothing counts for it.
      tokens: how many tokens count.
    """

    nll: float
    top1: float
    mtp_nll: float
    mtp_agreement: float
    tokens: int


AnswerEvaluator = Callable[[ModelParams, RouterState, PackedDocuments], AnswerScore]


def make_answer_evaluator(
    cfg: ModelConfig, *, batch_size: int = 8, policy: ComputePolicy | None = None
) -> AnswerEvaluator:
    """Compiles an evaluation of packed rows, whose documents do not see each other.

    Args:
      cfg: the model's configuration.
      batch_size: rows computed at a time.
      policy: how to compute; default: the device's.

    Returns:
      `evaluate(params, router, packed) -> AnswerScore`; `evaluate.traces()` counts compilations, one for a length of rows.

    Raises:
      ValueError: `batch_size` below 1; later, a token id outside the vocabulary, or rows in which nothing counts.
    """
    check(batch_size >= 1, f"make_answer_evaluator: `batch_size` is {batch_size}, want at least 1")
    policy = (policy or default_policy()).replace(remat="none")

    @tf.function(jit_compile=policy.jit, autograph=False)
    def sums(params, router, tokens, weights, segments):
        return window_sums(params, router, tokens, weights, segments, cfg=cfg, policy=policy)

    def evaluate(params: ModelParams, router: RouterState, packed: PackedDocuments) -> AnswerScore:
        check_token_ids("evaluate", "packed", packed.tokens, cfg.vocab_size)
        params, router = (tree.map_leaves(tf.convert_to_tensor, part) for part in (params, router))
        total = np.zeros(6)
        for batch in heldout_batches(packed, batch_size):
            total += [float(value) for value in sums(params, router, *map(tf.constant, batch))]
        nll, hits, count, mtp_nll, agreed, mtp_count = total
        check(count > 0, "evaluate: `packed` has no target that counts, want at least one")
        mtp = (mtp_nll / mtp_count, agreed / mtp_count) if mtp_count else (math.nan, math.nan)
        return AnswerScore(nll / count, hits / count, *mtp, int(count))

    evaluate.traces = sums.experimental_get_tracing_count
    return evaluate
