"""transformers' DeepseekV3, its MTP modules included, with parameters of dsv3: what the parity suite compares with.

A parameter goes by two names: its path in dsv3's tree (`moe.mla.q_b`, all layers stacked) and the names of transformers'
tensors (`model.layers.1.self_attn.q_b_proj.weight`, one a layer). `params_to_hf` and `params_from_hf` map one to the other;
as both only cut, join and transpose, the second also maps gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dsv3 import ModelConfig, ModelParams, RouterState, model_specs, tree

# Path within a block (or an MTP module) → names behind the layer's prefix. Two names: the leaf is gate and up side by side.
_BLOCK = {
    "attn_norm": ("input_layernorm.weight",),
    "ffn_norm": ("post_attention_layernorm.weight",),
    "mla.q_a": ("self_attn.q_a_proj.weight",),
    "mla.q_norm": ("self_attn.q_a_layernorm.weight",),
    "mla.q_b": ("self_attn.q_b_proj.weight",),
    "mla.kv_a": ("self_attn.kv_a_proj_with_mqa.weight",),
    "mla.kv_norm": ("self_attn.kv_a_layernorm.weight",),
    "mla.kv_b": ("self_attn.kv_b_proj.weight",),
    "mla.o": ("self_attn.o_proj.weight",),
    "mla.q_a_bias": ("self_attn.q_a_proj.bias",),
    "mla.kv_a_bias": ("self_attn.kv_a_proj_with_mqa.bias",),
    "mla.o_bias": ("self_attn.o_proj.bias",),
    "ffn.router": ("mlp.gate.weight",),
    "ffn.shared.gate_up": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn.shared.down": ("mlp.shared_experts.down_proj.weight",),
}
_DENSE = {"ffn.gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "ffn.down": ("mlp.down_proj.weight",)}
_MOE = {"ffn.gate_up": ("mlp.experts.gate_up_proj",), "ffn.down": ("mlp.experts.down_proj",)}
_MTP = {
    "embed_norm": ("enorm.weight",),
    "hidden_norm": ("hnorm.weight",),
    "proj": ("eh_proj.weight",),
    "norm": ("post_norm.weight",),
}
_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def hf_names(cfg: ModelConfig, path: str) -> list[tuple[str, ...]]:
    """Returns the names of transformers' tensors that a leaf holds: one tuple for each layer of its stack.

    MTP modules are no part of `DeepseekV3ForCausalLM`: their names are those of `MtpModel` behind `mtp.`.
    """
    stack, _, rest = path.partition(".")
    if not rest:
        return [(_TOP[path],)]
    if stack == "mtp" and rest in _MTP:
        return [tuple(f"mtp.layers.{k}.{name}" for name in _MTP[rest]) for k in range(cfg.num_mtp_layers)]
    first, count, inner = {
        "dense": (0, cfg.num_dense_layers, ""),
        "moe": (cfg.num_dense_layers, cfg.num_moe_layers, ""),
        "mtp": (0, cfg.num_mtp_layers, "mtp_block."),
    }[stack]
    prefix = "mtp.layers" if stack == "mtp" else "model.layers"
    names = {**_BLOCK, **(_DENSE if stack == "dense" else _MOE)}[rest.removeprefix("block.")]
    if rest.endswith("mla.q_b") and cfg.mla.q_latent is None:
        names = ("self_attn.q_proj.weight",)
    return [tuple(f"{prefix}.{i}.{inner}{name}" for name in names) for i in range(first, first + count)]


def params_to_hf(cfg: ModelConfig, params: ModelParams) -> dict[str, np.ndarray]:
    """Returns dsv3's parameters under transformers' names, cut and transposed as it stores them."""
    out = {}
    for path, leaf in tree.items(params):
        leaf = np.asarray(leaf)
        layers = leaf if "." in path else leaf[None]
        for names, value in zip(hf_names(cfg, path), layers):
            for name, part in zip(names, np.split(value, len(names), -1)):
                out[name] = _to_hf(path, part)
    return out


def params_from_hf(cfg: ModelConfig, named: Mapping[str, np.ndarray]) -> ModelParams:
    """Returns what `params_to_hf` got: values or gradients under transformers' names as a tree of arrays."""

    def leaf(path: str, spec) -> np.ndarray:
        shape = spec.shape[1:] if "." in path else spec.shape
        layers = []
        for names in hf_names(cfg, path):
            half = (*shape[:-1], shape[-1] // len(names))
            layers.append(np.concatenate([_from_hf(path, named[name], half) for name in names], -1))
        return np.stack(layers) if "." in path else layers[0]

    return tree.map_with_path(leaf, model_specs(cfg))


def _is_table(path: str) -> bool:
    """Whether both sides store it alike: vectors, and the embedding."""
    last = path.rsplit(".", 1)[-1]
    return last == "embed" or last.endswith(("norm", "bias"))


def _to_hf(path: str, value: np.ndarray) -> np.ndarray:
    if _is_table(path):
        return value
    if path.split(".")[-2:] in (["ffn", "gate_up"], ["ffn", "down"]) and value.ndim == 3:
        return value.transpose(0, 2, 1)
    outputs = value.shape[-1] if path.endswith("mla.o") else value[0].size
    return value.reshape(-1, outputs).T


def _from_hf(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if _is_table(path):
        return value
    return value.transpose(0, 2, 1) if value.ndim == 3 else value.T.reshape(shape)


def draw_params(cfg: ModelConfig, seed: int) -> tuple[ModelParams, RouterState]:
    """Draws float32 parameters and selection biases that make every part matter: no weight is near zero or one.

    Matrices have variance 1 / inputs, norms 1 ± 0.2, biases ± 0.2, selection biases ± 0.3.
    """
    rng = np.random.default_rng(seed)

    def draw(path: str, spec) -> np.ndarray:
        normal = rng.standard_normal(spec.shape)
        if path.endswith("norm"):
            value = 1 + 0.2 * normal
        elif path.endswith("bias"):
            value = 0.2 * normal
        else:
            ins = spec.shape[-3] * spec.shape[-2] if path.endswith("mla.o") else spec.shape[-2]
            ins = spec.shape[-3] if path.endswith(("mla.q_b", "mla.kv_b")) else ins
            value = normal if path == "embed" else normal / np.sqrt(ins)
        return value.astype(np.float32)

    params = tree.map_with_path(draw, model_specs(cfg))
    shapes = (cfg.num_moe_layers, cfg.moe.router.num_experts), (cfg.num_mtp_layers, cfg.moe.router.num_experts)
    return params, RouterState(*(0.3 * rng.standard_normal(shape).astype(np.float32) for shape in shapes))


def round_bfloat16(params: ModelParams) -> ModelParams:
    """Rounds all values to bfloat16 (as float32 arrays), so that both dtypes can start from the same numbers."""
    return tree.map_leaves(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), params)


class Reference(NamedTuple):
    """`model`: DeepseekV3ForCausalLM. `mtp`: its MtpModel, or `None` where the config has no MTP module."""

    model: DeepseekV3ForCausalLM
    mtp: MtpModel | None

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields each parameter once, under the names of `hf_names`."""
        yield from self.model.named_parameters()
        for name, value in self.mtp.named_parameters() if self.mtp is not None else ():
            if not name.startswith(("embed_tokens", "shared_head")):
                yield f"mtp.{name}", value

    def gates(self) -> list[torch.nn.Module]:
        """Returns the routers: those of the model's mixture layers, then those of the MTP modules."""
        blocks = [*self.model.model.layers, *(layer.mtp_block for layer in (self.mtp.layers if self.mtp else ()))]
        return [block.mlp.gate for block in blocks if hasattr(block.mlp, "gate")]


def build(
    settings: Mapping[str, Any],
    params: ModelParams,
    router: RouterState,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
) -> Reference:
    """Builds transformers' model from the contents of a `config.json` and gives it dsv3's parameters.

    Args:
      settings: a `config.json`, as `ModelConfig.from_hf` takes it.
      params, router: arrays or tensors.
      dtype: of the model; the selection biases stay float32, as transformers keeps them.
      attention: transformers' implementation of attention.
    """
    cfg = ModelConfig.from_hf(settings)
    config = DeepseekV3Config(**copy.deepcopy(dict(settings)))
    config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation=attention)
    mtp = MtpModel(model, cfg.num_mtp_layers) if cfg.num_mtp_layers else None
    reference = Reference(model.eval().to(dtype), mtp.eval().to(dtype) if mtp is not None else None)
    for gate in reference.gates():
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    load(cfg, reference, params, router)
    return reference


def load(cfg: ModelConfig, reference: Reference, params: ModelParams, router: RouterState) -> None:
    """Copies parameters and selection biases; refuses a name or a shape that does not fit, or a parameter left out."""
    values = params_to_hf(cfg, params)
    want = {name: p for name, p in reference.named_parameters() if p.numel()}
    if set(values) != set(want):
        raise ValueError(f"load: names differ: {sorted(set(values) ^ set(want))}")
    with torch.no_grad():
        for name, p in want.items():
            if tuple(p.shape) != values[name].shape:
                raise ValueError(f"load: `{name}` has shape {values[name].shape}, want {tuple(p.shape)}")
            p.copy_(torch.from_numpy(np.ascontiguousarray(values[name])))
        biases = [*np.asarray(router.moe), *np.asarray(router.mtp)]
        for gate, bias in zip(reference.gates(), biases, strict=True):
            gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
