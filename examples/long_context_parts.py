"""What `long_context.py` measures at one length, each part in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import dsv3
from dsv3 import tree
from dsv3.config import ModelConfig
from dsv3.eval.cache_size import caches_bytes, measure_caches, token_bytes
from dsv3.eval.context import context_bytes, continue_context, whole_logprobs
from dsv3.nn.cache import cache_bytes
from dsv3.nn.mla import MLAParams
from dsv3.nn.model import ModelParams, RouterState
from dsv3.policy import ComputePolicy, default_policy
from dsv3.resident import measure_growth
from dsv3.train.progress import format_seconds

PARTS = ("engine", "whole", "caches")
CACHES = (
    ("plain", "float32"), ("latent", "float32"), ("plain", "bfloat16"), ("latent", "bfloat16"), ("latent", "float8"),
)  # fmt: skip
WIDE_CACHES = CACHES[2:]
EVERY = 10.0  # seconds between two lines of progress
# Ratios of the published model where they can be: 2 : 1 : 2 : 8 of the heads' dims and the latent. YaRN is as published.
NARROW = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 160,
    "num_attention_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "n_group": 4,
    "topk_group": 2, "initializer_range": 0.1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One part at one length.

    Attributes:
      part: of `PARTS`, or `"wide"`: the caches of one layer with the published attention.
      length: tokens of the whole context, the new ones among them.
      new_tokens, chunk, dtype, cache, seed: as of the flags.
      model: a checkpoint directory, or empty for the narrow model with `sizes`, fields of config.json.
      scratch: the folder that parts leave results in for others.
      note: what progress begins with.
    """

    part: str
    length: int
    new_tokens: int
    chunk: int
    dtype: str
    cache: str | None
    seed: int
    model: str
    sizes: dict[str, int]
    scratch: str
    note: str = ""

    def file(self, part: str) -> Path:
        """Where a part at this length leaves tokens and log-probabilities."""
        return Path(self.scratch) / f"{part}-{self.length}.npz"

    @property
    def policy(self) -> ComputePolicy:
        """How engine and forward pass compute."""
        return default_policy().replace(dtype=self.dtype, cache=self.cache)


def job_config(job: Job) -> ModelConfig:
    """The model's configuration."""
    if job.part == "wide":
        return dsv3.preset("deepseek-v3").replace(hidden_size=512, num_hidden_layers=1, first_k_dense_replace=1)
    if job.model:
        return ModelConfig.from_hf(job.model)
    return dsv3.preset("deepseek-v3").replace(**(NARROW | job.sizes))


def which_caches(job: Job) -> tuple[tuple[str, str], ...]:
    """Kinds and dtypes of the caches that a job measures."""
    return WIDE_CACHES if job.part == "wide" else CACHES


def job_bytes(job: Job, cfg: ModelConfig) -> int:
    """About what a job needs at most."""
    if job.part in ("caches", "wide"):
        return caches_bytes(cfg.mla, job.length, which_caches(job), layers=cfg.num_layers)
    whole = job.part == "whole"
    return context_bytes(cfg, job.length, chunk=None if whole else job.chunk, dtype=job.dtype, cache=job.cache)


def run_job(job: Job) -> dict[str, Any]:
    """Measures; returns numbers."""
    cfg = job_config(job)
    if job.part in ("caches", "wide"):
        return {"caches": run_caches(job, cfg)}
    cfg, params, router = load(job, cfg)
    prompt = np.random.default_rng([job.seed, job.length]).integers(0, cfg.vocab_size, job.length - job.new_tokens)
    return (run_engine if job.part == "engine" else run_whole)(job, cfg, params, router, prompt.tolist())


def load(job: Job, cfg: ModelConfig) -> tuple[ModelConfig, ModelParams, RouterState]:
    """The checkpoint's model, or one that is drawn, with selection biases that have a say."""
    if job.model:
        return dsv3.load_pretrained(job.model, dtype=job.dtype)
    params, router = dsv3.model_init([job.seed, 0], cfg, dtype=job.dtype), dsv3.router_init(cfg)
    biases = [tf.random.stateless_normal(bias.shape, [job.seed, 2], stddev=0.05) for bias in router]
    return cfg, params, RouterState(*biases)


def run_engine(job: Job, cfg: ModelConfig, params: ModelParams, router: RouterState, prompt: list[int]) -> dict[str, Any]:
    """Reads the prompt in chunks, draws new tokens."""
    how = {"new_tokens": job.new_tokens, "policy": job.policy, "chunk": job.chunk, "on_chunk": teller(job, quadratic=True)}
    found, growth = measure_growth(lambda: continue_context(cfg, params, router, prompt, **how))
    np.savez(job.file("engine"), tokens=found.tokens, best=found.best, logprobs=found.logprobs)
    return {
        "read_seconds": found.read_seconds, "read_rate": found.read_rate, "step_seconds": found.step_seconds,
        "peak": growth.peak, "cache": cache_bytes(cfg, job.length, dtype=job.cache or job.dtype),
    }  # fmt: skip


def run_whole(job: Job, cfg: ModelConfig, params: ModelParams, router: RouterState, prompt: list[int]) -> dict[str, Any]:
    """One forward pass over the prompt and all new tokens but the last; compares the ends with the engine's."""
    with np.load(job.file("engine")) as kept:
        tokens, best, logprobs = kept["tokens"].tolist(), kept["best"], kept["logprobs"]
    how = {"last": job.new_tokens, "policy": job.policy}
    found, growth = measure_growth(lambda: whole_logprobs(cfg, params, router, [*prompt, *tokens[:-1]], **how))
    apart = np.abs(np.take_along_axis(found.logprobs, best, -1) - logprobs).max(-1)
    return {
        "seconds": found.seconds, "trace_seconds": found.trace_seconds, "peak": growth.peak,
        "apart": float(apart.max()), "apart_last": float(apart[-1]), "spread": float(np.std(logprobs)),
        "same": int(np.sum(found.logprobs.argmax(-1) == tokens)),
    }  # fmt: skip


def run_caches(job: Job, cfg: ModelConfig) -> list[dict[str, Any]]:
    """Sizes, times and outputs of caches; an output is compared with that of the first, plain attention's."""

    def layers() -> list[MLAParams]:
        if job.part == "wide":
            return [dsv3.init_params([job.seed, 1], dsv3.mla_specs(cfg.mla, std=cfg.init_std))]
        _, params, _ = load(job, cfg)
        stacks = [tree.map_leaves(lambda leaf: tf.cast(leaf, tf.float32), s.mla) for s in (params.dense, params.moe) if s]
        return [tree.slice_leading(stack, i) for stack in stacks for i in range(stack.kv_b.shape[0])]

    how = {"layers": cfg.num_layers, "on_chunk": teller(job, quadratic=False)}
    found = measure_caches(layers, cfg.mla, job.length, which_caches(job), **how)
    rows = []
    for size in found:
        row = size._asdict()
        want = found[0].out
        row["apart"] = float(np.linalg.norm(row.pop("out") - want) / np.linalg.norm(want))
        rows.append(row | {"token_bytes": token_bytes(cfg.mla, size.kind, size.dtype), "layers": cfg.num_layers})
    return rows


def teller(job: Job, *, quadratic: bool) -> Callable[[int, int], None]:
    """Returns a function that tells progress of tokens now and then, with the time that is left.

    That is reckoned from the second chunk on, as the first two are traced and compiled.
    """
    calls: list[tuple[float, float]] = []  # times, and parts of the work that were done then
    shown = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        # Each chunk attends to all before it; besides, as much work as attending to some thousand tokens.
        part = done * (done + 8192) / (total * (total + 8192)) if quadratic else done / total
        if len(calls) < 2:
            calls.append((now, part))
        if now - shown < EVERY and done < total:
            return
        shown = now
        then, before = calls[-1]
        left = f", ETA {format_seconds((now - then) * (1 - part) / (part - before))}" if part > before else ""
        print(f"{job.note}: {done:,} of {total:,} tokens{left}", file=sys.stderr, flush=True)

    return tell


def job_text(job: Job) -> str:
    """A job as the text of a flag."""
    return json.dumps(dataclasses.asdict(job))


def job_of(text: str) -> Job:
    """The inverse."""
    return Job(**json.loads(text))
