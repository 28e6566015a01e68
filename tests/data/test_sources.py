"""Reading corpora: formats, parts, and what is wrong with a file or a row."""

import bz2
import errno
import gzip
import json
import lzma
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import dsv3.data.extra as extra
from dsv3.data import Document, list_parts, read_corpus, read_part
from dsv3.data.decompress import open_binary

COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
NAMES = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd"}


def write_table(file, columns, group=None):
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file


def read_parts(path, part_bytes, **options):
    parts = list_parts(path, part_bytes=part_bytes)
    return parts, [document for part in parts for document in read_part(path, part, **options)]


def write_rows(file, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(COMPRESS.get(file.suffix[1:], bytes)(data))
    return file


def test_text_file_is_one_document_with_its_newlines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\xe7\x8c\xab")
    assert list(read_corpus(file)) == [Document("a.txt", "one\r\ntwo\n猫")]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text(tmp_path, suffix):
    name, text = f"a.txt.{suffix}", "naïve " * 100_000
    data = COMPRESS[suffix](text.encode())
    (tmp_path / name).write_bytes(data)
    assert list(read_corpus(tmp_path / name)) == [Document(name, text)]
    (tmp_path / name).write_bytes(COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"two"))  # as `cat` joins files
    assert list(read_corpus(tmp_path / name)) == [Document(name, "one\ntwo")]
    for broken in (data[:-9], data[: len(data) // 2], b"no " + data, data + b"more"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"read_corpus: '.*a.txt.{suffix}' is not a whole {NAMES[suffix]} file"):
            list(read_corpus(tmp_path / name))


def test_padding_behind_a_compressed_stream(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text") + bytes(100) + gzip.compress(b" and") + bytes(100))
    with open_binary(tmp_path / "a.gz") as stream:
        assert stream.read() == b"text and"


@pytest.mark.parametrize("name", ["a.jsonl", *(f"a.jsonl.{suffix}" for suffix in COMPRESS)])
def test_json_lines(tmp_path, name):
    rows = [{"text": "x\u2028y", "path": "p", "name": "q"}, {"text": "z", "name": "n", "path": ""}]
    file = write_rows(tmp_path / name, [*rows, {"text": "w", "path": 3}])
    assert list(read_corpus(file)) == [("p", "x\u2028y"), ("n", "z"), (f"{name}:3", "w")]


def test_folder_is_sorted_and_skips_what_is_not_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "b" / "two.py").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    write_rows(tmp_path / "c.jsonl", [{"text": "three"}, {"text": ""}])
    skipped = {}
    found = list(read_corpus(tmp_path, bad_rows="skip", on_skip=skipped.__setitem__))
    assert found == [("a.md", "one"), ("b/two.py", "two"), ("c.jsonl:1", "three")]
    assert skipped == {
        "latin.txt": "is not UTF-8 (byte 3)",
        "zero.txt": "is binary (a zero byte at 1)",
        "empty.txt": "is empty",
        "cut.txt.gz": "is not a whole gzip file (the file ends within a compressed stream)",
        "c.jsonl:2": "is empty",
    }
    with pytest.warns(UserWarning, match=r"skipped 5 in .*the first: c.jsonl:2 is empty"):
        assert list(read_corpus(tmp_path, bad_rows="skip")) == found


def test_nothing_skipped_no_warning(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_corpus(tmp_path))) == 1


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{nonsense", "not JSON"),
        (b'{"text": "caf\xe9"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "a list, want an object"),
        (b'{"question": "?"}', r"no `text` field among \['question'\]"),
        (b'{"text": 3}', "`text` is a int, want a string"),
        (b'{"text": "\\ud800"}', "`text` has a lone surrogate at 0"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"read_corpus: '.*rows.jsonl' line 3: {message}"):
        list(read_corpus(tmp_path))


def test_missing_path_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_corpus: '.*nowhere' does not exist"):
        read_corpus(tmp_path / "nowhere")


def test_folder_without_text_is_refused_at_once(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="empty corpus: .* has no text file"):
        read_corpus(tmp_path)


def test_corpus_of_nothing_but_space_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"empty corpus: .* no document with text \(1 skipped\)"):
            list(read_corpus(path))


def test_single_file_must_be_text(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a.bin' is not UTF-8 \(byte 0\), want UTF-8 text"):
        list(read_corpus(tmp_path / "a.bin"))


def test_text_field_is_an_argument(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"content": "one", "text": 3}])
    assert list(read_corpus(file, text_field="content")) == [("a.jsonl:1", "one")]
    with pytest.raises(ValueError, match=r"a.jsonl' line 1: no `body` field among \['content', 'text'\]"):
        list(read_corpus(file, text_field="body"))


def test_bad_rows_can_be_skipped_and_are_told(tmp_path):
    rows = [{"text": "one"}, {"text": None}, ["two"], {"text": " "}, {"text": "three"}]
    write_rows(tmp_path / "a.jsonl", rows)
    write_table(tmp_path / "b.parquet", {"text": ["four", None, "five"]})
    skipped = []
    found = read_corpus(tmp_path, bad_rows="skip", on_skip=lambda *skip: skipped.append(skip))
    assert [document.text for document in found] == ["one", "three", "four", "five"]
    assert skipped == [
        ("a.jsonl:2", "`text` is a NoneType, want a string"), ("a.jsonl:3", "a list, want an object with a `text` field"),
        ("a.jsonl:4", "is empty"), ("b.parquet:2", "`text` is a NoneType, want a string"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="read_corpus: `bad_rows` is 'drop', want one of 'raise', 'skip'"):
        read_corpus(tmp_path, bad_rows="drop")


def test_a_file_that_cannot_be_read_ends_the_run(tmp_path, monkeypatch):
    """Whatever `bad_rows`: a passing error of the system must not decide what a corpus has."""
    (tmp_path / "a.txt").write_text("one")
    table = write_table(tmp_path / "b.parquet", {"text": ["two"]})
    (part,) = list_parts(tmp_path)
    for file in (table, tmp_path / "a.txt"):
        file.rename(tmp_path / ".hidden")
        with pytest.raises(OSError, match=rf"read_corpus: cannot read '.*{file.name}' \(No such file or directory\)$"):
            list(read_part(tmp_path, part, bad_rows="skip"))
        (tmp_path / ".hidden").rename(file)

    def failing(*_, **__):
        raise OSError(errno.EIO, "Error reading bytes from file. Detail: [errno 5] Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", failing)
    with pytest.raises(OSError, match=r"read_corpus: cannot read '.*b.parquet' \(Input/output error\)$"):
        list(read_corpus(tmp_path, bad_rows="skip"))
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")  # its first byte gives EIO
    with pytest.raises(OSError, match=r"read_corpus: cannot read '.*a.txt' \(Input/output error\)$"):
        list(read_corpus(tmp_path, bad_rows="skip"))
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="read_corpus: cannot read '.*c.txt'"):
        list_parts(tmp_path)


@pytest.mark.parametrize("suffix", ["gz", "zst", "parquet"])
def test_a_file_of_rows_that_is_cut_off_is_a_bad_row(tmp_path, suffix):
    rows = [np.random.default_rng(i).bytes(500).hex() for i in range(600)]
    (tmp_path / "b.txt").write_text("fine")
    if suffix == "parquet":
        file = write_table(tmp_path / "a.parquet", {"text": rows}, 300)
        column = pq.read_metadata(file).row_group(1).column(0)
        with file.open("r+b") as stream:  # the head of a page of the second group; the end of the file is there
            stream.seek(column.dictionary_page_offset or column.data_page_offset)
            stream.write(b"\xff" * 40)
    else:
        file = write_rows(tmp_path / f"a.jsonl.{suffix}", [{"text": row} for row in rows])
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    skipped = []
    with pytest.raises(ValueError, match=rf"read_corpus: '.*{file.name}' is not a whole .*, want a whole file"):
        list(read_corpus(tmp_path))
    found = [d.text for d in read_corpus(tmp_path, bad_rows="skip", on_skip=lambda *skip: skipped.append(skip))]
    assert found == [*rows[: len(found) - 1], "fine"] and 0 < len(found) - 1 < 600
    assert len(skipped) == 1 and skipped[0][0] == file.name and skipped[0][1].startswith("is not a whole ")


def test_zstd_with_a_long_window(tmp_path):
    """As `zstd --long=31` makes it; what cannot be read has the library's own message."""
    file, text = tmp_path / "a.txt.zst", b"text " * 1000
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    one = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: the window is kept
    file.write_bytes(one.compress(text) + one.flush())
    assert zstandard.get_frame_parameters(file.read_bytes()).window_size == 2**31
    assert list(read_corpus(file)) == [("a.txt.zst", text.decode())]
    file.write_bytes(b"no" + file.read_bytes())
    with pytest.raises(ValueError, match=r"is not a whole zstd file \(zstd decompress.* Unknown frame descriptor\)"):
        list(read_corpus(file))


# Parquet


def test_table_rows_are_documents(tmp_path):
    file = write_table(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": ["x", "", "z"], "name": ["n", "m", None]})
    skipped = []
    assert list(read_corpus(file, on_skip=lambda *skip: skipped.append(skip))) == [("n", "x"), ("a.parquet:3", "z")]
    assert skipped == [("m", "is empty")]
    found = list(read_corpus(file, text_field="name", bad_rows="skip", on_skip=lambda *skip: skipped.append(skip)))
    assert found == [("a.parquet:1", "n"), ("a.parquet:2", "m")] and len(skipped) == 2


@pytest.mark.parametrize("rows, group", [(1, None), (1000, 300), (257, 1)])
def test_table_is_read_in_order_by_groups(tmp_path, rows, group):
    texts = [f"text {i}" for i in range(rows)]
    column = pa.array(texts).dictionary_encode() if group == 300 else pa.array(texts, pa.large_string())
    file = write_table(tmp_path / "a.parquet", {"text": column}, group)
    whole = list(read_corpus(file))
    assert whole == [(f"a.parquet:{i + 1}", text) for i, text in enumerate(texts)]
    for part_bytes in (1, file.stat().st_size // 3, file.stat().st_size):
        parts, found = read_parts(file, part_bytes)
        assert found == whole
    assert len(parts) == 1 and len(list_parts(file, part_bytes=1)) == (-(-rows // group) if group else 1)


def test_wrong_tables_are_named(tmp_path):
    file = write_table(tmp_path / "a.parquet", {"body": ["x"], "text": [3]})
    with pytest.raises(ValueError, match="a.parquet' row 1: `text` is a int, want a string"):
        list(read_corpus(file))
    with pytest.raises(ValueError, match=r"a.parquet' has no column `content` among \['body', 'text'\]"):
        list(read_corpus(file, text_field="content"))
    write_table(file, {"text": ["x" * 99] * 5000})
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.parquet' is not a whole Parquet file, want a whole file, or bad rows skipped"):
        list(read_corpus(file))
    (tmp_path / "b.txt").write_text("fine")
    skipped = []
    found = read_corpus(tmp_path, bad_rows="skip", on_skip=lambda *skip: skipped.append(skip))
    assert list(found) == [("b.txt", "fine")]
    assert skipped == [("a.parquet", "is not a whole Parquet file")]


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    file = write_table(tmp_path / "a.parquet", {"text": ["x"]})

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(extra.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"^read_corpus: 'pyarrow' is not installed, want `pip install dsv3\[data\]`$"):
        list(read_corpus(file))


# Parts


LINES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9), min_size=1, max_size=30)


@given(LINES, st.integers(1, 200), st.booleans())
def test_parts_of_json_lines_are_the_whole(tmp_path_factory, texts, part_bytes, last_newline):
    file = tmp_path_factory.mktemp("parts") / "rows.jsonl"
    data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n" * last_newline
    file.write_bytes(data.encode())
    parts, found = read_parts(file, part_bytes)
    assert [document.text for document in found] == [text for text in texts if text.strip()]
    assert sum(part.bytes for part in parts) == len(data.encode())
    assert len({document.name for document in found}) == len(found)
    if len(data.encode()) > part_bytes:
        assert len(parts) == -(-len(data.encode()) // part_bytes)
        places = [int(document.name.removeprefix("rows.jsonl@")) for document in found]
        starts = np.cumsum([0, *(len(line.encode()) + 1 for line in data.split("\n"))])
        assert set(places) <= set(starts.tolist())


@given(LINES, st.integers(1, 40))
def test_long_text_is_cut_between_lines(tmp_path_factory, lines, part_bytes):
    file = tmp_path_factory.mktemp("parts") / "book.txt"
    data = "\n".join(["begin", *lines]).replace("\ufeff", "").encode()
    file.write_bytes(data)
    blank = []
    found = read_parts(file, part_bytes, on_skip=lambda *skip: blank.append(skip))[1]
    assert {reason for _, reason in blank} <= {"is empty"}
    assert "".join("".join(d.text.split()) for d in found) == "".join(data.decode().split())
    if len(data) > part_bytes:
        for document in found:
            start = int(document.name.removeprefix("book.txt@"))
            assert data[start:].startswith(document.text.encode()) and data[:start][-1:] in (b"", b"\n")


def test_small_files_share_a_part_and_compressed_ones_stay_whole(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 100)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(1000).hex().encode()))
    whole = list(read_corpus(tmp_path))
    parts, found = read_parts(tmp_path, 250)
    assert found == whole and [len(part.pieces) for part in parts] == [3, 3, 3, 2]
    assert read_parts(tmp_path, 10**9) == ([list_parts(tmp_path)[0]], whole)
    assert read_parts(tmp_path, 60)[1] != whole  # these texts are longer than a part
    with pytest.raises(ValueError, match="list_parts: `part_bytes` is 0, want at least 1 or None"):
        list_parts(tmp_path, part_bytes=0)


@pytest.mark.parametrize("part_bytes", [1, 20, 31, 64, 1000])
def test_bad_row_in_a_later_part_has_its_line(tmp_path, part_bytes):
    rows = [b'{"text": "fine %d"}' % i for i in range(20)]
    rows[13] = b"{nonsense"
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(ValueError, match="rows.jsonl' line 14: not JSON"):
        read_parts(tmp_path / "rows.jsonl", part_bytes)


def test_a_row_with_a_zero_character_is_text(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "a\0b"}])
    assert list(read_corpus(tmp_path)) == [("a.jsonl:1", "a\0b")]
