"""Meshes: what is refused and why, what a search keeps, and how layers are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.plan import Plan, check_plan, parse_mesh, plan_problem, predict_step, report, search_plans, stage_choices
from dsv3.plan.mesh import plan_stages
from dsv3.plan.schedule import SCHEDULES, rank_stages, stage_count
from dsv3.plan.search import divisors, mesh_sizes
from tests.plan.models import H800, PAPER, SMALL, TINY, V3, specs


@pytest.mark.parametrize("fields, reason", [
    ({"expert": 48, "data": 1}, "256 experts are not divisible by expert:48"),
    ({"batch": 1000}, "1000 sequences are not divisible by data·expert = 128 ranks with micro-batches of 1"),
    ({"pipe": 3, "schedule": "dualpipe"}, "dualpipe wants an even number of pipe ranks, not 3"),
    ({"batch": 128 * 30}, "dualpipe wants at least 32 micro-batches for 16 pipe ranks, not 30"),
    ({"batch": 128 * 33}, "dualpipe wants an even number of micro-batches, not 33"),
    ({"pipe": 64, "schedule": "one_f_one_b"}, "64 stages are too many for 61 layers"),
    ({"stages": (61,)}, "stages [61] are not 61 layers in 16 stages"),
    ({"stages": (*[4] * 15, 2)}, "are not 61 layers in 16 stages"),
    ({"length": 8192}, "8192 tokens are more than the model's 4096"),
    ({"devices_per_node": 6}, "expert:64 and nodes of 6 devices do not divide each other"),
])  # fmt: skip
def test_impossible_plans_have_a_named_reason(fields, reason):
    plan = PAPER.replace(**fields)
    assert reason in plan_problem(V3, plan)
    with pytest.raises(ValueError, match="check_plan: `plan` is impossible: ") as caught:
        check_plan(V3, plan)
    assert "\n" not in str(caught.value)


def test_more_reasons():
    dense = SMALL["dense"]
    assert "has no mixture of experts" in plan_problem(dense, Plan(expert=2, batch=2, length=8))
    six = SMALL["parts"]  # 6 experts in 3 groups
    assert "3 expert groups and the 2 devices of expert:2" in plan_problem(six, Plan(expert=2, batch=2, length=8))
    assert plan_problem(V3, PAPER) is None
    for wrong, message in (
        ({"pipe": 0}, "Plan: `pipe` is 0, want > 0"), ({"imbalance": 0.5}, "Plan: `imbalance` is 0.5, want at least 1"),
        ({"schedule": "gpipe"}, "Plan: `schedule` is 'gpipe', want one of 'one_f_one_b'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PAPER.replace(**wrong)


@pytest.mark.parametrize("text, message", [
    ("pipe=4", "'pipe=4', want axis:size"), ("tensor:2", "'tensor:2', want axis:size with an axis of pipe, expert, data"),
    ("data:0", "'data:0'"), ("data:2,data:2", "names the axis 'data' twice"), ("data:-1", "'data:-1'"),
    ("data:x", "'data:x'"),
])  # fmt: skip
def test_wrong_meshes_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_meshes_are_read():
    assert parse_mesh(" expert:8, pipe:2") == {"pipe": 2, "expert": 8, "data": 1}
    assert parse_mesh("") == {"pipe": 1, "expert": 1, "data": 1}


@given(layers=st.integers(1, 70), pipe=st.integers(1, 12), schedule=st.sampled_from(SCHEDULES), mtp=st.booleans())
@settings(max_examples=80)
def test_layers_are_cut_completely(layers, pipe, schedule, mtp):
    cfg = TINY.replace(num_hidden_layers=layers, first_k_dense_replace=min(3, layers))
    plan = Plan(pipe=pipe, schedule=schedule, batch=2 * pipe, length=8, mtp=mtp)
    if plan_problem(cfg, plan):
        return
    choices = stage_choices(cfg, plan)
    assert len(set(choices)) == len(choices) >= 1
    for choice in choices:
        stages = plan_stages(cfg, plan.replace(stages=choice))
        assert len(stages) == stage_count(schedule, pipe) and min(choice) >= 0
        assert sum(s.dense for s in stages) == cfg.num_dense_layers and sum(s.moe for s in stages) == cfg.num_moe_layers
        assert stages[0].embed and stages[-1].head and sum(s.head for s in stages) == sum(s.embed for s in stages) == 1
        assert sum(s.mtp for s in stages) == stages[-1].mtp == (cfg.num_mtp_layers if mtp else 0)
        held = [sum(choice[s] for s in group) for group in rank_stages(schedule, pipe)]
        assert max(held) <= -(-layers // len({tuple(sorted(g)) for g in rank_stages(schedule, pipe)})) + 2


def test_search_finds_the_published_layout_among_the_fastest():
    found = search_plans(V3, specs(V3), PAPER, H800, devices=2048, micro_batches=(1,))
    assert len(found.fitting) + len(found.too_large) + len(found.refused) <= len(list(mesh_sizes(2048))) * len(SCHEDULES)
    best = found.fitting[0]
    (paper,) = [c for c in found.fitting if (c.plan.pipe, c.plan.expert, c.plan.schedule) == (16, 64, "dualpipe")]
    # DualPipeV on half of the ranks is the same pipeline, folded.
    assert best.plan.schedule in ("dualpipe", "dualpipe_v") and paper.prediction.step == best.prediction.step
    steps = [c.prediction.step for c in found.fitting]
    assert steps == sorted(steps)
    for c in found.fitting:
        assert c.memory <= H800.usable_memory and plan_problem(V3, c.plan) is None
        assert predict_step(V3, specs(V3), c.plan, H800).step == c.prediction.step
    assert found.too_large[0].memory > H800.usable_memory
    assert all(c.prediction is None for c in found.too_large)
    assert any("256 experts are not divisible by expert:512" == r.reason for r in found.refused)
    text = report.search_report(found, H800, 14.8e12, top=3)
    lines = text.splitlines()
    assert lines[0].startswith(f"{len(found.fitting)} plans fit an H800, {len(found.too_large)} do not")
    assert sum("cannot run: " in line for line in lines) == 4 and "other reasons" in lines[-1]


def test_search_of_a_model_that_fits_nowhere_and_one_that_fits_anywhere():
    none = search_plans(V3, specs(V3), PAPER.replace(batch=64), H800, devices=8)
    assert not none.fitting and none.too_large
    assert "no plan fits" in report.search_report(none, H800, 1e12)
    tiny = search_plans(TINY, specs(TINY), Plan(batch=16, length=16), H800, devices=4, micro_batches=(1, 2))
    assert not tiny.too_large and len(tiny.fitting) >= 8
    alone = [c for c in tiny.fitting if c.plan.pipe == 1]
    assert {c.plan.schedule for c in alone} == {"one_f_one_b"}
    with pytest.raises(ValueError, match="search_plans: `devices` is 0, want > 0"):
        search_plans(TINY, specs(TINY), PAPER, H800, devices=0)


@given(st.integers(1, 500))
@settings(max_examples=20)
def test_meshes_are_complete(devices):
    sizes = list(mesh_sizes(devices))
    assert all(s["pipe"] * s["expert"] * s["data"] == devices for s in sizes)
    brute = sum(devices % (a * b) == 0 for a in divisors(devices) for b in divisors(devices))
    assert len({tuple(s.values()) for s in sizes}) == len(sizes) == brute
