"""Bits per byte of held-out documents: what a model, used as a compressor, would need for each byte of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_token_ids
from dsv3.config import ModelConfig
from dsv3.data import Batch, TokenStream
from dsv3.graph import plain
from dsv3.nn.model import ModelParams, RouterState, head_weight, model_apply, mtp_chain
from dsv3.ops.loss import token_nll
from dsv3.ops.segments import segment_inputs
from dsv3.policy import ComputePolicy, default_policy


class TextScore(NamedTuple):
    """How a model predicts text.

    Attributes:
      bits_per_byte: `Σ nll / (ln 2 · bytes)`, over all tokens but the first, borders of documents included.
      nll: nats a token. top1: share of tokens that were the most likely one.
      mtp_nll: nats a token of the first MTP module (the token after the next), NaN without one.
      mtp_agreement: share of positions where that module's best guess is the model's own one position later: about the
        share of drafted tokens that greedy speculative decoding accepts. NaN without a module.
      tokens, bytes: how much text this is.
    """

    bits_per_byte: float
    nll: float
    top1: float
    mtp_nll: float
    mtp_agreement: float
    tokens: int
    bytes: int


Evaluator = Callable[[ModelParams, RouterState, TokenStream], TextScore]


def make_evaluator(
    cfg: ModelConfig, *, length: int, batch_size: int = 8, overlap: int = 0, policy: ComputePolicy | None = None
) -> Evaluator:
    """Compiles an evaluation once, for any number of models of one configuration and texts of any length.

    Args:
      cfg: the model's configuration.
      length: tokens of a window.
      batch_size: windows computed at a time.
      overlap: tokens at the beginning of a window that the window before has counted, and which serve as context only:
        0 is fastest, `length // 2` gives every token at least so much context.
      policy: how to compute; default: the device's.

    Returns:
      `evaluate(params, router, stream) -> TextScore`; `evaluate.traces()` counts compilations.

    Raises:
      ValueError: window or overlap out of range; later, a token id outside the vocabulary, by name.
    """
    check(1 <= length <= cfg.max_length, f"make_evaluator: `length` is {length}, want 1 to max_length={cfg.max_length}")
    check(0 <= overlap < length, f"make_evaluator: `overlap` is {overlap}, want 0 to length - 1 = {length - 1}")
    check(batch_size >= 1, f"make_evaluator: `batch_size` is {batch_size}, want at least 1")
    policy = (policy or default_policy()).replace(remat="none")

    @tf.function(jit_compile=policy.jit, autograph=False)
    def sums(params, router, tokens, weights):
        return window_sums(params, router, tokens, weights, cfg=cfg, policy=policy)

    def evaluate(params: ModelParams, router: RouterState, stream: TokenStream) -> TextScore:
        check_token_ids("evaluate", "stream", stream.tokens, cfg.vocab_size)
        params, router = (tree.map_leaves(tf.convert_to_tensor, part) for part in (params, router))
        total = np.zeros(6)
        for batch in text_windows(stream.tokens, length, batch_size=batch_size, overlap=overlap):
            total += [float(value) for value in sums(params, router, *map(tf.constant, batch))]
        nll, hits, count, mtp_nll, agreed, mtp_count = total
        size = int(stream.text_bytes.sum())
        check(size > 0, "evaluate: `stream` holds no text, want at least one byte")
        mtp = (mtp_nll / mtp_count, agreed / mtp_count) if mtp_count else (math.nan, math.nan)
        return TextScore(nll / math.log(2) / size, nll / count, hits / count, *mtp, int(count), size)

    evaluate.traces = sums.experimental_get_tracing_count
    return evaluate


def bits_per_byte(
    params: ModelParams,
    router: RouterState,
    stream: TokenStream,
    *,
    cfg: ModelConfig,
    length: int | None = None,
    batch_size: int = 8,
    overlap: int | None = None,
    policy: ComputePolicy | None = None,
) -> float:
    """Bits that the model needs for a byte of text, its own cost of the documents' borders included.

    Args:
      params, router: the model's parameters and selection biases.
      stream: the documents' tokens and sizes, see `dsv3.data.encode_documents`.
      cfg, length, batch_size, overlap, policy: as in `make_evaluator`; by default windows of up to 1024 tokens that
        overlap by half.

    Returns:
      `Σ nll / (ln 2 · bytes)`, comparable between tokenizers and with `dsv3.data.compression_bits_per_byte`.
    """
    length = min(cfg.max_length, 1024) if length is None else length
    overlap = length // 2 if overlap is None else overlap
    evaluate = make_evaluator(cfg, length=length, batch_size=batch_size, overlap=overlap, policy=policy)
    return evaluate(params, router, stream).bits_per_byte


def text_windows(tokens: np.ndarray, length: int, *, batch_size: int = 8, overlap: int = 0) -> Iterator[Batch]:
    """Yields windows over a stream in batches of one shape; every token but the first is counted exactly once.

    Args:
      tokens: `[N]` int32, at least two.
      length: T, inputs of a window. A shorter stream, and the last window, are filled up with zeros of weight 0.
      batch_size: B. overlap: tokens of context that a window repeats from the one before.

    Yields:
      `Batch` of tokens `[B, T+1]` and weights `[B, T]`; the weights sum to N − 1 in all.

    >>> [batch.tokens.tolist() for batch in text_windows(np.arange(5), 3, batch_size=1, overlap=1)]
    [[[0, 1, 2, 3]], [[2, 3, 4, 0]]]
    """
    check(len(tokens) >= 2, f"text_windows: `tokens` has {len(tokens)} tokens, want at least 2")
    stride = length - overlap
    starts = [0, *range(stride, max(len(tokens) - 1 - overlap, 1), stride)]
    for first in range(0, len(starts), batch_size):
        rows = np.zeros([batch_size, length + 1], np.int32)
        weights = np.zeros([batch_size, length], np.float32)
        for row, start in enumerate(starts[first : first + batch_size]):
            piece = tokens[start : start + length + 1]
            rows[row, : len(piece)] = piece
            weights[row, overlap if start else 0 : len(piece) - 1] = 1.0
        yield Batch(rows, weights)


@plain
def window_sums(
    params: ModelParams, router: RouterState, tokens: tf.Tensor, weights: tf.Tensor, segments: tf.Tensor | None = None, *,
    cfg: ModelConfig, policy: ComputePolicy,
) -> tuple[tf.Tensor, ...]:  # fmt: skip
    """Sums over the rows of a batch: nll, hits, targets; and of the first MTP module nll, agreements, targets.

    Args:
      params, router, cfg, policy: the model, and how to compute.
      tokens: `[B, T+1]`. weights: `[B, T]`, of the targets.
      segments: `[B, T+1]`, the documents of packed rows, whose borders then have no weight; `None`: a row is one.

    Returns:
      Six float32 scalars.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    where, inside = {}, tf.ones_like(weights)
    if segments is not None:
        packed = segment_inputs(segments)
        where = {"segments": packed.segments, "positions": packed.positions, "mask": packed.inside}
        inside = tf.cast(packed.inside, weights.dtype)
        weights *= inside
    out = model_apply(params, router, inputs, cfg=cfg, **where, policy=policy)
    head = tf.cast(head_weight(params), out.hidden.dtype)

    def losses(hidden, targets):
        flat = tf.reshape(hidden, [-1, cfg.hidden_size])
        nll = token_nll(flat, head, tf.reshape(targets, [-1]), chunk=policy.loss_chunk, fuse=policy.fuse)
        best = tf.map_fn(
            lambda row: tf.argmax(tf.matmul(row, head), -1, output_type=tf.int32), hidden, fn_output_signature=tf.int32
        )
        return tf.reshape(nll, tf.shape(targets)), best

    nll, best = losses(out.hidden, targets)
    hits = tf.cast(tf.equal(best, targets), tf.float32)
    sums = [tf.reduce_sum(nll * weights), tf.reduce_sum(hits * weights), tf.reduce_sum(weights)]
    if not cfg.num_mtp_layers:
        return (*sums, *[tf.constant(0.0)] * 3)
    chain = mtp_chain(params, router, out, targets, cfg=cfg, **where, policy=policy)
    later, later_weights = (tf.pad(x[:, 1:], [[0, 0], [0, 1]]) for x in (targets, weights))
    later_weights *= inside
    mtp_nll, guess = losses(chain.normed[0], later)
    agreed = tf.cast(tf.equal(guess, tf.concat([best[:, 1:], best[:, -1:]], 1)), tf.float32)
    return (*sums, *(tf.reduce_sum(x * later_weights) for x in (mtp_nll, agreed, tf.ones_like(agreed))))
