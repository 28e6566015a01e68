"""The models that the parity suite compares: small, and each unlike the others in what its name says."""

from __future__ import annotations

from typing import Any, NamedTuple

from dsv3 import ModelConfig


class Case(NamedTuple):
    """`settings`: a `config.json`, read by dsv3 and by transformers. `shape`: (B, T) of the tokens. `seed`: of all draws."""

    name: str
    settings: dict[str, Any]
    shape: tuple[int, int]
    seed: int

    @property
    def cfg(self) -> ModelConfig:
        """What dsv3 reads from the settings."""
        return ModelConfig.from_hf(self.settings)


_BASE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
}

# The published spelling. With a context of 64 tokens before stretching, the ramp lies inside the four frequencies.
_YARN_OLD = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# The spelling of transformers 5, with unequal mscales: cos and sin are scaled too.
_YARN_NEW = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
_YARN_BARE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}

_ODD = {
    "vocab_size": 101,
    "hidden_size": 27,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "n_routed_experts": 9,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 7,
    "intermediate_size": 19,
    "rms_norm_eps": 1e-5,
}


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in _BASE.items() if name not in names}


CASES = [
    Case("as published, small", _BASE, (2, 17), 1),
    Case("no query compression", {**_BASE, "q_lora_rank": None}, (3, 9), 2),
    Case("one group of experts", {**_BASE, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}, (2, 12), 3),
    Case("three shared experts", {**_BASE, "n_shared_experts": 3}, (2, 11), 4),
    Case("no shared expert", {**_BASE, "n_shared_experts": 0}, (2, 11), 5),
    Case("unequal head dims", {**_BASE, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 20}, (2, 10), 6),
    Case("biases in attention", {**_BASE, "attention_bias": True}, (2, 10), 7),
    Case("YaRN, rope_scaling", {**_BASE, "rope_scaling": _YARN_OLD}, (2, 33), 8),
    Case("YaRN, rope_parameters", {**_without("rope_theta", "rope_scaling"), "rope_parameters": _YARN_NEW}, (2, 33), 9),
    Case("YaRN without mscale", {**_without("rope_theta", "rope_scaling"), "rope_parameters": _YARN_BARE}, (1, 40), 10),
    Case("RoPE in halves", {**_BASE, "rope_interleave": False}, (2, 15), 11),
    Case("tied embeddings", {**_BASE, "tie_word_embeddings": True}, (2, 8), 12),
    Case("no dense layer", {**_BASE, "first_k_dense_replace": 0, "num_hidden_layers": 3}, (2, 9), 13),
    Case("all layers dense", {**_BASE, "first_k_dense_replace": 4}, (2, 9), 14),
    Case("odd sizes, one row", {**_BASE, **_ODD}, (1, 13), 15),
    Case("weights not normalised", {**_BASE, "norm_topk_prob": False, "routed_scaling_factor": 0.7}, (2, 9), 16),
    Case("two MTP modules", {**_BASE, "num_nextn_predict_layers": 2}, (2, 14), 17),
]


def case(name: str) -> Case:
    """Returns a case by name."""
    return next(c for c in CASES if c.name == name)
