"""ComputePolicy: dtype, kernels, recomputation and compilation, with the default of each device in one place.

A policy changes rounding, speed and memory, never the function. On a CPU matrix products are fastest outside XLA, so a step
is a plain graph whose element-wise chains are compiled: `docs/benchmark.md` has the measurements and their command. On a GPU
or TPU the whole step is compiled, which was not timed.

On GPUs TensorFlow rounds the inputs of float32 products to TF32 unless it is told not to
(`tf.config.experimental.enable_tensor_float_32_execution(False)`); the router's product is one of them, and near-ties
between experts may then fall the other way than in the published model.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from dsv3.checks import check, check_choice, check_type
from dsv3.recipe import Fp8Recipe


@dataclasses.dataclass(frozen=True)
class ComputePolicy:
    """How functions are computed.

    Attributes:
      dtype: compute dtype of products, `"float32"` or `"bfloat16"`; `None` follows the parameters. Router, softmax, norms
        and losses are float32 inside, always.
      jit: compile whole steps with XLA. fuse: compile element-wise chains inside a plain graph (pointless with `jit`).
      experts: kernel of the routed experts, `"sorted"` or `"blocks"` (see `ops.experts`).
      max_rows: at most so many (token, choice) rows, as in decoding, use the kernel `"rows"`; 0 never does.
      attention_block: queries of a block, at most. attention_unroll: with more blocks, or a cache of more slots than they
        have, loops over tiles take over. attention_keep: up to so many keys the backward gets probabilities from the forward
        pass instead of computing them again.
      loss_chunk: tokens whose logits exist at one time in a loss, forward and again backward. loss_keep: up to so many
        logits of all tokens are computed at once, and wait for the backward: in each loss, the model's and every MTP
        module's.
      remat: `"none"` keeps what a layer's backward needs, `"block"` recomputes each block from its input.
      fp8: what linear layers compute in FP8; `None`: nothing. The absorbed form of attention, which decoding takes,
        multiplies by kv_b in the compute dtype.
      cache: `"float8"`: attention reads latents as an FP8 cache holds them (see `ops.latent`), and its entries are such
        bytes; `None`: as they are computed. For inference.
      loop: `"unroll"` repeats the graph for each layer, `"scan"` is a loop with recomputation: short to trace, 61 layers
        cost one.
    """

    dtype: str | None = None
    jit: bool = False
    fuse: bool = True
    experts: str = "sorted"
    max_rows: int = 32
    attention_block: int = 256
    attention_unroll: int = 16
    attention_keep: int = 1024
    loss_chunk: int = 1024
    loss_keep: int = 2**25
    remat: str = "none"
    loop: str = "unroll"
    fp8: Fp8Recipe | None = None
    cache: str | None = None

    def __post_init__(self):
        check_choice("ComputePolicy", "dtype", self.dtype, (None, "float32", "bfloat16"))
        check_choice("ComputePolicy", "experts", self.experts, ("sorted", "blocks"))
        check_choice("ComputePolicy", "remat", self.remat, ("none", "block"))
        check_choice("ComputePolicy", "loop", self.loop, ("unroll", "scan"))
        check_choice("ComputePolicy", "cache", self.cache, (None, "float8"))
        if self.fp8 is not None:
            check_type("ComputePolicy", "fp8", self.fp8, Fp8Recipe)
        check(self.attention_block > 0, f"ComputePolicy: `attention_block` is {self.attention_block}, want > 0")
        check(self.loss_chunk > 0, f"ComputePolicy: `loss_chunk` is {self.loss_chunk}, want > 0")
        check(self.loss_keep >= 0, f"ComputePolicy: `loss_keep` is {self.loss_keep}, want >= 0 logits")
        check(
            not self.jit or self.experts == "blocks",
            "ComputePolicy: jit=True wants experts='blocks', as products of unlike sizes have no static shape",
        )

    def replace(self, **fields) -> ComputePolicy:
        """Returns a copy with fields changed."""
        return dataclasses.replace(self, **fields)

    @property
    def compute_dtype(self) -> tf.DType | None:
        """`dtype` as a `tf.DType`, or `None`."""
        return None if self.dtype is None else tf.as_dtype(self.dtype)

    def query_block(self, length: int) -> int:
        """Queries of a block of causal attention over a sequence of `length`: short ones get about four, so that less is
        computed behind the diagonal."""
        fewest = -(-length // max(self.attention_unroll, 1))  # with more blocks, tiles would take over
        return min(self.attention_block, max(128, 32 * -(-length // 128), fewest))

    def row_multiple(self, rows: int, num_experts: int) -> int:
        """Rows that an expert's share is rounded up to: products see few sizes, at the price of about 2% more rows."""
        if self.experts == "blocks":
            return 64 if rows >= 64 * num_experts else 16
        share = rows // num_experts
        return 32 if share >= 1024 else 16 if share >= 512 else 8 if share >= 256 else 4


CPU = ComputePolicy()
ACCELERATOR = ComputePolicy(jit=True, fuse=False, experts="blocks", max_rows=0, loss_keep=0)


def default_policy(device: str | None = None) -> ComputePolicy:
    """Returns the default of a device type, `"CPU"` (measured), `"GPU"` or `"TPU"`; `None` asks what this machine has.

    >>> default_policy("CPU").jit
    False
    """
    if device is None:
        device = next((d for d in ("TPU", "GPU") if tf.config.list_physical_devices(d)), "CPU")
    check_choice("default_policy", "device", device, ("CPU", "GPU", "TPU"))
    return CPU if device == "CPU" else ACCELERATOR
