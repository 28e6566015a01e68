"""The routed experts with all products in FP8, as an `Fp8Recipe` has them: `ops.experts`' sorted rows, quantised.

A token is quantised once, before its rows are laid out by expert. For the gradients of the weights, tiles of 128 tokens
start anew at each expert.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.checks import check
from dsv3.nn.fp8 import quantize_options, quantize_rows, quantize_weight
from dsv3.ops.dispatch import Dispatch, combine_rows, dispatch_rows, gather_rows, scatter_weights
from dsv3.ops.experts import weighted_swiglu, weighted_swiglu_grad
from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_quantize
from dsv3.ops.gemm import fp8_expand
from dsv3.ops.gemm_grouped import fp8_grouped_gemm, fp8_grouped_wgrad, fp8_quantize_groups
from dsv3.recipe import Fp8Recipe
from dsv3.typing import TensorLike


def fp8_experts(
    x: TensorLike,
    weights: TensorLike,
    experts: TensorLike,
    gate_up: TensorLike,
    down: TensorLike,
    *,
    recipe: Fp8Recipe,
    kernel: str = "sorted",
    multiple: int = 32,
    fuse: bool = False,
) -> tf.Tensor:
    """Sends each token through its chosen experts and sums the results by gate value, with products in FP8.

    Args:
      x: `[N, D]` tokens, static N.
      weights: `[N, K]` float32 gate values.
      experts: `[N, K]` int32 chosen experts; E stands for none, adds nothing, and needs the weight 0.
      gate_up: `[E, D, 2F]`; down: `[E, F, D]`, any floating dtype.
      recipe: see `Fp8Recipe`.
      kernel, multiple, fuse: see `ops.experts.experts_apply`; `"sorted"` or `"blocks"`.

    Returns:
      `[N, D]` in `x`'s dtype, differentiable once.

    References: DeepSeek-V3 sections 2.1.2 and 3.3.
    """
    x, gate_up, down = tf.convert_to_tensor(x), tf.convert_to_tensor(gate_up), tf.convert_to_tensor(down)
    weights, experts = tf.cast(weights, tf.float32), tf.cast(experts, tf.int32)
    if x.shape[0] == 0:
        return tf.zeros_like(x)
    check(recipe.interval is not None, "fp8_experts: `recipe.interval` is None, want a number: experts have promotions")
    plan = dispatch_rows(experts, gate_up.shape[0], multiple=multiple)
    groups = _Groups(plan, recipe, {"kernel": kernel, "multiple": multiple, "fuse": fuse})
    size = plan.tokens.shape[0]

    @tf.custom_gradient
    def apply(x, weights, gate_up, down):
        w = scatter_weights(weights, plan.slots, size=size, fuse=fuse)
        q, first, second = groups.tokens(x), groups.weight(gate_up), groups.weight(down)
        h = groups.matmul(q, first, x.dtype)
        kept = groups.rows(h) if recipe.keep_swiglu else h
        y = groups.matmul(groups.rows(weighted_swiglu(h, w, fuse=fuse)), second, x.dtype)

        def grad(dy):
            dy_rows = gather_rows(dy, plan.tokens, fuse=fuse)
            d_act = groups.matmul(groups.rows(dy_rows, backward=True), second, x.dtype, transpose=True)
            pre = groups.expand(kept, x.dtype) if recipe.keep_swiglu else kept
            act, d_w, d_h = weighted_swiglu_grad(pre, w, d_act, fuse=fuse)
            d_down = groups.outer(act, dy_rows, down.dtype)
            d_gate_up = groups.outer(groups.expand(q, x.dtype), d_h, gate_up.dtype)
            d_rows = groups.matmul(groups.rows(d_h, backward=True), first, x.dtype, transpose=True)
            return combine_rows(d_rows, plan.slots, fuse=fuse), tf.gather(d_w, plan.slots), d_gate_up, d_down

        return combine_rows(y, plan.slots, fuse=fuse), grad

    return apply(x, weights, gate_up, down)


class _Groups:
    """The quantisers and products of rows that are laid out by expert."""

    def __init__(self, plan: Dispatch, recipe: Fp8Recipe, how: dict[str, Any]):
        self._plan, self._recipe, self._fuse = plan, recipe, how["fuse"]
        options = {name: getattr(recipe, name) for name in ("accumulate", "interval", "bits", "operands")}
        # Expanded operands take tiles' scales at no price; products of float8 are as many as there are scales along K.
        self._whole = recipe.scaling == "tensor" and recipe.operands == "float8"
        self._matmul = options | how | {"scaling": "tensor" if self._whole else "block"}
        self._outer = options | {"kernel": how["kernel"], "fuse": how["fuse"]}

    def rows(self, x: tf.Tensor, *, backward: bool = False) -> Fp8Tensor:
        q = quantize_rows(x, self._recipe, backward=backward, fuse=self._fuse)
        return self._tiled(q, ROW_BLOCK)

    def tokens(self, x: tf.Tensor) -> Fp8Tensor:
        """Tokens' rows, by expert."""
        q = self.rows(x)
        values = tf.gather(q.values, self._plan.tokens)
        return Fp8Tensor(values, q.scale_inv if self._whole else tf.gather(q.scale_inv, self._plan.tokens))

    def weight(self, weight: tf.Tensor) -> Fp8Tensor:
        return self._tiled(quantize_weight(weight, self._recipe, fuse=self._fuse), WEIGHT_BLOCK)

    def _tiled(self, q: Fp8Tensor, block: tuple[int, int]) -> Fp8Tensor:
        """Repeats a tensor's one scale as that of each tile, which is what products of groups take."""
        if self._recipe.scaling == "block" or self._whole:
            return q
        *lead, rows, columns = q.values.shape
        return Fp8Tensor(q.values, tf.broadcast_to(q.scale_inv, [*lead, -(-rows // block[0]), -(-columns // block[1])]))

    def expand(self, q: Fp8Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(fp8_expand(*q, block=None if self._whole else ROW_BLOCK, fuse=self._fuse), dtype)

    def matmul(self, a: Fp8Tensor, b: Fp8Tensor, dtype: tf.DType, *, transpose: bool = False) -> tf.Tensor:
        return fp8_grouped_gemm(a, b, self._plan.rows, transpose_b=transpose, dtype=dtype, **self._matmul)

    def outer(self, a: tf.Tensor, d: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """`aᵀ @ d` for each expert, of an activation and a gradient."""
        pair = [self._over_tokens(a), self._over_tokens(d, backward=True)]
        return fp8_grouped_wgrad(*pair, self._plan.rows, dtype=dtype, **self._outer)

    def _over_tokens(self, x: tf.Tensor, *, backward: bool = False) -> Fp8Tensor:
        options = quantize_options(self._recipe, backward=backward) | {"fuse": self._fuse}
        if self._recipe.scaling == "block":
            return fp8_quantize_groups(x, self._plan.rows, **options)
        q = fp8_quantize(x, block=None, **options)
        like = fp8_quantize_groups(tf.zeros_like(x), self._plan.rows).scale_inv
        return Fp8Tensor(q.values, tf.broadcast_to(q.scale_inv, like.shape))
