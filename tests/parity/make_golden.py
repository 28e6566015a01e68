"""Writes the golden files: what transformers computes of three tiny models, for tests that have no torch.

    make golden

A file holds its model whole: the settings, and every parameter as a multiple of 1/64 in one byte, so that no random
generator stands between the file and a test, and bfloat16 holds the same numbers as float32. `tests/test_golden.py` reads
them.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import cases
import hf_model
import hf_run
import numpy as np
import torch

from dsv3 import ModelConfig, ModelParams, RouterState, tree

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "golden"
GRID = 64
SAMPLES = 16

_TINY: dict[str, Any] = {
    **cases.case("as published, small").settings,
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "moe_intermediate_size": 6,
    "num_nextn_predict_layers": 2,
}

# Name → (settings, shape of the tokens that the model reads).
GOLDEN = {
    "published": (_TINY, (2, 9)),
    "variant": (
        {
            **_TINY,
            "q_lora_rank": None,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 3,
            "n_shared_experts": 0,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": 1e-4,
        },
        (3, 6),
    ),
    "yarn": (
        {
            **{name: value for name, value in _TINY.items() if name not in ("rope_theta", "rope_scaling")},
            "rope_parameters": cases.case("YaRN, rope_parameters").settings["rope_parameters"],
            "qk_rope_head_dim": 6,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "num_hidden_layers": 2,
            "num_nextn_predict_layers": 1,
        },
        (1, 21),
    ),
}


def draw(cfg: ModelConfig, seed: int) -> tuple[ModelParams, RouterState]:
    """Draws parameters and selection biases as multiples of 1 / GRID, int8."""
    return tree.map_leaves(
        lambda leaf: np.clip(np.round(GRID * leaf), -127, 127).astype(np.int8), hf_model.draw_params(cfg, seed)
    )


def compute(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one golden file."""
    settings, shape = GOLDEN[name]
    cfg = ModelConfig.from_hf(settings)
    seed = sorted(GOLDEN).index(name)
    stored = draw(cfg, seed)
    params, router = tree.map_leaves(lambda leaf: leaf.astype(np.float32) / GRID, stored)
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (shape[0], shape[1] + 1))
    seen = hf_run.observe(cfg, hf_model.build(settings, params, router), tokens)
    if seen.margin < 1e-4:
        raise ValueError(f"make_golden: {name} has a near tie of {seen.margin:.1g} between experts, want another seed")
    rounded = hf_run.observe(cfg, hf_model.build(settings, params, router, dtype=torch.bfloat16), tokens)
    arrays = {
        "config": np.array(json.dumps(settings)),
        "grid": np.array(GRID),
        "mtp_weight": np.array(hf_run.MTP_WEIGHT),
        "tokens": tokens.astype(np.int16),
        "logits": seen.logits,
        "hidden": seen.hidden,
        "experts": seen.experts.astype(np.int8),
        "mtp_experts": seen.mtp_experts.astype(np.int8),
        "mtp_logits": seen.mtp_logits.astype(np.float32),
        "loss": np.float32(seen.loss),
        "bfloat16_logits": rounded.logits.astype(np.float32),
        "bfloat16_experts": rounded.experts.astype(np.int8),
    }
    arrays |= {f"params/{path}": leaf for path, leaf in tree.items(stored[0])}
    arrays |= {f"router/{path}": leaf for path, leaf in tree.items(stored[1])}
    for path, grad in tree.items(hf_model.params_from_hf(cfg, seen.grads)):
        arrays[f"grad_norm/{path}"] = np.linalg.norm(grad).astype(np.float32)
        arrays[f"grad_sample/{path}"] = sample(grad)
    return arrays


def sample(grad: np.ndarray) -> np.ndarray:
    """Returns at most SAMPLES values, evenly spread over the flattened gradient."""
    flat = grad.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(int)]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in GOLDEN:
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **compute(name))
        print(f"{path.relative_to(FOLDER.parent.parent)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
