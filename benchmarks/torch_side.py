"""The worker that runs transformers and torch: `python -m benchmarks.torch_side THREADS`."""

from __future__ import annotations

import copy
import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from benchmarks.protocol import Prepared, serve

ROOM = 64  # tokens that a decode cache may grow by
LEARNING_RATE = 1e-5

_settings: dict[str, Any] = {}
_weights = ""


def setup(config: Mapping[str, Any], weights: str) -> None:
    """Chooses the model: the contents of a `config.json`, and an npz file of parameters under transformers' names."""
    global _settings, _weights
    _settings, _weights = dict(config), weights
    _master.cache_clear()


@functools.cache
def _master() -> DeepseekV3ForCausalLM:
    """The float32 model with dsv3's parameters; refuses a file that does not name each of them."""
    config = DeepseekV3Config(**copy.deepcopy(_settings))
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager")
    with np.load(_weights) as values, torch.no_grad():
        want = dict(model.named_parameters())
        if set(want) != set(values.files):
            raise ValueError(f"setup: parameters differ: {sorted(set(want) ^ set(values.files))[:5]}")
        for name, parameter in want.items():
            parameter.copy_(torch.from_numpy(values[name]))
    return model


def _model(dtype: str, attention: str, experts: str) -> DeepseekV3ForCausalLM:
    """A copy in a dtype and mode of its own: compiled code looks at the config, which a copy must not share."""
    model = copy.deepcopy(_master()).to(getattr(torch, dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # transformers keeps the selection biases in float32
            buffer.data = buffer.data.float()
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    return model


def _compile(fn: Callable, compiled: bool) -> Callable:
    return torch.compile(fn, dynamic=False) if compiled else fn


def logits(batch: int, length: int) -> list[float]:
    """Returns some logits in float32, to compare with the other side's: the last position's of each row."""
    with torch.inference_mode():
        out = _model("float32", "eager", "grouped_mm").eval()(_tokens(0, batch, length), use_cache=False)
    return out.logits[:, -1].float().numpy().ravel().tolist()


def _tokens(seed: int, batch: int, length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, _settings["vocab_size"], [batch, length]))


def _normal(rng: np.random.Generator, shape: list[int], dtype: str) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(getattr(torch, dtype))


def build_train(batch: int, length: int, dtype: str, attention: str, experts: str, compiled: bool) -> Prepared:
    """A training step: float32 parameters, autocast to `dtype`, cross-entropy, backward, fused AdamW."""
    model = _model("float32", attention, experts).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )

    def loss(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            out = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(out.flatten(0, 1).float(), tokens[:, 1:].flatten())

    loss = _compile(loss, compiled)

    def run(tokens):
        value = loss(tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return Prepared(lambda seed: _tokens(seed, batch, length + 1), run)


def build_prefill(batch: int, length: int, dtype: str, attention: str, experts: str, compiled: bool) -> Prepared:
    """The last position's logits and the cache of a batch of prompts."""
    model = _model(dtype, attention, experts).eval()

    def prefill(tokens):
        cache = DynamicCache(config=model.config)
        return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits, cache

    prefill = _compile(prefill, compiled)

    @torch.inference_mode()
    def run(tokens):
        return prefill(tokens)[0].float().numpy()

    return Prepared(lambda seed: _tokens(seed, batch, length), run)


def build_decode(batch: int, context: int, dtype: str, attention: str, experts: str, compiled: bool) -> Prepared:
    """One new token for each row of a cache that holds `context` tokens: a growing cache, or a static one when compiled."""
    model, rng = _model(dtype, attention, experts).eval(), np.random.default_rng(0)
    config, cache, used = model.config, None, ROOM
    past = [
        tuple(_normal(rng, [batch, 1, context, n], dtype) for n in (config.kv_lora_rank, config.qk_rope_head_dim))
        for _ in range(config.num_hidden_layers)
    ]

    def refill():
        new = StaticCache(config=config, max_cache_len=context + ROOM) if compiled else DynamicCache(config=config)
        for layer, (latent, k_rope) in enumerate(past):
            new.update(latent, k_rope, layer)
        return new

    def step(tokens, cache):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    step = _compile(step, compiled)

    @torch.inference_mode()
    def draw(seed):
        nonlocal cache, used
        used += 1
        if used > ROOM:
            used = 1
            if compiled and cache is not None:
                for layer in cache.layers:  # the compiled step knows this cache's tensors
                    layer.cumulative_length.fill_(context)
            else:
                cache = refill()
        return _tokens(seed, batch, 1)

    @torch.inference_mode()
    def run(tokens):
        return step(tokens, cache).numpy()

    return Prepared(draw, run)


def _loop_of_products(x, chosen, weights, gate_up, down):
    """Rows sorted by expert, one product each: gate_up `[E, D, 2F]`, down `[E, F, D]`."""
    top_k = chosen.shape[-1]
    order = chosen.flatten().argsort()
    counts = chosen.flatten().bincount(minlength=len(gate_up)).tolist()
    parts = []
    for e, rows in enumerate(x[order // top_k].split(counts)):
        if len(rows):
            gate, up = (rows @ gate_up[e]).chunk(2, -1)
            parts.append((F.silu(gate) * up) @ down[e])
    out = torch.cat(parts) * weights.flatten()[order, None].to(x.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return out[back].view(len(x), top_k, -1).sum(1)


def _grouped_mm(num_experts: int, width: int, inner: int, dtype: str):
    """transformers' experts with their default implementation: (function, parameters)."""
    config = DeepseekV3Config(n_routed_experts=num_experts, hidden_size=width, moe_intermediate_size=inner)
    config._experts_implementation = "grouped_mm"
    module = DeepseekV3Experts(config).to(getattr(torch, dtype))
    return module, [module.gate_up_proj, module.down_proj]


def build_experts(
    tokens: int, width: int, inner: int, num_experts: int, top_k: int, dtype: str, kernel: str
) -> Prepared:
    """The routed experts alone, forward and backward, with another routing each time."""
    rng = np.random.default_rng(0)
    if kernel == "grouped_mm":
        apply, params = _grouped_mm(num_experts, width, inner, dtype)
    else:
        params = [_normal(rng, shape, dtype) for shape in ([num_experts, width, 2 * inner], [num_experts, inner, width])]

        def apply(x, chosen, weights):
            return _loop_of_products(x, chosen, weights, *params)

    with torch.no_grad():
        for p in params:
            p.copy_(_normal(rng, list(p.shape), dtype) * 0.05)
            p.requires_grad_()

    def draw(seed):
        rng = np.random.default_rng(seed)
        chosen = np.argpartition(rng.random([tokens, num_experts]), top_k, -1)[:, :top_k]
        x, dy = (_normal(rng, [tokens, width], dtype) for _ in range(2))
        weights = torch.from_numpy(rng.random([tokens, top_k], np.float32))
        return x.requires_grad_(), weights.requires_grad_(), torch.from_numpy(chosen), dy

    def run(inputs):
        x, weights, chosen, dy = inputs
        return torch.autograd.grad(apply(x, chosen, weights), [x, weights, *params], dy)

    return Prepared(draw, run)


def build_attention(batch: int, heads: int, length: int, qk: int, v: int, dtype: str) -> Prepared:
    """Causal attention alone, forward and backward, by torch's flash kernel: it wants v as wide as qk."""

    def draw(seed):
        rng = np.random.default_rng(seed)
        *qkv, d_out = (_normal(rng, [batch, heads, length, width], dtype) for width in (qk, qk, v, v))
        return [t.requires_grad_() for t in qkv], d_out

    def run(inputs):
        (q, k, values), d_out = inputs
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, F.pad(values, (0, qk - v)), is_causal=True, scale=qk**-0.5)
        return torch.autograd.grad(out[..., :v], [q, k, values], d_out)

    return Prepared(draw, run)


BUILDERS = {
    "train": build_train,
    "prefill": build_prefill,
    "decode": build_decode,
    "experts": build_experts,
    "attention": build_attention,
}


def main() -> None:
    """Answers the driver."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(sys.argv[1]))
    transformers.logging.set_verbosity_error()
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    serve(BUILDERS, {"setup": setup, "logits": logits}, versions)


if __name__ == "__main__":
    main()
