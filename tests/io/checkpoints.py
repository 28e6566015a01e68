"""Checkpoints for tests: an oracle of what each tensor must hold, and raw files that a test can damage."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from einops import rearrange
from hypothesis import strategies as st

import dsv3
from dsv3 import ModelConfig, ModelParams, RouterState, tree
from tests.small import model_config, random_params, random_router

NUMPY = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "I32": np.int32,
}  # fmt: skip
HF_NAMES = {np.dtype(dtype): name for name, dtype in NUMPY.items()}


class Model(NamedTuple):
    """What `load_pretrained` returns, as one value."""

    cfg: ModelConfig
    params: ModelParams
    router: RouterState


def random_model(cfg: ModelConfig, seed: int = 0, dtype: Any = "float32") -> Model:
    """A model in which no two values are alike."""
    return Model(cfg, random_params(dsv3.model_specs(cfg), seed, dtype=dtype), random_router(cfg, seed))


def arrays(model: Model) -> dict[str, np.ndarray]:
    """Path → float32 values of parameters and selection biases."""
    leaves = tree.to_dict(model.params) | {f"router.{n}": v for n, v in model.router._asdict().items()}
    return {path: np.asarray(leaf).astype(np.float32) for path, leaf in leaves.items()}


def assert_same(got: Model, want: Model) -> None:
    """Asserts that two models are equal bit by bit, dtypes included."""
    assert got.cfg == want.cfg
    assert got.router.moe.dtype == got.router.mtp.dtype == "float32"
    assert [leaf.dtype for leaf in tree.flatten(got.params)] == [leaf.dtype for leaf in tree.flatten(want.params)]
    got, want = arrays(got), arrays(want)
    assert list(got) == list(want)
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def oracle(model: Model, name: str) -> np.ndarray:
    """What the tensor `name` of a checkpoint must hold, float32: one formula for each kind of name."""
    cfg, leaves = model.cfg, arrays(model)
    head = leaves["embed"] if cfg.tie_embeddings else leaves.get("head", np.zeros([0, 0])).T
    top = {"model.embed_tokens.weight": leaves["embed"], "model.norm.weight": leaves["norm"], "lm_head.weight": head}
    if name in top:
        return top[name]
    layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()
    layer = int(layer)
    stack, i = next(
        (stack, layer - first)
        for stack, first in (("mtp", cfg.num_layers), ("moe", cfg.num_dense_layers), ("dense", 0))
        if layer >= first
    )
    block = "mtp.block." if stack == "mtp" else f"{stack}."
    here = {path.removeprefix(block): leaf[i] for path, leaf in leaves.items() if path.startswith(block)}
    if stack == "mtp":
        extra = {"embed_norm": "enorm", "hidden_norm": "hnorm", "norm": "shared_head.norm", "proj": "eh_proj"}
        for ours, theirs in extra.items():
            if rest == f"{theirs}.weight":
                return leaves[f"mtp.{ours}"][i].T
        if rest in ("embed_tokens.weight", "shared_head.head.weight"):
            return leaves["embed"] if rest == "embed_tokens.weight" else head
    if rest == "mlp.gate.e_score_correction_bias":
        return leaves[f"router.{stack}"][i]
    if match := re.fullmatch(r"mlp\.(experts\.\d+\.|shared_experts\.|)(gate|up|down)_proj\.weight", rest):
        return _feed_forward(here, *match.groups())
    return _block_tensor(here, rest)


def _block_tensor(here: dict[str, np.ndarray], rest: str) -> np.ndarray:
    """Attention, norms and the router of one layer."""
    vectors = {
        "input_layernorm.weight": "attn_norm", "post_attention_layernorm.weight": "ffn_norm",
        "self_attn.q_a_layernorm.weight": "mla.q_norm", "self_attn.kv_a_layernorm.weight": "mla.kv_norm",
        "self_attn.q_a_proj.bias": "mla.q_a_bias", "self_attn.kv_a_proj_with_mqa.bias": "mla.kv_a_bias",
        "self_attn.o_proj.bias": "mla.o_bias",
    }  # fmt: skip
    patterns = {
        "self_attn.q_a_proj.weight": ("mla.q_a", "i o -> o i"),
        "self_attn.q_b_proj.weight": ("mla.q_b", "i head c -> (head c) i"),
        "self_attn.q_proj.weight": ("mla.q_b", "i head c -> (head c) i"),
        "self_attn.kv_a_proj_with_mqa.weight": ("mla.kv_a", "i o -> o i"),
        "self_attn.kv_b_proj.weight": ("mla.kv_b", "i head c -> (head c) i"),
        "self_attn.o_proj.weight": ("mla.o", "head c o -> o (head c)"),
        "mlp.gate.weight": ("ffn.router", "i o -> o i"),
    }
    if rest in vectors:
        return here[vectors[rest]]
    path, pattern = patterns[rest]
    return rearrange(here[path], pattern)


def _feed_forward(here: dict[str, np.ndarray], owner: str, part: str) -> np.ndarray:
    """A dense layer's, an expert's or the shared experts' matrix."""
    path = "ffn.shared." if owner.startswith("shared") else "ffn."
    both = here[path + ("down" if part == "down" else "gate_up")]
    if owner.startswith("experts"):
        both = both[int(owner.split(".")[1])]
    if part == "down":
        return both.T
    return np.split(both, 2, -1)[part == "up"].T


def read_raw(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file by the letter of the format."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__", {"format": "pt"}) == {"format": "pt"}
    body, found = data[8 + length :], {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        found[name] = np.frombuffer(body[first:end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return found


def write_raw(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        end = len(body) + value.nbytes
        header[name] = {"dtype": HF_NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [len(body), end]}
        body += np.ascontiguousarray(value).tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def read_raw_directory(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a directory."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= read_raw(path)
    return found


def edit_config(directory: pathlib.Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
    """Changes fields of `config.json`."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))


def decode(value: np.ndarray, scale: np.ndarray | None, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """A raw tensor's values in float32, scales applied."""
    value = value.astype(np.float32)
    if scale is None:
        return value
    spread = scale.astype(np.float32).repeat(block[0], 0).repeat(block[1], 1)
    return value * spread[: value.shape[0], : value.shape[1]]


@st.composite
def configs(draw) -> ModelConfig:
    """Small models with and without every part that may be absent."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return model_config(
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        q_lora_rank=draw(st.sampled_from([None, 5])),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        n_shared_experts=draw(st.integers(0, 2)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        v_head_dim=draw(st.sampled_from([3, 4])),
    )
