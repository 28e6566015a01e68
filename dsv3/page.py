"""A report as one HTML file that needs nothing beside it: tables, plots and text."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Table(NamedTuple):
    """`rows`, of which the first is the head; the first `left` columns begin at the left, and keep their lines."""

    rows: Sequence[Sequence[object]]
    left: int = 1


Part = str | Path | Table
"""A section's content: text, which keeps its lines; the path of a PNG or SVG file, which is taken in; or a table."""

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}img{max-width:100%}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em .8em;border-bottom:1px solid #eee;text-align:right}
td,th{vertical-align:top}.left{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}pre{background:#f6f6f6;padding:.8em;overflow-x:auto;white-space:pre-wrap}"""
_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}


def write_page(path: str | os.PathLike, title: str, sections: Sequence[tuple[str, Sequence[Part]]]) -> Path:
    """Writes a report, atomically.

    Args:
      path: the file.
      title: its heading.
      sections: heading and parts of each, see `Part`. Everything is shown as it is: nothing in it is taken for HTML.

    Returns:
      The path.

    Raises:
      ValueError: an image of another kind than PNG or SVG.
      OSError: an image cannot be read or the file not be written.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        body += [_part(part) for part in parts]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no Unicode
        os.replace(part, target)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return target


def _part(part: Part) -> str:
    if isinstance(part, Path):
        kind = _KINDS.get(part.suffix.lower())
        if kind is None:
            raise ValueError(f"write_page: {str(part)!r} is no image that a page can show, want .png or .svg")
        data = base64.b64encode(part.read_bytes()).decode()
        return f'<img alt="{html.escape(part.stem)}" src="data:{kind};base64,{data}">'
    if isinstance(part, str):
        return f"<pre>{html.escape(part)}</pre>"
    lines = []
    for number, row in enumerate(part.rows):
        tag = "td" if number else "th"
        cells = (f"<{tag}{' class=left' * (i < part.left)}>{html.escape(str(cell))}</{tag}>" for i, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"
