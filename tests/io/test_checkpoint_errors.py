"""Everything that can be wrong with a checkpoint or a save, one error each, and all at once."""

from __future__ import annotations

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from dsv3 import tree
from dsv3.pretrained import load_pretrained, save_pretrained
from tests.io.checkpoints import Model, edit_config, random_model, read_raw, read_raw_directory, write_raw
from tests.small import model_config

CFG = model_config(num_nextn_predict_layers=1)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"
KV_A = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
SCALES = "model.layers.0.mlp.down_proj.weight_scale_inv"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A model in every form, in one file and in several."""
    folder, model = tmp_path_factory.mktemp("saved"), random_model(CFG)
    for form in ("float32", "bfloat16", "float8"):
        save_pretrained(folder / form, *model, dtype=form)
    save_pretrained(folder / "shards", *model, max_shard_bytes=5000)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def damaged(saved, tmp_path):
    """Copies a checkpoint and changes its tensors: `damaged(form, {name: value, or None to drop})`."""

    def make(form: str, changes: dict) -> pathlib.Path:
        out = tmp_path / "out"
        out.mkdir()
        tensors = read_raw(saved[form] / SINGLE) | changes
        write_raw(out / SINGLE, {name: value for name, value in tensors.items() if value is not None})
        (out / "config.json").write_bytes((saved[form] / "config.json").read_bytes())
        return out

    return make


def message(directory, error=ValueError, **options) -> str:
    with pytest.raises(error) as e:
        load_pretrained(directory, **options)
    assert str(e.value).startswith("load_pretrained: ")
    return str(e.value)


def poisoned(saved, form: str, name: str, value: float) -> np.ndarray:
    """A tensor with one value replaced."""
    tensor = read_raw(saved[form] / SINGLE)[name].copy()
    tensor.flat[tensor.size // 2] = value
    return tensor


def test_missing(damaged):
    text = message(damaged("float32", {NORM: None, UP: None}))
    assert text.splitlines()[0].endswith("out: 2 missing")
    assert f"  missing: {NORM} (12,)" in text and f"  missing: {UP} (5, 12)" in text


def test_unexpected(damaged):
    text = message(damaged("float32", {"model.layers.0.extra": np.ones((2, 3), np.float32)}))
    assert text.endswith("out: 1 unexpected\n  unexpected: model.layers.0.extra F32 (2, 3)")


def test_scales_without_their_tensor_are_unexpected(damaged):
    text = message(damaged("bfloat16", {SCALES: np.ones((1, 1), np.float32)}))
    assert f"1 unexpected\n  unexpected: {SCALES} F32 (1, 1)" in text


def test_misshapen(damaged):
    text = message(damaged("float32", {KV_A: np.zeros((12, 8), np.float32)}))
    assert text.endswith(f"1 misshapen\n  misshapen: {KV_A} has shape (12, 8), want (8, 12)")


def test_transposed_vocabulary_is_misshapen(damaged):
    assert "1 misshapen" in message(damaged("float32", {"lm_head.weight": np.zeros((12, 40), np.float32)}))


def test_wrong_dtype(damaged):
    text = message(damaged("float32", {KV_A: np.zeros((8, 12), np.int32), NORM: np.zeros(12, ml_dtypes.float8_e4m3fn)}))
    assert f"  wrong dtype: {KV_A} is I32, want F32, BF16, F16 or F8_E4M3" in text
    assert f"  wrong dtype: {NORM} is F8_E4M3, want F32, BF16, F16" in text
    assert "2 wrong dtype" in text


def test_fp8_without_scales(damaged):
    text = message(damaged("float8", {KV_A + "_scale_inv": None}))
    assert text.endswith(f"1 without scales\n  without scales: {KV_A} is F8_E4M3, but there is no {KV_A}_scale_inv (1, 1)")


def test_scales_of_a_wrong_dtype_or_shape(damaged):
    scales = {KV_A + "_scale_inv": np.ones((1, 1), np.int32), SCALES: np.ones((2, 1), np.float32)}
    text = message(damaged("float8", scales))
    assert f"wrong dtype: {KV_A}_scale_inv is I32, want F32 or F8_E8M0" in text
    assert f"misshapen: {SCALES} has shape (2, 1), want (1, 1) for blocks of 128×128" in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_finite(damaged, saved, form, dtype, value):
    names = [NORM, UP, "model.layers.1.mlp.gate.e_score_correction_bias"]
    text = message(damaged(form, {name: poisoned(saved, form, name, value) for name in names}), dtype=dtype)
    assert "3 non-finite" in text
    assert all(f"non-finite: {name} holds NaN or infinity in" in text for name in names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_finite_in_fp8_or_its_scales(damaged, saved, dtype):
    bad = {KV_A: poisoned(saved, "float8", KV_A, np.nan), SCALES: np.full((1, 1), np.inf, np.float32)}
    text = message(damaged("float8", bad), dtype=dtype)
    assert "2 non-finite" in text and KV_A in text and SCALES.removesuffix("_scale_inv") in text


def test_too_large_for_bfloat16(damaged, saved):
    out = damaged("float32", {NORM: poisoned(saved, "float32", NORM, np.finfo(np.float32).max)})
    load_pretrained(out, dtype="float32")
    assert f"non-finite: {NORM} holds NaN or infinity in bfloat16" in message(out, dtype="bfloat16")


def test_all_faults_are_one_error(damaged):
    changes = {f"model.x{i}": np.ones(1, np.float32) for i in range(50)} | {KV_A + "_scale_inv": None}
    changes |= {NORM: None, UP: np.zeros((3, 3), ml_dtypes.float8_e4m3fn), "lm_head.weight": np.zeros((40, 12), np.int32)}
    lines = message(damaged("float8", changes)).splitlines()
    for count in ("50 unexpected", "1 missing", "1 misshapen", "1 wrong dtype", "1 without scales"):
        assert count in lines[0]
    for kind in ("missing", "misshapen", "wrong dtype", "without scales"):
        assert sum(line.startswith(f"  {kind}: ") for line in lines) == 1
    assert lines[-2].startswith("  unexpected: model.x") and lines[-1] == "  unexpected: and 34 more"
    assert len(lines) < 25


def test_faults_are_found_before_anything_is_allocated(damaged, monkeypatch):
    out = damaged("float32", {NORM: None})
    monkeypatch.setattr("dsv3.io.reader.allocate", lambda *_: pytest.fail("allocated"))
    message(out)


def test_cut_off_file(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved["float32"] / "config.json").read_bytes())
    (tmp_path / SINGLE).write_bytes((saved["float32"] / SINGLE).read_bytes()[:-7])
    text = message(tmp_path)
    assert f"1 unreadable file\n  unreadable file: {SINGLE} is cut off: it has" in text


def copy_shards(saved, tmp_path) -> tuple[pathlib.Path, list[str]]:
    out = tmp_path / "out"
    out.mkdir()
    for path in saved["shards"].iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out, sorted(path.name for path in out.glob("*.safetensors"))


def test_shards_missing_cut_off_and_unlike_the_index(saved, tmp_path):
    out, files = copy_shards(saved, tmp_path)
    index = json.loads((out / INDEX).read_text())
    count = sum(file == files[0] for file in index["weight_map"].values())
    (out / files[0]).unlink()
    (out / files[1]).write_bytes((out / files[1]).read_bytes()[:40])
    raw = read_raw(out / files[2])
    dropped, *_ = raw
    raw["surplus"] = raw.pop(dropped)
    write_raw(out / files[2], raw)
    lines = message(out).splitlines()
    assert lines[0].endswith("1 missing file, 1 unreadable file, 1 missing, 1 unexpected")
    assert f"  missing file: {files[0]}, where the index has {count} tensors" in lines
    assert any(line.startswith(f"  unreadable file: {files[1]} ") for line in lines)
    assert f"  missing: {dropped} is not in {files[2]}, where the index has it" in lines
    assert f"  unexpected: surplus in {files[2]} is not there in the index" in lines


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 3}}'])
def test_bad_index(saved, tmp_path, text):
    out, _ = copy_shards(saved, tmp_path)
    (out / INDEX).write_text(text)
    assert "is no index: want a JSON object whose `weight_map` maps tensors to files" in message(out)


def test_folders_that_hold_no_checkpoint(saved, tmp_path):
    assert f"there is no directory {tmp_path / 'none'}" in message(tmp_path / "none", FileNotFoundError)
    assert "holds no config.json" in message(tmp_path, FileNotFoundError)
    assert "there is no directory" in message(saved["float32"] / SINGLE, FileNotFoundError)
    (tmp_path / "config.json").write_bytes((saved["float32"] / "config.json").read_bytes())
    assert f"holds no weights: neither {SINGLE} nor {INDEX}" in message(tmp_path, FileNotFoundError)
    (tmp_path / SINGLE).write_bytes(b"")
    (tmp_path / INDEX).write_text("{}")
    assert f"holds both {SINGLE} and {INDEX}" in message(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "wanted"),
    [
        ("fp8", "`quantization_config` is 'fp8', want an object"),
        ({"quant_method": "awq"}, "`quantization_config.quant_method` is 'awq', want 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "`quantization_config.weight_block_size` is None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"`quantization_config.weight_block_size` is [128]"),
    ],
)
def test_other_quantisation(damaged, quantization, wanted):
    out = damaged("float8", {})
    edit_config(out, quantization_config=quantization)
    assert wanted in message(out)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float16", tf.int32])
def test_dtype_that_parameters_cannot_have(saved, dtype):
    assert "`dtype` is '" in message(saved["float32"], dtype=dtype)


def test_config_of_another_model_is_named(damaged):
    out = damaged("float32", {})
    edit_config(out, n_routed_experts=9, hidden_size=10)
    text = message(out)
    assert "missing" in text and "misshapen" in text and len(text.splitlines()) < 25


# Saving: nothing is written, the old directory stays as it was.


@pytest.fixture
def old(saved, tmp_path):
    out, _ = copy_shards(saved, tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    yield out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def refused(*args, error=ValueError, **options) -> str:
    with pytest.raises(error) as e:
        save_pretrained(*args, **options)
    assert str(e.value).startswith("save_pretrained: ")
    return str(e.value)


@pytest.mark.parametrize(("value", "form"), [(np.nan, "float32"), (np.inf, "float8"), (3.4e38, "bfloat16")])
def test_save_of_what_is_not_finite(old, value, form):
    model = random_model(CFG)
    down = model.params.moe.ffn.down.numpy()
    down[1, 4, 3, 2] = value
    moe = model.params.moe
    params = model.params._replace(moe=moe._replace(ffn=moe.ffn._replace(down=tf.constant(down))))
    text = refused(old, *model._replace(params=params), dtype=form)
    assert "1 non-finite\n  non-finite: model.layers.2.mlp.experts.4.down_proj.weight would hold NaN or infinity" in text


def test_save_of_parameters_that_are_not_the_configs(old):
    model = random_model(CFG)
    params, router = model.params, model.router
    assert "`norm` has shape (7,), want (12,)" in refused(old, CFG, params._replace(norm=tf.zeros(7)), router)
    assert "`norm` has dtype int32, want float32 or bfloat16" in refused(
        old, CFG, params._replace(norm=tf.zeros(12, tf.int32)), router
    )
    assert "does not have the expected structure" in refused(old, CFG, params._replace(mtp=()), router)
    assert "`router.moe` has shape (1, 6), want (2, 6)" in refused(old, CFG, params, router._replace(moe=router.moe[:1]))
    assert "`router` is a EagerTensor, want RouterState" in refused(old, CFG, params, router.moe)


def test_save_with_bad_arguments(old):
    model = random_model(CFG)
    assert "`dtype` is 'int8', want one of 'bfloat16', 'float32', 'float8'" in refused(old, *model, dtype="int8")
    assert "`max_shard_bytes` is 0, want a positive integer" in refused(old, *model, max_shard_bytes=0)
    assert "`max_shard_bytes` is '5GB', want a positive integer" in refused(old, *model, max_shard_bytes="5GB")
    assert "`extra_files` is one path, want a list" in refused(old, *model, extra_files="x.json")
    text = refused(old, *model, extra_files=["no.json"], error=FileNotFoundError)
    assert "extra file no.json is neither there nor in" in text
    assert "extra file config.json: the save itself writes one so named" in refused(old, *model, extra_files=["config.json"])


def test_save_over_other_files(tmp_path):
    for name in ("notes.txt", "tokenizer.json", "config.json"):
        (tmp_path / name).write_text("mine")
    text = refused(tmp_path, *random_model(CFG), extra_files=["tokenizer.json"])
    assert "holds files that a save would remove: notes.txt; name what is to stay in `extra_files`" in text
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("notes.txt", "tokenizer.json", "config.json"), "mine"
    )


def test_save_to_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is no directory" in refused(tmp_path / "file", *random_model(CFG))
    text = refused(tmp_path / "file" / "below", *random_model(CFG))
    assert "below: a file is in the way" in text and "\n" not in text


def test_save_to_a_mount_point_or_the_current_directory(old, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: pathlib.Path(path) == old)
        patch.setattr("dsv3.io.writer.encode_header", lambda *_: pytest.fail("written"))
        assert "out: it is a mount point, want a folder below it" in refused(old, *random_model(CFG))
    monkeypatch.chdir(old)
    for name in (".", old):
        assert "it is the current directory, want another" in refused(name, *random_model(CFG))
    assert os.path.samefile(".", old)


def test_save_without_space(old, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "bytes, 1,000 are free" in refused(old, *random_model(CFG))


@pytest.mark.parametrize("broken", ["writer.encode_header", "atomic._exchange", "writer.write_synced"])
def test_failure_in_the_middle_leaves_the_old_directory(old, monkeypatch, broken):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(f"dsv3.io.{broken}", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        save_pretrained(old, *random_model(CFG, 1), max_shard_bytes=9000)


def test_failed_exchange_without_renameat2_is_taken_back(old, monkeypatch):
    real = os.rename
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())

    def rename(source, target):
        if ".saving-" in str(source):
            raise OSError("the disk is gone")
        real(source, target)

    monkeypatch.setattr("os.rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        save_pretrained(old, *random_model(CFG, 1))


def test_exchange_without_renameat2(saved, tmp_path, monkeypatch):
    out, _ = copy_shards(saved, tmp_path)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    model = random_model(CFG, 1)
    save_pretrained(out, *model)
    assert set(read_raw_directory(out)) and [path.name for path in tmp_path.iterdir()] == ["out"]
    loaded = Model(*load_pretrained(out, dtype="float32"))
    assert all((a.numpy() == b.numpy()).all() for a, b in zip(tree.flatten(loaded.params), tree.flatten(model.params)))
