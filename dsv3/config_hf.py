"""`config.json` of the `deepseek_v3` model type, read and written.

Both spellings of the RoPE settings are known: `rope_scaling` beside `rope_theta`, as the published checkpoints have it, and
`rope_parameters` of transformers 5.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dsv3.checks import check
from dsv3.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig, YarnConfig

_REQUIRED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim n_routed_experts num_experts_per_tok moe_intermediate_size"
).split()

# What a field must be where it is there.
_TYPES = {
    "an integer": [*_REQUIRED, "max_position_embeddings"],
    "an integer or null": (
        "num_key_value_heads q_lora_rank first_k_dense_replace intermediate_size n_shared_experts n_group topk_group "
        "num_nextn_predict_layers bos_token_id pad_token_id"
    ).split(),
    "an integer, a list of them or null": ["eos_token_id"],
    "a number": ["rms_norm_eps", "initializer_range"],
    "a number or null": ["routed_scaling_factor", "rope_theta"],
    "true, false or null": ["attention_bias", "tie_word_embeddings", "norm_topk_prob", "rope_interleave"],
    "an object or null": ["rope_scaling", "rope_parameters"],
}
_ROPE_TYPES = {
    "a string or null": ["type", "rope_type"],
    "an integer or null": ["original_max_position_embeddings"],
    "a number or null": "rope_theta factor beta_fast beta_slow mscale mscale_all_dim attention_factor".split(),
    "true, false or null": ["truncate"],
}

# Fields whose only supported value is the architecture's own.
_FIXED = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1, None),
    "attention_dropout": (0, 0.0, None),
}


def from_hf(source: str | os.PathLike[str] | Mapping[str, Any]) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    hf = dict(source) if isinstance(source, Mapping) else read_json(source)
    kind = hf.get("model_type")
    check(kind == "deepseek_v3", f"ModelConfig.from_hf: `model_type` is {kind!r}, want 'deepseek_v3'")
    missing = [name for name in _REQUIRED if hf.get(name) is None]
    check(not missing, f"ModelConfig.from_hf: config.json lacks {', '.join(missing)}")
    for name, allowed in _FIXED.items():
        if name in hf:
            check(
                hf[name] in allowed,
                f"ModelConfig.from_hf: `{name}` is {hf[name]!r}, want {allowed[0]!r} (the only one of DeepSeek-V3)",
            )
    _check_types(hf, _TYPES)
    for name in _TYPES["an object or null"]:
        _check_types(hf.get(name) or {}, _ROPE_TYPES, f"{name}.")
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads")
    check(
        kv_heads in (None, heads),
        f"ModelConfig.from_hf: `num_key_value_heads` is {kv_heads}, want {heads}: MLA expands keys for every head",
    )
    max_length = hf.get("max_position_embeddings", 4096)
    rounding = hf.get("dsv3_norm_rounding", "before_weight")
    mla = MLAConfig(
        hidden_size=hf["hidden_size"],
        num_heads=heads,
        q_latent=hf.get("q_lora_rank", 1536),  # transformers' default; null is no query compression
        kv_latent=hf["kv_lora_rank"],
        nope_dim=hf["qk_nope_head_dim"],
        rope_dim=hf["qk_rope_head_dim"],
        v_dim=hf["v_head_dim"],
        rope=_rope(hf, max_length),
        bias=bool(hf.get("attention_bias", False)),
        norm_rounding=rounding,
    )
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_dense_layers=min(_value(hf, "first_k_dense_replace", 0, missing=3), hf["num_hidden_layers"]),
        intermediate_size=_value(hf, "intermediate_size", 0),
        mla=mla,
        moe=_moe(hf),
        num_mtp_layers=_value(hf, "num_nextn_predict_layers", 0, missing=1),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_rounding=rounding,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_length=max_length,
        init_std=hf.get("initializer_range", 0.02),
        mtp_hidden=hf.get("dsv3_mtp_hidden", "normed"),
        mtp_concat=hf.get("dsv3_mtp_concat", "embedding_first"),
        mtp_next=hf.get("dsv3_mtp_next", "raw"),
        bos_id=hf.get("bos_token_id", 0),
        eos_ids=_ids(hf.get("eos_token_id", 1)),
        pad_id=hf.get("pad_token_id"),
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """See `ModelConfig.to_hf`."""
    router, mla = cfg.moe.router, cfg.mla
    hf: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "first_k_dense_replace": cfg.num_dense_layers,
        "intermediate_size": cfg.intermediate_size,
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_latent,
        "kv_lora_rank": mla.kv_latent,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.v_dim,
        "attention_bias": mla.bias,
        "attention_dropout": 0.0,
        "n_routed_experts": router.num_experts,
        "n_shared_experts": cfg.moe.num_shared,
        "num_experts_per_tok": router.top_k,
        "moe_intermediate_size": cfg.moe.intermediate_size,
        "moe_layer_freq": 1,
        "n_group": router.num_groups,
        "topk_group": router.groups_kept,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": cfg.num_mtp_layers,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_length,
        "rope_theta": mla.rope.theta,
        "rope_interleave": mla.rope.pairs == "interleaved",
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
        "pad_token_id": cfg.pad_id,
        "use_cache": True,
    }
    hf["rope_scaling"] = None if mla.rope.yarn is None else _yarn_to_hf(mla.rope.yarn)
    # Sides taken where references disagree, written only where they are not the published checkpoint's.
    ours = {
        "dsv3_norm_rounding": (cfg.norm_rounding, "before_weight"),
        "dsv3_mtp_hidden": (cfg.mtp_hidden, "normed"),
        "dsv3_mtp_concat": (cfg.mtp_concat, "embedding_first"),
        "dsv3_mtp_next": (cfg.mtp_next, "raw"),
        "dsv3_group_mask": (router.group_mask, "-inf"),
        "dsv3_rope_output": (mla.rope.output, "interleaved"),
    }
    hf.update({name: value for name, (value, default) in ours.items() if value != default})
    return hf


def replace(cfg: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
    """See `ModelConfig.replace`."""
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    hf = to_hf(cfg)
    unknown = sorted(name for name in fields if name not in own and name not in hf)
    check(not unknown, f"ModelConfig.replace: no field is named {', '.join(unknown)}")
    by_hf = {name: value for name, value in fields.items() if name in hf}
    by_own = {name: value for name, value in fields.items() if name not in hf}
    if "num_attention_heads" in by_hf:
        by_hf.setdefault("num_key_value_heads", by_hf["num_attention_heads"])
    changed = from_hf({**hf, **by_hf}) if by_hf else cfg
    if "mla" not in by_own:  # what attention must have in common with the model goes down to it
        mla = changed.mla
        if "max_length" in by_own:
            mla = dataclasses.replace(mla, rope=dataclasses.replace(mla.rope, max_length=by_own["max_length"]))
        by_own["mla"] = dataclasses.replace(mla, norm_rounding=by_own.get("norm_rounding", mla.norm_rounding))
    return dataclasses.replace(changed, **by_own)


def read_json(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object from a file, or from `config.json` in a directory."""
    path = pathlib.Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"ModelConfig.from_hf: no config.json at {source}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"ModelConfig.from_hf: {path} is not JSON: {e}") from None
    check(isinstance(value, dict), f"ModelConfig.from_hf: {path} holds a {type(value).__name__}, want an object")
    return value


def _check_types(hf: Mapping[str, Any], types: Mapping[str, list[str]], prefix: str = "") -> None:
    """Raises `ValueError` for the first field that is there and not what it must be."""
    for want, names in types.items():
        for name in names:
            if name in hf and not _is(hf[name], want):
                raise ValueError(f"ModelConfig.from_hf: `{prefix}{name}` is {hf[name]!r}, want {want}")


def _is(value: Any, want: str) -> bool:
    """Whether a value is what the words of `_TYPES` say."""
    if value is None:
        return want.endswith("null")
    if want.startswith("an integer, a list") and isinstance(value, list | tuple):
        return all(_is(item, "an integer") for item in value)
    if want.startswith("true"):
        return isinstance(value, bool)
    kinds = {"an integer": numbers.Integral, "a number": numbers.Real, "a string": str, "an object": Mapping}
    kind = next(kinds[words] for words in kinds if want.startswith(words))
    return isinstance(value, kind) and not isinstance(value, bool) and (kind is not numbers.Real or math.isfinite(value))


def _value(hf: Mapping[str, Any], name: str, null: Any, *, missing: Any = None) -> Any:
    """A field; `null` where it is null; `missing` (transformers' default) or `null` where it is not there."""
    value = hf.get(name, missing)
    return null if value is None else value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _moe(hf: Mapping[str, Any]) -> MoEConfig:
    groups = _value(hf, "n_group", 1, missing=8)
    router = RouterConfig(
        num_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        num_groups=groups,
        groups_kept=_value(hf, "topk_group", groups, missing=4),
        scale=float(_value(hf, "routed_scaling_factor", 1.0, missing=2.5)),
        normalize=bool(_value(hf, "norm_topk_prob", True)),
        group_mask=hf.get("dsv3_group_mask", "-inf"),
    )
    return MoEConfig(
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["moe_intermediate_size"],
        num_shared=_value(hf, "n_shared_experts", 0, missing=1),
        router=router,
    )


def _rope(hf: Mapping[str, Any], max_length: int) -> RopeConfig:
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    settings = {**old, **new}
    kinds = {s[k] for s in (old, new) for k in ("type", "rope_type") if k in s}
    check(len(kinds) <= 1, f"ModelConfig.from_hf: RoPE types {sorted(kinds)} contradict each other")
    kind = next(iter(kinds), "default")
    check(kind in ("default", "yarn"), f"ModelConfig.from_hf: RoPE type is {kind!r}, want 'default' or 'yarn'")
    thetas = {float(t) for t in (hf.get("rope_theta"), new.get("rope_theta")) if t is not None}
    check(len(thetas) <= 1, f"ModelConfig.from_hf: `rope_theta` has two values, {sorted(thetas)}")
    yarn = None
    if kind == "yarn":
        original = settings.get("original_max_position_embeddings") or max_length
        check(settings.get("truncate", True), "ModelConfig.from_hf: YaRN's `truncate` is false, want true")
        yarn = YarnConfig(
            factor=float(settings.get("factor") or max_length / original),
            original_length=original,
            beta_fast=float(settings.get("beta_fast") or 32),
            beta_slow=float(settings.get("beta_slow") or 1),
            mscale=settings.get("mscale"),
            mscale_all_dim=settings.get("mscale_all_dim"),
            attention_factor=settings.get("attention_factor"),
            apply=settings.get("dsv3_apply", "always"),
        )
    return RopeConfig(
        dim=hf["qk_rope_head_dim"],
        theta=next(iter(thetas), 10_000.0),
        max_length=max_length,
        pairs="interleaved" if _value(hf, "rope_interleave", True) else "halves",
        output=hf.get("dsv3_rope_output", "interleaved"),
        yarn=yarn,
    )


def _yarn_to_hf(yarn: YarnConfig) -> dict[str, Any]:
    hf = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "attention_factor": yarn.attention_factor,
        "dsv3_apply": None if yarn.apply == "always" else yarn.apply,
    }
    return {name: value for name, value in hf.items() if value is not None}
