"""Shards and manifests: what is written is read back, and whatever is wrong with a folder is said by name."""

import contextlib
import json
import os
import resource
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import (
    Manifest,
    SpecialIds,
    TokenStream,
    manifest_digest,
    memory_source,
    open_shards,
    read_manifest,
    read_shard,
    read_window,
    tokenizer_fingerprint,
    train_tokenizer,
    verify_source,
    write_manifest,
    write_shard,
)

SPECIAL = SpecialIds(0, 1, 2)
SIZES = {"code": [[3, 40, 2, 17, 5], [9, 8, 7]], "prose": [[6, 1, 30]]}


def documents(sizes, vocab_size=300, seed=0):
    """Documents of the given numbers of tokens: (tokens, bytes, hash)."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, vocab_size, n), 3 * n, int(rng.integers(2**63)) * 2 + 1) for n in sizes]


def manifest_of(splits, vocab_size=300):
    return Manifest("f" * 32, vocab_size, SPECIAL, {"seed": 0}, {name: {} for name in SIZES}, splits)


def prepare(folder, *, vocab_size=300, window_tokens=20):
    """Writes a prepared folder with the documents of `SIZES`; returns them by source."""
    made = {name: [documents(s, vocab_size, i) for i, s in enumerate(shards)] for name, shards in SIZES.items()}
    train = {
        name: [
            write_shard(folder / "train" / name, i, shard, vocab_size=vocab_size, window_tokens=window_tokens)
            for i, shard in enumerate(shards)
        ]
        for name, shards in made.items()
    }
    write_manifest(folder, manifest_of({"train": train, "heldout": {}}, vocab_size))
    return {name: [document for shard in shards for document in shard] for name, shards in made.items()}


@pytest.fixture
def prepared(tmp_path):
    prepare(tmp_path / "prepared")
    return tmp_path / "prepared"


def read_all(source):
    """The tokens of all documents, window by window."""
    found = []
    for window in range(len(source.windows.shard)):
        tokens, starts = read_window(source, window)
        found += [tokens[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return found


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def edit(folder, change):
    """Changes the manifest and gives it the digest that it then has."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    kept = {key: value for key, value in content.items() if key not in ("format", "digest")}
    try:
        content["digest"] = manifest_digest(Manifest(**{**kept, "special": SpecialIds(**kept["special"])}))
    except TypeError:
        pass
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("vocab_size, dtype", [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    made = prepare(tmp_path, vocab_size=vocab_size)
    sources = open_shards(tmp_path, tokenizer="f" * 32)
    assert list(sources) == list(SIZES)
    for name, source in sources.items():
        assert read_all(source) == [tokens.tolist() for tokens, _, _ in made[name]]
        shards = [read_shard(source, i) for i in range(len(source.entries))]
        assert {shard.tokens.dtype for shard in shards} == {np.dtype(dtype)}
        assert np.concatenate([shard.hashes for shard in shards]).tolist() == [h for _, _, h in made[name]]
        assert np.concatenate([shard.text_bytes for shard in shards]).tolist() == [b for _, b, _ in made[name]]
        assert np.concatenate([np.diff(shard.starts) for shard in shards]).tolist() == [len(t) for t, _, _ in made[name]]
        assert isinstance(shards[0].tokens, np.memmap)
        assert (source.tokens, source.documents) == (sum(len(t) for t, _, _ in made[name]), len(made[name]))


def test_files_are_plain_npy_and_nothing_else_is_there(prepared):
    names = [f"00000.{kind}.npy" for kind in ("bytes", "hashes", "starts", "tokens")]
    assert sorted(os.listdir(prepared / "train" / "prose")) == names
    starts = np.load(prepared / "train" / "prose" / "00000.starts.npy")
    assert starts.dtype == np.int64 and starts.tolist() == [0, 6, 7, 37]
    assert sorted(os.listdir(prepared)) == ["manifest.json", "train"]


def test_windows_close_when_they_are_full(prepared):
    windows = open_shards(prepared)["code"].windows
    assert windows.tokens.tolist() == [43, 24, 24] and windows.token.tolist() == [0, 43, 0]
    assert windows.documents.tolist() == [2, 3, 3] and windows.document.tolist() == [0, 2, 0]
    assert windows.shard.tolist() == [0, 0, 1]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60))
def test_windows_cover_the_documents(sizes, window_tokens):
    starts = np.cumsum([0, *sizes])
    stream = TokenStream(np.arange(starts[-1], dtype=np.int32), starts, np.array(sizes))
    source = memory_source("x", stream, vocab_size=int(starts[-1]), window_tokens=window_tokens)
    assert sum(read_all(source), []) == stream.tokens.tolist()
    assert [len(document) for document in read_all(source)] == sizes
    tokens = source.windows.tokens
    assert (tokens[:-1] >= window_tokens).all()
    last = [sizes[i] for i in np.cumsum(source.windows.documents) - 1]
    assert (tokens - last < window_tokens).all()  # without its last document a window is not full


def test_same_documents_same_digest(tmp_path):
    for name, window in (("a", 20), ("b", 20), ("c", 45)):
        prepare(tmp_path / name, window_tokens=window)
    a, b, c = (manifest_digest(read_manifest(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["digest"] == a


def test_fingerprint_is_that_of_the_whole_tokenizer():
    one, same, other = (tokenizer_fingerprint(train_tokenizer([text] * 3, 270)) for text in ("abab", "abab", "abac"))
    assert one == same != other and len(one) == 32


# What can be wrong with a folder


def test_no_manifest(tmp_path, prepared):
    (prepared / "manifest.json").unlink()
    message = "read_manifest: '.*' has no manifest.json, want a prepared folder whose preparation has ended"
    for folder in (prepared, tmp_path / "nowhere", prepared / "train" / "code" / "00000.tokens.npy"):
        with pytest.raises(FileNotFoundError, match=message):
            open_shards(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=2), "has format 2, want 1"),
        (lambda m: m.pop("tokenizer"), "has tokenizer None, want str"),
        (lambda m: m.update(special={"bos": 0}), "has special .*, want ids of bos, eos and pad"),
        (lambda m: m["splits"]["train"].update({"../x": []}), r"'\.\./x' is no name for a folder"),
        (lambda m: m["splits"]["train"]["code"][0].pop("windows"), "a shard of train/code is .*, without 'windows'"),
        (lambda m: m["splits"]["train"]["code"][0]["files"].pop("bytes.npy"), "a shard of train/code is named '00000'"),
        (lambda m: m["splits"]["train"]["prose"][0].update(tokens=38), r"prose \(00000\) has 37 tokens in 3 documents"),
    ],
)
def test_bad_manifests(prepared, change, message):
    edit(prepared, change)
    with pytest.raises(ValueError, match=f"read_manifest: '.*manifest.json'.*{message}"):
        open_shards(prepared)


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "has format False"), ("\xff", "is not JSON")])
def test_a_manifest_that_is_none(prepared, text, message):
    (prepared / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"read_manifest: '.*manifest.json' {message}"):
        read_manifest(prepared)


def test_a_manifest_that_was_changed(prepared):
    path = prepared / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="has digest .*, want .*: it was changed after it was written"):
        read_manifest(prepared)


def test_another_tokenizer(prepared):
    with pytest.raises(ValueError, match="open_shards: '.*' was made with tokenizer f{32}, want e{32}"):
        open_shards(prepared, tokenizer="e" * 32)


def test_empty_sources(prepared):
    with pytest.raises(ValueError, match="has no source in split 'heldout', want at least one"):
        open_shards(prepared, "heldout")
    edit(prepared, lambda m: m["splits"]["train"].update(prose=[]))
    with pytest.raises(ValueError, match="open_shards: source 'prose' is empty: it has no token in split 'train'"):
        open_shards(prepared)
    with pytest.raises(ValueError, match="open_shards: `split` is 'test', want one of 'train', 'heldout'"):
        open_shards(prepared, "test")


@pytest.mark.parametrize("kind, offset", [("tokens", 128), ("tokens", 128 + 2 * 66 + 1), ("starts", 136), ("starts", 175)])
def test_a_flipped_byte_that_is_read(prepared, kind, offset):
    flip(prepared / "train" / "code" / f"00000.{kind}.npy", offset)
    source = open_shards(prepared)["code"]
    message = "documents .* of '.*00000.tokens.npy' of source 'code' have digest .*, want .*: the file has changed"
    with pytest.raises(ValueError, match=f"read_window: {message}"):
        read_all(source)
    read_all(open_shards(prepared)["prose"])
    if offset == 175:  # the highest byte of the last start
        with pytest.raises(ValueError, match="read_window: documents .* do not begin where they should"):
            read_all(open_shards(prepared, verify="sizes")["code"])


@pytest.mark.parametrize("kind", ["tokens", "starts", "bytes", "hashes"])
@pytest.mark.parametrize("offset", [3, 100, -1])
def test_a_flipped_byte_anywhere(prepared, kind, offset):
    flip(prepared / "train" / "code" / f"00001.{kind}.npy", offset, bit=5)
    message = f"'.*code/00001.{kind}.npy' of source 'code' has digest .*, want .*: the file has changed"
    with pytest.raises(ValueError, match=message):
        open_shards(prepared, verify="all")
    sources = open_shards(prepared)
    verify_source(sources["prose"])
    with pytest.raises(ValueError, match=message):
        read_shard(sources["code"], 1)


def test_a_window_is_checked_once(prepared):
    source = open_shards(prepared)["code"]
    read_window(source, 0)
    assert source.checked.tolist() == [True, False, False]
    flip(prepared / "train" / "code" / "00000.tokens.npy", 128)
    read_window(source, 0)
    assert open_shards(prepared, verify="sizes")["code"].checked.all()


def test_files_of_the_wrong_size_or_missing(prepared):
    path = prepared / "train" / "prose" / "00000.hashes.npy"
    path.write_bytes(path.read_bytes()[:-1])
    for verify in ("touched", "all", "sizes"):
        with pytest.raises(ValueError, match="open_shards: '.*00000.hashes.npy' of source 'prose' has 151 bytes, want 152"):
            open_shards(prepared, verify=verify)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="open_shards: '.*00000.hashes.npy' of source 'prose' is missing"):
        open_shards(prepared)
    with pytest.raises(ValueError, match="open_shards: `verify` is 'none', want one of 'touched', 'all', 'sizes'"):
        open_shards(prepared, verify="none")


def test_sizes_that_the_counts_do_not_give(prepared):
    def change(manifest):
        manifest["splits"]["train"]["prose"][0]["files"]["tokens.npy"]["bytes"] += 4
    edit(prepared, change)
    with (prepared / "train" / "prose" / "00000.tokens.npy").open("ab") as file:
        file.write(b"four")
    with pytest.raises(ValueError, match="shard 0 of source 'prose': tokens.npy has 206 bytes, want 202 for its counts"):
        open_shards(prepared)


def test_a_file_that_is_cut_off_or_removed_later(prepared):
    source = open_shards(prepared, verify="sizes")["prose"]
    path = prepared / "train" / "prose" / "00000.tokens.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="read_window: '.*00000.tokens.npy' of source 'prose' is cut off"):
        read_all(source)
    path.unlink()
    with pytest.raises(OSError, match="read_window: cannot read '.*00000.tokens.npy'"):
        read_all(source)


# What can go wrong while writing


@pytest.mark.parametrize(
    "made, message",
    [
        ([], "`documents` is empty"),
        ([(np.zeros(0, int), 0, 0)], r"document 0 has tokens of shape \(0,\), dtype int64, want integers \[n\]"),
        ([(np.zeros(2), 0, 0)], r"document 0 has tokens of shape \(2,\), dtype float64"),
        ([(np.zeros(2, int), 0, 0), (np.array([1, 300]), 1, 0)], "document 1 has ids from 1 to 300, want 0 to 299"),
        ([(np.array([-1, 3]), 1, 0)], "document 0 has ids from -1 to 3"),
        ([(np.array([1]), 1, 2**64)], "document 0 has 1 bytes and hash 18446744073709551616"),
        ([(np.array([1]), -1, 0)], "document 0 has -1 bytes"),
    ],
)
def test_bad_documents(tmp_path, made, message):
    with pytest.raises(ValueError, match=f"write_shard: {message}"):
        write_shard(tmp_path / "x", 0, made, vocab_size=300)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name, value", [("number", -1), ("vocab_size", 0), ("window_tokens", 0)])
def test_bad_numbers(tmp_path, name, value):
    arguments = {"number": 0, "vocab_size": 300, "window_tokens": 5, name: value}
    with pytest.raises(ValueError, match=f"write_shard: `{name}` is {value}, want at least"):
        write_shard(tmp_path, documents=documents([3]), **arguments)


@contextlib.contextmanager
def full_disk(message):
    """Files of this process end at 4,000 bytes, which fails as a full disk does: in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=message):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(tmp_path):
    write_shard(tmp_path, 0, documents([100]), vocab_size=300)
    before = sorted(os.listdir(tmp_path))
    with full_disk(r"write_shard: cannot write to '.*' \(File too large\)"):
        write_shard(tmp_path, 1, documents([3000]), vocab_size=300)
    with full_disk(r"write_shard: cannot write to '.*' \(File too large\)"):
        write_shard(tmp_path, 0, documents([1] * 1000), vocab_size=300)  # starts are too many
    assert sorted(os.listdir(tmp_path)) == before and len(before) == 4
    assert len(np.load(tmp_path / "00000.tokens.npy")) == 100


def test_a_manifest_that_cannot_be_written(prepared):
    manifest = read_manifest(prepared)
    (prepared / "manifest.json").unlink()
    with full_disk(r"write_manifest: cannot write to '.*' \(File too large\)"):
        write_manifest(prepared, manifest._replace(settings={"long": "x" * 5000}))
    assert os.listdir(prepared) == ["train"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    for folder in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(OSError, match=r"write_shard: cannot write to '.*' \(a file is in the way\)"):
            write_shard(folder, 0, documents([3]), vocab_size=300)


def test_a_manifest_is_written_once_and_last(tmp_path, prepared):
    manifest = read_manifest(prepared)
    with pytest.raises(ValueError, match="write_manifest: '.*' has a manifest.json, want a folder without one"):
        write_manifest(prepared, manifest)
    (prepared / "manifest.json").unlink()
    shutil.move(prepared / "train" / "code" / "00001.bytes.npy", tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="write_manifest: '.*00001.bytes.npy' of source 'code' is missing"):
        write_manifest(prepared, manifest)
    shutil.move(tmp_path / "away", prepared / "train" / "code" / "00001.bytes.npy")
    write_manifest(prepared, manifest)
    assert read_manifest(prepared) == manifest


def test_memory_sources_refuse():
    for starts in ([0], [0, 2, 2]):
        stream = TokenStream(np.arange(2, dtype=np.int32), np.array(starts), np.array([1] * (len(starts) - 1)))
        with pytest.raises(ValueError, match="memory_source: source 'x' has an empty document, or none at all"):
            memory_source("x", stream, vocab_size=2)
    stream = TokenStream(np.arange(2, dtype=np.int32), np.array([0, 2]), np.array([1]))
    with pytest.raises(ValueError, match="read_shard: source 'x' is in memory"):
        read_shard(memory_source("x", stream, vocab_size=2), 0)
