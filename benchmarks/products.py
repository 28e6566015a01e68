"""The matrix products of a case and nothing else: what is left of a time without them is all that can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from benchmarks.protocol import Prepared
from dsv3 import ComputePolicy, ModelConfig
from dsv3.ops.products import matmul_transposed


class Product(NamedTuple):
    """`count` products `[lead, rows, inner] @ [lead, inner, columns]`, of unlike operands; `lead` 0: of matrices."""

    lead: int
    rows: int
    inner: int
    columns: int
    count: int = 1


def expert_products(tokens: int, width: int, inner: int, num_experts: int, top_k: int, multiple: int) -> list[Product]:
    """Of the routed experts, if all get as many rows."""
    share = -(-tokens * top_k // num_experts // multiple) * multiple
    return [Product(0, share, width, 2 * inner, num_experts), Product(0, share, inner, width, num_experts)]


def model_products(cfg: ModelConfig, batch: int, length: int, *, policy: ComputePolicy, prefill: bool) -> list[Product]:
    """Of a forward pass, the routers' apart; in a `prefill` the last layer has its latents only, and there are no logits."""
    n, d, heads, mla, moe = batch * length, cfg.hidden_size, cfg.mla.num_heads, cfg.mla, cfg.moe
    found, block = [], policy.query_block(length)
    for layer in range(cfg.num_layers):
        found.append(Product(0, n, d, mla.cache_width))
        if prefill and layer == cfg.num_layers - 1:
            break
        found += [Product(0, n, d, mla.q_latent), Product(0, n, mla.q_latent, heads * mla.qk_dim)]
        found.append(Product(0, n, mla.kv_latent, heads * (mla.nope_dim + mla.v_dim)))
        for start in range(0, length, block):
            end = min(start + block, length)
            found.append(Product(batch * heads, end - start, mla.qk_dim, end))
            found.append(Product(batch * heads, end - start, end, mla.v_dim))
        found.append(Product(0, n, heads * mla.v_dim, d))
        dense = layer < cfg.num_dense_layers
        inner = cfg.intermediate_size if dense else moe.intermediate_size * moe.num_shared
        found += [Product(0, n, d, 2 * inner), Product(0, n, inner, d)]
        if not dense:
            router = moe.router
            multiple = policy.row_multiple(n * router.top_k, router.num_experts)
            found += expert_products(n, d, moe.intermediate_size, router.num_experts, router.top_k, multiple)
    return found if prefill else [*found, Product(0, n, d, cfg.vocab_size)]


def prepare_products(products: Sequence[Product], dtype: str, *, backward: bool) -> Prepared:
    """One after the other, as dsv3 has each computed; with the two products of each one's gradients for `backward`."""
    rng, todo = np.random.default_rng(0), []
    for lead, rows, inner, columns, count in products:
        for _ in range(count):
            shapes = [(rows, inner), (inner, columns), (rows, columns)][: 3 if backward else 2]
            todo.append([normal(rng, [lead, *shape] if lead else shape, dtype) for shape in shapes])

    @tf.function(autograph=False)
    def run():
        made = []
        for a, b, *dys in todo:
            made.append(tf.matmul(a, b))
            for dy in dys:
                matrices = len(a.shape) == 2
                made.append(matmul_transposed(dy, b, fuse=True) if matrices else tf.matmul(dy, b, transpose_b=True))
                made.append(tf.matmul(a, dy, transpose_a=True))
        return tf.add_n([tf.reshape(y, [-1])[0] for y in made])  # so that each is wanted

    return Prepared(lambda seed: (), lambda inputs: run().numpy())


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> tf.Tensor:
    """Normal numbers, drawn in float32."""
    return tf.cast(tf.constant(rng.standard_normal(shape, np.float32)), dtype)
