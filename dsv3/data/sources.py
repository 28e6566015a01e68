"""Where text comes from: files and folders of text, JSON lines and Parquet, streamed, and cut in parts for processes.

    for document in read_corpus("texts/"): ...                      # all of it, in order
    parts = list_parts("texts/", part_bytes=2**26)                  # or in parts of about 64 MiB,
    documents = (d for part in parts for d in read_part("texts/", part))   # which processes read side by side

Nothing is held but the document, line or batch of rows that is being read.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dsv3.checks import check, check_choice
from dsv3.data.corpus import Document
from dsv3.data.decompress import COMPRESSED, open_binary, plain_suffix
from dsv3.data.extra import load_extra

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .jsonl .csv .tsv .html .htm .css .xml .yaml .yml .toml "
    ".ini .cfg .py .pyi .pyx .c .h .cc .cpp .hpp .cu .cs .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php "
    ".pl .lua .r .jl .hs .ml .fs .ex .erl .clj .lisp .el .swift .m .sql .sh .bash .zsh .bat .f90".split()
)
TABLE = ".parquet"
ROWS = 256  # of a Parquet file that are held at a time
BLOCK = 1 << 20  # bytes that are read at a time

OnSkip = Callable[[str, str], None]


class Piece(NamedTuple):
    """A file or a run of it.

    Args:
      name: path below the corpus's folder, with /; empty where the corpus is a single file.
      start: first byte of a run of lines, first row group of a Parquet file.
      stop: the byte or row group after the last; None: to the end. A line belongs to the run that its first byte is in.
      bytes: size in the file.
    """

    name: str
    start: int
    stop: int | None
    bytes: int


class Part(NamedTuple):
    """What one process reads at a time: pieces in order, and their bytes together."""

    pieces: tuple[Piece, ...]
    bytes: int


class NotTextError(Exception):
    """A file does not hold what its name says; the message goes on after the file's name."""


class NotWholeError(Exception):
    """A compressed or Parquet file ends too early or is damaged, perhaps behind rows that were read; message as above."""


class _BadRow(NamedTuple):
    """A row without a document: its document's name, its number in the piece, and what is wrong."""

    name: str
    row: int
    reason: str


def read_corpus(
    path: str | os.PathLike, *, text_field: str = "text", bad_rows: str = "raise", on_skip: OnSkip | None = None
) -> Iterator[Document]:
    """Reads the documents of a text file, a JSON-lines or Parquet file, or a folder of such files.

    A `.jsonl` file has one object a line with a text field and, if it likes, `path` or `name`; so have the rows of a
    `.parquet` file as columns. Any other file is one document in UTF-8. Text and JSON lines may be compressed (`.jsonl.gz`,
    `.txt.bz2`, `.xz`, `.zst`). A folder is walked in sorted order; hidden entries and suffixes other than `TEXT_SUFFIXES`
    and `.parquet` are no part of it. Newlines stay.

    Args:
      path: a file or a folder.
      text_field: field or column that holds the text.
      bad_rows: "raise" ends with an error at a row without text, and where a compressed or Parquet file is cut off or
        damaged; "skip" reports it and goes on.
      on_skip: called as `on_skip(name, reason)` for each file of a folder that is not UTF-8 text, each empty document, and
        what `bad_rows` skips. Without it one warning at the end says how many there were.

    Returns:
      An iterator of documents. The path is checked at once, the contents as they are read.

    Raises:
      FileNotFoundError: the path does not exist.
      OSError: a file cannot be read; it is named, and never skipped: what is read does not depend on a passing error.
      ValueError: no document at all; a bad row, named by file and line or row; a file that is not whole; a single file that
        is not UTF-8 text; a package that the format needs is missing.
    """
    check_choice("read_corpus", "bad_rows", bad_rows, ("raise", "skip"))
    return _read_all(Path(path), list_parts(path)[0], text_field, bad_rows, on_skip)


def list_parts(path: str | os.PathLike, *, part_bytes: int | None = None) -> list[Part]:
    """Cuts a corpus in parts, without reading its text: by files, and large files by lines or row groups.

    Small files are put together, files of text or JSON lines that have more than `part_bytes` bytes are cut between lines
    (a long text becomes several documents), Parquet files between row groups. A compressed file stays whole.

    Args:
      path: a file or a folder.
      part_bytes: a part ends where it has so many bytes; None: everything is one part, no file is cut.

    Returns:
      The parts, in the order of `read_corpus`: their documents joined are its documents (but for long texts, see above).

    Raises:
      FileNotFoundError: the path does not exist.
      OSError: a file cannot be looked at.
      ValueError: a folder without text files, or `part_bytes` below 1.
    """
    check(part_bytes is None or part_bytes >= 1, f"list_parts: `part_bytes` is {part_bytes}, want at least 1 or None")
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"read_corpus: {str(root)!r} does not exist, want a file or a folder")
    files = _folder_files(root) if root.is_dir() else [root]
    check(bool(files), f"read_corpus: empty corpus: {str(root)!r} has no text file (.txt, .jsonl, ...)")
    parts: list[Part] = []
    pieces, size = [], 0
    for piece in (piece for file in files for piece in _cut_file(root, file, part_bytes)):
        pieces.append(piece)
        size += piece.bytes
        if part_bytes is not None and size >= part_bytes:
            parts.append(Part(tuple(pieces), size))
            pieces, size = [], 0
    return parts + ([Part(tuple(pieces), size)] if pieces else [])


def read_part(
    path: str | os.PathLike, part: Part, *, text_field: str = "text", bad_rows: str = "raise", on_skip: OnSkip | None = None
) -> Iterator[Document]:
    """Reads the documents of one part of a corpus.

    A row without `path` or `name` is called `file.jsonl:12` by its line, and by its first byte, `file.jsonl@4096`, where the
    file was cut: the lines before it are not looked at.

    Args:
      path: the corpus's file or folder.
      part: one of its `list_parts`.
      text_field, bad_rows, on_skip: see `read_corpus`; what is skipped is not told without `on_skip`.

    Returns:
      An iterator of documents, none of them empty; there may be none.

    Raises:
      OSError, ValueError: as `read_corpus`.
    """
    check_choice("read_part", "bad_rows", bad_rows, ("raise", "skip"))
    return _read_part(Path(path), part, text_field, bad_rows, on_skip or (lambda name, reason: None))


def decode_text(data: bytes) -> str:
    """Decodes UTF-8 without a byte order mark; `NotTextError` for anything else."""
    if b"\0" in data:
        raise NotTextError(f"is binary (a zero byte at {data.index(0)})")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"is not UTF-8 (byte {error.start})") from None


def _read_all(root: Path, part: Part, text_field: str, bad_rows: str, on_skip: OnSkip | None) -> Iterator[Document]:
    """Yields the documents of all files, tells of what was skipped, and refuses to end with none."""
    skipped: list[tuple[str, str]] = []
    count = 0

    def skip(name: str, reason: str) -> None:
        skipped.append((name, reason))
        if on_skip is not None:
            on_skip(name, reason)

    for document in _read_part(root, part, text_field, bad_rows, skip):
        count += 1
        yield document
    check(count > 0, f"read_corpus: empty corpus: {str(root)!r} has no document with text ({len(skipped)} skipped)")
    if skipped and on_skip is None:
        skips = f"skipped {len(skipped)} in {str(root)!r}, the first: {' '.join(skipped[0])}"
        warnings.warn(f"read_corpus: {skips}", stacklevel=2)


def _read_part(root: Path, part: Part, text_field: str, bad_rows: str, skip: OnSkip) -> Iterator[Document]:
    """Yields the documents of a part and reports the rest."""
    for piece in part.pieces:
        file, name = (root / piece.name, piece.name) if piece.name else (root, root.name)
        try:
            for found in _piece_documents(file, name, piece, text_field):
                if isinstance(found, _BadRow):
                    if bad_rows == "raise":
                        raise ValueError(f"read_corpus: {str(file)!r} {_place(file, piece, found)}: {found.reason}")
                    skip(found.name, found.reason)
                elif found.text.strip():
                    yield found
                else:
                    skip(found.name, "is empty")
        except NotTextError as error:
            check(bool(piece.name), f"read_corpus: {str(file)!r} {error}, want UTF-8 text")
            skip(name, str(error))
        except NotWholeError as error:
            check(bad_rows == "skip", f"read_corpus: {str(file)!r} {error}, want a whole file, or bad rows skipped")
            skip(name, str(error))


def _folder_files(root: Path) -> list[Path]:
    """Lists the files of a folder that look like text, sorted by the parts of their paths."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        texts = (n for n in names if not n.startswith(".") and (plain_suffix(n) in TEXT_SUFFIXES or _is_table(n)))
        found += [Path(folder, name) for name in texts]
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _is_table(name: str) -> bool:
    return name.lower().endswith(TABLE)


def _cut_file(root: Path, file: Path, part_bytes: int | None) -> Iterator[Piece]:
    """The pieces of one file."""
    name = file.relative_to(root).as_posix() if file != root else ""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from None
    if part_bytes is None or size <= part_bytes or file.suffix.lower() in COMPRESSED:
        yield Piece(name, 0, None, size)
    elif _is_table(file.name):
        yield from _cut_table(file, name, size, part_bytes)
    else:
        for start in range(0, size, part_bytes):
            stop = min(start + part_bytes, size)
            yield Piece(name, start, stop, stop - start)


def _cut_table(file: Path, name: str, size: int, part_bytes: int) -> Iterator[Piece]:
    """Pieces of a Parquet file: runs of row groups of about `part_bytes` in the file."""
    try:
        with _open_table(file) as table:
            groups = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
    except NotWholeError:  # reading it will tell why
        groups = []
    if len(groups) < 2:
        yield Piece(name, 0, None, size)
        return
    scale, start, bytes_ = size / max(1, sum(groups)), 0, 0  # sizes of groups are those before compression
    for i, group in enumerate(groups, 1):
        bytes_ += round(group * scale)
        if bytes_ >= part_bytes or i == len(groups):
            yield Piece(name, start, i, bytes_)
            start, bytes_ = i, 0


def _piece_documents(file: Path, name: str, piece: Piece, text_field: str) -> Iterator[Document | _BadRow]:
    """Yields the rows of a table or of JSON lines, or any other file as one document."""
    if _is_table(file.name):
        yield from _table_documents(file, name, piece, text_field)
        return
    cut = bool(piece.start) or piece.stop is not None
    try:
        with open_binary(file, "read_corpus") as stream:
            lines = _lines(stream, piece.start, piece.stop) if cut else _numbered(stream)
            if plain_suffix(file.name) == ".jsonl":
                for number, (place, line) in enumerate(lines, 1):
                    if line.strip():
                        yield _json_document(f"{name}@{place}" if cut else f"{name}:{number}", number, line, text_field)
            elif cut:
                found = list(lines)
                if found:
                    yield Document(f"{name}@{found[0][0]}", decode_text(b"".join(line for _, line in found)))
            else:
                yield Document(name, decode_text(stream.read()))
    except OSError as error:
        raise _unreadable(file, error) from None
    except EOFError as error:
        raise NotWholeError(f"is not a whole {COMPRESSED[file.suffix.lower()]} file ({error})") from None


def _unreadable(file: Path, error: OSError) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(error.errno or errno.EIO, f"read_corpus: cannot read {str(file)!r} ({reason})")


def _numbered(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    return zip(itertools.repeat(0), stream)


def _lines(stream: BinaryIO, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yields (first byte, line) of the lines that begin from `start` and before `stop`."""
    place = start
    if start:
        stream.seek(start - 1)
        place += len(stream.readline()) - 1  # the rest of a line that began before, or the end of it
    while stop is None or place < stop:
        line = stream.readline()
        if not line:
            return
        yield place, line
        place += len(line)


def _json_document(name: str, number: int, line: bytes, text_field: str) -> Document | _BadRow:
    """The document of one row, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return _BadRow(name, number, f"not JSON ({error})")
    if not isinstance(row, dict):
        return _BadRow(name, number, f"a {type(row).__name__}, want an object with a `{text_field}` field")
    if text_field not in row:
        return _BadRow(name, number, f"no `{text_field}` field among {sorted(row)}")
    return _row_document(name, number, row, text_field)


def _row_document(name: str, number: int, row: dict[str, Any], text_field: str) -> Document | _BadRow:
    text = row[text_field]
    if not isinstance(text, str):
        return _BadRow(name, number, f"`{text_field}` is a {type(text).__name__}, want a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _BadRow(name, number, f"`{text_field}` has a lone surrogate at {error.start}")
    given = [row[key] for key in ("path", "name") if key != text_field and isinstance(row.get(key), str) and row[key]]
    return Document(given[0] if given else name, text)


def _table_documents(file: Path, name: str, piece: Piece, text_field: str) -> Iterator[Document | _BadRow]:
    """Yields the rows of a Parquet file's row groups."""
    with _open_table(file) as table:
        fields = table.schema_arrow.names
        check(text_field in fields, f"read_corpus: {str(file)!r} has no column `{text_field}` among {sorted(fields)}")
        groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
        number = sum(table.metadata.row_group(i).num_rows for i in range(piece.start))
        columns = [field for field in dict.fromkeys((text_field, "path", "name")) if field in fields]
        try:
            for batch in table.iter_batches(batch_size=ROWS, row_groups=list(groups), columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _row_document(f"{name}:{number}", number, row, text_field)
        except UnicodeDecodeError:
            raise NotTextError(f"is not UTF-8 (behind row {number})") from None
        except (OSError, load_extra("read_corpus", "pyarrow").ArrowException) as error:
            raise _table_error(file, error, f" (behind row {number})") from None


def _open_table(file: Path):
    """Opens a Parquet file."""
    arrow, parquet = load_extra("read_corpus", "pyarrow"), load_extra("read_corpus", "pyarrow.parquet")
    try:
        return parquet.ParquetFile(file)
    except (OSError, arrow.ArrowException) as error:
        raise _table_error(file, error) from None


def _table_error(file: Path, error: Exception, place: str = "") -> Exception:
    """An error of the system has a number; without one the content is at fault."""
    if isinstance(error, OSError) and error.errno:
        return _unreadable(file, error)
    return NotWholeError(f"is not a whole Parquet file{place}")


def _place(file: Path, piece: Piece, bad: _BadRow) -> str:
    """Where a bad row is in its file."""
    if _is_table(file.name):
        return f"row {bad.row}"
    with open_binary(file, "read_corpus") as stream:  # the lines before a piece are counted now, that there is an error
        left, before = piece.start, 0
        while left > 0 and (data := stream.read(min(left, BLOCK))):
            before, left = before + data.count(b"\n"), left - len(data)
        if piece.start:
            stream.seek(piece.start - 1)
            before += stream.read(1) != b"\n"  # the line that the piece begins in belongs to the one before
    return f"line {before + bad.row}"
