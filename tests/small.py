"""Small awkward configurations, and parameters that are not as tame as initial ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

import dsv3
from dsv3 import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig, tree

KEY = tf.constant([3, 7])


def mla_config(**fields: Any) -> MLAConfig:
    """An attention layer whose head dims are all unlike; `rope` takes `RopeConfig`'s other fields as a dict."""
    rope = {"dim": fields.get("rope_dim", 2), "theta": 100.0} | fields.pop("rope", {})
    sizes = {"hidden_size": 8, "num_heads": 2, "q_latent": 5, "kv_latent": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 3}
    return MLAConfig(**(sizes | fields), rope=RopeConfig(**rope))


def moe_config(**fields: Any) -> MoEConfig:
    """A mixture; fields of the router go to it."""
    router = {"num_experts": 8, "top_k": 3, "num_groups": 4, "groups_kept": 2, "scale": 2.5}
    router |= {name: fields.pop(name) for name in list(fields) if name in RouterConfig.__dataclass_fields__}
    return MoEConfig(**({"hidden_size": 8, "intermediate_size": 5, "num_shared": 1} | fields), router=RouterConfig(**router))


def model_config(**fields: Any) -> ModelConfig:
    """A model with every part: two mixtures behind a dense layer, two MTP modules. Fields are those of config.json."""
    small = {
        "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 10,
        "num_attention_heads": 2, "q_lora_rank": 7, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
        "v_head_dim": 3, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "n_group": 3,
        "topk_group": 2, "num_nextn_predict_layers": 2, "rope_theta": 100.0,
    }  # fmt: skip
    return dsv3.preset("tiny").replace(**(small | fields))


def random_params(specs: Any, seed: int = 0, std: float = 0.3, dtype: tf.DType = tf.float32) -> Any:
    """Draws every leaf, norms around one and biases around zero, so that no part can hide behind a neutral value."""

    def draw(path: str, spec: dsv3.ParamSpec) -> tf.Tensor:
        values = np.random.default_rng([seed, tree.path_hash(path)]).normal(size=spec.shape) * std
        return tf.cast(tf.constant(values + (spec.init == "ones"), tf.float32), dtype)

    return tree.map_with_path(draw, specs)


def random_router(cfg: ModelConfig, seed: int = 0) -> dsv3.RouterState:
    """Selection biases large enough to change who is chosen."""
    rng = np.random.default_rng(seed)
    return tree.map_leaves(lambda b: tf.constant(rng.normal(size=b.shape) * 0.1, tf.float32), dsv3.router_init(cfg))


def random_tokens(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, batch, length]).integers(0, cfg.vocab_size, (batch, length)).astype(np.int32)
