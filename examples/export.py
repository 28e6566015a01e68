"""Writes a function of dsv3 as a portable StableHLO program, with example inputs and the results that a CPU computes.

The program is made on any machine; run_artifact.py runs, checks and times it where there is JAX, on a CPU or a GPU.

What can be written:

  gemm        x @ w, of FP8 tensors with --fp8
  linear      a linear layer with its gradients: three products, and with --fp8 what quantises their operands
  experts     the routed experts with their gradients, tokens spread evenly
  moe         a mixture layer with its gradients: router, experts, shared expert
  block       a mixture block with its gradients: attention and mixture, at all of the model's widths
  train_step  forward, backward and AdamW, of a whole model
  decode      one greedy step with the latent cache; the new entries are results, not written into the cache

Examples:

  python examples/export.py --what=linear --out=runs/linear                       # small: checked and timed in seconds
  python examples/export.py --what=block --preset=tiny --fp8=paper --out=runs/block
  python examples/export.py --what=gemm --rows=4096 --width=7168 --out_width=4096 --dtype=bfloat16 --out=runs/gemm_bf16
  python examples/export.py --what=gemm --rows=4096 --width=7168 --out_width=4096 --dtype=bfloat16 --fp8=tensor \\
      --out=runs/gemm_fp8
  python examples/export.py --what=block --preset=deepseek-v3-pretrain --experts=16 --seq_len=4096 --dtype=bfloat16 \\
      --nooutputs --out=runs/block_bf16                                            # nothing is computed here

With --fp8 the products have float8 operands in the program (--operands=expanded: float32 ones). The stored results are those
of expanded operands, which a CPU computes faster.
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from command import flag_parser

import dsv3
from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.export import PLATFORMS, export_function
from dsv3.nn.block import block_apply, block_specs
from dsv3.nn.fp8 import quantize_rows, quantize_weight
from dsv3.nn.linear import linear_apply
from dsv3.nn.mla import mla_rope
from dsv3.nn.moe import experts_compute, moe_apply, moe_specs
from dsv3.ops.fp8 import ROW_BLOCK, WEIGHT_BLOCK
from dsv3.ops.gemm import fp8_gemm
from dsv3.plan.graph_flops import graph_flops
from dsv3.policy import ACCELERATOR, ComputePolicy
from dsv3.recipe import RECIPES, Fp8Recipe
from dsv3.serve.steps import Sampling, decode_step, state_init
from dsv3.spec import init_params
from dsv3.train.step import train_update

FLAGS = flags.FLAGS
KEY = (0, 1)

flags.DEFINE_enum("what", None, ["gemm", "linear", "experts", "moe", "block", "train_step", "decode"], "What to write.")
flags.DEFINE_string("out", None, "Directory of the artifact; it is replaced.")
flags.DEFINE_enum("preset", "tiny", dsv3.PRESETS, "Architecture by name.")
flags.DEFINE_string("config", None, "A config.json or its folder, instead of --preset.")
flags.DEFINE_integer("layers", None, "Layers, instead of the model's; MTP modules are then left out.", 1)
flags.DEFINE_integer("experts", None, "Routed experts, instead of the model's, in one group for each they are chosen in.", 1)
flags.DEFINE_integer("rows", 256, "Tokens of gemm, linear and experts.", 1)
flags.DEFINE_integer("width", None, "Width of the input of gemm and linear; default: the model's hidden size.", 1)
flags.DEFINE_integer("out_width", None, "Width of their output; default: the same.", 1)
flags.DEFINE_integer("batch_size", 2, "Sequences of moe, block, train_step and decode.", 1)
flags.DEFINE_integer("seq_len", 64, "Tokens of a sequence; of decode, the cache's.", 2)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
flags.DEFINE_enum("fp8", "none", ["none", *RECIPES], "FP8 recipe of the linear layers and experts.")
flags.DEFINE_enum("operands", "float8", ["float8", "expanded"], "Of FP8 products in the program.")
flags.DEFINE_list("platforms", list(PLATFORMS), "JAX's names of the platforms that the program is for.")
flags.DEFINE_bool("outputs", True, "Compute and store the results.")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is exported: `make(policy)` is a function of `inputs`; `product` (m, k, n) if it is one matrix product."""

    make: Callable[[ComputePolicy], Callable[..., Any]]
    inputs: tuple[Any, ...]
    product: tuple[int, int, int] | None = None


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input."""
    try:
        check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
        check(FLAGS.what is not None, "--what is not given, want what to write (--help lists it)")
        check(FLAGS.out is not None, "--out is not given, want the artifact's directory")
        recipe = None if FLAGS.fp8 == "none" else RECIPES[FLAGS.fp8].replace(operands=FLAGS.operands)
        check(recipe is None or FLAGS.what != "decode", "--fp8 wants another --what: decoding has no FP8 products")
        delayed = recipe is not None and recipe.scaling == "delayed"
        alone = not delayed or FLAGS.what == "train_step"
        check(alone, f"--fp8={FLAGS.fp8} wants --what=train_step: its scales are a part of the training's state")
        unknown = sorted(set(FLAGS.platforms) - {"cpu", "cuda", "rocm", "tpu"})
        check(not unknown and FLAGS.platforms, f"--platforms has {unknown}, want some of cpu, cuda, rocm, tpu")
        logging.set_verbosity(logging.WARNING)  # JAX tells which backends it has not found
        policy = ACCELERATOR.replace(dtype=FLAGS.dtype, fp8=recipe)
        write(CASES[FLAGS.what](read_config(), policy), policy)
    except ValueError as error:
        print(f"export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def read_config() -> ModelConfig:
    """Returns the model with the changes of --layers and --experts."""
    cfg = ModelConfig.from_hf(FLAGS.config) if FLAGS.config else dsv3.preset(FLAGS.preset)
    changes: dict[str, Any] = {}
    if FLAGS.layers is not None:
        changes |= {"num_hidden_layers": FLAGS.layers, "num_nextn_predict_layers": 0}
        changes["first_k_dense_replace"] = min(cfg.num_dense_layers, FLAGS.layers - 1)
    if FLAGS.experts is not None:
        router = cfg.moe.router
        check(FLAGS.experts >= router.top_k, f"--experts is {FLAGS.experts}, want at least {router.top_k}, those of a token")
        changes |= {"n_routed_experts": FLAGS.experts, "n_group": 1, "topk_group": 1}
    return cfg.replace(**changes) if changes else cfg


def write(case: Case, policy: ComputePolicy) -> None:
    """Writes the artifact and says what it is."""
    recipe = policy.fp8
    float8 = recipe is not None and recipe.operands == "float8"
    expanded = policy.replace(fp8=recipe.replace(operands="expanded")) if float8 else None
    flops = count_flops(case, policy)
    manifest = export_function(
        case.make(policy), case.inputs, FLAGS.out, name=FLAGS.what, platforms=FLAGS.platforms, outputs=FLAGS.outputs,
        reference=case.make(expanded) if expanded else None, tolerances=tolerances(recipe), flops=flops,
        details={"dtype": FLAGS.dtype, "fp8": FLAGS.fp8, "operands": FLAGS.operands if recipe else None,
                 "product": case.product},
    )  # fmt: skip
    size = sum(os.path.getsize(entry) for entry in os.scandir(FLAGS.out))
    counts = f"{len(manifest['inputs'])} inputs, {len(manifest['outputs'])} results"
    print(f"wrote {FLAGS.out}: {FLAGS.what}, {counts}, {flops / 1e9:.4g} GFLOP of products, {size / 1e6:.1f} MB")


def tolerances(recipe: Fp8Recipe | None) -> dict[str, float]:
    """Largest relative errors by platform: what other orders of sums do, and values that are rounded the other way for it.

    A bfloat16 rounds at 2^-9 of itself, and FP8 at 2^-4, where a value is near the middle between two: in float32 that is
    rare, but with layers of bfloat16 between FP8 products it is not, and a small model's gradients are then a tenth apart.
    So float32 shows that a program is right, and bfloat16 that it is not far off.
    """
    deep = FLAGS.what in ("moe", "block", "train_step")
    bounds = {
        ("float32", False): 2e-5, ("float32", True): 1e-3,
        ("bfloat16", False): 5e-2 if deep else 1e-2, ("bfloat16", True): 0.3 if deep else 2e-2,
    }  # fmt: skip
    bound = bounds[FLAGS.dtype, recipe is not None]
    tf32 = 5e-3 if recipe is None else 5e-2  # a GPU rounds the inputs of float32 products at 2^-11
    return {p: bound if p == "cpu" else max(2 * bound, tf32) for p in FLAGS.platforms}


def count_flops(case: Case, policy: ComputePolicy) -> int:
    """FLOPs of the matrix products, as they are without FP8."""
    if case.product:
        return 2 * int(np.prod(case.product, dtype=np.int64))
    specs = tree.map_leaves(lambda t: tf.TensorSpec(t.shape, t.dtype), case.inputs)
    fn = tf.function(case.make(policy.replace(fp8=None)), autograph=False)
    return graph_flops(fn.get_concrete_function(*specs).graph)


def normal(index: int, *shape: int, std: float = 1.0, dtype: str | None = None) -> tf.Tensor:
    """The example's random numbers, in the compute dtype."""
    return tf.random.stateless_normal(shape, (7, index), stddev=std, dtype=dtype or FLAGS.dtype)


def gradients(fn: Callable[..., tf.Tensor]) -> Callable[..., tuple]:
    """`fn(*inputs)` and, as the last input is its own gradient, those of the others."""

    def both(*args: Any) -> tuple:
        *inputs, dy = args
        leaves = tree.flatten(inputs)
        with tf.GradientTape() as tape:
            tape.watch([leaf for leaf in leaves if leaf.dtype.is_floating])
            y = fn(*inputs)
        floats = [leaf for leaf in leaves if leaf.dtype.is_floating]
        return y, tuple(tape.gradient(y, floats, dy, unconnected_gradients=tf.UnconnectedGradients.ZERO))

    return both


def sizes(cfg: ModelConfig) -> tuple[int, int, int]:
    """Rows, width and output width of gemm and linear."""
    width = FLAGS.width or cfg.hidden_size
    return FLAGS.rows, width, FLAGS.out_width or width


def gemm(cfg: ModelConfig, policy: ComputePolicy) -> Case:
    m, k, n = sizes(cfg)
    x, w = normal(0, m, k), normal(1, k, n, std=k**-0.5)
    if policy.fp8 is None:
        return Case(lambda _: tf.matmul, (x, w), (m, k, n))
    blocks = (ROW_BLOCK, WEIGHT_BLOCK) if policy.fp8.scaling == "block" else (None, None)
    how = {"a_block": blocks[0], "b_block": blocks[1], "dtype": FLAGS.dtype}
    pair = quantize_rows(x, policy.fp8), quantize_weight(w, policy.fp8)
    return Case(lambda p: lambda a, b: fp8_gemm(a, b, operands=p.fp8.operands, **how), pair, (m, k, n))


def linear(cfg: ModelConfig, policy: ComputePolicy) -> Case:
    m, k, n = sizes(cfg)
    inputs = normal(0, m, k), normal(1, k, n, std=k**-0.5, dtype="float32"), normal(2, m, n, std=1 / m)
    return Case(lambda p: gradients(lambda x, w: linear_apply(x, w, fp8=p.fp8)), inputs)


def experts(cfg: ModelConfig, policy: ComputePolicy) -> Case:
    moe, rows, d = cfg.moe, FLAGS.rows, cfg.hidden_size
    e, k, f = moe.router.num_experts, moe.router.top_k, moe.intermediate_size
    chosen = tf.reshape(tf.range(rows * k) % e, [rows, k])
    inputs = (
        normal(0, rows, d), normal(1, rows, k, dtype="float32") ** 2, normal(2, e, d, 2 * f, std=d**-0.5, dtype="float32"),
        normal(3, e, f, d, std=f**-0.5, dtype="float32"), chosen, normal(4, rows, d, std=1 / rows),
    )  # fmt: skip

    def make(p: ComputePolicy) -> Callable[..., Any]:
        how = {"kernel": p.experts, "multiple": p.row_multiple(rows * k, e), "policy": p}
        return gradients(lambda x, w, gate_up, down, chosen: experts_compute(x, w, chosen, gate_up, down, **how))

    return Case(make, inputs)


def moe(cfg: ModelConfig, policy: ComputePolicy) -> Case:
    params = init_params(KEY, moe_specs(cfg.moe, std=cfg.init_std))
    shape = (FLAGS.batch_size, FLAGS.seq_len, cfg.hidden_size)
    inputs = params, tf.zeros([cfg.moe.router.num_experts]), normal(0, *shape), normal(1, *shape, std=1e-3)
    return Case(lambda p: gradients(lambda params, bias, x: moe_apply(params, bias, x, cfg=cfg.moe, policy=p).out), inputs)


def block(cfg: ModelConfig, policy: ComputePolicy) -> Case:
    params = init_params(KEY, block_specs(cfg, dense=False))
    shape = (FLAGS.batch_size, FLAGS.seq_len, cfg.hidden_size)
    inputs = params, tf.zeros([cfg.moe.router.num_experts]), normal(0, *shape), normal(1, *shape, std=1e-3)

    def make(p: ComputePolicy) -> Callable[..., Any]:
        def apply(params: Any, bias: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
            table = mla_rope(cfg.mla, tf.range(FLAGS.seq_len))
            return block_apply(params, bias, x, cfg=cfg, table=table, policy=p).out

        return gradients(apply)

    return Case(make, inputs)


def train_step(cfg: ModelConfig, policy: ComputePolicy) -> Case:
    optimizer = dsv3.adamw(1e-3, fuse=False)
    shape = (FLAGS.batch_size, FLAGS.seq_len + 1)
    tokens = tf.random.stateless_uniform(shape, (7, 0), 0, cfg.vocab_size, tf.int32)
    inputs = dsv3.train_init(tf.constant(KEY), cfg, optimizer, fp8=policy.fp8), tokens

    def make(p: ComputePolicy) -> Callable[..., Any]:
        def step(state: Any, tokens: tf.Tensor) -> tuple:
            state = state if p.fp8 else state._replace(amax={})  # FLOPs are counted without FP8
            return train_update(state, tokens, cfg=cfg, optimizer=optimizer, policy=p)

        return step

    return Case(make, inputs)


def decode(cfg: ModelConfig, policy: ComputePolicy) -> Case:
    batch, dtype = FLAGS.batch_size, tf.as_dtype(FLAGS.dtype)
    params = tree.map_leaves(lambda p: tf.cast(p, dtype), dsv3.model_init(tf.constant(KEY), cfg))
    caches, rows = state_init(cfg, batch, FLAGS.seq_len, dtype=dtype)
    caches = caches._replace(trunk=normal(0, *caches.trunk.shape))
    rows = rows._replace(length=tf.fill([batch], FLAGS.seq_len - 1), token=tf.range(batch) % cfg.vocab_size)
    none = tf.zeros([batch])
    sampling = Sampling(tf.zeros([batch, 2], tf.int32), none, tf.zeros([batch], tf.int32), none + 1.0)

    def make(p: ComputePolicy) -> Callable[..., Any]:
        def step(caches: Any, params: Any, router: Any, rows: Any) -> dict[str, Any]:
            given = (caches, params, router, rows, sampling, tf.ones([batch], tf.bool))
            new, (rows, drawn) = decode_step(*given, cfg=cfg, policy=p, greedy=True, top=1)
            return {"entries": new.trunk.values, "rows": rows, "drawn": drawn}

        return step

    return Case(make, (caches, params, dsv3.router_init(cfg), rows))


CASES = {fn.__name__: fn for fn in (gemm, linear, experts, moe, block, train_step, decode)}
parse_flags = flag_parser("export")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
