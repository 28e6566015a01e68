"""The second step of preparing a corpus, in one process: which of the stored documents of all sources stay."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dsv3.data.dedup import Match, find_duplicates
from dsv3.data.work import SPLITS, read_index, read_names, read_texts, write_keep

EXAMPLES = {"exact": 5, "near": 15}  # pairs that are shown
_SHOWN = 160  # characters of each
_GROUPS = 10  # sizes that are told


def drop_duplicates(
    work: str | os.PathLike, parts: Mapping[str, int], *, threshold: float, on_part: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Decides which stored documents stay, and writes that beside each part.

    Documents of all sources and both splits are compared, in the order of sources, parts and documents, see
    `find_duplicates`. Of those that stay no two are near, whichever split each is in: no near copy of a held-out document
    remains in the training text, but for those that MinHash does not find.

    Args:
      work: the work folder, with all parts scanned.
      parts: source → how many it has.
      threshold: similarity from which on documents are near.
      on_part: called after each part.

    Returns:
      "documents": how many were compared; "dropped": source → kind → [documents, bytes]; "crossing": how many of them lay in
      another split than the one that stays; "groups": how many documents that stay have duplicates; "largest": the sizes of
      the largest groups; "examples": some pairs, by source, name, split and the beginning of the text.

    Raises:
      ValueError: datasketch is not installed, or too few permutations for the threshold.
      OSError: the disk is full or cannot be written.
    """
    found = _Found()
    matches = find_duplicates(_documents(work, parts), threshold=threshold)
    for source, count in parts.items():
        for number in range(count):
            index = read_index(work, source, number)
            found.begin(source, number, index.heldout)
            keep = np.ones(len(index.sizes), bool)
            for row, size in enumerate(index.sizes.tolist()):
                match = next(matches)
                if match is not None:
                    keep[row] = False
                    found.add(source, number, row, size, match)
            write_keep(work, source, number, keep)
            if on_part is not None:
                on_part()
    return found.summary(work, list(parts))


class _Found:
    """What is counted on the way."""

    def __init__(self) -> None:
        self._starts = [0]  # number of the first document of each part
        self._places: list[tuple[str, int]] = []
        self._heldout: list[np.ndarray] = []
        self._dropped: dict[str, dict[str, list[int]]] = {}
        self._groups: Counter[int] = Counter()
        self._crossing = 0
        self._pairs: list[tuple[Match, tuple[str, int, int]]] = []

    def begin(self, source: str, number: int, heldout: np.ndarray) -> None:
        self._places.append((source, number))
        self._heldout.append(heldout)
        self._starts.append(self._starts[-1] + len(heldout))

    def add(self, source: str, number: int, row: int, size: int, match: Match) -> None:
        total = self._dropped.setdefault(source, {}).setdefault(match.kind, [0, 0])
        total[0] += 1
        total[1] += size
        new = match.first not in self._groups
        self._groups[match.first] += 1
        part, first = self._place(match.first)
        self._crossing += bool(self._heldout[part][first] != self._heldout[-1][row])
        if new and sum(m.kind == match.kind for m, _ in self._pairs) < EXAMPLES[match.kind]:
            self._pairs.append((match, (source, number, row)))

    def summary(self, work: str | os.PathLike, sources: list[str]) -> dict[str, Any]:
        examples = []
        for match, dropped in self._pairs:
            part, row = self._place(match.first)
            kept = (*self._places[part], row)
            pair = {"kept": _describe(work, *kept), "dropped": _describe(work, *dropped)}
            examples.append({"kind": match.kind, "similarity": match.similarity, **pair})
        return {
            "documents": self._starts[-1],
            "dropped": {source: self._dropped.get(source, {}) for source in sources},
            "crossing": self._crossing,
            "groups": len(self._groups),
            "largest": [count + 1 for _, count in self._groups.most_common(_GROUPS)],
            "examples": examples,
        }

    def _place(self, document: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, document, side="right")) - 1
        return part, document - self._starts[part]


def _documents(work: str | os.PathLike, parts: Mapping[str, int]) -> Iterator[tuple[bytes, np.ndarray | None]]:
    for source, count in parts.items():
        for number in range(count):
            index = read_index(work, source, number, signatures=True)
            signed = index.signatures.shape[1] > 0
            for key, signature in zip(index.keys, index.signatures):
                yield key.tobytes(), signature if signed else None


def _describe(work: str | os.PathLike, source: str, number: int, row: int) -> dict[str, str]:
    """A document as examples show it."""
    heldout = read_index(work, source, number).heldout
    split = SPLITS[int(heldout[row])]
    before = int((heldout[:row] == heldout[row]).sum())
    text = next(text for i, text in enumerate(read_texts(work, source, number, split)) if i == before)
    name = read_names(work, source, number)[row]
    return {"source": source, "name": name, "split": split, "text": text[:_SHOWN]}
