"""What stages of work cost: CPU seconds of this process, whatever else the machine does, and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dsv3.data.corpus import Document

Totals = dict[str, dict[str, float]]


class Clock:
    """Adds up seconds and bytes by stage.

    >>> clock = Clock()
    >>> clock.run("clean", 3, str.upper, "abc"), clock.totals()["clean"]["bytes"]
    ('ABC', 3)
    """

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}

    def run(self, stage: str, size: int, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Calls a function and adds what it takes, and `size` bytes, to a stage; returns what it returns."""
        start = time.process_time()
        result = function(*arguments, **options)
        self.add(stage, time.process_time() - start, size)
        return result

    def add(self, stage: str, seconds: float, size: int) -> None:
        """Adds what was measured elsewhere."""
        total = self._totals.setdefault(stage, [0.0, 0])
        total[0] += seconds
        total[1] += size

    def each(self, stage: str, documents: Iterable[Document]) -> Iterator[Document]:
        """Yields documents; what making them takes, and their bytes, are added to a stage."""
        documents = iter(documents)
        while (document := self.run(stage, 0, next, documents, None)) is not None:
            self.add(stage, 0.0, len(document.text.encode()))
            yield document

    def totals(self) -> Totals:
        """Returns `{stage: {"seconds", "bytes"}}`."""
        return {stage: {"seconds": round(seconds, 6), "bytes": int(size)} for stage, (seconds, size) in self._totals.items()}


def add_totals(parts: Iterable[Mapping[str, Mapping[str, float]]]) -> Totals:
    """Adds what several clocks measured.

    >>> add_totals([{"a": {"seconds": 1.0, "bytes": 2}}, {"a": {"seconds": 0.5, "bytes": 1}}])
    {'a': {'seconds': 1.5, 'bytes': 3}}
    """
    totals: Totals = {}
    for part in parts:
        for stage, values in part.items():
            total = totals.setdefault(stage, {"seconds": 0.0, "bytes": 0})
            for name in total:
                total[name] += values[name]
    return totals
