"""Fp8Recipe: what a training step computes in FP8, and how. It is an argument, like the layout.

Quantised are the inputs, weights and output gradients of the linear layers of attention, feed-forward and experts, for all
three products. In higher precision stay the embedding, the head, the router, the MTP modules' projection, the norms, the
attention itself, and everything between layers.
"""

from __future__ import annotations

import dataclasses

from dsv3.checks import check, check_choice

SCALINGS = ("block", "tensor")


@dataclasses.dataclass(frozen=True)
class Fp8Recipe:
    """How linear layers compute in FP8.

    Attributes:
      name: as programs show it.
      scaling: `"block"`: a scale for 1×128 values of an activation or gradient (128×1 where a sum runs over tokens) and for
        128×128 of a weight; `"tensor"`: one for each tensor, from its present largest value.
      forward: format of activations and weights, `"e4m3"` or `"e5m2"`. backward: format of output gradients.
      scale_kind: `"float32"` or `"power_of_two"`.
      attention_output: format in which the input of the projection after attention is kept for its weight's gradient, with
        power-of-two scales; `None`: as other layers' inputs are.
      keep_swiglu: the inputs of SwiGLU are kept in FP8, and its output is computed again from them.
      dispatch: rows travel to other devices' experts in FP8, and their gradients back in the compute dtype.
      accumulate: `"float32"`, or `"tensor_core"`: the model of Hopper's accumulator in `ops.accumulator`, slow.
      interval: for `"tensor_core"`, elements of a sum between promotions to float32; `None`, for scaling by tensor: never.
      bits: significant bits of that accumulator.
      operands: of products: `"expanded"` to float32 before each, right for a CPU, or `"float8"`, for XLA on a GPU (see
        `ops.gemm.fp8_gemm`); the experts' kernel must then be `"blocks"`.

    References: DeepSeek-V3 section 3.3.
    """

    name: str = "paper"
    scaling: str = "block"
    forward: str = "e4m3"
    backward: str = "e4m3"
    scale_kind: str = "float32"
    attention_output: str | None = "e5m6"
    keep_swiglu: bool = True
    dispatch: bool = True
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
        check_choice("Fp8Recipe", "accumulate", self.accumulate, ("float32", "tensor_core"))
        check_choice("Fp8Recipe", "operands", self.operands, ("expanded", "float8"))
        check(
            self.operands == "expanded" or self.accumulate == "float32",
            f"Fp8Recipe: `accumulate` is {self.accumulate!r} with operands='float8', want 'float32'",
        )
        check(
            self.interval is not None or self.scaling == "tensor",
            "Fp8Recipe: `interval` is None with scaling='block', want scaling='tensor': blocks have scales each",
        )

    def replace(self, **fields) -> Fp8Recipe:
        """Returns a copy with fields changed."""
        return dataclasses.replace(self, **fields)


RECIPES = {
    "paper": Fp8Recipe(),
    "power_of_two": Fp8Recipe("power_of_two", scale_kind="power_of_two"),
    "tensor": Fp8Recipe("tensor", scaling="tensor"),
    "e5m2_gradients": Fp8Recipe("e5m2_gradients", backward="e5m2"),
}
"""By name: the paper's (section 3.3), and variants to compare it with."""
