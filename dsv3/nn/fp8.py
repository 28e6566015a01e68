"""A linear layer's three products in FP8, as an `Fp8Recipe` has them.

    forward:  y  = q(x)  @ q(w)      x in tiles of 1×128, w in blocks of 128×128
    backward: dx = q(dy) @ q(w)ᵀ     dy in tiles of 1×128
              dw = q(x)ᵀ @ q(dy)     both in tiles of 128×1; x from what the forward pass has kept, which is FP8, too
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.ops.activation import swiglu
from dsv3.ops.experts import weighted_swiglu_grad
from dsv3.ops.fp8 import COLUMN_BLOCK, ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_quantize
from dsv3.ops.fp8_formats import FORMATS
from dsv3.ops.gemm import fp8_expand, fp8_gemm
from dsv3.recipe import Fp8Recipe

MIN_GRADIENT = 2.0**-100
"""Gradients are of a mean over all of a step's tokens: the smallest scale of activations, 1e-4 / 448, would flush them."""


def fp8_linear(
    x: tf.Tensor, weight: tf.Tensor, *, recipe: Fp8Recipe, after_attention: bool = False, fuse: bool = False
) -> tf.Tensor:
    """Returns `x @ weight` with all three products in FP8.

    Args:
      x: `[N, D]`, the compute dtype. weight: `[D, F]`, any floating dtype; it is quantised as it is, best from float32.
      recipe: see `Fp8Recipe`.
      after_attention: `x` is attention's output, which is kept in `recipe.attention_output`.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[N, F]` in `x`'s dtype. The gradients have the dtypes of `x` and `weight`, and are those of a product of unquantised
      operands: quantisation counts as the identity.

    References: DeepSeek-V3 sections 3.3.1 to 3.3.3.
    """
    kept_format = recipe.attention_output if after_attention else None

    @tf.custom_gradient
    def apply(x, weight):
        q, w = quantize_rows(x, recipe, fuse=fuse), quantize_weight(weight, recipe, fuse=fuse)
        kept = q
        if not recipe.retile:
            kept = fp8_quantize(x, block=_block(recipe, COLUMN_BLOCK), **quantize_options(recipe), fuse=fuse)
        elif kept_format is not None:
            block = _block(recipe, ROW_BLOCK)
            kept = fp8_quantize(x, block=block, fmt=kept_format, scale_kind="power_of_two", fuse=fuse)

        def grad(dy):
            d = quantize_rows(dy, recipe, backward=True, fuse=fuse)
            dx = fp8_gemm(d, w, transpose_b=True, dtype=x.dtype, **_blocks(recipe, ROW_BLOCK, WEIGHT_BLOCK, fuse))
            over_tokens = kept
            if recipe.retile:
                kind = recipe.scale_kind if kept_format is None else "power_of_two"
                over_tokens = _over_tokens(kept, recipe, kind, fuse=fuse)
            return dx, _weight_gradient(over_tokens, dy, recipe, dtype=weight.dtype, fuse=fuse)

        return fp8_gemm(q, w, dtype=x.dtype, **_blocks(recipe, ROW_BLOCK, WEIGHT_BLOCK, fuse)), grad

    return apply(x, weight)


def fp8_swiglu_linear(h: tf.Tensor, weight: tf.Tensor, *, recipe: Fp8Recipe, fuse: bool = False) -> tf.Tensor:
    """Returns `swiglu(h) @ weight` in FP8, of which `h` alone is kept, in FP8: SwiGLU is computed again from that.

    Args:
      h: `[N, 2F]`, see `ops.activation.swiglu`.
      weight: `[F, D]`, any floating dtype.
      recipe: see `Fp8Recipe`.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[N, D]` in `h`'s dtype; the gradients are as of `fp8_linear`.

    References: DeepSeek-V3 section 3.3.3.
    """

    @tf.custom_gradient
    def apply(h, weight):
        w, kept = quantize_weight(weight, recipe, fuse=fuse), quantize_rows(h, recipe, fuse=fuse)
        q = quantize_rows(swiglu(h, fuse=fuse), recipe, fuse=fuse)

        def grad(dy):
            d = quantize_rows(dy, recipe, backward=True, fuse=fuse)
            d_act = fp8_gemm(d, w, transpose_b=True, dtype=h.dtype, **_blocks(recipe, ROW_BLOCK, WEIGHT_BLOCK, fuse))
            again = tf.cast(fp8_expand(*kept, block=_block(recipe, ROW_BLOCK), fuse=fuse), h.dtype)
            act, _, d_h = weighted_swiglu_grad(again, tf.ones([tf.shape(again)[0]]), d_act, fuse=fuse)
            x = fp8_quantize(act, block=_block(recipe, COLUMN_BLOCK), **quantize_options(recipe), fuse=fuse)
            return d_h, _weight_gradient(x, dy, recipe, dtype=weight.dtype, fuse=fuse)

        return fp8_gemm(q, w, dtype=h.dtype, **_blocks(recipe, ROW_BLOCK, WEIGHT_BLOCK, fuse)), grad

    return apply(h, weight)


def quantize_rows(
    x: tf.Tensor, recipe: Fp8Recipe, *, backward: bool = False, sent: bool = False, fuse: bool = False
) -> Fp8Tensor:
    """Quantises `[..., N, D]`, an activation or, with `backward`, a gradient, in tiles along D; `sent`: as rows travel."""
    options = quantize_options(recipe, backward=backward) | ({"scale_kind": "power_of_two"} if sent else {})
    return fp8_quantize(x, block=_block(recipe, ROW_BLOCK), **options, fuse=fuse)


def quantize_weight(weight: tf.Tensor, recipe: Fp8Recipe, *, fuse: bool = False) -> Fp8Tensor:
    """Quantises `[..., D, F]` in blocks."""
    return fp8_quantize(weight, block=_block(recipe, WEIGHT_BLOCK), **quantize_options(recipe), fuse=fuse)


def _over_tokens(kept: Fp8Tensor, recipe: Fp8Recipe, kind: str, *, fuse: bool) -> Fp8Tensor:
    """What a forward pass has kept, quantised again in tiles over tokens."""
    if recipe.scaling == "tensor" and kept.values.dtype == FORMATS[recipe.forward].dtype:
        return kept
    x = fp8_expand(*kept, block=_block(recipe, ROW_BLOCK), fuse=fuse)
    return fp8_quantize(x, block=_block(recipe, COLUMN_BLOCK), fmt=recipe.forward, scale_kind=kind, fuse=fuse)


def _weight_gradient(x: Fp8Tensor, dy: tf.Tensor, recipe: Fp8Recipe, *, dtype: tf.DType, fuse: bool) -> tf.Tensor:
    """`xᵀ @ dy` of an input in tiles over tokens."""
    d = fp8_quantize(dy, block=_block(recipe, COLUMN_BLOCK), **quantize_options(recipe, backward=True), fuse=fuse)
    return fp8_gemm(x, d, transpose_a=True, dtype=dtype, **_blocks(recipe, COLUMN_BLOCK, COLUMN_BLOCK, fuse))


def _block(recipe: Fp8Recipe, block: tuple[int, int]) -> tuple[int, int] | None:
    return block if recipe.scaling == "block" else None


def _blocks(recipe: Fp8Recipe, a: tuple[int, int], b: tuple[int, int], fuse: bool) -> dict[str, Any]:
    return {
        "a_block": _block(recipe, a), "b_block": _block(recipe, b), "fuse": fuse,
        "accumulate": recipe.accumulate, "interval": recipe.interval, "bits": recipe.bits, "operands": recipe.operands,
    }  # fmt: skip


def quantize_options(recipe: Fp8Recipe, *, backward: bool = False) -> dict[str, Any]:
    """Returns the arguments of `fp8_quantize` for an activation or weight, or with `backward` a gradient."""
    kind = {"fmt": recipe.backward if backward else recipe.forward, "scale_kind": recipe.scale_kind}
    return kind | ({"min_amax": MIN_GRADIENT} if backward else {})
