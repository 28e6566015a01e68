"""Reading and writing `config.json`: both spellings, the published file, counts, and what is refused by name."""

import dataclasses
import json

import pytest

import dsv3
from dsv3 import ModelConfig, YarnConfig
from tests.real_data import DATA

R1_CONFIG = DATA / "deepseek_v3_tokenizer" / "r1_config.json"

SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "num_attention_heads": 4,
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
    "max_position_embeddings": 256,
}
YARN = {"factor": 40, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16}


def read(**changes):
    """The small configuration with fields changed, or left out where the value is `...`."""
    fields = {**SMALL, **changes}
    return ModelConfig.from_hf({name: value for name, value in fields.items() if value is not ...})


def test_fields_of_the_small_configuration():
    cfg = read(rope_theta=5e5, routed_scaling_factor=1.5, norm_topk_prob=False, eos_token_id=[1, 2])
    mla, router = cfg.mla, cfg.moe.router
    assert (cfg.num_layers, cfg.num_dense_layers, cfg.num_moe_layers, cfg.intermediate_size) == (4, 1, 3, 48)
    assert (mla.num_heads, mla.q_latent, mla.kv_latent, mla.nope_dim, mla.rope_dim, mla.v_dim) == (4, 24, 16, 8, 8, 8)
    assert (mla.rope.theta, mla.rope.pairs, mla.rope.yarn, mla.bias) == (5e5, "interleaved", None, False)
    assert (router.num_experts, router.top_k, router.num_groups, router.groups_kept) == (8, 2, 4, 2)
    assert (router.scale, router.normalize, cfg.moe.num_shared, cfg.moe.intermediate_size) == (1.5, False, 1, 16)
    # Where num_nextn_predict_layers is missing, one module: transformers' default.
    assert (cfg.eos_ids, cfg.num_mtp_layers, cfg.tie_embeddings, cfg.max_length) == ((1, 2), 1, False, 256)


def test_family_members():
    assert read(q_lora_rank=None).mla.q_latent is None
    assert read(n_group=1, topk_group=1, num_experts_per_tok=8).moe.router.num_groups == 1
    assert read(n_shared_experts=3).moe.num_shared == 3
    assert read(n_shared_experts=0).moe.num_shared == 0
    assert read(attention_bias=True).mla.bias
    assert read(rope_interleave=False).mla.rope.pairs == "halves"
    assert read(first_k_dense_replace=9).num_dense_layers == 4
    assert read(first_k_dense_replace=0, intermediate_size=...).num_moe_layers == 4


def test_a_query_rank_that_is_missing_is_transformers_default_and_null_is_none():
    assert read(q_lora_rank=...).mla.q_latent == 1536
    assert read(q_lora_rank=None).mla.q_latent is None


def test_the_maximum_length_is_the_rotary_settings_too():
    """Else YaRN that applies beyond the original length would be off, and on once the model is saved and loaded."""
    cfg = read(rope_scaling={"type": "yarn", **YARN, "dsv3_apply": "beyond_original"}, max_position_embeddings=64)
    assert cfg.mla.rope.active_yarn is None
    longer = cfg.replace(max_length=256)
    assert longer.mla.rope.max_length == 256 and longer.mla.rope.active_yarn is not None
    assert longer == cfg.replace(max_position_embeddings=256) == ModelConfig.from_hf(longer.to_hf())
    both = cfg.replace(max_length=128, norm_rounding="after_weight")
    assert both.mla.rope.max_length == 128 and both.mla.norm_rounding == "after_weight"
    with pytest.raises(ValueError, match="ModelConfig: `mla.rope.max_length` is 64, want max_length=65"):
        dataclasses.replace(cfg, max_length=65)


def test_both_spellings_of_the_rope_settings():
    old = read(rope_theta=500.0, rope_scaling={"type": "yarn", **YARN})
    mixed = read(rope_theta=500.0, rope_scaling={"rope_type": "yarn", **YARN})
    new = read(rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **YARN})
    both = read(rope_theta=500.0, rope_parameters={"type": "yarn", "rope_type": "yarn", "rope_theta": 500.0, **YARN})
    assert old == mixed == new == both
    assert new.mla.rope.theta == 500.0
    assert new.mla.rope.yarn == YarnConfig(40.0, 64, beta_fast=16.0, mscale=0.7, mscale_all_dim=1.3)
    plain = read(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert plain == read(rope_theta=500.0, rope_scaling=None) != read()


def test_yarn_without_a_factor_takes_the_ratio_of_lengths():
    cfg = read(rope_scaling={"type": "yarn", "original_max_position_embeddings": 64})
    assert cfg.mla.rope.yarn.factor == 4.0
    assert cfg.mla.rope.yarn.mscale is None and cfg.mla.rope.yarn.mscale_all_dim is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "deepseek_v2"}, "`model_type` is 'deepseek_v2', want 'deepseek_v3'"),
        ({"model_type": ...}, "`model_type` is None"),
        ({"kv_lora_rank": ..., "v_head_dim": None}, "lacks kv_lora_rank, v_head_dim"),
        ({"n_group": 3}, "`num_experts` 8 is not divisible by `num_groups` 3"),
        ({"n_group": 8}, "8 experts in 8 groups are one each"),
        ({"topk_group": 5}, "`groups_kept` is 5, want 1 to num_groups=4"),
        ({"num_experts_per_tok": 5}, "`top_k` is 5, but the 2 kept groups hold 4 experts"),
        ({"num_experts_per_tok": 0}, "`top_k` is 0"),
        ({"qk_rope_head_dim": 7}, "`dim` .qk_rope_head_dim. is 7, want even"),
        ({"num_key_value_heads": 2}, "`num_key_value_heads` is 2, want 4"),
        ({"first_k_dense_replace": -1}, "`num_dense_layers` is -1, want 0 to num_layers=4"),
        ({"intermediate_size": ...}, "`intermediate_size` is 0, want > 0"),
        ({"hidden_size": 0}, "`hidden_size` is 0, want > 0"),
        ({"num_nextn_predict_layers": -1}, "`num_mtp_layers` is -1"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu', want 'silu'"),
        ({"scoring_func": "softmax"}, "`scoring_func` is 'softmax', want 'sigmoid'"),
        ({"topk_method": "greedy"}, "`topk_method` is 'greedy'"),
        ({"moe_layer_freq": 2}, "`moe_layer_freq` is 2"),
        ({"attention_dropout": 0.1}, "`attention_dropout` is 0.1"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE type is 'linear', want 'default' or 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, "`factor` is -1.0"),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "default"}},
            r"RoPE types \['default', 'yarn'\] contradict each other",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "`rope_theta` has two values"),
        ({"max_position_embeddings": None}, "`max_position_embeddings` is None, want an integer"),
        ({"hidden_size": "64"}, "`hidden_size` is '64', want an integer"),
        ({"num_hidden_layers": 2.5}, "`num_hidden_layers` is 2.5, want an integer"),
        ({"n_shared_experts": True}, "`n_shared_experts` is True, want an integer or null"),
        ({"q_lora_rank": "24"}, "`q_lora_rank` is '24', want an integer or null"),
        ({"rms_norm_eps": None}, "`rms_norm_eps` is None, want a number"),
        ({"initializer_range": "small"}, "`initializer_range` is 'small', want a number"),
        ({"routed_scaling_factor": float("nan")}, "`routed_scaling_factor` is nan, want a number or null"),
        ({"rope_theta": [1]}, r"`rope_theta` is \[1\], want a number or null"),
        ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` is 'false', want true, false or null"),
        ({"eos_token_id": "1"}, "`eos_token_id` is '1', want an integer, a list of them or null"),
        ({"eos_token_id": [1, None]}, r"`eos_token_id` is \[1, None\], want an integer, a list of them or null"),
        ({"rope_scaling": "yarn"}, "`rope_scaling` is 'yarn', want an object or null"),
        ({"rope_parameters": [1]}, r"`rope_parameters` is \[1\], want an object or null"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"`rope_scaling.type` is \['yarn'\], want a string or null"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "`rope_scaling.factor` is '4', want a number or null"),
        ({"rope_parameters": {"rope_theta": {}}}, "`rope_parameters.rope_theta` is {}, want a number or null"),
        ({"dsv3_norm_rounding": "never"}, "`norm_rounding` is 'never', want one of"),
        ({"dsv3_mtp_concat": "sum"}, "`mtp_concat` is 'sum', want one of"),
        ({"dsv3_group_mask": "0"}, "`group_mask` is '0', want one of"),
    ],
)
def test_refused_by_name_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read(**changes)
    assert "\n" not in str(error.value)


def test_refused_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json at"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a list, want an object"):
        ModelConfig.from_hf(tmp_path)


VARIANTS = {
    "published": {},
    "no query compression": {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False},
    "yarn": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **YARN, "attention_factor": 1.25}},
    "tied": {"tie_word_embeddings": True, "n_shared_experts": 0, "num_nextn_predict_layers": 3, "eos_token_id": [1, 5]},
    "ids": {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 7, "initializer_range": 0.006},
    "ours": {
        "dsv3_norm_rounding": "after_weight",
        "dsv3_mtp_hidden": "raw",
        "dsv3_mtp_concat": "hidden_first",
        "dsv3_group_mask": "zero",
        "dsv3_rope_output": "halves",
        "rope_scaling": {"type": "yarn", **YARN, "dsv3_apply": "beyond_original"},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
    cfg = read(**VARIANTS[name])
    hf = cfg.to_hf()
    (tmp_path / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == cfg
    assert any(key.startswith("dsv3_") for key in hf) == (name == "ours")
    assert (cfg == read()) == (name == "published")


@pytest.mark.parametrize("name", dsv3.PRESETS)
def test_presets_round_trip(name):
    cfg = dsv3.preset(name)
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg


@pytest.mark.skipif(not R1_CONFIG.is_file(), reason=f"no {R1_CONFIG.name} in the data folder")
def test_preset_is_the_published_configuration():
    published = ModelConfig.from_hf(R1_CONFIG)
    assert published.init_std == 0.02
    assert published.replace(init_std=0.006) == dsv3.preset("deepseek-v3")
    written = dsv3.preset("deepseek-v3").to_hf()
    source = json.loads(R1_CONFIG.read_text(encoding="utf-8"))
    same = set(source) & set(written) - {"initializer_range"}
    assert {key for key in same if source[key] != written[key]} == set()
    # What is left concerns files, training and devices, not the function.
    assert set(source) - set(written) == {
        "auto_map", "aux_loss_alpha", "ep_size", "pretraining_tp", "quantization_config", "seq_aux", "torch_dtype",
        "transformers_version",
    }  # fmt: skip


def test_parameters_of_the_published_model():
    cfg = dsv3.preset("deepseek-v3")
    specs = dsv3.model_specs(cfg)
    trunk = dsv3.count_params(specs._replace(mtp=()))
    biases = cfg.num_moe_layers * cfg.moe.router.num_experts
    assert biases == 58 * 256
    assert trunk + biases == 671_026_419_200
    # One token leaves 248 of 256 experts alone, of three matrices each.
    assert dsv3.active_params(cfg) == trunk - 58 * 248 * 3 * 7168 * 2048
    assert round(dsv3.active_params(cfg) / 1e9, 1) == 37.6
    # The MTP module: a mixture block, eh_proj and three norms; embedding and head are the model's.
    block = dsv3.count_params(specs.moe) // cfg.num_moe_layers
    assert dsv3.count_params(specs.mtp) == block + 2 * 7168**2 + 3 * 7168
    plain = dsv3.model_specs(cfg.replace(num_nextn_predict_layers=0))
    assert plain.mtp == () and dsv3.count_params(plain) == trunk
