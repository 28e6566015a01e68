"""One transformer block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.linear import MLPParams, mlp_apply, mlp_specs
from dsv3.nn.mla import LayerCache, MLAParams, mla_apply, mla_specs
from dsv3.nn.moe import MoEParams, RouterStats, moe_apply, moe_specs
from dsv3.ops.norm import rms_norm
from dsv3.ops.rope import RopeTable
from dsv3.policy import ComputePolicy
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike


class BlockParams(NamedTuple):
    """`attn_norm` `[D]`, `mla`, `ffn_norm` `[D]`, and `ffn`: `MLPParams` in a dense block, `MoEParams` in a mixture."""

    attn_norm: tf.Tensor
    mla: MLAParams
    ffn_norm: tf.Tensor
    ffn: MLPParams | MoEParams


class BlockOutput(NamedTuple):
    """`out` `[B, T, D]`, the cache `entry` `[B, T, L+R]`, and `stats`: `RouterStats`, or `()` for a dense block."""

    out: tf.Tensor
    entry: tf.Tensor
    stats: RouterStats | tuple


def block_specs(cfg: ModelConfig, *, dense: bool) -> BlockParams:
    """Returns the `ParamSpec`s of one block."""
    d, std = cfg.hidden_size, cfg.init_std
    norm = ParamSpec((d,), ("embed",), init="ones")
    ffn = mlp_specs(d, cfg.intermediate_size, std=std) if dense else moe_specs(cfg.moe, std=std)
    return BlockParams(attn_norm=norm, mla=mla_specs(cfg.mla, std=std), ffn_norm=norm, ffn=ffn)


@plain
def block_apply(
    params: BlockParams,
    bias: TensorLike | tuple,
    x: TensorLike,
    *,
    cfg: ModelConfig,
    table: RopeTable,
    policy: ComputePolicy,
    segments: TensorLike | None = None,
    cache: LayerCache | None = None,
    mask: TensorLike | None = None,
    experts: TensorLike | None = None,
    form: str = "auto",
) -> BlockOutput:
    """Applies one block.

    Args:
      params: see `BlockParams`.
      bias: `[E]` float32, the router's selection bias; `()` for a dense block.
      x: `[B, T, D]`.
      cfg: the model's configuration.
      table: cos and sin of the tokens' positions.
      policy: how to compute.
      segments, cache, form: see `mla_apply`, and `moe_apply` for segments.
      mask, experts: see `moe_apply`.

    Returns:
      `BlockOutput`.
    """
    x, h, entry = block_attend(params, x, cfg=cfg, table=table, policy=policy, segments=segments, cache=cache, form=form)
    if isinstance(params.ffn, MLPParams):
        return BlockOutput(x + mlp_apply(params.ffn, h, fp8=policy.fp8, fuse=policy.fuse), entry, ())
    ffn = moe_apply(params.ffn, bias, h, cfg=cfg.moe, mask=mask, segments=segments, experts=experts, policy=policy)
    return BlockOutput(x + ffn.out, entry, ffn.stats)


@plain
def block_attend(
    params: BlockParams,
    x: TensorLike,
    *,
    cfg: ModelConfig,
    table: RopeTable,
    policy: ComputePolicy,
    segments: TensorLike | None = None,
    cache: LayerCache | None = None,
    form: str = "auto",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The first half of a block: `x + attention(norm(x))`, its norm, which the feed-forward reads, and the cache entry.

    Args:
      params, x, cfg, table, policy, segments, cache, form: as in `block_apply`; `params.ffn` is not read.

    Returns:
      `[B, T, D]`, `[B, T, D]` and `[B, T, L+R]`.
    """
    norm = {"eps": cfg.norm_eps, "rounding": cfg.norm_rounding, "fuse": policy.fuse}
    attn = mla_apply(
        params.mla, rms_norm(x, params.attn_norm, **norm), cfg=cfg.mla, table=table,
        segments=segments, cache=cache, form=form, policy=policy,
    )  # fmt: skip
    x = x + attn.out
    return x, rms_norm(x, params.ffn_norm, **norm), attn.entry
