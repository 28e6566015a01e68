"""The loop with a worker, a step and a score that take no time: what is called when, with what, and what is written."""

import json

import numpy as np
import pytest

from dsv3.rl import plots
from dsv3.rl.explore import Task
from dsv3.rl.loop import GrpoActions, GrpoCursor, GrpoState, Policy, grpo_loop
from dsv3.rl.plots import plot_grpo
from dsv3.rl.report import progress_line
from dsv3.rl.reward import make_reward
from dsv3.rl.rollout import Prompt
from dsv3.rl.settings import GrpoSettings
from dsv3.train.plots import new_figure
from dsv3.train.records import RunLog, read_rows, row_scalars
from tests.rl.fakes import FakeScore, FakeStep, FakeWorker, fake_state

TASKS = [Task([1, 2, 3], f"problem {i}", i) for i in range(20)]
TIMES = ("seconds", "rollout_seconds")


by_sum = make_reward({"sum": (lambda prompt, answer, reference: float(answer), 1.0)})


def run(
    explorations=3, *, step=None, reward=by_sum, score=None, worker=None, state=None, cursor=GrpoCursor(), heldout=(),
    **fields,
):  # fmt: skip
    actions = {name: fields.pop(name) for name in list(fields) if name in GrpoActions._fields}
    rows = []
    settings = GrpoSettings(**{"explorations": explorations, "prompts": 4, "group_size": 3, "max_new_tokens": 4} | fields)
    result = grpo_loop(
        step or FakeStep(), score or FakeScore(), state or GrpoState(fake_state()), worker or FakeWorker(), TASKS,
        reward, settings=settings, cursor=cursor, heldout=heldout, actions=GrpoActions(write=rows.append, **actions),
    )  # fmt: skip
    return result, rows


def plain(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_what_is_called_when():
    calls, worker = [], FakeWorker()
    result, rows = run(
        5, worker=worker, heldout=TASKS[:2], eval_every=2, sample_every=3, save_every=2,
        progress=lambda row: calls.append(("progress", row["step"])),
        save=lambda state, step, cursor: calls.append(("save", step, cursor)),
    )  # fmt: skip
    assert result.cursor == GrpoCursor(5, 20) and result.stopped is None
    kinds = [(row["kind"], row["step"]) for row in rows]
    assert kinds == [
        ("heldout", 0), ("grpo", 1), ("samples", 1), ("grpo", 2), ("heldout", 2), ("grpo", 3), ("samples", 3), ("grpo", 4),
        ("heldout", 4), ("grpo", 5), ("samples", 5), ("heldout", 5),
    ]  # fmt: skip
    saves = [("save", step, GrpoCursor(step, 4 * step)) for step in (2, 4, 5)]
    assert calls == [("progress", 1), ("progress", 2), saves[0], ("progress", 3), ("progress", 4), saves[1],
                     ("progress", 5), saves[2]]  # fmt: skip
    # The worker has the policy of before each exploration, and at last that of the end.
    assert len(worker.given) == 6 and worker.given[0] == 1.0 and worker.given == sorted(worker.given)
    assert worker.given[-1] == float(result.state.train.params["w"])
    assert [how["step"] for _, how in worker.asked if how["group_size"] == 3] == [0, 1, 2, 3, 4]


def test_a_divergence_that_was_not_measured_is_nowhere():
    step = FakeStep(reference=False)
    _, (row, *_) = run(1, step=step)
    _, (other, *_) = run(1)
    assert set(other) - set(row) == {"kl", "penalty"}
    assert progress_line(other, 1).replace("kl 1.0000  ", "", 1) == progress_line(row, 1)
    drawn = []
    for rows in ([row], [other]):
        _, axes = new_figure((6, 4), 3)
        plots._draw_policy(axes, rows, [])
        drawn.append([line.get_label() for line in axes[0].get_lines()])
    assert drawn[1] == ["from the reference", *drawn[0]] and len(drawn[0]) == 2


def test_a_run_that_goes_on_gives_what_it_would_have_given():
    how = {"minibatches": 2, "skip_saturated": True, "heldout": TASKS[:2], "eval_every": 2}
    whole, rows = run(6, **how)
    saved = {}
    asked = iter([None, None, None, "now"])  # after each exploration, and after the evaluation at the second
    part, first = run(
        6, **how, stop=lambda: next(asked),
        save=lambda state, step, cursor: saved.update({step: (float(state.train.params["w"]), cursor)}),
    )  # fmt: skip
    assert part.stopped == "now" and part.cursor.step == 3 and list(saved) == [3]
    value, cursor = saved[3]
    cursor = GrpoCursor(**json.loads(json.dumps(cursor._asdict())))
    step = FakeStep()
    step.batches += [None] * 6  # so that its numbers go on, too
    rest, second = run(6, **how, step=step, cursor=cursor, state=GrpoState(fake_state(value=value)))
    assert plain(first + second) == plain(rows)
    assert float(rest.state.train.params["w"]) == float(whole.state.train.params["w"]) and rest.cursor == whole.cursor


def test_a_run_that_is_stopped_before_an_evaluation_saves_at_once_and_makes_up_for_it():
    how = {"heldout": TASKS[:2], "eval_every": 2}
    _, rows = run(4, **how)
    asked, saved = iter([None, "now"]), []
    _, first = run(4, **how, stop=lambda: next(asked), save=lambda *args: saved.append(args))
    ((state, done, cursor),) = saved
    assert done == 2 and cursor.unmeasured and [row["kind"] for row in first][-1] == "samples"
    step = FakeStep()
    step.batches += [None] * 2
    rest, second = run(4, **how, step=step, cursor=cursor, state=state)
    assert plain(first + second) == plain(rows) and rest.cursor == GrpoCursor(4, 16)


def test_mini_batches_hold_every_sample_once_an_epoch_and_fill_up_with_rows_that_count_nowhere():
    step, worker = FakeStep(), FakeWorker()
    run(1, step=step, worker=worker, minibatches=5, epochs=2, rows=2)
    epochs = []
    assert len(step.batches) == 10 and {batch.tokens.shape for batch in step.batches} == {(2, 2, 9)}
    for epoch in (step.batches[:5], step.batches[5:]):
        rows = np.concatenate([batch.tokens.reshape(-1, 9) for batch in epoch])
        counted = np.concatenate([batch.mask.reshape(-1, 8) for batch in epoch]).any(1)
        assert counted.sum() == 12 and (rows[~counted] == 0).all()
        epochs.append(rows[counted].tolist())
    numbers, how = worker.asked[0]
    drawn = worker.rollout([Prompt(TASKS[i].ids, i) for i in numbers], **how).tokens.tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(drawn) and epochs[0] != epochs[1]


def test_advantages_and_sampled_log_probabilities_stay_with_their_tokens():
    step = FakeStep()
    run(1, step=step, std="none", rows=12)
    (batch,) = step.batches
    tokens, mask = batch.tokens[0], batch.mask[0]
    rewards = (tokens[:, 1:] * mask).sum(1)
    # Groups are apart by their advantages' sum of zero: the mean reward of a row's group is its reward less its advantage.
    means = np.round(rewards - batch.advantages[0], 3)
    values, counts = np.unique(means, return_counts=True)
    assert (counts % 3 == 0).all() and len(values) <= 4
    for value in values:
        assert rewards[means == value].mean() == pytest.approx(value, abs=1e-2)
    np.testing.assert_array_equal(batch.old_logprobs[0], -mask)


@pytest.mark.parametrize("old", ["sampler", "recomputed"])
@pytest.mark.parametrize("replay", [True, False])
def test_old_policy_and_replay(old, replay):
    step, score = FakeStep(), FakeScore()
    state = GrpoState(fake_state(value=2.0))
    _, rows = run(2, step=step, score=score, state=state, old=old, replay=replay, measure_every=2)
    for number, (batch, row) in enumerate(zip(step.batches, [row for row in rows if row["kind"] == "grpo"])):
        at = batch.mask > 0
        if old == "sampler":
            assert (np.asarray(batch.old_logprobs)[at] == -1).all()
        else:
            (value,) = set(np.asarray(batch.old_logprobs)[at].tolist())
            assert value == -2.0 if number == 0 else value < -2.0
        assert isinstance(batch.experts, tuple) != replay
        measured = number == 0
        assert ("free_mismatch" in row) == measured and ("router_agreement" in row) == measured
        assert ("mismatch" in row) == (old == "recomputed" or (measured and replay))
    assert rows[0]["router_agreement"] == 0.0, "the fake chooses expert 1, and has sampled with 0"
    assert {replayed for _, replayed in score.calls} == ({True, False} if replay else {False})


def test_truncated_samples_count_or_do_not():
    for truncated in ("count", "mask"):
        step = FakeStep()
        _, rows = run(1, step=step, truncated=truncated, rows=12)
        long = step.batches[0].tokens[0, :, 1:].astype(bool).sum(1)
        masks = np.asarray(step.batches[0].mask[0]).sum(1)
        assert rows[0]["truncated"] > 0
        if truncated == "count":
            assert (masks > 0).all() and masks.max() == 4
        else:
            assert masks.max() == 3 and (masks == 0).sum() == round(12 * rows[0]["truncated"]) and len(long) == 12


def test_the_reference_is_kept_and_refreshed():
    step, score = FakeStep(), FakeScore()
    state = GrpoState(fake_state(), Policy({"w": np.float32(0.5)}, ()))
    result, _ = run(4, step=step, score=score, state=state, reference_every=2, measure_every=0, rows=12)
    refs = [float(np.asarray(batch.ref_logprobs).max()) for batch in step.batches]
    assert refs[:2] == [-0.5, -0.5] and refs[2] == refs[3] < -1.0, "the policy of the end of the second exploration"
    assert float(result.state.reference.params["w"]) == float(result.state.train.params["w"])
    assert len(score.calls) == 4 and all(replayed for _, replayed in score.calls)
    step = FakeStep()
    run(1, step=step)
    assert step.batches[0].ref_logprobs == ()


def test_steps_that_are_not_taken_are_told():
    result, rows = run(2, step=FakeStep(bad=(2,)), minibatches=2)
    (skipped,) = [row for row in rows if row["kind"] == "skipped"]
    assert skipped["step"] == 1 and "not finite" in skipped["reason"] and skipped["loss"] == 2.0
    first, second = (row for row in rows if row["kind"] == "grpo")
    assert (first["taken"], first["skipped"], second["taken"], second["skipped"]) == (1, 1, 2, 0)
    assert first["loss"] == 1.0 and second["loss"] == 3.5 and second["ratio_max"] == 4.0
    _, rows = run(1, step=FakeStep(bad=(1,)))
    assert "loss" not in rows[1] and "no step was taken" in progress_line(rows[1], 1)


def test_no_step_is_taken_where_nothing_can_be_learnt():
    last = make_reward({"last": (lambda prompt, answer, reference: float(answer) * (reference > 9), 1.0)})
    for idle in (True, False):
        step = FakeStep(idle=idle)
        _, rows = run(2, step=step, reward=last, minibatches=12, rows=1, measure_every=0)
        rows = [row for row in rows if row["kind"] == "grpo"]
        empty = 24 - sum(bool(np.asarray(batch.advantages).any()) for batch in step.batches)
        assert (sum(row["idle"] for row in rows), len(step.batches)) == ((empty, 24 - empty) if idle else (0, 24))
        assert 0 < empty < 24
    _, rows = run(1, step=FakeStep(idle=True), reward=make_reward({"none": (lambda *_: 0.0, 1.0)}), minibatches=2)
    assert (rows[0]["idle"], rows[0]["taken"], "loss" in rows[0]) == (2, 0, False)


def test_rows_transcripts_log_and_plots(tmp_path):
    _, rows = run(3, heldout=TASKS[:2], eval_every=1, samples=2)
    row, samples = rows[1], rows[2]["samples"]
    assert row["length_max"] <= 4 and row["acceptance"] == 0.5 and row["spread"] > 0 and row["mtp"] == [0.5]
    assert row["mismatch"]["max"] == 0.0 and row["drawn"] == 4 and row["learning_rate"] == pytest.approx(0.1)
    assert 2 <= len(samples) <= 4 and samples[0]["prompt"].startswith("problem ")
    for sample in samples:
        assert sample["reward"] == float(sample["answer"]) and sample["finish"] in ("length", "stop_token")
    assert progress_line(row, 3).startswith(f"exploration 1/3  reward {row['reward']:.4f}")
    with RunLog(tmp_path) as log:
        for each in rows:
            log.write(each)
    with RunLog(tmp_path, step=2):
        pass
    kept = read_rows(tmp_path / "log.jsonl")
    assert [(r["kind"], r["step"]) for r in kept] == [(r["kind"], r["step"]) for r in rows if r["step"] <= 2]
    assert not row_scalars(rows[2]) and "grpo/reward" in row_scalars(row) and "grpo/mismatch/kl" in row_scalars(row)
    paths = plot_grpo(kept, tmp_path / "plots")
    assert {path.stem for path in paths} == {"reward", "policy", "samples", "sampling"}
    assert all(path.stat().st_size > 10_000 for path in paths)
    with pytest.raises(ValueError, match="plot_grpo: `rows` has no exploration"):
        plot_grpo([], tmp_path)


def test_wrong_arguments_are_named():
    for fields, message in [
        ({"save_every": -1}, "`save_every` is -1, want at least 0"),
        ({"cursor": GrpoCursor(4, 0)}, "the run has done 4 explorations, want at most explorations=3"),
        ({"prompts": 21}, "20 problems are fewer than an exploration's, which are 21"),
    ]:
        with pytest.raises(ValueError, match=f"grpo_loop: {message}"):
            run(**fields)
