"""Schedules against the paper's text in float64: every border, the ramps, both forms, scaled plans, and what cannot be."""

import dataclasses
import math
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.train.schedule import (
    CURVES,
    Piece,
    Stage,
    TrainSchedule,
    curve_at,
    curve_schedule,
    schedule_at,
)
from dsv3.train.schedule_paper import PAPER_SCHEDULE, PAPER_START, scale_schedule, stage_config
from dsv3.train.schedule_steps import schedule_runs, schedule_steps, step_from, tokens_at_step
from tests.compare import PLAIN
from tests.small import model_config, random_params, random_router, random_tokens

ROOT = pathlib.Path(__file__).resolve().parents[2]
BORDERS = {
    "warm-up": None, "ramp": 469e9, "λ and decay": 10e12, "γ": 14.3e12, "last rate": 14.633e12, "32K": 14.8e12,
    "128K": 14.8e12 + 1000 * 1920 * 32768, "the end": 14.8e12 + 2 * 1000 * 1920 * 32768,
}  # fmt: skip


# DeepSeek-V3 sections 4.2 and 4.3, sentence by sentence; nothing here comes from the package.


def ramp(tokens):
    """"gradually increased from 3072 to 15360 in the training of the first 469B tokens, and then keeps 15360"."""
    exact = 3072 + 12288 * min(tokens, 469 * 10**9) / (469 * 10**9)
    return 96 * math.floor(exact / 96 + 0.5)


def warmup_tokens():
    """"during the first 2K steps"."""
    tokens = 0
    for _ in range(2000):
        tokens += ramp(tokens) * 4096
    return tokens


WARMUP = warmup_tokens()
BORDERS["warm-up"] = WARMUP


def paper(tokens):
    """The plan at a token: learning rate, sequences, their length, γ, λ, α, YaRN's factor."""
    if tokens < WARMUP:  # "we first linearly increase it from 0 to 2.2 × 10⁻⁴"
        rate = 2.2e-4 * tokens / WARMUP
    elif tokens < 10e12:  # "a constant learning rate of 2.2 × 10⁻⁴ until the model consumes 10T training tokens"
        rate = 2.2e-4
    elif tokens < 14.3e12:  # "decay the learning rate to 2.2 × 10⁻⁵ in 4.3T tokens, following a cosine decay curve"
        rate = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + np.cos(np.pi * (tokens - 10e12) / 4.3e12)) / 2
    else:  # "2.2 × 10⁻⁵ in the first 333B tokens, and [...] 7.3 × 10⁻⁶ in the remaining 167B tokens"; 4.3: "7.3 × 10⁻⁶"
        rate = 2.2e-5 if tokens < 14.3e12 + 333e9 else 7.3e-6
    bias = 0.001 if tokens < 14.3e12 else 0.0  # "0.001 for the first 14.3T tokens, and to 0.0 for the remaining 500B"
    mtp = 0.3 if tokens < 10e12 else 0.1  # "0.3 for the first 10T tokens, and to 0.1 for the remaining 4.8T tokens"
    shape, yarn = (ramp(tokens), 4096), None
    if tokens >= 14.8e12:  # "1000 steps [...] s = 40 [...] the sequence length is set to 32K, and the batch size is 1920"
        shape, yarn = (1920, 32 * 1024), 40.0
    if tokens >= 14.8e12 + 1000 * 1920 * 32 * 1024:  # "increased to 128K, and the batch size is reduced to 480"
        shape = (480, 128 * 1024)
    return rate, *shape, bias, mtp, 1e-4, yarn


def near(tokens, digits=1e-14):
    """A learning rate by another formula in float64: some units of 2⁻⁵³."""
    got = schedule_at(PAPER_SCHEDULE, tokens)
    rate, *rest = paper(tokens)
    assert got.learning_rate == pytest.approx(rate, rel=digits, abs=1e-30), tokens
    assert list(got[2:]) == rest, tokens


@pytest.mark.parametrize("name", BORDERS)
def test_the_paper_at_its_borders(name):
    border = int(BORDERS[name])
    for tokens in (border - 10**7, border - 1, border, border + 1, border + 10**7):
        near(tokens)


@settings(max_examples=200)
@given(st.integers(0, 15 * 10**12))
def test_the_paper_everywhere(tokens):
    near(tokens)


def test_the_paper_begins_and_ends():
    assert schedule_at(PAPER_SCHEDULE, 0) == (0, 0.0, 3072, 4096, 1e-3, 0.3, 1e-4, None) == PAPER_START
    assert PAPER_SCHEDULE.total_tokens == 14_925_829_120_000
    last = schedule_at(PAPER_SCHEDULE, PAPER_SCHEDULE.total_tokens - 1)
    assert schedule_at(PAPER_SCHEDULE, 10**15) == last and last.stage == 2
    assert [schedule_at(PAPER_SCHEDULE, int(BORDERS[name])).stage for name in ("γ", "32K", "128K")] == [0, 1, 2]


def test_the_learning_rate_is_continuous_where_the_paper_has_it():
    borders = [piece.until for piece in PAPER_SCHEDULE.learning_rate[:-1]]
    sides = [[schedule_at(PAPER_SCHEDULE, t).learning_rate for t in (b - 1, b)] for b in borders]
    jumps = [abs(before - after) for before, after in sides]
    assert max(jumps[:3]) < 1e-14  # one token of the warm-up is 8e-15, of the cosine much less
    assert sides[3] == [2.2e-5, 7.3e-6]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 14_800 * 10**9 - 1), min_size=2, max_size=8))
def test_ramps_are_monotone(tokens):
    values = [schedule_at(PAPER_SCHEDULE, t) for t in sorted(tokens)]
    sizes, bias, mtp = ([v[i] for v in values] for i in (2, 4, 5))
    assert sizes == sorted(sizes) and all(size % 96 == 0 for size in sizes)
    assert bias == sorted(bias)[::-1] and mtp == sorted(mtp)[::-1]
    rates = [(t, v.learning_rate) for t, v in zip(sorted(tokens), values)]
    up, down = ([r for t, r in rates if (t < WARMUP) == side] for side in (True, False))
    assert up == sorted(up) and all(a >= b * (1 - 1e-15) for a, b in zip(down, down[1:]))


# Steps


def test_steps_of_the_paper():
    tokens, counts = 0, {}
    while tokens < 14.8e12:
        counts["ramp" if tokens < 469e9 else "full"] = counts.get("ramp" if tokens < 469e9 else "full", 0) + 1
        tokens += ramp(tokens) * 4096
    # 14.8T is no whole number of steps: the last one goes on for 15.6M tokens, a quarter of a step.
    assert (tokens, sum(counts.values()), counts["ramp"]) == (14_800_015_589_376, 242_784, 14_999)
    first, *context = schedule_steps(PAPER_SCHEDULE)
    assert (first.first, first.steps, first.start, first.tokens) == (0, 242_784, 0, tokens)
    assert first.batch_sizes == tuple(range(3072, 15_361, 96))
    # Each context stage reads as many tokens a step as pretraining ends with, so that it has its 1000 steps all the same.
    assert [(stage.steps, stage.tokens) for stage in context] == [(1000, 62_914_560_000)] * 2
    assert [stage.batch_sizes for stage in context] == [(1920,), (480,)]
    assert tokens_at_step(PAPER_SCHEDULE, 2000) == WARMUP == PAPER_SCHEDULE.learning_rate[0].until
    assert step_from(PAPER_SCHEDULE, 10**13) == (166_490, 10_000_012_148_736)


def test_warmup_in_tokens_beside_steps():
    """Linear in tokens the learning rate stays below what linear in steps gives, as the batch grows; both end alike."""
    steps = range(0, 2001, 50)
    rates = [schedule_at(PAPER_SCHEDULE, tokens_at_step(PAPER_SCHEDULE, step)).learning_rate for step in steps]
    below = np.array(steps) / 2000 - np.array(rates) / 2.2e-4
    assert below.min() >= 0 and below[0] == below[-1] == 0
    assert below.max() == pytest.approx(0.0269, abs=1e-4)


SMALL = st.builds(
    dict, tokens=st.integers(3000, 150_000), batch_size=st.integers(32, 90), seq_len=st.sampled_from([1, 2, 5]),
    batch_multiple=st.sampled_from([1, 2]), context_steps=st.integers(1, 9), warmup_steps=st.integers(1, 3),
)  # fmt: skip


def made(arguments):
    """A scaled plan, or `None` where its pieces are too short."""
    try:
        return scale_schedule(PAPER_SCHEDULE, **arguments)
    except ValueError as error:
        assert re.search("no step|shorter than|of warm-up end|`batch_size` is", str(error)), error
        return None


@settings(max_examples=25)
@given(SMALL)
def test_steps_one_by_one(arguments):
    schedule = made(arguments)
    if schedule is None:
        return
    starts, tokens = [], 0
    while tokens < schedule.total_tokens:
        now = schedule_at(schedule, tokens)
        starts.append((now.stage, tokens, now.batch_size, now.seq_len))
        tokens += now.batch_size * now.seq_len
    runs = list(schedule_runs(schedule))
    listed = [
        (run.stage, run.tokens + i * run.step_tokens, run.batch_size, run.seq_len) for run in runs for i in range(run.steps)
    ]
    assert listed == starts
    assert [run.step for run in runs] == list(np.cumsum([0, *(run.steps for run in runs)])[:-1])
    stages = schedule_steps(schedule)
    assert [stage.steps for stage in stages] == [sum(s[0] == i for s in starts) for i in range(3)]
    assert [stage.steps for stage in stages[1:]] == [arguments["context_steps"]] * 2
    assert sum(stage.tokens for stage in stages) == tokens
    begins = [t for _, t, _, _ in starts] + [tokens]
    assert [tokens_at_step(schedule, step) for step in range(0, len(begins), 7)] == begins[::7]
    for probe in range(0, tokens, 1 + tokens // 20):
        step = int(np.searchsorted(begins, probe))
        assert step_from(schedule, probe) == (step, begins[step])
    assert schedule.learning_rate[0].until == begins[arguments["warmup_steps"]]


# The tensor form

VALUES = st.floats(0, 10, width=32)


@st.composite
def curves(draw):
    begin, pieces = 0, []
    for _ in range(draw(st.integers(1, 5))):
        begin += draw(st.integers(1, 3 * 10**12) | st.integers(1, 3))
        start, shape = draw(VALUES), draw(st.sampled_from(["constant", "linear", "cosine"]))
        pieces.append(Piece(begin, start, start if shape == "constant" else draw(VALUES), shape))
    return tuple(pieces)


@settings(max_examples=60)
@given(curves(), st.lists(st.integers(0, 2**44), max_size=5))
def test_tensors_are_the_python_form(curve, tokens):
    tokens += [0, *(piece.until + d for piece in curve for d in (-1, 0, 1))]
    got = curve_schedule(curve)(tf.constant(tokens, tf.int64))
    want = np.array([curve_at(curve, t) for t in tokens])
    assert got.dtype == tf.float32
    # One rounding to float32; a cosine in float64 may differ in its last place, relative to the larger end.
    np.testing.assert_allclose(got, want, rtol=2**-24, atol=1e-14)


def test_tensors_of_the_paper():
    tokens = [int(border) + d for border in BORDERS.values() for d in (-1, 0, 1)] + list(range(0, 15 * 10**12, 10**11))
    for name in CURVES:
        curve = getattr(PAPER_SCHEDULE, name)
        want = np.array([curve_at(curve, t) for t in tokens])
        for jit in (False, True):
            got = tf.function(curve_schedule(curve), jit_compile=jit)(tf.constant(tokens, tf.int64))
            np.testing.assert_allclose(got, want, rtol=2**-23, atol=0, err_msg=f"{name}, jit={jit}")
    # As float32 the tokens before a border are already on its other side.
    gamma = curve_schedule(PAPER_SCHEDULE.bias_rate)
    sides = [float(gamma(tf.constant(14_300 * 10**9 - 1, dtype))) for dtype in (tf.int64, tf.float64, tf.float32)]
    assert sides == pytest.approx([1e-3, 1e-3, 0.0])


def test_a_step_is_exact_at_a_border():
    """A step that begins one token before 14.3T moves the biases, the next does not: nothing rounds the tokens."""
    cfg = model_config(num_hidden_layers=2, num_nextn_predict_layers=0)
    optimizer = dsv3.adamw(curve_schedule(PAPER_SCHEDULE.learning_rate), fuse=False)
    state = dsv3.train_state(random_params(dsv3.model_specs(cfg)), random_router(cfg), optimizer)
    rates = {name: curve_schedule(getattr(PAPER_SCHEDULE, name)) for name in ("mtp_weight", "balance_weight", "bias_rate")}
    moved, rate = [], []
    for tokens in (14_300 * 10**9 - 1, 14_300 * 10**9, 14_633 * 10**9 - 1, 14_633 * 10**9):
        before, batch = state._replace(tokens=tf.constant(tokens, tf.int64)), random_tokens(cfg, 1, 5)
        after, metrics = dsv3.train_update(before, batch, cfg=cfg, optimizer=optimizer, policy=PLAIN, **rates)
        moved.append(bool(np.any(after.router.moe != before.router.moe)))
        rate.append(float(metrics.optim.learning_rate))
    assert moved == [True, False, False, False]
    np.testing.assert_allclose(rate, [2.2e-5, 2.2e-5, 2.2e-5, 7.3e-6], rtol=1e-7)


def test_a_mesh_reads_the_same(monkeypatch):
    """On a mesh the scalars are read outside of the compiled pieces, here by a step that only returns them."""
    monkeypatch.setattr("dsv3.train.step.make_mesh_update", lambda *_: fake)
    fake = lambda state, tokens, weights, segments, rates, limits: rates  # noqa: E731
    fake.traces = lambda: 0
    rates = {name: curve_schedule(getattr(PAPER_SCHEDULE, name)) for name in ("mtp_weight", "balance_weight", "bias_rate")}
    step = dsv3.make_train_step(model_config(), dsv3.adamw(0.1), object(), **rates)
    for tokens, want in ((10**13 - 1, (0.3, 1e-4, 1e-3)), (10**13, (0.1, 1e-4, 1e-3)), (14_300 * 10**9, (0.1, 1e-4, 0.0))):
        state = dsv3.TrainState(tf.constant(0), tf.constant(tokens, tf.int64), (), (), ())
        assert step(state, [[1, 2, 3]]) == pytest.approx(want, rel=1e-7)


# Scaled plans


@settings(max_examples=60)
@given(st.sampled_from([1, 2, 8, 64]), st.integers(0, 15 * 10**12), st.integers(1, 3), st.integers(1, 3))
def test_scaling_commutes(divisor, tokens, sizes, lengths):
    """Exactly, where borders stay whole; every size is a multiple of the paper's, so that rounding is the same."""
    assert not any(piece.until % divisor for name in CURVES for piece in getattr(PAPER_SCHEDULE, name))
    scaled = scale_schedule(
        PAPER_SCHEDULE, tokens=14_800 * 10**9 // divisor, batch_size=15_360 * sizes, seq_len=4096 * lengths,
        learning_rate=2.2e-3, batch_multiple=96 * sizes,
    )  # fmt: skip
    got, want = schedule_at(scaled, tokens // divisor), schedule_at(PAPER_SCHEDULE, tokens // divisor * divisor)
    assert got.learning_rate == pytest.approx(10 * want.learning_rate, rel=1e-14)
    assert got._replace(learning_rate=0) == want._replace(
        learning_rate=0, batch_size=sizes * want.batch_size, seq_len=lengths * want.seq_len
    )


@settings(max_examples=60)
@given(st.floats(1e-5, 2), st.integers(0, 15 * 10**12))
def test_scaling_commutes_up_to_a_token(ratio, tokens):
    scaled = scale_schedule(PAPER_SCHEDULE, tokens=int(14.8e12 * ratio), batch_size=32, seq_len=256)
    got, want = schedule_at(scaled, round(tokens * scaled.stages[0].until / 14.8e12)), schedule_at(PAPER_SCHEDULE, tokens)
    if min(abs(tokens - border) for border in BORDERS.values()) > 2 / ratio:
        # A token and two halves at the borders, of the shortest piece's: the warm-up.
        assert got.learning_rate == pytest.approx(want.learning_rate, rel=1e-12, abs=2 * 2.2e-4 / (WARMUP * ratio))
        assert got[4:] == want[4:] and got.stage == want.stage and got.seq_len * 16 == want.seq_len
        assert abs(got.batch_size - want.batch_size / 480) <= 0.5 + 96 / 480


def test_a_demo_sized_plan():
    plan = scale_schedule(PAPER_SCHEDULE, tokens=2_000_000, batch_size=32, seq_len=128, learning_rate=3e-3, context_steps=8)
    pretraining, *context = schedule_steps(plan)
    assert pretraining.tokens >= 2_000_000 and pretraining.batch_sizes[0] == 6 and pretraining.batch_sizes[-1] == 32
    assert [(s.steps, s.seq_len, s.batch_sizes) for s in context] == [(8, 1024, (4,)), (8, 4096, (1,))]
    assert [round(p.end, 12) for p in plan.learning_rate] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-3 * 7.3e-6 / 2.2e-4])
    assert plan.bias_rate[0].until == pytest.approx(2e6 * 14.3 / 14.8, abs=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": 0}, "`tokens` is 0, want above 0"),
        ({"tokens": 1.5e6 + 0.5}, "`tokens` is 1500000.5, want a whole number"),
        ({"seq_len": 0}, "`seq_len` is 0, want above 0"),
        ({"learning_rate": math.nan}, "`learning_rate` is nan, want above 0"),
        ({"context_steps": 0}, "`context_steps` is 0, want at least 1"),
        ({"warmup_steps": -1}, "`warmup_steps` is -1, want at least 0"),
        ({"batch_size": 15}, "`batch_size` is 15, which makes 0.46875 sequences of the smallest batch.*; want at least 16"),
        ({"batch_multiple": 0}, "`batch_multiple` is 0, want at least 1"),
        ({"batch_multiple": 8}, "`batch_size` is 32, .* nearer to none than to batch_multiple=8; want at least 128"),
        ({"tokens": 10}, "piece 1 of `learning_rate` becomes shorter than a token"),
        ({"tokens": 30_000, "context_steps": 2}, "no step begins in piece 4 of `learning_rate`, from .*: step .* begins at"),
        ({"tokens": 500_000}, "stage 'context 32x' has no step: the step before it ends at .* tokens, it at"),
        ({"warmup_steps": 400}, "400 steps of warm-up end at .* tokens, want less than"),
        ({"warmup_steps": 4000}, "`step` is 4000, want at most"),
    ],
)
def test_what_cannot_be_scaled_is_refused(change, message):
    good = {"tokens": 2_000_000, "batch_size": 32, "seq_len": 128, "learning_rate": 3e-3}
    scale_schedule(PAPER_SCHEDULE, **good, context_steps=2)
    with pytest.raises(ValueError, match=message) as error:
        scale_schedule(PAPER_SCHEDULE, **good | change)
    assert "\n" not in str(error.value)


def test_schedules_that_are_none_are_refused():
    def plan(**fields):
        return dataclasses.replace(PAPER_SCHEDULE, **fields)

    one = Piece(10, 1.0, 1.0)
    for fields, message in [
        ({"stages": ()}, "`stages` is empty"),
        ({"stages": (Stage("a", 10, 4), Stage("b", 10, 8))}, "stage 'b' ends at 10 tokens, want a whole number above 10"),
        ({"stages": (Stage("a", 10, 0),)}, "stage 'a' has sequences of 0 tokens"),
        ({"stages": (Stage("a", 10, 4, yarn_factor=0.5),)}, "stage 'a': `yarn_factor` is 0.5"),
        ({"bias_rate": ()}, "`bias_rate` has no piece"),
        ({"bias_rate": (one, one)}, "piece 2 of `bias_rate` ends at 10 tokens, want a whole number above 10"),
        ({"mtp_weight": (Piece(10, 1.0, math.inf, "linear"),)}, "from 1.0 to inf, want finite values from 0"),
        ({"mtp_weight": (Piece(10, 1.0, 2.0),)}, "is constant but goes from 1.0 to 2.0, want one value"),
        ({"mtp_weight": (Piece(10, 1.0, 2.0, "square"),)}, "`mtp_weight.shape` is 'square', want one of"),
        ({"batch_size": (Piece(10, 1.0, 2.0, "cosine"),)}, "`batch_size` has a cosine piece"),
        ({"batch_size": (Piece(9, 90.0, 47.0, "linear"),)}, "`batch_size` is 47 sequences at its least.*want at least 48"),
        ({"batch_multiple": 0}, "`batch_multiple` is 0, want at least 1"),
    ]:
        with pytest.raises(ValueError, match=f"^TrainSchedule: .*{message}"):
            plan(**fields)
    for bad in (-1, 0.5, math.nan):
        with pytest.raises(ValueError, match="schedule_at: `tokens` is"):
            schedule_at(PAPER_SCHEDULE, bad)


# Architecture


def test_the_architecture_of_each_stage():
    pretrained, published = dsv3.preset("deepseek-v3-pretrain"), dsv3.preset("deepseek-v3")
    for cfg in (pretrained, published):
        assert [stage_config(cfg, PAPER_SCHEDULE, i) for i in range(3)] == [pretrained, published, published]
    plan = scale_schedule(PAPER_SCHEDULE, tokens=2_000_000, batch_size=32, seq_len=128, context_steps=2)
    base = dsv3.preset("demo")
    found = [stage_config(base, plan, i) for i in range(3)]
    assert [cfg.max_length for cfg in found] == [128, 5120, 5120]
    assert found[0].mla.rope.active_yarn is None and found[0].mla.softmax_scale == base.mla.softmax_scale
    yarn = found[2].mla.rope.active_yarn
    assert (yarn.factor, yarn.original_length, yarn.beta_fast, yarn.beta_slow, yarn.mscale_all_dim) == (40, 128, 32, 1, 1)
    assert dsv3.count_params(dsv3.model_specs(found[2])) == dsv3.count_params(dsv3.model_specs(base))


def test_a_model_that_comes_trained():
    """A schedule of extension only: the original length is that of the model, or what its own YaRN says."""
    plan = dataclasses.replace(PAPER_SCHEDULE, stages=(Stage("longer", 100, 500, yarn_factor=4.0),))
    assert stage_config(dsv3.preset("tiny"), plan, 0).mla.rope.yarn.original_length == 128
    assert stage_config(dsv3.preset("tiny"), plan, 0).max_length == 512
    assert stage_config(dsv3.preset("deepseek-v3"), plan, 0).mla.rope.yarn.original_length == 4096
    longer = dataclasses.replace(plan, stages=(Stage("longer", 100, 513, yarn_factor=4.0),))
    with pytest.raises(ValueError, match="stage 'longer' has sequences of 513 tokens, want at most 512: YaRN's factor 4"):
        stage_config(dsv3.preset("tiny"), longer, 0)
    with pytest.raises(ValueError, match="`stage` is 1, want 0 to 0"):
        stage_config(dsv3.preset("tiny"), plan, 1)


def test_the_plan_stands_once():
    """The paper's schedule data in one file of the package, whose defaults are read from there."""
    numbers = r"14\.8e12|14\.3e12|4\.3e12|469e9|469_?000|333e9|167e9|2\.2e-|7\.3e-0?6|15_?360\b|\b3072\b|\b1920\b"
    for path in (ROOT / "dsv3").rglob("*.py"):
        code = [line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line for line in code if re.search(rf"(?<![\w.])(?:{numbers})", line)]
        assert not found or path.name == "schedule_paper.py", (path, found)
    assert dsv3.make_train_step.__kwdefaults__["mtp_weight"] == 0.3
    assert TrainSchedule.__dataclass_fields__.keys() >= set(CURVES)


def test_the_smallest_batch_of_each_stage():
    rate = (Piece(100, 1e-3, 1e-3),)
    sizes = (Piece(40, 2, 6, "linear"), Piece(60, 6, 6), Piece(80, 3, 3))  # a ramp inside of a stage; none for the last one
    stages = (Stage("a", 50, 4), Stage("b", 70, 4), Stage("c", 100, 4))
    found = TrainSchedule(rate, sizes, rate, rate, rate, stages).least_sizes
    assert found == (2, 3, 3) and TrainSchedule(rate, sizes[1:], rate, rate, rate, stages[:1]).least_sizes == (6,)


def test_each_stage_may_have_its_own_multiple():
    given = {"tokens": 2_000_000, "batch_size": 32, "seq_len": 64, "learning_rate": 3e-3, "context_steps": 2}
    plan = scale_schedule(PAPER_SCHEDULE, **given, batch_multiple=[8, 1, 1])
    stages = schedule_steps(plan)
    assert stages[0].batch_sizes == (8, 16, 24, 32) and [s.batch_sizes for s in stages[1:]] == [(4,), (1,)]
    for stage, unit in zip(stages, (8, 1, 1)):
        assert schedule_at(plan, stage.start).batch_size % unit == 0
    alike = scale_schedule(PAPER_SCHEDULE, **given, batch_multiple=[1, 1, 1])
    assert schedule_steps(alike) == schedule_steps(scale_schedule(PAPER_SCHEDULE, **given))
    for multiple, message in [
        ([8, 1], "`batch_multiple` has 2 numbers, want one or one for each of 3 stages"),
        ([8, 0, 1], "`batch_multiple` is .*, want at least 1"),
        ([8, 16, 1], "`batch_size` is 4 sequences at its least, .* batch_multiple=16; want at least 8"),
        ([32, 1, 1], "`batch_size` is 6.4 sequences at its least, .* batch_multiple=32; want at least 16"),
    ]:
        with pytest.raises(ValueError, match=f"^TrainSchedule: {message}"):
            scale_schedule(PAPER_SCHEDULE, **given, batch_multiple=multiple)
