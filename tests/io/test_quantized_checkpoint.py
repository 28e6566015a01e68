"""Quantised parameters and checkpoints: FP8 tensors come and go bit by bit, everything else is quantised on the way."""

import json
import pathlib
import warnings

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.io import leaves
from dsv3.io.names import checkpoint_pieces
from dsv3.nn.quantized import params_dict
from dsv3.ops.quantized import QuantizedWeight
from tests.io.checkpoints import Model, edit_config, oracle, random_model, read_raw_directory
from tests.small import model_config

# Parts of gate_up and heads that end within a block of 128.
RAGGED = {
    "hidden_size": 150, "moe_intermediate_size": 130, "q_lora_rank": 140, "kv_lora_rank": 136, "qk_nope_head_dim": 70,
    "v_head_dim": 66, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained. on a CPU transformers 5 misreads")


def same(got, want):
    got, want = tree.to_dict(got), tree.to_dict(want)
    assert list(got) == list(want)
    for path, leaf in want.items():
        assert got[path].dtype == leaf.dtype, path
        pair = (np.asarray(tf.cast(t, tf.float32) if t.dtype == tf.bfloat16 else t) for t in (got[path], leaf))
        np.testing.assert_array_equal(*pair, err_msg=path)


@pytest.fixture(scope="module", params=["small", "ragged"])
def saved(request, tmp_path_factory):
    """(a model of bfloat16 values, its directories by dtype)."""
    cfg = model_config(**(RAGGED if request.param == "ragged" else {}))
    model = random_model(cfg, dtype="bfloat16")
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' reading of sizes that are no multiples of 128
        for form in ("bfloat16", "float8"):
            dsv3.save_pretrained(folder / form, *model, dtype=form)
    return model, folder


def test_fp8_is_taken_and_written_bit_by_bit(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(leaves, "STRIP", 500)
    model, folder = saved
    loaded = Model(*dsv3.load_pretrained(folder / "float8", dtype="float8"))
    tensors, held = read_raw_directory(folder / "float8"), params_dict(loaded.params)
    for piece in checkpoint_pieces(dsv3.model_specs(model.cfg), model.cfg):
        if not piece.fp8:
            continue
        leaf = held[piece.leaf]
        values, scale = (np.asarray(t)[piece.index] for t in leaf)
        columns, part = slice(*piece.columns or (None,)), int(bool(piece.columns and piece.columns[0]))
        flat = values.reshape(piece.shape[1], -1)[:, columns]
        np.testing.assert_array_equal(flat.T, tensors[piece.name].view(np.uint8), err_msg=piece.name)
        np.testing.assert_array_equal(scale[:, part].T, tensors[piece.scale_name], err_msg=piece.name)
    dsv3.save_pretrained(tmp_path / "again", *loaded)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "float8" / name).read_bytes()


def test_other_tensors_are_quantised_as_quantize_params_does(saved, monkeypatch):
    """However few rows are read at a time."""
    monkeypatch.setattr(leaves, "STRIP", 500)
    model, folder = saved
    for dtype, kind in (("float8", "fp8"), ("int8", "int8")):
        loaded = dsv3.load_pretrained(folder / "bfloat16", dtype=dtype)[1]
        same(loaded, dsv3.quantize_params(model.params, model.cfg, kind=kind, fuse=False))
    same(dsv3.load_pretrained(folder / "float8", dtype="float8")[1],
         dsv3.quantize_params(model.params, model.cfg, fuse=False))  # fmt: skip


def test_decoded_on_the_way_out(saved, tmp_path, monkeypatch):
    """However few rows are written at a time."""
    monkeypatch.setattr(leaves, "STRIP", 500)
    model, folder = saved
    for kind in ("fp8", "int8"):
        params = dsv3.quantize_params(model.params, model.cfg, kind=kind, fuse=False)
        out = tmp_path / kind
        dsv3.save_pretrained(out, model.cfg, params, model.router, dtype="float32")
        whole = dsv3.dequantize_params(params, model.cfg, dtype="float32", fuse=False)
        decoded = Model(model.cfg, whole, model.router)
        for name, values in read_raw_directory(out).items():
            np.testing.assert_array_equal(values, oracle(decoded, name), err_msg=name)
    dsv3.save_pretrained(tmp_path / "default", model.cfg, params, model.router)
    assert json.loads((tmp_path / "default" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {str(t.dtype) for t in read_raw_directory(tmp_path / "default").values()} == {"bfloat16", "float32"}


def test_strips_of_a_save_change_nothing(saved, tmp_path, monkeypatch):
    """Floating parameters become the same FP8 file, however few rows are written at a time."""
    model, folder = saved
    monkeypatch.setattr(leaves, "STRIP", 500)
    dsv3.save_pretrained(tmp_path / "again", *model, dtype="float8")
    names = "model.safetensors", "config.json"
    assert all((tmp_path / "again" / name).read_bytes() == (folder / "float8" / name).read_bytes() for name in names)


def test_a_checkpoint_in_other_blocks_is_no_float8(saved, tmp_path):
    model, folder = saved
    out = tmp_path / "blocks"
    dsv3.save_pretrained(out, *model, dtype="float8")
    edit_config(out, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    with pytest.raises(ValueError, match="load_pretrained: `dtype` is 'float8', want 'bfloat16', 'float32' or 'int8'"):
        dsv3.load_pretrained(out, dtype="float8")


def test_refusals_of_a_save_name_the_leaf(saved, tmp_path: pathlib.Path):
    model, _ = saved
    params = dsv3.quantize_params(model.params, model.cfg, fuse=False)
    good = QuantizedWeight(params.norm, tf.ones([1])), params.dense.mla.o
    cases = {
        "`norm` is quantised, want float32 or bfloat16": params._replace(norm=good[0]),
        "`dense.mla.o` has values of dtype uint16": _with_o(params, good[1]._replace(values=tf.cast(good[1][0], tf.uint16))),
        "`dense.mla.o` has scales of shape (1,)": _with_o(params, good[1]._replace(scale_inv=tf.ones([1]))),
    }
    for wanted, bad in cases.items():
        with pytest.raises(ValueError) as caught:
            dsv3.save_pretrained(tmp_path / "bad", model.cfg, bad, model.router)
        assert wanted in str(caught.value) and not (tmp_path / "bad").exists()
    nan = good[1]._replace(scale_inv=good[1].scale_inv * float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        dsv3.save_pretrained(tmp_path / "bad", model.cfg, _with_o(params, nan), model.router)


def _with_o(params, o):
    return params._replace(dense=params.dense._replace(mla=params.dense.mla._replace(o=o)))
