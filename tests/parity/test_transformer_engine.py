"""The mapping of recipes, with Transformer Engine's own recipe module. Its package wants a GPU, this module does not."""

import importlib.util
import pathlib
import sys

import pytest

from dsv3.recipe import RECIPES, recipe_from_te, recipe_to_te

ENV = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


def load(monkeypatch, float32_scales):
    """Transformer Engine reads the variable when its classes are made."""
    monkeypatch.setenv(ENV, str(int(float32_scales)))
    (folder,) = importlib.util.find_spec("transformer_engine").submodule_search_locations
    spec = importlib.util.spec_from_file_location("te_recipe", pathlib.Path(folder) / "common" / "recipe" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "te_recipe", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("float32_scales", [False, True])
def test_its_default_is_read(monkeypatch, float32_scales):
    te = load(monkeypatch, float32_scales)
    assert recipe_from_te(te.Float8BlockScaling()).scale_kind == ("float32" if float32_scales else "power_of_two")


def test_the_trap(monkeypatch):
    """Scales are powers of two by default, and its argument does not change what its quantisers do."""
    te = load(monkeypatch, False)
    asked = te.Float8BlockScaling(use_f32_scales=True)
    assert asked.use_f32_scales and recipe_from_te(asked).scale_kind == "power_of_two"


@pytest.mark.parametrize("name", ["paper", "power_of_two", "e5m2_gradients"])
def test_recipes_become_its_own(monkeypatch, name):
    te = load(monkeypatch, False)
    made = recipe_to_te(RECIPES[name], te)
    assert isinstance(made, te.Float8BlockScaling) and made.float8_block_scaling()
    assert made.fp8_format == (te.Format.HYBRID if name == "e5m2_gradients" else te.Format.E4M3)
    for quantizer in (made.fp8_quant_fwd_inp, made.fp8_quant_fwd_weight, made.fp8_quant_bwd_grad):
        assert quantizer.power_2_scale == (name == "power_of_two") and quantizer.amax_epsilon == 0.0
    assert recipe_from_te(made).scale_kind == RECIPES[name].scale_kind
    assert f"power_2_scale={name == 'power_of_two'}" in repr(made)


def test_other_recipes_of_its_are_refused(monkeypatch):
    te = load(monkeypatch, False)
    for other in (te.DelayedScaling(), te.Float8CurrentScaling(), te.MXFP8BlockScaling()):
        with pytest.raises(ValueError, match="want a Float8BlockScaling"):
            recipe_from_te(other)
