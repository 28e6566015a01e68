"""The worker that runs dsv3: `python -m benchmarks.dsv3_side THREADS`."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import tensorflow as tf

import dsv3
from benchmarks.products import expert_products, model_products, normal, prepare_products
from benchmarks.protocol import Prepared, serve
from dsv3 import tree
from dsv3.compiled import RowWrite, compile_step, place
from dsv3.nn.cache import Cache, cache_init
from dsv3.nn.model import ModelParams, absorb_params
from dsv3.ops.attention import attention, causal_mask
from dsv3.ops.experts import experts_apply
from dsv3.serve.steps import Sampling, decode_step, prefill_step, state_init
from dsv3.train.optim import adamw
from dsv3.train.step import make_train_step, train_state

KEY = [0, 1]
ROOM = 64  # slots of a decode cache behind its context
LEARNING_RATE = 1e-5  # small: a thousand steps on random tokens leave the routing as it is

_config = dsv3.preset("bench")


def setup(overrides: Mapping[str, Any], weights: str | None = None) -> dict[str, Any]:
    """Chooses the model: the preset `bench` with `overrides`.

    Args:
      overrides: fields as `ModelConfig.replace` takes them.
      weights: a file to write the parameters to (npz, transformers' names), or `None`.

    Returns:
      The contents of its `config.json`.
    """
    global _config
    _config = dsv3.preset("bench").replace(**overrides)
    if weights is not None:
        np.savez(weights, **hf_params(_params("float32")))
    return _config.to_hf()


def logits(batch: int, length: int) -> list[float]:
    """Returns some logits in float32, to compare with the other side's: the last position's of each row."""
    tokens = _tokens(0, batch, length)
    out = dsv3.model_apply(_params("float32"), dsv3.router_init(_config), tokens, cfg=_config)
    return out.logits[:, -1].numpy().ravel().tolist()


def hf_params(params: ModelParams) -> dict[str, np.ndarray]:
    """Returns the parameters (of a model without MTP modules) under transformers' names, as it stores them."""
    out = {"model.embed_tokens.weight": params.embed, "model.norm.weight": params.norm}
    out["lm_head.weight"] = tf.transpose(params.head)

    def matrix(name: str, weight: tf.Tensor, outputs: int) -> None:
        out[f"{name}.weight"] = tf.transpose(tf.reshape(weight, [-1, outputs]))

    def mlp(name: str, ffn: Any) -> None:
        gate, up = tf.split(ffn.gate_up, 2, -1)
        for part, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", ffn.down)):
            matrix(f"{name}.{part}", weight, weight.shape[-1])

    for i in range(_config.num_layers):
        dense = i < _config.num_dense_layers
        stack, j = (params.dense, i) if dense else (params.moe, i - _config.num_dense_layers)
        block = tree.slice_leading(stack, j)
        layer, mla = f"model.layers.{i}", block.mla
        names = {"q_a_proj": mla.q_a, "q_b_proj": mla.q_b, "kv_a_proj_with_mqa": mla.kv_a, "kv_b_proj": mla.kv_b}
        for name, weight in names.items():
            matrix(f"{layer}.self_attn.{name}", weight, int(np.prod(weight.shape[1:])))
        matrix(f"{layer}.self_attn.o_proj", mla.o, mla.o.shape[-1])
        norms = {"input_layernorm": block.attn_norm, "post_attention_layernorm": block.ffn_norm}
        norms |= {"self_attn.q_a_layernorm": mla.q_norm, "self_attn.kv_a_layernorm": mla.kv_norm}
        out |= {f"{layer}.{name}.weight": weight for name, weight in norms.items()}
        mlp(f"{layer}.mlp" if dense else f"{layer}.mlp.shared_experts", block.ffn if dense else block.ffn.shared)
        if not dense:
            matrix(f"{layer}.mlp.gate", block.ffn.router, block.ffn.router.shape[-1])
            out[f"{layer}.mlp.experts.gate_up_proj"] = tf.transpose(block.ffn.gate_up, [0, 2, 1])
            out[f"{layer}.mlp.experts.down_proj"] = tf.transpose(block.ffn.down, [0, 2, 1])
    return {name: np.asarray(value) for name, value in out.items()}


def _params(dtype: str) -> ModelParams:
    params = dsv3.model_init(tf.constant(KEY), _config)
    return tree.map_leaves(lambda leaf: tf.cast(leaf, dtype), params)


def _tokens(seed: int, batch: int, length: int) -> tf.Tensor:
    ids = np.random.default_rng(seed).integers(0, _config.vocab_size, [batch, length])
    return tf.constant(ids, tf.int32)


def build_train(batch: int, length: int, dtype: str) -> Prepared:
    """A training step as users get it: loss, gradients, AdamW, router bias; float32 parameters, products in `dtype`."""
    policy = dsv3.default_policy().replace(dtype=dtype)
    optimizer = adamw(LEARNING_RATE, clip_norm=None)
    step = make_train_step(_config, optimizer, policy=policy)
    state = place(train_state(_params("float32"), dsv3.router_init(_config), optimizer))

    def run(tokens):
        nonlocal state
        state, metrics = step(state, tokens)
        return float(metrics.loss)

    return Prepared(lambda seed: _tokens(seed, batch, length + 1), run)


def build_prefill(batch: int, length: int, dtype: str) -> Prepared:
    """The first new token of a batch of prompts, and their cache, by the engine's steps.

    A prompt's last token is left to a decode step (the prefill computes it as padding), so that the last layer's outputs of
    the prefill are not wanted and not computed.
    """
    params, router = absorb_params(_params(dtype), _config), dsv3.router_init(_config)
    policy = dsv3.default_policy()
    prefill = compile_step(functools.partial(prefill_step, cfg=_config, policy=policy, first=True))
    decode = compile_step(functools.partial(decode_step, cfg=_config, policy=policy.replace(fuse=False), greedy=True))
    caches, start = state_init(_config, batch, length, dtype=tf.as_dtype(dtype))
    caches, counts, active = place(caches), tf.fill([batch], length - 1), tf.fill([batch], True)
    zeros = tf.zeros([batch])
    sampling = Sampling(tf.zeros([batch, 2], tf.int32), zeros, tf.zeros([batch], tf.int32), zeros + 1)

    def run(tokens):
        nonlocal caches
        caches, (rows, _) = prefill(caches, params, router, start, tokens, counts)
        rows = rows._replace(token=tokens[:, -1])
        caches, (_, drawn) = decode(caches, params, router, rows, sampling, active)
        return drawn.tokens.numpy()

    return Prepared(lambda seed: _tokens(seed, batch, length), run)


def build_decode(batch: int, context: int, dtype: str) -> Prepared:
    """One new token for each row of a cache that holds `context` tokens; the length goes back now and then, untimed."""
    params, router = absorb_params(_params(dtype), _config), dsv3.router_init(_config)
    policy = dsv3.default_policy().replace(fuse=False)  # one token's element-wise chains are shorter than a kernel's launch

    def decode(cache, tokens):
        out = dsv3.model_apply(params, router, tokens, cfg=_config, cache=cache, policy=policy)
        cache = Cache(RowWrite(out.entries, cache.length), cache.length + 1)
        return cache, tf.argmax(out.logits[:, -1], -1)

    step = compile_step(decode)
    cache = cache_init(_config, batch, context + ROOM, dtype=dtype)
    past = normal(np.random.default_rng(0), cache.kv.shape.as_list(), dtype)
    cache, used = Cache(past, tf.fill([batch], context)), 0

    def draw(seed):
        nonlocal used
        used += 1
        if used > ROOM:
            used = 1
            cache.length.assign(tf.fill([batch], context))
        return _tokens(seed, batch, 1)

    def run(tokens):
        nonlocal cache
        cache, chosen = step(cache, tokens)
        return chosen.numpy()

    return Prepared(draw, run)


def build_experts(tokens: int, width: int, inner: int, num_experts: int, top_k: int, dtype: str) -> Prepared:
    """The routed experts alone, forward and backward, with another routing each time."""
    policy, rng = dsv3.default_policy(), np.random.default_rng(0)
    gate_up = normal(rng, [num_experts, width, 2 * inner], dtype) * width**-0.5
    down = normal(rng, [num_experts, inner, width], dtype) * inner**-0.5
    multiple = policy.row_multiple(tokens * top_k, num_experts)

    @tf.function(autograph=False)
    def step(x, weights, experts, dy, gate_up, down):
        with tf.GradientTape() as tape:
            sources = [x, weights, gate_up, down]
            tape.watch(sources)
            y = experts_apply(
                x, weights, experts, gate_up, down, kernel=policy.experts, multiple=multiple, fuse=policy.fuse
            )
        return y, tape.gradient(y, sources, output_gradients=dy)

    def draw(seed):
        rng = np.random.default_rng(seed)
        experts = np.argpartition(rng.random([tokens, num_experts]), top_k, -1)[:, :top_k]
        x, dy = (normal(rng, [tokens, width], dtype) for _ in range(2))
        return x, tf.constant(rng.random([tokens, top_k], np.float32)), tf.constant(experts, tf.int32), dy

    return Prepared(draw, lambda inputs: step(*inputs, gate_up, down))


def build_attention(batch: int, heads: int, length: int, qk: int, v: int, dtype: str) -> Prepared:
    """Causal attention alone, forward and backward."""
    policy = dsv3.default_policy()

    @tf.function(autograph=False)
    def step(q, k, values, d_out):
        with tf.GradientTape() as tape:
            tape.watch([q, k, values])
            out = attention(
                q, k, values, causal_mask(length), scale=qk**-0.5, causal=True,
                block=policy.query_block(length), max_unroll=policy.attention_unroll, keep=policy.attention_keep,
                fuse=policy.fuse,
            )  # fmt: skip
        return out, tape.gradient(out, [q, k, values], output_gradients=d_out)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return [normal(rng, [batch, heads, length, width], dtype) for width in (qk, qk, v, v)]

    return Prepared(draw, lambda inputs: step(*inputs))


def build_product(size: int, dtype: str) -> Prepared:
    """One square product: the rate that this machine reaches, warm."""
    rng = np.random.default_rng(0)
    a, b = (normal(rng, [size, size], dtype) for _ in range(2))
    product = tf.function(lambda a, b: tf.matmul(a, b), autograph=False)
    return Prepared(lambda seed: (a, b), lambda inputs: product(*inputs))


def build_train_products(batch: int, length: int, dtype: str) -> Prepared:
    """The products of `build_train`."""
    found = model_products(_config, batch, length, policy=dsv3.default_policy(), prefill=False)
    return prepare_products(found, dtype, backward=True)


def build_prefill_products(batch: int, length: int, dtype: str) -> Prepared:
    """The products of `build_prefill`, without the last token's."""
    found = model_products(_config, batch, length, policy=dsv3.default_policy(), prefill=True)
    return prepare_products(found, dtype, backward=False)


def build_expert_products(tokens: int, width: int, inner: int, num_experts: int, top_k: int, dtype: str) -> Prepared:
    """The products of `build_experts`."""
    multiple = dsv3.default_policy().row_multiple(tokens * top_k, num_experts)
    return prepare_products(expert_products(tokens, width, inner, num_experts, top_k, multiple), dtype, backward=True)


BUILDERS = {
    "train": build_train,
    "prefill": build_prefill,
    "decode": build_decode,
    "experts": build_experts,
    "attention": build_attention,
    "product": build_product,
    "train_products": build_train_products,
    "prefill_products": build_prefill_products,
    "expert_products": build_expert_products,
}


def main() -> None:
    """Answers the driver."""
    threads = int(sys.argv[1])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    versions = {"Python": platform.python_version(), "dsv3": dsv3.__version__, "TensorFlow": tf.__version__}
    serve(BUILDERS, {"setup": setup, "logits": logits}, versions)


if __name__ == "__main__":
    main()
