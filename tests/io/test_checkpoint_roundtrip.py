"""Saved and loaded again: every stored form against the oracle, every form that is read, sharding, MTP."""

from __future__ import annotations

import json
import tempfile
import warnings

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3 import tree
from dsv3.io.names import expected_tensors
from dsv3.ops.fp8 import fp8_quantize
from dsv3.pretrained import load_pretrained, save_pretrained
from tests.compare import PLAIN
from tests.io.checkpoints import (
    HF_NAMES,
    Model,
    arrays,
    assert_same,
    configs,
    decode,
    edit_config,
    oracle,
    random_model,
    read_raw,
    read_raw_directory,
    write_raw,
)
from tests.small import model_config, random_tokens

CFG = model_config()
SINGLE = "model.safetensors"


def cast(model: Model, dtype: str) -> Model:
    return model._replace(params=tree.map_leaves(lambda leaf: tf.cast(leaf, dtype), model.params))


def save(directory, model: Model, **options) -> None:
    save_pretrained(directory, *model, **options)


def load(directory, dtype="float32") -> Model:
    """Loads without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Model(*load_pretrained(directory, dtype=dtype))


@settings(max_examples=12)
@given(cfg=configs(), shard=st.sampled_from([1, 700, 10**9]), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_float_forms_come_back_exactly(cfg, shard, dtype):
    model = cast(random_model(cfg), dtype)
    with tempfile.TemporaryDirectory() as folder:
        save(folder + "/model", model, max_shard_bytes=shard)
        assert_same(load(folder + "/model", dtype), model)


@settings(max_examples=4)
@given(cfg=configs())
def test_float8_form_of_any_config(cfg):
    model = random_model(cfg)
    with tempfile.TemporaryDirectory() as folder:
        save(folder + "/model", model, dtype="float8")
        got = arrays(load(folder + "/model"))
    want = arrays(model)
    for path in want:
        bound = np.maximum(np.abs(want[path]) / 16, np.abs(want[path]).max(initial=0) * 2.0**-18)
        assert (np.abs(got[path] - want[path]) <= bound * 1.001).all(), path


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float8"])
def test_every_stored_tensor_is_right(tmp_path, form):
    model = random_model(CFG)
    save(tmp_path / "out", model, dtype=form)
    raw = read_raw(tmp_path / "out" / SINGLE)
    expected = expected_tensors(dsv3.model_specs(CFG), CFG, form)
    assert {name: (value.shape, HF_NAMES[value.dtype]) for name, value in raw.items()} == expected
    for name, value in raw.items():
        if name.endswith("_scale_inv"):
            continue
        want = oracle(model, name)
        if value.dtype == ml_dtypes.float8_e4m3fn:
            quantized = fp8_quantize(want)
            np.testing.assert_array_equal(value.view(np.uint8), quantized.values.numpy().view(np.uint8), err_msg=name)
            np.testing.assert_array_equal(raw[name + "_scale_inv"], quantized.scale_inv, err_msg=name)
        else:
            np.testing.assert_array_equal(value, want.astype(value.dtype), err_msg=name)
    # And loaded: the raw file, decoded here, where the oracle says.
    loaded = load(tmp_path / "out")
    for name, value in raw.items():
        if not name.endswith("_scale_inv"):
            np.testing.assert_array_equal(oracle(loaded, name), decode(value, raw.get(name + "_scale_inv")), err_msg=name)


def test_float8_with_several_ragged_blocks(tmp_path):
    cfg = model_config(hidden_size=136, kv_lora_rank=130, moe_intermediate_size=129, num_nextn_predict_layers=0)
    model = random_model(cfg)
    with pytest.warns(UserWarning, match="misreads .* FP8 tensors .* such as model.layers.0.self_attn.q_a_proj.weight"):
        save(tmp_path / "out", model, dtype=tf.dtypes.experimental.float8_e4m3fn)
    raw, loaded = read_raw(tmp_path / "out" / SINGLE), load(tmp_path / "out")
    assert raw["model.layers.2.mlp.experts.5.up_proj.weight_scale_inv"].shape == (2, 2)
    assert raw["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    for name, value in raw.items():
        if not name.endswith("_scale_inv"):
            np.testing.assert_array_equal(oracle(loaded, name), decode(value, raw.get(name + "_scale_inv")), err_msg=name)
    # Quantised again from the float32 values, no FP8 value changes.
    with pytest.warns(UserWarning):
        save(tmp_path / "again", loaded, dtype="float8")
    again = read_raw(tmp_path / "again" / SINGLE)
    for name, value in raw.items():
        if value.dtype == ml_dtypes.float8_e4m3fn:
            np.testing.assert_array_equal(again[name].view(np.uint8), value.view(np.uint8), err_msg=name)


@pytest.mark.filterwarnings("ignore:.*transformers 5 misreads")
def test_strips_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3.io.leaves.STRIP", 300)
    cfg = model_config(hidden_size=136, moe_intermediate_size=129, num_nextn_predict_layers=1)
    model = random_model(cfg)
    for form in ("float32", "float8"):
        save(tmp_path / form, model, dtype=form)
    monkeypatch.undo()
    assert_same(load(tmp_path / "float32"), model)
    whole = load(tmp_path / "float8")
    save(tmp_path / "whole", model, dtype="float8")
    assert (tmp_path / "whole" / SINGLE).read_bytes() == (tmp_path / "float8" / SINGLE).read_bytes()
    monkeypatch.setattr("dsv3.io.leaves.STRIP", 300)
    assert_same(load(tmp_path / "float32"), model)
    assert_same(load(tmp_path / "float8"), whole)


@pytest.mark.parametrize("block", [(128, 128), (4, 5), (1, 128)])
@pytest.mark.parametrize("scale", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_reads_power_of_two_scales_and_other_blocks(tmp_path, block, scale):
    model = random_model(CFG)
    save(tmp_path / "out", model, dtype="bfloat16")
    raw = read_raw(tmp_path / "out" / SINGLE)
    for name in [name for name in raw if name.endswith("proj.weight") and "eh_proj" not in name]:
        quantized = fp8_quantize(oracle(model, name), block=block, scale_kind="power_of_two")
        raw[name] = quantized.values.numpy()
        raw[name + "_scale_inv"] = quantized.scale_inv.numpy().astype(scale)
    write_raw(tmp_path / "out" / SINGLE, raw)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block), "scale_fmt": "ue8m0"}
    edit_config(tmp_path / "out", quantization_config=quantization)
    for dtype in ("float32", "bfloat16"):
        loaded = load(tmp_path / "out", dtype)
        for name, value in raw.items():
            if not name.endswith("_scale_inv"):
                want = decode(value, raw.get(name + "_scale_inv"), block)
                target = np.float32 if name.endswith("correction_bias") else dtype
                np.testing.assert_array_equal(oracle(loaded, name), want.astype(target).astype(np.float32), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_mixed_dtypes_in_shards(tmp_path, dtype):
    model = random_model(CFG)
    save(tmp_path / "out", model, dtype="float32")
    raw = read_raw(tmp_path / "out" / SINGLE)
    kinds = [np.float16, ml_dtypes.bfloat16, np.float32]
    stored = {name: value.astype(kinds[i % 3]) for i, (name, value) in enumerate(raw.items())}
    stored |= {name: stored[name] for name in raw}
    shards = {f"part-{k}.safetensors": [name for i, name in enumerate(stored) if i // 7 % 3 == k] for k in range(3)}
    for file, names in shards.items():
        write_raw(tmp_path / "out" / file, {name: stored[name] for name in names})
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "out" / SINGLE).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies of unlike dtype differ in their last bits
        loaded = Model(*load_pretrained(tmp_path / "out", dtype=dtype))
    for name, value in stored.items():
        if ".embed_tokens" not in name[5:] and "shared_head.head" not in name:
            target = np.float32 if name.endswith("correction_bias") else dtype
            want = value.astype(np.float32).astype(target).astype(np.float32)
            np.testing.assert_array_equal(oracle(loaded, name), want, err_msg=name)


def test_loaded_parameters_outlive_their_making_and_compute(tmp_path):
    model = random_model(CFG)
    save(tmp_path / "out", model)
    loaded = load(tmp_path / "out")
    tokens = random_tokens(CFG, 2, 5)
    want = dsv3.model_apply(model.params, model.router, tokens, cfg=CFG, policy=PLAIN).logits
    got = dsv3.model_apply(loaded.params, loaded.router, tokens, cfg=loaded.cfg, policy=PLAIN).logits
    np.testing.assert_array_equal(got, want)
    doubled = tf.function(lambda params: tree.map_leaves(lambda leaf: leaf + leaf, params), jit_compile=True)(loaded.params)
    np.testing.assert_array_equal(doubled.moe.ffn.down, 2 * model.params.moe.ffn.down)
    assert isinstance(loaded.params, dsv3.ModelParams) and isinstance(loaded.router, dsv3.RouterState)


def test_default_dtypes(tmp_path):
    save(tmp_path / "f", random_model(CFG))
    save(tmp_path / "b", cast(random_model(CFG), "bfloat16"))
    for folder, stored in (("f", np.float32), ("b", ml_dtypes.bfloat16)):
        assert read_raw(tmp_path / folder / SINGLE)["model.norm.weight"].dtype == stored
    assert load_pretrained(tmp_path / "f")[1].norm.dtype == tf.bfloat16
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and "quantization_config" not in config


def test_float8_config_says_so(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "out", random_model(CFG), dtype="float8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip


def test_variables_and_arrays_can_be_saved(tmp_path):
    model = random_model(CFG)
    as_variables = model._replace(params=tree.map_leaves(tf.Variable, model.params))
    as_arrays = Model(CFG, *tree.map_leaves(lambda leaf: leaf.numpy(), (model.params, model.router)))
    for name, other in (("variables", as_variables), ("arrays", as_arrays)):
        save(tmp_path / name, other)
        assert_same(load(tmp_path / name), model)


@pytest.mark.parametrize("form", ["float32", "float8"])
def test_shards_are_bounded_named_and_indexed(tmp_path, form):
    limit = 3000
    save(tmp_path / "out", random_model(CFG), dtype=form, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]
    total = 0
    for file in files:
        tensors = read_raw(tmp_path / "out" / file)
        sizes = [value.nbytes for value in tensors.values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        assert {index["weight_map"].pop(name) for name in tensors} == {file}
        assert all(name + "_scale_inv" in tensors for name, v in tensors.items() if v.dtype == ml_dtypes.float8_e4m3fn)
        total += sum(sizes)
    assert index == {"metadata": {"total_size": total}, "weight_map": {}}


def test_extra_files_are_put_beside_and_kept_by_name(tmp_path):
    model, out = random_model(CFG), tmp_path / "out"
    (tmp_path / "tokenizer.json").write_text("{}")
    save(out, model, extra_files=[tmp_path / "tokenizer.json"])
    (out / "notes.txt").write_text("kept")
    save(out, model, extra_files=["notes.txt", tmp_path / "tokenizer.json"], max_shard_bytes=3000)
    assert (out / "notes.txt").read_text() == "kept" and (out / "tokenizer.json").read_text() == "{}"
    assert not (out / SINGLE).exists()
    assert_same(load(out), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer.json"]


def test_a_bare_name_is_the_old_directorys_file(tmp_path, monkeypatch):
    model, out = random_model(CFG), tmp_path / "out"
    (tmp_path / "notes.txt").write_text("of the current directory")
    monkeypatch.chdir(tmp_path)
    save(out, model, extra_files=["notes.txt"])
    assert (out / "notes.txt").read_text() == "of the current directory", "where there is no old one"
    (out / "notes.txt").write_text("old")
    save(out, model, extra_files=["notes.txt"])
    assert (out / "notes.txt").read_text() == "old"
    save(out, model, extra_files=["./notes.txt"])
    assert (out / "notes.txt").read_text() == "of the current directory"


def test_saves_into_new_folders_empty_folders_and_links(tmp_path):
    model = random_model(CFG)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("a/b/new", "empty", "link"):
        save(tmp_path / name, model)
        assert_same(load(tmp_path / name), model)
    assert (tmp_path / "link").is_symlink()


def test_copies_may_be_absent(tmp_path):
    for cfg in (CFG, model_config(tie_word_embeddings=True)):
        model = random_model(cfg)
        save(tmp_path / "out", model)
        raw = read_raw(tmp_path / "out" / SINGLE)
        copies = [name for name in raw if name.endswith(("embed_tokens.weight", "head.weight")) and ".layers." in name]
        assert len(copies) == 4
        write_raw(tmp_path / "out" / SINGLE, {name: value for name, value in raw.items() if name not in copies})
        assert_same(load(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.4.shared_head.head.weight"])
def test_copy_that_differs_is_a_warning(tmp_path, name):
    model = random_model(CFG)
    save(tmp_path / "out", model)
    raw = read_raw(tmp_path / "out" / SINGLE)
    write_raw(tmp_path / "out" / SINGLE, raw | {name: raw[name] + np.float32(1)})
    with pytest.warns(UserWarning, match=f"{name} differs from the tensor that it should repeat"):
        loaded = Model(*load_pretrained(tmp_path / "out", dtype="float32"))
    assert_same(loaded, model)


def test_tied_head_that_is_stored_is_compared(tmp_path):
    model = random_model(model_config(tie_word_embeddings=True))
    save(tmp_path / "out", model)
    raw = read_raw(tmp_path / "out" / SINGLE)
    assert "lm_head.weight" not in raw
    write_raw(tmp_path / "out" / SINGLE, raw | {"lm_head.weight": raw["model.embed_tokens.weight"]})
    assert_same(load(tmp_path / "out"), model)
    write_raw(tmp_path / "out" / SINGLE, raw | {"lm_head.weight": -raw["model.embed_tokens.weight"]})
    with pytest.warns(UserWarning, match="lm_head.weight differs"):
        load_pretrained(tmp_path / "out")


def drop_layers(directory, first: int) -> None:
    raw = read_raw(directory / SINGLE)
    kept = {name: v for name, v in raw.items() if ".layers." not in name or int(name.split(".")[2]) < first}
    write_raw(directory / SINGLE, kept)


def test_transformers_leaves_mtp_out_and_yet_claims_it(tmp_path):
    model = random_model(CFG)
    save(tmp_path / "out", model)
    drop_layers(tmp_path / "out", CFG.num_layers)
    edit_config(tmp_path / "out", transformers_version="5.23.0")
    with pytest.warns(UserWarning, match=r"claims 2 MTP module\(s\) .* but transformers saved none: loaded without"):
        cfg, params, router = load_pretrained(tmp_path / "out", dtype="float32")
    assert cfg == CFG.replace(num_mtp_layers=0) and params.mtp == () and router.mtp.shape == (0, 6)
    np.testing.assert_array_equal(params.head, model.params.head)
    save_pretrained(tmp_path / "again", cfg, params, router)
    load(tmp_path / "again")


def test_way_out_of_absent_mtp(tmp_path):
    model = random_model(CFG)
    save(tmp_path / "out", model)
    drop_layers(tmp_path / "out", CFG.num_layers)
    edit_config(tmp_path / "out", transformers_version="4.46.3")
    with pytest.raises(ValueError, match=r"(?s)1 missing.*layers.3 and above.*set `num_nextn_predict_layers` to 0"):
        load_pretrained(tmp_path / "out")
    edit_config(tmp_path / "out", num_nextn_predict_layers=0)
    assert load(tmp_path / "out").cfg.num_mtp_layers == 0


def test_config_without_mtp_leaves_stored_modules_out(tmp_path):
    model = random_model(CFG)
    save(tmp_path / "out", model)
    drop_layers(tmp_path / "out", CFG.num_layers + 1)
    edit_config(tmp_path / "out", num_nextn_predict_layers=0)
    with pytest.warns(UserWarning, match=r"left out stored layers \[3\]"):
        assert load_pretrained(tmp_path / "out")[0].num_mtp_layers == 0


def test_derived_and_empty_tensors_are_no_surprise(tmp_path):
    model = random_model(model_config(n_shared_experts=0))
    save(tmp_path / "out", model)
    raw = read_raw(tmp_path / "out" / SINGLE)
    raw["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    raw["model.layers.1.mlp.shared_experts.up_proj.weight"] = np.ones((0, 12), np.float32)
    write_raw(tmp_path / "out" / SINGLE, raw)
    assert_same(load(tmp_path / "out"), model)


def test_sharding_changes_no_tensor(tmp_path):
    save(tmp_path / "one", random_model(CFG), dtype="float8")
    save(tmp_path / "many", random_model(CFG), dtype="float8", max_shard_bytes=2000)
    one, many = read_raw_directory(tmp_path / "one"), read_raw_directory(tmp_path / "many")
    assert set(one) == set(many)
    for name, value in one.items():
        np.testing.assert_array_equal(value.view(np.uint8), many[name].view(np.uint8))
