"""The routed experts: `y_n = Σ_k w_nk · SwiGLU(x_n @ gate_up[e_nk]) @ down[e_nk]`, dropless, in three formulations.

`sorted`  rows grouped by expert, one product per expert, backward by hand: fastest on a CPU outside XLA.
`blocks`  rows grouped in blocks of one expert, batched products with gathered weights: static shapes, compiles under XLA.
`rows`    one product per (token, choice), reading the expert's weights in place: for the few tokens of a decode step.

The gate value multiplies the activation before the down product, which is the same sum with fewer multiplications.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.checks import Dims, check, check_choice
from dsv3.graph import plain
from dsv3.ops.activation import swiglu_float32, swiglu_grad_float32
from dsv3.ops.dispatch import Dispatch, combine_rows, dispatch_rows, gather_rows, scatter_weights
from dsv3.ops.fuse import fused
from dsv3.ops.grouped import grouped_matmul, grouped_outer, row_owner
from dsv3.ops.reduce import row_sum
from dsv3.typing import TensorLike

KERNELS = ("sorted", "blocks", "rows")


@plain
def experts_apply(
    x: TensorLike,
    weights: TensorLike,
    experts: TensorLike,
    gate_up: TensorLike,
    down: TensorLike,
    *,
    kernel: str = "sorted",
    multiple: int = 32,
    fuse: bool = False,
) -> tf.Tensor:
    """Sends each token through its chosen experts and sums the results by gate value.

    Args:
      x: `[N, D]` tokens, static N.
      weights: `[N, K]` float32 gate values.
      experts: `[N, K]` int32 chosen experts; E stands for none, adds nothing, and needs the weight 0.
      gate_up: `[E, D, 2F]`; down: `[E, F, D]`, in `x`'s dtype.
      kernel: one of `KERNELS`; all compute the same function.
      multiple: rows of an expert are rounded up to this (`sorted`), or the block size (`blocks`).
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `[N, D]` in `x`'s dtype. Differentiable (once) in `x`, `weights`, `gate_up` and `down`.

    References: DeepSeek-V3 section 2.1.2, equation 12; no token is dropped (section 2.1.2, "No Token-Dropping").
    """
    check_choice("experts_apply", "kernel", kernel, KERNELS)
    check_experts("experts_apply", x, weights, experts, gate_up, down)
    x, gate_up, down = tf.convert_to_tensor(x), tf.convert_to_tensor(gate_up), tf.convert_to_tensor(down)
    weights, experts = tf.cast(weights, tf.float32), tf.cast(experts, tf.int32)
    if x.shape[0] == 0:
        return tf.zeros_like(x)
    if kernel == "rows":
        return _rows(x, weights, experts, gate_up, down)
    plan = dispatch_rows(experts, gate_up.shape[0], multiple=multiple, fuse=fuse and kernel == "sorted")
    if kernel == "blocks":
        return _blocks(x, weights, plan, gate_up, down, block=multiple)
    return _sorted(x, weights, plan, gate_up, down, fuse=fuse)


def check_experts(function: str, x: TensorLike, weights: TensorLike, experts: TensorLike, gate_up: Any, down: Any) -> None:
    """Raises `ValueError` in the name of `function` unless the operands of a mixture fit; weights need a shape only."""
    dims = Dims(function)
    dims("x", x, "N D")
    dims("weights", weights, "N K")
    dims("experts", experts, "N K")
    dims("gate_up", gate_up, "E D J")
    dims("down", down, "E F D")
    check(dims.J == 2 * dims.F, f"{function}: `gate_up` has last dim {dims.J}, want {2 * dims.F} [2F], twice down's F")
    check(dims.N is not None, f"{function}: `x` has an unknown number of tokens, want a static N")


@fused
def weighted_swiglu(h, w):
    return tf.cast(swiglu_float32(h) * tf.expand_dims(w, -1), h.dtype)


def weighted_swiglu_grad(h, w, d_act, *, fuse: bool = False):
    """From d(act) without the gate value: (weighted act, d(gate value), dh)."""
    act, d_weight, *d_h = _swiglu_grads(h, w, d_act, fuse=fuse)
    return act, d_weight, tf.concat(d_h, -1)  # outside the kernel, which would choose between the halves at each element


@fused
def _swiglu_grads(h, w, d_act):
    act, d_act, w = swiglu_float32(h), tf.cast(d_act, tf.float32), tf.expand_dims(w, -1)
    d_weight = row_sum(act * d_act)[:, 0]
    return tf.cast(act * w, h.dtype), d_weight, *(tf.cast(half, h.dtype) for half in swiglu_grad_float32(h, d_act * w))


def _sorted(x, weights, plan: Dispatch, gate_up, down, *, fuse: bool) -> tf.Tensor:
    size = plan.tokens.shape[0]

    @tf.custom_gradient
    def apply(x, weights, gate_up, down):
        w = scatter_weights(weights, plan.slots, size=size, fuse=fuse)
        gate_ups, downs = tf.unstack(gate_up), tf.unstack(down)
        h = grouped_matmul(gather_rows(x, plan.tokens, fuse=fuse), gate_ups, plan.rows)
        y = grouped_matmul(weighted_swiglu(h, w, fuse=fuse), downs, plan.rows)
        out = combine_rows(y, plan.slots, fuse=fuse)

        def grad(dy):
            dy_rows = gather_rows(dy, plan.tokens, fuse=fuse)
            d_act = grouped_matmul(dy_rows, downs, plan.rows, transpose=True, fuse=fuse)
            act, d_w, d_h = weighted_swiglu_grad(h, w, d_act, fuse=fuse)
            d_down = grouped_outer(act, dy_rows, plan.rows)
            d_gate_up = grouped_outer(gather_rows(x, plan.tokens, fuse=fuse), d_h, plan.rows)
            d_x = grouped_matmul(d_h, gate_ups, plan.rows, transpose=True, fuse=fuse)
            d_x = combine_rows(d_x, plan.slots, fuse=fuse)
            return d_x, tf.gather(d_w, plan.slots), d_gate_up, d_down

        return out, grad

    return apply(x, weights, gate_up, down)


def _blocks(x, weights, plan: Dispatch, gate_up, down, *, block: int) -> tf.Tensor:
    size = plan.tokens.shape[0]
    owner = row_owner(plan.starts + plan.rows, tf.range(size // block) * block)
    owner = tf.minimum(owner, gate_up.shape[0] - 1)  # the tail's blocks: any expert, their rows are never read
    w = scatter_weights(weights, plan.slots, size=size)
    rows = tf.reshape(tf.gather(x, plan.tokens), [size // block, block, x.shape[-1]])
    h = tf.matmul(rows, tf.gather(gate_up, owner))
    act = weighted_swiglu(tf.reshape(h, [size, -1]), w)
    y = tf.matmul(tf.reshape(act, [size // block, block, -1]), tf.gather(down, owner))
    return combine_rows(tf.reshape(y, [size, -1]), plan.slots)


def _rows(x, weights, experts, gate_up, down) -> tf.Tensor:
    n, k = experts.shape
    check(n is not None, "experts_apply: `x` has an unknown number of tokens, want a static N for kernel='rows'")
    experts = tf.minimum(experts, gate_up.shape[0] - 1)  # E, none, has the weight 0
    out = []
    for i in range(n):
        token, chosen = x[i : i + 1], experts[i]
        h = tf.concat([tf.matmul(token, gate_up[chosen[j]]) for j in range(k)], 0)
        act = weighted_swiglu(h, weights[i])
        parts = [tf.matmul(act[j : j + 1], down[chosen[j]]) for j in range(k)]
        out.append(tf.cast(tf.add_n([tf.cast(p, tf.float32) for p in parts]), x.dtype))
    return tf.concat(out, 0)


