"""Log-probabilities of whole sequences, as training computes them: one pass, no cache, experts chosen or replayed."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import Dims, check
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.model import ModelOutput, ModelParams, RouterState, head_weight, model_apply, mtp_chain
from dsv3.ops.loss import target_logprobs
from dsv3.policy import ComputePolicy, default_policy
from dsv3.train.loss import shift_left, weighted_nll
from dsv3.typing import TensorLike


class TokenLogprobs(NamedTuple):
    """What one forward pass says of sequences.

    Attributes:
      logprobs: `[N, T]` float32, of token t + 1 given those before it, at the temperature.
      entropy: `[N, T]` float32, of the distribution that it is from, in nats.
      experts: `[X, N, T, K]` int32, the experts that were used.
      balance: float32 scalar, the balance loss without α, summed over mixture layers.
      mtp: `[modules]` float32, each MTP module's cross-entropy on the tokens of the mask; empty unless asked for.
      load: `RouterState` of tokens that each expert got; zeros for modules that were not asked for.
    """

    logprobs: tf.Tensor
    entropy: tf.Tensor
    experts: tf.Tensor
    balance: tf.Tensor
    mtp: tf.Tensor
    load: RouterState


@plain
def token_logprobs(
    params: ModelParams,
    router: RouterState,
    tokens: TensorLike,
    mask: TensorLike | None = None,
    *,
    cfg: ModelConfig,
    temperature: float = 1.0,
    experts: TensorLike | None = None,
    mtp: bool = False,
    mtp_tokens: TensorLike | None = None,
    policy: ComputePolicy | None = None,
) -> TokenLogprobs:
    """`log softmax(logits / temperature)` at each next token, without the logits of many tokens at once.

    Args:
      params, router: the model.
      tokens: `[N, T+1]` int: whole sequences, padded on the right, where nothing matters.
      mask: `[N, T]`, 1 for those of the last T tokens that were drawn; what stands behind a row's last one is padding and
        counts in no statistic. Default: all.
      cfg: the model's configuration.
      temperature: of the sampling, above 0.
      experts: `[X, N, T, K]` int, experts to use instead of choosing: those of the sampling pass. Their gate values are
        computed, and give the router its gradient.
      mtp: compute the MTP modules' cross-entropy on the tokens of the mask, too. Its gradient reaches the modules alone:
        they learn to guess what the model says, and the model does not learn to be guessed.
      mtp_tokens: what that is divided by, tokens of the whole batch; default: of `mask`.
      policy: how to compute; default: the device's.

    Returns:
      `TokenLogprobs`, differentiable in the parameters.

    Raises:
      ValueError: wrong shapes, or MTP of a model without modules.
    """
    policy = policy or default_policy()
    dims = Dims("token_logprobs")
    dims("tokens", tokens, "N T")
    check(dims.T is None or dims.T > 1, f"token_logprobs: `tokens` has {dims.T} column, want at least 2 [N, T+1]")
    tokens = tf.convert_to_tensor(tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = tf.ones(targets.shape) if mask is None else tf.cast(mask, tf.float32)
    Dims("token_logprobs", N=targets.shape[0], T=targets.shape[1])("mask", mask, "N T")
    check(not mtp or cfg.num_mtp_layers > 0, "token_logprobs: `mtp` is asked for, but the model has no MTP module")
    counted = tf.cumsum(mask, -1, reverse=True) > 0
    out = model_apply(params, router, inputs, cfg=cfg, experts=experts, mask=counted, policy=policy)
    rows = tf.reshape(out.hidden, [-1, out.hidden.shape[-1]])
    logprobs, entropy = target_logprobs(
        rows, tf.cast(head_weight(params), rows.dtype), tf.reshape(targets, [-1]), temperature=temperature,
        chunk=policy.loss_chunk, keep=policy.loss_keep, fuse=policy.fuse,
    )  # fmt: skip
    balance, load = tf.constant(0.0), tf.zeros_like(router.moe)
    used = tf.zeros([0, *inputs.shape, cfg.moe.router.top_k], tf.int32)
    if cfg.num_moe_layers:
        balance, load, used = tf.reduce_sum(out.stats.balance), out.stats.load, out.stats.experts
    losses, mtp_load = tf.zeros([0]), tf.zeros_like(router.mtp)
    if mtp:
        total = tf.maximum(tf.reduce_sum(mask) if mtp_tokens is None else tf.cast(mtp_tokens, tf.float32), 1.0)
        losses, mtp_load = _draft_losses(params, router, out, targets, mask, counted, total, cfg=cfg, policy=policy)
    logprobs, entropy = (tf.reshape(x, targets.shape) for x in (logprobs, entropy))
    return TokenLogprobs(logprobs, entropy, used, balance, losses, RouterState(load, mtp_load))


def _draft_losses(
    params: ModelParams, router: RouterState, out: ModelOutput, targets: tf.Tensor, mask: tf.Tensor, counted: tf.Tensor,
    total: tf.Tensor, *, cfg: ModelConfig, policy: ComputePolicy,
) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
    """Each module's cross-entropy and load, with a gradient in the modules' own parameters only."""
    fixed = tree.map_leaves(tf.stop_gradient, params)._replace(mtp=params.mtp)
    still = out._replace(hidden=tf.stop_gradient(out.hidden), raw_hidden=tf.stop_gradient(out.raw_hidden))
    chain = mtp_chain(fixed, router, still, targets, cfg=cfg, mask=counted, policy=policy)
    head = tf.cast(head_weight(fixed), out.hidden.dtype)
    losses = []
    for k in range(cfg.num_mtp_layers):
        targets, mask = shift_left(targets), shift_left(mask)
        losses.append(weighted_nll(chain.normed[k], head, targets, mask, total, policy=policy))
    return tf.stack(losses), chain.stats.load
