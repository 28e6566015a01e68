"""What is decided for each source of a prepared corpus: where it is, what is done to it, and its share of the mixture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.checks import check
from dsv3.data.clean import KINDS
from dsv3.data.filters import SETS, FilterSettings, parse_filters
from dsv3.data.manifest import FOLDER_NAME

UNKNOWN = "unknown"


@dataclass(frozen=True)
class SourceSettings:
    """One source of a corpus.

    Attributes:
      name: of its folder: letters, digits, _ . -
      path: a file or folder as `read_corpus` takes it, or `embedded:stdlib`, `embedded:reference` (see `embedded_corpus`).
      licence: as the source states it; "unknown" where nobody said.
      kind: "prose" or "code": how it is cleaned, and which filters it has if none are named.
      filters: see `parse_filters`; None: those of the kind.
      languages: codes joined by +; documents in others are left out. None: any.
      text_field: field or column with the text.
      chunk: most characters of a document; longer ones are cut at ends of lines. None: none is cut.
      weight: share of the tokens, relative to the others' weights. repeats: epochs, relative to the others'. One of them.
      epochs: most epochs; None: any number.
    """

    name: str
    path: str
    licence: str = UNKNOWN
    kind: str = "prose"
    filters: str | None = None
    languages: str | None = None
    text_field: str = "text"
    chunk: int | None = None
    weight: float | None = None
    repeats: float | None = None
    epochs: float | None = None

    def filter_settings(self) -> FilterSettings:
        """Its filters with all thresholds, that of the language among them."""
        filters = self.kind if self.filters is None else self.filters
        return parse_filters(filters if self.languages is None else f"{filters},language:languages={self.languages}")


FIELDS = {field.name: field.type for field in dataclasses.fields(SourceSettings)}
_NUMBERS = {"chunk": int, "weight": float, "repeats": float, "epochs": float}


def make_source(function: str, values: Mapping[str, Any]) -> SourceSettings:
    """Makes the settings of a source from fields by name, as JSON or a command line has them, and checks each.

    Args:
      function: who asks, for messages.
      values: field → value; numbers may be text.

    Returns:
      The settings.

    Raises:
      ValueError: a field that is unknown, missing or wrong.
    """
    where = f"{function}: source {values.get('name')!r}"
    unknown = sorted(set(values) - set(FIELDS))
    check(not unknown, f"{where} has {', '.join(map(repr, unknown))}, want fields among {', '.join(FIELDS)}")
    for field in ("name", "path"):
        check(isinstance(values.get(field), str) and values[field] != "", f"{where} has no `{field}`")
    values = {field: value for field, value in values.items() if value is not None}
    for field, value in values.items():
        if field in _NUMBERS:
            values[field] = _number(where, field, value)
        else:
            check(isinstance(value, str), f"{where}: `{field}` is a {type(value).__name__}, want a string")
    source = SourceSettings(**values)
    check(bool(FOLDER_NAME.fullmatch(source.name)), f"{where}: want a name of letters, digits, _ . - for its folder")
    check(source.kind in KINDS, f"{where}: `kind` is {source.kind!r}, want one of {', '.join(KINDS)}")
    check(source.chunk is None or source.chunk >= 1, f"{where}: `chunk` is {source.chunk}, want at least 1")
    for field, least in (("weight", 0.0), ("repeats", 0.0), ("epochs", math.ulp(0.0))):
        value = getattr(source, field)
        fits = value is None or (math.isfinite(value) and value >= least)
        check(fits, f"{where}: `{field}` is {value}, want a number {'above 0' if least else 'of at least 0'}")
    try:
        source.filter_settings()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return source


def read_sources(file: str | os.PathLike) -> tuple[SourceSettings, ...]:
    """Reads sources from a JSON file: `{"name": {"path": ..., "licence": ..., ...}, ...}`, in that order.

    A path is relative to the file's folder.

    Args:
      file: the file; fields are those of `SourceSettings`.

    Returns:
      The sources.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON, a wrong field, or sources that do not go together.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"read_sources: {str(path)!r} does not exist, want a JSON file of sources")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"read_sources: {str(path)!r} is not JSON ({error})") from None
    fits = isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values())
    check(bool(fits), f'read_sources: {str(path)!r} has no sources, want {{"name": {{"path": ...}}, ...}}')
    sources = [make_source("read_sources", {"name": name, **values}) for name, values in content.items()]
    return check_sources(dataclasses.replace(source, path=_beside(path.parent, source.path)) for source in sources)


def check_sources(sources) -> tuple[SourceSettings, ...]:
    """Checks that sources go together: different names, and weights or repeats that make a mixture.

    Args:
      sources: the sources.

    Returns:
      The sources, as a tuple.

    Raises:
      ValueError: none, a name twice, weights of some only or that sum to zero.
    """
    sources = tuple(sources)
    check(bool(sources), "check_sources: `sources` is empty, want at least one source")
    names = [source.name.casefold() for source in sources]
    twice = [source.name for source in sources if names.count(source.name.casefold()) > 1]
    check(not twice, f"check_sources: sources {', '.join(twice)} have one name, want different ones")
    mixture_settings(sources)
    return sources


def mixture_settings(sources: Sequence[SourceSettings]) -> dict[str, dict[str, float] | None]:
    """Returns the arguments `weights`, `repeats` and `epochs` of `make_mixture`.

    Args:
      sources: the sources.

    Returns:
      Argument → source → number; None where no source says anything.

    Raises:
      ValueError: some sources have a weight and others none, there are repeats as well, or all are zero.
    """
    found: dict[str, dict[str, float] | None] = {}
    for argument, field in (("weights", "weight"), ("repeats", "repeats"), ("epochs", "epochs")):
        given = {source.name: getattr(source, field) for source in sources if getattr(source, field) is not None}
        found[argument] = given or None
    weights, repeats = found["weights"], found["repeats"]
    check(weights is None or repeats is None, "mixture_settings: sources have weights and repeats, want one of them")
    missing = [source.name for source in sources if weights is not None and source.name not in weights]
    check(not missing, f"mixture_settings: source {missing[:1]} has no weight, want one for each; 0 leaves it out")
    check(weights is None or sum(weights.values()) > 0, "mixture_settings: the weights sum to zero, want one above it")
    idle = repeats is not None and len(repeats) == len(sources) and sum(repeats.values()) == 0
    check(not idle, "mixture_settings: the repeats sum to zero, want one above it")
    return found


def _number(where: str, field: str, value: Any) -> float | int:
    try:
        number = _NUMBERS[field](value)
    except (TypeError, ValueError):
        number = None
    right = number is not None and not isinstance(value, bool) and (isinstance(value, str) or number == value)
    check(right, f"{where}: `{field}` is {value!r}, want a number{' of type int' if _NUMBERS[field] is int else ''}")
    return number


def _beside(folder: Path, path: str) -> str:
    return path if path.startswith("embedded:") else str(folder / path)


DEFAULT = (
    SourceSettings("stdlib", "embedded:stdlib", "PSF-2.0", "code"),
    SourceSettings("reference", "embedded:reference", "PSF-2.0", "prose"),
)
assert set(KINDS) < set(SETS)
