"""From logits to tokens: temperature, top-k and top-p, drawing, and the acceptance rule of speculative sampling."""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import Dims, check, is_concrete
from dsv3.graph import plain
from dsv3.ops.random import key_fold, uniform_draw
from dsv3.typing import TensorLike


@plain
def sampling_probs(
    logits: TensorLike, *, temperature: TensorLike = 1.0, top_k: TensorLike = 0, top_p: TensorLike = 1.0
) -> tf.Tensor:
    """`softmax(logits / temperature)`, restricted to the best `top_k` tokens and then to the nucleus of `top_p`.

    The nucleus is the shortest list of tokens, best first, whose probabilities among the `top_k` reach `top_p`. Of equal
    logits the lower token id goes first, so exactly `top_k` tokens are kept.

    Args:
      logits: `[B, V]` or `[B, T, V]`.
      temperature: a number, or a tensor that broadcasts against `[B]` or `[B, T]`; 0 is greedy: all probability on the
        best token.
      top_k: likewise, int; 0 (or at least V) keeps all.
      top_p: likewise, in (0, 1]; 1 keeps all.

    Returns:
      Probabilities, float32, of the logits' shape.

    References: arXiv:1904.09751 (top-p).

    >>> sampling_probs(tf.math.log([[0.5, 0.3, 0.2]]), top_k=2).numpy().round(3).tolist()
    [[0.625, 0.375, 0.0]]
    """
    logits = tf.cast(logits, tf.float32)
    rank = logits.shape.rank
    check(rank in (2, 3), f"sampling_probs: `logits` has rank {rank}, want 2 or 3 [B, V] or [B, T, V]")
    _check_range("temperature", temperature, lambda x: x >= 0, "want at least 0")
    _check_range("top_k", top_k, lambda x: x >= 0, "want at least 0")
    _check_range("top_p", top_p, lambda x: (x > 0) & (x <= 1), "want above 0 and at most 1")
    temperature = _column(temperature, tf.float32, rank)
    greedy = temperature <= 0
    # Differences from the best logit: a small temperature then overflows to −inf only.
    scaled = logits - tf.reduce_max(logits, -1, keepdims=True)
    scaled /= tf.where(greedy, tf.ones_like(temperature), temperature)
    vocab = logits.shape[-1]
    k, p = _column(top_k, tf.int32, rank), _column(top_p, tf.float32, rank)
    k = tf.where(tf.logical_or(k <= 0, k > vocab), vocab, k)
    restricts = tf.logical_or(tf.reduce_any(k < vocab), tf.reduce_any(p < 1.0))
    scaled = tf.cond(restricts, lambda: _restrict(scaled, k, p), lambda: scaled)
    best = tf.one_hot(tf.argmax(logits, -1), vocab)
    return tf.where(greedy, best, tf.nn.softmax(scaled, -1))


def _column(value: TensorLike, dtype: tf.DType, rank: int) -> tf.Tensor:
    """A setting with a last dim of one and the logits' rank: `[B]` becomes `[B, 1]` or `[B, 1, 1]`."""
    value = tf.cast(value, dtype)
    while value.shape.rank < rank:
        value = tf.expand_dims(value, -1)
    return value


def _check_range(name: str, value: TensorLike, fits, want: str) -> None:
    if is_concrete(value):
        found = value.numpy() if hasattr(value, "numpy") else value
        for number in tf.nest.flatten(found.tolist() if hasattr(found, "tolist") else found):
            check(fits(number), f"sampling_probs: `{name}` is {number}, {want}")


def _restrict(scaled: tf.Tensor, k: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
    """−inf for all tokens behind the last kept one in the order of `tf.math.top_k`."""
    vocab = scaled.shape[-1]
    values, ids = tf.math.top_k(scaled, vocab)
    among_k = tf.range(vocab) < k
    probs = tf.nn.softmax(tf.where(among_k, values, float("-inf")), -1)
    before = tf.cumsum(probs, -1, exclusive=True)
    kept = tf.logical_and(among_k, tf.logical_or(before < p, p >= 1.0))
    last = tf.reduce_sum(tf.cast(kept, tf.int32), -1, keepdims=True) - 1
    worst = tf.gather(values, last, batch_dims=last.shape.rank - 1)
    worst_id = tf.gather(ids, last, batch_dims=last.shape.rank - 1)
    tied = tf.logical_and(tf.equal(scaled, worst), tf.range(vocab) <= worst_id)
    return tf.where(tf.logical_or(scaled > worst, tied), scaled, float("-inf"))


@plain
def sample(key: TensorLike, probs: TensorLike) -> tf.Tensor:
    """Draws a token for each row.

    Args:
      key: `[2]` int, or `[B, 2]`: a key for each row, whose draw then depends on nothing else.
      probs: `[B, V]`, not negative; they need not sum to one.

    Returns:
      `[B]` int32.

    >>> sample([0, 7], [[0.0, 1.0], [1.0, 0.0]]).numpy().tolist()
    [1, 0]
    """
    dims = Dims("sample")
    dims("probs", probs, "B V")
    probs = tf.cast(probs, tf.float32)
    key = _row_keys("sample", key, dims, tf.shape(probs)[0])
    return _pick(uniform_draw(key, 1)[:, 0], probs)


def _row_keys(function: str, key: TensorLike, dims: Dims, rows: tf.Tensor) -> tf.Tensor:
    key = tf.convert_to_tensor(key)
    if key.shape.rank == 1:
        return key_fold(key, tf.range(rows))
    dims("key", key, "B 2")
    return key


def _pick(uniform: tf.Tensor, probs: tf.Tensor) -> tf.Tensor:
    """Inverts the distribution function: the first token where it exceeds `uniform`·total, never one of probability 0."""
    total = tf.cumsum(probs, -1)
    beyond = total > tf.expand_dims(uniform, -1) * total[..., -1:]
    return tf.argmax(tf.cast(tf.logical_and(beyond, probs > 0), tf.int8), -1, output_type=tf.int32)


@plain
def speculative_accept(
    key: TensorLike, draft_tokens: TensorLike, draft_probs: TensorLike, target_probs: TensorLike
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decides how many drafted tokens stay and draws the one after them, so that the result is distributed as the target's.

    Draft i stays with probability `min(1, target(d_i) / draft(d_i))`, if all before it did. After the first refusal the
    next token is drawn from `max(target − draft, 0)`, after none from the target. With greedy (one-hot) probabilities a
    draft stays if it is the target's token.

    Args:
      key: `[2]` int, or `[B, 2]`: a key for each row.
      draft_tokens: `[B, T]` int, drawn from `draft_probs`.
      draft_probs: `[B, T, V]`.
      target_probs: `[B, T+1, V]`: entry i is the distribution after the first i drafts.

    Returns:
      Drafts that stay, `[B]` int32 in 0.. T, and the token that follows them, `[B]` int32.

    References: arXiv:2211.17192, algorithm 1.
    """
    dims = Dims("speculative_accept")
    dims("draft_tokens", draft_tokens, "B T")
    dims("draft_probs", draft_probs, "B T V")
    dims("target_probs", target_probs, f"B {dims.T + 1} V")
    draft, target = tf.cast(draft_probs, tf.float32), tf.cast(target_probs, tf.float32)
    tokens = tf.convert_to_tensor(draft_tokens)
    key = _row_keys("speculative_accept", key, dims, tf.shape(target)[0])
    uniform = uniform_draw(key, dims.T + 1)
    p = tf.gather(target[:, :-1], tokens, batch_dims=2)
    q = tf.gather(draft, tokens, batch_dims=2)
    accepted = _leading(uniform[:, :-1] * q < p)
    here = tf.gather(target, accepted, batch_dims=1)
    drafted = tf.gather(tf.concat([draft, tf.zeros_like(draft[:, :1])], 1), accepted, batch_dims=1)
    rest = tf.maximum(here - drafted, 0.0)
    none_left = tf.reduce_sum(rest, -1, keepdims=True) <= 0
    return accepted, _pick(uniform[:, -1], tf.where(none_left, here, rest))


@plain
def greedy_accept(draft_tokens: TensorLike, target_tokens: TensorLike) -> tuple[tf.Tensor, tf.Tensor]:
    """`speculative_accept` for greedy drafts and targets, given as tokens.

    Args:
      draft_tokens: `[B, T]` int. target_tokens: `[B, T+1]` int, the target's best token after each number of drafts.

    Returns:
      Drafts that stay and the token that follows them, both `[B]` int32.

    >>> [x.numpy().tolist() for x in greedy_accept([[5, 6]], [[5, 7, 8]])]
    [[1], [7]]
    """
    dims = Dims("greedy_accept")
    draft, target = tf.cast(draft_tokens, tf.int32), tf.cast(target_tokens, tf.int32)
    dims("draft_tokens", draft, "B T")
    dims("target_tokens", target, f"B {dims.T + 1}")
    accepted = _leading(tf.equal(draft, target[:, :-1]))
    return accepted, tf.gather(target, accepted, batch_dims=1)


def _leading(stays: tf.Tensor) -> tf.Tensor:
    """How many leading entries of each row are true."""
    return tf.reduce_sum(tf.math.cumprod(tf.cast(stays, tf.int32), axis=-1), -1)
