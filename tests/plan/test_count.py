"""Parameters and FLOPs: the published numbers to the unit, and an oracle that walks the specs product by product."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3 import tree
from dsv3.plan.count import (
    EMBEDDING,
    PROJECTION,
    RECOMPUTE,
    SCORES,
    flops_by_part,
    params_active,
    params_by_part,
    router_biases,
    unit_flops,
    unit_leaves,
)
from tests.plan.models import SMALL, TINY, V3, specs

CONFIGS = SMALL | {"tiny": TINY, "demo": dsv3.preset("demo")}


def test_published_parameters_to_the_unit():
    parts = params_by_part(V3, specs(V3))
    assert sum(parts.values()) == 671_026_404_352
    assert router_biases(V3) == 58 * 256
    assert sum(parts.values()) + router_biases(V3) == 671_026_419_200
    assert parts["routed experts"] == 58 * 256 * 3 * 7168 * 2048
    assert parts["embedding"] == parts["head"] == 129_280 * 7168
    assert parts["dense feed-forward"] == 3 * 3 * 7168 * 18_432
    heads = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    assert parts["attention"] == 61 * heads


def test_active_parameters_are_the_published_37_billion():
    with_table, without = (params_active(V3, specs(V3), embedding=e) for e in (True, False))
    assert (with_table, without) == (37_552_282_624, 36_625_603_584)
    assert without < 37e9 < with_table
    assert with_table == dsv3.active_params(V3)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_sum_to_all_parameters(name):
    cfg = CONFIGS[name]
    model, mtp = (params_by_part(cfg, specs(cfg), mtp=side) for side in (False, True))
    assert sum(model.values()) + sum(mtp.values()) == dsv3.count_params(specs(cfg))
    assert sum(mtp.values()) == dsv3.count_params(specs(cfg).mtp)
    assert params_active(cfg, specs(cfg)) == dsv3.active_params(cfg)
    biases = sum(math.prod(leaf.shape) for leaf in dsv3.router_init(cfg))
    assert router_biases(cfg) + router_biases(cfg, mtp=True) == biases
    units = {"dense": cfg.num_dense_layers, "moe": cfg.num_moe_layers, "head": 1, "mtp": cfg.num_mtp_layers}
    scalars = sum(n * leaf.size for unit, n in units.items() for leaf in unit_leaves(cfg, specs(cfg), unit))
    assert scalars + model[EMBEDDING] == dsv3.count_params(specs(cfg))


def walk_flops(cfg, length, *, mtp):
    """Forward FLOPs of a sequence, a product and a key at a time: for each spec, each token, each key that it sees."""
    total = 0
    for path, spec in tree.items(specs(cfg)):
        name = path.rpartition(".")[2]
        if path == "embed" or (path.startswith("mtp") and not mtp):
            continue
        stacked = spec.axes[0] == "layer"
        shape = spec.shape[1:] if stacked else spec.shape
        layers = spec.shape[0] if stacked else 1
        if "expert" in spec.axes:
            each = cfg.moe.router.top_k * math.prod(shape[1:])
        elif name.endswith(("norm", "bias")):
            each = 0
        else:
            each = math.prod(shape)
        total += 2 * each * layers * length
    modules = cfg.num_mtp_layers if mtp else 0
    for _ in range(cfg.num_layers + modules):
        for query in range(length):
            for _ in range(query + 1):
                total += 2 * cfg.mla.num_heads * (cfg.mla.nope_dim + cfg.mla.rope_dim + cfg.mla.v_dim)
    heads = modules + (1 if cfg.tie_embeddings else 0)  # passes through a head that has no spec of its own
    return total + heads * 2 * cfg.hidden_size * cfg.vocab_size * length


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_equal_a_walk_over_all_products(name, mtp):
    cfg = CONFIGS[name]
    for length in (1, 2, 7):
        flops = flops_by_part(cfg, specs(cfg), length=length, mtp=mtp)
        want = walk_flops(cfg, length, mtp=mtp)
        # Sums of whole and half numbers far below 2⁵³: exact.
        assert sum(flops.forward.values()) * length == want
        assert flops.model * length == 3 * want


def test_flops_of_the_published_model():
    """arXiv:2505.09343 table 2 has 250 GFLOPs a token at length 4096; the MTP module is not among them."""
    flops = flops_by_part(V3, specs(V3), length=4096, mtp=False)
    np.testing.assert_allclose(flops.model / 1e9, 250, rtol=0.005)
    matrices = 6 * params_active(V3, specs(V3), embedding=False)
    np.testing.assert_allclose(flops.model - 3 * flops.forward[SCORES], matrices, rtol=1e-4)  # but for the norms


@given(length=st.integers(1, 9000), unit=st.sampled_from(["dense", "moe", "mtp"]))
@settings(max_examples=30)
def test_recomputation_orders_and_contents(length, unit):
    flops = {how: unit_flops(V3, specs(V3), unit, length=length, recompute=how) for how in RECOMPUTE}
    again = {how: sum(f.recomputed.values()) for how, f in flops.items()}
    assert again["none"] < again["paper"] < again["block"]
    assert len({f.model for f in flops.values()}) == 1
    # Scores are computed again by the attention kernel itself, even if nothing else is.
    scores = 2 * 128 * 192 * (length + 1) / 2
    assert again["none"] == scores
    assert again["paper"] - scores == 2 * (1536 * 128 * 192 + 512 * 128 * 256)
    block = sum(v for part, v in flops["block"].forward.items() if part not in ("head", PROJECTION))
    assert again["block"] - scores == block


def test_wrong_specs_are_refused():
    with pytest.raises(ValueError, match=r"read_leaves: `specs` has embed \(256, 32\), want \(129280, 7168\)"):
        params_by_part(V3, specs(TINY))
    with pytest.raises(ValueError, match="read_leaves: `specs` has layers .*'mtp': 1.*, want .*'mtp': 0"):
        params_by_part(TINY.replace(num_nextn_predict_layers=0), specs(TINY))
    with pytest.raises(ValueError, match="unit_flops: `length` is 0, want > 0"):
        unit_flops(TINY, specs(TINY), "moe", length=0)
    with pytest.raises(ValueError, match="unit_leaves: `unit` is 'embed', want one of"):
        unit_leaves(TINY, specs(TINY), "embed")
