"""Splitting and measuring corpora."""

import ast
import gzip
import lzma
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3.data.compression
import dsv3.data.embedded as embedded
from dsv3.data import (
    Document,
    chunk_documents,
    compression_bits_per_byte,
    corpus_stats,
    embedded_corpus,
    read_corpus,
    split_documents,
)
from tests.real_data import DATA

ROOT = Path(__file__).resolve().parents[2]
needs_data = pytest.mark.skipif(not (DATA / "corpus").is_dir(), reason="no data folder (DSV3_DATA)")
texts = st.lists(st.text(max_size=20), max_size=12)


def test_embedded_corpus_is_code_and_reference_in_one_order():
    documents = list(embedded_corpus())
    names = [document.name for document in documents]
    assert names == [document.name for document in embedded_corpus()] and len(set(names)) == len(names)
    assert {"stdlib/json/decoder.py", "stdlib/typing.py", "reference/lambda"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert not [name for name in names if "_sysconfigdata" in name]
    stats = corpus_stats(documents)
    assert stats.documents == len(names) and 5e6 < stats.bytes < 40e6 and stats.longest < stats.bytes / 20


def test_embedded_corpus_stops_at_max_bytes():
    whole = list(embedded_corpus())
    part = list(embedded_corpus(max_bytes=500_000))
    assert 450_000 < corpus_stats(part).bytes <= 500_000
    assert part == [document for document in whole if document in set(part)]
    for bad, message in ((0, "`max_bytes` is 0, want at least 1"), (1, "`max_bytes` is 1, less than")):
        with pytest.raises(ValueError, match=f"embedded_corpus: {message}"):
            list(embedded_corpus(max_bytes=bad))


def test_interpreter_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="embedded_corpus: no Python sources"):
        embedded_corpus()


@given(texts, st.integers(1, 7))
def test_chunks_join_to_the_text(parts, most):
    text = "\n".join(parts)
    pieces = list(chunk_documents([Document("a", text)], max_chars=most))
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text) <= most for piece in pieces)
    if len(pieces) > 1:
        assert [piece.name for piece in pieces] == [f"a#{i}" for i in range(len(pieces))]
        assert all(piece.text for piece in pieces)


def test_chunks_end_at_lines():
    pieces = [piece.text for piece in chunk_documents([Document("a", "one\ntwo\nthree33\n4")], max_chars=5)]
    assert pieces == ["one\n", "two\n", "three", "33\n4"]
    with pytest.raises(ValueError, match="chunk_documents: `max_chars` is 0"):
        chunk_documents([], max_chars=0)


@settings(deadline=None)
@given(texts.filter(bool), st.floats(0.001, 0.999), st.integers(-3, 2**70))
def test_split_is_a_partition_by_text(parts, share, seed):
    documents = [Document(str(i), text) for i, text in enumerate(parts)]
    train, held = split_documents(documents, share, seed)
    assert sorted(d.text for d in train + held) == sorted(set(parts))
    assert all(parts.index(d.text) == int(d.name) for d in train + held)  # the first of equal texts
    assert [int(d.name) for d in train] == sorted(int(d.name) for d in train)
    assert len(set(parts)) == 1 or (train and held)
    again = split_documents([Document("other", d.text) for d in reversed(documents)], share, seed)
    assert {d.text for d in again[1]} == {d.text for d in held}


def test_split_keeps_its_share_and_its_sides():
    documents = [Document(str(i), f"text {i}") for i in range(4000)]
    train, held = split_documents(documents, 0.1, seed=1)
    assert 300 < len(held) < 500
    fewer = split_documents(documents[::2], 0.1, seed=1)[1]
    assert set(fewer) == {d for d in held if int(d.name) % 2 == 0}
    assert set(split_documents(documents, 0.1, seed=2)[1]) != set(held)


def test_split_of_known_texts_never_changes():
    documents = [Document(str(i), f"text {i}") for i in range(60)]
    assert [d.name for d in split_documents(documents, 0.1)[1]] == "6 8 9 20 26 27 40 43".split()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_a_share_outside(share):
    with pytest.raises(ValueError, match="split_documents: `heldout` is .*, want a share above 0"):
        split_documents([Document("a", "a")], share)


def test_split_refuses_nothing():
    with pytest.raises(ValueError, match="split_documents: empty corpus"):
        split_documents([])


def test_stats_count_bytes_not_characters():
    assert corpus_stats([Document("a", "猫"), Document("b", "ab")]) == (2, 3, 5, 3)
    assert corpus_stats([]) == (0, 0, 0, 0)


def test_compression_is_what_the_files_would_be():
    text = (ROOT / "dsv3" / "data" / "corpus.py").read_bytes()
    bits = compression_bits_per_byte(text)
    assert list(bits) == ["gzip", "xz"]
    assert bits["gzip"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert bits["xz"] == pytest.approx(8 * len(packed) / len(text))
    assert 1 < bits["xz"] < 4 and 1 < bits["gzip"] < 4
    noise = compression_bits_per_byte(os.urandom(10_000))
    assert all(8 <= value < 8.2 for value in noise.values())


@pytest.mark.parametrize("bad, message", [(b"", "is empty"), ("text", "is a str, want bytes")])
def test_compression_refuses(bad, message):
    with pytest.raises(ValueError, match=f"compression_bits_per_byte: `text_bytes` {message}"):
        compression_bits_per_byte(bad)


def test_data_needs_only_numpy_tokenizers_and_jinja():
    """Prefetching is made of `tf.data`; packages of the extra `data` are loaded by `load_extra`, where they are used."""
    allowed = sys.stdlib_module_names | {"numpy", "tokenizers", "jinja2", "dsv3"}
    folder = Path(dsv3.data.compression.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                known = module.split(".")[0] in allowed or (file.name, module) == ("prefetch.py", "tensorflow")
                assert known, f"{file.name} imports {module}"


@needs_data
@pytest.mark.parametrize("name", ["thealgorithms_python.jsonl", "rust_book.jsonl", "moby_dick.jsonl"])
def test_real_corpora(name):
    skipped = []
    documents = list(read_corpus(DATA / "corpus" / name, on_skip=lambda *skip: skipped.append(skip)))
    assert {reason for _, reason in skipped} <= {"is empty"}
    rows = (DATA / "corpus" / name).read_bytes().count(b"\n")
    assert len(documents) + len(skipped) == rows > 100
    train, held = split_documents(documents, 0.05)
    assert train and held
    assert corpus_stats(train + held).bytes <= corpus_stats(documents).bytes


@needs_data
def test_real_text_can_be_held_out_in_parts():
    (play,) = read_corpus(DATA / "tinyshakespeare" / "input.txt")
    pieces = list(chunk_documents([play], 16384))
    assert "".join(piece.text for piece in pieces) == play.text
    train, held = split_documents(pieces, 0.05)
    assert len(train) > len(held) > 0
    bits = compression_bits_per_byte("".join(piece.text for piece in held).encode())
    assert 2 < bits["xz"] < 5
