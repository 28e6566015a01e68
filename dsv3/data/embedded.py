"""The corpus that is always there: the running interpreter's own sources and its language reference."""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dsv3.data.corpus import Document
from dsv3.data.sources import NotTextError, decode_text

_TEST_FOLDERS = frozenset("test tests idle_test site-packages dist-packages __pycache__".split())
# Tables of code pages; the reference once more, as one escaped literal; wheels.
_TABLE_FOLDERS = frozenset("encodings pydoc_data ensurepip".split())


def embedded_corpus(max_bytes: int | None = None) -> Iterator[Document]:
    """Yields the running interpreter's standard library sources and its language reference: code and English.

    Tests, installed packages and generated tables are left out. The order is that of a hash of the names, so
    that a part (`max_bytes`) is a fair sample of the whole; one interpreter always gives the same documents.

    Args:
      max_bytes: leave out each document that would take the total above this many UTF-8 bytes; None: all,
        about 10 million.

    Returns:
      An iterator of documents named `stdlib/<path>` and `reference/<topic>`.

    Raises:
      ValueError: this interpreter comes without its sources, or no document is as small as `max_bytes`.

    >>> next(embedded_corpus()).name.split("/")[0] in ("stdlib", "reference")
    True
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"embedded_corpus: `max_bytes` is {max_bytes}, want at least 1 or None")
    folder = Path(sysconfig.get_path("stdlib"))
    sources: dict[str, Path | str] = {f"stdlib/{name}": folder / name for name in _stdlib_names(folder)}
    if not sources:
        raise ValueError(f"embedded_corpus: no Python sources in {str(folder)!r}; want a corpus from a path")
    sources.update((f"reference/{topic}", text) for topic, text in _reference_topics().items())
    return _embedded_documents(sources, max_bytes)


def _stdlib_names(folder: Path) -> Iterator[str]:
    """Relative paths of the standard library's sources, less tests, tables and what a build has written."""
    for where, folders, names in os.walk(folder):
        place = Path(where).relative_to(folder)
        left_out = _TEST_FOLDERS | (_TABLE_FOLDERS if where == str(folder) else frozenset())
        folders[:] = [name for name in folders if name not in left_out and not name.startswith("config-")]
        sources = (name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        yield from ((place / name).as_posix() for name in sources)


def _reference_topics() -> dict[str, str]:
    """The language reference that `help()` shows, by topic; empty where an interpreter comes without it."""
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        return {}


def _embedded_documents(sources: dict[str, Path | str], max_bytes: int | None) -> Iterator[Document]:
    total = 0
    for name in sorted(sources, key=lambda name: hashlib.sha256(name.encode()).digest()):
        source = sources[name]
        try:
            text = source if isinstance(source, str) else decode_text(source.read_bytes())
        except (NotTextError, OSError):  # a source in another encoding is none of ours
            continue
        size = len(text.encode())
        if text.strip() and (max_bytes is None or total + size <= max_bytes):
            total += size
            yield Document(name, text)
    if not total:
        raise ValueError(f"embedded_corpus: `max_bytes` is {max_bytes}, less than the smallest document has")
