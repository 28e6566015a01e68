"""The model: embedding, dense and mixture blocks, final norm, head, and the multi-token prediction chain."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from dsv3 import spec, tree
from dsv3.checks import Dims, check, check_token_ids
from dsv3.config import ModelConfig
from dsv3.graph import plain
from dsv3.nn.block import BlockParams, block_apply, block_specs
from dsv3.nn.cache import Cache
from dsv3.nn.linear import linear_apply
from dsv3.nn.mla import LayerCache, mla_absorb, mla_rope
from dsv3.nn.moe import RouterStats
from dsv3.nn.mtp import MTPParams, mtp_apply, mtp_next_hidden, mtp_specs
from dsv3.nn.stack import stack_apply
from dsv3.ops.norm import rms_norm
from dsv3.ops.quantized import QuantizedWeight
from dsv3.policy import ComputePolicy, default_policy
from dsv3.spec import ParamSpec
from dsv3.typing import TensorLike


class ModelParams(NamedTuple):
    """All parameters.

    Attributes:
      embed: `[V, D]`.
      dense, moe: `BlockParams` stacked over layers, `[X, ...]`; `()` where the model has none.
      norm: `[D]`.
      head: `[D, V]`, or `()` with tied embeddings.
      mtp: `MTPParams` stacked over modules, or `()`.
    """

    embed: tf.Tensor
    dense: BlockParams
    moe: BlockParams
    norm: tf.Tensor
    head: tf.Tensor
    mtp: MTPParams


class RouterState(NamedTuple):
    """The selection biases, float32: `moe` `[X, E]`, `mtp` `[modules, E]`. State of balancing, never parameters."""

    moe: tf.Tensor
    mtp: tf.Tensor


class ModelOutput(NamedTuple):
    """What `model_apply` computes. In a compiled function only what is used costs anything.

    Attributes:
      logits: `[B, T, V]` in the compute dtype.
      hidden: `[B, T, D]`, after the final norm.
      raw_hidden: `[B, T, D]`, before it.
      stats: `RouterStats` of the mixture layers, stacked: load `[X, E]`, balance `[X]`, experts `[X, B, T, K]`.
      entries: `[layers, B, T, L+R]`, what a cache must keep; `[layers, B, T, bytes]` `uint8` for one in FP8.
    """

    logits: tf.Tensor
    hidden: tf.Tensor
    raw_hidden: tf.Tensor
    stats: RouterStats
    entries: tf.Tensor


class MTPChain(NamedTuple):
    """Outputs of the modules, stacked: `normed` `[modules, B, T, D]` (the head's inputs) and `stats` `[modules, ...]`."""

    normed: tf.Tensor
    stats: RouterStats


def model_specs(cfg: ModelConfig) -> ModelParams:
    """Returns the tree of `ParamSpec`s that describes all parameters, MTP modules included.

    >>> import dsv3
    >>> cfg = dsv3.preset("deepseek-v3").replace(num_nextn_predict_layers=0)
    >>> dsv3.count_params(model_specs(cfg))  # beside them 58·256 router biases, which are state
    671026404352
    """
    d, v = cfg.hidden_size, cfg.vocab_size
    return ModelParams(
        embed=ParamSpec((v, d), ("vocab", "embed"), std=cfg.init_std),
        dense=spec.stack_specs(block_specs(cfg, dense=True), cfg.num_dense_layers),
        moe=spec.stack_specs(block_specs(cfg, dense=False), cfg.num_moe_layers),
        norm=ParamSpec((d,), ("embed",), init="ones"),
        head=() if cfg.tie_embeddings else ParamSpec((d, v), ("embed", "vocab"), std=cfg.init_std),
        mtp=spec.stack_specs(mtp_specs(cfg), cfg.num_mtp_layers),
    )


def output_specs(cfg: ModelConfig, batch: int, length: int, *, dtype: tf.DType | str = tf.float32) -> ModelOutput:
    """Describes what `model_apply` computes, e.g. to lay out activations: `make_layouts(specs, mesh, {"batch": "data"})`.

    Args:
      cfg: the configuration.
      batch: B, rows. length: T, tokens of a row.
      dtype: the compute dtype.

    Returns:
      `ModelOutput` of `ParamSpec`s with the logical axes `"layer"`, `"batch"`, `"time"`, `"embed"`, `"vocab"`, `"latent"`,
      `"expert"` and `"choice"`. Load and balance loss are sums over the batch, so no rule for rows shards them.
    """
    check(batch > 0 and length > 0, f"output_specs: batch={batch} and length={length}, want both > 0")
    name, layers, r = tf.as_dtype(dtype).name, cfg.num_moe_layers, cfg.moe.router

    def one(shape, *axes, dtype=name):
        return ParamSpec(shape, axes, init="zeros", dtype=dtype)

    rows = (batch, length)
    hidden = one((*rows, cfg.hidden_size), "batch", "time", "embed")
    stats = RouterStats(
        one((layers, r.num_experts), "layer", "expert", dtype="float32"), one((layers,), "layer", dtype="float32"),
        one((layers, *rows, r.top_k), "layer", "batch", "time", "choice", dtype="int32"),
    )  # fmt: skip
    entries = one((cfg.num_layers, *rows, cfg.mla.cache_width), "layer", "batch", "time", "latent")
    logits = one((*rows, cfg.vocab_size), "batch", "time", "vocab")
    return ModelOutput(logits, hidden, hidden, stats if layers else (), entries)


@plain
def model_init(key: TensorLike, cfg: ModelConfig, *, dtype: tf.DType | str = tf.float32) -> ModelParams:
    """Draws initial parameters: normal weights of deviation `cfg.init_std`, norms of one.

    Args:
      key: `[2]` int, the random key.
      cfg: the configuration.
      dtype: storage dtype.

    Returns:
      `ModelParams`. Draw them outside of XLA, inside of which TensorFlow's generators give other numbers.
    """
    return spec.init_params(key, model_specs(cfg), dtype)


def router_init(cfg: ModelConfig) -> RouterState:
    """Returns the selection biases of a new model of configuration `cfg`: zeros, see `RouterState`."""
    e = cfg.moe.router.num_experts
    return RouterState(tf.zeros([cfg.num_moe_layers, e]), tf.zeros([cfg.num_mtp_layers, e]))


@plain
def embed_apply(params: ModelParams, tokens: TensorLike, *, policy: ComputePolicy | None = None) -> tf.Tensor:
    """Returns the embeddings of tokens, `[B, T, D]` in the compute dtype."""
    policy = policy or default_policy()
    embedded = tf.gather(params.embed, tokens)
    return tf.cast(embedded, policy.compute_dtype or embedded.dtype)


def head_weight(params: ModelParams) -> tf.Tensor:
    """Returns the head as `[D, V]`: its own, or the embedding transposed."""
    return tf.transpose(params.embed) if isinstance(params.head, tuple) else params.head


def cast_params(params: ModelParams, policy: ComputePolicy) -> ModelParams:
    """Casts what enters products to the compute dtype, once. Norms, routers, quantised weights, and weights of FP8 products
    keep theirs."""
    dtype = policy.compute_dtype
    if dtype is None:
        return params

    def cast(path: str, leaf: tf.Tensor) -> tf.Tensor:
        name = path.rsplit(".", 1)[-1]
        kept = name.endswith("norm") or name in ("router", "embed", *QuantizedWeight._fields)
        quantized = policy.fp8 is not None and name not in ("head", "proj")
        return leaf if kept or quantized else tf.cast(leaf, dtype)

    return tree.map_with_path(cast, params)


def absorb_params(params: ModelParams, cfg: ModelConfig) -> ModelParams:
    """Returns parameters for decoding: every attention layer's with `mla_absorb`. They are not for training or saving."""

    def block(blocks: BlockParams) -> BlockParams:
        return blocks._replace(mla=mla_absorb(blocks.mla, cfg=cfg.mla)) if blocks else blocks

    mtp = params.mtp._replace(block=block(params.mtp.block)) if params.mtp else params.mtp
    return params._replace(dense=block(params.dense), moe=block(params.moe), mtp=mtp)


@plain
def model_apply(
    params: ModelParams,
    router: RouterState,
    tokens: TensorLike,
    *,
    cfg: ModelConfig,
    positions: TensorLike | None = None,
    segments: TensorLike | None = None,
    cache: Cache | None = None,
    mask: TensorLike | None = None,
    experts: TensorLike | None = None,
    form: str = "auto",
    policy: ComputePolicy | None = None,
) -> ModelOutput:
    """Computes logits and hidden states of a batch of token sequences.

    Args:
      params, router: see `ModelParams` and `RouterState`.
      tokens: `[B, T]` int, ids in [0, V).
      cfg: the configuration.
      positions: `[B, T]` or `[T]` int; default: 0.. T−1, after the past if there is a cache.
      segments: `[B, T]` int: tokens attend within their segment only (packed documents, padding), and each is balanced by
        itself. Not with a cache.
      cache: the past; `entries` of the result is what to append to it (`cache_append`).
      mask: `[B, T]` bool, tokens that count in the router statistics.
      experts: `[X, B, T, K]` int, experts to use instead of choosing (router replay).
      form: form of attention, see `mla_apply`.
      policy: how to compute; default: the device's.

    Returns:
      `ModelOutput`.

    Raises:
      ValueError: wrong shapes, or concrete token ids outside the vocabulary.
    """
    policy = policy or default_policy()
    dims = Dims("model_apply")
    dims("tokens", tokens, "B T")
    check(dims.T != 0, "model_apply: `tokens` is empty, want at least one token [B, T]")
    check_token_ids("model_apply", "tokens", tokens, cfg.vocab_size)
    for name, value in (("segments", segments), ("mask", mask)):
        if value is not None:
            dims(name, value, "B T")
    tokens = tf.convert_to_tensor(tokens)
    if positions is None:
        positions = tf.range(tf.shape(tokens)[1])
        if cache is not None:
            positions = tf.expand_dims(cache.length, -1) + positions
    params = cast_params(params, policy)
    raw, stats, entries = _trunk(
        params, router, embed_apply(params, tokens, policy=policy), cfg=cfg, positions=positions,
        segments=segments, cache=cache, mask=mask, experts=experts, form=form, policy=policy,
    )  # fmt: skip
    hidden = rms_norm(raw, params.norm, eps=cfg.norm_eps, rounding=cfg.norm_rounding, fuse=policy.fuse)
    return ModelOutput(linear_apply(hidden, head_weight(params)), hidden, raw, stats, entries)


def _trunk(params, router, x, *, cfg, positions, segments, cache, mask, experts, form, policy):
    """All blocks: (hidden before the final norm, stacked router statistics, stacked cache entries)."""
    shared = {"cfg": cfg, "table": mla_rope(cfg.mla, positions), "policy": policy, "segments": segments}
    shared |= {"mask": mask, "form": form}

    def layer(block, extra, x):
        past = LayerCache(extra["kv"], cache.length) if "kv" in extra else None
        out = block_apply(block, extra.get("bias", ()), x, cache=past, experts=extra.get("experts"), **shared)
        return out.out, (out.entry, out.stats)

    split = cfg.num_dense_layers
    dense_extra = {} if cache is None else {"kv": cache.kv[:split]}
    moe_extra = {"bias": router.moe} | ({} if cache is None else {"kv": cache.kv[split:]})
    if experts is not None:
        moe_extra["experts"] = experts
    how = {"loop": policy.loop, "remat": policy.remat}
    x, dense_aux = stack_apply(layer, params.dense, dense_extra, x, **how)
    x, moe_aux = stack_apply(layer, params.moe, moe_extra, x, **how)
    entries = [aux[0] for aux in (dense_aux, moe_aux) if aux]
    stats = moe_aux[1] if moe_aux else ()
    return x, stats, tf.concat(entries, 0)


@plain
def mtp_chain(
    params: ModelParams,
    router: RouterState,
    output: ModelOutput,
    next_tokens: TensorLike,
    *,
    cfg: ModelConfig,
    positions: TensorLike | None = None,
    segments: TensorLike | None = None,
    mask: TensorLike | None = None,
    policy: ComputePolicy | None = None,
) -> MTPChain:
    """Runs every MTP module over a batch for training: module k reads module k−1's output.

    Args:
      params, router: as given to `model_apply`.
      output: its result for the tokens t_0.. t_{T−1}.
      next_tokens: `[B, T]` int, t_1.. t_T. Module k reads t_k..; the last k − 1 positions have no such token and get the
        last one, so their predictions must not be counted. With `mask` this holds for each run of places that count.
      cfg, positions, segments, mask, policy: as in `model_apply`.

    Returns:
      `MTPChain`: `head(normed[k − 1])` at position i predicts t_{i+k+1}.
    """
    check(cfg.num_mtp_layers > 0, "mtp_chain: the config has no MTP module (num_nextn_predict_layers is 0)")
    policy = policy or default_policy()
    Dims("mtp_chain", B=output.hidden.shape[0], T=output.hidden.shape[1])("next_tokens", next_tokens, "B T")
    params = cast_params(params, policy)
    table = mla_rope(cfg.mla, tf.range(tf.shape(next_tokens)[1]) if positions is None else positions)
    ahead = embed_apply(params, next_tokens, policy=policy)
    hidden = output.hidden if cfg.mtp_hidden == "normed" else output.raw_hidden
    normed, stats = [], []
    for k in range(cfg.num_mtp_layers):
        if k:
            ahead = next_ahead(ahead, mask)
        out = mtp_apply(
            tree.slice_leading(params.mtp, k), router.mtp[k], hidden, ahead,
            cfg=cfg, table=table, policy=policy, segments=segments, mask=mask,
        )  # fmt: skip
        hidden = mtp_next_hidden(out, cfg)
        normed.append(out.normed)
        stats.append(out.block.stats)
    return MTPChain(tf.stack(normed), tree.map_leaves(lambda *leaves: tf.stack(leaves), *stats))


def next_ahead(ahead: TensorLike, mask: TensorLike | None = None) -> tf.Tensor:
    """Moves what the modules of a chain read one place further: module k + 1 reads at i what module k reads at i + 1.

    Args:
      ahead: `[B, T]` or `[B, T, D]`, what a module reads.
      mask: `[B, T]` bool. Where the next place does not count, or is not there, what is read stays the same: the last token.
    """
    ahead = tf.convert_to_tensor(ahead)
    moved = tf.concat([ahead[:, 1:], ahead[:, -1:]], 1)
    if mask is None:
        return moved
    mask = tf.cast(mask, tf.bool)
    goes_on = tf.concat([mask[:, 1:], tf.zeros_like(mask[:, -1:])], 1)
    return tf.where(goes_on if ahead.shape.rank == 2 else tf.expand_dims(goes_on, -1), moved, ahead)


def active_params(cfg: ModelConfig) -> int:
    """Returns how many parameters of `cfg` one token uses: top-k of the routed experts, all of the rest, no MTP module.

    >>> import dsv3
    >>> round(active_params(dsv3.preset("deepseek-v3")) / 1e9, 1)
    37.6
    """
    specs = model_specs(cfg)._replace(mtp=())
    moe = specs.moe
    routed = spec.count_params((moe.ffn.gate_up, moe.ffn.down)) if moe else 0
    r = cfg.moe.router
    return spec.count_params(specs) - routed * (r.num_experts - r.top_k) // r.num_experts
