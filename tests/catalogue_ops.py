"""The catalogue's entries for `dsv3.ops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv3.ops.attention import AttentionMask
from dsv3.ops.dispatch import Dispatch, dispatch_rows, dispatch_slots
from dsv3.ops.divergence import TopK, top_k_logprobs
from dsv3.ops.fp8 import E4M3, Fp8Tensor, fp8_quantize
from dsv3.ops.fp8_wire import fp8_pack
from dsv3.ops.gemm_grouped import fp8_quantize_groups
from dsv3.ops.latent import latent_pack
from dsv3.ops.quantized import QuantizedWeight, quantized_encode
from dsv3.ops.rope import RopeTable
from tests.catalogue_entry import Entry, arrays
from tests.compare import normal
from tests.small import KEY

EXPERTS = np.array([[2, 0], [2, 1], [0, 2]], np.int32)
SCORES = np.random.default_rng(0).permutation(24).reshape(3, 8).astype(np.float32) / 32 + 0.1


def int32(*shape: int, high: int = 3) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, high, shape).astype(np.int32)


def attention_inputs() -> dict[str, Any]:
    q, k, v = (normal(i, 2, 2, 5, width) for i, width in enumerate((4, 4, 3)))
    index, segments = np.arange(5, dtype=np.int32)[None], np.array([[0, 0, 1, 1, 1]] * 2, np.int32)
    return {"q": q, "k": k, "v": v, "mask": AttentionMask(index, index, segments, segments)}


def attention_wrong() -> dict[str, Any]:
    mask = attention_inputs()["mask"]
    return {"k": normal(0, 2, 2, 5, 3), "v": normal(0, 2, 5, 3), "mask": mask._replace(k_index=mask.k_index[:, 1:])}


def rope_inputs(length: int) -> dict[str, Any]:
    return {"x": normal(0, 2, 3, 2, 4), "table": RopeTable(normal(0, 1, length, 2), normal(1, 1, length, 2))}


def expert_inputs() -> dict[str, Any]:
    stacks = {"gate_up": normal(2, 4, 4, 6), "down": normal(3, 4, 3, 4)}
    return {"x": normal(0, 3, 4), "weights": normal(1, 3, 2), "experts": EXPERTS} | stacks


def plan() -> Dispatch:
    return arrays(dispatch_rows(EXPERTS, 4, multiple=2))


def slots() -> dict[str, Any]:
    return dict(zip(("slots", "tokens"), arrays(dispatch_slots(EXPERTS, 4, capacity=3))))


def probabilities(*shape: int) -> np.ndarray:
    p = np.exp(normal(0, *shape))
    return p / p.sum(-1, keepdims=True)


def draft_inputs() -> dict[str, Any]:
    """Two rows of three drafts over five tokens."""
    tokens = {"draft_tokens": int32(2, 3, high=5)}
    return {"key": KEY.numpy()} | tokens | {"draft_probs": probabilities(2, 3, 5), "target_probs": probabilities(2, 4, 5)}


def stored_teacher() -> TopK:
    return arrays(top_k_logprobs(normal(2, 5, 4), normal(3, 4, 7), k=3, temperature=0.7))


E4M3_VALUES = np.array([[1.0, -2.0, 448.0]] * 2, np.float32).astype(E4M3.as_numpy_dtype)

ROWS = np.array([3, 0, 2], np.int32)
HALVES = np.full((1, 1), 0.5, np.float32)


def fp8(seed: int, *shape: int, block: tuple[int, int] = (1, 128)) -> Fp8Tensor:
    return arrays(fp8_quantize(normal(seed, *shape), block=block))


def grouped(seed: int, *shape: int) -> Fp8Tensor:
    return arrays(fp8_quantize_groups(normal(seed, *shape), ROWS))


def quantized(seed: int, *shape: int, kind: str = "fp8", parts: int = 1) -> QuantizedWeight:
    return arrays(quantized_encode(normal(seed, *shape), kind=kind, parts=parts))


def quantized_expert_inputs() -> dict[str, Any]:
    stacks = {"gate_up": quantized(2, 4, 4, 6, parts=2), "down": quantized(3, 4, 3, 4)}
    return {"x": normal(0, 3, 4), "weights": normal(1, 3, 2), "experts": EXPERTS} | stacks


BITS = np.arange(0, 240, 7, dtype=np.uint8)

COMPRESSED = [
    Entry("dsv3.ops.fp8_bits.fp8_encode", lambda: {"x": normal(0, 3, 5, scale=100.0)}, any_shape=True),
    Entry("dsv3.ops.fp8_bits.fp8_decode", lambda: {"bits": BITS}, any_shape=True, unknown=("bits",)),
    Entry(
        "dsv3.ops.quantized.quantized_encode", lambda: {"weight": normal(0, 2, 130, 6)}, {"parts": 2},
        lambda: {"weight": normal(0, 5)},
    ),
    Entry(
        "dsv3.ops.quantized.quantized_decode", lambda: {"weight": quantized(0, 2, 130, 6, kind="int8")},
        wrong=lambda: {"weight": QuantizedWeight(BITS, HALVES)},
    ),
    Entry(
        "dsv3.ops.quantized.quantized_matmul", lambda: {"x": normal(0, 3, 130), "weight": quantized(1, 130, 6, parts=2)},
        {"strip": 400, "fuse": False},
        lambda: {"x": normal(0, 3, 129), "weight": quantized(1, 130, 6)._replace(scale_inv=np.zeros((1, 1, 1), np.float32))},
        unknown=("x",),
    ),
    Entry(
        "dsv3.ops.quantized_experts.quantized_experts", quantized_expert_inputs, {"multiple": 2, "fuse": False},
        lambda: {"x": normal(0, 3), "weights": normal(1, 2, 2)}, {"kernel": "blocks"},
    ),
    Entry("dsv3.ops.latent.latent_bytes", static={"latent": 6, "rope": 2}, python=True),
    Entry(
        "dsv3.ops.latent.latent_pack", lambda: {"entries": normal(0, 2, 3, 132)}, {"rope": 2},
        lambda: {"entries": normal(0, 3, 2)},
    ),
    Entry(
        "dsv3.ops.latent.latent_unpack", lambda: {"packed": latent_pack(normal(0, 2, 3, 132), rope=2).numpy()},
        {"latent": 130, "rope": 2, "dtype": "float32"}, lambda: {"packed": np.zeros((2, 3, 9), np.uint8)},
        unknown=("packed",),
    ),
]  # fmt: skip

OPS = [
    *COMPRESSED,
    Entry(
        "dsv3.ops.accumulator.tensor_core_matmul",
        lambda: {"a": int32(2, 3).astype(np.float32), "b": normal(1, 3, 4), "scale_a": HALVES, "scale_b": HALVES},
        wrong=lambda: {"a": normal(0, 3), "b": normal(1, 2, 4), "scale_a": normal(0, 2, 2), "scale_b": normal(0, 2, 1)},
        unknown=("a",),
    ),
    Entry(
        "dsv3.ops.activation.swiglu", lambda: {"gate_up": normal(0, 3, 8)}, wrong=lambda: {"gate_up": normal(0, 3, 7)},
        unknown=("gate_up",),
    ),
    Entry(
        "dsv3.ops.attention.attention", attention_inputs, {"scale": 0.4, "block": 2}, attention_wrong,
        unknown=("q", "k", "v"),
    ),
    Entry(
        "dsv3.ops.attention.attention_naive", attention_inputs, {"scale": 0.4}, attention_wrong,
        unknown=("q", "k", "v"),
    ),
    Entry(
        "dsv3.ops.attention.causal_mask", lambda: {"segments": int32(2, 5)}, {"length": 5}, lambda: {"segments": int32(5)},
        unknown=("segments",),
    ),
    Entry("dsv3.ops.dispatch.dispatch_size", static={"rows": 7, "num_experts": 3, "multiple": 4}, python=True),
    Entry(
        "dsv3.ops.dispatch.dispatch_rows", lambda: {"experts": EXPERTS}, {"num_experts": 4, "multiple": 2},
        lambda: {"experts": EXPERTS[0]},
    ),
    Entry("dsv3.ops.dispatch.dispatch_capacity", static={"load": 3, "tokens": 20}, python=True),
    Entry(
        "dsv3.ops.dispatch.dispatch_slots", lambda: {"experts": EXPERTS}, {"num_experts": 4, "capacity": 3},
        lambda: {"experts": EXPERTS[0]},
    ),
    Entry(
        "dsv3.ops.dispatch.dispatch_gather", lambda: {"x": normal(0, 3, 4), **slots()}, wrong=lambda: {"slots": EXPERTS[0]},
    ),
    Entry(
        "dsv3.ops.dispatch.dispatch_combine", lambda: {"buffer": normal(0, 12, 4), **slots()},
        wrong=lambda: {"tokens": EXPERTS},
    ),
    Entry(
        "dsv3.ops.dispatch.dispatch_nodes", lambda: {"experts": EXPERTS}, {"num_experts": 4, "nodes": 2},
        lambda: {"experts": EXPERTS[0]},
    ),
    Entry(
        "dsv3.ops.dispatch.gather_rows", lambda: {"x": normal(0, 3, 4), "tokens": plan().tokens},
        wrong=lambda: {"x": normal(0, 3), "tokens": plan().slots},
    ),
    Entry(
        "dsv3.ops.dispatch.combine_rows", lambda: {"buffer": normal(0, len(plan().tokens), 4), "slots": plan().slots},
        wrong=lambda: {"buffer": normal(0, 3), "slots": plan().tokens},
    ),
    Entry(
        "dsv3.ops.dispatch.scatter_weights", lambda: {"weights": normal(0, 3, 2), "slots": plan().slots}, {"size": 20},
        lambda: {"weights": normal(0, 3), "slots": plan().slots[:2]},
    ),
    Entry(
        "dsv3.ops.experts.experts_apply", expert_inputs, {"multiple": 2},
        lambda: {"x": normal(0, 3), "weights": normal(1, 2, 2), "down": normal(3, 4, 3, 5)}, {"kernel": "blocks"},
    ),
    Entry(
        "dsv3.ops.fp8.fp8_quantize", lambda: {"x": normal(0, 3, 5), "scale_inv": normal(1, 2, 3) ** 2}, {"block": (2, 2)},
        lambda: {"x": normal(0, 3), "scale_inv": normal(0, 2, 2)},
        unknown=("x",),
    ),
    Entry(
        "dsv3.ops.fp8.fp8_dequantize", lambda: {"values": E4M3_VALUES, "scale_inv": normal(0, 1, 2)}, {"block": (2, 2)},
        lambda: {"values": E4M3_VALUES[0], "scale_inv": normal(0, 2, 2)},
    ),
    Entry(
        "dsv3.ops.fp8.fp8_fake", lambda: {"x": normal(0, 3, 5)}, {"block": (2, 2)}, lambda: {"x": normal(0, 3)},
        unknown=("x",),
    ),
    Entry(
        "dsv3.ops.fp8_wire.fp8_pack", lambda: {"x": normal(0, 3, 5)}, wrong=lambda: {"x": normal(0, 3)}, unknown=("x",)
    ),
    Entry(
        "dsv3.ops.fp8_wire.fp8_unpack", lambda: {"packed": fp8_pack(normal(0, 3, 5)).numpy()}, {"width": 5},
        lambda: {"packed": normal(0, 3, 5)}, unknown=("packed",),
    ),
    Entry("dsv3.ops.fp8_wire.wire_width", static={"width": 300}, python=True),
    Entry(
        "dsv3.ops.fp8.fp8_retile", lambda: {"values": E4M3_VALUES, "scale_inv": normal(0, 1, 2) ** 2},
        {"block": (2, 2), "to": (1, 2)}, lambda: {"values": E4M3_VALUES[0], "scale_inv": normal(0, 2, 2)},
        unknown=("values",),
    ),
    Entry(
        "dsv3.ops.fp8.fp8_counts",
        lambda: {"x": 500 * normal(0, 2, 3), "quantized": Fp8Tensor(E4M3_VALUES, normal(0, 1, 2))}, {"block": (2, 2)},
        lambda: {"x": normal(0, 3, 3), "quantized": Fp8Tensor(E4M3_VALUES, normal(0, 2, 2))},
        unknown=("x",),
    ),
    Entry("dsv3.ops.fp8_formats.fp8_round", lambda: {"x": normal(0, 3, 5)}, {"fmt": "e5m6"}, any_shape=True),
    Entry(
        "dsv3.ops.gemm.fp8_gemm", lambda: {"a": fp8(0, 2, 3, 5), "b": fp8(1, 5, 4, block=(128, 128))},
        {"a_block": (1, 128), "b_block": (128, 128), "accumulate": "tensor_core"},
        lambda: {"b": fp8(1, 4, 4, block=(128, 128))},
        unknown=("a",),
    ),
    Entry(
        "dsv3.ops.gemm.fp8_fprop", lambda: {"x": fp8(0, 3, 5), "w": fp8(1, 5, 4, block=(128, 128))},
        wrong=lambda: {"x": fp8(0, 3, 5, block=(1, 2)), "w": fp8(1, 4, 4, block=(128, 128))},
        unknown=("x",),
    ),
    Entry(
        "dsv3.ops.gemm.fp8_dgrad", lambda: {"dy": fp8(0, 3, 4), "w": fp8(1, 5, 4, block=(128, 128))},
        wrong=lambda: {"dy": fp8(0, 3, 4, block=(1, 2)), "w": fp8(1, 5, 5, block=(128, 128))}, unknown=("dy",),
    ),
    Entry(
        "dsv3.ops.gemm.fp8_wgrad", lambda: {"x": fp8(0, 3, 5, block=(128, 1)), "dy": fp8(1, 3, 4, block=(128, 1))},
        wrong=lambda: {"x": fp8(0, 3, 5, block=(2, 1)), "dy": fp8(1, 2, 4, block=(128, 1))},
    ),
    Entry("dsv3.ops.gemm.fp8_transpose", lambda: {"x": fp8(0, 2, 3, 5)}, any_shape=True, unknown=("x",)),
    Entry(
        "dsv3.ops.gemm_grouped.fp8_grouped_gemm",
        lambda: {"a": fp8(0, 6, 5), "b": fp8(1, 3, 5, 4, block=(128, 128)), "rows": ROWS}, {},
        lambda: {"a": fp8(0, 1, 6, 5), "b": fp8(1, 3, 4, 4, block=(128, 128)), "rows": ROWS[:2]},
        {"kernel": "blocks", "multiple": 1},
    ),
    Entry(
        "dsv3.ops.gemm_grouped.fp8_quantize_groups", lambda: {"x": normal(0, 6, 5), "rows": ROWS},
        wrong=lambda: {"x": normal(0, 6), "rows": ROWS[None]},
    ),
    Entry(
        "dsv3.ops.gemm_grouped.fp8_grouped_wgrad",
        lambda: {"x": grouped(0, 6, 5), "dy": grouped(1, 6, 4), "rows": ROWS}, {},
        lambda: {"x": fp8(0, 6, 5), "dy": grouped(1, 7, 4), "rows": ROWS[None]}, {"kernel": "blocks"},
    ),
    Entry(
        "dsv3.ops.grouped.row_owner", lambda: {"ends": np.array([2, 2, 5], np.int32), "rows": np.arange(7, dtype=np.int32)},
        any_shape=True,
    ),
    Entry(
        "dsv3.ops.divergence.top_k_logprobs", lambda: {"hidden": normal(0, 5, 3), "head": normal(1, 3, 7)},
        {"k": 4, "chunk": 2, "temperature": 0.7}, lambda: {"hidden": normal(0, 5), "head": normal(1, 4, 7)},
        tolerance=1e-5,
    ),
    Entry(
        "dsv3.ops.divergence.divergence",
        lambda: {"hidden": normal(0, 5, 3), "head": normal(1, 3, 7), "teacher": stored_teacher()},
        {"kind": "jsd", "mix": 0.3, "chunk": 2, "temperature": 0.7},
        lambda: {"hidden": normal(0, 5), "head": normal(1, 4, 7), "teacher": stored_teacher()._replace(rest=normal(0, 4))},
        tolerance=1e-5,
    ),
    Entry(
        "dsv3.ops.loss.token_nll",
        lambda: {"hidden": normal(0, 5, 3), "head": normal(1, 3, 7), "targets": int32(5, high=7)}, {"chunk": 2},
        lambda: {"hidden": normal(0, 5), "head": normal(1, 4, 7), "targets": int32(4)},
        tolerance=1e-5,
    ),
    Entry(
        "dsv3.ops.loss.target_logprobs",
        lambda: {"hidden": normal(0, 5, 3), "head": normal(1, 3, 7), "targets": int32(5, high=7)},
        {"chunk": 2, "temperature": 0.7},
        lambda: {"hidden": normal(0, 5), "head": normal(1, 4, 7), "targets": int32(4)},
        tolerance=1e-5,
    ),
    Entry(
        "dsv3.ops.norm.rms_norm", lambda: {"x": normal(0, 2, 8), "weight": normal(1, 8)},
        wrong=lambda: {"x": np.float32(1.0), "weight": normal(1, 7)},
        unknown=("x",),
    ),
    Entry(
        "dsv3.ops.random.threefry", lambda: {"key": np.array([1, 2], np.uint32), "counter": np.ones([3, 2], np.uint32)},
        any_shape=True,
    ),
    Entry("dsv3.ops.random.key_fold", lambda: {"key": KEY.numpy(), "data": int32(3)}, wrong=lambda: {"key": int32(3)}),
    Entry("dsv3.ops.random.uniform_draw", lambda: {"key": int32(3, 2)}, {"count": 4}, lambda: {"key": int32(2, 3)}),
    Entry("dsv3.ops.reduce.halving_max", lambda: {"x": normal(0, 3, 64)}, {"dim": -1}, any_shape=True),
    Entry("dsv3.ops.reduce.dim_max", lambda: {"x": normal(0, 3, 64)}, {"dim": -2}, any_shape=True),
    Entry("dsv3.ops.reduce.turned", lambda: {"bits": np.array([3, -2], np.int32)}, any_shape=True),
    Entry("dsv3.ops.reduce.row_max", lambda: {"x": normal(0, 3, 64)}, any_shape=True),
    Entry("dsv3.ops.reduce.row_sum", lambda: {"x": normal(0, 3, 64)}, any_shape=True),
    Entry("dsv3.ops.softmax.row_softmax", lambda: {"x": normal(0, 3, 7)}, any_shape=True),
    Entry("dsv3.ops.softmax.kernel_is_float32", static={"dtype": "bfloat16"}, python=True),
    Entry("dsv3.ops.rope.yarn_mscale", static={"factor": 40.0}, python=True),
    Entry("dsv3.ops.rope.yarn_range", static={"dim": 64, "theta": 1e4, "original_length": 4096}, python=True),
    Entry("dsv3.ops.rope.rope_frequencies", static={"dim": 8, "factor": 4.0}, python=True),
    Entry(
        "dsv3.ops.rope.rope_table", lambda: {"positions": int32(2, 3, high=9), "frequencies": normal(0, 2)},
        wrong=lambda: {"positions": int32(2, 3, 1), "frequencies": normal(0, 2, 2)},
        unknown=("positions",),
    ),
    Entry(
        "dsv3.ops.rope.rope_apply", lambda: rope_inputs(3),
        wrong=lambda: {"x": normal(0, 2, 3, 6), "table": rope_inputs(2)["table"]},
        unknown=("x",),
    ),
    Entry(
        "dsv3.ops.router.router_scores", lambda: {"x": normal(0, 3, 4), "weight": normal(1, 4, 8)},
        wrong=lambda: {"x": normal(0, 3), "weight": normal(1, 3, 8)},
        unknown=("x",),
    ),
    Entry(
        "dsv3.ops.router.router_select", lambda: {"scores": SCORES, "bias": normal(0, 8)},
        {"top_k": 3, "num_groups": 4, "groups_kept": 2}, lambda: {"scores": SCORES[0], "bias": normal(0, 7)},
        unknown=("scores",),
    ),
    Entry(
        "dsv3.ops.router.take_experts", lambda: {"values": SCORES, "experts": EXPERTS},
        wrong=lambda: {"values": SCORES[0], "experts": EXPERTS[:2]},
        unknown=("values", "experts"),
    ),
    Entry(
        "dsv3.ops.router.router_weights", lambda: {"scores": SCORES, "experts": EXPERTS},
        {"scale": 2.5}, lambda: {"scores": SCORES[0], "experts": EXPERTS[:2]},
        unknown=("scores", "experts"),
    ),
    Entry(
        "dsv3.ops.router.expert_load", lambda: {"experts": EXPERTS, "mask": np.array([True, False, True])},
        {"num_experts": 4}, lambda: {"experts": EXPERTS[0], "mask": np.array([True, False])},
        unknown=("experts", "mask"),
    ),
    Entry(
        "dsv3.ops.router.router_update_bias", lambda: {"bias": normal(0, 2, 3), "load": int32(2, 3).astype(np.float32)},
        {"rate": 0.5}, lambda: {"load": normal(0, 2, 4)},
    ),
    Entry(
        "dsv3.ops.router.sequence_balance_loss",
        lambda: {"scores": SCORES[None], "mask": np.array([[True, False, True]]), "segments": int32(1, 3)}, {"top_k": 2},
        lambda: {"scores": SCORES, "mask": np.array([[True, False]]), "segments": int32(3)},
        unknown=("scores", "mask", "segments"),
    ),
    *(
        Entry(f"dsv3.ops.segments.{name}", lambda: {"segments": int32(2, 6)}, wrong=lambda: {"segments": int32(6)},
              unknown=("segments",))
        for name in ("segment_inputs", "segment_positions", "segment_runs")
    ),
    Entry(
        "dsv3.ops.segments.segment_count", lambda: {"inside": int32(2, 6, high=2) > 0},
        wrong=lambda: {"inside": int32(6, high=2) > 0}, unknown=("inside",),
    ),
    Entry(
        "dsv3.ops.sampling.sampling_probs", lambda: {"logits": normal(0, 2, 9)},
        {"temperature": 0.7, "top_k": 4, "top_p": 0.8}, lambda: {"logits": normal(0, 9)},
        unknown=("logits",),
    ),
    Entry(
        "dsv3.ops.sampling.sample", lambda: {"key": KEY.numpy(), "probs": probabilities(2, 5)},
        wrong=lambda: {"key": int32(3, 2), "probs": probabilities(5)},
    ),
    Entry(
        "dsv3.ops.sampling.speculative_accept", draft_inputs,
        wrong=lambda: {"key": int32(3, 2), "draft_probs": probabilities(2, 2, 5), "target_probs": probabilities(2, 3, 5)},
    ),
    Entry(
        "dsv3.ops.sampling.greedy_accept", lambda: {"draft_tokens": int32(2, 3), "target_tokens": int32(2, 4)},
        wrong=lambda: {"draft_tokens": int32(3), "target_tokens": int32(2, 3)},
    ),
]  # fmt: skip
