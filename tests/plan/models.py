"""Configurations and plans that the planner's tests share."""

from __future__ import annotations

import functools
from typing import Any

import dsv3
from dsv3.plan import Plan, hardware_preset
from tests.small import model_config

V3 = dsv3.preset("deepseek-v3-pretrain")
TINY = dsv3.preset("tiny")
PAPER = Plan(pipe=16, expert=64, data=2, schedule="dualpipe", batch=15_360)
H800 = hardware_preset("h800")

# Awkward ones: two MTP modules; a tied head; no query compression; only dense blocks; biases in attention.
SMALL = {
    "parts": model_config(),
    "tied": model_config(tie_word_embeddings=True, num_nextn_predict_layers=0),
    "plain queries": model_config(q_lora_rank=None, n_shared_experts=2),
    "dense": model_config(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "biases": model_config(attention_bias=True, n_shared_experts=0),
}


@functools.cache
def specs(cfg: dsv3.ModelConfig) -> Any:
    return dsv3.model_specs(cfg)
