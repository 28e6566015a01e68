"""Generation's three steps as pure functions of caches and rows: prefill a chunk, decode a token, decode with drafts.

A row whose cache holds tokens 0.. n−1 also carries token n, the last one known: a step reads it and draws token n + 1.
So a prompt is prefilled without its last token, no step needs a head over a whole chunk, and a row whose neighbours take
more (longer prompts, more accepted drafts) just advances by less: what was written behind its length is overwritten.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.compiled import RowWrite
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.cache import Cache, entry_format
from dsv3.nn.model import ModelOutput, ModelParams, RouterState, model_apply
from dsv3.ops.random import key_fold
from dsv3.ops.sampling import greedy_accept, sample, sampling_probs, speculative_accept
from dsv3.policy import ComputePolicy
from dsv3.serve.draft import Drafts, Window, mtp_draft, mtp_prefill, window_init, window_push
from dsv3.typing import TensorLike


class Caches(NamedTuple):
    """The donated state: `trunk` `[layers, B, S, W]` and `mtp` `[modules, B, S, W]`, or `()` without drafts.

    With `ComputePolicy.cache` the last dim is bytes, see `ops.latent`.
    """

    trunk: tf.Tensor
    mtp: tf.Tensor


class Rows(NamedTuple):
    """Where each row of a batch is.

    Attributes:
      length: `[B]` int32, tokens in the caches.
      token: `[B]` int32, the token after them.
      index: `[B]` int32, tokens drawn so far; it makes a row's random key new in each step.
      window: what drafting needs, or `()`.
    """

    length: tf.Tensor
    token: tf.Tensor
    index: tf.Tensor
    window: Window


class Sampling(NamedTuple):
    """How each row is sampled: `key` `[B, 2]` int32; `temperature`, `top_p` `[B]` float32; `top_k` `[B]` int32."""

    key: tf.Tensor
    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor


class Record(NamedTuple):
    """What training on the drawn tokens wants to know of the pass that drew them.

    Attributes:
      logprobs: `[B, T]` float32, at the row's temperature: log-softmax of logits / temperature (at 0: of the logits).
      experts: `[X, B, T, K]` int32, the experts of each mixture layer at the position that drew the token.
    """

    logprobs: tf.Tensor
    experts: tf.Tensor


class Drawn(NamedTuple):
    """The new tokens of one step.

    Attributes:
      tokens: `[B, T]` int32; a row's first `count` are new.
      count: `[B]` int32, 0 for rows that are not active.
      logprobs: `[B, T]` float32, log-softmax of the model's logits at the tokens, whatever the temperature.
      top_ids, top_logprobs: `[B, T, top]`, the best tokens.
      record: see `Record`; `()` where nothing is recorded.
    """

    tokens: tf.Tensor
    count: tf.Tensor
    logprobs: tf.Tensor
    top_ids: tf.Tensor
    top_logprobs: tf.Tensor
    record: Record | tuple = ()


def state_init(
    cfg: ModelConfig, batch: int, size: int, *, dtype: tf.DType, cache: str | None = None, modules: int = 0, depth: int = 0
) -> tuple[Caches, Rows]:
    """Returns empty caches of `size` tokens for `batch` rows, and rows at their beginning.

    Args:
      cfg, batch, size: the model's configuration, rows, and tokens that a row can hold.
      dtype: the compute dtype.
      cache: `"float8"` for caches in FP8, as of `ComputePolicy`.
      modules, depth: see `speculative_step`; 0 without drafts.
    """
    width, kept = entry_format(cfg, cache or dtype)
    trunk = tf.zeros([cfg.num_layers, batch, size, width], kept)
    mtp = tf.zeros([modules, batch, size, width], kept) if modules else ()
    zero = tf.zeros([batch], tf.int32)
    window = window_init(batch, depth + modules, cfg.hidden_size, dtype) if modules else ()
    return Caches(trunk, mtp), Rows(zero, zero, zero, window)


@plain
def prefill_step(
    caches: Caches,
    params: ModelParams,
    router: RouterState,
    rows: Rows,
    tokens: TensorLike,
    counts: TensorLike,
    *,
    cfg: ModelConfig,
    policy: ComputePolicy,
    modules: int = 0,
    first: bool = False,
    record: bool = False,
) -> tuple[Caches, tuple[Rows, tf.Tensor | tuple]]:
    """Reads a chunk of each row's prompt into the caches.

    Args:
      caches: with room for `length + T` tokens in every row.
      params, router: the model.
      rows: see `Rows`; `token` and `index` are not looked at.
      tokens: `[B, T + modules]` int: the chunk, and for the MTP modules the tokens behind it.
      counts: `[B]` int32: how many of the T tokens are the row's; the others are padding on the right.
      cfg, policy: configuration, and how to compute.
      modules: MTP modules whose caches are filled too.
      first: promises that all caches are empty, so that the chunk is read as a sequence of its own: half the attention's
        work or less.
      record: whether to return the experts.

    Returns:
      New caches (as `RowWrite`s), and the new rows with the experts of the chunk, `[X, B, T, K]`, or `()`.
    """
    params = tree.map_leaves(tf.convert_to_tensor, params)
    chunk = tokens.shape[1] - modules
    cache = None if first else Cache(caches.trunk, rows.length)
    out = model_apply(params, router, tokens[:, :chunk], cfg=cfg, cache=cache, policy=policy)
    new, window = Caches(RowWrite(out.entries, rows.length), ()), ()
    if modules:
        hidden = _mtp_input(out, cfg)
        kv = None if first else caches.mtp
        entries = mtp_prefill(
            params, router, kv, hidden, tokens, rows.length, cfg=cfg, policy=policy, modules=modules
        )
        new = new._replace(mtp=RowWrite(entries, rows.length))
        window = window_push(rows.window, hidden, tokens[:, 1 : chunk + 1], counts, keep=modules)
    rows = rows._replace(length=rows.length + counts, window=window)
    return new, (rows, _experts(out, cfg) if record else ())


@plain
def decode_step(
    caches: Caches,
    params: ModelParams,
    router: RouterState,
    rows: Rows,
    sampling: Sampling,
    active: TensorLike,
    *,
    cfg: ModelConfig,
    policy: ComputePolicy,
    greedy: bool = False,
    top: int = 0,
    record: bool = False,
) -> tuple[Caches, tuple[Rows, Drawn]]:
    """Draws one token for each row.

    Args:
      caches: with room for one more token in every row.
      params, router: the model.
      rows, sampling: see `Rows` and `Sampling`.
      active: `[B]` bool; other rows stay where they are.
      cfg, policy: configuration, and how to compute.
      greedy: promises that every temperature is 0.
      top: how many of the best tokens' log-probabilities to return.
      record: whether to return a `Record`.

    Returns:
      New caches (as `RowWrite`s), and the new rows with what was drawn, `Drawn` with T = 1.
    """
    params = tree.map_leaves(tf.convert_to_tensor, params)
    tokens = tf.expand_dims(rows.token, 1)
    cache = Cache(caches.trunk, rows.length)
    out = model_apply(params, router, tokens, cfg=cfg, cache=cache, form="absorbed", policy=policy)
    logits = tf.cast(out.logits[:, 0], tf.float32)
    if greedy:
        token = tf.argmax(logits, -1, output_type=tf.int32)
    else:
        probs = sampling_probs(
            logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
        token = sample(key_fold(sampling.key, rows.index), probs)
    count = tf.cast(active, tf.int32)
    new_rows = Rows(rows.length + count, tf.where(active, token, rows.token), rows.index + count, rows.window)
    drawn = _drawn(tf.expand_dims(logits, 1), tf.expand_dims(token, 1), count, top)
    if record:
        drawn = _recorded(drawn, tf.expand_dims(logits, 1), sampling, out, cfg)
    return Caches(RowWrite(out.entries, rows.length), caches.mtp), (new_rows, drawn)


@plain
def speculative_step(
    caches: Caches,
    params: ModelParams,
    router: RouterState,
    rows: Rows,
    sampling: Sampling,
    active: TensorLike,
    *,
    cfg: ModelConfig,
    policy: ComputePolicy,
    depth: int,
    modules: int,
    greedy: bool = False,
    top: int = 0,
    record: bool = False,
) -> tuple[Caches, tuple[Rows, Drawn]]:
    """Drafts `depth` tokens with the MTP modules, checks all of them in one forward pass, keeps what the model would say.

    Args:
      caches: with room for `2·depth + 1` more tokens in every row.
      params, router, rows, sampling, active, cfg, policy, greedy, top, record: as in `decode_step`.
      depth: drafted tokens. modules: MTP modules that draft them; a depth beyond chains the last module on itself.

    Returns:
      As `decode_step`, with T = depth + 1: a row gets its accepted drafts and one token of the model's own.

    References: arXiv:2211.17192; DeepSeek-V3 section 2.2 (inference).
    """
    params = tree.map_leaves(tf.convert_to_tensor, params)
    key = None if greedy else key_fold(sampling.key, rows.index)
    drafts = mtp_draft(
        params, router, caches.mtp, rows.window, rows.length, None if greedy else (key, sampling),
        cfg=cfg, policy=policy, depth=depth, modules=modules,
    )  # fmt: skip
    tokens = tf.concat([tf.expand_dims(rows.token, 1), drafts.tokens], 1)
    cache = Cache(caches.trunk, rows.length)
    out = model_apply(params, router, tokens, cfg=cfg, cache=cache, form="absorbed", policy=policy)
    logits = tf.cast(out.logits, tf.float32)
    accepted, token = _accept(drafts, logits, key, sampling, greedy)
    count = tf.where(active, accepted + 1, 0)
    stays = tf.expand_dims(tf.range(depth + 1), 0) < tf.expand_dims(accepted, 1)
    drawn = tf.where(stays, tf.pad(drafts.tokens, [[0, 0], [0, 1]]), tf.expand_dims(token, 1))
    # Modules after the first read tokens further on: positions that met a refused draft are done again.
    keep = tf.where(active, count + modules - 1, rows.window.count)
    window = window_push(rows.window, _mtp_input(out, cfg), drawn, count, keep=keep)
    new_rows = Rows(rows.length + count, tf.where(active, token, rows.token), rows.index + count, window)
    new = Caches(RowWrite(out.entries, rows.length), RowWrite(drafts.entries, drafts.starts))
    found = _drawn(logits, drawn, count, top)
    return new, (new_rows, _recorded(found, logits, sampling, out, cfg) if record else found)


def _mtp_input(out: ModelOutput, cfg: ModelConfig) -> tf.Tensor:
    return out.hidden if cfg.mtp_hidden == "normed" else out.raw_hidden


def _accept(drafts: Drafts, logits, key, sampling: Sampling, greedy: bool) -> tuple[tf.Tensor, tf.Tensor]:
    if greedy:
        return greedy_accept(drafts.tokens, tf.argmax(logits, -1, output_type=tf.int32))
    settings = {name: tf.expand_dims(getattr(sampling, name), 1) for name in ("temperature", "top_k", "top_p")}
    # Number 0 of the step's key; the drafts took the numbers from 1 on.
    return speculative_accept(key_fold(key, 0), drafts.tokens, drafts.probs, sampling_probs(logits, **settings))


def _drawn(logits: tf.Tensor, tokens: tf.Tensor, count: tf.Tensor, top: int) -> Drawn:
    logprobs = tf.nn.log_softmax(logits, -1)
    best = tf.math.top_k(logprobs, top)
    return Drawn(tokens, count, tf.gather(logprobs, tokens, batch_dims=2), best.indices, best.values)


def _recorded(drawn: Drawn, logits: tf.Tensor, sampling: Sampling, out: ModelOutput, cfg: ModelConfig) -> Drawn:
    temperature = tf.where(sampling.temperature > 0, sampling.temperature, 1.0)
    scaled = logits / tf.reshape(temperature, [-1, 1, 1])
    logprobs = tf.gather(scaled, drawn.tokens, batch_dims=2) - tf.reduce_logsumexp(scaled, -1)
    return drawn._replace(record=Record(logprobs, _experts(out, cfg)))


def _experts(out: ModelOutput, cfg: ModelConfig) -> tf.Tensor:
    """The experts of all mixture layers, `[X, B, T, K]`; a model without any has X = 0."""
    if out.stats:
        return out.stats.experts
    return tf.zeros([0, *out.logits.shape[:2], cfg.moe.router.top_k], tf.int32)
