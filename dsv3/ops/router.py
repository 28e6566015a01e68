"""Sigmoid routing with expert groups, a selection bias, and the statistics that keep experts balanced."""

from __future__ import annotations

import functools
from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_choice
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.ops.segments import segment_places
from dsv3.ops.topk import LIMIT, best_keys, key_places, key_values, many_rows, place_keys
from dsv3.typing import TensorLike


class Routing(NamedTuple):
    """Which experts a token goes to.

    Attributes:
      weights: `[N, K]` float32, the gate values; the gradient reaches the router through them.
      experts: `[N, K]` int32, the chosen experts, best first.
      scores: `[N, E]` float32, the unbiased sigmoid scores.
    """

    weights: tf.Tensor
    experts: tf.Tensor
    scores: tf.Tensor


@plain
def router_scores(x: TensorLike, weight: TensorLike) -> tf.Tensor:
    """Returns `sigmoid(x @ weight)`, computed in float32 whatever the inputs' dtype.

    Args:
      x: `[N, D]`.
      weight: `[D, E]`.

    Returns:
      `[N, E]` float32.
    """
    dims = Dims("router_scores")
    dims("x", x, "N D")
    dims("weight", weight, "D E")
    return tf.sigmoid(tf.matmul(tf.cast(x, tf.float32), tf.cast(weight, tf.float32)))


@plain
def router_select(
    scores: TensorLike,
    bias: TensorLike,
    *,
    top_k: int,
    num_groups: int = 1,
    groups_kept: int = 1,
    scale: float = 1.0,
    normalize: bool = True,
    group_mask: str = "-inf",
    fuse: bool = False,
) -> Routing:
    """Chooses `top_k` experts a token, from its best groups, by biased scores; weighs them by unbiased ones.

    With `c = s + b`: a group's score is the sum of its two best c; the best `groups_kept` groups stay; the `top_k` best c in
    them are chosen; `w = scale·s / (Σ s + 1e-20)` over the chosen.

    Args:
      scores: `[N, E]` float32 in (0, 1), from `router_scores`.
      bias: `[E]` float32 selection bias, never a gradient's variable.
      top_k: K.
      num_groups, groups_kept: groups of E / num_groups neighbouring experts, and how many of them a token may use.
      scale: factor of the weights.
      normalize: whether weights sum to `scale`; without it `w = scale·s`.
      group_mask: selection score of experts in left-out groups, `"-inf"` or `"zero"` (see `RouterConfig`).
      fuse: compile as a few kernels (not under XLA).

    Returns:
      `Routing`. Ties go to the lower expert index.

    References: DeepSeek-V3 section 2.1.2, equations 12 to 16; official `Gate.forward`.
    """
    check_choice("router_select", "group_mask", group_mask, ("-inf", "zero"))
    dims = Dims("router_select")
    dims("scores", scores, "N E")
    dims("bias", bias, "E")
    experts_total = dims.E
    check(
        experts_total % num_groups == 0,
        f"router_select: {experts_total} experts are not divisible by num_groups={num_groups}",
    )
    per_group = experts_total // num_groups
    check(
        1 <= groups_kept <= num_groups and 1 <= top_k <= groups_kept * per_group,
        f"router_select: cannot choose top_k={top_k} from {groups_kept} of {num_groups} groups of {per_group} experts",
    )
    check(
        groups_kept == num_groups or per_group >= 2,
        f"router_select: num_groups={num_groups} leaves one expert a group, want two, whose scores are the group's",
    )
    scores = tf.convert_to_tensor(scores)
    given = tf.stop_gradient(scores), tf.stop_gradient(tf.cast(bias, tf.float32))
    fill = 0.0 if group_mask == "zero" else -float("inf")
    fuse = fuse and many_rows(scores.shape[0])
    choose = _choose_by_keys if fuse and experts_total <= LIMIT else _choose
    experts = choose(*given, top_k=top_k, num_groups=num_groups, groups_kept=groups_kept, fill=fill)
    return Routing(router_weights(scores, experts, scale=scale, normalize=normalize, fuse=fuse), experts, scores)


def _weights_gradient(scores, experts, d, *, scale, normalize):
    return _scores_grad(scores, experts, d, scale=scale, normalize=normalize, fuse=True), None


@fused
def _scores_grad(scores, experts, d, *, scale, normalize):
    if normalize:
        chosen = tf.gather(scores, experts, batch_dims=1)
        total = tf.reduce_sum(chosen, -1, keepdims=True) + 1e-20
        d = (d - tf.reduce_sum(d * chosen, -1, keepdims=True) / total) / total
    number, d = tf.range(scores.shape[-1]), scale * d
    columns = ([x[:, k : k + 1] for x in (experts, d)] for k in range(experts.shape[-1]))
    return tf.add_n([tf.where(number == e, g, 0.0) for e, g in columns])


@plain
def router_weights(
    scores: TensorLike, experts: TensorLike, *, scale: float = 1.0, normalize: bool = True, fuse: bool = False
) -> tf.Tensor:
    """Returns the gate values of chosen experts: `scale·s / (Σ s + 1e-20)`, `scale·s` without `normalize`.

    Args:
      scores: `[N, E]` float32, from `router_scores`.
      experts: `[N, K]` int32.
      scale, normalize: as in `router_select`.
      fuse: compile as one kernel (not under XLA), which does not refuse what is no expert.

    Returns:
      `[N, K]` float32.

    References: DeepSeek-V3 section 2.1.2, equations 13 and 14.
    """
    dims = Dims("router_weights")
    dims("scores", scores, "N E")
    dims("experts", experts, "N K")
    return _weights(tf.convert_to_tensor(scores), tf.convert_to_tensor(experts), scale=scale, normalize=normalize, fuse=fuse)


@fused(gradient=_weights_gradient)
def _weights(scores, experts, *, scale, normalize):
    weights = take_experts(scores, experts)
    if normalize:
        weights /= tf.reduce_sum(weights, -1, keepdims=True) + 1e-20
    return weights * scale


def _choose(scores, bias, *, top_k: int, num_groups: int, groups_kept: int, fill: float) -> tf.Tensor:
    choice = scores + bias
    if groups_kept < num_groups:
        choice = _mask_groups(choice, num_groups, groups_kept, fill)
    return tf.math.top_k(choice, top_k).indices


def _choose_by_keys(scores, bias, *, top_k: int, num_groups: int, groups_kept: int, fill: float) -> tf.Tensor:
    """The same, in kernels that hold experts in rows and tokens in columns."""
    keys = _score_keys(scores, bias, fuse=True)
    if groups_kept < num_groups:
        keys = tf.reshape(keys, [num_groups, keys.shape[0] // num_groups, -1])
        groups = _group_keys(*best_keys(keys, 2), fuse=True)
        keys = _mask_keys(keys, groups, best_keys(groups, groups_kept)[-1], fill=fill, fuse=True)
    return _key_experts(*best_keys(keys, top_k), num_experts=scores.shape[-1], fuse=True)


@fused
def _score_keys(scores, bias):
    return place_keys(tf.transpose(scores) + tf.expand_dims(bias, -1))


@fused
def _group_keys(best, second):
    return place_keys(key_values(best) + key_values(second))


@fused
def _mask_keys(keys, groups, worst, *, fill):
    left_out = tf.reshape(place_keys(tf.fill([keys.shape[0] * keys.shape[1], 1], fill)), [*keys.shape[:2], 1])
    return tf.reshape(tf.where(tf.expand_dims(groups >= worst, 1), keys, left_out), [-1, tf.shape(keys)[-1]])


@fused
def _key_experts(*best, num_experts):
    return tf.stack([key_places(keys, num_experts) for keys in best], 1)


@fused
def _not_below(keys, worst):
    return tf.cast(keys >= worst, tf.float32)


def _mask_groups(choice: tf.Tensor, num_groups: int, groups_kept: int, fill: float) -> tf.Tensor:
    """Sets the selection scores of all but the `groups_kept` best groups to `fill`."""
    experts_total = choice.shape[-1]
    grouped = tf.reshape(choice, [-1, num_groups, experts_total // num_groups])
    group_score = tf.reduce_sum(tf.math.top_k(grouped, 2).values, -1)
    kept = tf.math.top_k(group_score, groups_kept).indices
    is_kept = tf.reduce_any(tf.equal(tf.expand_dims(kept, -1), tf.range(num_groups)), 1)
    masked = tf.where(tf.expand_dims(is_kept, -1), grouped, tf.constant(fill, grouped.dtype))
    return tf.reshape(masked, [-1, experts_total])


@plain
def take_experts(values: TensorLike, experts: TensorLike) -> tf.Tensor:
    """Returns `values[n, experts[n, k]]`, `[N, K]`, with a gradient that is a one-hot product, not a scatter.

    The gradient of a batched gather is a scatter with global indices, which is slow on a CPU and wrong on sharded tensors.
    """
    values = tf.convert_to_tensor(values)
    dims = Dims("take_experts")
    dims("values", values, "N E")
    dims("experts", experts, "N K")

    @tf.custom_gradient
    def take(v):
        def grad(g):
            hot = tf.one_hot(experts, v.shape[-1], dtype=g.dtype)
            return tf.reduce_sum(hot * tf.expand_dims(g, -1), 1)

        return tf.gather(v, experts, batch_dims=1), grad

    return take(values)


@plain
def expert_load(experts: TensorLike, num_experts: int, mask: TensorLike | None = None) -> tf.Tensor:
    """Counts how many tokens chose each expert.

    Args:
      experts: `[N, K]` int.
      num_experts: E.
      mask: `[N]` bool, tokens to count; `None` counts all (padding tokens should not be counted).

    Returns:
      `[E]` float32, summing to K times the number of counted tokens.

    >>> expert_load(tf.constant([[0, 2], [2, 1]]), 4).numpy().tolist()
    [1.0, 1.0, 2.0, 0.0]
    """
    dims = Dims("expert_load")
    dims("experts", experts, "N K")
    experts = tf.cast(experts, tf.int32)
    counted = tf.ones_like(experts)
    if mask is not None:
        mask = tf.reshape(tf.cast(mask, tf.bool), [-1])
        dims("mask", mask, "N")
        counted *= tf.expand_dims(tf.cast(mask, tf.int32), -1)
    # Whatever is no expert is counted behind the last one.
    experts = tf.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    return tf.cast(tf.math.unsorted_segment_sum(counted, experts, num_experts + 1)[:num_experts], tf.float32)


@plain
def router_update_bias(bias: TensorLike, load: TensorLike, *, rate: float | tf.Tensor = 1e-3) -> tf.Tensor:
    """Moves the selection bias of overloaded experts down and of underloaded ones up.

    `b ← b + rate·sign(mean(load) − load)`

    Args:
      bias: `[E]` or `[X, E]` float32.
      load: the same shape: tokens that each expert got, over the whole batch, all data ranks and accumulation steps.
      rate: the paper's γ, 1e-3 until 14.3T tokens, then 0.

    Returns:
      The new bias, float32. A layer in which every expert got the same load is unchanged.

    References: DeepSeek-V3 section 2.1.2; arXiv:2408.15664 algorithm 1.

    >>> router_update_bias(tf.zeros([3]), tf.constant([4.0, 1.0, 1.0]), rate=0.5).numpy().tolist()
    [-0.5, 0.5, 0.5]
    """
    bias, load = tf.convert_to_tensor(bias), tf.cast(load, tf.float32)
    letters = "X E" if bias.shape.rank == 2 else "E"
    dims = Dims("router_update_bias")
    dims("bias", bias, letters)
    dims("load", load, letters)
    # The sign of mean − load, times E: compilers divide by multiplying with a rounded 1/E, which unbalances even loads.
    above = tf.reduce_sum(load, -1, keepdims=True) - load.shape[-1] * load
    return tf.stop_gradient(tf.cast(bias, tf.float32) + rate * tf.sign(above))


@plain
def sequence_balance_loss(
    scores: TensorLike, *, top_k: int, mask: TensorLike | None = None, segments: TensorLike | None = None, fuse: bool = False
) -> tf.Tensor:
    """The sequence-wise balance loss without its factor α, averaged over the sequences that have a counted token.

    `Σ_i f_i·P_i` with `f_i = E/(K·T) · #{t: i among the top K of the unbiased scores}`, `P_i = mean_t s_i / Σ_j s_j`.

    Args:
      scores: `[B, T, E]` float32, the unbiased scores.
      top_k: K.
      mask: `[B, T]` bool, tokens that count; T is then the number of counted tokens of a sequence.
      segments: `[B, T]` int, the documents of a packed row; each is then a sequence of its own.
      fuse: compile the choice as a few kernels (not under XLA).

    Returns:
      A float32 scalar, 1 for perfectly even routing. The gradient reaches the scores through P.

    References: DeepSeek-V3 section 2.1.2, equations 17 to 20.
    """
    dims = Dims("sequence_balance_loss")
    dims("scores", scores, "B T E")
    scores = tf.convert_to_tensor(scores)
    num_experts = scores.shape[-1]
    check(1 <= top_k <= num_experts, f"sequence_balance_loss: `top_k` is {top_k}, want 1 to {num_experts} [E]")
    hot = _chosen(tf.stop_gradient(scores), top_k, fuse)
    share = scores / (tf.reduce_sum(scores, -1, keepdims=True) + 1e-20)
    if mask is None:
        weight = tf.ones(tf.shape(scores)[:2], tf.float32)
    else:
        dims("mask", mask, "B T")
        weight = tf.cast(mask, tf.float32)
    if segments is None:
        add = functools.partial(tf.reduce_sum, axis=1)
    else:
        dims("segments", segments, "B T")
        places, count = segment_places(segments)
        add = functools.partial(tf.math.unsorted_segment_sum, segment_ids=places, num_segments=count)
    weight = tf.expand_dims(weight, -1)
    tokens = add(weight)
    sequences = tf.maximum(tf.reduce_sum(tf.cast(tokens > 0, tf.float32)), 1.0)
    tokens = tf.maximum(tokens, 1.0)
    f = add(hot * weight) * (num_experts / top_k) / tokens
    p = add(share * weight) / tokens
    return tf.reduce_sum(f * p) / sequences


def _chosen(scores: tf.Tensor, top_k: int, fuse: bool) -> tf.Tensor:
    """Returns 1.0 where a score is among the `top_k` best of the last dim, else 0.0."""
    num_experts = scores.shape[-1]
    rows = None if None in scores.shape[:-1] else scores.shape[:-1].num_elements()
    if fuse and num_experts <= LIMIT and many_rows(rows):
        keys = _score_keys(tf.reshape(scores, [-1, num_experts]), tf.zeros([num_experts]), fuse=True)
        hot = _not_below(keys, best_keys(keys, top_k)[-1], fuse=True)
        return tf.reshape(tf.transpose(hot), tf.shape(scores))
    return tf.reduce_sum(tf.one_hot(tf.math.top_k(scores, top_k).indices, num_experts, dtype=tf.float32), -2)
