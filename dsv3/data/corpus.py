"""Documents: where text comes from, and which of it is held out.

A corpus is an iterable of `Document(name, text)`. It comes from files (`sources.py`) or, with nothing to download, from
the running interpreter itself (`embedded.py`). `split_documents` decides by a hash of each text which documents are never
trained on, so that the same text is on the same side in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple


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


def heldout_place(text: str, seed: int = 0) -> float:
    """Where a text lies between 0 and 1: below the share that is held out, it is held out.

    SHA-256(seed, text), its first 8 bytes / 2**64

    Args:
      text: the document's text.
      seed: another seed, another split.

    Returns:
      A number from 0 to 1 that depends on nothing else.

    >>> 0 <= heldout_place("to be or not to be") < 1
    True
    """
    return int.from_bytes(hashlib.sha256(b"%d\0" % seed + text.encode()).digest()[:8], "big") / 2.0**64


def split_documents(
    documents: Iterable[Document], heldout: float = 0.02, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and held-out ones by a hash of their text, and drops exact duplicates.

    A document is held out when its `heldout_place` is below `heldout`: where it goes depends on nothing but its text and
    the seed. If that leaves a side empty, the document nearest to
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
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in unique:
            unique[digest] = (heldout_place(document.text, seed), document)
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
