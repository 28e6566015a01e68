"""Training checkpoints: what is read is what was written, and what is broken is seen."""

import io
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf
from safetensors import safe_open

from dsv3 import adamw, train_init, tree
from dsv3.compiled import place
from dsv3.train.checkpoint import (
    Keep,
    check_settings,
    drop_checkpoints,
    list_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from tests.small import KEY, model_config

SETTINGS = {"lr": 0.003, "seed": 0, "config": {"hidden_size": 12, "rope_scaling": None}}


def example(seed=0):
    """A state of every kind of leaf: scalars, bfloat16, an empty one, none at all."""
    rng = np.random.default_rng(seed)
    return {
        "step": tf.constant(seed, tf.int64),
        "count": tf.constant(3),
        "mu": tf.cast(tf.constant(rng.normal(size=(3, 5))), tf.bfloat16),
        "params": (tf.constant(rng.normal(size=(2, 3, 4)), tf.float32), ()),
        "empty": tf.zeros([0, 4]),
        "flags": tf.constant([True, False, True]),
    }


def assert_equal(got, want):
    got, want = tree.to_dict(got), tree.to_dict(want)
    assert list(got) == list(want)
    for path, leaf in want.items():
        assert got[path].dtype == leaf.dtype and got[path].shape == leaf.shape, path
        np.testing.assert_array_equal(got[path].numpy(), leaf.numpy(), err_msg=path)


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path / "new", example(), SETTINGS, step=7)
    assert path.name == "step-00000007" and os.listdir(path.parent) == [path.name]
    found = restore_checkpoint(tmp_path / "new", example(1), settings=SETTINGS)
    assert_equal(found.state, example())
    assert found.settings == SETTINGS and found.path == path


def test_train_state_in_variables_with_bfloat16_moments(tmp_path):
    cfg = model_config()
    state = train_init(KEY, cfg, adamw(0.1, moment_dtype="bfloat16"))
    save_checkpoint(tmp_path, place(state), {}, step=1)
    assert_equal(restore_checkpoint(tmp_path, state).state, state)


def test_state_file_is_plain_safetensors(tmp_path):
    path = save_checkpoint(tmp_path, example(), {}, step=1) / "state.safetensors"
    with safe_open(path, framework="numpy") as file:
        leaves = tree.to_dict(example())
        assert set(file.keys()) == set(leaves)
        np.testing.assert_array_equal(file.get_tensor("params.0"), leaves["params.0"].numpy())


def test_only_the_last_ones_stay(tmp_path):
    for step in (2, 99999999, 4, 100000000):  # the last two are in another order as text
        save_checkpoint(tmp_path, example(step), {}, step=step, keep=Keep(2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert restore_checkpoint(tmp_path, example()).state["step"] == 100000000


def test_every_so_many_steps_one_stays_for_good(tmp_path):
    for step in range(10, 80, 10):
        save_checkpoint(tmp_path, example(), {}, step=step, keep=Keep(2, every=30))
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["30", "60", "70"]


def test_the_one_that_a_run_may_have_to_go_back_to_stays(tmp_path):
    for step in (10, 20, 23, 24, 26):
        save_checkpoint(tmp_path, example(), {}, step=step, keep=Keep(2, anchor=lambda step: step % 10 == 0))
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["20", "24", "26"]
    drop_checkpoints(tmp_path, after=20)
    assert os.listdir(tmp_path) == ["step-00000020"]


def test_the_cursor_comes_back_as_json(tmp_path):
    save_checkpoint(tmp_path, example(), {}, step=1, cursor={"data": (3, [1, 2]), "losses": [0.1 + 0.2]})
    assert restore_checkpoint(tmp_path, example()).cursor == {"data": [3, [1, 2]], "losses": [0.1 + 0.2]}
    save_checkpoint(tmp_path, example(), {}, step=2)
    assert restore_checkpoint(tmp_path, example()).cursor is None
    with pytest.raises(ValueError, match="save_checkpoint: `cursor` cannot be written as JSON"):
        save_checkpoint(tmp_path, example(), {}, step=3, cursor={1j})


def test_only_steps_that_are_accepted_are_taken(tmp_path):
    for step in (3, 4, 6, 7):
        save_checkpoint(tmp_path, example(step), {}, step=step, keep=Keep(9))
    found = restore_checkpoint(tmp_path, example(), accept=lambda step: step % 2 == 0 and step < 6)
    assert found.path.name == "step-00000004" and int(found.state["step"]) == 4
    assert restore_checkpoint(tmp_path, example(), accept=lambda step: step > 7) is None


def test_saving_a_step_again_replaces_it(tmp_path):
    for seed in (1, 2):
        save_checkpoint(tmp_path, example(seed), {}, step=5)
    assert os.listdir(tmp_path) == ["step-00000005"]
    assert_equal(restore_checkpoint(tmp_path, example()).state, example(2))


def test_nothing_there(tmp_path):
    assert restore_checkpoint(tmp_path, example()) is None
    assert restore_checkpoint(tmp_path / "none", example()) is None


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the data": lambda p: flip(p / "state.safetensors", -3),
    "a bit of the header": lambda p: flip(p / "state.safetensors", 12),
    "the header's length": lambda p: flip(p / "state.safetensors", 6),
    "cut short": lambda p: os.truncate(p / "state.safetensors", 100),
    "empty": lambda p: os.truncate(p / "state.safetensors", 0),
    "no state": lambda p: os.remove(p / "state.safetensors"),
    "no description": lambda p: os.remove(p / "checkpoint.json"),
    "half a description": lambda p: os.truncate(p / "checkpoint.json", 60),
    "another description": lambda p: (p / "checkpoint.json").write_text(
        (p / "checkpoint.json").read_text().replace('"seed": 0', '"seed": 1')
    ),
    "not a description": lambda p: (p / "checkpoint.json").write_text("[]"),
    "another's state": lambda p: shutil.copy(p.parent / "step-00000001" / "state.safetensors", p),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_one_is_seen_and_the_one_before_it_taken(tmp_path, what):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, example(step), SETTINGS, step=step)
    DAMAGE[what](tmp_path / "step-00000003")
    said = []
    found = restore_checkpoint(tmp_path, example(), settings=SETTINGS, on_skip=said.append)
    assert_equal(found.state, example(2))
    assert len(said) == 1 and "step-00000003 is damaged" in said[0] and "taking the one before it" in said[0]
    # It is out of the way: a later save keeps the right ones, and the next restore says nothing.
    save_checkpoint(tmp_path, example(4), SETTINGS, step=3, keep=Keep(2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert_equal(restore_checkpoint(tmp_path, example(), on_skip=said.append).state, example(4))
    assert len(said) == 1


def test_damage_is_a_warning_by_default_and_an_error_each_time_if_nothing_is_left(tmp_path):
    path = save_checkpoint(tmp_path, example(), {}, step=1)
    DAMAGE["cut short"](path)
    for _ in range(2):
        with pytest.warns(UserWarning, match="step-00000001 is damaged"):
            with pytest.raises(ValueError, match="none of the 1 checkpoints in .* is whole, want .*another folder"):
                restore_checkpoint(tmp_path, example())
    assert os.listdir(tmp_path) == ["step-00000001"], "what could still be mended keeps its name"
    path.rename(tmp_path / "step-00000001.damaged")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        restore_checkpoint(tmp_path, example())


def test_a_damaged_one_gets_a_free_name_or_keeps_its_own(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, example(step), {}, step=step)
    for name in ("step-00000002.damaged", "step-00000002.damaged-2"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / name)
    os.remove(tmp_path / "step-00000002" / "state.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", raise_error(PermissionError(13, "Permission denied")))
        assert restore_checkpoint(tmp_path, example(), on_skip=str).path.name == "step-00000001"
    assert restore_checkpoint(tmp_path, example(), on_skip=str).path.name == "step-00000001"
    assert sorted(os.listdir(tmp_path))[1:] == [f"step-00000002.damaged{n}" for n in ("", "-2", "-3")]


def raise_error(error):
    def call(*arguments, **options):
        raise error

    return call


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
def test_a_file_that_cannot_be_read_now_is_not_damage(tmp_path, monkeypatch, file):
    for step in (1, 2):
        save_checkpoint(tmp_path, example(step), {}, step=step)
    real = io.open

    def open_(path, *arguments, **options):
        if str(path).endswith(f"step-00000002/{file}"):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", open_)
        patch.setattr("io.open", open_)
        with pytest.raises(OSError, match=f"restore_checkpoint: cannot read '.*step-00000002/{file}' .Input/output error"):
            restore_checkpoint(tmp_path, example(), on_skip=pytest.fail)
    assert restore_checkpoint(tmp_path, example()).path.name == "step-00000002"


@pytest.mark.parametrize("action", ["restore", "save"])
def test_a_kill_while_a_step_is_saved_again_costs_nothing(tmp_path, monkeypatch, action):
    save_checkpoint(tmp_path, example(1), {}, step=5)
    real = pathlib.Path.rename

    class Killed(BaseException):
        pass

    def rename(path, target):
        if path.name.endswith(".part"):
            raise Killed
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", rename)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, example(2), {}, step=5)
    assert list_checkpoints(tmp_path) == []
    if action == "save":
        save_checkpoint(tmp_path, example(3), {}, step=4)
    assert_equal(restore_checkpoint(tmp_path, example()).state, example(1))


def test_what_was_just_written_stays(tmp_path):
    save_checkpoint(tmp_path, example(1), {}, step=9)
    path = save_checkpoint(tmp_path, example(2), {}, step=3, keep=Keep(1))
    assert path.name == "step-00000003" and path.exists()


def test_settings_are_what_json_makes_of_them(tmp_path):
    settings = {"by_step": {2: 0.1, 10: 0.2}, "betas": (0.9, 0.95)}
    save_checkpoint(tmp_path, example(), settings, step=1)
    found = restore_checkpoint(tmp_path, example(), settings=settings, on_skip=pytest.fail)
    assert found.settings == {"by_step": {"2": 0.1, "10": 0.2}, "betas": [0.9, 0.95]}
    with pytest.raises(ValueError, match="save_checkpoint: `settings` cannot be written as JSON"):
        save_checkpoint(tmp_path, example(), {"names": {"a"}}, step=2)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, example(1), {}, step=1)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", raise_error(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=f"save_checkpoint: cannot write to '{tmp_path}' .No space left on dev") as error:
            save_checkpoint(tmp_path, example(2), {}, step=2)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["step-00000001"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(ValueError, match=f"save_checkpoint: {tmp_path} wants [0-9]+ bytes, 10 are free"):
            save_checkpoint(tmp_path, example(2), {}, step=2)
    assert os.listdir(tmp_path) == ["step-00000001"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="save_checkpoint: cannot write to '.*file'"):
        save_checkpoint(tmp_path / "file", example(), {}, step=1)


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename", "json.dump"])
def test_a_save_that_breaks_off_leaves_the_others_alone(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, example(1), {}, step=1)

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(call, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, example(2), {}, step=2, keep=Keep(1))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert_equal(restore_checkpoint(tmp_path, example()).state, example(1))
    save_checkpoint(tmp_path, example(2), {}, step=2, keep=Keep(1))
    assert os.listdir(tmp_path) == ["step-00000002"], "what the killed save left is gone"


def test_other_settings_are_named(tmp_path):
    save_checkpoint(tmp_path, example(), SETTINGS, step=1)
    for change, message in [
        ({"seed": 4}, "`seed` is 4 here, 0 there"),
        ({"config": {"hidden_size": 16, "rope_scaling": None}}, r"`config.hidden_size` is 16 here, 12 there"),
        ({"extra": 1}, "`extra` is 1 here, 'not set' there"),
        ({"lr": 0.01, "seed": 1}, r"`lr` is 0.01 here, 0.003 there; `seed` is 1 here, 0 there"),
    ]:
        with pytest.raises(ValueError, match=f"cannot go on from .*step-00000001, other settings: {message}"):
            restore_checkpoint(tmp_path, example(), settings={**SETTINGS, **change})
    assert (tmp_path / "step-00000001").exists()
    check_settings({"a": (1, 2), "b": 0.1}, {"a": [1, 2], "b": 0.1}, where="a list is JSON's tuple")


def test_another_structure_is_named(tmp_path):
    save_checkpoint(tmp_path, example(), {}, step=1)
    for like, message in [
        ({**example(), "new": tf.zeros([1])}, r"missing \['new'\]"),
        ({k: v for k, v in example().items() if k != "mu"}, r"unexpected \['mu'\]"),
        ({**example(), "mu": tf.zeros([3, 5])}, r"`mu` in .* is bfloat16 \(3, 5\), want float32 \(3, 5\)"),
        ({**example(), "count": tf.constant([3])}, r"`count` in .* is int32 \(\), want int32 \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            restore_checkpoint(tmp_path, like)


def test_wrong_arguments_and_formats_are_named(tmp_path):
    with pytest.raises(ValueError, match="save_checkpoint: `keep.last` is 0"):
        save_checkpoint(tmp_path, example(), {}, step=1, keep=Keep(0))
    with pytest.raises(ValueError, match="save_checkpoint: `step` is -1"):
        save_checkpoint(tmp_path, example(), {}, step=-1)
    with pytest.raises(ValueError, match="save_checkpoint: `z` is complex64"):
        save_checkpoint(tmp_path, {"z": tf.zeros([1], tf.complex64)}, {}, step=1)
    path = save_checkpoint(tmp_path, example(), {}, step=1) / "checkpoint.json"
    from dsv3.train import checkpoint

    meta = {**json.loads(path.read_text()), "format": 99}
    del meta["digest"]
    path.write_text(json.dumps({**meta, "digest": checkpoint._meta_digest(meta)}))
    with pytest.raises(ValueError, match="has format 99, want 3"):
        restore_checkpoint(tmp_path, example())
