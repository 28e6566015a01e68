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
            over_tokens = _over_tokens(kept, recipe, fuse=fuse) if recipe.retile else kept
            d = fp8_quantize(dy, block=_block(recipe, COLUMN_BLOCK), **quantize_options(recipe, backward=True), fuse=fuse)
            blocks = _blocks(recipe, COLUMN_BLOCK, COLUMN_BLOCK, fuse)
            return dx, fp8_gemm(over_tokens, d, transpose_a=True, dtype=weight.dtype, **blocks)

        return fp8_gemm(q, w, dtype=x.dtype, **_blocks(recipe, ROW_BLOCK, WEIGHT_BLOCK, fuse)), grad

    return apply(x, weight)


def fp8_swiglu(h: tf.Tensor, *, recipe: Fp8Recipe, fuse: bool = False) -> tf.Tensor:
    """Returns `swiglu(h)`, of whose input only an FP8 copy is kept: the backward pass computes SwiGLU again from that.

    Args:
      h: `[..., 2F]`, see `ops.activation.swiglu`.
      recipe: see `Fp8Recipe`.
      fuse: compile the element-wise parts as kernels (not under XLA).

    References: DeepSeek-V3 section 3.3.3.
    """
    flat = tf.reshape(h, [-1, h.shape[-1]])

    @tf.custom_gradient
    def apply(h):
        kept = quantize_rows(h, recipe, fuse=fuse)

        def grad(d):
            again = tf.cast(fp8_expand(*kept, block=_block(recipe, ROW_BLOCK), fuse=fuse), h.dtype)
            ones = tf.ones([tf.shape(again)[0]])
            return weighted_swiglu_grad(again, ones, d, fuse=fuse)[2]

        return swiglu(h, fuse=fuse), grad

    width = h.shape[-1] // 2
    shape = tf.concat([tf.shape(h)[:-1], [width]], 0)
    return tf.ensure_shape(tf.reshape(apply(flat), shape), [*h.shape[:-1], width])


def quantize_rows(
    x: tf.Tensor, recipe: Fp8Recipe, *, backward: bool = False, sent: bool = False, fuse: bool = False
) -> Fp8Tensor:
    """Quantises `[..., N, D]`, an activation or, with `backward`, a gradient, in tiles along D; `sent`: as rows travel."""
    options = quantize_options(recipe, backward=backward) | ({"scale_kind": "power_of_two"} if sent else {})
    return fp8_quantize(x, block=_block(recipe, ROW_BLOCK), **options, fuse=fuse)


def quantize_weight(weight: tf.Tensor, recipe: Fp8Recipe, *, fuse: bool = False) -> Fp8Tensor:
    """Quantises `[..., D, F]` in blocks."""
    return fp8_quantize(weight, block=_block(recipe, WEIGHT_BLOCK), **quantize_options(recipe), fuse=fuse)


def _over_tokens(kept: Fp8Tensor, recipe: Fp8Recipe, *, fuse: bool) -> Fp8Tensor:
    """What a forward pass has kept, quantised again in tiles over tokens."""
    own = kept.values.dtype == FORMATS[recipe.forward].dtype
    if own and recipe.scaling == "tensor":
        return kept
    x = fp8_expand(*kept, block=_block(recipe, ROW_BLOCK), fuse=fuse)
    kind = recipe.scale_kind if own else "power_of_two"
    return fp8_quantize(x, block=_block(recipe, COLUMN_BLOCK), fmt=recipe.forward, scale_kind=kind, fuse=fuse)


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
