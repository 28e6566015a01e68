"""The tensors of a checkpoint: those of the real 671B model, and that each one is cut from the right place."""

from __future__ import annotations

import gzip
import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings

import dsv3
from dsv3 import tree
from dsv3.io.leaves import part
from dsv3.io.names import Expected, checkpoint_pieces, expected_tensors
from tests.io.checkpoints import arrays, configs, oracle, random_model
from tests.real_data import DATA
from tests.small import model_config

# sha256 of the listing of the real checkpoint of 671B parameters: see `listing_digest`.
REAL_COUNT = 91_991
REAL_DIGEST = "f2b6fc059a922ec40758de9a94f591fe2f8b6731a30fd8bd8c80fc169ec45faf"

REAL_KEYS = DATA / "deepseek_r1_checkpoint_keys.json.gz"


def listing_digest(tensors: dict[str, Expected]) -> str:
    """sha256 of the lines `name dtype 7168x2048`, sorted."""
    lines = sorted(f"{name} {dtype} {'x'.join(map(str, shape))}\n" for name, (shape, dtype) in tensors.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def published() -> dict[str, Expected]:
    cfg = dsv3.preset("deepseek-v3")
    return expected_tensors(dsv3.model_specs(cfg), cfg, "float8")


def test_published_model_has_the_real_checkpoints_digest(published):
    assert len(published) == REAL_COUNT
    assert listing_digest(published) == REAL_DIGEST


@pytest.mark.skipif(not REAL_KEYS.is_file(), reason="the real checkpoint's list is not there (DSV3_DATA)")
def test_published_model_has_the_real_checkpoints_tensors(published):
    with gzip.open(REAL_KEYS) as file:
        real = {name: Expected(tuple(t["shape"]), t["dtype"]) for name, t in json.load(file).items()}
    assert published == real
    assert listing_digest(real) == REAL_DIGEST


def test_other_forms_have_no_scales(published):
    cfg = dsv3.preset("deepseek-v3")
    for form, stored in (("bfloat16", "BF16"), ("float32", "F32")):
        found = expected_tensors(dsv3.model_specs(cfg), cfg, form)
        assert set(found) == {name for name in published if not name.endswith("_scale_inv")}
        assert {t.dtype for name, t in found.items() if not name.endswith("e_score_correction_bias")} == {stored}
        assert found["model.layers.61.mlp.gate.e_score_correction_bias"].dtype == "F32"


@settings(max_examples=30)
@given(cfg=configs())
def test_every_value_is_stored_once_and_in_its_place(cfg):
    model = random_model(cfg)
    leaves = arrays(model)
    seen = {path: np.zeros(leaf.shape, np.int32) for path, leaf in leaves.items()}
    names = set()
    for piece in checkpoint_pieces(dsv3.model_specs(cfg), cfg):
        np.testing.assert_array_equal(part(leaves[piece.leaf], piece), oracle(model, piece.name), err_msg=piece.name)
        assert part(leaves[piece.leaf], piece).shape == piece.shape
        assert piece.name not in names
        names.add(piece.name)
        if not piece.copy:
            view = part(seen[piece.leaf], piece)
            view += 1
    assert all((count == 1).all() for count in seen.values())


def test_order_is_by_layer():
    cfg = model_config()
    names = [piece.name for piece in checkpoint_pieces(dsv3.model_specs(cfg), cfg)]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert names[0] == "model.embed_tokens.weight" and set(names[-2:]) == {"model.norm.weight", "lm_head.weight"}
    assert layers == sorted(layers) and set(layers) == set(range(5))


def test_tied_head_is_read_as_a_copy_and_never_written():
    cfg = model_config(tie_word_embeddings=True)
    specs = dsv3.model_specs(cfg)
    head = next(piece for piece in checkpoint_pieces(specs, cfg) if piece.name == "lm_head.weight")
    assert head.copy and not head.written and head.leaf == "embed"
    assert "lm_head.weight" not in expected_tensors(specs, cfg)
    assert expected_tensors(specs, cfg)["model.layers.4.shared_head.head.weight"].shape == (40, 12)


def test_sizes_add_up_to_the_parameters():
    cfg = dsv3.preset("deepseek-v3")
    specs = dsv3.model_specs(cfg)
    pieces = [piece for piece in checkpoint_pieces(specs, cfg) if not piece.copy]
    biases = sum(math.prod(piece.shape) for piece in pieces if piece.state)
    assert biases == 59 * 256
    assert sum(math.prod(piece.shape) for piece in pieces) == dsv3.count_params(specs) + biases


def test_a_parameter_without_a_name_is_an_error():
    cfg = model_config()
    specs = tree.to_dict(dsv3.model_specs(cfg)) | {"moe.mla.extra": dsv3.ParamSpec((1,), ("embed",))}
    with pytest.raises(ValueError, match="parameter `moe.mla.extra` has no name in a checkpoint"):
        checkpoint_pieces(_nest(specs), cfg)
    with pytest.raises(ValueError, match="`dtype` is 'int8', want one of 'bfloat16', 'float32', 'float8'"):
        expected_tensors(dsv3.model_specs(cfg), cfg, "int8")


def _nest(flat: dict) -> dict:
    """Path-keyed leaves as nested dicts."""
    nested: dict = {}
    for path, leaf in flat.items():
        *outer, last = path.split(".")
        here = nested
        for name in outer:
            here = here.setdefault(name, {})
        here[last] = leaf
    return nested
