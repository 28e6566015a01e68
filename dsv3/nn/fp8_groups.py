"""The quantisers and products of rows that are laid out by expert, for each way to scale.

A mixture has two sites, `FIRST` and `SECOND`: the products with `gate_up` and with `down`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from dsv3.nn.fp8 import MIN_GRADIENT, quantize_options, quantize_rows, quantize_weight
from dsv3.nn.fp8_delayed import GRADIENT, INPUT, WEIGHT, delayed_quantize
from dsv3.ops.dispatch import Dispatch, gather_rows, scatter_weights
from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK, Fp8Tensor, fp8_fake, fp8_quantize
from dsv3.ops.gemm import fp8_expand, fp8_gemm
from dsv3.ops.gemm_grouped import fp8_grouped_gemm, fp8_grouped_wgrad, fp8_quantize_groups
from dsv3.ops.grouped import grouped_split
from dsv3.recipe import Fp8Recipe, sends_fp8

FIRST, SECOND = range(2)


class BlockGroups:
    """Scales by block."""

    def __init__(self, plan: Dispatch, recipe: Fp8Recipe, how: dict[str, Any]):
        self.plan, self.recipe, self.fuse = plan, recipe, how["fuse"]
        options = {name: getattr(recipe, name) for name in ("accumulate", "interval", "bits", "operands")}
        self._matmul, self._outer = options | how, options | {"kernel": how["kernel"], "fuse": how["fuse"]}

    def rows(self, x: tf.Tensor, site: int, *, backward: bool = False) -> Fp8Tensor:
        """Rows by expert, an activation or, with `backward`, a gradient."""
        sent = backward and site == SECOND and sends_fp8(self.recipe)
        return quantize_rows(x, self.recipe, backward=backward, sent=sent, fuse=self.fuse)

    def tokens(self, x: tf.Tensor) -> Fp8Tensor:
        """Tokens' rows, by expert; what has travelled in FP8 comes out of this as it was."""
        q = quantize_rows(x, self.recipe, sent=sends_fp8(self.recipe), fuse=self.fuse)
        return Fp8Tensor(*(tf.gather(t, self.plan.tokens) for t in q))

    def keep(self, h: tf.Tensor) -> Fp8Tensor:
        """SwiGLU's inputs, for the backward pass."""
        return self.rows(h, SECOND)

    def gradients(self, dy: tf.Tensor) -> tf.Tensor:
        """The tokens' gradients by row, rounded to what travels."""
        if sends_fp8(self.recipe):
            options = {"fmt": self.recipe.backward, "scale_kind": "power_of_two", "min_amax": MIN_GRADIENT}
            dy = fp8_fake(dy, block=ROW_BLOCK, **options, fuse=self.fuse)
        return gather_rows(dy, self.plan.tokens, fuse=self.fuse)

    def weight(self, weight: tf.Tensor, site: int) -> Fp8Tensor:
        """The experts' matrices."""
        return quantize_weight(weight, self.recipe, fuse=self.fuse)

    def expand(self, q: Fp8Tensor, dtype: tf.DType) -> tf.Tensor:
        """Rows in a wider dtype."""
        return tf.cast(fp8_expand(*q, block=ROW_BLOCK, fuse=self.fuse), dtype)

    def matmul(self, a: Fp8Tensor, b: Fp8Tensor, dtype: tf.DType, *, transpose: bool = False) -> tf.Tensor:
        """Each expert's rows times its matrix."""
        return fp8_grouped_gemm(a, b, self.plan.rows, transpose_b=transpose, dtype=dtype, **self._matmul)

    def outer(self, a: tf.Tensor, d: tf.Tensor, dtype: tf.DType, site: int) -> tf.Tensor:
        """`aᵀ @ d` for each expert, of an activation and a gradient."""
        pair = [self.over_tokens(a, site), self.over_tokens(d, site, backward=True)]
        return fp8_grouped_wgrad(*pair, self.plan.rows, dtype=dtype, **self._outer)

    def over_tokens(self, x: tf.Tensor, site: int, *, backward: bool = False) -> Fp8Tensor:
        """Rows by expert, quantised along tokens; what has travelled with power-of-two scales stays with such."""
        options = quantize_options(self.recipe, backward=backward)
        if sends_fp8(self.recipe) and site == (SECOND if backward else FIRST):
            options |= {"scale_kind": "power_of_two"}
        # What lies between the groups is the first token's, and must not count in the scale of an expert's last tile.
        real = scatter_weights(tf.ones(self.plan.slots.shape), self.plan.slots, size=x.shape[0], fuse=self.fuse)
        x = tf.where(tf.expand_dims(real > 0, -1), x, tf.zeros([], x.dtype))
        return fp8_quantize_groups(x, self.plan.rows, **options, fuse=self.fuse)


class TensorGroups(BlockGroups):
    """One scale for a tensor, repeated as that of each tile, which is what products of groups take.

    Expanded operands take the tiles' scales at no price. Of float8 operands there is a product for each scale along K, so
    they keep the one that they have; but for the weights' gradients, which are sums over tiles in any case.
    """

    def __init__(self, plan: Dispatch, recipe: Fp8Recipe, how: dict[str, Any]):
        super().__init__(plan, recipe, how)
        self.untiled = recipe.operands == "float8"
        self._matmul["scaling"] = "tensor" if self.untiled else "block"

    def quantize(self, x: tf.Tensor, site: int, role: int) -> Fp8Tensor:
        """A tensor with one scale; `role` is what it is at its site, as of `fp8_delayed`."""
        return fp8_quantize(x, block=None, **quantize_options(self.recipe, backward=role == GRADIENT), fuse=self.fuse)

    def rows(self, x: tf.Tensor, site: int, *, backward: bool = False) -> Fp8Tensor:
        return self._tiled(self.quantize(x, site, GRADIENT if backward else INPUT), ROW_BLOCK)

    def tokens(self, x: tf.Tensor) -> Fp8Tensor:
        q = self.quantize(x, FIRST, INPUT)
        return self._tiled(q._replace(values=tf.gather(q.values, self.plan.tokens)), ROW_BLOCK)

    def keep(self, h: tf.Tensor) -> Fp8Tensor:
        return self._tiled(quantize_rows(h, self.recipe, fuse=self.fuse), ROW_BLOCK)

    def weight(self, weight: tf.Tensor, site: int) -> Fp8Tensor:
        return self._tiled(self.quantize(weight, site, WEIGHT), WEIGHT_BLOCK)

    def expand(self, q: Fp8Tensor, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(fp8_expand(*q, block=None if self.untiled else ROW_BLOCK, fuse=self.fuse), dtype)

    def over_tokens(self, x: tf.Tensor, site: int, *, backward: bool = False) -> Fp8Tensor:
        q = self.quantize(x, site, GRADIENT if backward else INPUT)
        like = fp8_quantize_groups(tf.zeros_like(x), self.plan.rows).scale_inv
        return Fp8Tensor(q.values, tf.broadcast_to(q.scale_inv, like.shape))

    def _tiled(self, q: Fp8Tensor, block: tuple[int, int]) -> Fp8Tensor:
        if self.untiled:
            return q
        *lead, rows, columns = q.values.shape
        return Fp8Tensor(q.values, tf.broadcast_to(q.scale_inv, [*lead, -(-rows // block[0]), -(-columns // block[1])]))


class DelayedGroups(TensorGroups):
    """One scale for a tensor, from its history; `amax`: the histories of both sites, `seen`: the present largest values."""

    def __init__(self, plan: Dispatch, recipe: Fp8Recipe, how: dict[str, Any], amax: tuple[tf.Tensor, tf.Tensor]):
        super().__init__(plan, recipe, how)
        self.amax, self.seen = amax, ({}, {})

    def quantize(self, x: tf.Tensor, site: int, role: int) -> Fp8Tensor:
        fmt = self.recipe.backward if role == GRADIENT else self.recipe.forward
        q, now = delayed_quantize(x, self.amax[site][role], fmt=fmt, fuse=self.fuse)
        self.seen[site].setdefault(role, now)  # of the first time: what is quantised again is cut off already
        return q


class WholeSums(TensorGroups):
    """One scale for a tensor, and sums that are never promoted on their way: a product for each expert."""

    def __init__(self, plan: Dispatch, recipe: Fp8Recipe, how: dict[str, Any]):
        super().__init__(plan, recipe, how)
        self.untiled = True

    def matmul(self, a: Fp8Tensor, b: Fp8Tensor, dtype: tf.DType, *, transpose: bool = False) -> tf.Tensor:
        *parts, tail = grouped_split(a.values, self.plan.rows)
        matrices = [Fp8Tensor(w, tf.reshape(b.scale_inv, [1, 1])) for w in tf.unstack(b.values)]
        out = [self._product(Fp8Tensor(p, a.scale_inv), w, dtype, transpose_b=transpose) for p, w in zip(parts, matrices)]
        out.append(tf.zeros([tf.shape(tail)[0], out[0].shape[1]], dtype))
        return tf.ensure_shape(tf.concat(out, 0), [a.values.shape[0], out[0].shape[1]])

    def outer(self, a: tf.Tensor, d: tf.Tensor, dtype: tf.DType, site: int) -> tf.Tensor:
        (a, scale_a), (d, scale_d) = self.quantize(a, site, INPUT), self.quantize(d, site, GRADIENT)
        pairs = zip(*(grouped_split(t, self.plan.rows)[:-1] for t in (a, d)))
        return tf.stack([
            self._product(Fp8Tensor(p, scale_a), Fp8Tensor(q, scale_d), dtype, transpose_a=True) for p, q in pairs
        ])  # fmt: skip

    def _product(self, a: Fp8Tensor, b: Fp8Tensor, dtype: tf.DType, **transpose: bool) -> tf.Tensor:
        options = {name: self._matmul[name] for name in ("accumulate", "interval", "bits", "fuse")}
        return fp8_gemm(a, b, a_block=None, b_block=None, dtype=dtype, **options, **transpose)
