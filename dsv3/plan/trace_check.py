"""A traced step beside the planner's formulas: what each piece should cost, and by what and why it costs something else.

Every difference is computed from sizes and never from the trace, so that formula and differences have to add up to what was
traced, to the unit. What is left over is an error in a formula, in this list, or in the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.ops.dispatch import dispatch_size
from dsv3.plan.count import (
    DENSE,
    HEAD,
    PROJECTION,
    ROUTED,
    SCORES,
    SHARED,
    UP_PROJECTIONS,
    Flops,
    unit_flops,
    unit_leaves,
)
from dsv3.plan.memory import block_activations, rank_params
from dsv3.plan.mesh import Plan, rank_contents
from dsv3.plan.trace import Products, StepTrace, plan_nodes, sum_products
from dsv3.typing import Tree

ATTENDING = ("dense", "attention", "mtp")  # pieces with an attention layer
ROUTES = ("to_nodes", "dispatch", "experts", "combine", "from_nodes")
PADDING = ("capacity beyond a balanced load", "experts' rows in whole blocks", "last chunk of the loss filled up")


class Difference(NamedTuple):
    """What a piece costs more than by formula, and why; a negative number is less."""

    piece: str
    reason: str
    flops: Products


class Rank(NamedTuple):
    """One device of a pipeline rank: its parameters and the products of a step, traced and by formula."""

    params: int
    params_formula: int
    flops: Products
    flops_formula: Products


def formula_products(cfg: ModelConfig, specs: Tree, plan: Plan) -> dict[str, Products]:
    """Returns what the formulas of `count` say of each piece: FLOPs of one call, for a chunk on one device.

    With P the products of a forward pass, of which S are attention's scores and values: forward P, backward for inputs
    P + S and what is computed again, backward for weights P − S, as in `chunk.unit_time`.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.

    Returns:
      `Products` by the pieces' names; those without products are left out.
    """
    units = {"dense": cfg.num_dense_layers, "moe": cfg.num_moe_layers, "head": 1, "mtp": plan.mtp * cfg.num_mtp_layers}
    how = {"length": plan.length, "recompute": plan.recompute}
    flops = {unit: unit_flops(cfg, specs, unit, **how) for unit, count in units.items() if count}
    shared_out = plan.expert > 1
    found = {}
    for piece, unit, only, without in (
        ("dense", "dense", None, ()),
        ("attention", "moe", None, (ROUTED,) if shared_out else ()),
        ("experts", "moe" if "moe" in flops else "mtp", (ROUTED,), ()),
        ("head", "head", None, ()),
        ("mtp", "mtp", None, (ROUTED, HEAD) if shared_out else (HEAD,)),
        ("mtp_loss", "mtp", (HEAD,), ()),
    ):
        if unit in flops and (piece != "experts" or shared_out):
            found[piece] = _products(flops[unit], plan.tokens, only or set(flops[unit].forward) - set(without))
    return found


def _products(flops: Flops, tokens: int, parts) -> Products:
    forward = sum(_whole(flops.forward.get(part, 0) * tokens) for part in parts)
    again = sum(_whole(flops.recomputed.get(part, 0) * tokens) for part in parts)
    scores = _whole(flops.forward.get(SCORES, 0) * tokens) if SCORES in parts else 0
    return Products(forward, forward + scores + again, forward - scores)


def _whole(value: float) -> int:
    check(float(value).is_integer(), f"formula_products: a count is {value}, want a whole number")
    return int(value)


def step_differences(cfg: ModelConfig, specs: Tree, plan: Plan, trace: StepTrace) -> list[Difference]:
    """Returns by what the traced pieces differ from their formulas, from sizes alone.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      trace: of its step. Only the names of its pieces, its capacity and its policy are read.

    Returns:
      Differences of one call each.
    """
    found = []
    for piece in trace.pieces:
        if piece in ATTENDING:
            found += _attention(cfg, plan, trace, piece)
            found += _again(cfg, specs, plan, piece)
        if piece == "experts" or (plan.expert == 1 and piece in ("attention", "mtp")):
            found += _experts(cfg, plan, trace, piece)
        if piece in ("head", "mtp_loss"):
            found += _loss(cfg, plan, trace, piece)
    return [d for d in found if any(d.flops)]


def _attention(cfg: ModelConfig, plan: Plan, trace: StepTrace, piece: str) -> Iterator[Difference]:
    """Whole blocks of keys instead of those that a query sees; probabilities that short sequences keep."""
    length, policy, mla = plan.length, trace.policy, cfg.mla
    block = policy.query_block(length)
    blocks = -(-length // block)
    unrolled = blocks <= policy.attention_unroll
    if unrolled:
        ends = [min(start + block, length) for start in range(0, length, block)]
        keys = sum((end - start) * end for start, end in zip([0, *ends], ends))
    else:
        keys = blocks * (blocks + 1) // 2 * block**2
    scores, values = 2 * mla.num_heads * mla.qk_dim * plan.micro_batch, 2 * mla.num_heads * mla.v_dim * plan.micro_batch
    more = keys - length * (length + 1) // 2
    again = scores + (scores + values if plan.recompute == "block" else 0)
    yield Difference(
        piece, "whole blocks of the causal mask", Products((scores + values) * more, (2 * (scores + values) + again) * more)
    )
    if unrolled and length <= policy.attention_keep:
        yield Difference(piece, "probabilities kept, not computed again", Products(inputs=-scores * keys))


def _again(cfg: ModelConfig, specs: Tree, plan: Plan, piece: str) -> Iterator[Difference]:
    """What the plan computes again and the step does not, or the other way round."""
    unit = "moe" if piece == "attention" else piece
    leaves, r = unit_leaves(cfg, specs, unit), cfg.moe.router
    if plan.recompute == "paper":
        size = sum(leaf.size for leaf in leaves if leaf.name in UP_PROJECTIONS)
        yield Difference(piece, "MLA up-projections kept, not computed again", Products(inputs=-2 * size * plan.tokens))
    if plan.recompute == "block":
        last = {DENSE, SHARED, ROUTED} if plan.expert == 1 else {DENSE, SHARED}
        sizes = [
            leaf.size * r.top_k // r.num_experts if leaf.is_expert else leaf.size
            for leaf in leaves if leaf.name == "down" and leaf.part in last
        ]  # fmt: skip
        yield Difference(piece, "last products of a block not needed again", Products(inputs=-2 * sum(sizes) * plan.tokens))
        size = sum(leaf.size for leaf in leaves if leaf.part == PROJECTION)
        yield Difference(piece, "projection computed again", Products(inputs=2 * size * plan.tokens))


def _experts(cfg: ModelConfig, plan: Plan, trace: StepTrace, piece: str) -> Iterator[Difference]:
    """Rows that are computed and belong to no token."""
    moe, policy = cfg.moe, trace.policy
    balanced = plan.tokens * moe.router.top_k
    rows = moe.router.num_experts // plan_nodes(plan) * trace.capacity if plan.expert > 1 else balanced
    local = moe.router.num_experts // plan.expert
    padded = dispatch_size(rows, local, policy.row_multiple(rows, local))
    if plan.expert == 1 and balanced <= policy.max_rows:
        padded = rows
    row = 2 * cfg.hidden_size * moe.intermediate_size  # FLOPs of a row in one of the three matrices
    again = 2 * row if plan.recompute == "block" else 0
    for reason, more in ((PADDING[0], rows - balanced), (PADDING[1], padded - rows)):
        yield Difference(piece, reason, Products(3 * row * more, (3 * row + again) * more, 3 * row * more))
    if piece == "experts" and plan.recompute == "block":
        yield Difference(piece, "last products of a block not needed again", Products(inputs=-row * balanced))


def _loss(cfg: ModelConfig, plan: Plan, trace: StepTrace, piece: str) -> Iterator[Difference]:
    """Logits exist chunk by chunk, so the backward pass computes them again, unless it keeps them; a loop over chunks makes
    both gradients."""
    logits = 2 * cfg.vocab_size * cfg.hidden_size
    kept = plan.tokens * cfg.vocab_size <= trace.policy.loss_keep  # then they are one chunk
    size = plan.tokens if kept else min(trace.policy.loss_chunk, plan.tokens)
    chunks = -(-plan.tokens // size)
    more, all_in_one = chunks * size - plan.tokens, chunks > 1
    if plan.recompute == "block" or not kept:
        yield Difference(piece, "logits computed again", Products(inputs=logits * plan.tokens))
    if all_in_one:
        moved = logits * plan.tokens
        yield Difference(piece, "the head's gradient in the loop of its input's", Products(0, moved, -moved))
    yield Difference(piece, PADDING[2], Products(logits * more, (2 + all_in_one) * logits * more))


def unexplained(cfg: ModelConfig, specs: Tree, plan: Plan, trace: StepTrace) -> dict[str, Products]:
    """Returns what formulas and differences leave over.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      trace: of its step.

    Returns:
      By piece, traced − formula − differences; empty if all is explained.
    """
    formula, why = formula_products(cfg, specs, plan), step_differences(cfg, specs, plan, trace)
    found = {}
    for piece, traced in trace.pieces.items():
        known = sum_products([formula.get(piece, Products()), *(d.flops for d in why if d.piece == piece)])
        left = traced.flops.plus(known.times(-1))
        if any(left):
            found[piece] = left
    return found


def model_calls(trace: StepTrace) -> dict[str, int]:
    """Returns how often each piece of a `trace` runs for a micro-batch, in all stages together."""
    return {name: sum(stage.calls.get(name, 0) for stage in trace.stages) for name in trace.pieces}


def traced_params(specs: Tree, plan: Plan, trace: StepTrace, *, mtp: bool) -> int:
    """Returns the parameters that the traced pieces read, each once, over all pipeline and expert ranks.

    Args:
      specs: of the parameters; what has an axis `"expert"` is on each of the plan's expert ranks another part.
      plan: the plan.
      trace: of its step.
      mtp: those of the MTP modules instead of the model's.
    """
    sharded = {path: "expert" in spec.axes for path, spec in tree.items(specs)}
    paths = {path: size for stage in trace.stages for path, size in stage.params.items()}
    total = 0
    for path, size in paths.items():
        leaf = ".".join(part for part in path.split(".") if not part.isdigit())
        if path.startswith("mtp.") == mtp:
            total += size * (plan.expert if sharded[leaf] else 1)
    return total


def rank_checks(cfg: ModelConfig, specs: Tree, plan: Plan, trace: StepTrace) -> list[Rank]:
    """Returns each pipeline rank's device, traced beside the formulas.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      trace: of its step.

    Returns:
      `Rank`s in order.
    """
    formula = formula_products(cfg, specs, plan)
    found = []
    for rank, held in enumerate(rank_contents(cfg, plan)):
        params = rank_params(cfg, specs, plan, rank)
        total = Products()
        for _, stage in held:
            calls = {"dense": stage.dense, "attention": stage.moe, "experts": stage.moe + stage.mtp, "head": int(stage.head)}
            calls |= {"mtp": stage.mtp, "mtp_loss": stage.mtp}
            total = sum_products([total, *(formula[name].times(n) for name, n in calls.items() if name in formula)])
        chunks = plan.micro_batches // plan.copies
        traced = sum(trace.rank_params(plan, rank).values())
        found.append(Rank(traced, params.shared + params.experts, trace.ranks[rank], total.times(chunks)))
    return found


def kept_bytes(cfg: ModelConfig, plan: Plan, trace: StepTrace) -> dict[str, tuple[float, float, float]]:
    """Returns the bytes a token that units keep for their backward passes.

    Args:
      cfg: the configuration.
      plan: the plan.
      trace: of its step.

    Returns:
      By unit (`"dense"`, `"moe"`, `"head"`, `"mtp"`): traced, of it gathered weights, and by the formulas of `memory`.
    """
    routes = [name for name in ROUTES if name in trace.pieces]
    units = {"dense": ["dense"], "moe": ["attention", *routes], "head": ["head"], "mtp": ["mtp", *routes, "mtp_loss"]}
    norms = 2 * cfg.hidden_size
    planned = {
        "dense": sum(block_activations(cfg, plan, dense=True, recompute=plan.recompute).values()),
        "moe": sum(block_activations(cfg, plan, dense=False, recompute=plan.recompute).values()),
        "head": norms * (2 if plan.recompute == "none" else 1),
    }
    planned["mtp"] = planned["moe"] + norms * (4 if plan.recompute == "none" else 1)
    found = {}
    for unit, names in units.items():
        if names[0] in trace.pieces:
            kept, gathered = (sum(getattr(trace.pieces[n], field) for n in names) for field in ("kept", "gathered"))
            found[unit] = (kept / plan.tokens, gathered / plan.tokens, planned[unit])
    return found
