"""Checkpoint directories between dsv3 and transformers: each opens what the other saved, with identical numbers."""

from __future__ import annotations

import importlib.metadata
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_model import params_to_hf  # noqa: E402
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: E402
from transformers.modeling_layers import MtpModel  # noqa: E402

import dsv3  # noqa: E402
from dsv3 import tree  # noqa: E402
from dsv3.pretrained import load_pretrained, save_pretrained  # noqa: E402
from tests.small import model_config, random_params, random_router, random_tokens  # noqa: E402

pytestmark = pytest.mark.parity

CONFIGS = {
    "as published": {},
    "no query compression": {"q_lora_rank": None},
    "biases in attention": {"attention_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "two shared experts": {"n_shared_experts": 2},
    "no shared expert": {"n_shared_experts": 0},
    "no dense layer": {"first_k_dense_replace": 0},
    "all layers dense": {"first_k_dense_replace": 3},
    "one MTP module": {"num_nextn_predict_layers": 1},
}


def random_model(cfg: dsv3.ModelConfig):
    return cfg, random_params(dsv3.model_specs(cfg)), random_router(cfg)


def logits(cfg, params, router, tokens) -> np.ndarray:
    return dsv3.model_apply(params, router, tokens, cfg=cfg, policy=dsv3.ComputePolicy(fuse=False)).logits.numpy()


def hf_logits(model, tokens: np.ndarray) -> np.ndarray:
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.float().numpy()


def state_of(params, router, cfg) -> dict:
    """The values that transformers' model must have, by the parity suite's own map of names."""
    values = {name: v for name, v in params_to_hf(cfg, params).items() if not name.startswith("mtp.")}
    for i, bias in enumerate(np.asarray(router.moe)):
        values[f"model.layers.{cfg.num_dense_layers + i}.mlp.gate.e_score_correction_bias"] = bias
    return values


def assert_state(model, values: dict) -> None:
    """Asserts that a transformers model holds these values, exactly and nothing else."""
    state = {name: v for name, v in model.state_dict().items() if v.numel()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    assert set(state) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(state[name].float().numpy(), value, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard", [3000, 10**9])
def test_transformers_opens_what_dsv3_saved(tmp_path, table, name, shard):
    cfg, params, router = random_model(model_config(**CONFIGS[name]))
    save_pretrained(tmp_path / "out", cfg, params, router, max_shard_bytes=shard)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(model, DeepseekV3ForCausalLM) and model.dtype == torch.float32
    assert all(".shared_experts." in key and cfg.moe.num_shared == 0 for key in info["missing_keys"])
    assert all(int(key.split(".")[2]) >= cfg.num_layers for key in info["unexpected_keys"])
    assert not info["mismatched_keys"] and not info["error_msgs"]
    assert_state(model, state_of(params, router, cfg))
    tokens = random_tokens(cfg, 2, 9)
    got, want = hf_logits(model, tokens), logits(cfg, params, router, tokens)
    if shard == 3000:  # one row is enough
        table.check(name, "logits, opened by transformers", np.abs(got - want).max() / np.abs(want).max(), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_transformers_opens_the_bfloat16_and_float8_forms(tmp_path, monkeypatch, dtype):
    cfg, params, router = random_model(model_config(**CONFIGS["one MTP module"]))
    save_pretrained(tmp_path / "out", cfg, params, router, dtype=dtype)
    if dtype == "float8":  # on a CPU it dequantises while loading; `accelerate` is asked for and not needed
        monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    _, loaded, biases = load_pretrained(tmp_path / "out", dtype=tf.bfloat16)
    as_float = tree.map_leaves(lambda leaf: tf.cast(leaf, tf.float32), loaded)
    assert_state(model, state_of(as_float, biases, cfg))


@pytest.mark.parametrize("name", [name for name in CONFIGS if "MTP" not in name])
def test_dsv3_opens_what_transformers_saved(tmp_path, name):
    settings = model_config(**CONFIGS[name]).to_hf()
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings)).eval()
    with torch.no_grad():
        for p in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)]:
            p.add_(0.2 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "out", max_shard_size=20_000)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    with pytest.warns(UserWarning, match="claims 2 MTP module"):
        cfg, params, router = load_pretrained(tmp_path / "out", dtype=tf.float32)
    assert cfg.num_mtp_layers == 0
    assert_state(model, state_of(params, router, cfg))
    tokens = random_tokens(cfg, 2, 9)
    want = hf_logits(model, tokens)
    np.testing.assert_allclose(logits(cfg, params, router, tokens), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_dsv3_opens_bfloat16_of_transformers(tmp_path):
    settings = model_config(num_nextn_predict_layers=0).to_hf()
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "out")  # selection biases are bfloat16, too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg, params, router = load_pretrained(tmp_path / "out")
    assert router.moe.dtype == tf.float32 and params.embed.dtype == tf.bfloat16
    as_float = tree.map_leaves(lambda leaf: tf.cast(leaf, tf.float32), params)
    assert_state(model, state_of(as_float, router, cfg))


def test_transformers_opens_the_mtp_modules(tmp_path, monkeypatch):
    cfg, params, router = random_model(model_config())
    save_pretrained(tmp_path / "out", cfg, params, router, max_shard_bytes=3000)
    # transformers looks for MTP at layer 61, where the published model has it; here it is at 3 and 4.
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34].*"])
    mtp = MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    want = {name: value for name, value in params_to_hf(cfg, params).items() if name.startswith("mtp.")}
    got = {f"mtp.{name}": value.numpy() for name, value in mtp.state_dict().items()}
    assert len(want) > 30
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    for k in range(2):
        bias = got[f"mtp.layers.{k}.mtp_block.mlp.gate.e_score_correction_bias"]
        np.testing.assert_array_equal(bias, router.mtp[k])


def test_versions_are_those_that_mtp_rule_is_about():
    """transformers 5 claims MTP modules that it does not save: `load_pretrained` makes a warning of it."""
    assert importlib.metadata.version("transformers").split(".")[0] == "5"
    assert DeepseekV3Config().num_nextn_predict_layers == 1
