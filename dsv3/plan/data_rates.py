"""Measured rates of preparing text, from the report.json that `examples/prepare_data.py` leaves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.checks import check
from dsv3.plan.data import StageRate

# What a report measures as a whole beside its parts: the parts are taken, and what is left of the whole.
WHOLES = {"scan": ("read", "clean", "filter", "sign", "store"), "shard": ("tokenise",)}
AFTER = ("tokenise", "shard")  # stages that only text that stays comes into


class Measured(NamedTuple):
    """What a report says of a core and of the text.

    Attributes:
      rates: by stage.
      fields: of `DataPlan` that the report has: `bytes_per_token`, `document_tokens`, `kept`.
      tokens: that it counted; a small number stands for little text.
    """

    rates: dict[str, StageRate]
    fields: dict[str, float]
    tokens: int


def read_rates(path: str | os.PathLike) -> Measured:
    """Reads the rates of a preparation.

    The file is a JSON object with `"rates"`, by stage either a number, bytes a second and core, or an object with the
    `"bytes"` that came into the stage and the core `"seconds"`. `"sources"`, by source with `"read": {"bytes"}`, `"bytes"`,
    `"documents"` and `"tokens"`, may be there: bytes a token, tokens a document and the kept share are taken from it.

    Args:
      path: of the file.

    Returns:
      `Measured`. A stage that is given as a number takes all text that is read, after the duplicates are gone what stays.

    Raises:
      ValueError: not such a file, in one line.
      OSError: it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        report = json.loads(text)
    except ValueError as error:
        raise ValueError(f"read_rates: {str(path)!r} is not JSON ({error})") from None
    rates = report.get("rates") if isinstance(report, dict) else None
    there = isinstance(rates, dict) and len(rates) > 0
    check(there, f"read_rates: {str(path)!r} has no object 'rates', want a report of examples/prepare_data.py")
    fields, tokens, kept_bytes = _text_fields(path, report.get("sources"))
    timed = {stage: _timed(path, stage, entry) for stage, entry in rates.items() if isinstance(entry, dict)}
    found: dict[str, StageRate] = {}
    for stage, entry in rates.items():
        if stage in timed:
            continue
        check(_positive(entry), f"read_rates: {str(path)!r} has the rate {entry!r} for {stage!r}, want a number above 0")
        found[stage] = StageRate(float(entry), stage_share(stage, fields.get("kept", 1.0)))
    for stage, (size, seconds) in _parts(timed).items():
        check(kept_bytes > 0, f"read_rates: {str(path)!r} has bytes and seconds, but no 'sources' that say what stays")
        found[stage] = StageRate(size / seconds, size / kept_bytes)
    return Measured({stage: found[stage] for stage in _ordered(rates, found)}, fields, tokens)


def stage_share(stage: str, kept: float) -> float:
    """Returns the bytes that come into a stage for each byte that stays, where only a rate is known: all, or what stays."""
    return 1.0 if _after(stage) else 1.0 / kept


def change_kept(rates: Mapping[str, StageRate], now: float, kept: float) -> dict[str, StageRate]:
    """Returns rates for text of which another share stays: what comes into the stages before tokenising grows as all text.

    Args:
      rates: by stage.
      now: the share that stays in them. kept: the other one.
    """
    return {
        stage: rate if _after(stage) else rate._replace(share=rate.share * now / kept) for stage, rate in rates.items()
    }


def _after(stage: str) -> bool:
    return stage.partition(",")[0] in AFTER


def _text_fields(path: str | os.PathLike, sources: Any) -> tuple[dict[str, float], int, float]:
    """What sources say of text: fields of `DataPlan`, tokens, bytes that stay."""
    if sources is None:
        return {}, 0, 0.0
    try:
        rows = [(s["read"]["bytes"], s["bytes"], s["documents"], s["tokens"]) for s in sources.values()]
        read, kept, documents, tokens = (sum(column) for column in zip(*rows))
        fine = all(_positive(value) for value in (read, kept, documents, tokens))
    except (AttributeError, KeyError, TypeError, ValueError):
        fine = False
    check(fine, f"read_rates: {str(path)!r} has 'sources' without bytes read, bytes, documents and tokens above 0")
    # Cleaning may also lengthen a text; more than all of it cannot stay.
    fields = {"bytes_per_token": kept / tokens, "document_tokens": tokens / documents, "kept": min(1.0, kept / read)}
    return fields, tokens, kept


def _timed(path: str | os.PathLike, stage: str, entry: Mapping[str, Any]) -> tuple[float, float]:
    size, seconds = entry.get("bytes"), entry.get("seconds")
    fine = _positive(seconds) and isinstance(size, int | float) and math.isfinite(size) and size >= 0
    check(fine, f"read_rates: {str(path)!r} has {size!r} bytes in {seconds!r} seconds for {stage!r}, want seconds above 0")
    return float(size), float(seconds)


def _parts(timed: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Stages that add up: parts instead of wholes, with what the parts leave of a whole. Empty stages are left out."""
    found = {stage: entry for stage, entry in timed.items() if stage not in WHOLES and entry[0] > 0}
    for whole, parts in WHOLES.items():
        size, seconds = timed.get(whole, (0.0, 0.0))
        inside = [timed[part][1] for part in parts if part in timed]
        left = seconds - sum(inside)
        if size > 0 and left > 0:
            found[f"{whole}, the rest" if inside else whole] = (size, left)
    return found


def _ordered(rates: Mapping[str, Any], found: Mapping[str, StageRate]) -> list[str]:
    """The stages in the report's order, the rest of a whole in the whole's place."""
    return [name for stage in rates for name in (stage, f"{stage}, the rest") if name in found]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
