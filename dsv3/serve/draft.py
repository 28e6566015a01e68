"""Drafting with the MTP modules: what they have read, what must be read again, and the tokens that they propose.

Module k (from 1) reads, at position i, the previous module's hidden state there and token i + k; it proposes token
i + k + 1. It has a latent cache of its own. The positions that it has not read with their true tokens are a row's window:
those that the model has just added, and the few before them whose later tokens were refused drafts.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.linear import linear_apply
from dsv3.nn.mla import LayerCache, mla_rope
from dsv3.nn.model import ModelParams, RouterState, embed_apply, head_weight
from dsv3.nn.mtp import MTPOutput, mtp_apply, mtp_next_hidden
from dsv3.ops.random import key_fold
from dsv3.ops.sampling import sample, sampling_probs
from dsv3.policy import ComputePolicy
from dsv3.typing import TensorLike


class Window(NamedTuple):
    """The last positions of each row, which end where its cache ends.

    Attributes:
      hidden: `[B, w, D]`, the model's hidden states there.
      tokens: `[B, w]` int32, at each position the token after it.
      count: `[B]` int32, how many of the w entries are filled.
    """

    hidden: tf.Tensor
    tokens: tf.Tensor
    count: tf.Tensor


class Drafts(NamedTuple):
    """What the modules propose.

    Attributes:
      tokens: `[B, depth]` int32. probs: `[B, depth, V]` float32, what they were drawn from; `()` for greedy drafts.
      entries: `[modules, B, T, W]`, cache entries from each row's `starts` `[B]` on.
    """

    tokens: tf.Tensor
    probs: tf.Tensor
    entries: tf.Tensor
    starts: tf.Tensor


def window_init(batch: int, size: int, width: int, dtype: tf.DType) -> Window:
    """Returns empty windows of `size` positions."""
    return Window(
        tf.zeros([batch, size, width], dtype), tf.zeros([batch, size], tf.int32), tf.zeros([batch], tf.int32)
    )


@plain
def window_push(window: Window, hidden: TensorLike, tokens: TensorLike, counts: TensorLike, *, keep: TensorLike) -> Window:
    """Puts new positions behind a window and forgets the oldest.

    Args:
      window: see `Window`.
      hidden: `[B, T, D]`. tokens: `[B, T]`.
      counts: `[B]` int32: how many of the T are new in each row.
      keep: entries to keep at most, a number or `[B]` int32; not more than the window holds.
    """
    size = window.tokens.shape[1]
    total = window.count + counts
    count = tf.minimum(total, keep)
    index = tf.expand_dims(total - count, 1) + tf.expand_dims(tf.range(size), 0)
    old = tf.expand_dims(window.count, 1)
    index = tf.where(index < old, index, index - old + size)
    index = tf.minimum(index, size + tokens.shape[1] - 1)
    hidden = tf.concat([window.hidden, tf.cast(hidden, window.hidden.dtype)], 1)
    tokens = tf.concat([window.tokens, tokens], 1)
    return Window(tf.gather(hidden, index, batch_dims=1), tf.gather(tokens, index, batch_dims=1), count)


@plain
def mtp_prefill(
    params: ModelParams,
    router: RouterState,
    kv: TensorLike | None,
    hidden: TensorLike,
    tokens: TensorLike,
    length: TensorLike,
    *,
    cfg: ModelConfig,
    policy: ComputePolicy,
    modules: int,
) -> tf.Tensor:
    """Returns the modules' cache entries of a chunk of prompt, `[modules, B, T, W]`.

    Args:
      params, router: the model.
      kv: `[modules, B, S, W]`, the modules' caches, or `None` for empty ones; length: `[B]`, what they hold.
      hidden: `[B, T, D]`, the model's hidden states of the chunk.
      tokens: `[B, T + modules]`, the chunk and the tokens behind it.
      cfg, policy: configuration, and how to compute.
      modules: how many.
    """
    entries, size = [], hidden.shape[1]
    for module in range(modules):
        ahead = tokens[:, module + 1 : module + 1 + size]
        out = _module(params, router, kv, module, hidden, ahead, length, cfg=cfg, policy=policy)
        hidden = mtp_next_hidden(out, cfg)
        entries.append(out.block.entry)
    return tf.stack(entries)


@plain
def mtp_draft(
    params: ModelParams,
    router: RouterState,
    kv: TensorLike,
    window: Window,
    length: TensorLike,
    how: tuple | None,
    *,
    cfg: ModelConfig,
    policy: ComputePolicy,
    depth: int,
    modules: int,
) -> Drafts:
    """Reads the windows and proposes the tokens after each row's last one.

    Args:
      params, router: the model.
      kv: `[modules, B, S, W]`, the modules' caches; entries from the beginning of a row's window on are not looked at.
      window: see `Window`; a row with an empty one drafts at random, which costs nothing but the chance to be right.
      length: `[B]`, tokens in the model's cache.
      how: random key `[B, 2]` and `Sampling`; `None` for greedy drafts.
      cfg, policy: configuration, and how to compute.
      depth, modules: see `speculative_step`.
    """
    starts = length - window.count
    last = tf.maximum(window.count - 1, 0)
    known = tf.pad(window.tokens, [[0, 0], [0, depth]])
    hidden, probs, tokens = window.hidden, [], []
    entries: list[tf.Tensor] = [()] * modules
    out = None
    for step in range(depth):
        module = min(step, modules - 1)
        if step >= modules:  # chain: the last module reads its own output one position on
            last += 1
            hidden = _put(tf.pad(hidden, [[0, 0], [0, 1], [0, 0]]), last, _at(mtp_next_hidden(out, cfg), last - 1))
        elif step:
            hidden = mtp_next_hidden(out, cfg)
        ahead = known[:, module : module + hidden.shape[1]]
        out = _module(params, router, kv, module, hidden, ahead, starts, cfg=cfg, policy=policy)
        entries[module] = out.block.entry
        logits = linear_apply(_at(out.normed, last), head_weight(params))
        token, prob = _propose(tf.cast(logits, tf.float32), how, step)
        known = _put(known, last + module + 1, token)
        tokens.append(token)
        probs.append(prob)
    longest = entries[-1].shape[1]
    entries = [tf.pad(entry, [[0, 0], [0, longest - entry.shape[1]], [0, 0]]) for entry in entries]
    return Drafts(tf.stack(tokens, 1), () if how is None else tf.stack(probs, 1), tf.stack(entries), starts)


def _module(params, router, kv, module, hidden, ahead, length, *, cfg, policy) -> MTPOutput:
    """Applies one module to positions from `length` on; `ahead` `[B, T]` are the tokens that it reads there."""
    positions = tf.expand_dims(length, 1) + tf.range(hidden.shape[1])
    cache = None if kv is None else LayerCache(kv[module], length)
    return mtp_apply(
        tree.slice_leading(params.mtp, module), router.mtp[module], hidden, embed_apply(params, ahead, policy=policy),
        cfg=cfg, table=mla_rope(cfg.mla, positions), policy=policy, cache=cache,
    )  # fmt: skip


def _propose(logits: tf.Tensor, how: tuple | None, step: int) -> tuple[tf.Tensor, tf.Tensor]:
    if how is None:
        return tf.argmax(logits, -1, output_type=tf.int32), ()
    key, sampling = how
    probs = sampling_probs(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return sample(key_fold(key, step + 1), probs), probs


def _at(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Entry `index[b]` of row b."""
    return tf.gather(x, index, batch_dims=1)


def _put(x: tf.Tensor, index: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """Replaces entry `index[b]` of row b."""
    here = tf.expand_dims(tf.range(x.shape[1]), 0) == tf.expand_dims(index, 1)
    here = tf.reshape(here, [*here.shape, *[1] * (x.shape.rank - 2)])
    return tf.where(here, tf.expand_dims(value, 1), x)
