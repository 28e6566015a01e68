"""Bytes over each link: all-to-all over InfiniBand and NVLink, pipeline sends, gradients and parameters."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from dsv3.checks import check, check_choice
from dsv3.config import ModelConfig, RouterConfig
from dsv3.plan.memory import leaf_bytes, rank_params
from dsv3.plan.mesh import Plan, check_plan, rank_contents
from dsv3.plan.storage import row_bytes
from dsv3.typing import Tree


class Links(NamedTuple):
    """Bytes that one device sends: over InfiniBand, between nodes, and over NVLink, within its node."""

    ib: float = 0.0
    nvlink: float = 0.0

    def plus(self, other: Links) -> Links:
        """Adds link by link."""
        return Links(self.ib + other.ib, self.nvlink + other.nvlink)

    def times(self, factor: float) -> Links:
        """Multiplies both links."""
        return Links(self.ib * factor, self.nvlink * factor)


@functools.lru_cache(maxsize=256)
def parts_reached(router: RouterConfig, parts: int, *, routing: str = "limit") -> float:
    """Returns to how many of `parts` equal runs of consecutive experts (devices, nodes) a token goes.

    `"limit"`: the most that K choices within the kept groups allow. `"uniform"`: the mean if kept groups and then K of their
    experts are drawn uniformly, `parts·Σ_j h(j)·(1 − C(n − j·c, K)/C(n, K))`: a part touches a groups with c experts of
    each, j of which are kept with the hypergeometric probability h(j); n experts are kept in all. A real router lies
    between the two, as a group is kept for its two best experts: with random scores a token of DeepSeek-V3 reaches 3.95 of 8
    nodes, where the limit is 4 and this mean 3.63.

    Args:
      router: experts, groups and choices.
      parts: how many equal parts; a part must be whole groups, or a group whole parts.
      routing: `"limit"` or `"uniform"`.

    Returns:
      The number of distinct parts.

    References: DeepSeek-V3 section 2.1.2, node-limited routing.
    """
    check_choice("parts_reached", "routing", routing, ("limit", "uniform"))
    e, g, kept, k = router.num_experts, router.num_groups, router.groups_kept, router.top_k
    check(
        e % parts == 0 and (g % parts == 0 or parts % g == 0),
        f"parts_reached: `parts` is {parts}, want a divisor of {e} experts that divides {g} groups or is a multiple",
    )
    if routing == "limit":
        return float(min(k, parts, kept * max(1, parts // g)))
    touched = max(1, g // parts)  # groups that one part has experts of
    c = e // parts // touched
    n = kept * e // g
    missed = sum(
        math.comb(touched, j) * math.comb(g - touched, kept - j) / math.comb(g, kept)
        * math.comb(n - j * c, k) / math.comb(n, k)
        for j in range(min(touched, kept) + 1)
    )  # fmt: skip
    return parts * (1 - missed)


def token_copies(cfg: ModelConfig, plan: Plan) -> Links:
    """Returns how many copies of a token one dispatch sends over each link.

    A token goes once over InfiniBand to each of its nodes but its own, to the device with its sender's place in the node,
    and from there over NVLink to the devices of its experts: nodes·(1 − 1/N) and devices·(1 − 1/n) copies, for N nodes in
    the expert group and n of its devices in a node, as a token's own node and the arriving device are as likely as any
    other.

    Args:
      cfg: the configuration.
      plan: the expert axis, devices of a node and `routing`.

    Returns:
      `Links` of copies, not bytes. Combining sends the same number back, summed up in each node on the way.

    References: DeepSeek-V3 section 3.2.2.
    """
    nodes = plan.expert // plan.experts_in_node
    across = parts_reached(cfg.moe.router, nodes, routing=plan.routing) * (1 - 1 / nodes)
    within = parts_reached(cfg.moe.router, plan.expert, routing=plan.routing) * (1 - 1 / plan.experts_in_node)
    return Links(across, within)


def layer_exchange(cfg: ModelConfig, plan: Plan) -> dict[str, Links]:
    """Returns the bytes that a device sends for one mixture and one chunk, in each of its all-to-alls.

    Tokens of a chunk · copies · bytes of a row. Forward: dispatch in the dispatch format, combine in the combine format.
    Backward the same two, as the gradient of a combine is a dispatch and the other way round. A block that is computed
    again dispatches and combines again. Choices and gates, 8 bytes each, are not counted.

    Args:
      cfg: the configuration.
      plan: the plan.

    Returns:
      `"dispatch"`, `"combine"`, `"combine backward"` and `"dispatch backward"` to `Links`.

    References: DeepSeek-V3 section 3.3.3, low-precision communication.
    """
    copies = token_copies(cfg, plan).times(plan.tokens)
    there = copies.times(row_bytes(cfg.hidden_size, plan.dispatch_dtype))
    back = copies.times(row_bytes(cfg.hidden_size, plan.combine_dtype))
    again = plan.recompute == "block"
    return {
        "dispatch": there,
        "combine": back,
        "combine backward": there.plus(there if again else Links()),
        "dispatch backward": back.plus(back if again else Links()),
    }


def chunk_send(cfg: ModelConfig, plan: Plan) -> int:
    """Returns the bytes of a chunk's hidden states, tokens·2D in bfloat16: what a stage of `plan` and `cfg` sends on."""
    return plan.tokens * row_bytes(cfg.hidden_size, "bfloat16")


def reduce_links(size: int, ranks: int, in_node: int) -> Links:
    """Returns what a device sends to reduce-scatter, or to gather, `size` bytes over `ranks` replicas, node by node first.

    In a node of g replicas (g − 1)/g·size over NVLink; each then has size/g to share with the m = ranks/g nodes:
    (m − 1)/m·size/g over InfiniBand. g is the largest common divisor of `ranks` and `in_node`.

    Args:
      size: bytes that each replica has, or will have.
      ranks: replicas.
      in_node: replicas that share a node.

    Returns:
      `Links`.
    """
    g = math.gcd(ranks, in_node)
    nodes = ranks // g
    return Links((nodes - 1) / nodes * size / g, (g - 1) / g * size)


def sync_traffic(cfg: ModelConfig, specs: Tree, plan: Plan, rank: int) -> dict[str, Links]:
    """Returns what a device of a pipeline rank sends once a step, for gradients and parameters.

    With ZeRO gradients are reduce-scattered in float32 and working weights gathered in their format; without, gradients are
    gathered too and no weights are. Routed experts have copies·data replicas, everything else copies·data·expert.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      rank: the pipeline rank.

    Returns:
      `"gradients"` and `"parameters"` to `Links`.
    """
    params = rank_params(cfg, specs, plan, rank)
    weights = {False: 0, True: 0}
    for leaf, times in params.leaves:
        weights[leaf.is_expert] += times * leaf_bytes(leaf, plan)
    totals = {"gradients": Links(), "parameters": Links()}
    replicas = plan.copies * plan.data
    for is_expert, count in ((False, params.shared), (True, params.experts)):
        ranks = replicas if is_expert else replicas * plan.expert
        in_node = plan.data_in_node * (1 if is_expert else plan.experts_in_node)
        gradients = reduce_links(4 * count, ranks, in_node)
        gathered = reduce_links(weights[is_expert], ranks, in_node) if plan.zero else Links()
        totals["gradients"] = totals["gradients"].plus(gradients.times(1 if plan.zero else 2))
        totals["parameters"] = totals["parameters"].plus(gathered)
    return totals


def step_traffic(cfg: ModelConfig, specs: Tree, plan: Plan, rank: int) -> dict[str, Links]:
    """Returns the bytes that one device of a pipeline rank sends in a step.

    Each stage of the rank computes M/copies chunks of M micro-batches. A chunk's hidden states go to the next stage's
    rank, their gradients to the previous one; a fold of DualPipeV stays on its rank.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: a possible plan.
      rank: the pipeline rank.

    Returns:
      Purpose to `Links`: the four of `layer_exchange`, `"pipeline"`, `"gradients"`, `"parameters"`.

    Raises:
      ValueError: an impossible plan.
    """
    check_plan(cfg, plan)
    contents = rank_contents(cfg, plan)
    chunks = plan.micro_batches // plan.copies
    mixtures = sum(stage.moe + stage.mtp for _, stage in contents[rank])
    found = {name: links.times(chunks * mixtures) for name, links in layer_exchange(cfg, plan).items()}
    last = max(number for held in contents for number, _ in held)
    a_node = max(1, plan.devices_per_node // (plan.experts_in_node * plan.data_in_node))
    sends = Links()
    for number, _ in contents[rank]:
        # In DualPipe either direction's neighbours are ranks r ± 1; so they are in DualPipeV, but for the fold.
        for other in (number + 1, number - 1):
            if 0 <= other <= last and not any(other == held for held, _ in contents[rank] if plan.copies == 1):
                neighbour = _rank_of(plan, other, rank)
                same = neighbour // a_node == rank // a_node
                sends = sends.plus(Links(0, 1) if same else Links(1, 0))
    found["pipeline"] = sends.times(chunks * chunk_send(cfg, plan))
    return found | sync_traffic(cfg, specs, plan, rank)


def _rank_of(plan: Plan, stage: int, rank: int) -> int:
    """The rank beside `rank` that holds `stage`."""
    if plan.schedule == "dualpipe_v":
        return stage if stage < plan.pipe else 2 * plan.pipe - 1 - stage
    if plan.schedule == "dualpipe":
        return min((stage, plan.pipe - 1 - stage), key=lambda r: (abs(r - rank) != 1, r))
    return stage


def total_links(traffic: dict[str, Links]) -> Links:
    """Returns the sum of a `traffic` table."""
    total = Links()
    for links in traffic.values():
        total = total.plus(links)
    return total
