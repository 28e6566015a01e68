"""Multi-token prediction: modules that predict one token further each, keeping the causal chain."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.block import BlockOutput, BlockParams, block_apply, block_specs
from dsv3.nn.linear import linear_apply
from dsv3.nn.mla import LayerCache
from dsv3.ops.norm import rms_norm
from dsv3.ops.rope import RopeTable
from dsv3.policy import ComputePolicy
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike


class MTPParams(NamedTuple):
    """Parameters of one module; the embedding and the head are the model's.

    Attributes:
      embed_norm: `[D]` ("enorm"). hidden_norm: `[D]` ("hnorm").
      proj: `[2D, D]` ("eh_proj"): its first D rows take the embedding, the others the hidden state (as published).
      block: a mixture-of-experts block.
      norm: `[D]` ("shared_head.norm"), before the head.
    """

    embed_norm: tf.Tensor
    hidden_norm: tf.Tensor
    proj: tf.Tensor
    block: BlockParams
    norm: tf.Tensor


class MTPOutput(NamedTuple):
    """`hidden` `[B, T, D]`: the module's output, input of the next; `normed`: what the head reads; `block`: its parts."""

    hidden: tf.Tensor
    normed: tf.Tensor
    block: BlockOutput


def mtp_specs(cfg: ModelConfig) -> MTPParams:
    """Returns the `ParamSpec`s of one module."""
    d = cfg.hidden_size
    norm = ParamSpec((d,), ("embed",), init="ones")
    return MTPParams(
        embed_norm=norm,
        hidden_norm=norm,
        proj=ParamSpec((2 * d, d), ("embed2", "embed"), std=cfg.init_std),
        block=block_specs(cfg, dense=False),
        norm=norm,
    )


def mtp_next_hidden(out: MTPOutput, cfg: ModelConfig) -> tf.Tensor:
    """Returns what the next module of a chain reads: `[B, T, D]`, see `ModelConfig.mtp_next`."""
    return out.hidden if cfg.mtp_next == "raw" else out.normed


@plain
def mtp_apply(
    params: MTPParams,
    bias: TensorLike,
    hidden: TensorLike,
    embedded: TensorLike,
    *,
    cfg: ModelConfig,
    table: RopeTable,
    policy: ComputePolicy,
    segments: TensorLike | None = None,
    cache: LayerCache | None = None,
    mask: TensorLike | None = None,
) -> MTPOutput:
    """Combines each position's hidden state with the embedding of a later token and applies one block.

    `h' = block(proj([enorm(emb(t_{i+k})) ; hnorm(h_i)]))`, for module k; `normed = norm(h')`.

    Args:
      params: see `MTPParams`.
      bias: `[E]` float32, the selection bias of the module's router.
      hidden: `[B, T, D]`: for k = 1 the model's hidden state after its final norm, then the previous module's `hidden`.
      embedded: `[B, T, D]`: position i holds the embedding of token i + k.
      cfg: the model's configuration; `mtp_concat` says which half of `proj`'s input comes first.
      table: cos and sin of positions i.
      policy, segments, cache, mask: as in `block_apply`.

    Returns:
      `MTPOutput`. The logits for token i + k + 1 are `head(normed)`.

    References: DeepSeek-V3 section 2.2, equations 21 to 23; the published layer 61 takes the embedding first.
    """
    x = mtp_input(params, hidden, embedded, cfg=cfg, policy=policy)
    block = block_apply(
        params.block, bias, x, cfg=cfg, table=table, policy=policy, segments=segments, cache=cache, mask=mask
    )
    norm = {"eps": cfg.norm_eps, "rounding": cfg.norm_rounding, "fuse": policy.fuse}
    return MTPOutput(block.out, rms_norm(block.out, params.norm, **norm), block)


@plain
def mtp_input(
    params: MTPParams, hidden: TensorLike, embedded: TensorLike, *, cfg: ModelConfig, policy: ComputePolicy
) -> tf.Tensor:
    """Returns `[B, T, D]`, what the module's block reads: `proj([enorm(embedded) ; hnorm(hidden)])`. See `mtp_apply`."""
    check(cfg.num_mtp_layers > 0, "mtp_apply: the config has no MTP module (num_nextn_predict_layers is 0)")
    dims = Dims("mtp_apply", D=cfg.hidden_size)
    dims("hidden", hidden, "B T D")
    dims("embedded", embedded, "B T D")
    norm = {"eps": cfg.norm_eps, "rounding": cfg.norm_rounding, "fuse": policy.fuse}
    parts = [rms_norm(embedded, params.embed_norm, **norm), rms_norm(hidden, params.hidden_norm, **norm)]
    if cfg.mtp_concat == "hidden_first":
        parts.reverse()
    return linear_apply(tf.concat(parts, -1), params.proj)
