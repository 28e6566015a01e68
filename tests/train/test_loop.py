"""The loop and what it writes, with a toy step that takes no time, and one real model that goes on from a checkpoint."""

import io
import json
import os
import re
import signal

import numpy as np
import pytest
import tensorflow as tf

from dsv3 import RouterState, adamw, make_train_step, train_init
from dsv3.data import TokenStream, batch_at, pack_sequences
from dsv3.eval import make_evaluator
from dsv3.train.checkpoint import checkpoint_step, list_checkpoints, restore_checkpoint
from dsv3.train.loop import Actions, index_feed, train_loop
from dsv3.train.loss import LossParts
from dsv3.train.optim import OptimStats
from dsv3.train.plots import plot_run
from dsv3.train.progress import Progress, stop_on_signals
from dsv3.train.records import RunLog, cut_rows, read_rows, row_scalars
from dsv3.train.saving import BackgroundSaver
from dsv3.train.state import Limits, TrainMetrics, TrainState, within_limits
from dsv3.train.trouble import Cursor, Trouble
from tests.compare import PLAIN
from tests.small import KEY, model_config

TIMES = ("seconds", "tokens_per_second", "waited")


def toy_state(step=0):
    return TrainState(tf.constant(step, tf.int64), tf.constant(4 * step, tf.int64), tf.constant(1.0), (), ())


def toy_step(state, tokens, weights, limits=Limits()):
    """Loss = the batch's number; two layers of which the second is uneven."""
    loss, norm = tf.cast(tokens, tf.float32), tf.constant(0.5)
    load = RouterState(tf.constant([[2.0, 2.0]]), tf.constant([[3.0, 1.0]]))
    taken = within_limits(loss, norm, limits)
    metrics = TrainMetrics(loss, LossParts(loss, tf.stack([loss + 1]), tf.constant(1.0), load),
                           OptimStats(norm, tf.constant(0.1)), taken, tf.constant([0.25]))  # fmt: skip
    one = tf.cast(taken, tf.int64)
    return state._replace(step=state.step + one, tokens=state.tokens + 4 * one), metrics


toy_feed = index_feed(lambda number: (tf.constant(100 + number), None))


def plain(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_what_is_called_when():
    calls = []
    actions = Actions(
        write=lambda row: calls.append((row["kind"], row["step"])),
        progress=lambda row: calls.append(("progress", row["step"])), evaluate=lambda state: {"nll": int(state.step)},
        eval_every=3, save=lambda state, step, cursor: calls.append(("save", step, int(state.step), cursor.data)),
        save_every=2, load_every=4, watch=lambda state, metrics: {"w": float(metrics.loss)}, watch_every=5,
    )  # fmt: skip
    result = train_loop(toy_step, toy_state(), toy_feed, steps=7, actions=actions)
    assert result.step == 7 and result.stopped is None and int(result.state.step) == 7 and result.cursor.data == 7
    want = [("heldout", 0)]
    for step in range(1, 8):
        want += [("progress", step), ("train", step)]
        want += [("load", step)] * (step in (1, 4, 7)) + [("watch", step)] * (step in (5, 7))
        want += [("heldout", step)] * (step in (3, 6, 7))
        want += [("save", step, step, step)] * (step in (2, 4, 6, 7))
    assert calls == want


def test_rows_hold_the_numbers():
    rows = []
    train_loop(toy_step, toy_state(), toy_feed, steps=4, actions=Actions(write=rows.append, load_every=3))
    train, load = rows[0], rows[1]
    assert plain([train]) == [{
        "kind": "train", "step": 1, "tokens": 4, "loss": 100.0, "nll": 100.0, "mtp": [101.0], "balance": 1.0,
        "grad_norm": 0.5, "learning_rate": pytest.approx(0.1), "load_violation": [0.0, 0.5],
    }]  # fmt: skip
    assert train["seconds"] > 0 and train["tokens_per_second"] == pytest.approx(4 / train["seconds"], rel=0.2)
    assert 0 <= train["waited"] <= train["seconds"]
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    assert load == {
        "kind": "load", "step": 1, "steps": 1, "load": [[2, 2], [3, 1]], "max_load": [1.0, 1.5], "min_load": [1.0, 0.5],
        "load_variance": [0.0, 0.25], "load_entropy": [1.0, pytest.approx(entropy, abs=1e-6)], "unused": [0, 0],
    }  # fmt: skip
    assert rows[2]["loss"] == 101.0, "the batch is that of the steps done"
    assert rows[4]["kind"] == "load" and rows[4]["steps"] == 2 and rows[4]["load"] == [[4, 4], [6, 2]], "since the last one"


def test_goes_on_from_the_states_step_and_stops_when_asked():
    rows, saved = [], []
    asked = iter([None, None, "now"])
    actions = Actions(
        write=rows.append, save=lambda state, step, cursor: saved.append((step, cursor.data)), evaluate=lambda state: {},
        eval_every=100, stop=lambda: next(asked),
    )  # fmt: skip
    result = train_loop(toy_step, toy_state(3), toy_feed, steps=9, cursor=Cursor(data=5), actions=actions)
    assert (result.step, result.stopped, saved) == (6, "now", [(6, 8)])
    assert [row["loss"] for row in rows if row["kind"] == "train"] == [105.0, 106.0, 107.0]
    assert not [row for row in rows if row["kind"] == "heldout"]
    done = train_loop(toy_step, toy_state(9), toy_feed, steps=9, actions=actions)
    assert (done.step, done.stopped, len(saved)) == (9, None, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_without_a_word_on_trouble_a_loss_that_is_no_number_ends_the_run_unsaved(bad):
    saved = []
    feed = index_feed(lambda number: (tf.constant(bad if number == 2 else 1.0), None))
    actions = Actions(save=lambda state, step, cursor: saved.append(step), save_every=1)
    with pytest.raises(FloatingPointError, match=f"step 3: loss {bad} is not finite$"):
        train_loop(toy_step, toy_state(), feed, steps=5, actions=actions)
    assert saved == [1, 2]


def test_wrong_arguments_are_named():
    for arguments, message in [
        ({"steps": -1}, "train_loop: `steps` is -1"),
        ({"actions": Actions(save_every=-2)}, "train_loop: `save_every` is -2"),
        ({"actions": Actions(load_every=0)}, "train_loop: `load_every` is 0"),
        ({"steps": 1}, "train_loop: the state has done 2 steps, want at most steps=1"),
        ({"trouble": Trouble(patience=0)}, "Trouble: `patience` is 0, want at least 1"),
        ({"trouble": Trouble(window=4, least=5)}, "Trouble: `least` is 5, want at most window=4"),
        ({"trouble": Trouble(norm_factor=1.0)}, "Trouble: `norm_factor` is 1.0, want above 1"),
        ({"trouble": Trouble(deviations=0)}, "Trouble: `deviations` is 0, want above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_loop(toy_step, toy_state(2), toy_feed, **{"steps": 3, **arguments})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(number):
    before = signal.getsignal(number)
    saved = []

    def batches(done):
        if done == 2:
            os.kill(os.getpid(), number)
        return tf.constant(1.0), None

    with stop_on_signals() as stop:
        actions = Actions(stop=stop, save=lambda state, step, cursor: saved.append(step))
        result = train_loop(toy_step, toy_state(), index_feed(batches), steps=9, actions=actions)
        assert signal.getsignal(number) == before, "a second one acts as ever"
    assert (result.step, result.stopped, saved) == (3, number, [3])
    with stop_on_signals():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before


# What is written


def event_scalars(folder):
    """All scalars of a folder's events: `{tag: [(step, value)]}`."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_log_and_events_go_on_without_a_step_twice(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"kind": "train", "step": step, "loss": 10.0 - step, "mtp": [step, step + 1], "load": [[1, 2]]})
        log.write({"kind": "heldout", "step": 5, "nll": 3.0})
        log.sync()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "ste')  # killed while it wrote
    with RunLog(tmp_path, step=3) as log:
        log.write({"kind": "train", "step": 4, "loss": 0.25})
    rows = read_rows(tmp_path / "log.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 0.25)]
    events = event_scalars(tmp_path / "tensorboard")
    assert events == {
        "train/loss": [(1, 9.0), (2, 8.0), (3, 7.0), (4, 0.25)],
        "train/mtp_1": [(1, 1.0), (2, 2.0), (3, 3.0)],
        "train/mtp_2": [(1, 2.0), (2, 3.0), (3, 4.0)],
    }
    with RunLog(tmp_path):
        pass
    assert read_rows(tmp_path / "log.jsonl") == [] and event_scalars(tmp_path / "tensorboard") == {}


def test_reading_a_log(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_rows(path) == [] and cut_rows(path, 5) == []
    row = json.dumps({"kind": "train", "step": 1})
    path.write_text(f"{row}\n{row[:-3]}")
    assert read_rows(path) == [{"kind": "train", "step": 1}]
    for broken in ("[]", "{}", "no json", row[:9]):
        path.write_text(f"{row}\n{broken}\n{row}\n")
        with pytest.raises(ValueError, match="read_rows: .*log.jsonl' line 2 is not a row"):
            read_rows(path)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tensorboard").write_text("a file")
    with pytest.raises(OSError, match="RunLog: cannot write to '.*a/tensorboard'"):
        RunLog(tmp_path / "a")
    with RunLog(tmp_path / "b") as log:
        log.write({"kind": "train", "step": 1})
        monkeypatch.setattr("os.fsync", lambda _: os.write(10**6, b""))
        with pytest.raises(OSError, match="RunLog: cannot write to '.*b/log.jsonl' .Bad file descriptor"):
            log.sync()


def test_row_scalars_leave_out_tables_and_names():
    row = {"kind": "heldout", "step": 2, "nll": 1, "names": "x", "list": [1.5], "table": [[1]], "empty": []}
    assert row_scalars(row) == {"heldout/nll": 1.0, "heldout/list_1": 1.5}


def test_progress_lines_have_speed_and_eta():
    stream = io.StringIO()
    with Progress(4, start=1, every=0.0, stream=stream) as progress:
        for step, seconds in ((2, 50.0), (3, 0.5), (4, 0.5)):
            row = {"step": step, "loss": 2.0, "learning_rate": 0.1, "seconds": seconds, "tokens_per_second": 100 / seconds}
            progress.update(row)
        progress.say("done")
    first, second, third, last = stream.getvalue().splitlines()
    assert first == "step 2/4  loss 2.0000  lr 1.00e-01  compiled"
    assert second == "step 3/4  loss 2.0000  lr 1.00e-01  200 tokens/s  ETA 0:00" and "ETA 0:00" in third
    assert last == "done"
    quiet = io.StringIO()
    with Progress(3, every=3600.0, stream=quiet) as progress:
        for step in (1, 2, 3):
            progress.update({**row, "step": step})
    assert re.findall(r"step (\d)/3", quiet.getvalue()) == ["1", "3"], "the first and the last, and one an hour"


def test_progress_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(2, stream=stream) as progress:
        for step in (1, 2):
            progress.update({"step": step, "loss": 2.5, "learning_rate": 0.1, "seconds": 0.5, "tokens_per_second": 200.0})
        progress.say("a line")
    assert "2/2" in stream.getvalue() and "loss 2.500, 200 tokens/s" in stream.getvalue() and "a line\n" in stream.getvalue()


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_plots(tmp_path):
    rows = []
    watched = {"grad_norms": {"head": 1.0}, "update_ratios": {"head": 0.1}, "bias_min": [-1.0, 0.0], "bias_max": [1.0, 2.0]}
    held = {"nll": 3.0, "mtp_agreement": 0.5}
    actions = Actions(
        write=rows.append, evaluate=lambda state: held, eval_every=2, watch=lambda *_: watched, watch_every=2
    )
    train_loop(toy_step, toy_state(), toy_feed, steps=5, actions=actions)
    paths = plot_run(rows, tmp_path / "plots", mtp_layers=1)
    names = "loss learning_rate speed mtp expert_load load_violation balance norms bias".split()
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert all(min(png_size(path)) > 300 for path in paths)
    dense = [{**row, "load_violation": [], "mtp": []} for row in rows if row["kind"] == "train"]
    assert [path.name for path in plot_run(dense[:1], tmp_path)] == ["loss.png", "learning_rate.png", "speed.png"]
    used = [{**row, "mfu": 0.1} for row in dense]
    assert plot_run(used, tmp_path / "used")[2].read_bytes() != plot_run(dense, tmp_path / "plain")[2].read_bytes()
    with pytest.raises(ValueError, match="plot_run: `rows` has no training row"):
        plot_run([], tmp_path)


# A model


TROUBLE = Trouble(window=4, least=2, deviations=1.5)  # two losses are enough, and any that is higher may be a spike


def test_a_model_goes_on_to_the_same_numbers(tmp_path):
    cfg = model_config(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 400).astype(np.int32)
    packed = pack_sequences(tokens, 8)
    heldout = TokenStream(tokens[:50], np.array([0, 50]), np.array([90]))
    optimizer = adamw(lambda seen: 0.01 * (1.0 - seen / 1000.0), fuse=False)
    step = make_train_step(cfg, optimizer, policy=PLAIN)
    score = make_evaluator(cfg, length=8, policy=PLAIN)

    def run(folder, stop_at=None):
        state, cursor = train_init(KEY, cfg, optimizer), Cursor()
        found = restore_checkpoint(folder / "checkpoints", state, settings={"seed": 0})
        if found:
            state, cursor = found.state, Cursor(**found.cursor)
        asked = iter(range(int(state.step) + 1, 100))
        with RunLog(folder, step=int(state.step)) as log, BackgroundSaver(folder / "checkpoints", {"seed": 0}) as saver:

            def stop():
                saver.poll()
                return next(asked) == stop_at or None

            actions = Actions(
                write=log.write, evaluate=lambda s: score(s.params, s.router, heldout)._asdict(), eval_every=4,
                save=lambda s, done, cursor: saver.save(s, done, cursor._asdict()), save_every=3, stop=stop, load_every=1,
            )  # fmt: skip
            feed = index_feed(lambda number: batch_at(packed, number, 4))
            return train_loop(step, state, feed, steps=10, cursor=cursor, trouble=TROUBLE, actions=actions)

    run(tmp_path / "straight")
    assert run(tmp_path / "broken", stop_at=5).step == 5
    # Steps 6 and 7 are lost with their rows, as after a kill: the next checkpoint would have been that of step 9.
    with open(tmp_path / "broken" / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "loss": 0}\n{"kind": "train", "step": 7}\n{"kind"')
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "broken" / "checkpoints")] == [3, 5]
    assert run(tmp_path / "broken").step == 10
    straight, broken = (plain(read_rows(tmp_path / name / "log.jsonl")) for name in ("straight", "broken"))
    assert len([row for row in straight if row["kind"] == "train"]) == 10
    assert broken == straight, "bit by bit"
