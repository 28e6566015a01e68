"""All that is wrong with a checkpoint, gathered and reported as one error."""

from __future__ import annotations

MAX_LINES = 20


class Problems:
    """Collects findings by kind and raises one `ValueError` that lists them.

    >>> problems = Problems("load_pretrained", "run/export")
    >>> problems.add("missing", "model.norm.weight")
    >>> problems.raise_if_any()
    Traceback (most recent call last):
    ValueError: load_pretrained: run/export: 1 missing
      missing: model.norm.weight
    """

    def __init__(self, function: str, place: object):
        self._head = f"{function}: {place}"
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, text: str) -> None:
        """Notes one finding; kinds are shown in the order in which they first came."""
        self._found.setdefault(kind, []).append(text)

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raises `ValueError` with the count of every kind and at most `MAX_LINES` findings, shared out among the kinds."""
        if not self._found:
            return
        counts = ", ".join(f"{len(texts)} {kind}" for kind, texts in self._found.items())
        lines = [f"{self._head}: {counts}"]
        budget, kinds = MAX_LINES, len(self._found)
        for i, (kind, texts) in enumerate(sorted(self._found.items(), key=lambda item: len(item[1]))):
            shown = texts[: max(1, budget // (kinds - i))]
            budget -= len(shown)
            lines += [f"  {kind}: {text}" for text in shown]
            if len(shown) < len(texts):
                lines.append(f"  {kind}: and {len(texts) - len(shown)} more")
        raise ValueError("\n".join(lines))
