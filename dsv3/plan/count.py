"""Counts: parameters by part and the multiplications that one token costs, both read from the specs' shapes.

A model is a stack of units: `"dense"` and `"moe"` blocks, the `"head"` (with the final norm), and `"mtp"` modules with their
own pass through the head. Everything else in this package adds up units.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from dsv3 import tree
from dsv3.checks import check, check_choice
from dsv3.config import ModelConfig
from dsv3.typing import Tree

RECOMPUTE = ("none", "paper", "block")
UNITS = ("dense", "moe", "head", "mtp")
UP_PROJECTIONS = ("q_b", "kv_b")

EMBEDDING, HEAD, NORMS = "embedding", "head", "norms"
ATTENTION, DENSE, ROUTED, SHARED, ROUTER = "attention", "dense feed-forward", "routed experts", "shared experts", "router"
PROJECTION, SCORES = "MTP projection", "attention scores"


class Leaf(NamedTuple):
    """One parameter: `where` is its place (`"embed"`, `"dense"`, `"moe"`, `"norm"`, `"head"`, `"mtp"`), `part` its kind.

    Attributes:
      name: the last field of its path. size: scalars of one layer. layers: how many layers are stacked.
      is_expert: whether a dim counts experts. is_product: whether it multiplies activations (a matrix, not the embedding).
    """

    name: str
    where: str
    part: str
    size: int
    layers: int
    is_expert: bool
    is_product: bool


def read_leaves(cfg: ModelConfig, specs: Tree) -> tuple[Leaf, ...]:
    """Returns what the planner needs to know of every parameter.

    Args:
      cfg: the configuration.
      specs: `model_specs(cfg)`: a tree of `ParamSpec` whose fields are those of `ModelParams`.

    Returns:
      A tuple of `Leaf`.

    Raises:
      ValueError: the specs are not those of `cfg`.
    """
    return _read_leaves(cfg, specs)


@functools.lru_cache(maxsize=16)  # specs are hashable: NamedTuples and tuples of frozen dataclasses
def _read_leaves(cfg: ModelConfig, specs: Tree) -> tuple[Leaf, ...]:
    items = tuple(tree.items(specs))
    shapes = {path: spec.shape for path, spec in items}
    want = (cfg.vocab_size, cfg.hidden_size)
    check(shapes.get("embed") == want, f"read_leaves: `specs` has embed {shapes.get('embed')}, want {want} [V, D]")
    leaves = []
    for path, spec in items:
        where, _, rest = path.partition(".")
        stacked = spec.axes[0] == "layer"
        size = math.prod(spec.shape[1:] if stacked else spec.shape)
        matrix = [axis for axis in spec.axes if axis not in ("layer", "expert")]
        leaves.append(
            Leaf(
                name=path.rpartition(".")[2], where=where, part=_part(where, rest, spec.axes), size=size,
                layers=spec.shape[0] if stacked else 1, is_expert="expert" in spec.axes,
                is_product=len(matrix) > 1 and where != "embed",
            )
        )  # fmt: skip
    depth = {where: max((x.layers for x in leaves if x.where == where), default=0) for where in ("dense", "moe", "mtp")}
    want = {"dense": cfg.num_dense_layers, "moe": cfg.num_moe_layers, "mtp": cfg.num_mtp_layers}
    check(depth == want, f"read_leaves: `specs` has layers {depth}, want {want}")
    return tuple(leaves)


def _part(where: str, rest: str, axes: tuple[str, ...]) -> str:
    if where in ("embed", "head"):
        return EMBEDDING if where == "embed" else HEAD
    if where == "norm" or rest.endswith("norm"):
        return NORMS
    if "mla." in rest:
        return ATTENTION
    if "expert" in axes:
        return ROUTED
    if rest == "proj":
        return PROJECTION
    return ROUTER if rest.endswith("router") else SHARED if "shared." in rest else DENSE


def params_by_part(cfg: ModelConfig, specs: Tree, *, mtp: bool = False) -> dict[str, int]:
    """Returns the number of parameters of each part; they sum to all of them.

    Args:
      cfg: the configuration.
      specs: its specs.
      mtp: count the MTP modules instead of the model without them. The modules share the model's embedding and head.

    Returns:
      Part to scalars. Router biases are state and not among them: see `router_biases`.
    """
    counts: dict[str, int] = {}
    for leaf in read_leaves(cfg, specs):
        if (leaf.where == "mtp") == mtp:
            counts[leaf.part] = counts.get(leaf.part, 0) + leaf.size * leaf.layers
    return counts


def router_biases(cfg: ModelConfig, *, mtp: bool = False) -> int:
    """Returns the selection biases, state beside the parameters: E for each mixture of the model `cfg`, or of its `mtp`
    modules.

    DeepSeek-V3 has 58·256 = 14,848, with which its 671,026,404,352 parameters become the 671,026,419,200 of the checkpoint.
    """
    return (cfg.num_mtp_layers if mtp else cfg.num_moe_layers) * cfg.moe.router.num_experts


def params_active(cfg: ModelConfig, specs: Tree, *, embedding: bool = True) -> int:
    """Returns how many parameters one token uses: all of the model's but E − K of each mixture's E routed experts.

    Norms, router and head are counted, MTP modules and router biases are not.

    Args:
      cfg: the configuration.
      specs: its specs.
      embedding: count the whole embedding table, of which a token reads one row. The paper's 37B lies between the two sides.

    Returns:
      The number of scalars.
    """
    counts = params_by_part(cfg, specs)
    r = cfg.moe.router
    idle = counts.get(ROUTED, 0) * (r.num_experts - r.top_k) // r.num_experts
    return sum(counts.values()) - idle - (0 if embedding else counts[EMBEDDING])


def unit_leaves(cfg: ModelConfig, specs: Tree, unit: str) -> tuple[Leaf, ...]:
    """Returns the parameters that belong to one `unit` (see `UNITS`) of the model `cfg` with `specs`, per layer.

    The head has the final norm; with tied embeddings it has no matrix of its own.
    """
    check_choice("unit_leaves", "unit", unit, UNITS)
    where = ("norm", "head") if unit == "head" else (unit,)
    return tuple(leaf for leaf in read_leaves(cfg, specs) if leaf.where in where)


def score_flops(cfg: ModelConfig, length: int) -> tuple[float, float]:
    """Returns the multiply-add operations of one token's scores and of its weighted values, averaged over a causal sequence.

    Token t of T sees t + 1 keys, on average (T + 1)/2, so `2·H·(P + R)·(T + 1)/2` and `2·H·U·(T + 1)/2`.

    Args:
      cfg: the configuration.
      length: T.

    Returns:
      (scores, values) in FLOPs.
    """
    keys = (length + 1) / 2
    mla = cfg.mla
    return 2 * mla.num_heads * mla.qk_dim * keys, 2 * mla.num_heads * mla.v_dim * keys


class Flops(NamedTuple):
    """FLOPs of one token by part: of the forward pass, of the backward pass, and of what the backward computes again."""

    forward: dict[str, float]
    backward: dict[str, float]
    recomputed: dict[str, float]

    @property
    def model(self) -> float:
        """Forward and backward: what "model FLOPs utilisation" counts."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def hardware(self) -> float:
        """All that is computed."""
        return self.model + sum(self.recomputed.values())


def unit_flops(cfg: ModelConfig, specs: Tree, unit: str, *, length: int, recompute: str = "paper") -> Flops:
    """Counts the products of one unit for one token: `2·m·k·n` for `[m, k] @ [k, n]`; norms, softmax and SwiGLU are not
    counted.

    A backward pass computes two products for each one of the forward pass: for the input and for the weight. The backward of
    attention computes its scores again, whatever `recompute` says, as kernels that keep no probabilities do.

    Args:
      cfg: the configuration.
      specs: its specs.
      unit: one of `UNITS`; an `"mtp"` module includes its own pass through the head.
      length: tokens of a sequence, T.
      recompute: `"none"`; `"paper"`: norms, the MLA up-projections q_b and kv_b, and SwiGLU; `"block"`: each whole block.

    Returns:
      `Flops`, with the routed experts counted K times.

    References: DeepSeek-V3 section 3.2.3 for what is computed again; the 250 GFLOPs a token of arXiv:2505.09343 table 2 are
    `Flops.model` of all units but the MTP module at T = 4096.
    """
    check_choice("unit_flops", "recompute", recompute, RECOMPUTE)
    check(length > 0, f"unit_flops: `length` is {length}, want > 0")
    r = cfg.moe.router
    forward: dict[str, float] = {}
    again: dict[str, float] = {}
    for leaf in unit_leaves(cfg, specs, unit):
        if leaf.is_product:
            size = leaf.size * r.top_k // r.num_experts if leaf.is_expert else leaf.size
            forward[leaf.part] = forward.get(leaf.part, 0) + 2 * size
            if recompute == "paper" and leaf.name in UP_PROJECTIONS:
                again[leaf.part] = again.get(leaf.part, 0) + 2 * size
    if unit != "head":
        scores, values = score_flops(cfg, length)
        forward[SCORES] = scores + values
        if recompute == "block":
            again = {part: flops for part, flops in forward.items() if part != PROJECTION}
        again[SCORES] = again.get(SCORES, 0) + scores
    if unit == "mtp" or (unit == "head" and cfg.tie_embeddings):
        forward[HEAD] = 2 * cfg.vocab_size * cfg.hidden_size
    return Flops(forward, {part: 2 * flops for part, flops in forward.items()}, again)


def flops_by_part(cfg: ModelConfig, specs: Tree, *, length: int, recompute: str = "paper", mtp: bool = True) -> Flops:
    """Counts the products of the whole model for one token of training, see `unit_flops`.

    Args:
      cfg: the configuration.
      specs: its specs.
      length: tokens of a sequence.
      recompute: see `unit_flops`.
      mtp: whether the MTP modules are trained along.

    Returns:
      `Flops`.
    """
    total = Flops({}, {}, {})
    times = {"dense": cfg.num_dense_layers, "moe": cfg.num_moe_layers, "head": 1, "mtp": cfg.num_mtp_layers if mtp else 0}
    for unit, count in times.items():
        if count:
            for sums, more in zip(total, unit_flops(cfg, specs, unit, length=length, recompute=recompute)):
                for part, flops in more.items():
                    sums[part] = sums.get(part, 0) + count * flops
    return total
