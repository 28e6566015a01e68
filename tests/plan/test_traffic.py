"""Traffic: formulas against counting copies, token by token, of drawn routings; and collectives against counted messages."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import RouterConfig
from dsv3.ops.router import router_select
from dsv3.plan import Links, Plan, parts_reached, step_traffic, token_copies
from dsv3.plan.memory import rank_params
from dsv3.plan.traffic import layer_exchange, reduce_links, sync_traffic, total_links
from tests.plan.models import PAPER, TINY, V3, specs
from tests.small import model_config

TOKENS = 4000


def draw_uniform(router, seed, tokens=TOKENS):
    """Experts of tokens: kept groups, then K of their experts, all uniformly."""
    rng = np.random.default_rng(seed)
    size = router.num_experts // router.num_groups
    chosen = []
    for _ in range(tokens):
        groups = rng.permutation(router.num_groups)[: router.groups_kept]
        pool = (groups[:, None] * size + np.arange(size)).ravel()
        chosen.append(rng.permutation(pool)[: router.top_k])
    return np.array(chosen)


def count_copies(experts, num_experts, expert_axis, in_node, seed):
    """Sends each token from a device of its own: (copies between nodes, copies within nodes), summed."""
    rng = np.random.default_rng([seed, 1])
    ib = nvlink = 0
    for row in experts:
        home = int(rng.integers(expert_axis))
        devices = {int(e) * expert_axis // num_experts for e in row}
        for node in {device // in_node for device in devices}:
            arrives = home if node == home // in_node else node * in_node + home % in_node
            ib += int(node != home // in_node)
            nvlink += sum(device // in_node == node and device != arrives for device in devices)
    return ib, nvlink


ROUTERS = {
    "published": (V3.moe.router, [(64, 8), (8, 8), (16, 8), (256, 8), (4, 8), (1, 8)]),
    "few groups": (RouterConfig(num_experts=24, top_k=3, num_groups=4, groups_kept=2), [(8, 4), (12, 3), (2, 1), (4, 2)]),
    "one group": (RouterConfig(num_experts=16, top_k=5), [(8, 2), (4, 4), (16, 4)]),
}
CASES = [(name, *mesh) for name, (_, meshes) in ROUTERS.items() for mesh in meshes]


@pytest.mark.parametrize("name, expert, node", CASES)
def test_copies_equal_a_count_over_uniform_routing(name, expert, node):
    router = ROUTERS[name][0]
    cfg = model_config(
        n_routed_experts=router.num_experts, num_experts_per_tok=router.top_k, n_group=router.num_groups,
        topk_group=router.groups_kept,
    )  # fmt: skip
    plan = Plan(expert=expert, devices_per_node=node, batch=expert, routing="uniform")
    got = token_copies(cfg, plan)
    in_node = min(expert, node)
    counted = count_copies(draw_uniform(router, expert), router.num_experts, expert, in_node, expert)
    # A token's count varies by at most about K copies: the mean of 4,000 has a standard error below 0.03.
    for mean, total in zip(got, counted):
        assert abs(mean - total / TOKENS) < 0.12, (got, counted)
    if expert <= node:
        assert got.ib == 0


def test_a_real_router_lies_between_the_mean_and_the_limit():
    router = V3.moe.router
    scores = np.random.default_rng(0).random((2000, router.num_experts)).astype(np.float32)
    zeros = np.zeros(router.num_experts, np.float32)
    chosen = router_select(scores, zeros, top_k=8, num_groups=router.num_groups, groups_kept=router.groups_kept)
    experts = chosen.experts.numpy()
    for parts in (8, 64):
        hits = np.mean([len(set(row)) for row in experts * parts // router.num_experts])
        low, high = (parts_reached(router, parts, routing=how) for how in ("uniform", "limit"))
        assert low < hits <= high
    assert parts_reached(router, 8) == 4 and parts_reached(router, 64) == 8


def test_exchange_of_the_published_layout():
    links = layer_exchange(V3, PAPER)
    assert links["dispatch"].ib == 4096 * 3.5 * (7168 + 4 * 56)
    assert links["combine"].ib == 4096 * 3.5 * 7168 * 2
    assert links["dispatch"].nvlink == 4096 * 7 * 7392
    assert links["combine backward"] == links["dispatch"] and links["dispatch backward"] == links["combine"]
    again = layer_exchange(V3, PAPER.replace(recompute="block"))
    assert total_links(again) == total_links(links).times(1.5)
    assert total_links(layer_exchange(V3, PAPER.replace(expert=1, data=128))) == Links()


def ring(size, members, sent, node_of):
    """A reduce-scatter around a ring: everybody sends a piece on, one time less than there are members."""
    for _ in range(len(members) - 1):
        for i, device in enumerate(members):
            following = members[(i + 1) % len(members)]
            sent[device][node_of(device) != node_of(following)] += size / len(members)


@given(nodes=st.integers(1, 5), in_node=st.integers(1, 8), size=st.integers(1, 10**6))
@settings(max_examples=25)
def test_reduce_scatter_equals_counted_messages(nodes, in_node, size):
    sent = collections.defaultdict(lambda: [0.0, 0.0])
    for node in range(nodes):
        ring(size, [node * in_node + i for i in range(in_node)], sent, lambda d: d // in_node)
    for place in range(in_node):
        ring(size / in_node, [node * in_node + place for node in range(nodes)], sent, lambda d: d // in_node)
    got = reduce_links(size, nodes * in_node, in_node)
    for device in range(nodes * in_node):
        np.testing.assert_allclose(sent[device], [got.nvlink, got.ib], rtol=1e-12, atol=1e-9)


def test_pipeline_sends():
    plan = Plan(pipe=3, batch=6, length=16, devices_per_node=1)
    chunk = 16 * 2 * 32
    sends = [step_traffic(TINY, specs(TINY), plan, rank)["pipeline"] for rank in range(3)]
    assert [s.ib for s in sends] == [6 * chunk, 2 * 6 * chunk, 6 * chunk] and not any(s.nvlink for s in sends)
    near = [step_traffic(TINY, specs(TINY), plan.replace(devices_per_node=8), rank)["pipeline"] for rank in range(3)]
    assert [s.nvlink for s in near] == [s.ib for s in sends] and not any(s.ib for s in near)
    dual = [step_traffic(V3, specs(V3), PAPER, rank)["pipeline"].ib for rank in range(16)]
    # Either direction has half of the micro-batches; the ends send in one direction each.
    chunk = 4096 * 2 * 7168
    assert dual == [60 * chunk * 2] + [60 * chunk * 4] * 14 + [60 * chunk * 2]
    fold = [step_traffic(V3, specs(V3), PAPER.replace(schedule="dualpipe_v"), rank)["pipeline"].ib for rank in range(16)]
    assert fold[0] == 120 * chunk * 2 and fold[15] == 120 * chunk * 2  # 31 and 30 are neighbours, 15 and 16 one rank
    assert fold[1:15] == [120 * chunk * 4] * 14


def test_gradients_and_parameters():
    params = rank_params(V3, specs(V3), PAPER, 1)
    got = sync_traffic(V3, specs(V3), PAPER, 1)
    # 256 replicas on 32 nodes; an expert's 4 are on 4 nodes. The last rank of a ring keeps its own share.
    shared, experts = 4 * params.shared, 4 * params.experts
    np.testing.assert_allclose(got["gradients"].ib, shared / 8 * 31 / 32 + experts * 3 / 4, rtol=1e-12)
    np.testing.assert_allclose(got["gradients"].nvlink, shared * 7 / 8, rtol=1e-12)
    plain = sync_traffic(V3, specs(V3), PAPER.replace(zero=False), 1)
    assert plain["gradients"].ib == 2 * got["gradients"].ib and plain["parameters"] == Links()
    one = sync_traffic(TINY, specs(TINY), Plan(batch=2, length=16), 0)
    assert total_links(one) == Links()


def test_traffic_grows_with_formats_and_tokens():
    base = total_links(step_traffic(V3, specs(V3), PAPER, 3))
    wide = total_links(step_traffic(V3, specs(V3), PAPER.replace(dispatch_dtype="bfloat16"), 3))
    more = total_links(step_traffic(V3, specs(V3), PAPER.replace(batch=2 * PAPER.batch), 3))
    assert wide.ib > base.ib and wide.nvlink > base.nvlink
    assert base.ib < more.ib < 2 * base.ib  # gradients and parameters stay
    with pytest.raises(ValueError, match="parts_reached: `parts` is 24, want a divisor of 256 experts"):
        parts_reached(V3.moe.router, 24)
