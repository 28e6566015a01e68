"""Spikes and losses that are no numbers: what is skipped, when a run goes back, what it remembers; with a toy step."""

import gc
import json
import statistics
import weakref

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.train.loop import Actions, Fed, train_loop
from dsv3.train.records import RunLog, read_rows
from dsv3.train.trouble import Cursor, Trouble, cursor_taken, spike_limits
from tests.train.test_loop import toy_state, toy_step

TROUBLE = Trouble(window=8, least=4, deviations=4.0, least_deviation=0.25, norm_factor=10.0, patience=3, rollbacks=2)


class Toy:
    """A run over a list of losses, with checkpoints in memory every `every` steps."""

    def __init__(self, losses, every=4):
        self.losses, self.every, self.saved, self.rows, self.fed, self.rewound = losses, every, [], [], [], []

    def feed(self, data, tokens):
        number = data or 0
        while True:
            self.fed.append((number, tokens))
            yield Fed(tf.constant(float(self.losses[number])), None, number + 1)
            number += 1

    def save(self, state, done, cursor):
        cursor = json.loads(json.dumps(cursor._asdict()))
        self.saved.append((done, cursor))

    def restore(self, step):
        saved = [(done, cursor) for done, cursor in self.saved if done % self.every == 0 and done <= step]
        if not saved:
            return None
        done, cursor = saved[-1]
        return toy_state(done), Cursor(**cursor)

    def run(self, steps, state=None, cursor=None, stop=lambda: None):
        actions = Actions(write=self.rows.append, save=self.save, save_every=self.every, restore=self.restore,
                          rewind=self.rewound.append, stop=stop)  # fmt: skip
        return train_loop(toy_step, state or toy_state(), self.feed, steps=steps, cursor=cursor or Cursor(), trouble=TROUBLE,
                          actions=actions)  # fmt: skip

    def taken(self):
        return [row["loss"] for row in self.rows if row["kind"] == "train"]


def test_a_spike_and_what_is_no_number_are_left_out_and_recorded():
    toy = Toy([3.0, 3.1, 2.9, 3.0, 9.0, 2.8, np.nan, 2.7, 2.7])
    result = toy.run(7)
    assert toy.taken() == pytest.approx([3.0, 3.1, 2.9, 3.0, 2.8, 2.7, 2.7])
    assert (result.step, result.cursor.data, result.cursor.skipped) == (7, 9, 0)
    first, second = (row for row in toy.rows if row["kind"] == "skipped")
    assert (first["step"], first["data"], first["data_after"], first["loss"]) == (4, 4, 5, 9.0)
    assert first["reason"] == "loss 9.000 is above 4.000", "median 3, deviation 0.25, times 4"
    assert (second["step"], second["data"], second["loss"], second["reason"]) == (5, 6, None, "loss nan is not finite")
    assert toy.fed[4:6] == [(4, 0), (5, 16)], "the feed begins anew, for the tokens that were really seen"
    assert json.loads(json.dumps(toy.rows, allow_nan=False)) == toy.rows


def test_the_first_steps_may_be_anything_finite():
    toy = Toy([3.0, 30.0, 300.0, 3.0, 3.0])
    toy.run(5)
    assert len(toy.taken()) == 5


def test_several_in_a_row_go_back_and_skip_the_data():
    losses = [3.0] * 6 + [50.0, 60.0, 70.0] + [2.5] * 10
    toy = Toy(losses)
    result = toy.run(10)
    assert toy.taken() == [3.0] * 6 + [2.5] * 6, "steps 5 and 6 are trained again, on other data"
    assert toy.rewound == [4] and result.cursor.rollbacks == 1
    (back,) = (row for row in toy.rows if row["kind"] == "rollback")
    assert (back["step"], back["to"], back["data"], back["data_after"]) == (6, 4, 4, 9)
    assert result.cursor.data == 15


def test_a_run_does_not_go_back_for_ever():
    toy = Toy([3.0] * 6 + [50.0] * 30)
    last = "the last as loss 50.000 is above 4.000; the run has gone back 2 times, which is all that it may"
    with pytest.raises(FloatingPointError, match=f"step 5: 3 steps in a row were not taken, {last}"):
        toy.run(10)
    alone = Toy([3.0] * 6 + [50.0] * 30, every=0)
    with pytest.raises(FloatingPointError, match="step 7: .*there is no checkpoint to go back to"):
        alone.run(10)


def test_a_run_may_go_back_to_its_start():
    """It is told of step 0, and what was measured before the first step is not measured again."""
    toy, measured = Toy([3.0] * 2 + [np.nan] * 3 + [2.5] * 10), []

    def restore(step):
        return Toy.restore(toy, step) or (toy_state(), Cursor())

    def run(cursor=Cursor()):
        actions = Actions(write=toy.rows.append, save=toy.save, save_every=4, restore=restore, rewind=toy.rewound.append,
                          evaluate=lambda state: measured.append(int(state.step)) or {}, eval_every=9)  # fmt: skip
        return train_loop(toy_step, toy_state(), toy.feed, steps=9, cursor=cursor, trouble=TROUBLE, actions=actions)

    run()
    assert toy.rewound == [0] and toy.taken() == [3.0] * 2 + [2.5] * 9 and measured == [0, 9]
    (back,) = (row for row in toy.rows if row["kind"] == "rollback")
    assert (back["step"], back["to"], back["data"], back["data_after"]) == (2, 0, None, 5)
    done, cursor = toy.saved[0]
    assert done == 0 and cursor["data"] == 5, "a run that is killed now does not go the way that it has left"
    run(Cursor(**cursor))
    assert measured == [0, 9, 9]


def test_what_a_run_leaves_is_gone_before_a_checkpoint_is_read(own_garbage):
    """Two states may be more than there is room for."""
    held = [toy_state()._replace(params=tf.Variable(1.0))]
    left, alive = weakref.ref(held[0].params), []

    def note(what):
        gc.collect()
        alive.append((what, left() is not None))

    def restore(step):
        note("restore")
        return toy_state(), Cursor()

    toy = Toy([3.0, 3.0, np.nan, np.nan, np.nan, 3.0, 3.0, 3.0])
    actions = Actions(write=lambda row: note(row["kind"]), save_every=4, restore=restore)
    train_loop(toy_step, held.pop(), toy.feed, steps=3, trouble=TROUBLE, actions=actions)
    assert alive[:6] == [(kind, True) for kind in ("train", "load", "train", "skipped", "skipped", "skipped")]
    assert alive[6] == ("restore", False)


@pytest.mark.parametrize("stop_after", range(1, 15))
def test_an_interrupted_run_meets_the_same_trouble(stop_after):
    """Stopped in quiet, amid skipped steps and after going back; then the whole is that of a run without a stop."""
    losses = [3.0, 3.2, 2.9, 3.1, 8.0, 3.0, 40.0, np.inf, 50.0] + [2.5, 2.6] * 10
    straight = Toy(losses)
    end = straight.run(12)
    asked = iter(range(1, 100))
    toy = Toy(losses)
    result = toy.run(12, stop=lambda: next(asked) == stop_after or None)
    assert result.stopped
    done, cursor = toy.saved[-1]
    again = toy.run(12, toy_state(done), Cursor(**cursor))
    assert again.cursor._replace(losses=(), norms=()) == end.cursor._replace(losses=(), norms=())
    assert list(again.cursor.losses) == list(end.cursor.losses)
    assert toy.taken() == straight.taken()[: len(toy.taken())] == straight.taken()
    kinds = [[(r["kind"], r["step"], r["data_after"]) for r in t.rows if r["kind"] in ("skipped", "rollback")]
             for t in (toy, straight)]  # fmt: skip
    assert kinds[0] == kinds[1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 20.0), min_size=4, max_size=30))
def test_limits_are_those_of_the_formula(losses):
    cursor = Cursor()
    for number, loss in enumerate(losses):
        cursor = cursor_taken(cursor, number, {"loss": loss, "grad_norm": 2 * loss}, TROUBLE)
    last = np.array(losses[-8:])
    assert list(cursor.losses) == last.tolist() and cursor.data == len(losses) - 1
    limits = spike_limits(TROUBLE, cursor)
    median = np.median(last)
    assert limits.loss == pytest.approx(median + 4.0 * max(1.4826 * np.median(np.abs(last - median)), 0.25))
    assert limits.grad_norm == pytest.approx(10.0 * statistics.median(2 * last))


def test_the_journal_of_trouble_is_never_cut(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 7):
            log.write({"kind": "train", "step": step, "loss": 1.0})
        log.write({"kind": "skipped", "step": 6, "reason": "a spike"})
        log.rewind(4)
        log.write({"kind": "rollback", "step": 6, "to": 4})
        log.write({"kind": "train", "step": 5, "loss": 2.0})
    with RunLog(tmp_path, step=4) as log:
        log.write({"kind": "train", "step": 5, "loss": 3.0})
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "log.jsonl")][3:] == [(4, 1.0), (5, 3.0)]
    trouble = read_rows(tmp_path / "trouble.jsonl")
    assert [row["kind"] for row in trouble] == ["skipped", "rollback"] and all(row["time"] > 1e9 for row in trouble)
    with RunLog(tmp_path, step=4) as log:
        log.write({"kind": "heldout", "step": 0, "nll": 5.0})
        log.rewind(0)
    assert [row["kind"] for row in read_rows(tmp_path / "log.jsonl")] == ["heldout"], "of before the first step"
    with RunLog(tmp_path, step=0):
        pass
    assert len(read_rows(tmp_path / "trouble.jsonl")) == 2 and len(read_rows(tmp_path / "log.jsonl")) == 1
    with RunLog(tmp_path):
        pass
    assert read_rows(tmp_path / "trouble.jsonl") == [], "a new run begins a new one"
