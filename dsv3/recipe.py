"""Fp8Recipe: what a training step computes in FP8, and how. It is an argument, like the layout.

Quantised are the inputs, weights and output gradients of the linear layers of attention, feed-forward and experts, for all
three products. In higher precision stay the embedding, the head, the router, the MTP modules' projection, the norms, the
attention itself, and everything between layers.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

from dsv3.checks import check, check_choice

SCALINGS = ("block", "tensor", "delayed")


@dataclasses.dataclass(frozen=True)
class Fp8Recipe:
    """How linear layers compute in FP8.

    Attributes:
      name: as programs show it.
      scaling: `"block"`: a scale for 1×128 values of an activation or gradient (128×1 where a sum runs over tokens) and for
        128×128 of a weight; `"tensor"`: one for each tensor, from its present largest value; `"delayed"`: one for each
        tensor, from its largest value in the steps before, which is a part of the training's state (`nn.fp8_delayed`).
      history: steps that delayed scales look back to.
      forward: format of activations and weights, `"e4m3"` or `"e5m2"`. backward: format of output gradients.
      scale_kind: `"float32"` or `"power_of_two"`.
      attention_output: format in which the input of the projection after attention is kept for its weight's gradient, with
        power-of-two scales; `None`: as other layers' inputs are.
      retile: an input is kept as it was quantised, and tiled anew over tokens for its weight's gradient; False: both tilings
        are of the unrounded input, of which a second FP8 copy is kept.
      keep_swiglu: the inputs of SwiGLU are kept in FP8, and its output is computed again from them.
      dispatch: with scales by block, tokens for the experts are quantised with power-of-two scales, and so are the gradients
        of the experts' outputs: on a mesh they travel so. What comes back travels in the compute dtype.
      moments: dtype of AdamW's moments. An optimiser is an argument of its own: give it to `adamw(..., moment_dtype=)`.
      accumulate: `"float32"`, or `"tensor_core"`: the model of Hopper's accumulator in `ops.accumulator`, slow.
      interval: for `"tensor_core"`, elements of a sum between promotions to float32; `None`, for scaling by tensor: never.
      bits: significant bits of that accumulator.
      operands: of products: `"expanded"` to float32 before each, right for a CPU, or `"float8"`, for XLA on a GPU (see
        `ops.gemm.fp8_gemm`); the experts' kernel must then be `"blocks"`.

    References: DeepSeek-V3 section 3.3.
    """

    name: str = "paper"
    scaling: str = "block"
    history: int = 16
    forward: str = "e4m3"
    backward: str = "e4m3"
    scale_kind: str = "float32"
    attention_output: str | None = "e5m6"
    retile: bool = True
    keep_swiglu: bool = True
    dispatch: bool = True
    moments: str = "bfloat16"
    accumulate: str = "float32"
    interval: int | None = 128
    bits: int = 14
    operands: str = "expanded"

    def __post_init__(self):
        check_choice("Fp8Recipe", "scaling", self.scaling, SCALINGS)
        check_choice("Fp8Recipe", "forward", self.forward, ("e4m3", "e5m2"))
        check_choice("Fp8Recipe", "backward", self.backward, ("e4m3", "e5m2"))
        check_choice("Fp8Recipe", "scale_kind", self.scale_kind, ("float32", "power_of_two"))
        check_choice("Fp8Recipe", "attention_output", self.attention_output, (None, "e4m3", "e5m2", "e5m6"))
        check_choice("Fp8Recipe", "moments", self.moments, ("float32", "bfloat16"))
        check_choice("Fp8Recipe", "accumulate", self.accumulate, ("float32", "tensor_core"))
        check_choice("Fp8Recipe", "operands", self.operands, ("expanded", "float8"))
        check(
            self.operands == "expanded" or self.accumulate == "float32",
            f"Fp8Recipe: `accumulate` is {self.accumulate!r} with operands='float8', want 'float32'",
        )
        check(
            self.operands == "expanded" or self.interval is not None,
            "Fp8Recipe: `interval` is None with operands='float8', want a number: it is of the accumulator's model",
        )
        check(
            isinstance(self.history, int) and self.history >= 1,
            f"Fp8Recipe: `history` is {self.history!r}, want an integer of at least 1",
        )
        check(
            self.interval is not None or self.scaling == "tensor",
            f"Fp8Recipe: `interval` is None with scaling={self.scaling!r}, want scaling='tensor' for sums without promotion",
        )
        check(
            self.retile or self.attention_output is None,
            f"Fp8Recipe: `attention_output` is {self.attention_output!r} without `retile`, want None: nothing is kept in it",
        )

        whole = self.interval is None or (isinstance(self.interval, int) and self.interval > 0 and self.interval % 32 == 0)
        check(whole, f"Fp8Recipe: `interval` is {self.interval!r}, want None or a positive multiple of 32")
        check(
            self.scaling != "block" or 128 % self.interval == 0,
            f"Fp8Recipe: `interval` is {self.interval} with scaling='block', want a divisor of 128, where scales change",
        )
        narrow = isinstance(self.bits, int) and 2 <= self.bits <= 24
        check(narrow, f"Fp8Recipe: `bits` is {self.bits!r}, want an integer of 2 to 24")
        plain = {"scale_kind": "float32", "attention_output": None, "retile": True, "keep_swiglu": False}
        for name, want in plain.items() if self.scaling == "delayed" else ():
            got = getattr(self, name)
            check(got == want, f"Fp8Recipe: `{name}` is {got!r} with scaling='delayed', want {want!r}")

    def replace(self, **fields) -> Fp8Recipe:
        """Returns a copy with fields changed."""
        return dataclasses.replace(self, **fields)


def sends_fp8(recipe: Fp8Recipe | None) -> bool:
    """Whether rows travel to experts in FP8."""
    return recipe is not None and recipe.dispatch and recipe.scaling == "block"


RECIPES = {
    "paper": Fp8Recipe(),
    "power_of_two": Fp8Recipe("power_of_two", scale_kind="power_of_two"),
    "tensor": Fp8Recipe("tensor", scaling="tensor"),
    "delayed": Fp8Recipe("delayed", scaling="delayed", backward="e5m2", attention_output=None, keep_swiglu=False),
    "e5m2_gradients": Fp8Recipe("e5m2_gradients", backward="e5m2"),
}
"""By name: the paper's (section 3.3), and variants to compare it with."""


# Transformer Engine's `Float8BlockScaling` is this scheme for linear layers. Its package is not imported here: a recipe is
# read by its attributes, and made with the module that is given.

_QUANTIZERS = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
_DIMS = {"x_block_scaling_dim": 1, "w_block_scaling_dim": 2, "grad_block_scaling_dim": 1}


def recipe_from_te(recipe: Any) -> Fp8Recipe:
    """Returns what a Transformer Engine `Float8BlockScaling` says of linear layers.

    It knows nothing of E5M6, SwiGLU, dispatch and moments, which are as without FP8, and quantises both ways from unrounded
    inputs. It has no smallest scale, where dsv3 has one, and none must be set by `amax_epsilon`.

    **Its scales are powers of two by default**, which are not the paper's. Only the variable
    NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1, set before the import, changes that: `Float8BlockScaling(use_f32_scales=True)`
    leaves the quantisers as they are, and they are what counts here, too.

    Args:
      recipe: an object with the attributes of `Float8BlockScaling`.

    Raises:
      ValueError: another recipe, or one with other blocks, unlike scales or an overridden backward pass.
    """
    kind = type(recipe).__name__
    missing = [name for name in (*_DIMS, *_QUANTIZERS, "fp8_format") if not hasattr(recipe, name)]
    check(not missing, f"recipe_from_te: `recipe` is a {kind} without {missing[:1]}, want a Float8BlockScaling")
    for name, want in _DIMS.items():
        check(getattr(recipe, name) == want, f"recipe_from_te: `recipe.{name}` is {getattr(recipe, name)}, want {want}")
    override = getattr(recipe, "backward_override", None)
    check(override is None, f"recipe_from_te: `recipe.backward_override` is {override!r}, want None")
    formats = {"E4M3": "e4m3", "HYBRID": "e5m2"}
    check_choice("recipe_from_te", "recipe.fp8_format", recipe.fp8_format.name, tuple(formats))
    floors = {getattr(recipe, name).amax_epsilon for name in _QUANTIZERS}
    check(floors == {0.0}, f"recipe_from_te: `recipe` has amax_epsilon {max(floors)}, want 0: dsv3 has a smallest scale")
    powers = {bool(getattr(recipe, name).power_2_scale) for name in _QUANTIZERS}
    check(len(powers) == 1, "recipe_from_te: `recipe` has power-of-two scales for some tensors, want them for all or none")
    return Fp8Recipe(
        "transformer_engine", backward=formats[recipe.fp8_format.name],
        scale_kind="power_of_two" if powers.pop() else "float32",
        attention_output=None, retile=False, keep_swiglu=False, dispatch=False, moments="float32",
    )  # fmt: skip


def recipe_to_te(recipe: Fp8Recipe, te: ModuleType) -> Any:
    """Returns Transformer Engine's `Float8BlockScaling` of a recipe's formats and scales; `recipe_from_te` tells its trap.

    What a recipe says of other things than formats and scales of linear layers has no place in it.

    Args:
      recipe: with scales by block, E4M3 forward, and sums in float32.
      te: the module `transformer_engine.common.recipe`.

    Raises:
      ValueError: a recipe that it cannot express.
    """
    for name, want in (("scaling", "block"), ("forward", "e4m3"), ("accumulate", "float32")):
        got = getattr(recipe, name)
        check(got == want, f"recipe_to_te: `recipe.{name}` is {got!r}, want {want!r}")
    power = recipe.scale_kind == "power_of_two"
    made = te.Float8BlockScaling(fp8_format=te.Format.E4M3 if recipe.backward == "e4m3" else te.Format.HYBRID)
    made.use_f32_scales = not power
    for name in _QUANTIZERS:
        setattr(made, name, te.QParams(power_2_scale=power, amax_epsilon=0.0))
    return made
