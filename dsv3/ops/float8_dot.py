"""Products whose operands stay float8 in the program that a compiler gets, so that a GPU's tensor cores can take them.

TensorFlow's own products refuse float8. So a product is a small StableHLO module in the graph (the operation XlaCallModule,
which also runs outside XLA, and on a CPU): `dot_general` of two float8 tensors into float32. XLA makes it a call of cuBLASLt
on a GPU that has such products, and a product of float32 where there are none.
"""

from __future__ import annotations

import math

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_call_module

from dsv3.checks import check
from dsv3.ops.fp8_formats import FORMATS

ELEMENTS = {FORMATS["e4m3"].dtype: "f8E4M3FN", FORMATS["e5m2"].dtype: "f8E5M2"}
PARTIAL_BYTES = 2**30
"""At most so many bytes hold partial sums that have no scales yet (but always those of one block of K)."""

_VERSION = 9  # of the operation's interface: with platforms and disabled checks
_Shape = list[int]


def float8_matmul(
    a: tf.Tensor, b: tf.Tensor, scale_a: tf.Tensor, scale_b: tf.Tensor, *, interval: int | None,
    transpose_a: bool = False, transpose_b: bool = False, function: str = "float8_matmul",
    names: tuple[str, str] = ("a", "b"),
) -> tf.Tensor:  # fmt: skip
    """Returns `Σ_i s_a[m, i]·s_b[n, i]·(Σ_{k in interval i} a[m, k]·b[k, n])`, float32 `[..., M, N]`.

    All intervals of K are one batched product, whose partial sums `[..., I, M, N]` are scaled and added; beyond
    `PARTIAL_BYTES` of them it is cut along K. With one interval it is one plain product.

    Args:
      a: `[..., M, K]`, or `[..., K, M]` with `transpose_a`; float8_e4m3fn or float8_e5m2, static shape.
      b: `[..., K, N]`, or `[..., N, K]` with `transpose_b`. Leading dims are broadcast.
      scale_a: `[..., M or 1, I]` float32. scale_b: `[..., N or 1, I]`.
      interval: elements of K under one pair of scales; the last may be fewer. None: all.
      transpose_a, transpose_b: how the operands are stored.
      function, names: of the function and its arguments, for errors.

    Raises:
      ValueError: another dtype, or a shape that is not static.
    """
    for name, x in zip(names, (a, b)):
        check(x.dtype in ELEMENTS, f"{function}: `{name}` has dtype {x.dtype.name}, want float8 for operands='float8'")
        check(
            x.shape.is_fully_defined(),
            f"{function}: `{name}` has shape {x.shape}, want a static one for operands='float8'",
        )
    depth = a.shape[-2 if transpose_a else -1]
    rows, columns = a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1]
    lead = tf.broadcast_static_shape(a.shape[:-2], b.shape[:-2]).as_list()
    if not depth:
        return tf.zeros([*lead, rows, columns])
    interval = min(interval or depth, depth)
    count = -(-depth // interval)
    step = max(1, PARTIAL_BYTES // max(1, 4 * math.prod(lead) * rows * columns))
    total = None
    for first in range(0, count, step):
        cut = slice(first, min(first + step, count))
        y = _partial_sums(a, b, lead, (transpose_a, transpose_b), cut, interval)
        y *= tf.expand_dims(tf.linalg.matrix_transpose(scale_a)[..., cut, :], -1)
        y *= tf.expand_dims(tf.linalg.matrix_transpose(scale_b)[..., cut, :], -2)
        y = tf.reduce_sum(y, -3)
        total = y if total is None else total + y
    return total


def _partial_sums(
    a: tf.Tensor, b: tf.Tensor, lead: _Shape, transpose: tuple[bool, bool], cut: slice, interval: int
) -> tf.Tensor:
    """`[..., I, M, N]`: the products over some intervals of K, without scales."""
    lines, operands, dims = [], [], []
    for name, x, k_first in (("a", a, transpose[0]), ("b", b, not transpose[1])):
        operand = _Operand(name, x, k_first, len(lead))
        operand.take(cut, interval)
        operand.broadcast(lead)
        lines += operand.lines
        operands.append(operand)
        dims.append(operand.batch_and_depth())
    rows, columns = (x.rows for x in operands)
    groups = [cut.stop - cut.start] if cut.stop - cut.start > 1 else []
    shape = [*lead, *groups, rows, columns]
    batch, depth = zip(*dims)
    types = ", ".join(x.type for x in operands)
    batching = f"batching_dims = {batch[0]} x {batch[1]}, " if batch[0] else ""
    lines.append(
        f"%y = stablehlo.dot_general {operands[0].value}, {operands[1].value}, {batching}"
        f"contracting_dims = [{depth[0]}] x [{depth[1]}] : ({types}) -> {_type(shape, 'f32')}"
    )
    arguments = ", ".join(f"%{name}: {_type(x.shape.as_list(), ELEMENTS[x.dtype])}" for name, x in (("a", a), ("b", b)))
    result = _type(shape, "f32")
    head = ["module @float8_dot {", f"func.func public @main({arguments}) -> {result} {{"]
    module = "\n".join([*head, *lines, f"return %y : {result}", "}", "}", ""])
    # Any platform: what is traced on a CPU machine may be exported for a GPU.
    (y,) = xla_call_module(
        args=[a, b], version=_VERSION, module=module, Sout=[tf.TensorShape(shape)], Tout=[tf.float32],
        platforms=["CPU"], disabled_checks=["platform"],
    )  # fmt: skip
    return y if groups else tf.expand_dims(y, -3)


class _Operand:
    """The lines of a module that bring an operand into the form that the product takes."""

    def __init__(self, name: str, x: tf.Tensor, k_first: bool, lead: int):
        self._name, self._k_first, self._lead = name, k_first, lead
        self._element, self.shape = ELEMENTS[x.dtype], x.shape.as_list()
        self._grouped = False
        self.rows = self.shape[-1 if k_first else -2]
        self.value, self.lines = f"%{name}", []

    @property
    def type(self) -> str:
        return _type(self.shape, self._element)

    def take(self, cut: slice, interval: int) -> None:
        """Slices intervals of K, fills up the last one with zeros, and gives them a dim of their own."""
        axis = len(self.shape) - (2 if self._k_first else 1)
        start, stop = cut.start * interval, min(cut.stop * interval, self.shape[axis])
        if stop - start < self.shape[axis]:
            ranges = ", ".join(f"{start}:{stop}" if i == axis else f"0:{n}" for i, n in enumerate(self.shape))
            self._add("cut", f"stablehlo.slice {self.value} [{ranges}]", self._with(axis, [stop - start]))
        missing = (cut.stop - cut.start) * interval - (stop - start)
        if missing:
            high = [missing if i == axis else 0 for i in range(len(self.shape))]
            none = [0] * len(high)
            zero = f"%{self._name}_zero"
            self.lines.append(f"{zero} = stablehlo.constant dense<0.0> : {_type([], self._element)}")
            padded = self._with(axis, [stop - start + missing])
            text = f"stablehlo.pad {self.value}, {zero}, low = {none}, high = {high}, interior = {none}"
            self._add("pad", text, padded, f"({self.type}, {_type([], self._element)})")
        if cut.stop - cut.start > 1:
            self._grouped = True
            groups = self._with(axis, [cut.stop - cut.start, interval])
            self._add("groups", f"stablehlo.reshape {self.value}", groups)

    def broadcast(self, lead: _Shape) -> None:
        """Repeats the operand along leading dims that only the other has."""
        inner = 3 if self._grouped else 2
        have, rest = self.shape[:-inner], self.shape[-inner:]
        if have != lead:
            dims = list(range(len(lead) - len(have), len(lead) + inner))
            text = f"stablehlo.broadcast_in_dim {self.value}, dims = {dims}"
            self._add("lead", text, [*lead, *rest])

    def batch_and_depth(self) -> tuple[list[int], int]:
        """Returns the product's batch dims and the one that it sums over."""
        lead = list(range(self._lead))
        if not self._grouped:
            return lead, self._lead + (0 if self._k_first else 1)
        group = self._lead + (0 if self._k_first else 1)
        return [*lead, group], group + 1

    def _with(self, axis: int, sizes: _Shape) -> _Shape:
        return [*self.shape[:axis], *sizes, *self.shape[axis + 1 :]]

    def _add(self, name: str, text: str, shape: _Shape, types: str = "") -> None:
        types = types or f"({self.type})"
        self.value, self.shape = f"%{self._name}_{name}", shape
        self.lines.append(f"{self.value} = {text} : {types} -> {self.type}")


def _type(shape: _Shape, element: str) -> str:
    return f"tensor<{''.join(f'{n}x' for n in shape)}{element}>"
