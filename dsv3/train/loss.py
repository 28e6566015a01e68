"""The pretraining loss: next token, multi-token prediction, sequence-wise balance."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_token_ids
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.model import ModelOutput, ModelParams, RouterState, head_weight, model_apply, mtp_chain
from dsv3.ops.loss import token_nll
from dsv3.ops.segments import SegmentInputs, segment_count, segment_inputs
from dsv3.policy import ComputePolicy, default_policy
from dsv3.train.schedule_paper import PAPER_START
from dsv3.typing import TensorLike


class LossParts(NamedTuple):
    """What the loss is made of; sums over tokens are divided by `normalizer`.

    Attributes:
      nll: float32 scalar, next-token cross-entropy in nats a token.
      mtp: `[modules]` float32, each MTP module's cross-entropy.
      balance: float32 scalar, the balance loss without α, summed over mixture layers.
      load: `RouterState` of `[X, E]` and `[modules, E]` float32, tokens that each expert got.
    """

    nll: tf.Tensor
    mtp: tf.Tensor
    balance: tf.Tensor
    load: RouterState


@plain
def pretrain_loss(
    params: ModelParams,
    router: RouterState,
    tokens: TensorLike,
    weights: TensorLike | None = None,
    *,
    cfg: ModelConfig,
    mtp_weight: float | tf.Tensor = PAPER_START.mtp_weight,
    balance_weight: float | tf.Tensor = PAPER_START.balance_weight,
    normalizer: TensorLike | None = None,
    segments: TensorLike | None = None,
    sequences: TensorLike | None = None,
    policy: ComputePolicy | None = None,
) -> tuple[tf.Tensor, LossParts]:
    """`L = L_main + λ/D·Σ_k L_mtp_k + α·Σ_layers L_balance`.

    Args:
      params, router: the model's parameters and selection biases.
      tokens: `[B, T+1]` int: inputs are the first T, targets the last T of a row.
      weights: `[B, T]` float32, weight of each target (0 leaves it out); default: ones.
      cfg: the model's configuration.
      mtp_weight: λ. balance_weight: α. Default: what the paper begins with, see `PAPER_SCHEDULE`.
      normalizer: what sums over tokens are divided by; default: the sum of the weights that count. With gradient
        accumulation pass the whole batch's, so that micro-batches add up.
      segments: `[B, T+1]` int, for packed rows: the document of each token, 0 for padding. Documents do not see each other;
        each has positions from 0, is balanced by itself, and gives the loss that it would give as a row of its own. Targets
        of another document than their input's, and padding, do not count, whatever their weights.
      sequences: with `segments`, what the sum of the documents' balance losses is divided by; default: their number. With
        gradient accumulation pass the whole batch's, as for `normalizer`.
      policy: how to compute; default: the device's.

    Returns:
      The loss (float32 scalar) and its `LossParts`. Each L_mtp_k is divided by the same count as L_main (Eq. 24 divides
      by T), although its last k positions have no target.

    References: DeepSeek-V3 sections 2.1.2 and 2.2, equations 17 to 25; section 5.1 for packing.
    """
    policy = policy or default_policy()
    tokens = tf.convert_to_tensor(tokens)
    weights, packed = row_weights("pretrain_loss", tokens, weights, segments, cfg)
    total = tf.reduce_sum(weights) if normalizer is None else tf.cast(normalizer, tf.float32)
    total = tf.maximum(total, 1e-9)
    where = row_places(packed)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    out = model_apply(params, router, inputs, cfg=cfg, **where, policy=policy)
    head = tf.cast(head_weight(params), out.hidden.dtype)
    main = weighted_nll(out.hidden, head, targets, weights, total, policy=policy)
    mtp, balance, load = further_losses(
        params, router, out, head, targets, weights, packed, total, sequences, cfg=cfg, policy=policy
    )
    loss = main + balance_weight * balance
    if cfg.num_mtp_layers:
        loss += mtp_weight * tf.reduce_mean(mtp)
    return loss, LossParts(main, mtp, balance, load)


@plain
def further_losses(
    params: ModelParams, router: RouterState, out: ModelOutput, head: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor,
    packed: SegmentInputs | None, total: tf.Tensor, sequences: TensorLike | None, *, cfg: ModelConfig, policy: ComputePolicy,
) -> tuple[tf.Tensor, tf.Tensor, RouterState]:  # fmt: skip
    """Returns what stands beside the main loss, before it is weighted: `mtp`, `balance` and `load` as of `LossParts`."""
    balance, load = tf.constant(0.0), tf.zeros_like(router.moe)
    if cfg.num_moe_layers:
        balance, load = tf.reduce_sum(out.stats.balance), out.stats.load
    mtp, mtp_load = tf.zeros([0]), tf.zeros_like(router.mtp)
    if cfg.num_mtp_layers:
        mtp, mtp_load, more = mtp_losses(
            params, router, out, head, targets, weights, packed, total, cfg=cfg, policy=policy
        )
        balance += more
    if packed is not None and sequences is not None:
        balance *= segment_count(packed.inside) / tf.maximum(tf.cast(sequences, tf.float32), 1.0)
    return mtp, balance, RouterState(load, mtp_load)


def row_weights(
    function: str, tokens: tf.Tensor, weights: TensorLike | None, segments: TensorLike | None, cfg: ModelConfig
) -> tuple[tf.Tensor, SegmentInputs | None]:
    """Checks rows for a loss, and returns the weights that count and where documents are."""
    dims = Dims(function)
    dims("tokens", tokens, "B T")
    check_token_ids(function, "tokens", tokens, cfg.vocab_size)
    length = tokens.shape[1] - 1
    check(length > 0, f"{function}: `tokens` has {length + 1} column, want at least 2 [B, T+1]")
    if weights is None:
        weights = tf.ones([dims.B, length])
    Dims(function, B=dims.B, T=length)("weights", weights, "B T")
    weights = tf.cast(weights, tf.float32)
    if segments is None:
        return weights, None
    dims("segments", segments, "B T")
    packed = segment_inputs(segments)
    return weights * tf.cast(packed.inside, tf.float32), packed


def row_places(packed: SegmentInputs | None) -> dict[str, tf.Tensor]:
    """What `model_apply` is told of packed rows."""
    if packed is None:
        return {}
    return {"segments": packed.segments, "positions": packed.positions, "mask": packed.inside}


@plain
def mtp_losses(
    params: ModelParams, router: RouterState, out: ModelOutput, head: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor,
    packed: SegmentInputs | None, total: tf.Tensor, *, cfg: ModelConfig, policy: ComputePolicy,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:  # fmt: skip
    """Returns each MTP module's cross-entropy `[modules]`, its load `[modules, E]`, and the sum of their balance losses.

    Args:
      params, router: the model, which has modules. out: what it computed.
      head: `[D, V]`, the model's, in the dtype of its hidden states: the one that the other parts of the loss use, so that
        its gradients are summed before they are cast and turned back.
      targets, weights, packed: see `mtp_targets`.
      total: what sums over tokens are divided by.
      cfg, policy: the model's configuration, and how to compute.
    """
    chain = mtp_chain(params, router, out, targets, cfg=cfg, **row_places(packed), policy=policy)
    losses = []
    for k, told in enumerate(mtp_targets(targets, weights, packed, cfg.num_mtp_layers)):
        losses.append(weighted_nll(chain.normed[k], head, *told, total, policy=policy))
    return tf.stack(losses), chain.stats.load, tf.reduce_sum(chain.stats.balance)


@plain
def mtp_targets(
    targets: TensorLike, weights: TensorLike, packed: SegmentInputs | None, modules: int
) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Returns for each MTP module its targets `[B, T]` and their weights: those of the model, k places further.

    Args:
      targets, weights: `[B, T]`, the model's; weights are 0 where the target is of another document than the input.
      packed: where documents are. A target counts where input and target, and so all between, are of one document.
      modules: how many modules there are.
    """
    found = []
    reach = None if packed is None else packed.inside
    for _ in range(modules):
        targets, weights = shift_left(targets), shift_left(weights)
        if reach is not None:
            reach = shift_left(reach) & packed.inside
            weights *= tf.cast(reach, weights.dtype)
        found.append((targets, weights))
    return found


@plain
def weighted_nll(
    hidden: tf.Tensor, head: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, total: tf.Tensor, *, policy: ComputePolicy
) -> tf.Tensor:
    """Returns `Σ weights·nll / total`: the cross-entropy of `[B, T]` targets under `head(hidden)`, a float32 scalar."""
    rows = tf.reshape(hidden, [-1, hidden.shape[-1]])
    how = {"chunk": policy.loss_chunk, "keep": policy.loss_keep, "fuse": policy.fuse}
    nll = token_nll(rows, head, tf.reshape(targets, [-1]), **how)
    return tf.reduce_sum(nll * tf.reshape(weights, [-1])) / total


def shift_left(x: tf.Tensor) -> tf.Tensor:
    """Moves a row's values one place to the left; a zero comes in on the right."""
    return tf.pad(x[:, 1:], [[0, 0], [0, 1]])
