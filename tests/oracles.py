"""Plain NumPy float64 statements of the published equations, one token, head and expert at a time where that is clearest.

They are written from the papers and share no code with dsv3. Parameters are dsv3's NamedTuples holding arrays: only their
field names are used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


def as_float64(params: Any) -> Any:
    """Returns a NamedTuple tree with every tensor as a float64 array."""
    if isinstance(params, tuple):
        parts = [as_float64(p) for p in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    return np.asarray(params, np.float64)


def sigmoid(z: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-z))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x: Array, weight: Array, eps: float = 1e-6) -> Array:
    """arXiv:1910.07467 equation 4, with the eps of the published code under the root."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def swiglu(gate: Array, up: Array) -> Array:
    """arXiv:2002.05202: Swish of the gate times up."""
    return gate * sigmoid(gate) * up


def mlp(params: Any, x: Array) -> Array:
    gate, up = np.split(x @ params.gate_up, 2, axis=-1)
    return swiglu(gate, up) @ params.down


# Positions


def frequencies(dim: int, theta: float) -> Array:
    """arXiv:2104.09864 section 3.2.2: theta^(-2i/dim) for i from 0."""
    return np.array([theta ** (-2.0 * i / dim) for i in range(dim // 2)])


def yarn_frequencies(dim: int, theta: float, factor: float, original: int, fast: float, slow: float) -> Array:
    """The published `precompute_freqs_cis`: stretched frequencies above the ramp, the old ones below."""

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dim_of(fast)), 0), min(math.ceil(dim_of(slow)), dim - 1)
    width = high - low if high > low else 0.001
    out = []
    for i, f in enumerate(frequencies(dim, theta)):
        ramp = min(max((i - low) / width, 0.0), 1.0)
        out.append(f / factor * ramp + f * (1.0 - ramp))
    return np.array(out)


def rope(x: Array, positions: Array, freqs: Array, *, pairs: str, output: str, factor: float = 1.0) -> Array:
    """Multiplies each pair, as a complex number, by `exp(i·position·frequency)`; x is `[B, T, R]` or `[B, T, H, R]`."""
    angle = np.asarray(positions, np.float64)[..., None] * freqs
    angle = angle if angle.ndim == 3 else angle[None]
    if x.ndim == 4:
        angle = angle[:, :, None]
    half = x.shape[-1] // 2
    z = x[..., 0::2] + 1j * x[..., 1::2] if pairs == "interleaved" else x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * angle) * factor
    if output == "halves":
        return np.concatenate([z.real, z.imag], -1)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


# Attention


def causal(length: int, segments: Array | None = None) -> Array:
    """Returns who sees whom as `[B or 1, T, T]`."""
    t = np.arange(length)
    seen = (t[None, :] <= t[:, None])[None]
    if segments is None:
        return seen
    return seen & (segments[:, None, :] == segments[:, :, None])


def attention(q: Array, k: Array, v: Array, seen: Array, scale: float) -> Array:
    """Softmax attention of `[B, H, T, P]` over `[B, H, S, P]`; `seen` is `[B or 1, T, S]`; zeros where nothing is seen."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, t in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(seen[b if seen.shape[0] > 1 else 0, t])
        if keys.size:
            out[b, h, t] = softmax(k[b, h, keys] @ q[b, h, t] * scale) @ v[b, h, keys]
    return out


def mla(params: Any, x: Array, *, cfg: Any, positions: Array | None = None, segments: Array | None = None) -> Array:
    """DeepSeek-V3 equations 1 to 11: a latent attention layer over one uncached sequence."""
    batch, length, _ = x.shape
    positions = np.arange(length) if positions is None else positions
    rope_cfg, eps = cfg.rope, 1e-6
    freqs, factor, scale = frequencies(cfg.rope_dim, rope_cfg.theta), 1.0, (cfg.nope_dim + cfg.rope_dim) ** -0.5
    y = rope_cfg.yarn
    if y is not None and (y.apply == "always" or rope_cfg.max_length > y.original_length):
        freqs = yarn_frequencies(cfg.rope_dim, rope_cfg.theta, y.factor, y.original_length, y.beta_fast, y.beta_slow)
        factor = (0.1 * y.mscale * math.log(y.factor) + 1) / (0.1 * y.mscale_all_dim * math.log(y.factor) + 1)
        scale *= (0.1 * y.mscale_all_dim * math.log(y.factor) + 1) ** 2

    def rotate(z: Array) -> Array:
        return rope(z, positions, freqs, pairs=rope_cfg.pairs, output=rope_cfg.output, factor=factor)

    def biased(z: Array, bias: Any) -> Array:
        return z if isinstance(bias, tuple) else z + bias

    q_in = x
    if cfg.q_latent is not None:
        q_in = rms_norm(biased(x @ params.q_a, params.q_a_bias), params.q_norm, eps)
    kv = biased(x @ params.kv_a, params.kv_a_bias)
    latent, k_rope = rms_norm(kv[..., : cfg.kv_latent], params.kv_norm, eps), rotate(kv[..., cfg.kv_latent :])
    out = np.zeros_like(x)
    seen = causal(length, segments)
    for h in range(cfg.num_heads):
        q = q_in @ params.q_b[:, h]
        q = np.concatenate([q[..., : cfg.nope_dim], rotate(q[..., cfg.nope_dim :])], -1)
        kv_h = latent @ params.kv_b[:, h]
        k = np.concatenate([kv_h[..., : cfg.nope_dim], k_rope], -1)
        heads = attention(q[:, None], k[:, None], kv_h[:, None, :, cfg.nope_dim :], seen, scale)
        out += heads[:, 0] @ params.o[h]
    return biased(out, params.o_bias)


# Experts


class Selection(NamedTuple):
    """`weights` and `experts` `[N, K]`, best expert first."""

    weights: Array
    experts: Array


def best(values: Array, count: int) -> list[int]:
    """Returns the indices of the largest values, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def select(scores: Array, bias: Array, *, top_k: int, groups: int, kept: int, scale: float, normalize: bool = True,
           left_out: float = -math.inf) -> Selection:  # fmt: skip
    """DeepSeek-V3 section 2.1.2 with the published gate's groups: chosen by biased scores, weighed by unbiased ones."""
    per = scores.shape[1] // groups
    weights, experts = [], []
    for s in scores:
        c = s + bias
        if kept < groups:
            strength = [sum(sorted(c[g * per : (g + 1) * per])[-2:]) for g in range(groups)]
            stay = best(np.array(strength), kept)
            c = np.array([c[i] if i // per in stay else left_out for i in range(len(c))])
        chosen = best(c, top_k)
        total = sum(s[i] for i in chosen) + 1e-20 if normalize else 1.0
        weights.append([scale * s[i] / total for i in chosen])
        experts.append(chosen)
    return Selection(np.array(weights).reshape(-1, top_k), np.array(experts, np.int32).reshape(-1, top_k))


def gate_weights(scores: Array, experts: Array, *, scale: float, normalize: bool = True) -> Array:
    """Weights of given experts."""
    s = np.take_along_axis(scores, experts, 1)
    return scale * s / (s.sum(-1, keepdims=True) + 1e-20) if normalize else scale * s


def experts_sum(x: Array, weights: Array, experts: Array, gate_up: Array, down: Array) -> Array:
    """Equation 12 without the shared experts: one token and one expert after the other."""
    out = np.zeros_like(x)
    for n, k in np.ndindex(*experts.shape):
        gate, up = np.split(x[n] @ gate_up[experts[n, k]], 2)
        out[n] += weights[n, k] * (swiglu(gate, up) @ down[experts[n, k]])
    return out


def load(experts: Array, num_experts: int, mask: Array | None = None) -> Array:
    counted = experts if mask is None else experts[np.asarray(mask).reshape(-1)]
    return np.bincount(counted.reshape(-1), minlength=num_experts).astype(np.float64)


def update_bias(bias: Array, load: Array, rate: float) -> Array:
    """b += γ·sign(mean(load) − load)."""
    return bias + rate * np.sign(load.mean(-1, keepdims=True) - load)


def balance_loss(scores: Array, *, top_k: int, mask: Array | None = None) -> float:
    """Equations 17 to 20 without α, the mean over sequences that have tokens; only those under `mask` count."""
    total, counted, num_experts = 0.0, 0, scores.shape[-1]
    for b, sequence in enumerate(scores):
        sequence = sequence if mask is None else sequence[mask[b]]
        if len(sequence) == 0:
            continue
        chosen = load(np.array([best(s, top_k) for s in sequence]), num_experts)
        f = chosen * num_experts / (top_k * len(sequence))
        p = np.mean([s / s.sum() for s in sequence], 0)
        total, counted = total + float(f @ p), counted + 1
    return total / max(counted, 1)


def moe(params: Any, bias: Array, x: Array, *, cfg: Any, experts: Array | None = None) -> Array:
    """Equation 12: the routed experts' weighted sum plus the shared experts, unweighted."""
    r, tokens = cfg.router, x.reshape(-1, x.shape[-1])
    scores = sigmoid(tokens @ params.router)
    if experts is None:
        left_out = -math.inf if r.group_mask == "-inf" else 0.0
        weights, experts = select(
            scores, bias, top_k=r.top_k, groups=r.num_groups, kept=r.groups_kept, scale=r.scale,
            normalize=r.normalize, left_out=left_out,
        )  # fmt: skip
    else:
        experts = np.asarray(experts).reshape(-1, r.top_k)
        weights = gate_weights(scores, experts, scale=r.scale, normalize=r.normalize)
    out = experts_sum(tokens, weights, experts, params.gate_up, params.down)
    if hasattr(params.shared, "gate_up"):
        out = out + mlp(params.shared, tokens)
    return out.reshape(x.shape)


# The model


def block(params: Any, bias: Array, x: Array, *, cfg: Any, **where: Any) -> Array:
    """Pre-norm residual block; a dense feed-forward layer where the parameters are one."""
    x = x + mla(params.mla, rms_norm(x, params.attn_norm, cfg.norm_eps), cfg=cfg.mla, **where)
    h = rms_norm(x, params.ffn_norm, cfg.norm_eps)
    return x + (moe(params.ffn, bias, h, cfg=cfg.moe) if hasattr(params.ffn, "router") else mlp(params.ffn, h))


def layer(stacked: Any, index: int) -> Any:
    """Returns one layer of stacked parameters."""
    if isinstance(stacked, tuple):
        return type(stacked)(*(layer(s, index) for s in stacked)) if hasattr(stacked, "_fields") else ()
    return stacked[index]


def model(params: Any, router: Any, tokens: Array, *, cfg: Any, **where: Any) -> tuple[Array, Array]:
    """Returns logits `[B, T, V]` and the hidden state after the final norm."""
    x = params.embed[tokens]
    for i in range(cfg.num_dense_layers):
        x = block(layer(params.dense, i), np.zeros(0), x, cfg=cfg, **where)
    for i in range(cfg.num_layers - cfg.num_dense_layers):
        x = block(layer(params.moe, i), router.moe[i], x, cfg=cfg, **where)
    hidden = rms_norm(x, params.norm, cfg.norm_eps)
    return hidden @ head(params), hidden


def head(params: Any) -> Array:
    return params.embed.T if isinstance(params.head, tuple) else params.head


def mtp(params: Any, bias: Array, hidden: Array, embedded: Array, *, cfg: Any, **where: Any) -> tuple[Array, Array]:
    """Equations 21 to 23 with the published order of the halves: (the module's output, what the head reads)."""
    parts = [rms_norm(embedded, params.embed_norm, cfg.norm_eps), rms_norm(hidden, params.hidden_norm, cfg.norm_eps)]
    if cfg.mtp_concat == "hidden_first":
        parts = parts[::-1]
    out = block(params.block, bias, np.concatenate(parts, -1) @ params.proj, cfg=cfg, **where)
    return out, rms_norm(out, params.norm, cfg.norm_eps)


def token_nll(hidden: Array, head_weight: Array, targets: Array) -> Array:
    """−log softmax(hidden @ head)[target]."""
    return -np.log(softmax(hidden @ head_weight))[np.arange(len(targets)), targets]
