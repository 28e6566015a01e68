"""The model with its loss as pieces, between which experts on other devices are reached.

A mixture block is four of them: attention (with router and shared experts), dispatch, experts, combine (see
`expert_pieces`); where every device has all experts, it is one. Dense blocks, embedding and losses are one piece each. What
a piece computes is what `pretrain_loss` computes there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dsv3.config import ModelConfig
from dsv3.nn.block import BlockParams, block_apply, block_attend
from dsv3.nn.linear import mlp_apply
from dsv3.nn.mla import mla_rope
from dsv3.nn.moe import moe_route
from dsv3.nn.mtp import mtp_input
from dsv3.ops.norm import rms_norm
from dsv3.ops.router import expert_load
from dsv3.parallel.tape import Piece, Tape, Value
from dsv3.policy import ComputePolicy
from dsv3.train.expert_pieces import ExpertPieces, Mixed, expert_pieces, node_load, route
from dsv3.train.loss import weighted_nll
from dsv3.typing import Tree


class ModelPieces(NamedTuple):
    """The pieces of one model; `attention` and `mtp` are for mixtures.

    Where experts are not shared out, `routed` is `None`, and `attention` and `mtp` are whole blocks. `made` has all pieces,
    those for capacities as they come.
    """

    embed: Piece
    dense: Piece
    attention: Piece
    routed: ExpertPieces | None
    head: Piece
    mtp: Piece
    mtp_loss: Piece
    made: list[Piece]


def model_pieces(
    cfg: ModelConfig, policy: ComputePolicy, *, ways: int, nodes: int = 1, dispatch_dtype: tf.DType | None = None
) -> ModelPieces:
    """Returns the pieces of a model.

    Args:
      cfg: the model's configuration.
      policy: how to compute. `remat="block"` recomputes each piece; layers are never a loop, so `loop` says nothing.
      ways: devices that share the experts.
      nodes: into how many nodes these devices are cut; with more than one, rows go from node to node once, and from there to
        the experts.
      dispatch_dtype: of the rows on their way to the experts and of their gradients; default: the compute dtype.
    """
    norm = {"eps": cfg.norm_eps, "rounding": cfg.norm_rounding, "fuse": policy.fuse}

    def table(x, packed):
        return mla_rope(cfg.mla, packed[1] if packed else tf.range(x.shape[1]))

    def embed(p, tokens):
        rows = tf.gather(p["embed"], tokens)
        return tf.cast(rows, policy.compute_dtype or rows.dtype)

    def dense(p, x, *packed):
        segments = packed[0] if packed else None
        return block_apply(p["block"], (), x, cfg=cfg, table=table(x, packed), policy=policy, segments=segments).out

    mixture = functools.partial(_mix, nodes=nodes) if ways > 1 else _mix_whole

    def attention(p, bias, x, *packed):
        return mixture(p["block"], bias, x, cfg, table(x, packed), policy, packed)

    def mtp(p, bias, hidden, embedded, *packed):
        x = mtp_input(p["mtp"], hidden, embedded, cfg=cfg, policy=policy)
        return mixture(p["mtp"].block, bias, x, cfg, table(x, packed), policy, packed)

    def loss(p, normed, targets, weights, total):
        weights, total = tf.stop_gradient(weights), tf.stop_gradient(total)  # nobody wants their gradients
        head = tf.transpose(p["embed"]) if "embed" in p else p["head"]
        return weighted_nll(normed, tf.cast(head, normed.dtype), targets, weights, total, policy=policy)

    def head(p, x, targets, weights, total):
        normed = rms_norm(x, p["norm"], **norm)
        return loss(p, normed, targets, weights, total), normed if cfg.mtp_hidden == "normed" else x

    def mtp_loss(p, x, targets, weights, total):
        normed = rms_norm(x, p["norm"], **norm)
        return loss(p, normed, targets, weights, total), x if cfg.mtp_next == "raw" else normed

    made: list[Piece] = []

    def make(fn: Callable[..., Tree]) -> Piece:
        made.append(Piece(fn, jit=policy.jit, remat=policy.remat == "block"))
        return made[-1]

    routed = expert_pieces(cfg, policy, make, ways=ways, nodes=nodes, dtype=dispatch_dtype) if ways > 1 else None
    first = (make(embed), make(dense), make(attention), routed)
    return ModelPieces(*first, make(head), make(mtp), make(mtp_loss), made)


def _mix(block: BlockParams, bias, x, cfg: ModelConfig, table, policy: ComputePolicy, packed, *, nodes: int) -> Mixed:
    segments, mask = _where(packed)
    x, h, _ = block_attend(block, x, cfg=cfg, table=table, policy=policy, segments=segments)
    routing, stats = moe_route(block.ffn.router, bias, h, cfg=cfg.moe, mask=mask, segments=segments, fuse=policy.fuse)
    experts = cfg.moe.router.num_experts
    load = stats.load if mask is None else expert_load(routing.experts, experts)  # padding is sent, too
    shared = mlp_apply(block.ffn.shared, h, fp8=policy.fp8, fuse=policy.fuse) if cfg.moe.num_shared else ()
    rows = tf.reshape(h, [-1, cfg.hidden_size])
    to_nodes = node_load(routing.experts, experts, nodes) if nodes > 1 else ()
    balance = _shared_out(stats.balance, packed)
    return Mixed(x, shared, rows, routing.weights, routing.experts, load, to_nodes, stats.load, balance)


def _mix_whole(block: BlockParams, bias, x, cfg: ModelConfig, table, policy: ComputePolicy, packed) -> Mixed:
    segments, mask = _where(packed)
    out = block_apply(block, bias, x, cfg=cfg, table=table, policy=policy, segments=segments, mask=mask)
    return Mixed(out.out, (), (), (), (), (), (), out.stats.load, _shared_out(out.stats.balance, packed))


def _where(packed: Sequence[tf.Tensor]) -> tuple[tf.Tensor | None, tf.Tensor | None]:
    """Segments and mask, of `StageBatch.packed`."""
    return (packed[0], packed[2]) if packed else (None, None)


def _shared_out(balance: tf.Tensor, packed: Sequence[tf.Tensor]) -> tf.Tensor:
    """A device's part of the mean over all documents."""
    return balance * tf.stop_gradient(packed[3][0]) if packed else balance


class StageOutput(NamedTuple):
    """What a stage's forward pass leaves, as `Value`s.

    Attributes:
      x: for the next stage; `None` from the last one.
      main: the next-token loss; `None` except from the last stage. mtp: each MTP module's.
      balance, load: by mixture layer; the MTP modules' follow those of the stack.
    """

    x: Value | None
    main: Value | None
    mtp: list[Value]
    balance: dict[int, Value]
    load: dict[int, Value]


class StageBatch(NamedTuple):
    """One micro-batch as `Value`s. `targets` and `weights`: one for the model and one for each MTP module; `ahead`: the
    tokens that each module embeds; `packed`: of packed rows the fields of `SegmentInputs`, and a factor of the device's
    balance losses, once for each row."""

    tokens: Value
    targets: Sequence[Value]
    weights: Sequence[Value]
    ahead: Sequence[Value]
    total: Value
    packed: Sequence[Value] = ()


def stage_forward(
    tape: Tape,
    pieces: ModelPieces,
    params: Sequence[Tree],
    router: Tree,
    x: Value | None,
    batch: StageBatch,
    *,
    layers: range,
    last: bool,
    cfg: ModelConfig,
) -> Generator[Any, Any, StageOutput]:
    """The forward pass of some of a model's layers, as a generator of requests (see `parallel.tape`).

    Args:
      tape: records the pass.
      pieces: from `model_pieces`.
      params: the devices' parameters: `ModelParams` whose `dense` and `moe` are dicts from a layer's index to its tree, and
        whose `mtp` is a tuple.
      router: `RouterState` whose leaves are lists of `Value`s `[E]`.
      x: the output of the stage before; `None` for the first stage, which embeds.
      batch: the micro-batch.
      layers: the stage's, counted over both stacks.
      last: whether to compute the losses.
      cfg: the model's configuration.
    """
    balance, load, mtp, main = {}, {}, [], None
    if x is None:
        x = tape.call(pieces.embed, {"embed": "embed"}, params, batch.tokens)
    for i in layers:
        if i < cfg.num_dense_layers:
            x = tape.call(pieces.dense, {"block": f"dense.{i}"}, params, x, *batch.packed)
            continue
        j = i - cfg.num_dense_layers
        mixed = tape.call(pieces.attention, {"block": f"moe.{j}"}, params, router.moe[j], x, *batch.packed)
        x = yield from route(tape, pieces.routed, f"moe.{j}.ffn", params, mixed)
        balance[j], load[j] = mixed.balance, mixed.counted
    if not last:
        return StageOutput(x, main, mtp, balance, load)
    head = {"embed": "embed"} if cfg.tie_embeddings else {"head": "head"}
    told = (batch.targets[0], batch.weights[0], batch.total)
    main, hidden = tape.call(pieces.head, {"norm": "norm"} | head, params, x, *told)
    for k in range(cfg.num_mtp_layers):
        embedded = tape.call(pieces.embed, {"embed": "embed"}, params, batch.ahead[k])
        mixed = tape.call(pieces.mtp, {"mtp": f"mtp.{k}"}, params, router.mtp[k], hidden, embedded, *batch.packed)
        x = yield from route(tape, pieces.routed, f"mtp.{k}.block.ffn", params, mixed)
        told = (batch.targets[k + 1], batch.weights[k + 1], batch.total)
        loss, hidden = tape.call(pieces.mtp_loss, {"norm": f"mtp.{k}.norm"} | head, params, x, *told)
        mtp.append(loss)
        balance[cfg.num_moe_layers + k], load[cfg.num_moe_layers + k] = mixed.balance, mixed.counted
    return StageOutput(None, main, mtp, balance, load)
