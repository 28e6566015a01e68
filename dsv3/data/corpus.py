"""Documents: where text comes from, and which of it is held out.

A corpus is an iterable of `Document(name, text)`. It comes from files (`read_corpus`) or, with nothing to
download, from the running interpreter itself (`embedded.py`). `split_documents` decides by a hash of each
text which documents are never trained on, so that the same text is on the same side in every run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .jsonl .csv .tsv .html .htm .css .xml .yaml .yml .toml "
    ".ini .cfg .py .pyi .pyx .c .h .cc .cpp .hpp .cu .cs .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php "
    ".pl .lua .r .jl .hs .ml .fs .ex .erl .clj .lisp .el .swift .m .sql .sh .bash .zsh .bat .f90".split()
)


class Document(NamedTuple):
    """One text and what to call it.

    Args:
      name: where it comes from: a relative path, a row's own `path` or `name`, or `file.jsonl:12`.
      text: the whole text, valid Unicode (no lone surrogates).
    """

    name: str
    text: str


class CorpusStats(NamedTuple):
    """Size of a corpus: documents, characters, UTF-8 bytes, and the bytes of the longest document."""

    documents: int
    characters: int
    bytes: int
    longest: int


class NotTextError(Exception):
    """A file does not hold UTF-8 text; the message goes on after the file's name."""


def read_corpus(
    path: str | os.PathLike, *, on_skip: Callable[[str, str], None] | None = None
) -> Iterator[Document]:
    """Reads the documents of a text file, a JSON-lines file or a folder of such files.

    A `.jsonl` file has one object a line with a `text` field and, if it likes, `path` or `name`; any other
    file is one document in UTF-8. Either may be gzipped (`.jsonl.gz`, `.txt.gz`). A folder is walked in
    sorted order; hidden entries and suffixes other than `TEXT_SUFFIXES` are no part of it. Newlines stay.

    Args:
      path: a file or a folder.
      on_skip: called as `on_skip(name, reason)` for each file of a folder that is not UTF-8 text, and for
        each empty document. Without it one warning at the end says how many were skipped.

    Returns:
      An iterator of documents. The path is checked at once, the contents as they are read.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: no document at all; a bad row, named by file and line; a single file that is not UTF-8 text.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"read_corpus: {str(root)!r} does not exist, want a file or a folder")
    files = _folder_files(root) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"read_corpus: empty corpus: {str(root)!r} has no text file (.txt, .jsonl, ...)")
    return _read_files(root, files, on_skip)


def chunk_documents(documents: Iterable[Document], max_chars: int = 65536) -> Iterator[Document]:
    """Cuts long documents at line ends, so that a part of a single book can be held out.

    Args:
      documents: the documents.
      max_chars: most characters of a piece; a line longer than that is cut inside.

    Returns:
      An iterator of documents; pieces are named `name#0`, `name#1`, ... and joined give the text back.

    Raises:
      ValueError: `max_chars` below 1.

    >>> [piece.text for piece in chunk_documents([Document("a", "one\\ntwo\\n")], max_chars=5)]
    ['one\\n', 'two\\n']
    """
    if max_chars < 1:
        raise ValueError(f"chunk_documents: `max_chars` is {max_chars}, want at least 1")
    return _chunks(documents, max_chars)


def split_documents(
    documents: Iterable[Document], heldout: float = 0.02, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and held-out ones by a hash of their text, and drops exact duplicates.

    A document is held out when SHA-256(seed, text), read as a number in [0, 1), is below `heldout`: where it
    goes depends on nothing but its text and the seed. If that leaves a side empty, the document nearest to
    the border changes sides. A single distinct document is for training (see `chunk_documents`).

    Args:
      documents: the documents; of equal texts the first stays.
      heldout: expected share of the documents that is held out, above 0 and below 1.
      seed: another seed, another split.

    Returns:
      (training documents, held-out documents), each in the given order.

    Raises:
      ValueError: `heldout` is not within (0, 1), or there are no documents.

    >>> train, held = split_documents([Document("a", "x"), Document("b", "y"), Document("c", "x")])
    >>> len(train), len(held)
    (1, 1)
    """
    if not 0.0 < heldout < 1.0:
        raise ValueError(f"split_documents: `heldout` is {heldout}, want a share above 0 and below 1")
    unique: dict[bytes, tuple[float, Document]] = {}
    for document in documents:
        digest = hashlib.sha256(b"%d\0" % seed + document.text.encode()).digest()
        unique.setdefault(digest, (int.from_bytes(digest[:8], "big") / 2.0**64, document))
    if not unique:
        raise ValueError("split_documents: empty corpus: no documents to split")
    places = sorted(place for place, _ in unique.values())
    # Held out is what lies below the border: with several documents at least the first and never the last.
    border = min(max(heldout, places[1]), places[-1]) if len(places) > 1 else 0.0
    train = [document for place, document in unique.values() if place >= border]
    return train, [document for place, document in unique.values() if place < border]


def corpus_stats(documents: Iterable[Document]) -> CorpusStats:
    """Counts documents, characters and UTF-8 bytes.

    Args:
      documents: the documents; an iterator is used up.

    Returns:
      `CorpusStats(documents, characters, bytes, longest)`.

    >>> corpus_stats([Document("a", "one"), Document("b", "\u00e9")])
    CorpusStats(documents=2, characters=4, bytes=5, longest=3)
    """
    count = characters = total = longest = 0
    for document in documents:
        size = len(document.text.encode())
        count, characters, total = count + 1, characters + len(document.text), total + size
        longest = max(longest, size)
    return CorpusStats(count, characters, total, longest)


def decode_text(data: bytes) -> str:
    """Decodes UTF-8 without a byte order mark; `NotTextError` for anything else."""
    if b"\0" in data:
        raise NotTextError(f"is binary (a zero byte at {data.index(0)})")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"is not UTF-8 (byte {error.start})") from None


def _folder_files(root: Path) -> list[Path]:
    """Lists the files of a folder that look like text, sorted by the parts of their paths."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        texts = (name for name in names if not name.startswith(".") and _plain_suffix(name) in TEXT_SUFFIXES)
        found += [Path(folder, name) for name in texts]
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _plain_suffix(name: str) -> str:
    """The suffix in small letters; of `a.jsonl.gz` that is `.jsonl`."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _read_files(
    root: Path, files: list[Path], on_skip: Callable[[str, str], None] | None
) -> Iterator[Document]:
    """Yields the documents of `files`, reports what is skipped, and refuses to end with none."""
    skipped: list[tuple[str, str]] = []
    count = 0

    def skip(name: str, reason: str) -> None:
        skipped.append((name, reason))
        if on_skip is not None:
            on_skip(name, reason)

    for file in files:
        name = file.relative_to(root).as_posix() if file != root else file.name
        try:
            for document in _file_documents(file, name):
                if document.text.strip():
                    count += 1
                    yield document
                else:
                    skip(document.name, "is empty")
        except NotTextError as error:
            if file == root:
                raise ValueError(f"read_corpus: {str(file)!r} {error}, want UTF-8 text") from None
            skip(name, str(error))
    if not count:
        empty = f"{str(root)!r} has no document with text ({len(skipped)} skipped)"
        raise ValueError(f"read_corpus: empty corpus: {empty}")
    if skipped and on_skip is None:
        skips = f"skipped {len(skipped)} in {str(root)!r}, the first: {' '.join(skipped[0])}"
        warnings.warn(f"read_corpus: {skips}", stacklevel=3)


def _file_documents(file: Path, name: str) -> Iterator[Document]:
    """Yields the rows of a JSON-lines file, or any other file as one document."""
    zipped = file.name.lower().endswith(".gz")
    try:
        with gzip.open(file) if zipped else open(file, "rb") as stream:
            if _plain_suffix(file.name) != ".jsonl":
                yield Document(name, decode_text(stream.read()))
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"read_corpus: {str(file)!r} line {number}:"
                    yield _json_document(where, f"{name}:{number}", line)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise NotTextError("is not a whole gzip file") from None
    except OSError as error:
        raise NotTextError(f"cannot be read ({error.strerror})") from None


def _json_document(where: str, name: str, line: bytes) -> Document:
    """The document of one row; a row that is none is refused, with `where` as the head of the message."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} a {type(row).__name__}, want an object with a `text` field")
    if "text" not in row:
        raise ValueError(f"{where} no `text` field among {sorted(row)}")
    text = row["text"]
    if not isinstance(text, str):
        raise ValueError(f"{where} `text` is a {type(text).__name__}, want a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} `text` has a lone surrogate at {error.start}") from None
    given = [row[key] for key in ("path", "name") if isinstance(row.get(key), str) and row[key]]
    return Document(given[0] if given else name, text)


def _chunks(documents: Iterable[Document], max_chars: int) -> Iterator[Document]:
    for document in documents:
        text, start, number = document.text, 0, 0
        if len(text) <= max_chars:
            yield document
            continue
        while start < len(text):
            stop = min(start + max_chars, len(text))
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            yield Document(f"{document.name}#{number}", text[start:stop])
            start, number = stop, number + 1
