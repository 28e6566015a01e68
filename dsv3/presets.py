"""Named configurations: the published model, the paper's ablation proportions at laptop size, and the benchmark's."""

from __future__ import annotations

import functools
from typing import Any

from dsv3.checks import check_choice
from dsv3.config import ModelConfig

_YARN_40 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "intermediate_size": 18_432,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163_840,
    "rope_theta": 10_000,
    "rope_scaling": _YARN_40,
    "initializer_range": 0.006,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _smaller(**fields: Any) -> dict[str, Any]:
    return {**_DEEPSEEK_V3, "rope_scaling": None, "initializer_range": 0.02, **fields}


_PRESETS: dict[str, dict[str, Any]] = {
    # The published checkpoint: 128K context by YaRN.
    "deepseek-v3": _DEEPSEEK_V3,
    # The model of the pretraining phase: 4K context, plain RoPE (paper section 4.2).
    "deepseek-v3-pretrain": {**_DEEPSEEK_V3, "rope_scaling": None, "max_position_embeddings": 4096},
    # For tests and doctests: every part is there, nothing is larger than it must be.
    "tiny": _smaller(
        vocab_size=256, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
        num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_group=4, topk_group=2,
        max_position_embeddings=128,
    ),
    # Narrow enough for thousands of steps in minutes and for contexts of thousands of tokens (`examples/extend_context.py`).
    "narrow": _smaller(
        vocab_size=1024, hidden_size=96, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=192,
        num_attention_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, n_group=4, topk_group=2,
        max_position_embeddings=1024, initializer_range=0.03,
    ),
    # What `examples/pretrain.py` trains in minutes on two cores.
    "demo": _smaller(
        vocab_size=4096, hidden_size=192, num_hidden_layers=5, first_k_dense_replace=1, intermediate_size=512,
        num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=96, n_group=4, topk_group=2,
        max_position_embeddings=1024,
    ),
    # A model worth a night on a laptop.
    "small": _smaller(
        vocab_size=8192, hidden_size=512, num_hidden_layers=12, first_k_dense_replace=1, intermediate_size=1408,
        num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=192, n_group=8, topk_group=4,
        max_position_embeddings=4096,
    ),
    # The configuration of the benchmark (`make bench`).
    "bench": _smaller(
        vocab_size=8192, hidden_size=512, num_hidden_layers=8, first_k_dense_replace=1, intermediate_size=1024,
        num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=256, n_group=4, topk_group=2,
        num_nextn_predict_layers=0, max_position_embeddings=131_072,
    ),
}  # fmt: skip

PRESETS = tuple(_PRESETS)


@functools.cache
def preset(name: str) -> ModelConfig:
    """Returns a configuration by name: one of `PRESETS`.

    >>> preset("deepseek-v3").mla.cache_width
    576
    """
    check_choice("preset", "name", name, PRESETS)
    return ModelConfig.from_hf(_PRESETS[name])
