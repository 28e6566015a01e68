"""The pieces of a mixture whose experts are on several devices, and the exchanges between them.

With one node: dispatch, exchange, experts, exchange, combine. With several, as in DeepSeek-V3 (section 3.2.2), a row goes to
each node that has experts for it once, to the device at the same place there, which forwards it to the experts' devices and
adds up what they give back. So between nodes there are as many rows as a token has nodes, not experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dsv3.config import ModelConfig
from dsv3.nn.moe import experts_compute
from dsv3.ops.dispatch import dispatch_combine, dispatch_gather, dispatch_nodes, dispatch_slots
from dsv3.parallel.tape import Capacity, Piece, Tape, Turn, Value
from dsv3.policy import ComputePolicy
from dsv3.typing import Tree


class Mixed(NamedTuple):
    """What the attention piece leaves: the residual stream, the shared experts' output or `()`, what the routed experts read
    `[N, D]`, gate values and experts `[N, K]`, the tokens for each expert `[E]` and for each node `[nodes]` or `()`; of the
    former those that count in the statistics, `[E]`, and the balance loss."""

    x: Any
    shared: Any
    rows: Any
    weights: Any
    experts: Any
    load: Any
    to_nodes: Any
    counted: Any
    balance: Any


class ExpertPieces(NamedTuple):
    """The pieces, those that fill buffers made for a capacity. `to_nodes` and `from_nodes` are a token's side of the way
    between nodes, and `None` with one node; `dispatch` and `combine` are then the token's side of the way to the experts,
    else the forwarder's.
    """

    to_nodes: Callable[[int], Piece] | None
    dispatch: Callable[[int], Piece]
    experts: Piece
    combine: Piece
    from_nodes: Piece | None


def node_load(experts: tf.Tensor, num_experts: int, nodes: int) -> tf.Tensor:
    """Returns `[nodes]` float32: the tokens of `experts` `[N, K]` that have an expert on each node."""
    return tf.reduce_sum(tf.cast(dispatch_nodes(experts, num_experts, nodes) < nodes, tf.float32), 0)


def expert_pieces(
    cfg: ModelConfig,
    policy: ComputePolicy,
    make: Callable[[Callable[..., Tree]], Piece],
    *,
    ways: int,
    nodes: int = 1,
    dtype: tf.DType | None = None,
) -> ExpertPieces:
    """Returns the pieces of a model's mixtures.

    Args:
      cfg: the model's configuration.
      policy: how to compute.
      make: makes a piece of a function.
      ways: devices that share the experts, more than one.
      nodes: nodes that these devices are in.
      dtype: of the rows on their way to the experts and of their gradients; default: the compute dtype.
    """
    d, partial = cfg.hidden_size, nodes > 1
    kinds = cfg.moe.router.num_experts // nodes  # the experts of a node

    @functools.cache
    def dispatch(capacity: int) -> Piece:
        """Buffers are `[ways, …]`: row g holds what goes to, or came from, device g of the node."""

        def fn(_, rows, weights, experts):
            if partial:  # a gate value is never negative
                rows, weights = tf.reshape(rows, [-1, d]), tf.reshape(weights, [-1, weights.shape[-1]])
                experts = tf.where(weights < 0, kinds, tf.reshape(experts, weights.shape))
            slots, tokens = dispatch_slots(experts, kinds, capacity=capacity, partial=partial)
            sent = dispatch_gather(rows, tokens, slots, partial=partial, fuse=policy.fuse)
            sent = tf.cast(sent, dtype or rows.dtype)
            size = kinds * capacity
            places = tf.where(slots < 0, size, slots) if partial else slots
            empty = tf.fill([size + partial], -1.0)
            gates = tf.tensor_scatter_nd_update(empty, tf.reshape(places, [-1, 1]), tf.reshape(weights, [-1]))[:size]
            return tf.reshape(sent, [ways // nodes, -1, d]), tf.reshape(gates, [ways // nodes, -1]), slots, tokens

        return make(fn)

    def experts(p, rows, gates):
        local = p["ffn"].gate_up.shape[0]
        compute = policy.compute_dtype or p["ffn"].down.dtype
        capacity = gates.shape[1] // local
        owner = tf.broadcast_to(tf.expand_dims(tf.repeat(tf.range(local), capacity), 0), gates.shape)
        owner = tf.reshape(tf.where(gates < 0, local, owner), [-1, 1])
        out = experts_compute(
            tf.reshape(tf.cast(rows, compute), [-1, d]), tf.reshape(tf.where(gates < 0, 0.0, gates), [-1, 1]), owner,
            p["ffn"].gate_up, p["ffn"].down, kernel=policy.experts,
            multiple=policy.row_multiple(gates.shape[0] * gates.shape[1], local), policy=policy,
        )  # fmt: skip
        return tf.reshape(out, rows.shape)

    def summed(rows, slots, tokens):
        return dispatch_combine(tf.reshape(rows, [-1, d]), tokens, slots, partial=partial, fuse=policy.fuse)

    def back(_, x, rows, slots, tokens, *shared):
        out = tf.reshape(summed(rows, slots, tokens), x.shape)
        return x + (out + shared[0] if shared else out)

    def combine(_, rows, slots, tokens):
        return tf.reshape(summed(rows, slots, tokens), [nodes, -1, d])

    if not partial:
        return ExpertPieces(None, dispatch, make(experts), make(back), None)
    to_nodes = _to_nodes(cfg, policy, make, nodes, dtype)
    return ExpertPieces(to_nodes, dispatch, make(experts), make(combine), make(back))


def _to_nodes(
    cfg: ModelConfig, policy: ComputePolicy, make: Callable[..., Piece], nodes: int, dtype: tf.DType | None
) -> Callable[[int], Piece]:
    """The way to the nodes: a function of C, the rows for each, to the piece.

    The piece gives the rows `[nodes, C, D]`, their gate values and experts within the node `[nodes, C, K]` (a gate value of
    −1: none there), slots `[N, nodes]` and tokens `[nodes·C]`.
    """
    e = cfg.moe.router.num_experts
    each = e // nodes

    @functools.cache
    def to_nodes(capacity: int) -> Piece:
        def fn(_, rows, weights, experts):
            slots, tokens = dispatch_slots(dispatch_nodes(experts, e, nodes), nodes, capacity=capacity, partial=True)
            given = {"partial": True, "fuse": policy.fuse}
            sent = tf.cast(dispatch_gather(rows, tokens, slots, **given), dtype or rows.dtype)
            load = tf.reduce_sum(tf.cast(slots >= 0, tf.int32), 0)
            filled = tf.reshape(tf.range(capacity) < tf.expand_dims(load, -1), [-1])
            chosen = tf.gather(experts, tokens) - tf.expand_dims(tf.repeat(tf.range(nodes), capacity) * each, -1)
            here = tf.expand_dims(filled, -1) & (chosen >= 0) & (chosen < each)
            gates = tf.where(here, dispatch_gather(weights, tokens, slots, **given), -1.0)
            shape = [nodes, capacity, -1]
            return tf.reshape(sent, shape), tf.reshape(gates, shape), tf.reshape(chosen, shape), slots, tokens

        return make(fn)

    return to_nodes


def route(
    tape: Tape, pieces: ExpertPieces | None, path: str, params: Sequence[Tree], mixed: Mixed
) -> Generator[Any, Any, Value]:
    """From what the attention piece leaves to the block's output, as a generator of requests.

    The capacities are those of the fullest expert, and node, on any device: no token is dropped. Turns are where figure 4 of
    DeepSeek-V3 changes from forward to backward: after dispatch and combine, backwards before experts and attention.

    Args:
      tape: records the pass.
      pieces: from `expert_pieces`, or `None` where every device has all experts.
      path: of the mixture in `params`.
      params: the devices' parameters.
      mixed: the attention piece's outputs.
    """
    if pieces is None:
        return mixed.x
    shared = (mixed.shared,) if isinstance(mixed.shared, Value) else ()
    tape.mark(turn=True)
    if pieces.to_nodes is None:
        capacity = yield Capacity(mixed.load)
        given = (mixed.rows, mixed.weights, mixed.experts)
        rows, slots, tokens = yield from _experts(tape, pieces, capacity, path, params, *given)
        out = tape.call(pieces.combine, {}, params, mixed.x, rows, slots, tokens, *shared)
        return (yield from _end(tape, out))
    first, capacity = yield Capacity(mixed.load, mixed.to_nodes)
    there = tape.call(pieces.to_nodes(first), {}, params, mixed.rows, mixed.weights, mixed.experts)
    arrived = []
    for value, compact in zip(there[:3], (True, False, False)):
        arrived.append((yield from tape.swap(value, "node", compact=compact)))
    rows, slots, tokens = yield from _experts(tape, pieces, capacity, path, params, *arrived)
    rows = yield from tape.swap(tape.call(pieces.combine, {}, params, rows, slots, tokens), "node", compact_back=True)
    out = tape.call(pieces.from_nodes, {}, params, mixed.x, rows, *there[3:], *shared)
    return (yield from _end(tape, out))


def _end(tape: Tape, out: Value) -> Generator[Turn, None, Value]:
    yield Turn()
    tape.mark(turn=False)
    return out


def _experts(
    tape: Tape, pieces: ExpertPieces, capacity: int, path: str, params: Sequence[Tree], rows: Value, weights: Value,
    experts: Value,
) -> Generator[Any, Any, tuple[Value, Value, Value]]:  # fmt: skip
    """To the experts and back: their outputs where the rows came from, and `dispatch_slots`' slots and tokens."""
    rows, gates, slots, tokens = tape.call(pieces.dispatch(capacity), {}, params, rows, weights, experts)
    rows = yield from tape.swap(rows, compact=True)
    gates = yield from tape.swap(gates)
    yield Turn()
    out = tape.call(pieces.experts, {"ffn": path}, params, rows, gates)
    tape.mark(turn=True)
    rows = yield from tape.swap(out, compact_back=True)
    return rows, slots, tokens
