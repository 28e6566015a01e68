"""Parameters whose matrices stay quantised: those that the published checkpoint stores in FP8, in FP8 or INT8.

Embedding, head, router, norms, biases and the MTP modules' projection stay as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check, check_choice, check_same_tree
from dsv3.config import ModelConfig
from dsv3.nn.model import ModelParams, model_specs
from dsv3.ops.quantized import GROUP, KINDS, QuantizedWeight, quantized_decode, quantized_encode
from dsv3.typing import Tree


class Matrix(NamedTuple):
    """How a parameter is a stack of matrices: dims of its inputs and of its outputs, and `parts` side by side."""

    inputs: int = 1
    outputs: int = 1
    parts: int = 1


MATRICES = {
    "q_a": Matrix(), "q_b": Matrix(outputs=2), "kv_a": Matrix(), "kv_b": Matrix(outputs=2), "o": Matrix(inputs=2),
    "gate_up": Matrix(parts=2), "down": Matrix(),
}  # fmt: skip
"""By the last name of its path, what is quantised."""


def matrix_of(path: str) -> Matrix | None:
    """Returns how the parameter at a dotted path is quantised, `None` for one that is not."""
    return MATRICES.get(path.rpartition(".")[2])


def matrix_shape(shape: tuple[int, ...], of: Matrix) -> tuple[int, ...]:
    """Returns `[..., D, F]` for the shape of a parameter."""
    split = len(shape) - of.outputs
    lead = shape[: split - of.inputs]
    return (*lead, math.prod(shape[len(lead) : split]), math.prod(shape[split:]))


def scale_shape(shape: tuple[int, ...], of: Matrix, kind: str) -> tuple[int, ...]:
    """Returns the shape of the scales of a quantised parameter of a shape."""
    *lead, rows, columns = matrix_shape(shape, of)
    parts = of.parts if kind == "fp8" else 1
    return (*lead, -(-rows // GROUP), parts, -(-(columns // parts) // (GROUP if kind == "fp8" else 1)))


def quantize_params(params: ModelParams, cfg: ModelConfig, *, kind: str = "fp8", fuse: bool = True) -> ModelParams:
    """Quantises the matrices of attention, feed-forward layers and experts; everything computes with them as they are.

    Args:
      params: the model's, float32 or bfloat16. Matrices that are quantised in that kind already stay.
      cfg: the configuration.
      kind: `"fp8"`, to the bit what `save_pretrained(..., dtype="float8")` stores, or `"int8"`.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Returns:
      `ModelParams` with a `QuantizedWeight` in place of those matrices. They are for inference: training refuses them.
      Layers and experts are quantised one at a time, so beside both copies there is room for one matrix only.

    Raises:
      ValueError: parameters that are not `cfg`'s, or a bad kind.

    References: DeepSeek-V3 section 3.3; `QuantizedWeight` has the formats.
    """
    check_choice("quantize_params", "kind", kind, KINDS)

    def quantize(path: str, shape: tuple[int, ...], leaf: tf.Tensor | QuantizedWeight):
        of = matrix_of(path)
        if of is None:
            return leaf
        if isinstance(leaf, QuantizedWeight):
            check(leaf.kind == kind, f"quantize_params: `{path}` is quantised to {leaf.kind}, want {kind} or floating")
            return leaf
        *lead, rows, columns = matrix_shape(shape, of)
        flat = tf.reshape(leaf, [-1, rows, columns])
        found = [quantized_encode(flat[i], kind=kind, parts=of.parts, fuse=fuse) for i in range(flat.shape[0])]
        values, scale = (tf.stack(pieces) for pieces in zip(*found))
        return QuantizedWeight(tf.reshape(values, shape), tf.reshape(scale, scale_shape(shape, of, kind)))

    return _map("quantize_params", quantize, params, cfg)


def dequantize_params(
    params: ModelParams, cfg: ModelConfig, *, dtype: tf.DType | str = tf.bfloat16, fuse: bool = True
) -> ModelParams:
    """Returns `ModelParams` with every quantised matrix of `params` decoded to `dtype`; other leaves stay.

    Args:
      params: see `quantize_params`.
      cfg: the configuration.
      dtype: of the decoded matrices.
      fuse: compile the element-wise parts as kernels (not under XLA).

    Raises:
      ValueError: parameters that are not `cfg`'s.
    """

    def dequantize(path: str, shape: tuple[int, ...], leaf: tf.Tensor | QuantizedWeight):
        if not isinstance(leaf, QuantizedWeight):
            return leaf
        flat = leaf._replace(values=tf.reshape(leaf.values, matrix_shape(shape, matrix_of(path))))
        return tf.reshape(quantized_decode(flat, dtype=dtype, fuse=fuse), shape)

    return _map("dequantize_params", dequantize, params, cfg)


def is_quantized(params: Tree) -> bool:
    """Whether some matrix of a tree is a `QuantizedWeight`."""
    return any(path.rpartition(".")[2] == "scale_inv" for path, _ in tree.items(params))


def params_dict(params: Tree) -> dict[str, tf.Tensor | QuantizedWeight]:
    """Returns path → leaf, as `tree.to_dict`, where a quantised matrix is one leaf; `tree.graft` is the inverse."""
    found: dict[str, tf.Tensor | QuantizedWeight] = {}
    for path, leaf in tree.items(params):
        owner, _, field = path.rpartition(".")
        if field in QuantizedWeight._fields:
            found[owner] = tree.subtree(params, owner)
        else:
            found[path] = leaf
    return found


def _map(function: str, fn, params: ModelParams, cfg: ModelConfig) -> ModelParams:
    """Applies `fn(path, shape, leaf)` to every leaf of parameters that must be the configuration's."""
    specs, leaves = model_specs(cfg), params_dict(params)
    shapes = {path: tuple(spec.shape) for path, spec in tree.items(specs)}
    check_same_tree(function, "params", leaves, shapes)
    for path, leaf in leaves.items():
        got = tuple(leaf.shape)
        check(got == shapes[path], f"{function}: `{path}` has shape {got}, want {shapes[path]}")
    return tree.graft(specs, {path: fn(path, shapes[path], leaf) for path, leaf in leaves.items()})
