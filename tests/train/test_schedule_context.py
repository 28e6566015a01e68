"""Context stages behind a training or a trained model: lengths, batches, tokens, rates, and what cannot be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.train.schedule import Piece, Stage, TrainSchedule, schedule_at, warmup_cosine
from dsv3.train.schedule_context import CONTEXT_LR_SHARE, context_schedule
from dsv3.train.schedule_paper import PAPER_SCHEDULE, stage_config
from dsv3.train.schedule_steps import schedule_steps


def training(tokens=1000, batch=4, length=16):
    """One stage whose last step goes beyond its tokens."""
    constant = (Piece(tokens, 0.3, 0.3),)
    return TrainSchedule(
        learning_rate=warmup_cosine(1e-3, warmup_tokens=100, total_tokens=tokens, final=1e-4), bias_rate=constant,
        batch_size=(Piece(tokens, batch, batch),), mtp_weight=constant, balance_weight=constant,
        stages=(Stage("pretraining", tokens, length),),
    )  # fmt: skip


def test_the_papers_own_stages_come_out():
    found = context_schedule(seq_len=4096, batch_size=15_360, steps=1000, learning_rate=7.3e-6)
    begin = PAPER_SCHEDULE.stages[0].until
    for ours, paper in zip(found.stages, PAPER_SCHEDULE.stages[1:], strict=True):
        assert (ours.name, ours.seq_len, ours.yarn_factor) == (paper.name, paper.seq_len, paper.yarn_factor)
        assert ours.until == paper.until - begin
        values, wanted = schedule_at(found, ours.until - 1), schedule_at(PAPER_SCHEDULE, paper.until - 1)
        assert values._replace(stage=0) == wanted._replace(stage=0)
    assert CONTEXT_LR_SHARE == pytest.approx(7.3e-6 / 2.2e-4)
    model = stage_config(dsv3.preset("deepseek-v3-pretrain"), found, 1)
    assert model == dsv3.preset("deepseek-v3")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 300), st.integers(2, 2000))
def test_each_stage_has_its_steps_behind_a_training(batch, steps, length, tokens):
    before = training(tokens=tokens + 100, batch=batch, length=length)
    found = context_schedule(before, seq_len=length, batch_size=batch, steps=steps, learning_rate=1e-5)
    first, *context = schedule_steps(found)
    assert first == schedule_steps(before)[0]
    assert [stage.steps for stage in context] == [steps, steps]
    assert context[0].start == first.start + first.tokens
    for stage, factor in zip(context, (8, 32)):
        assert stage.seq_len == factor * length
        assert stage.batch_sizes == (max(1, round(batch / factor)),)
    for at in range(0, before.total_tokens, max(1, before.total_tokens // 7)):
        assert schedule_at(found, at) == schedule_at(before, at)
    late = schedule_at(found, context[0].start)
    assert (late.learning_rate, late.bias_rate, late.mtp_weight, late.balance_weight) == (1e-5, 0.0, 0.1, 1e-4)


def test_a_new_optimiser_warms_up_in_the_first_stage():
    found = context_schedule(seq_len=8, batch_size=16, steps=10, learning_rate=1.0, warmup_steps=4)
    a_step = 2 * 64
    rates = [schedule_at(found, step * a_step).learning_rate for step in range(10)]
    assert rates == [0.0, 0.25, 0.5, 0.75, *[1.0] * 6]
    assert schedule_at(found, 10 * a_step).learning_rate == 1.0 and schedule_at(found, 10 * a_step).stage == 1


def test_batches_are_whole_micro_batches():
    found = context_schedule(
        seq_len=8, batch_size=96, steps=2, learning_rate=1.0, factors=(2, 4), yarn_factor=4.0, batch_multiple=(10, 4)
    )  # fmt: skip
    assert [stage.batch_sizes for stage in schedule_steps(found)] == [(50,), (24,)]


GOOD = {"seq_len": 8, "batch_size": 4, "steps": 3, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": 0}, "`seq_len` is 0, want at least 1"),
        ({"batch_size": 0}, "`batch_size` is 0, want at least 1"),
        ({"steps": 0}, "`steps` is 0, want at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0, want above 0"),
        ({"warmup_steps": 3}, "`warmup_steps` is 3, want 0 to below `steps`=3"),
        ({"factors": (8, 4)}, "`factors` is \\(8, 4\\), want growing ones above 1"),
        ({"factors": ()}, "`factors` is \\(\\), want growing ones"),
        ({"yarn_factor": 16.0}, "`yarn_factor` is 16, want at least 32"),
        ({"batch_multiple": (1,)}, "`batch_multiple` has 1 numbers, want 2"),
        ({"batch_multiple": (1, 0)}, "`batch_multiple` is \\(1, 0\\), want at least 1 each"),
        ({"before": training(length=16)}, "`before` wants sequences of 8 tokens"),
        ({"before": PAPER_SCHEDULE, "seq_len": 131_072}, "`before` wants sequences of 131072 tokens at its end and no YaRN"),
        ({"before": training(length=8), "warmup_steps": 1}, "`warmup_steps` is 1, want 0 behind a training"),
    ],
)
def test_what_cannot_be_is_named(change, words):
    with pytest.raises(ValueError, match=f"^context_schedule: {words}"):
        context_schedule(**(GOOD | change))


def test_a_curve_that_is_cut_is_refused():
    long = training(tokens=2000)
    cut = TrainSchedule(**{**vars(training()), "learning_rate": long.learning_rate})
    with pytest.raises(ValueError, match="a curve of `before` goes on after its last stage"):
        context_schedule(cut, **(GOOD | {"seq_len": 16}))
