"""Recipes of Transformer Engine, as far as they are dsv3's; the real ones are in tests/parity/test_transformer_engine.py."""

import dataclasses
import enum
from types import SimpleNamespace

import pytest

from dsv3.recipe import RECIPES, Fp8Recipe, recipe_from_te, recipe_to_te

Format = enum.Enum("Format", {"E4M3": 1, "HYBRID": 2, "E5M2": 3})
DIMS = {"x_block_scaling_dim": 1, "w_block_scaling_dim": 2, "grad_block_scaling_dim": 1}


@dataclasses.dataclass
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


def recipe(power=True, **fields):
    quantizers = {name: QParams(power) for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")}
    return SimpleNamespace(**({"fp8_format": Format.E4M3, **DIMS, **quantizers} | fields))


TE = SimpleNamespace(Float8BlockScaling=recipe, Format=Format, QParams=QParams)


@pytest.mark.parametrize("kind", ["float32", "power_of_two"])
@pytest.mark.parametrize("backward", ["e4m3", "e5m2"])
def test_formats_and_scales_come_back(kind, backward):
    there = recipe_to_te(Fp8Recipe(scale_kind=kind, backward=backward), TE)
    found = recipe_from_te(there)
    assert (found.scale_kind, found.backward, found.scaling, found.forward) == (kind, backward, "block", "e4m3")
    assert not (found.retile or found.keep_swiglu or found.dispatch or found.attention_output)
    assert there.use_f32_scales == (kind == "float32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x_block_scaling_dim": 2}, "`recipe.x_block_scaling_dim` is 2, want 1"),
        ({"fp8_format": Format.E5M2}, "`recipe.fp8_format` is 'E5M2', want one of"),
        ({"backward_override": "dequantized"}, "`recipe.backward_override` is 'dequantized', want None"),
        ({"fp8_quant_bwd_grad": QParams(False)}, "power-of-two scales for some tensors"),
        ({"fp8_quant_fwd_inp": QParams(True, 1e-3)}, "`recipe` has amax_epsilon 0.001, want 0"),
    ],
)
def test_other_recipes_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"recipe_from_te: .*{message}"):
        recipe_from_te(recipe(**fields))


def test_what_it_cannot_express():
    with pytest.raises(ValueError, match="recipe_from_te: `recipe` is a SimpleNamespace without .'x_block_scaling_dim'"):
        recipe_from_te(SimpleNamespace(fp8_format=Format.E4M3))
    with pytest.raises(ValueError, match="recipe_to_te: `recipe.scaling` is 'tensor', want 'block'"):
        recipe_to_te(RECIPES["tensor"], TE)
    with pytest.raises(ValueError, match="`attention_output` is 'e5m6' without `retile`"):
        Fp8Recipe(retile=False)
