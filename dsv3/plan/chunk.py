"""Time of one chunk: what a micro-batch costs in a stage, as a roofline of products, passes over memory and links."""

from __future__ import annotations

import functools
from typing import NamedTuple

from dsv3.config import ModelConfig
from dsv3.plan.count import ROUTED, SCORES, unit_flops, unit_leaves
from dsv3.plan.hardware import Hardware
from dsv3.plan.memory import LOW_PRECISION
from dsv3.plan.mesh import Plan, Stage
from dsv3.plan.traffic import chunk_send, layer_exchange
from dsv3.typing import Tree


class Chunk(NamedTuple):
    """Seconds of one micro-batch in one stage, alone on the whole device.

    Attributes:
      forward: computation of the forward pass. inputs, weights: of the backward pass, for inputs (with what is computed
        again) and for weights.
      comm_forward, comm_backward: all-to-all and pipeline sends.
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    comm_forward: float = 0.0
    comm_backward: float = 0.0

    @property
    def compute(self) -> float:
        """Computation of both passes."""
        return self.forward + self.inputs + self.weights

    @property
    def comm(self) -> float:
        """Communication of both passes."""
        return self.comm_forward + self.comm_backward


def product_time(part: str, flops: float, plan: Plan, hardware: Hardware) -> float:
    """Returns the seconds of `flops` of one part: attention at its own rate, what may be FP8 at that of FP8, others bf16.

    Args:
      part: a part of `count`.
      flops: operations.
      plan: the products' format and the experts' imbalance, which stretches the routed experts.
      hardware: peaks and fractions.

    Returns:
      Seconds.
    """
    if part == SCORES:
        return flops / (hardware.bf16_flops * hardware.attention_fraction)
    if part in LOW_PRECISION and plan.products_dtype == "fp8":
        rate = hardware.fp8_flops * hardware.fp8_fraction
    else:
        rate = hardware.bf16_flops * hardware.bf16_fraction
    return flops / rate * (plan.imbalance if part == ROUTED and plan.expert > 1 else 1)


def pass_bytes(cfg: ModelConfig, unit: str) -> int:
    """Returns the bytes that one token's forward pass moves through memory outside of products.

    Values read and written by norms, rotations, residuals, SwiGLU, and the experts' permutation, in bfloat16, each kernel
    fused as far as is usual: of an attention layer 2D + 2(Q + L + R) + 2H(2(P + R) + U) + 3D; of a feed-forward layer
    2D + 3D and, a row, 3F; a mixture also moves K + 1 rows of D before and after its experts. The head: 3D, with logits 2V
    in float32.

    Args:
      cfg: the configuration.
      unit: one of `count.UNITS`.

    Returns:
      Bytes. It is an estimate of this library: real kernels fuse more or less, and quantise on the way.
    """
    d, mla, moe = cfg.hidden_size, cfg.mla, cfg.moe
    if unit == "head":
        return 2 * 3 * d + 4 * 2 * cfg.vocab_size
    heads = 2 * mla.num_heads * (2 * mla.qk_dim + mla.v_dim)
    values = 5 * d + 2 * ((mla.q_latent or 0) + mla.cache_width) + heads + 5 * d
    if unit == "dense":
        return 2 * (values + 3 * cfg.intermediate_size)
    k = moe.router.top_k
    values += 2 * (k + 1) * d + 3 * (k + moe.num_shared) * moe.intermediate_size
    return 2 * values + (2 * 5 * d + pass_bytes(cfg, "head") if unit == "mtp" else 0)


@functools.lru_cache(maxsize=4096)
def unit_time(cfg: ModelConfig, specs: Tree, unit: str, plan: Plan, hardware: Hardware) -> Chunk:
    """Returns the computing seconds of one unit of a chunk: products at their rates, or reading their weights, and passes.

    The backward pass moves twice the bytes of the forward pass (assumption), and `"block"` the forward's once more.

    Args:
      cfg: the configuration.
      specs: its specs.
      unit: one of `count.UNITS`.
      plan: the plan.
      hardware: the device.

    Returns:
      `Chunk` without communication.
    """
    flops = unit_flops(cfg, specs, unit, length=plan.length, recompute=plan.recompute)
    bandwidth = hardware.hbm_bandwidth * hardware.hbm_fraction
    reading = _unit_bytes(cfg, specs, unit, plan) / bandwidth
    passes = plan.tokens * pass_bytes(cfg, unit) / bandwidth

    def seconds(parts: dict[str, float], factor: float = 1.0) -> float:
        return sum(product_time(part, factor * f * plan.tokens, plan, hardware) for part, f in parts.items())

    matrices = {part: f for part, f in flops.forward.items() if part != SCORES}
    scores = {SCORES: flops.backward[SCORES]} if SCORES in flops.backward else {}
    again = seconds(flops.recomputed) + (passes if plan.recompute == "block" and unit != "head" else 0)
    return Chunk(
        forward=max(seconds(flops.forward), reading) + passes,
        inputs=max(seconds(matrices) + seconds(scores), reading) + 2 * passes + again,
        weights=max(seconds(matrices), reading),
    )


def _unit_bytes(cfg: ModelConfig, specs: Tree, unit: str, plan: Plan) -> int:
    """Bytes of a unit's weights on a device, at a byte a value in FP8 and two in bfloat16."""
    total = 0
    for leaf in unit_leaves(cfg, specs, unit):
        size = leaf.size // plan.expert if leaf.is_expert else leaf.size
        total += size * (1 if leaf.part in LOW_PRECISION and plan.products_dtype == "fp8" else 2)
    return total


def stage_time(cfg: ModelConfig, specs: Tree, plan: Plan, stage: Stage, hardware: Hardware) -> Chunk:
    """Returns the seconds of one chunk in a stage, see `Chunk`.

    All-to-all takes as long as the slower of its two links, which work at the same time, times `plan.imbalance`; pipeline
    sends go over InfiniBand; latencies are not counted.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      stage: what it holds.
      hardware: the device.

    Returns:
      `Chunk`.
    """
    compute = [0.0, 0.0, 0.0]
    for unit, times in stage.units.items():
        if times:
            for i, value in enumerate(unit_time(cfg, specs, unit, plan, hardware)[:3]):
                compute[i] += times * value
    ib = hardware.ib_bandwidth * hardware.ib_fraction
    nvlink = hardware.nvlink_bandwidth * hardware.nvlink_fraction

    def exchange(*names: str) -> float:
        each = [max(links[name].ib / ib, links[name].nvlink / nvlink) for name in names]
        return sum(each) * plan.imbalance * (stage.moe + stage.mtp)

    links = layer_exchange(cfg, plan)
    send = chunk_send(cfg, plan) / ib
    return Chunk(
        *compute,
        comm_forward=exchange("dispatch", "combine") + (0 if stage.head else send),
        comm_backward=exchange("combine backward", "dispatch backward") + (0 if stage.embed else send),
    )
