"""The work folder of a preparation: what is there of a part is whole, and need not be made again.

    scan/<source>/00012/    train.zst heldout.zst   texts of the documents that passed the filters, back to back
                            index.npz               sizes, heldout, hashes, keys, signatures of them, in order
                            names.json              what they are called
                            part.json               counts, what was left out and why, seconds
    keep/<source>/00012.npy                         which of them stay when duplicates are gone
    shards/<split>/<source>/00003.json              entry of the manifest, lengths, seconds of a finished shard
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.data.extra import load_extra
from dsv3.data.manifest import write_files

SPLITS = ("train", "heldout")
_LEVEL = 1  # of zstd: fast


class Index(NamedTuple):
    """What is known of a part's stored documents, in order.

    Args:
      sizes: [D] int64, UTF-8 bytes.
      heldout: [D] bool.
      hashes: [D] uint64, see `document_hash`.
      keys: [D, 16] uint8, see `exact_key`.
      signatures: [D, P] uint32, see `minhash_signature`; P may be 0.
    """

    sizes: np.ndarray
    heldout: np.ndarray
    hashes: np.ndarray
    keys: np.ndarray
    signatures: np.ndarray


class PartFiles:
    """Stores the documents of a part; they appear with `result` when the context ends, or not at all.

    Args:
      work: the work folder. source, number: of the part.
      permutations: numbers of a signature.
    """

    def __init__(self, work: str | os.PathLike, source: str, number: int, permutations: int):
        self._target = scan_folder(work, source, number)
        self._part = self._target.with_name(f".{self._target.name}.{os.getpid()}")
        self._permutations = permutations
        self._rows: list[tuple[int, bool, int, bytes, np.ndarray | None]] = []
        self._names: list[str] = []
        self.result: dict[str, Any] = {}

    def __enter__(self) -> PartFiles:
        shutil.rmtree(self._part, ignore_errors=True)
        with self._named_errors():
            self._part.mkdir(parents=True)
            self._files = {split: open(self._part / f"{split}.zst", "wb") for split in SPLITS}
        zstd = load_extra("scan_part", "zstandard")
        compressors = {split: zstd.ZstdCompressor(level=_LEVEL) for split in SPLITS}
        self._streams = {split: c.stream_writer(self._files[split], closefd=False) for split, c in compressors.items()}
        return self

    def add(self, name: str, text: str, *, heldout: bool, digest: int, key: bytes, signature: np.ndarray | None) -> None:
        """Stores a document."""
        data = text.encode()
        with self._named_errors():
            self._streams[SPLITS[heldout]].write(data)
        self._rows.append((len(data), heldout, digest, key, signature))
        self._names.append(name)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                with self._named_errors():
                    self._finish()
        finally:
            for file in self._files.values():
                with contextlib.suppress(OSError):
                    file.close()
            shutil.rmtree(self._part, ignore_errors=True)

    def _finish(self) -> None:
        for split, file in self._files.items():
            self._streams[split].close()
            file.flush()
            os.fsync(file.fileno())
        buffer = io.BytesIO()
        np.savez(buffer, **_as_index(self._rows, self._permutations)._asdict())
        contents = {"index.npz": [buffer.getvalue()]}
        for name, content in (("names.json", self._names), ("part.json", self.result)):
            contents[name] = [json.dumps(content).encode()]
        write_files("scan_part", self._part, contents)
        with contextlib.suppress(OSError):  # there already, from a process that was given up: the same content
            os.rename(self._part, self._target)
        if not self._target.is_dir():
            os.rename(self._part, self._target)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = str(self._target.parent)
            raise OSError(error.errno, f"scan_part: cannot write to {place!r} ({os.strerror(error.errno or 5)})") from None


def scan_folder(work: str | os.PathLike, source: str, number: int) -> Path:
    """Returns the folder of a scanned part; where it is, the part is done."""
    return Path(work) / "scan" / source / f"{number:05d}"


def read_scan(work: str | os.PathLike, source: str, number: int) -> dict[str, Any]:
    """Returns the `part.json` of a scanned part."""
    return read_json(scan_folder(work, source, number) / "part.json")


def read_names(work: str | os.PathLike, source: str, number: int) -> list[str]:
    """Returns what the stored documents of a scanned part are called, in order."""
    return read_json(scan_folder(work, source, number) / "names.json")


def read_index(work: str | os.PathLike, source: str, number: int, *, signatures: bool = False) -> Index:
    """Returns what is known of a scanned part's stored documents; without `signatures` there are none of these, [D, 0]."""
    with np.load(scan_folder(work, source, number) / "index.npz") as arrays:
        found = {name: arrays[name] for name in Index._fields if signatures or name != "signatures"}
        return Index(**{"signatures": np.zeros((len(found["sizes"]), 0), np.uint32), **found})


def read_texts(work: str | os.PathLike, source: str, number: int, split: str) -> Iterator[str]:
    """Yields the stored texts of a scanned part that are in a split, duplicates among them.

    Raises:
      OSError: the file is cut off or damaged; it is named.
    """
    index, zstd = read_index(work, source, number), load_extra("read_texts", "zstandard")
    file = scan_folder(work, source, number) / f"{split}.zst"
    damaged = f"read_texts: {str(file)!r} is damaged, want its folder deleted, so that the part is scanned again"
    try:
        with zstd.open(file, "rb") as stream:
            for size in index.sizes[index.heldout == (split == "heldout")].tolist():
                data = stream.read(size)
                if len(data) != size:
                    raise OSError(f"{damaged} ({len(data)} bytes of a text of {size})")
                yield data.decode()
    except (zstd.ZstdError, UnicodeDecodeError) as error:
        raise OSError(f"{damaged} ({error})") from None


def write_keep(work: str | os.PathLike, source: str, number: int, keep: Sequence[bool]) -> None:
    """Writes which documents of a part stay, in the order of its index."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(keep, bool))
    write_files("write_keep", Path(work) / "keep" / source, {f"{number:05d}.npy": [buffer.getvalue()]})


def read_keep(work: str | os.PathLike, source: str, number: int) -> np.ndarray:
    """Returns which documents of a part stay, [D] bool."""
    return np.load(Path(work) / "keep" / source / f"{number:05d}.npy")


def shard_file(work: str | os.PathLike, split: str, source: str, number: int) -> Path:
    """Returns where a finished shard's entry is; where it is, the shard is done."""
    return Path(work) / "shards" / split / source / f"{number:05d}.json"


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a JSON file in one step, in ASCII: names of files need not be Unicode."""
    path = Path(path)
    write_files("write_json", path.parent, {path.name: [json.dumps(content, indent=1).encode(), b"\n"]})


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file that `write_json` wrote."""
    return json.loads(Path(path).read_bytes())


def remove_unfinished(work: str | os.PathLike) -> None:
    """Removes what killed processes have left half-written: everything with a hidden name."""
    for folder, folders, names in os.walk(work):
        for name in [name for name in folders if name.startswith(".")]:
            shutil.rmtree(Path(folder, name), ignore_errors=True)
            folders.remove(name)
        for name in names:
            if name.startswith("."):
                Path(folder, name).unlink(missing_ok=True)


def _as_index(rows: list[tuple[int, bool, int, bytes, np.ndarray | None]], permutations: int) -> Index:
    sizes, heldout, hashes, keys, signatures = zip(*rows) if rows else ((),) * 5
    stacked = np.stack(signatures) if rows and permutations else np.zeros((len(rows), 0))
    return Index(
        np.array(sizes, np.int64), np.array(heldout, bool), np.array(hashes, np.uint64),
        np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), stacked.astype(np.uint32),
    )  # fmt: skip
