"""Every public function with example inputs. `tests/test_contracts.py` runs the contracts over it.

Public is what `dsv3.__all__` names, and what the modules of `dsv3.ops` define without a leading underscore. A new public
function needs an `Entry` here or, for ops, in `tests/catalogue_ops.py`; else the completeness test fails.
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import pkgutil
import tempfile
from typing import Any

import numpy as np

import dsv3
import dsv3.ops
from dsv3.nn.mla import LayerCache
from tests.catalogue_entry import Entry, arrays, name_of
from tests.catalogue_ops import OPS, int32
from tests.compare import PLAIN, XLA, normal
from tests.small import KEY, mla_config, model_config, moe_config, random_params, random_router, random_tokens

# Public functions without an entry, and why.
EXEMPT = {
    "dsv3.ops.activation.swiglu_float32": "`swiglu` before it is rounded, tested through it",
    "dsv3.ops.activation.swiglu_grad_float32": "its gradient, tested through `swiglu` and `experts_apply`",
    "dsv3.ops.attention.allowed": "the mask of the attention functions as booleans, tested through them",
    "dsv3.ops.attention.check_attention": "the shape checks of the attention functions, tested through them",
    "dsv3.ops.attention_blocks.apply": "a kernel of `attention`, tested through it",
    "dsv3.ops.attention_past.attention_past": "takes a function; see tests/ops/test_attention_past.py",
    "dsv3.ops.attention_tiles.apply": "a kernel of `attention`, tested through it",
    "dsv3.ops.attention_tiles.tile_update": "a step of that kernel and of `attention_past`, tested through them",
    "dsv3.ops.chunks.in_chunks": "takes functions; tested through `token_nll`, `target_logprobs` and `divergence`",
    "dsv3.ops.fp8_bits.fp8_to_bits": "`fp8_encode` of float8 values, tested through packed rows, entries and weights",
    "dsv3.ops.fp8_bits.from_bytes": "a reshaped bitcast, tested through the same",
    "dsv3.ops.fp8_bits.to_bytes": "its inverse, tested through the same",
    "dsv3.ops.experts.check_experts": "the shape checks of the mixtures, tested through them",
    "dsv3.ops.experts.weighted_swiglu": "the activation of `experts_apply` and `fp8_experts`, tested through them",
    "dsv3.ops.experts.weighted_swiglu_grad": "its gradient, tested through the same",
    "dsv3.ops.fp8_tiles.block_scale": "a part of `fp8_quantize` and `fp8_fake`, tested through them",
    "dsv3.ops.fp8_tiles.check_block": "an argument's check in `ops.fp8`, tested through it",
    "dsv3.ops.fp8_tiles.check_matrix": "the same",
    "dsv3.ops.fp8_tiles.check_scales": "the same",
    "dsv3.ops.fp8_tiles.spread": "a part of what `ops.fp8` does, tested through it",
    "dsv3.ops.fp8_tiles.tile": "the same",
    "dsv3.ops.fp8_tiles.untile": "the same",
    "dsv3.ops.accumulator.check_accumulator": "checks of the FP8 products, tested through them",
    "dsv3.ops.fp8_bits.half_bits": "`fp8_decode` before the scale, tested through it and `quantized_decode`",
    "dsv3.ops.quantized.check_quantized": "checks of the quantised products, tested through them",
    "dsv3.ops.quantized.column_scales": "a part of `quantized_decode` and `mla_absorb`, tested through them",
    "dsv3.ops.gemm.fp8_expand": "the operands of `fp8_gemm` in float32, tested through it",
    "dsv3.ops.gemm.fp8_operand": "checks of the FP8 products, tested through them",
    "dsv3.ops.grouped.grouped_matmul": "the products of `experts_apply` and `fp8_grouped_gemm`, tested through them",
    "dsv3.ops.grouped.grouped_outer": "those of the weights' gradients, tested through the same",
    "dsv3.ops.grouped.grouped_split": "what these take apart, tested through them",
    "dsv3.ops.float8_dot.float8_matmul": "the products of `fp8_gemm` with operands='float8', tested through it",
    "dsv3.ops.topk.place_keys": "the choice of `router_select`; see tests/ops/test_topk.py",
    "dsv3.ops.topk.best_keys": "the same",
    "dsv3.ops.topk.key_places": "the same",
    "dsv3.ops.topk.key_values": "the same",
    "dsv3.ops.topk.many_rows": "the same",
    "dsv3.ops.segments.segment_places": "what `segment_positions` and the balance loss add up over, tested through them",
    "dsv3.ops.products.matmul_linear": "see tests/ops/test_products.py",
    "dsv3.ops.products.matmul_transposed": "see tests/ops/test_products.py",
    "dsv3.ops.fuse.fused": "a decorator, see tests/ops/test_fuse.py",
    "dsv3.ops.reduce.row_parts": "returns a list; see tests/ops/test_fuse.py",
    "dsv3.ops.reduce.cpu_kernel": "a context manager, see tests/ops/test_fuse.py",
    "dsv3.layout.make_layouts": "layouts of a mesh, see tests/test_layout.py",
    "dsv3.layout.zero_layouts": "the same, see tests/train/test_mesh_step.py",
    "dsv3.parallel.mesh.make_mesh": "devices, see tests/parallel/test_mesh.py",
    "dsv3.parallel.mesh.start_devices": "devices, see tests/parallel/test_mesh.py",
    "dsv3.train.step.gather_state": "DTensors, see tests/train/test_mesh_step.py",
    "dsv3.train.step.place_state": "DTensors, see tests/train/test_mesh_step.py",
}

DRAWS = "TensorFlow's generators give other numbers inside XLA (tests/test_facts.py): parameters are drawn outside"


def public_functions() -> set[str]:
    """Returns the names of all public functions, by the rule of this module's docstring."""
    found = {name_of(v) for v in (getattr(dsv3, n) for n in dsv3.__all__) if callable(v) and not inspect.isclass(v)}
    for info in pkgutil.iter_modules(dsv3.ops.__path__, "dsv3.ops."):
        module = importlib.import_module(info.name)
        members = {v for n, v in vars(module).items() if not n.startswith("_") and inspect.isroutine(v)}
        found |= {name_of(fn) for fn in members if fn.__module__ == info.name}
    return found


# Layers and the model

MLA, MOE = mla_config(), moe_config()
# Two mixtures and one module are the least in which every part has its place.
CFG = model_config(first_k_dense_replace=1, num_hidden_layers=2, num_nextn_predict_layers=1)
ROUTED = {"policy": XLA}


def mla_inputs() -> dict[str, Any]:
    cache = LayerCache(normal(2, 2, 4, MLA.cache_width), np.array([1, 4], np.int32))
    return {"params": arrays(random_params(dsv3.mla_specs(MLA, std=0.1))), "x": normal(0, 2, 3, 8), "cache": cache}


def moe_inputs() -> dict[str, Any]:
    params = arrays(random_params(dsv3.moe_specs(MOE, std=0.1)))
    return {"params": params, "bias": normal(0, 8, scale=0.1), "x": normal(1, 2, 3, 8), "mask": int32(2, 3, high=2) > 0}


def model_params(cfg: dsv3.ModelConfig) -> dsv3.ModelParams:
    return random_params(dsv3.model_specs(cfg))


def model_inputs(cfg: dsv3.ModelConfig = CFG) -> dict[str, Any]:
    return {"params": arrays(model_params(cfg)), "router": arrays(random_router(cfg))}


def chain_inputs() -> dict[str, Any]:
    tokens = random_tokens(CFG, 2, 4)
    output = dsv3.model_apply(**model_inputs(), tokens=tokens[:, :-1], cfg=CFG, policy=PLAIN)
    return model_inputs() | {"output": arrays(output), "next_tokens": tokens[:, 1:]}


def cache_inputs() -> dict[str, Any]:
    cache = dsv3.Cache(normal(0, 2, 2, 5, 8), np.array([0, 3], np.int32))
    return {"cache": cache, "entries": normal(1, 2, 2, 2, 8), "counts": np.array([1, 2], np.int32)}


def quantized_inputs() -> dict[str, Any]:
    return {"params": arrays(dsv3.quantize_params(model_params(TRAINED), TRAINED, fuse=False))}


# One mixture alone: the smallest model with a router, as its step is compiled with XLA.
TRAINED = model_config(
    num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, n_routed_experts=4, n_group=1, topk_group=1
)

MODEL = [
    Entry("dsv3.nn.mla.mla_specs", static={"cfg": MLA, "std": 0.1}, python=True),
    Entry(
        "dsv3.nn.mla.mla_apply", mla_inputs, {"cfg": MLA, "policy": PLAIN},
        lambda: {"x": normal(0, 2, 3, 7), "cache": mla_inputs()["cache"]._replace(length=np.zeros(3, np.int32))},
        unknown=("x", "cache"),
    ),
    Entry("dsv3.nn.moe.moe_specs", static={"cfg": MOE, "std": 0.1}, python=True),
    Entry(
        "dsv3.nn.moe.moe_apply", moe_inputs, {"cfg": MOE, "policy": PLAIN},
        lambda: {"bias": normal(0, 7), "x": normal(1, 2, 8), "mask": int32(2, 2) > 0}, ROUTED,
    ),
    Entry("dsv3.nn.model.model_specs", static={"cfg": CFG}, python=True),
    Entry("dsv3.nn.model.active_params", static={"cfg": CFG}, python=True),
    Entry("dsv3.nn.model.router_init", static={"cfg": CFG}, python=True),
    Entry("dsv3.nn.model.model_init", lambda: {"key": KEY.numpy()}, {"cfg": CFG}, any_shape=True, no_xla=DRAWS),
    Entry(
        "dsv3.nn.model.model_apply", lambda: model_inputs() | {"tokens": random_tokens(CFG, 2, 4)},
        {"cfg": CFG, "policy": PLAIN}, lambda: {"tokens": random_tokens(CFG, 2, 4)[0]}, ROUTED, tolerance=1e-5,
    ),
    Entry(
        "dsv3.nn.model.mtp_chain", chain_inputs, {"cfg": CFG, "policy": PLAIN},
        lambda: {"next_tokens": random_tokens(CFG, 2, 2)}, ROUTED, tolerance=1e-5,
    ),
    Entry(
        "dsv3.nn.quantized.quantize_params", lambda: {"params": arrays(model_params(TRAINED))},
        {"cfg": TRAINED, "fuse": False}, any_shape=True,
    ),
    Entry(
        "dsv3.nn.quantized.dequantize_params", quantized_inputs, {"cfg": TRAINED, "dtype": "float32", "fuse": False},
        any_shape=True,
    ),
    Entry("dsv3.nn.model.output_specs", static={"cfg": CFG, "batch": 2, "length": 3}, python=True),
    Entry("dsv3.nn.cache.cache_specs", static={"cfg": CFG, "batch": 2, "size": 3}, python=True),
    Entry("dsv3.nn.cache.cache_init", static={"cfg": CFG, "batch": 2, "size": 3}, python=True),
    Entry(
        "dsv3.nn.cache.cache_append", cache_inputs,
        wrong=lambda: {"entries": normal(1, 2, 2, 2, 7), "counts": np.array([1], np.int32)},
    ),
]  # fmt: skip

# Training

OPTIMIZER = dsv3.adamw(0.1, fuse=False)


def trained_inputs() -> dict[str, Any]:
    return model_inputs(TRAINED) | {"tokens": random_tokens(TRAINED, 2, 4), "weights": np.ones([2, 3], np.float32)}


def state_inputs() -> dict[str, Any]:
    return {name: value for name, value in model_inputs(TRAINED).items() if name in ("params", "router")}


def update_inputs() -> dict[str, Any]:
    state = arrays(dsv3.train_state(**state_inputs(), optimizer=OPTIMIZER))
    return {"state": state, "tokens": random_tokens(TRAINED, 2, 4)}


TRAIN = [
    Entry(
        "dsv3.train.loss.pretrain_loss", trained_inputs, {"cfg": TRAINED, "policy": PLAIN},
        lambda: {"tokens": random_tokens(TRAINED, 2, 4)[0], "weights": np.ones([2, 4], np.float32)}, ROUTED,
    ),
    Entry("dsv3.train.distill.make_distill_step", static={"cfg": TRAINED, "optimizer": OPTIMIZER}, python=True),
    Entry("dsv3.train.optim.adamw", static={"learning_rate": 0.1}, python=True),
    Entry("dsv3.train.step.make_train_step", static={"cfg": TRAINED, "optimizer": OPTIMIZER}, python=True),
    Entry(
        "dsv3.train.step.train_init", lambda: {"key": KEY.numpy()}, {"cfg": TRAINED, "optimizer": OPTIMIZER},
        any_shape=True, no_xla=DRAWS,
    ),
    Entry("dsv3.train.step.train_state", state_inputs, {"optimizer": OPTIMIZER}, any_shape=True),
    Entry(
        "dsv3.train.step.train_update", update_inputs, {"cfg": TRAINED, "optimizer": OPTIMIZER, "policy": PLAIN},
        lambda: {"tokens": random_tokens(TRAINED, 2, 4)[0]}, ROUTED, tolerance=1e-4,
    ),
]  # fmt: skip

# Reinforcement learning


def grpo_inputs() -> dict[str, Any]:
    names = ("logprobs", "old_logprobs", "ref_logprobs")
    tokens = {name: normal(seed, 3, 4, scale=0.3) for seed, name in enumerate(names)}
    return tokens | {"advantages": normal(3, 3), "mask": np.ones([3, 4], np.float32)}


RL = [
    Entry(
        "dsv3.rl.advantage.group_advantages", lambda: {"rewards": normal(0, 3, 4)},
        wrong=lambda: {"rewards": normal(0, 3)}, unknown=("rewards",),
    ),
    Entry(
        "dsv3.rl.grpo.grpo_loss", grpo_inputs, {"kl_weight": 0.1},
        lambda: {"old_logprobs": normal(1, 3, 5), "advantages": normal(3, 4), "mask": np.ones([3, 5], np.float32)},
        unknown=("logprobs", "old_logprobs", "ref_logprobs", "advantages", "mask"),
    ),
    Entry("dsv3.rl.step.make_grpo_step", static={"cfg": TRAINED, "optimizer": OPTIMIZER}, python=True),
]  # fmt: skip

# The rest


FILES = tempfile.TemporaryDirectory(prefix="dsv3-")  # gone when the tests end


def save_arguments() -> dict[str, Any]:
    directory = pathlib.Path(tempfile.mkdtemp(dir=FILES.name)) / "model"
    return {"directory": directory, "cfg": CFG, "params": model_params(CFG), "router": random_router(CFG)}


def load_arguments() -> dict[str, Any]:
    saved = save_arguments()
    dsv3.save_pretrained(**saved)
    return {"directory": saved["directory"], "dtype": "float32"}


SPECS = {"a": dsv3.ParamSpec((2, 3), ("x", "y")), "b": dsv3.ParamSpec((3,), ("y",), init="ones")}

OTHERS = [
    Entry("dsv3.policy.default_policy", static={"device": "CPU"}, python=True),
    Entry("dsv3.pretrained.load_pretrained", static=load_arguments, python=True),
    Entry("dsv3.pretrained.save_pretrained", static=save_arguments, python=True),
    Entry("dsv3.presets.preset", static={"name": "tiny"}, python=True),
    Entry("dsv3.spec.count_params", static={"specs": SPECS}, python=True),
    Entry("dsv3.spec.init_params", lambda: {"key": KEY.numpy()}, {"specs": SPECS}, lambda: {"key": int32(3)}, no_xla=DRAWS),
]

CATALOGUE = [*OPS, *MODEL, *TRAIN, *RL, *OTHERS]
