"""Where every (token, expert) row goes in the buffer that the experts' products read. No token is ever dropped.

Rows are grouped by expert. An expert's group is rounded up to a multiple, so that products see few distinct sizes; the
buffer has the static size that the worst case needs, and the rows between groups are padding: token 0 with weight zero.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_integer
from dsv3.graph import plain
from dsv3.ops.fuse import fused
from dsv3.typing import TensorLike


class Dispatch(NamedTuple):
    """Row assignment of one batch of routed tokens.

    Attributes:
      slots: `[N, K]` int32, the buffer row of each (token, choice).
      tokens: `[C]` int32, the token in each buffer row (0 in padding rows).
      starts: `[E]` int32, an expert's first row.
      rows: `[E]` int32, an expert's rows, rounded up.
      load: `[E]` int32, an expert's tokens.
    """

    slots: tf.Tensor
    tokens: tf.Tensor
    starts: tf.Tensor
    rows: tf.Tensor
    load: tf.Tensor


def dispatch_size(rows: int, num_experts: int, multiple: int) -> int:
    """Returns the buffer rows C that hold `rows` in any distribution over `num_experts`, groups rounded up to `multiple`."""
    worst = rows + min(num_experts, rows) * (multiple - 1)
    return -(-worst // multiple) * multiple


@plain
def dispatch_rows(experts: TensorLike, num_experts: int, *, multiple: int = 1, fuse: bool = False) -> Dispatch:
    """Groups the rows of chosen experts by expert, in token order within an expert.

    Args:
      experts: `[N, K]` int32 with static N: the experts of each token; E stands for none, such a row lies behind all groups.
      num_experts: E.
      multiple: rows of an expert are rounded up to this.
      fuse: choose what is fastest (not under XLA).

    Returns:
      `Dispatch` with `C = dispatch_size(N·K, E, multiple)`.
    """
    Dims("dispatch_rows")("experts", experts, "N K")
    check_integer("dispatch_rows", "experts", experts)
    experts = tf.convert_to_tensor(experts)
    n, k = experts.shape
    check(n is not None, "dispatch_rows: `experts` has an unknown number of tokens, want a static [N, K]")
    check(multiple >= 1, f"dispatch_rows: `multiple` is {multiple}, want >= 1")
    total = n * k
    flat = tf.cast(tf.reshape(experts, [total]), tf.int32)
    load = tf.math.unsorted_segment_sum(tf.ones([total], tf.int32), flat, num_experts + 1)
    rows = ((load + (multiple - 1)) // multiple) * multiple
    starts = tf.cumsum(rows, exclusive=True)
    slots = _sorted_places(flat, num_experts + 1, fuse=fuse) + tf.gather(starts - tf.cumsum(load, exclusive=True), flat)
    tokens = tf.scatter_nd(
        tf.expand_dims(slots, -1), tf.range(total) // k, [dispatch_size(total, num_experts, multiple)]
    )
    return Dispatch(tf.reshape(slots, [n, k]), tokens, starts[:-1], rows[:-1], load[:-1])


def _sorted_places(flat: tf.Tensor, kinds: int, *, fuse: bool = False) -> tf.Tensor:
    """Returns where each entry, 0 to `kinds` − 1, comes to stand when they are sorted, equal ones in order."""
    size = flat.shape[0]
    if fuse:  # one pass over the entries; its parts have sizes that XLA cannot know
        order = tf.ensure_shape(tf.concat(tf.dynamic_partition(tf.range(size), flat, kinds), 0), [size])
    else:
        order = tf.argsort(flat, stable=True)
    return tf.scatter_nd(tf.expand_dims(order, -1), tf.range(size), [size])


def dispatch_capacity(load: int, tokens: int) -> int:
    """Returns the rows that experts get when the fullest has `load` of `tokens` tokens: few sizes, so few compilations.

    Sizes are multiples of 8 up to 64, then four to each doubling; the largest, `tokens`, holds every token.

    >>> [dispatch_capacity(n, 100) for n in (0, 1, 9, 65, 81, 97, 100)]
    [8, 8, 16, 80, 96, 100, 100]
    """
    check(0 <= load <= tokens, f"dispatch_capacity: `load` is {load}, want 0 to {tokens}, the number of tokens")
    step = max(8, 2 ** (max(load - 1, 0).bit_length() - 3))
    return min(max(-(-load // step), 1) * step, max(tokens, 1))


@plain
def dispatch_slots(
    experts: TensorLike, num_experts: int, *, capacity: int, partial: bool = False
) -> tuple[tf.Tensor, tf.Tensor]:
    """Gives every expert the same number of buffer rows, as an exchange between devices needs it.

    Args:
      experts: `[N, K]` int32 with static N: the experts of each token.
      num_experts: E.
      capacity: C, at least the largest number of tokens that one expert gets; with fewer, rows would share a place.
      partial: an entry may be E, which stands for none.

    Returns:
      `slots` `[N, K]` int32: rows of an `[E·C]` buffer, expert e's from e·C on, in token order, −1 for none; and `tokens`
      `[E·C]` int32, the token in each row, 0 in rows that stay empty.
    """
    Dims("dispatch_slots")("experts", experts, "N K")
    check_integer("dispatch_slots", "experts", experts)
    experts = tf.cast(experts, tf.int32)
    n, k = experts.shape
    check(n is not None, "dispatch_slots: `experts` has an unknown number of tokens, want a static [N, K]")
    check(capacity >= 1, f"dispatch_slots: `capacity` is {capacity}, want >= 1")
    flat, kinds, rows = tf.reshape(experts, [n * k]), num_experts + partial, num_experts * capacity
    load = tf.math.unsorted_segment_sum(tf.ones([n * k], tf.int32), flat, kinds)
    slots = flat * capacity + _sorted_places(flat, kinds) - tf.gather(tf.cumsum(load, exclusive=True), flat)
    none = flat == num_experts
    places = tf.where(none, rows, slots) if partial else slots
    tokens = tf.scatter_nd(tf.expand_dims(places, -1), tf.range(n * k) // k, [rows + partial])[:rows]
    return tf.reshape(tf.where(none, -1, slots) if partial else slots, [n, k]), tokens


@plain
def dispatch_gather(
    x: TensorLike, tokens: TensorLike, slots: TensorLike, *, partial: bool = False, fuse: bool = False
) -> tf.Tensor:
    """Returns `x[tokens]`, like `gather_rows`, with a gradient that gathers by `slots` instead of scattering.

    Args:
      x: `[N, D]`. tokens: `[C]` int32. slots: `[N, K]` int32; each row that matters is in `slots` once.
      partial: entries of `slots` may be −1, for none.
      fuse: compile as one kernel.
    """
    _check_buffer("dispatch_gather", tokens, slots)

    @tf.custom_gradient
    def run(x):
        return gather_rows(x, tokens, fuse=fuse), lambda d: combine_rows(d, slots, partial=partial, fuse=fuse)

    return run(tf.convert_to_tensor(x))


@plain
def dispatch_combine(
    buffer: TensorLike, tokens: TensorLike, slots: TensorLike, *, partial: bool = False, fuse: bool = False
) -> tf.Tensor:
    """Returns `Σ_k buffer[slots[:, k]]`, like `combine_rows`, with a gradient that gathers by `tokens`, not a scatter.

    The gradient of rows that are not in `slots` is arbitrary: whoever made them must not use it.

    Args:
      buffer: `[C, D]`. tokens, slots, partial: as in `dispatch_gather`.
      fuse: compile as one kernel.
    """
    _check_buffer("dispatch_combine", tokens, slots)

    @tf.custom_gradient
    def run(buffer):
        return combine_rows(buffer, slots, partial=partial, fuse=fuse), lambda d: gather_rows(d, tokens, fuse=fuse)

    return run(tf.convert_to_tensor(buffer))


@plain
def dispatch_nodes(experts: TensorLike, num_experts: int, nodes: int) -> tf.Tensor:
    """Returns `[N, nodes]` int32: entry n is n where some expert of a token is on node n, else `nodes`, for none.

    Args:
      experts: `[N, K]` int32, the experts of each token.
      num_experts: E, of which each node has E/nodes neighbouring ones.
      nodes: how many.
    """
    Dims("dispatch_nodes")("experts", experts, "N K")
    check(nodes >= 1 and num_experts % nodes == 0, f"dispatch_nodes: `nodes` is {nodes}, want a divisor of {num_experts}")
    node = tf.expand_dims(tf.cast(experts, tf.int32) // (num_experts // nodes), -1)
    number = tf.range(nodes)
    return tf.where(tf.reduce_any(node == number, 1), number, nodes)


def _check_buffer(function: str, tokens: TensorLike, slots: TensorLike) -> None:
    dims = Dims(function)
    dims("tokens", tokens, "C")
    dims("slots", slots, "N K")


@fused
def gather_rows(x: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
    """Returns `x[tokens]`, `[C, D]`: the rows that the experts read.

    Args:
      x: `[N, D]`.
      tokens: `[C]` int32, from `dispatch_rows`.
      fuse: compile as one kernel.
    """
    dims = Dims("gather_rows")
    dims("x", x, "N D")
    dims("tokens", tokens, "C")
    return tf.gather(x, tokens)


@fused
def combine_rows(buffer: tf.Tensor, slots: tf.Tensor, *, partial: bool = False) -> tf.Tensor:
    """Returns `Σ_k buffer[slots[:, k]]`, `[N, D]`, summed in float32: the way back of `gather_rows`.

    Args:
      buffer: `[C, D]`, the experts' results.
      slots: `[N, K]` int32, from `dispatch_rows`.
      partial: entries of `slots` may be −1, for none.
      fuse: compile as one kernel.
    """
    dims = Dims("combine_rows")
    dims("buffer", buffer, "C D")
    dims("slots", slots, "N K")
    rows = tf.cast(tf.gather(buffer, tf.maximum(slots, 0) if partial else slots), tf.float32)
    if partial:
        rows = tf.where(tf.expand_dims(slots >= 0, -1), rows, 0.0)
    return tf.cast(tf.reduce_sum(rows, 1), buffer.dtype)


@fused
def scatter_weights(weights: tf.Tensor, slots: tf.Tensor, *, size: int) -> tf.Tensor:
    """Returns `[C]` float32: a row's gate value, zero in padding rows.

    Args:
      weights: `[N, K]`, a token's gate values.
      slots: `[N, K]` int32, from `dispatch_rows`.
      size: C.
      fuse: compile as one kernel.
    """
    dims = Dims("scatter_weights")
    dims("weights", weights, "N K")
    dims("slots", slots, "N K")
    return tf.scatter_nd(tf.reshape(slots, [-1, 1]), tf.reshape(tf.cast(weights, tf.float32), [-1]), [size])
