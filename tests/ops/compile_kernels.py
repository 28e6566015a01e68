"""Prints, as JSON, how many kernels parts of training and inference have, and in which XLA uses YNNPACK: none, hopefully.

`compile_kernels.py PART...` traces steps of a small model with as many tokens as it takes and compiles their kernels,
without running them. It wants a process of its own: a kernel that was traced before is not seen.
"""

from __future__ import annotations

import json
import sys

import tensorflow as tf

import dsv3
from dsv3 import adamw, train_state, train_update, tree
from dsv3.nn.quantized import quantize_params
from dsv3.ops import fuse
from dsv3.ops.divergence import divergence, top_k_logprobs
from dsv3.policy import ComputePolicy
from dsv3.recipe import RECIPES
from dsv3.rl.logprobs import token_logprobs
from dsv3.serve.steps import prefill_step, state_init
from tests.small import model_config

ROWS, LENGTH, K = 2, 2304, 8  # XLA hands reductions of 32,768 values and more to YNNPACK
CFG = model_config(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, intermediate_size=48, kv_lora_rank=64, n_routed_experts=32,
    num_experts_per_tok=K, moe_intermediate_size=40, n_group=4, topk_group=2, num_nextn_predict_layers=1,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, max_position_embeddings=LENGTH,
)  # fmt: skip
TOKENS = tf.ones([ROWS, LENGTH + 1], tf.int32)
kernels = []


class Recorder:
    """TensorFlow, whose compiled functions are noted."""

    def __getattr__(self, name):
        return getattr(tf, name)

    def function(self, fn, **how):
        made = tf.function(fn, **how)

        def concrete(*signature):
            kernels.append((fn, signature))
            return made.get_concrete_function(*signature)

        return type("Function", (), {"get_concrete_function": staticmethod(concrete)})


def traced(fn, *args):
    tf.function(fn, autograph=False).get_concrete_function(*args)


def model(dtype="float32"):
    return tree.map_leaves(lambda x: tf.cast(x, dtype), dsv3.model_init([0, 1], CFG)), dsv3.router_init(CFG)


def train(dtype="float32", **how):
    """A step over packed documents: the model, its MTP module, their losses, the optimizer."""
    optimizer = adamw(1e-3, moment_dtype=dtype)
    state = train_state(*model(), optimizer)
    segments = tf.where(tf.range(LENGTH + 1) < 600, 1, 2) * tf.ones([ROWS, 1], tf.int32)
    policy = ComputePolicy(dtype=dtype, **how)
    traced(
        lambda state, tokens, segments: train_update(
            state, tokens, segments=segments, cfg=CFG, optimizer=optimizer, policy=policy
        ),
        state, TOKENS[None], segments[None],
    )  # fmt: skip


def logprobs(dtype="float32"):
    def gradient(params, router, tokens):
        with tf.GradientTape() as tape:
            tape.watch(tree.flatten(params))
            found = token_logprobs(params, router, tokens, cfg=CFG, policy=ComputePolicy(dtype=dtype))
            loss = tf.reduce_sum(found.logprobs) + tf.reduce_sum(found.entropy)
        return tape.gradient(loss, tree.flatten(params), unconnected_gradients=tf.UnconnectedGradients.ZERO)

    traced(gradient, *model(), TOKENS)


def distill(dtype="float32"):
    def gradient(hidden, head):
        rows = tf.cast(hidden, tf.float32)
        with tf.GradientTape() as tape:
            tape.watch([hidden, head])
            taught = top_k_logprobs(rows, tf.cast(head, tf.float32), k=K)
            kinds = [
                divergence(hidden, head, teacher, kind=kind, keep=2**25, fuse=True)
                for teacher in (taught, (hidden, head)) for kind in ("forward", "reverse", "jsd")
            ]  # fmt: skip
            total = tf.add_n([tf.reduce_sum(kind) for kind in kinds])
        return tape.gradient(total, [hidden, head])

    traced(gradient, tf.ones([ROWS * LENGTH, 64], dtype), tf.ones([64, 512], dtype))


def serve(dtype="float32", kind=None, cache=None):
    params, router = model(dtype)
    params = params if kind is None else quantize_params(params, CFG, kind=kind)
    policy = ComputePolicy(cache=cache)
    caches, rows = state_init(CFG, ROWS, LENGTH, dtype=tf.as_dtype(dtype), cache=cache)
    traced(
        lambda caches, params, router, rows, tokens: prefill_step(
            caches, params, router, rows, tokens, tf.constant([LENGTH] * ROWS), cfg=CFG, policy=policy, first=True
        )[1],
        caches, params, router, rows, TOKENS[:, 1:],
    )  # fmt: skip


PARTS = {
    "train": train, "train bfloat16": lambda: train("bfloat16"),
    "train fp8": lambda: train("bfloat16", fp8=RECIPES["paper"]),
    "train in tiles": lambda: train(attention_unroll=1),
    "logprobs": logprobs, "logprobs bfloat16": lambda: logprobs("bfloat16"),
    "distill": distill, "distill bfloat16": lambda: distill("bfloat16"),
    "serve int8": lambda: serve(kind="int8"), "serve fp8": lambda: serve("bfloat16", kind="fp8", cache="float8"),
}  # fmt: skip


def compiled(fn, signature):
    """The kernel as XLA has it in the end."""
    flat = tf.nest.flatten(signature)
    made = tf.function(lambda *args: fn(*tf.nest.pack_sequence_as(signature, args)), jit_compile=True, autograph=False)
    return made.experimental_get_compiler_ir(*flat)(stage="optimized_hlo", platform_name="CPU")


def main(parts):
    fuse.tf = Recorder()
    found = {}
    for part in parts:
        kernels.clear()
        PARTS[part]()
        bad = []
        for fn, signature in kernels:
            lines = compiled(fn, signature).splitlines()
            bad += [f"{line.strip()} of {signature}" for line in lines if '"__ynn_fusion"' in line]
        found[part] = len(kernels), bad
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
