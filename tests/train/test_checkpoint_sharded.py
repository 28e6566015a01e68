"""Checkpoints of a state on a mesh: whatever layout wrote them, any other reads the same bits, and no more than it needs."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tensorflow.experimental import dtensor

import dsv3
from dsv3 import tree
from dsv3.layout import local_bytes
from dsv3.parallel.mesh import AXES, layout_of, make_layout, make_mesh, place
from dsv3.train import checkpoint_files
from dsv3.train.checkpoint import restore_checkpoint, save_checkpoint
from dsv3.train.checkpoint_files import BlockReader
from dsv3.train.mesh_params import state_layouts
from dsv3.train.step import train_specs
from tests.small import KEY, model_config

MESHES = (None, "data:1", "data:2", "expert:3", "data:2,expert:2", "data:4,expert:2", "pipe:2,data:2,expert:2", "expert:8")
SIZES = (1, 2, 3, 8, 24)
DTYPES = ("float32", "bfloat16", "int64", "bool")


def whole_leaves(leaves):
    """Leaves of every kind, `[(shape, dtype)]`, with values that tell where they belong."""
    return {
        f"leaf{i}": tf.cast(tf.random.stateless_uniform(shape, [i, 1], -99, 99, tf.int32), dtype)
        for i, (shape, dtype) in enumerate(leaves)
    }


def layouts_for(state, axes, draw):
    """A layout for each leaf, drawn from those that divide; `None` without a mesh."""
    if axes is None:
        return None
    mesh = make_mesh(axes)

    def one(leaf):
        dims = []
        for size in leaf.shape:
            free = [a for a in AXES if a not in dims and size % mesh.dim_size(a) == 0]
            dims.append(draw(st.sampled_from([None, *free])))
        return make_layout(mesh, dims)

    return tree.map_leaves(one, state)


def placed(state, layouts):
    return state if layouts is None else tree.map_leaves(place, state, layouts)


def parts_of(leaf):
    return [leaf] if layout_of(leaf) is None else dtensor.unpack(leaf)


def assert_same(got, want):
    """The same layout, dtype and bits on every device."""
    for (path, g), w in zip(tree.items(got), tree.flatten(want), strict=True):
        assert layout_of(g) == layout_of(w) and g.dtype == w.dtype, path
        for a, b in zip(parts_of(g), parts_of(w), strict=True):
            assert a.device.split("device:")[-1] == b.device.split("device:")[-1]
            assert a.numpy().tobytes() == b.numpy().tobytes() and a.shape == b.shape, path


@settings(max_examples=60)
@given(
    st.data(), st.sampled_from(MESHES), st.sampled_from(MESHES), st.sampled_from([1, 64, 1 << 24]),
    st.lists(st.tuples(st.lists(st.sampled_from((*SIZES, 0)), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=4),
)  # fmt: skip
def test_saved_on_one_mesh_and_restored_on_another(tmp_path_factory, data, before, after, group, leaves):
    folder, state = tmp_path_factory.mktemp("checkpoint"), whole_leaves(leaves)
    old, new = (layouts_for(state, axes, data.draw) for axes in (before, after))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "GROUP_BYTES", group)
        path = save_checkpoint(folder, placed(state, old), {}, step=1)
    size = sum(math.prod(leaf.shape) * leaf.dtype.size for leaf in state.values())
    with open(path / "state.safetensors", "rb") as file:
        head = 8 + int.from_bytes(file.read(8), "little")
    assert (path / "state.safetensors").stat().st_size == head + size, "every part once"
    like = tree.map_leaves(lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), state)
    assert_same(restore_checkpoint(folder, like, layouts=new).state, placed(state, new))


def zero_layouts(cfg, axes):
    specs = dsv3.model_specs(cfg)
    return dsv3.zero_layouts(specs, dsv3.make_layouts(specs, make_mesh(axes)))


def test_a_state_drawn_on_a_mesh_is_that_of_one_device():
    cfg, optimizer = model_config(), dsv3.adamw(0.1, moment_dtype="bfloat16")
    layouts, state = zero_layouts(cfg, "data:2,expert:3"), dsv3.train_init(KEY, cfg, optimizer)
    assert_same(dsv3.train_init(KEY, cfg, optimizer, layouts), dsv3.place_state(state, layouts))
    for (path, spec), leaf in zip(tree.items(train_specs(cfg, optimizer)), tree.flatten(state), strict=True):
        assert spec == tf.TensorSpec(leaf.shape, leaf.dtype), path


def test_a_train_state_from_one_mesh_on_another_and_on_one_device(tmp_path):
    cfg = model_config()
    state = dsv3.train_init(KEY, cfg, dsv3.adamw(0.1, moment_dtype="bfloat16"))
    layouts = zero_layouts(cfg, "data:4,expert:2")
    path = save_checkpoint(tmp_path, dsv3.place_state(state, layouts), {"seed": 3}, step=4)
    assert_same(restore_checkpoint(tmp_path, state, settings={"seed": 3}).state, state)
    other = zero_layouts(cfg, "expert:3,data:2")
    found = restore_checkpoint(tmp_path, state, layouts=state_layouts(state, other)).state
    assert_same(found, dsv3.place_state(state, other))
    with safe_open(path / "state.safetensors", framework="numpy") as file:
        gate_up = state.params.moe.ffn.gate_up
        half = gate_up.shape[1] // 2
        names = [name for name in file.keys() if name.startswith("params.moe.ffn.gate_up[")]
        assert len(names) == 8, names
        got = np.zeros(gate_up.shape, np.float32)
        for name in names:
            where = tuple(slice(*map(int, part.split(":"))) for part in name.partition("[")[2][:-1].split(","))
            assert where[1] in (slice(0, half), slice(half, 2 * half))
            got[where] = file.get_tensor(name)
        np.testing.assert_array_equal(got, gate_up)


def test_a_device_reads_the_rows_that_it_needs(tmp_path, monkeypatch):
    """A share of a leaf is read from the groups of rows that have it, and from no other block."""
    state = {"x": tf.reshape(tf.range(64 * 16, dtype=tf.float32), [64, 16])}
    monkeypatch.setattr(checkpoint_files, "GROUP_BYTES", 4 * 64)  # four rows
    mesh = make_mesh("data:2,expert:4")
    path = save_checkpoint(tmp_path, placed(state, {"x": make_layout(mesh, ["data", "expert"])}), {}, step=1)
    meta = json.loads((path / "checkpoint.json").read_text())
    reader, seen = BlockReader(path, meta["files"], meta["leaves"]), []

    real = checkpoint_files.digest_of
    monkeypatch.setattr(checkpoint_files, "digest_of", lambda data: seen.append(len(data)) or real(data))
    np.testing.assert_array_equal(reader.read("x", [3, 2], [15, 3]), state["x"][3:18, 2:5])
    assert sum(seen) == 4 * 2 * 4 * 32, "of 2 of 8 blocks 32 rows of 4 columns, as groups have 16 rows of them"
    seen.clear()
    np.testing.assert_array_equal(reader.read("x", [33, 4], [2, 4]), state["x"][33:35, 4:8])
    assert sum(seen) == 4 * 4 * 16


def test_damage_is_seen_wherever_it_is(tmp_path, monkeypatch):
    """A bit in any block, a block that the description lacks: the checkpoint before it is taken, with one line."""
    monkeypatch.setattr(checkpoint_files, "GROUP_BYTES", 16)
    state = {"x": tf.reshape(tf.range(24.0), [8, 3]), "y": tf.constant(7, tf.int64)}
    mesh = make_mesh("data:4")
    layouts = {"x": make_layout(mesh, ["data", None]), "y": make_layout(mesh, [])}

    def restored(damage, layouts=layouts):
        for step in (1, 2):
            path = save_checkpoint(tmp_path, placed(state, layouts), {}, step=step)
        damage(path)
        said = []
        found = restore_checkpoint(tmp_path, state, layouts=layouts, on_skip=said.append)
        assert found.path.name == "step-00000001" and len(said) == 1 and "taking the one before it" in said[0], said
        assert_same(found.state, placed(state, layouts))
        return said[0]

    size = 24 * 4 + 8
    for back in range(1, size + 1, 7):

        def flip(path, back=back):
            data = bytearray((path / "state.safetensors").read_bytes())
            data[-back] ^= 4
            (path / "state.safetensors").write_bytes(data)

        what = "`y`" if back <= 8 else "`x`"
        assert f"the checksum of state.safetensors is wrong in {what}" in restored(flip)

    def forget(path):
        from dsv3.train import checkpoint

        meta = json.loads((path / "checkpoint.json").read_text())
        del meta["digest"], meta["files"]["state.safetensors"]["blocks"][2]
        (path / "checkpoint.json").write_text(json.dumps(meta | {"digest": checkpoint._meta_digest(meta)}))

    assert "`x` has 0 of 6 values" in restored(forget)


def test_a_state_half_on_a_mesh_is_refused(tmp_path, monkeypatch):
    state = {"x": tf.zeros([2]), "y": place(tf.zeros([2]), make_layout(make_mesh("data:2"), ["data"]))}
    with pytest.raises(ValueError, match="save_checkpoint: only 1 of 2 leaves are on a mesh, want all or none"):
        save_checkpoint(tmp_path, state, {}, step=1)
    monkeypatch.setenv("DTENSOR_JOBS", "127.0.0.1:1,127.0.0.1:2")
    with pytest.raises(ValueError, match="save_checkpoint: the state is not on a mesh, want that with 2 processes"):
        save_checkpoint(tmp_path, {"x": state["x"]}, {}, step=1)


def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def reset_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def test_no_second_copy_of_the_state_is_made(tmp_path):
    """Saving takes a part of one leaf, restoring the state and one leaf, beside 16 MiB of a group."""
    program = f"""
import os
import tests.conftest
from tests.train.test_checkpoint_sharded import measure
os.fsync = lambda _: None
measure({str(tmp_path)!r})
"""
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(  # a fresh process, which has no memory left that others have given back
        [sys.executable, "-c", program], capture_output=True, cwd=root, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    leaf, count, saving, restoring = json.loads(done.stdout)
    assert saving < 2 * leaf, f"{saving:,}"
    assert leaf * count * 0.9 < restoring < leaf * (count + 2), f"{restoring:,}"


def measure(folder):
    """Prints bytes of a leaf, the number of leaves, and how much memory saving and restoring them takes."""
    leaf, count, folder = 1 << 24, 12, pathlib.Path(folder)  # 16 MiB each
    specs = {f"w{i}": dsv3.ParamSpec((64, leaf // 256), ("layer", "embed"), "zeros") for i in range(count)}
    mesh = make_mesh("data:4,expert:2")
    layouts = {name: make_layout(mesh, ["data", "expert"]) for name in specs}
    small = {name: tf.zeros([8, 8]) for name in specs}
    save_checkpoint(folder / "warm", placed(small, layouts), {}, step=1)
    restore_checkpoint(folder / "warm", small, layouts=layouts)
    state = {name: place(tf.fill([64, leaf // 256], float(i)), layouts[name]) for i, name in enumerate(specs)}
    assert local_bytes(specs, layouts) * 8 == leaf * count
    before = reset_peak()
    save_checkpoint(folder, state, {}, step=1)
    saving = resident("VmHWM") - before
    like = tree.map_leaves(lambda spec: tf.TensorSpec(spec.shape), specs)
    before = reset_peak()
    found = restore_checkpoint(folder, like, layouts=layouts).state
    restoring = resident("VmHWM") - before
    assert_same(found, state)
    print(json.dumps([leaf, count, saving, restoring]))
