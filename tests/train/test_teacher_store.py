"""Stored probabilities: what is read is what was said, a store that was cut off goes on to the same bytes, faults."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsv3.ops.divergence import TopK
from dsv3.train.teacher_store import MANIFEST, TeacherStore, check_same, read_manifest, write_store

ROWS, LENGTH, K = 7, 5, 3
SETTINGS = {"k": K, "temperature": 1.0, "names": {"bos": "<s>"}}


def weights():
    """Some places of some rows count; one row has none, one has all."""
    found = (np.random.default_rng(0).random([ROWS, LENGTH]) < 0.5).astype(np.float32)
    found[2], found[3] = 0, 0.25
    return found


def said(first, last):
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(50), [ROWS, LENGTH, 1]), axis=2)[..., :K]
    share = rng.dirichlet(np.ones(K + 1), [ROWS, LENGTH])
    every = TopK(ids.astype(np.int32), np.log(share[..., :K]).astype(np.float32), np.log(share[..., K]).astype(np.float32))
    return TopK(*(part[first:last] for part in every))


def write(folder, say=said, settings=SETTINGS, **how):
    return write_store(folder, settings, weights(), say, shard_rows=3, **how)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_what_is_read_is_what_was_said(tmp_path):
    shards = write(tmp_path)
    assert [shard.rows for shard in shards] == [(0, 3), (3, 6), (6, 7)]
    store = TeacherStore(tmp_path, weights())
    numbers = np.array([6, 3, 2, 0, 3])
    found, want = store.take(numbers), TopK(*(part[numbers] for part in said(0, ROWS)))
    counts = weights()[numbers] > 0
    for name in TopK._fields:
        got, whole = getattr(found, name), getattr(want, name)
        assert got.dtype == whole.dtype
        np.testing.assert_array_equal(got[counts], whole[counts])
        assert not got[~counts].any()
    every = weights() > 0
    assert store.k == K and sum(shard.places for shard in shards) == every.sum()
    assert store.held == pytest.approx((1 - np.exp(said(0, ROWS).rest))[every].mean(), rel=1e-6)
    assert store.size == sum((tmp_path / shard.file).stat().st_size for shard in shards)
    # 8 bytes for each of K tokens and 4 for the rest, at places that count only; and headers.
    assert 0 < store.size - every.sum() * (8 * K + 4) < 3 * 400
    assert load_file(tmp_path / "shard-00001.safetensors")["ids"].shape == (every[3:6].sum(), K)


def test_half_precision_rounds_the_log_probabilities_alone(tmp_path):
    write(tmp_path, precision="float16")
    found, want, counts = TeacherStore(tmp_path, weights()).take(np.arange(ROWS)), said(0, ROWS), weights() > 0
    np.testing.assert_array_equal(found.logprobs[counts], want.logprobs[counts].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found.rest[counts], want.rest[counts])
    assert (found.logprobs[counts] != want.logprobs[counts]).any()


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_store_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path, dies):
    whole, part = tmp_path / "whole", tmp_path / "part"
    write(whole)

    def dying(first, last):
        if first == 3 * dies:
            raise KeyboardInterrupt
        return said(first, last)

    with pytest.raises(KeyboardInterrupt):
        write(part, dying)
    if dies:
        with pytest.raises(ValueError, match=rf"is not complete, {dies} of 3 shards are there: the program that stores"):
            TeacherStore(part, weights())
    kept = []
    write(part, note=lambda shard, there: kept.append(there))
    assert kept == [number < dies for number in range(3)] and contents(part) == contents(whole)


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "shard-00001.safetensors is not there"),
    (damage_cut, "shard-00001.safetensors has .* bytes, want"),
    (damage_bit, "shard-00001.safetensors has another SHA-256 than its manifest says: it has been changed"),
])  # fmt: skip
def test_a_damaged_shard_is_refused_and_made_anew(tmp_path, damage, message):
    write(tmp_path)
    before, kept = contents(tmp_path), []
    damage(tmp_path / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=message):
        TeacherStore(tmp_path, weights())
    write(tmp_path, note=lambda shard, there: kept.append(there))
    assert kept == [True, False, True] and contents(tmp_path) == before


def test_a_shard_of_other_places_is_made_anew(tmp_path):
    write(tmp_path)
    kept, every = [], np.ones([ROWS, LENGTH])
    write_store(tmp_path, SETTINGS, every, said, shard_rows=3, note=lambda shard, there: kept.append(there))
    assert kept == [False] * 3 and TeacherStore(tmp_path, every).size > every.sum() * (8 * K + 4)


def test_other_settings_rows_and_manifests_are_refused(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"the store in .*, other settings: `settings.temperature` is 2.0 here, 1.0 there"):
        write(tmp_path / "a", settings=SETTINGS | {"temperature": 2.0})
    with pytest.raises(ValueError, match="`precision` is 'float16' here, 'float32' there"):
        write(tmp_path / "a", precision="float16")
    with pytest.raises(ValueError, match="is of 7 rows, want the 6 of these conversations"):
        TeacherStore(tmp_path / "a", weights()[:6])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors has \d+ places, want the \d+ of its rows"):
        TeacherStore(tmp_path / "a", np.ones([ROWS, LENGTH]))
    with pytest.raises(ValueError, match="holds no manifest.json, want a folder of stored probabilities"):
        TeacherStore(tmp_path, weights())
    saved = read_manifest(tmp_path / "a")
    for number, bad in enumerate([
        "no JSON", "[]", json.dumps(saved | {"format": "other"}), json.dumps(saved | {"shards": [{"file": "x"}]}),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "a", folder)
        (folder / MANIFEST).write_text(bad)
        with pytest.raises(ValueError, match="manifest.json' is no manifest of stored probabilities"):
            read_manifest(folder)
    check_same(SETTINGS, {"k": K}, "the store")
    with pytest.raises(ValueError, match="the store does not fit: `k` is 4 here, 3 there; `names.bos` is 'a' here, '<s>'"):
        check_same(SETTINGS, {"k": 4, "names": {"bos": "a"}}, "the store")
