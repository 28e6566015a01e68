"""The routed experts with all products in FP8, as an `Fp8Recipe` has them: `ops.experts`' sorted rows, quantised.

A token is quantised once, before its rows are laid out by expert. For the gradients of the weights, tiles of 128 tokens
start anew at each expert.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.checks import check
from dsv3.nn.fp8 import MIN_GRADIENT, quantize_options, quantize_rows, quantize_weight
from dsv3.ops.dispatch import Dispatch, combine_rows, dispatch_rows, gather_rows, scatter_weights
from dsv3.ops.experts import weighted_swiglu, weighted_swiglu_grad
from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_fake, fp8_quantize
from dsv3.ops.gemm import fp8_expand, fp8_gemm
from dsv3.ops.gemm_grouped import fp8_grouped_gemm, fp8_grouped_wgrad, fp8_quantize_groups
from dsv3.ops.grouped import grouped_split
from dsv3.recipe import Fp8Recipe, sends_fp8
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
    whole = recipe.interval is None  # and so without blocks
    check(
        not whole or kernel == "sorted",
        f"fp8_experts: `kernel` is {kernel!r}, want 'sorted' where `recipe.interval` is None",
    )
    plan = dispatch_rows(experts, gate_up.shape[0], multiple=multiple)
    groups = (_WholeSums if whole else _Groups)(plan, recipe, {"kernel": kernel, "multiple": multiple, "fuse": fuse})
    size = plan.tokens.shape[0]

    @tf.custom_gradient
    def apply(x, weights, gate_up, down):
        w = scatter_weights(weights, plan.slots, size=size, fuse=fuse)
        q, first, second = groups.tokens(x), groups.weight(gate_up), groups.weight(down)
        h = groups.matmul(q, first, x.dtype)
        kept = groups.rows(h) if recipe.keep_swiglu else h
        y = groups.matmul(groups.rows(weighted_swiglu(h, w, fuse=fuse)), second, x.dtype)

        def grad(dy):
            dy_rows = groups.gradients(dy)
            d_act = groups.matmul(groups.rows(dy_rows, backward=True), second, x.dtype, transpose=True)
            pre = groups.expand(kept, x.dtype) if recipe.keep_swiglu else kept
            act, d_w, d_h = weighted_swiglu_grad(pre, w, d_act, fuse=fuse)
            d_down = groups.outer(act, dy_rows, down.dtype)
            rows = groups.expand(q, x.dtype) if recipe.retile else gather_rows(x, plan.tokens, fuse=fuse)
            d_gate_up = groups.outer(rows, d_h, gate_up.dtype)
            d_rows = groups.matmul(groups.rows(d_h, backward=True), first, x.dtype, transpose=True)
            return combine_rows(d_rows, plan.slots, fuse=fuse), tf.gather(d_w, plan.slots), d_gate_up, d_down

        return combine_rows(y, plan.slots, fuse=fuse), grad

    return apply(x, weights, gate_up, down)


class _Groups:
    """The quantisers and products of rows that are laid out by expert."""

    def __init__(self, plan: Dispatch, recipe: Fp8Recipe, how: dict[str, Any]):
        self._plan, self._recipe, self._fuse = plan, recipe, how["fuse"]
        options = {"accumulate": recipe.accumulate, "interval": recipe.interval, "bits": recipe.bits}
        self._matmul, self._outer = options | how, options | {"kernel": how["kernel"], "fuse": how["fuse"]}

    def rows(self, x: tf.Tensor, *, backward: bool = False) -> Fp8Tensor:
        return self._tiled(quantize_rows(x, self._recipe, backward=backward, fuse=self._fuse), ROW_BLOCK)

    def tokens(self, x: tf.Tensor) -> Fp8Tensor:
        """Tokens' rows, by expert; what has travelled in FP8 comes out of this as it was."""
        q = self._tiled(quantize_rows(x, self._recipe, sent=sends_fp8(self._recipe), fuse=self._fuse), ROW_BLOCK)
        return Fp8Tensor(*(tf.gather(t, self._plan.tokens) for t in q))

    def gradients(self, dy: tf.Tensor) -> tf.Tensor:
        """The tokens' gradients by row, rounded to what travels."""
        if sends_fp8(self._recipe):
            options = {"fmt": self._recipe.backward, "scale_kind": "power_of_two", "min_amax": MIN_GRADIENT}
            dy = fp8_fake(dy, block=ROW_BLOCK, **options, fuse=self._fuse)
        return gather_rows(dy, self._plan.tokens, fuse=self._fuse)

    def weight(self, weight: tf.Tensor) -> Fp8Tensor:
        return self._tiled(quantize_weight(weight, self._recipe, fuse=self._fuse), WEIGHT_BLOCK)

    def expand(self, q: Fp8Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(fp8_expand(*q, block=ROW_BLOCK, fuse=self._fuse), dtype)

    def matmul(self, a: Fp8Tensor, b: Fp8Tensor, dtype: tf.DType, *, transpose: bool = False) -> tf.Tensor:
        return fp8_grouped_gemm(a, b, self._plan.rows, transpose_b=transpose, dtype=dtype, **self._matmul)

    def outer(self, a: tf.Tensor, d: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """`aᵀ @ d` for each expert, of an activation and a gradient."""
        pair = [self._over_tokens(a), self._over_tokens(d, backward=True)]
        return fp8_grouped_wgrad(*pair, self._plan.rows, dtype=dtype, **self._outer)

    def _tiled(self, q: Fp8Tensor, block: tuple[int, int]) -> Fp8Tensor:
        """Repeats a tensor's one scale as that of each tile, which is what products of groups take."""
        if self._recipe.scaling == "block":
            return q
        *lead, rows, columns = q.values.shape
        return Fp8Tensor(q.values, tf.broadcast_to(q.scale_inv, [*lead, -(-rows // block[0]), -(-columns // block[1])]))

    def _over_tokens(self, x: tf.Tensor, *, backward: bool = False) -> Fp8Tensor:
        options = quantize_options(self._recipe, backward=backward) | {"fuse": self._fuse}
        if self._recipe.scaling == "block":
            return fp8_quantize_groups(x, self._plan.rows, **options)
        q = fp8_quantize(x, block=None, **options)
        like = fp8_quantize_groups(tf.zeros_like(x), self._plan.rows).scale_inv
        return Fp8Tensor(q.values, tf.broadcast_to(q.scale_inv, like.shape))


class _WholeSums(_Groups):
    """The same with one scale for each tensor and sums that are never promoted on their way: a product for each expert."""

    def tokens(self, x: tf.Tensor) -> Fp8Tensor:
        values, scale = self.rows(x)
        return Fp8Tensor(tf.gather(values, self._plan.tokens), scale)

    def expand(self, q: Fp8Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(fp8_expand(*q, block=None, fuse=self._fuse), dtype)

    def matmul(self, a: Fp8Tensor, b: Fp8Tensor, dtype: tf.DType, *, transpose: bool = False) -> tf.Tensor:
        *parts, tail = grouped_split(a.values, self._plan.rows)
        matrices = [Fp8Tensor(w, tf.reshape(b.scale_inv, [1, 1])) for w in tf.unstack(b.values)]
        out = [self._product(Fp8Tensor(p, a.scale_inv), w, dtype, transpose_b=transpose) for p, w in zip(parts, matrices)]
        out.append(tf.zeros([tf.shape(tail)[0], out[0].shape[1]], dtype))
        return tf.ensure_shape(tf.concat(out, 0), [a.values.shape[0], out[0].shape[1]])

    def outer(self, a: tf.Tensor, d: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        (a, scale_a), (d, scale_d) = self._over_tokens(a), self._over_tokens(d, backward=True)
        pairs = zip(*(grouped_split(t, self._plan.rows)[:-1] for t in (a, d)))
        return tf.stack([
            self._product(Fp8Tensor(p, scale_a), Fp8Tensor(q, scale_d), dtype, transpose_a=True) for p, q in pairs
        ])  # fmt: skip

    def _tiled(self, q: Fp8Tensor, block: tuple[int, int]) -> Fp8Tensor:
        return q

    def _over_tokens(self, x: tf.Tensor, *, backward: bool = False) -> Fp8Tensor:
        return fp8_quantize(x, block=None, **quantize_options(self._recipe, backward=backward), fuse=self._fuse)

    def _product(self, a: Fp8Tensor, b: Fp8Tensor, dtype: tf.DType, **transpose: bool) -> tf.Tensor:
        options = {name: self._matmul[name] for name in ("accumulate", "interval", "bits", "fuse")}
        return fp8_gemm(a, b, a_block=None, b_block=None, dtype=dtype, **options, **transpose)
