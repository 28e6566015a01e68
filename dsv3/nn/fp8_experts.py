"""The routed experts with all products in FP8, as an `Fp8Recipe` has them: `ops.experts`' sorted rows, quantised.

A token is quantised once, before its rows are laid out by expert. For the gradients of the weights, tiles of 128 tokens
start anew at each expert.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.checks import check
from dsv3.nn.fp8_delayed import DelayedWeight, check_attached, observed
from dsv3.nn.fp8_groups import FIRST, SECOND, BlockGroups, DelayedGroups, TensorGroups, WholeSums
from dsv3.ops.dispatch import Dispatch, combine_rows, dispatch_rows, gather_rows, scatter_weights
from dsv3.ops.experts import check_experts, weighted_swiglu, weighted_swiglu_grad
from dsv3.recipe import Fp8Recipe, sends_fp8
from dsv3.typing import TensorLike


def fp8_experts(
    x: TensorLike,
    weights: TensorLike,
    experts: TensorLike,
    gate_up: TensorLike | DelayedWeight,
    down: TensorLike | DelayedWeight,
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
      gate_up: `[E, D, 2F]`; down: `[E, F, D]`, any floating dtype; with delayed scales each a `DelayedWeight`.
      recipe: see `Fp8Recipe`.
      kernel, multiple, fuse: see `ops.experts.experts_apply`; `"sorted"` or `"blocks"`.

    Returns:
      `[N, D]` in `x`'s dtype, differentiable once.

    References: DeepSeek-V3 sections 2.1.2 and 3.3.
    """
    check_experts("fp8_experts", x, weights, experts, gate_up, down)
    check_attached("fp8_experts", gate_up, recipe)
    check_attached("fp8_experts", down, recipe)
    delayed = recipe.scaling == "delayed"
    amax = (gate_up.amax, down.amax) if delayed else ()
    given = (gate_up.weight, down.weight) if delayed else (gate_up, down)
    x, gate_up, down = map(tf.convert_to_tensor, (x, *given))
    weights, experts = tf.cast(weights, tf.float32), tf.cast(experts, tf.int32)
    if x.shape[0] == 0:
        return tf.zeros_like(x)
    whole = recipe.interval is None  # and so without blocks
    check(
        not whole or kernel == "sorted",
        f"fp8_experts: `kernel` is {kernel!r}, want 'sorted' where `recipe.interval` is None",
    )
    plan = dispatch_rows(experts, gate_up.shape[0], multiple=multiple, fuse=fuse and kernel == "sorted")
    groups = _groups(plan, recipe, {"kernel": kernel, "multiple": multiple, "fuse": fuse}, amax)
    return _apply(groups, x, weights, gate_up, down, *amax)


def _groups(plan: Dispatch, recipe: Fp8Recipe, how: dict[str, Any], amax: tuple[tf.Tensor, ...]) -> BlockGroups:
    if amax:
        return DelayedGroups(plan, recipe, how, amax)
    if recipe.interval is None:
        return WholeSums(plan, recipe, how)
    return (BlockGroups if recipe.scaling == "block" else TensorGroups)(plan, recipe, how)


def _apply(groups: BlockGroups, *operands: tf.Tensor) -> tf.Tensor:
    """The mixture of tokens, gate values and weights, and of histories, whose "gradients" are what it has seen."""
    plan, recipe, fuse = groups.plan, groups.recipe, groups.fuse
    size = plan.tokens.shape[0]

    @tf.custom_gradient
    def apply(x, weights, gate_up, down, *amax):
        w = scatter_weights(weights, plan.slots, size=size, fuse=fuse)
        q, first, second = groups.tokens(x), groups.weight(gate_up, FIRST), groups.weight(down, SECOND)
        h = groups.matmul(q, first, x.dtype)
        kept = groups.keep(h) if recipe.keep_swiglu else h
        y = groups.matmul(groups.rows(weighted_swiglu(h, w, fuse=fuse), SECOND), second, x.dtype)

        def grad(dy):
            dy_rows = groups.gradients(dy)
            d_act = groups.matmul(groups.rows(dy_rows, SECOND, backward=True), second, x.dtype, transpose=True)
            pre = groups.expand(kept, x.dtype) if recipe.keep_swiglu else kept
            act, d_w, d_h = weighted_swiglu_grad(pre, w, d_act, fuse=fuse)
            d_down = groups.outer(act, dy_rows, down.dtype, SECOND)
            retile = recipe.retile or sends_fp8(recipe)  # what arrives in FP8 is all that there is
            rows = groups.expand(q, x.dtype) if retile else gather_rows(x, plan.tokens, fuse=fuse)
            d_gate_up = groups.outer(rows, d_h, gate_up.dtype, FIRST)
            d_rows = groups.matmul(groups.rows(d_h, FIRST, backward=True), first, x.dtype, transpose=True)
            seen = [observed(a, *(groups.seen[site][role] for role in range(3))) for site, a in enumerate(amax)]
            d_x = combine_rows(d_rows, plan.slots, fuse=fuse)
            return d_x, tf.gather(d_w, plan.slots), d_gate_up, d_down, *seen

        return combine_rows(y, plan.slots, fuse=fuse), grad

    return apply(*operands)
