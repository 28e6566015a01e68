"""Saving in a thread: the state may change meanwhile, and what goes wrong is told by whoever ends the checkpoint."""

import os
import threading

import pytest
import tensorflow as tf

from dsv3.compiled import place
from dsv3.train.checkpoint import Keep, SaveJob, list_checkpoints, restore_checkpoint
from dsv3.train.saving import BackgroundSaver
from tests.train.test_checkpoint import assert_equal, example


@pytest.fixture
def slow(monkeypatch):
    """Holds a thread that writes until it may go on."""
    gate, write = threading.Event(), SaveJob.write

    def wait(self, values):
        assert gate.wait(30)
        write(self, values)

    monkeypatch.setattr(SaveJob, "write", wait)
    yield gate
    gate.set()


def test_what_is_saved_is_the_state_of_that_moment(tmp_path, slow):
    state = place(example(1))
    with BackgroundSaver(tmp_path, {"seed": 0}) as saver:
        saver.save(state, 1, {"data": 5})
        state["mu"].assign(tf.zeros_like(state["mu"]))  # in place, while the thread waits
        state["params"][0].assign_add(tf.ones_like(state["params"][0]))
        assert saver.poll() is None and list_checkpoints(tmp_path) == []
        slow.set()
        path = saver.finish()
        assert path.name == "step-00000001" and saver.finish() is None and saver.poll() is None
    found = restore_checkpoint(tmp_path, example())
    assert_equal(found.state, example(1))
    assert (found.settings, found.cursor) == ({"seed": 0}, {"data": 5})


def test_the_next_save_and_the_end_wait_for_the_one_before(tmp_path, slow):
    threading.Timer(0.3, slow.set).start()
    with BackgroundSaver(tmp_path, {}, keep=Keep(2)) as saver:
        for step in (1, 2, 3):
            saver.save(example(step), step)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "3"]
    assert os.listdir(tmp_path) and all(not name.startswith(".") for name in os.listdir(tmp_path))


def test_it_ends_when_all_processes_have_written(tmp_path):
    others = [False, False, True]
    with BackgroundSaver(tmp_path, {}, agree=lambda done: done and others.pop(0)) as saver:
        saver.save(example(), 1)
        saver._thread.join()
        assert saver.poll() is None and saver.poll() is None and list_checkpoints(tmp_path) == []
        assert saver.poll().name == "step-00000001"


def test_a_disk_that_is_full_is_told_at_the_end_and_leaves_nothing(tmp_path, monkeypatch):
    with BackgroundSaver(tmp_path, {}) as saver:
        saver.save(example(1), 1)
    full = OSError(28, "No space left on device")

    def fails(self, values):
        (self.part / "state.safetensors").write_bytes(b"half")
        raise full

    monkeypatch.setattr(SaveJob, "write", fails)
    with BackgroundSaver(tmp_path, {}) as saver:
        saver.save(example(2), 2)
        with pytest.raises(OSError, match="save_checkpoint: cannot write to .*No space left on device"):
            saver.finish()
        assert saver.finish() is None
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert_equal(restore_checkpoint(tmp_path, example()).state, example(1))


def test_an_error_of_the_training_does_not_cost_the_checkpoint_before_it(tmp_path, slow, monkeypatch):
    with pytest.raises(KeyError), BackgroundSaver(tmp_path, {}) as saver:
        saver.save(example(), 1)
        slow.set()
        raise KeyError
    assert os.listdir(tmp_path) == ["step-00000001"]
    # Of several processes the others may be elsewhere by then; what is hidden is removed by the next save.
    with pytest.raises(KeyError), BackgroundSaver(tmp_path, {}) as saver:
        saver.save(example(), 2)
        monkeypatch.setattr("dsv3.train.saving.dtensor.num_clients", lambda: 2)
        raise KeyError
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    with BackgroundSaver(tmp_path, {}) as saver:
        saver.save(example(), 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def test_wrong_arguments_are_named_before_a_thread_begins(tmp_path):
    with BackgroundSaver(tmp_path, {"a": {1}}) as saver, pytest.raises(ValueError, match="`settings` cannot be written as"):
        saver.save(example(), 1)
    assert not tmp_path.exists() or os.listdir(tmp_path) == []
