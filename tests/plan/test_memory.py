"""Memory: a count by hand, the published layout in 80 GB, and what must never need more."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3.pipeline import dualpipe, dualpipe_v, one_f_one_b, peak_activations, zb1p
from dsv3.plan import Plan, cache_bytes, plan_memory, plan_problem, rank_memory, serving_memory, stage_choices
from dsv3.plan.memory import block_activations, rank_params
from dsv3.plan.mesh import plan_stages
from dsv3.plan.schedule import SCHEDULES, chunks_in_flight, rank_stages, schedule_problem
from dsv3.plan.storage import row_bytes, weight_bytes
from tests.plan.models import H800, PAPER, TINY, V3, specs

GENERATORS = {"one_f_one_b": one_f_one_b, "zb1p": zb1p, "dualpipe": dualpipe, "dualpipe_v": dualpipe_v}


def test_a_count_by_hand():
    """The preset "tiny" on 4 devices. Its sizes: D 32, V 256, H 2, Q 16, L 16, P 8, R 4, U 8, E 8, K 2, F 16, dense 48."""
    plan = Plan(expert=2, data=2, batch=8, length=16, imbalance=1.0)
    # Without routed experts: embedding, head and final norm; a dense block; two mixtures and the module's; its projection
    # and three norms. Attention has 512 + 384 + 640 + 512 + 512 matrix entries, and norms of 16 + 16.
    attention, norms = 2560, 32 + 64
    shared = 2 * 8192 + 32 + (attention + norms + 3 * 32 * 48) + 3 * (attention + norms + 256 + 3 * 32 * 16) + 2048 + 96
    experts = 3 * (8 // 2) * 3 * 32 * 16
    assert rank_params(TINY, specs(TINY), plan, 0)[:2] == (shared, experts) == (39_168, 18_432)
    small = 32 + 4 * norms + 96 + 3 * 256  # norms and routers, float32 like the 3·8 biases
    got = rank_memory(TINY, specs(TINY), plan, 0)
    assert got.weights == 2 * (shared - small + experts) + 4 * small + 4 * 24
    assert got.gradients == 4 * (shared + experts)
    states = shared // 4 + experts // 2
    assert (got.master, got.moments) == (4 * states, 2 * 2 * states)
    # Per token: residuals, latents, attention's output (12 bits and a scale), log-sum-exp; then fp8 rows with a scale each.
    both = 4 * 32 + 2 * (16 + 20) + (24 + 4) + 8
    dense, mixture = both + 100, both + 2 * 36 + (2 * 36 + 36) + (32 + 16)
    assert sum(block_activations(TINY, plan, dense=True, recompute="paper").values()) == dense == 336
    assert sum(block_activations(TINY, plan, dense=False, recompute="paper").values()) == mixture == 464
    assert got.activations == 16 * (dense + 2 * mixture + 64 + mixture + 64)
    full = mixture + (2 * 36 + 20 + 20) + 2 * 2 * (12 + 12 + 8) + (2 * 20 + 20)
    assert got.working == 16 * (2 * full - mixture)
    assert got.dispatch == 16 * 2 * (36 + 64)
    assert got.loss == 16 * 256 * 8
    assert got.total == sum(got)


def test_the_published_layout_fits_80_gigabytes_on_every_rank():
    memory = plan_memory(V3, specs(V3), PAPER)
    assert [len(stages) for stages in rank_stages("dualpipe", 16)] == [2] * 16
    assert sum(stage.dense + stage.moe for stage in plan_stages(V3, PAPER)) == 61
    assert max(m.total for m in memory) < 80e9 < H800.memory
    assert max(m.total for m in memory) < H800.usable_memory
    # Every parameter is somewhere, DualPipe's twice; MTP and the model share embedding and head.
    held = [rank_params(V3, specs(V3), PAPER, rank) for rank in range(16)]
    assert sum(p.shared + 64 * p.experts for p in held) == 2 * (671_026_404_352 + 11_610_067_968)


def test_what_makes_the_published_layout_fit():
    """Without recomputation, ZeRO, expert parallelism or FP8 activations it would not."""

    def most(**fields):
        return max(m.total for m in plan_memory(V3, specs(V3), PAPER.replace(**fields)))

    assert most(recompute="none") > H800.memory
    assert most(expert=16, data=8) > H800.memory
    assert most(products_dtype="bfloat16", dispatch_dtype="bfloat16") > H800.memory
    assert most(zero=False) > H800.memory
    assert most(recompute="block") < most() / 1.5


@st.composite
def plans(draw):
    """Possible plans of the large model."""
    schedule = draw(st.sampled_from(SCHEDULES))
    pipe = draw(st.sampled_from([2, 4, 8, 16]))
    expert = draw(st.sampled_from([1, 2, 8, 32, 64, 256]))
    data = draw(st.sampled_from([1, 2, 4]))
    micro_batch = draw(st.sampled_from([1, 2]))
    batch = data * expert * micro_batch * draw(st.sampled_from([2, 6, 32, 40]))
    plan = Plan(
        pipe=pipe, expert=expert, data=data, schedule=schedule, batch=batch, micro_batch=micro_batch,
        length=draw(st.sampled_from([1, 513, 4096])), recompute=draw(st.sampled_from(["none", "paper", "block"])),
        weights_dtype=draw(st.sampled_from(["bfloat16", "fp8"])), mtp=draw(st.booleans()), zero=draw(st.booleans()),
        products_dtype=draw(st.sampled_from(["bfloat16", "fp8"])), imbalance=draw(st.sampled_from([1.0, 1.5])),
    )  # fmt: skip
    return plan if plan_problem(V3, plan) is None else plan.replace(schedule="one_f_one_b")


def totals(plan):
    return np.array([m.total for m in plan_memory(V3, specs(V3), plan)])


@given(plan=plans())
@settings(max_examples=40)
def test_what_never_needs_more(plan):
    now = totals(plan)
    assert np.all(now > 0)
    assert np.all(totals(plan.replace(zero=True)) <= totals(plan.replace(zero=False)))
    # Twice the replicas with twice the batch: each device computes the same, and keeps no more of the states.
    assert np.all(totals(plan.replace(data=2 * plan.data, batch=2 * plan.batch)) <= now)
    levels = [totals(plan.replace(recompute=how)) for how in ("block", "paper", "none")]
    assert np.all(levels[0] <= levels[1]) and np.all(levels[1] <= levels[2])
    assert np.all(totals(plan.replace(micro_batch=1, batch=plan.batch // plan.micro_batch)) <= now)
    assert np.all(totals(plan.replace(imbalance=1.0)) <= now)
    assert np.all(totals(plan.replace(moments_dtype="float32")) >= now)
    assert np.all(totals(plan.replace(weights_dtype="fp8")) <= totals(plan.replace(weights_dtype="bfloat16")))
    cut = plan.replace(stages=stage_choices(V3, plan)[0])
    assert np.all(totals(cut.replace(mtp=False)) <= totals(cut.replace(mtp=True)))


@given(schedule=st.sampled_from(SCHEDULES), pipe=st.integers(1, 9), micro_batches=st.integers(1, 24))
@settings(max_examples=60)
def test_chunks_in_flight_are_those_of_the_real_schedules(schedule, pipe, micro_batches):
    assume(schedule_problem(schedule, pipe, micro_batches) is None)
    real = peak_activations(GENERATORS[schedule](pipe, micro_batches))
    held = rank_stages(schedule, pipe)
    got = [sum(chunks_in_flight(schedule, pipe, s, micro_batches) for s in stages) for stages in held]
    # A rank's two stages need not be at their worst at the same time: the planner may count more, never less.
    assert np.all(np.array(got) >= real)
    assert np.all(np.array(got) <= real + (1 if len(held[0]) == 2 else 0))


def test_bytes_of_rows_and_weights():
    assert row_bytes(129, "fp8") == 129 + 8
    assert row_bytes(128, "e5m6") == 192 + 4
    assert row_bytes(7, "float32") == 28 and row_bytes(7, "bfloat16") == 14
    assert weight_bytes(256 * 256, "fp8") == 256 * 256 + 4 * 4
    with pytest.raises(ValueError, match="row_bytes: `dtype` is 'int8', want one of"):
        row_bytes(1, "int8")


def test_embedding_is_copied_where_the_last_stage_reads_it():
    plan = Plan(pipe=2, batch=8, length=16)
    first, last = (rank_params(TINY, specs(TINY), plan, rank).shared for rank in (0, 1))
    alone = rank_params(TINY, specs(TINY), Plan(batch=8, length=16), 0).shared
    assert first + last == alone + 256 * 32
    without = plan.replace(mtp=False)
    assert [x.name for x, _ in rank_params(TINY, specs(TINY), without, 1).leaves].count("embed") == 0


def test_serving():
    assert cache_bytes(V3) == 61 * 576 * 2 == 70_272
    assert cache_bytes(V3, mtp=True) == 62 * 1152
    held = serving_memory(V3, specs(V3), devices=32, sequences=64, length=4096, memory=H800.usable_memory)
    assert held.cache == 2 * 4096 * 70_272
    shared = 671_026_404_352 - 58 * 256 * 3 * 7168 * 2048
    assert held.weights > shared + 58 * 8 * 3 * 7168 * 2048  # a byte a value, and the head and embedding have two
    more = serving_memory(V3, specs(V3), devices=64, sequences=64, length=4096, memory=H800.usable_memory)
    assert more.weights < held.weights and more.fitting > 2 * held.fitting
    none = serving_memory(V3, specs(V3), devices=1, sequences=1, length=4096, memory=H800.usable_memory)
    assert none.fitting == 0
    with pytest.raises(ValueError, match="256 experts are not divisible by expert:24"):
        serving_memory(V3, specs(V3), devices=24, sequences=1, length=1, memory=1e9)


def test_wrong_plans_are_refused():
    with pytest.raises(ValueError, match="rank_memory: `rank` is 16, want 0 to 15"):
        rank_memory(V3, specs(V3), PAPER, 16)
    with pytest.raises(ValueError, match="check_plan: `plan` is impossible: 15361 sequences are not divisible"):
        rank_memory(V3, specs(V3), PAPER.replace(batch=15_361), 0)
