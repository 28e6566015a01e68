"""The routed experts of `ops.experts` over quantised weights: a matrix is decoded only while its expert computes.

`sorted` loops over the experts that have tokens, `blocks` over all blocks of rows (static shapes, for XLA), `rows` repeats
its graph for each (token, choice). The others' weights are not touched.
"""

from __future__ import annotations

import tensorflow as tf

from dsv3.checks import check_choice
from dsv3.graph import plain
from dsv3.ops.dispatch import Dispatch, combine_rows, dispatch_rows, scatter_weights
from dsv3.ops.experts import KERNELS, check_experts, weighted_swiglu
from dsv3.ops.grouped import row_owner
from dsv3.ops.quantized import QuantizedWeight, check_quantized, quantized_matmul
from dsv3.typing import TensorLike


@plain
def quantized_experts(
    x: TensorLike,
    weights: TensorLike,
    experts: TensorLike,
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    *,
    kernel: str = "sorted",
    multiple: int = 32,
    fuse: bool = True,
) -> tf.Tensor:
    """Sends each token through its chosen experts and sums the results by gate value.

    Args:
      x: `[N, D]` tokens, static N.
      weights: `[N, K]` float32 gate values.
      experts: `[N, K]` int32 chosen experts; E stands for none, adds nothing, and needs the weight 0.
      gate_up: `QuantizedWeight` of `[E, D, 2F]`; down: of `[E, F, D]`.
      kernel: `"sorted"`, `"blocks"` or `"rows"`; all compute the same function.
      multiple: rows of an expert are rounded up to this (`sorted`), or the block size (`blocks`).
      fuse: decode by a compiled kernel, see `quantized_matmul`.

    Returns:
      `[N, D]` in `x`'s dtype: `experts_apply` with the decoded weights.

    Raises:
      ValueError: operands that do not fit, or a bad kernel.

    References: DeepSeek-V3 section 2.1.2, equation 12.
    """
    check_choice("quantized_experts", "kernel", kernel, KERNELS)
    gate_up = check_quantized("quantized_experts", "gate_up", gate_up)
    down = check_quantized("quantized_experts", "down", down)
    check_experts("quantized_experts", x, weights, experts, gate_up, down)
    x, weights, experts = tf.convert_to_tensor(x), tf.cast(weights, tf.float32), tf.cast(experts, tf.int32)
    if x.shape[0] == 0:
        return tf.zeros_like(x)

    def apply(rows: tf.Tensor, w: tf.Tensor, expert: tf.Tensor) -> tf.Tensor:
        """Rows of one expert, weighted."""
        first, second = (QuantizedWeight(q.values[expert], q.scale_inv[expert]) for q in (gate_up, down))
        act = weighted_swiglu(quantized_matmul(rows, first, fuse=fuse), w)
        return quantized_matmul(act, second, fuse=fuse)

    if kernel == "rows":
        return _rows(apply, x, weights, tf.minimum(experts, gate_up.shape[0] - 1))
    plan = dispatch_rows(experts, gate_up.shape[0], multiple=multiple)
    w, buffer = scatter_weights(weights, plan.slots, size=plan.tokens.shape[0]), tf.gather(x, plan.tokens)
    if kernel == "blocks":
        return combine_rows(_blocks(apply, buffer, w, plan, multiple), plan.slots)
    return combine_rows(_sorted(apply, buffer, w, plan), plan.slots)


def _sorted(apply, buffer: tf.Tensor, w: tf.Tensor, plan: Dispatch) -> tf.Tensor:
    """One turn for each expert with tokens; `[C, D]`, zeros behind the last expert's rows."""
    chosen = tf.cast(tf.where(plan.rows > 0)[:, 0], tf.int32)
    count = tf.shape(chosen)[0]
    # The last piece is the tail, so there is something to join even where no token chose an expert.
    parts = tf.TensorArray(buffer.dtype, count + 1, infer_shape=False, element_shape=[None, buffer.shape[1]])

    def turn(i, parts):
        expert = chosen[i]
        start, rows = plan.starts[expert], plan.rows[expert]
        y = apply(buffer[start : start + rows], w[start : start + rows], expert)
        return i + 1, parts.write(i, y)

    _, parts = tf.while_loop(lambda i, _: i < count, turn, [0, parts], parallel_iterations=1)
    tail = buffer.shape[0] - tf.reduce_sum(plan.rows)
    out = parts.write(count, tf.zeros([tail, buffer.shape[1]], buffer.dtype)).concat()
    return tf.ensure_shape(out, buffer.shape)


def _blocks(apply, buffer: tf.Tensor, w: tf.Tensor, plan: Dispatch, block: int) -> tf.Tensor:
    """One turn for each block of rows, used or not."""
    (size, width), count = buffer.shape, buffer.shape[0] // block
    owner = row_owner(plan.starts + plan.rows, tf.range(count) * block)
    owner = tf.minimum(owner, plan.rows.shape[0] - 1)  # the tail's blocks: any expert, their rows are never read
    buffer, w = tf.reshape(buffer, [count, block, width]), tf.reshape(w, [count, block])
    parts = tf.TensorArray(buffer.dtype, count, element_shape=[block, width])

    def turn(i, parts):
        return i + 1, parts.write(i, apply(buffer[i], w[i], owner[i]))

    _, parts = tf.while_loop(lambda i, _: i < count, turn, [0, parts], parallel_iterations=1)
    return tf.reshape(parts.stack(), [size, width])


def _rows(apply, x: tf.Tensor, weights: tf.Tensor, experts: tf.Tensor) -> tf.Tensor:
    """One product for each (token, choice), one after the other."""
    n, k = experts.shape
    out, before = [], x
    for i in range(n):
        parts = []
        for j in range(k):
            with tf.control_dependencies([] if tf.executing_eagerly() else [before]):
                row = tf.identity(x[i : i + 1])
            before = apply(row, weights[i, j : j + 1], experts[i, j])
            parts.append(tf.cast(before, tf.float32))
        out.append(tf.cast(tf.add_n(parts), x.dtype))
    return tf.concat(out, 0)
