"""The mixture-of-experts layer: router, routed experts without token dropping, shared experts."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3.checks import Dims, check, check_type
from dsv3.config import MoEConfig
from dsv3.graph import plain
from dsv3.nn.fp8_experts import fp8_experts
from dsv3.nn.linear import MLPParams, mlp_apply, mlp_specs
from dsv3.ops.experts import experts_apply
from dsv3.ops.quantized import QuantizedWeight
from dsv3.ops.quantized_experts import quantized_experts
from dsv3.ops.router import (
    Routing,
    expert_load,
    router_scores,
    router_select,
    router_weights,
    sequence_balance_loss,
)
from dsv3.policy import ComputePolicy, default_policy
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike


class MoEParams(NamedTuple):
    """Parameters of one mixture.

    Attributes:
      router: `[D, E]`.
      gate_up: `[E, D, 2F]`, gate then up. down: `[E, F, D]`. Both may be a `QuantizedWeight`.
      shared: the shared experts as one feed-forward layer of width `num_shared·F`, or `()`.
    """

    router: tf.Tensor
    gate_up: tf.Tensor
    down: tf.Tensor
    shared: MLPParams


class RouterStats(NamedTuple):
    """What balancing and monitoring need of one mixture layer.

    Attributes:
      load: `[E]` float32, tokens that each expert got (the masked ones not counted); sums to K times the tokens.
      balance: float32 scalar, the sequence-wise balance loss without α; sequences are rows, or their segments.
      experts: `[B, T, K]` int32, the chosen experts.
    """

    load: tf.Tensor
    balance: tf.Tensor
    experts: tf.Tensor


class MoEOutput(NamedTuple):
    """`out` `[B, T, D]` and the layer's `RouterStats`."""

    out: tf.Tensor
    stats: RouterStats


def moe_specs(cfg: MoEConfig, *, std: float) -> MoEParams:
    """Returns the `ParamSpec`s of one mixture.

    Args:
      cfg: the layer's configuration.
      std: standard deviation of initial weights.
    """
    d, f, e = cfg.hidden_size, cfg.intermediate_size, cfg.router.num_experts
    return MoEParams(
        router=ParamSpec((d, e), ("embed", "router"), std=std),
        gate_up=ParamSpec((e, d, 2 * f), ("expert", "embed", "mlp"), std=std),
        down=ParamSpec((e, f, d), ("expert", "mlp", "embed"), std=std),
        shared=mlp_specs(d, cfg.num_shared * f, std=std) if cfg.num_shared else (),
    )


@plain
def moe_apply(
    params: MoEParams,
    bias: TensorLike,
    x: TensorLike,
    *,
    cfg: MoEConfig,
    mask: TensorLike | None = None,
    segments: TensorLike | None = None,
    experts: TensorLike | None = None,
    policy: ComputePolicy | None = None,
) -> MoEOutput:
    """`Σ_k w_k·expert_k(x) + shared(x)`: no token is dropped, the shared experts are unweighted and unscaled.

    Args:
      params: see `MoEParams`.
      bias: `[E]` float32, the router's selection bias (state, not a parameter).
      x: `[B, T, D]`.
      cfg: the layer's configuration.
      mask: `[B, T]` bool, tokens that count in the statistics; all are computed.
      segments: `[B, T]` int, the documents of packed rows: the balance loss is of each by itself.
      experts: `[B, T, K]` int, to use these experts instead of choosing (router replay); their weights are computed.
      policy: how to compute; default: the device's.

    Returns:
      `MoEOutput`. The gradient reaches the router through the gate values and through `stats.balance`.

    References: DeepSeek-V3 section 2.1.2, equations 12 to 20.
    """
    check_type("moe_apply", "params", params, MoEParams)
    policy = policy or default_policy()
    routing, stats = moe_route(
        params.router, bias, x, cfg=cfg, mask=mask, segments=segments, experts=experts, fuse=policy.fuse
    )
    x = tf.convert_to_tensor(x)
    out = _experts(params, tf.reshape(x, [-1, cfg.hidden_size]), routing, policy)
    out = tf.reshape(out, tf.shape(x))
    if cfg.num_shared:
        out += mlp_apply(params.shared, x, fp8=policy.fp8, fuse=policy.fuse)
    return MoEOutput(tf.ensure_shape(out, x.shape), stats)


@plain
def moe_route(
    weight: TensorLike,
    bias: TensorLike,
    x: TensorLike,
    *,
    cfg: MoEConfig,
    mask: TensorLike | None = None,
    segments: TensorLike | None = None,
    experts: TensorLike | None = None,
    fuse: bool = False,
) -> tuple[Routing, RouterStats]:
    """The router alone: which experts `moe_apply` sends each token to.

    Args:
      weight: `[D, E]`, the router's parameter.
      bias, x, cfg, mask, segments, experts: as in `moe_apply`.
      fuse: compile the choice as a few kernels (not under XLA).

    Returns:
      `Routing` of the N = B·T tokens, and `RouterStats`.
    """
    check_type("moe_apply", "cfg", cfg, MoEConfig)
    r = cfg.router
    dims = Dims("moe_apply", D=cfg.hidden_size, E=r.num_experts, K=r.top_k)
    dims("x", x, "B T D")
    dims("bias", bias, "E")
    if mask is not None:
        dims("mask", mask, "B T")
    if segments is not None:
        dims("segments", segments, "B T")
    x = tf.convert_to_tensor(x)
    scores = router_scores(tf.reshape(x, [-1, cfg.hidden_size]), weight)
    if experts is None:
        routing = router_select(
            scores, bias, top_k=r.top_k, num_groups=r.num_groups, groups_kept=r.groups_kept,
            scale=r.scale, normalize=r.normalize, group_mask=r.group_mask, fuse=fuse,
        )  # fmt: skip
    else:
        dims("experts", experts, "B T K")
        chosen = tf.reshape(tf.cast(experts, tf.int32), [-1, r.top_k])
        # Not compiled: on a CPU TensorFlow's gather refuses what is no expert, where XLA's would read another's score.
        weights = router_weights(scores, chosen, scale=r.scale, normalize=r.normalize)
        routing = Routing(weights, chosen, scores)
    shape = tf.shape(x)
    stats = RouterStats(
        load=expert_load(routing.experts, r.num_experts, mask),
        balance=sequence_balance_loss(
            tf.reshape(scores, [shape[0], shape[1], r.num_experts]), top_k=r.top_k, mask=mask, segments=segments,
            fuse=fuse,
        ),
        experts=tf.reshape(routing.experts, [shape[0], shape[1], r.top_k]),
    )
    return routing, stats


def _experts(params: MoEParams, tokens, routing: Routing, policy: ComputePolicy) -> tf.Tensor:
    n, k = routing.experts.shape
    check(n is not None, "moe_apply: `x` has an unknown number of tokens, want static B and T")
    few = n * k <= policy.max_rows and policy.fp8 is None
    multiple = policy.row_multiple(n * k, params.gate_up.shape[0])
    given = (tokens, routing.weights, routing.experts, params.gate_up, params.down)
    return experts_compute(*given, kernel="rows" if few else policy.experts, multiple=multiple, policy=policy)


def experts_compute(
    x: tf.Tensor, weights: tf.Tensor, experts: tf.Tensor, gate_up: TensorLike, down: TensorLike, *, kernel: str,
    multiple: int, policy: ComputePolicy,
) -> tf.Tensor:  # fmt: skip
    """`ops.experts.experts_apply`, `ops.quantized_experts.quantized_experts` for quantised weights, or
    `nn.fp8_experts.fp8_experts` if the policy computes in FP8; arguments as there."""
    if isinstance(gate_up, QuantizedWeight):
        check(policy.fp8 is None, "moe_apply: `params` are quantised, want a policy with fp8=None")
        return quantized_experts(x, weights, experts, gate_up, down, kernel=kernel, multiple=multiple)
    how = {"kernel": kernel, "multiple": multiple, "fuse": policy.fuse}
    if policy.fp8 is not None:
        return fp8_experts(x, weights, experts, gate_up, down, recipe=policy.fp8, **how)
    return experts_apply(x, weights, experts, tf.cast(gate_up, x.dtype), tf.cast(down, x.dtype), **how)
