"""The file format: agreement with the safetensors package, and damaged headers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from dsv3.io.problems import MAX_LINES, Problems
from dsv3.io.safetensors_files import DTYPES, encode_header, read_header
from tests.io.checkpoints import HF_NAMES, write_raw


def test_reads_what_the_package_writes(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}
    tensors["c"] = np.zeros((0, 4), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert set(header) == set(tensors)
    for name, value in tensors.items():
        stored = header[name]
        assert (stored.dtype, stored.shape, stored.size) == (HF_NAMES[value.dtype], value.shape, value.nbytes)
        assert data[stored.start : stored.start + stored.size] == value.tobytes()


def test_the_package_reads_what_is_written(tmp_path):
    entries = [("b", "F32", (2, 3)), ("ä", "BF16", (4,)), ("c", "F8_E4M3", (3, 1)), ("s", "F8_E8M0", (1, 1))]
    header, starts = encode_header(entries)
    size = len(header) + sum(np.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in entries)
    (tmp_path / "x.safetensors").write_bytes(header.ljust(size, b"\0"))
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        found = {(name, file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in file.keys()}
    assert found == set(entries)
    assert len(header) % 8 == 0 and starts["b"] == len(header) and starts["ä"] == len(header) + 24
    assert {name: stored.start for name, stored in read_header(tmp_path / "x.safetensors").items()} == starts


def damage(path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"F32"', b'"BF1"', None),  # unknown dtypes are listed, not read
        (b"[2, 3]", b"[2, 4]", "bad header: ValueError: F32 .2, 4. in 24 bytes"),
        (b"[2, 3]", b"[-2,3]", "bad header: ValueError: shape"),
        (b"[2, 3]", b"[2,3.]", "bad header: JSONDecodeError"),
        (b"[2, 3]", b'["2,"]', "bad header: ValueError: shape"),
        (b"[24, 34]", b"[20, 30]", "bad header: b starts at byte .*, want"),
        (b"[24, 34]", b"[34, 24]", "bad header: ValueError: shape"),
        (b"[24, 34]", b"[24, 3] ", "bad header: ValueError: shape"),
        (b'"shape"', b'"shope"', "bad header: KeyError: 'shape'"),
        (b'{"dtype"', b'["dtype"', "bad header: JSONDecodeError"),
    ],
)
def test_damaged_header_is_named(tmp_path, old, new, message):
    path = tmp_path / "x.safetensors"
    write_raw(path, {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float16)})
    damage(path, old, new)
    if message is None:
        assert read_header(path)["a"].dtype == "BF1"
        return
    with pytest.raises(ValueError, match=f"x.safetensors has a {message}"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 5, 8, 30, -1])
def test_cut_off_file_is_named(tmp_path, size):
    path = tmp_path / "x.safetensors"
    write_raw(path, {"a": np.zeros((2, 3), np.float32)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"x.safetensors .*cut off"):
        read_header(path)


def test_file_with_more_than_its_header_says_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_raw(path, {"a": np.zeros((2, 3), np.float32)})
    path.write_bytes(path.read_bytes() + b"12")
    with pytest.raises(ValueError, match="x.safetensors is too long: it has .* bytes, its header accounts for"):
        read_header(path)


def test_other_json_is_no_header(tmp_path):
    text = json.dumps([1, 2]).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="x.safetensors has a bad header"):
        read_header(tmp_path / "x.safetensors")


def test_problems_are_one_error_of_bounded_length():
    problems = Problems("f", "dir")
    problems.raise_if_any()
    assert not problems
    for i in range(100):
        problems.add("missing", f"m{i}")
    for i in range(3):
        problems.add("unexpected", f"u{i}")
    with pytest.raises(ValueError) as e:
        problems.raise_if_any()
    first, *lines = str(e.value).split("\n")
    assert first == "f: dir: 100 missing, 3 unexpected"
    assert [line for line in lines if "unexpected" in line] == [f"  unexpected: u{i}" for i in range(3)]
    assert lines[-1] == f"  missing: and {100 - (MAX_LINES - 3)} more" and len(lines) == MAX_LINES + 1
