"""Meshes, placing and exchanges on eight virtual devices."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.experimental import dtensor

import dsv3
from dsv3 import tree
from dsv3.parallel.collectives import all_to_all, gather_mesh
from dsv3.parallel.groups import mesh_groups
from dsv3.parallel.mesh import (
    AXES,
    axis_size,
    local_places,
    make_layout,
    make_mesh,
    pack,
    parse_axes,
    place,
    start_devices,
    unpack_tree,
    whole,
)
from tests.compare import PLAIN, assert_close
from tests.small import model_config, random_params, random_router, random_tokens

MESHES = ("data:2", "expert:3", "data:2,expert:4", "pipe:2,data:2,expert:2", "pipe:4,expert:2", "data:8")


def test_axes_by_name():
    assert parse_axes(" expert:4, data:2 ") == {"data": 2, "expert": 4}
    mesh = make_mesh({"expert": 2})
    assert mesh.dim_names == list(AXES) and [axis_size(mesh, a) for a in (*AXES, "model")] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "parse_axes: '' names no axis, want e.g. data:2,expert:4"),
        ("data", "parse_axes: 'data' in 'data', want axis:size with axis one of pipe, data, expert and size >= 1"),
        ("model:2", "parse_axes: 'model:2' in 'model:2', want axis:size"),
        ("data:0", "parse_axes: 'data:0' in 'data:0', want"),
        ("data:2,data:4", "parse_axes: axis 'data' stands twice in 'data:2,data:4'"),
    ],
)
def test_bad_axes_are_named(text, message):
    with pytest.raises(ValueError) as e:
        parse_axes(text)
    assert str(e.value).startswith(message)


def test_too_many_devices_are_named():
    with pytest.raises(ValueError, match="make_mesh: 'data:16' has 16 devices, this process has 8: call"):
        make_mesh("data:16")
    start_devices(8)  # as there are
    start_devices(4)
    with pytest.raises(ValueError, match="start_devices: 16 devices are wanted, but TensorFlow has started with 8"):
        start_devices(16)


@pytest.mark.parametrize("axes", MESHES)
def test_placed_and_fetched(axes):
    mesh = make_mesh(axes)
    x = np.arange(24 * 24 * 2).reshape(24, 2, 24)
    for dims in ((None, None, None), ("expert", None, "data"), ("data", None, "pipe"), ("pipe", None, "expert")):
        placed = place(tf.constant(x), make_layout(mesh, dims))
        np.testing.assert_array_equal(whole(placed).numpy(), x)


@settings(max_examples=30)
@given(st.sampled_from(MESHES), st.sampled_from(AXES), st.lists(st.integers(1, 4), max_size=3), st.sampled_from("fbi"))
def test_all_to_all_is_a_transposition(axes, axis, rest, kind):
    """Row g of a device's part is what device g had for it, in every group of devices that differ along the axis only."""
    mesh = make_mesh(axes)
    dtype = {"f": tf.float32, "b": tf.bfloat16, "i": tf.int32}[kind]
    places, ways = local_places(mesh), axis_size(mesh, axis)
    values = np.random.default_rng(len(rest)).integers(0, 100, (len(places), ways, *rest))
    got = all_to_all([tf.cast(v, dtype) for v in values], mesh_groups(mesh, (axis,)))
    index = {tuple(where[a] for a in AXES): i for i, where in enumerate(places)}
    for i, where in enumerate(places):
        for g in range(ways):
            other = index[tuple((where | {axis: g})[a] for a in AXES)]
            np.testing.assert_array_equal(tf.cast(got[i][g], tf.int32), values[other][where[axis]])
        assert got[i].dtype == dtype


def test_parts_stay_on_their_devices():
    mesh = make_mesh("data:2,expert:2")
    got = all_to_all([tf.zeros([2, 3])] * 4, mesh_groups(mesh, ("expert",)))
    assert [part.device for part in dtensor.unpack(pack(got, make_layout(mesh, ["expert", "data"])))] == mesh.local_devices()


def test_what_does_not_divide_is_not_placed():
    with pytest.raises(ValueError, match=r"shard_box: shape \(7,\) is not divisible by the 2 devices of 'data'"):
        place(tf.range(7), make_layout(make_mesh("data:2"), ["data"]))


def test_all_to_all_wants_a_row_a_device():
    with pytest.raises(ValueError, match=r"all_to_all: a part has shape \(3, 2\), want \[2, ...\] for groups of 2"):
        all_to_all([tf.zeros([3, 2])] * 2, mesh_groups(make_mesh("data:2"), ("data",)))


def test_parts_on_the_host():
    mesh = make_mesh("data:2,expert:3")
    parts = [tf.constant([i, 10 * i]) for i in range(6)]
    got = gather_mesh(parts, mesh)
    assert got.shape == (1, 2, 3, 2) and got[0, 1, 2].tolist() == [5, 50]


def test_relayout_between_inner_dims_permutes_rows():
    """Why every exchange has dim 0 on one side. When this fails, TensorFlow has been mended."""
    mesh = make_mesh("data:2,expert:2")
    x = np.arange(2 * 2 * 4 * 3).reshape(2, 2, 4, 3)
    places = local_places(mesh)
    parts = [tf.constant(x[p["data"] :][:1, p["expert"] :][:, :1]) for p in places]
    sent = pack(parts, make_layout(mesh, ["data", "expert", None, None]))
    got = dtensor.unpack(dtensor.relayout(sent, make_layout(mesh, ["data", None, "expert", None])))
    want = x[:1, :, :2]
    assert sorted(got[0].numpy().ravel()) == sorted(want.ravel()) and not np.array_equal(got[0], want)


def test_a_cache_and_activations_are_laid_out_by_rows():
    """Each device continues its rows with its part of the cache; together that is what one device does."""
    cfg = model_config()
    params, router, tokens = random_params(dsv3.model_specs(cfg)), random_router(cfg), random_tokens(cfg, 4, 6)
    mesh, rows = make_mesh("data:2"), {"batch": "data"}
    lay_cache = dsv3.make_layouts(dsv3.cache_specs(cfg, 4, 8, dtype="float32"), mesh, rows)
    lay_out = dsv3.make_layouts(dsv3.output_specs(cfg, 4, 2), mesh, rows)
    run = lambda new, cache: dsv3.model_apply(params, router, new, cfg=cfg, cache=cache, policy=PLAIN)  # noqa: E731
    before = dsv3.cache_init(cfg, 4, 8, dtype=tf.float32)
    before = dsv3.cache_append(before, run(tokens[:, :4], before).entries, np.array([4, 2, 3, 1]))
    placed = tree.map_leaves(place, before, lay_cache)
    parts = unpack_tree(placed)
    assert [part.kv.shape[1] for part in parts] == [2, 2]
    outs = [run(new, part) for new, part in zip(np.split(tokens[:, 4:], 2), parts)]
    want = run(tokens[:, 4:], before)
    for name in ("logits", "hidden", "entries"):
        got = whole(pack([getattr(out, name) for out in outs], getattr(lay_out, name)))
        assert_close(got, getattr(want, name), what=name)
    after = [dsv3.cache_append(part, out.entries) for part, out in zip(parts, outs)]
    got = [whole(pack(leaves, layout)) for leaves, layout in zip(zip(*after), lay_cache)]
    for leaf, expected in zip(got, dsv3.cache_append(before, want.entries)):
        assert_close(leaf, expected)


def test_rows_that_do_not_divide_are_named():
    specs = dsv3.cache_specs(model_config(), 3, 8)
    with pytest.raises(ValueError, match=r"make_layouts: `kv` has shape .*; rule 'batch' -> 'data': 3 is not divisible"):
        dsv3.make_layouts(specs, make_mesh("data:2"), {"batch": "data"})
