"""Bytes that a device needs: weights, optimiser state, gradients, activations, buffers; and a server's weights and cache."""

from __future__ import annotations

from typing import NamedTuple

from dsv3.checks import check, check_choice
from dsv3.config import ModelConfig
from dsv3.plan.count import ATTENTION, DENSE, ROUTED, ROUTER, SHARED, Leaf, read_leaves, unit_leaves
from dsv3.plan.mesh import Plan, Stage, check_plan, rank_contents
from dsv3.plan.schedule import chunks_in_flight
from dsv3.plan.storage import row_bytes, weight_bytes
from dsv3.typing import Tree

LOW_PRECISION = (ATTENTION, DENSE, ROUTED, SHARED)  # parts whose weights and products may be FP8 (paper section 3.3.1)


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      weights: working weights; norms, router and its biases in float32. gradients: float32, whole, summed over
        micro-batches.
      master: float32 weights. moments: AdamW's two.
      activations: what the chunks in flight keep for their backward passes.
      working: what one block's forward and backward need while they run.
      dispatch: tokens that came from other devices, and results on their way back.
      loss: one chunk of logits and its gradient.
    """

    weights: int = 0
    gradients: int = 0
    master: int = 0
    moments: int = 0
    activations: int = 0
    working: int = 0
    dispatch: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class RankParams(NamedTuple):
    """Scalars on one device: `shared` replicated over data·expert, `experts` over data; `leaves` with how often each is."""

    shared: int
    experts: int
    leaves: tuple[tuple[Leaf, int], ...]


def rank_params(cfg: ModelConfig, specs: Tree, plan: Plan, rank: int) -> RankParams:
    """Counts the parameters of one pipeline rank's device: its stages' blocks, `E / expert` experts of each mixture.

    The embedding is on the first stage's rank. MTP modules and a tied head read it too: where they are on another rank
    than the first stage, that rank has a copy. In DualPipe and DualPipeV it is the same rank, as in the paper.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      rank: the pipeline rank.

    Returns:
      `RankParams`.

    References: DeepSeek-V3 section 3.2.3, "Shared Embedding and Output Head".
    """
    held: list[tuple[Leaf, int]] = []
    embed = False
    for _, stage in rank_contents(cfg, plan)[rank]:
        embed |= stage.embed or (stage.head and (stage.mtp > 0 or cfg.tie_embeddings))
        for unit, times in stage.units.items():
            held += [(leaf, times) for leaf in unit_leaves(cfg, specs, unit) if times]
    if embed:
        held += [(leaf, 1) for leaf in read_leaves(cfg, specs) if leaf.where == "embed"]
    shared = sum(leaf.size * times for leaf, times in held if not leaf.is_expert)
    experts = sum(leaf.size * times for leaf, times in held if leaf.is_expert)
    return RankParams(shared, experts // plan.expert, tuple(held))


def block_activations(cfg: ModelConfig, plan: Plan, *, dense: bool, recompute: str) -> dict[str, float]:
    """Returns the bytes that one block keeps for its backward pass, for each of its tokens.

    D, Q, L, R, H, P, U, F, K, E are the letters of `dsv3.typing`; `q(n)` is a row of n values in `plan.products_dtype`, 2n
    a row in bfloat16. With `"paper"` kept:

    - residuals before both norms, 2·2D; the latents before their norms, 2Q and 2(L + R)
    - attention's output, a linear's input in E5M6 with FP8 products, else 2HU; its log-sum-exp, 4H
    - in a mixture: for each of the K rows that arrive (times `imbalance`), the input in `plan.dispatch_dtype` or `q(D)`,
      whichever is larger, and `q(2F)`, the inputs of SwiGLU; the shared experts' `q(2F)`; scores, gates and choices, 4E + 8K
    - in a dense block: `q(2F)`

    `"none"` keeps also what `"paper"` computes again: the norms' outputs `q(D)` twice, `q(Q)` and `q(L)`, queries, keys
    and values 2H(P + R), 2H(P + R) and 2HU, and SwiGLU's outputs. `"block"` keeps only the block's input, 2D.

    Args:
      cfg: the configuration.
      plan: number formats and imbalance.
      dense: of a dense block or of a mixture.
      recompute: one of `count.RECOMPUTE`.

    Returns:
      Name to bytes a token.

    References: DeepSeek-V3 sections 3.2.3 and 3.3.3.
    """
    check_choice("block_activations", "recompute", recompute, ("none", "paper", "block"))
    d, mla, moe = cfg.hidden_size, cfg.mla, cfg.moe
    if recompute == "block":
        return {"block input": 2 * d}

    def q(width: int) -> int:
        return row_bytes(width, plan.products_dtype)

    heads = mla.num_heads * mla.v_dim
    kept: dict[str, float] = {
        "residuals": 4 * d,
        "latents": 2 * ((mla.q_latent or 0) + mla.cache_width),
        "attention output": row_bytes(heads, "e5m6" if plan.products_dtype == "fp8" else "bfloat16"),
        "log-sum-exp": 4 * mla.num_heads,
    }
    if recompute == "none":
        kept["norm outputs"] = 2 * q(d) + q(mla.kv_latent) + (q(mla.q_latent) if mla.q_latent else 0)
        kept["queries, keys, values"] = 2 * mla.num_heads * (2 * mla.qk_dim + mla.v_dim)
    if dense:
        kept["SwiGLU inputs"] = q(2 * cfg.intermediate_size)
        if recompute == "none":
            kept["SwiGLU outputs"] = q(cfg.intermediate_size)
        return kept
    rows, f, shared = moe.router.top_k * plan.imbalance, moe.intermediate_size, moe.num_shared * moe.intermediate_size
    kept["expert inputs"] = rows * max(row_bytes(d, plan.dispatch_dtype), q(d))
    kept["SwiGLU inputs"] = rows * q(2 * f) + (q(2 * shared) if shared else 0)
    kept["router"] = 4 * moe.router.num_experts + 8 * moe.router.top_k
    if recompute == "none":
        kept["SwiGLU outputs"] = rows * q(f) + (q(shared) if shared else 0)
    return kept


def stage_activations(cfg: ModelConfig, plan: Plan, stage: Stage) -> float:
    """Returns the bytes that a `stage` of the model `cfg` keeps for each token of one chunk, by the formats of `plan`.

    Beside its blocks': the head keeps its input before the final norm, 2D, and with `"none"` the norm's output, 2D. An MTP
    module keeps as much for its own norm, and with `"none"` the projection's input, 2·2D.
    """
    d, how = cfg.hidden_size, plan.recompute
    mixture = sum(block_activations(cfg, plan, dense=False, recompute=how).values())
    total = stage.moe * mixture
    if stage.dense:
        total += stage.dense * sum(block_activations(cfg, plan, dense=True, recompute=how).values())
    total += stage.head * 2 * d * (2 if how == "none" else 1)
    return total + stage.mtp * (mixture + 2 * d * (4 if how == "none" else 1))


def rank_memory(cfg: ModelConfig, specs: Tree, plan: Plan, rank: int) -> Memory:
    """Returns the bytes on a device of one pipeline rank, at the worst moment of a step.

    With n_s and n_e the scalars of `RankParams`, and ZeRO over w_s = copies·data·expert and w_e = copies·data ranks (1 each
    without it):

    - weights: `plan.weights_dtype`; gradients: 4(n_s + n_e); master: 4(n_s/w_s + n_e/w_e); moments: two values each alike
    - activations: `stage_activations` · tokens of a chunk · `chunks_in_flight`, summed over the rank's stages
    - working: with `full` the bytes a token of a block that keeps everything and `kept` what it really keeps, the backward
      needs `full` values and as many gradients, of which `kept` exist: (2·full − kept)·tokens; a chunk in its forward pass
      beside it needs `full`·tokens more
    - dispatch: K·imbalance·tokens rows of D values in, in the dispatch format, and out, in the combine format; for two
      chunks if the schedule overlaps them
    - loss: logits and their gradient in float32, 8·V for each token of a chunk of `plan.loss_chunk`

    Not counted: fragmentation, the libraries' own buffers (see `Hardware.memory_fraction`), and the weights' moving average,
    which is on the CPU.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: a possible plan.
      rank: the pipeline rank.

    Returns:
      `Memory`.

    Raises:
      ValueError: an impossible plan, or a rank that it does not have.

    References: DeepSeek-V3 sections 3.2 and 3.3; Rajbhandari et al., arXiv:1910.02054, for ZeRO.
    """
    check_plan(cfg, plan)
    check(0 <= rank < plan.pipe, f"rank_memory: `rank` is {rank}, want 0 to {plan.pipe - 1}")
    params = rank_params(cfg, specs, plan, rank)
    ways = (plan.copies * plan.data * plan.expert, plan.copies * plan.data) if plan.zero else (1, 1)
    sharded = -(-params.shared // ways[0]) - (-params.experts // ways[1])
    stages = rank_contents(cfg, plan)[rank]
    mixtures = any(stage.moe + stage.mtp for _, stage in stages)
    activations = 0.0
    for number, stage in stages:
        flying = chunks_in_flight(plan.schedule, plan.pipe, number, plan.micro_batches)
        activations += stage_activations(cfg, plan, stage) * plan.tokens * flying
    rows = cfg.moe.router.top_k * plan.imbalance * plan.tokens if mixtures and plan.expert > 1 else 0
    row = row_bytes(cfg.hidden_size, plan.dispatch_dtype) + row_bytes(cfg.hidden_size, plan.combine_dtype)
    logits = min(plan.loss_chunk, plan.tokens) * cfg.vocab_size
    return Memory(
        weights=_weights(cfg, plan, params, stages),
        gradients=4 * (params.shared + params.experts),
        master=4 * sharded,
        moments=2 * weight_bytes(sharded, plan.moments_dtype),
        activations=round(activations),
        working=round(_working(cfg, plan, stages) * plan.tokens),
        dispatch=round(rows * row) * (2 if plan.overlap else 1),
        loss=8 * logits if any(stage.head for _, stage in stages) else 0,
    )


def leaf_bytes(leaf: Leaf, plan: Plan) -> int:
    """Returns the bytes of one layer's working `leaf` on a device of `plan`; FP8 is for the blocks' linear layers only."""
    size = leaf.size // plan.expert if leaf.is_expert else leaf.size
    if leaf.part == ROUTER or not (leaf.is_product or leaf.where == "embed"):
        return weight_bytes(size, "float32")
    low = plan.weights_dtype == "fp8" and leaf.part not in LOW_PRECISION
    return weight_bytes(size, "bfloat16" if low else plan.weights_dtype)


def _weights(cfg: ModelConfig, plan: Plan, params: RankParams, stages: tuple[tuple[int, Stage], ...]) -> int:
    """Working weights and the router's biases."""
    mixtures = sum(stage.moe + stage.mtp for _, stage in stages)
    return sum(times * leaf_bytes(leaf, plan) for leaf, times in params.leaves) + mixtures * 4 * cfg.moe.router.num_experts


def _working(cfg: ModelConfig, plan: Plan, stages: tuple[tuple[int, Stage], ...]) -> float:
    """Bytes a token that the largest of the rank's blocks needs while it runs."""
    kinds = {dense for _, s in stages for dense, there in ((True, s.dense), (False, s.moe + s.mtp)) if there}
    needs = [0.0]
    for dense in kinds:
        full = sum(block_activations(cfg, plan, dense=dense, recompute="none").values())
        kept = sum(block_activations(cfg, plan, dense=dense, recompute=plan.recompute).values())
        needs.append((3 if plan.overlap else 2) * full - kept)
    return max(needs)


def plan_memory(cfg: ModelConfig, specs: Tree, plan: Plan) -> list[Memory]:
    """Returns `rank_memory` of every pipeline rank of `plan` for the model `cfg` with `specs`."""
    return [rank_memory(cfg, specs, plan, rank) for rank in range(plan.pipe)]


def cache_bytes(cfg: ModelConfig, *, mtp: bool = False, dtype: str = "bfloat16") -> int:
    """Returns the bytes of the latent cache for one token: L + R values for each layer.

    Args:
      cfg: the configuration.
      mtp: count the MTP modules, which draft, as layers too.
      dtype: storage, `"bfloat16"`, `"float32"` or `"fp8"` (with scales).

    Returns:
      Bytes; DeepSeek-V3: 61·576·2 = 70,272, as in arXiv:2505.09343 table 1.
    """
    return (cfg.num_layers + mtp * cfg.num_mtp_layers) * row_bytes(cfg.mla.cache_width, dtype)


class Serving(NamedTuple):
    """Bytes on each of a server's devices: `weights`, the `cache` of its sequences, and how many sequences fit in all."""

    weights: int
    cache: int
    fitting: int


def serving_memory(
    cfg: ModelConfig, specs: Tree, *, devices: int, sequences: int, length: int, memory: float,
    dtype: str = "fp8", cache_dtype: str = "bfloat16", mtp: bool = False,
) -> Serving:  # fmt: skip
    """Returns what a device holds that serves with expert parallelism: E/devices experts, all other weights, its
    sequences' cache.

    Args:
      cfg: the configuration.
      specs: its specs.
      devices: size of the expert axis; sequences are spread over it.
      sequences: that are served at a time. length: tokens of each, prompt included.
      memory: bytes that a device may use.
      dtype: of the blocks' weights. cache_dtype: of the latent cache.
      mtp: load the MTP modules, for drafting.

    Returns:
      `Serving`; `fitting` is 0 if not even the weights fit. Activations of a step are not counted.

    Raises:
      ValueError: experts that the devices do not divide.
    """
    plan = Plan(expert=devices, batch=devices, length=min(length, cfg.max_length), weights_dtype=dtype, mtp=mtp)
    check_plan(cfg, plan)
    params = rank_params(cfg, specs, plan, 0)
    weights = _weights(cfg, plan, params, rank_contents(cfg, plan)[0])
    a_sequence = length * cache_bytes(cfg, mtp=mtp, dtype=cache_dtype)
    fitting = devices * max(0, int((memory - weights) // a_sequence))
    return Serving(weights, -(-sequences // devices) * a_sequence, fitting)
