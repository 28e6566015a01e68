"""The report: one row a bar, as an aligned table for the terminal and as the page docs/benchmark.md."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.cases import ALONE, OURS, PEER, PRODUCT, Bar
from benchmarks.runner import Result

HEADER = ("", "dsv3", "peer", "value", "must", "aim", "")
ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what products of each dtype depend on
_METHOD = """\
The model is the preset `bench`. Each side runs in a process of its own and never while the other computes. They take turns,
after a warm-up, with fresh inputs (and so another routing) every time. The first runs of a turn are not counted: the other
process has just used the caches. Times are medians of the turns, with the least and the largest. The value is the peer's
time (or memory) over dsv3's, or dsv3's FLOP/s in percent of a large product's: more is better for dsv3. The peer is the
fastest mode that a trial found. `pass`: what must be reached is reached; `aim`: the aim too; `below`: neither."""

_ALONE = """\
The matrix products of a case and nothing else, one after the other, of operands that are all unlike, as dsv3 has each
computed: no mask or softmax, no router, gather, norm, activation or optimizer; of a prefill without the first new token's.
The experts have equally many rows here. The value is the peer's time over this one."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      name: the bar's name. ours, peer: times or megabytes as text.
      value: the ratio or the percentage; `None` where a contender failed.
      unit: `"×"` or `"%"`. must, aim: the bounds of the value.
    """

    name: str
    ours: str
    peer: str
    value: float | None
    unit: str
    must: float
    aim: float

    @property
    def mark(self) -> str:
        """How the value stands to its bar: `"aim"`, `"pass"`, `"below"`, or `"failed"` for no value."""
        if self.value is None:
            return "failed"
        return "aim" if self.value >= self.aim else "pass" if self.value >= self.must else "below"

    def cells(self) -> tuple[str, ...]:
        """The row as texts, in the order of `HEADER`."""
        value = "–" if self.value is None else _bound(self.value, self.unit)
        return self.name, self.ours, self.peer, value, _bound(self.must, self.unit), _bound(self.aim, self.unit), self.mark


def _bound(value: float, unit: str) -> str:
    return f"{value:.2f}×" if unit == "×" else f"{value:.0f}%"


def show_number(value: float) -> str:
    """Returns three significant digits or more.

    >>> show_number(1234.5), show_number(46.71), show_number(1.2345)
    ('1,234', '46.7', '1.23')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show_times(times: Sequence[float]) -> str:
    """Returns median, least and largest of milliseconds.

    >>> show_times([12.0, 10.0, 14.0])
    '12.0 (10.0–14.0) ms'
    """
    return f"{show_number(statistics.median(times))} ({show_number(min(times))}–{show_number(max(times))}) ms"


def bar_row(result: Result, bar: Bar) -> Row:
    """Returns a bar's row: `ratio` is median(peer) / median(dsv3), `rate` dsv3's FLOP/s in percent of the product's."""
    unit = "%" if bar.kind == "rate" else "×"
    ours, peer = result.values.get(OURS), result.values.get(bar.role)
    if bar.kind == "memory":
        return _memory_row(result, bar, ours, peer)
    value = None
    if ours and peer:
        value = statistics.median(peer) / statistics.median(ours)
        if bar.kind == "rate":
            value *= 100 * result.case.flops[OURS] / result.case.flops[bar.role]
    peer_text = show_times(peer) if peer else "failed"
    if bar.kind == "rate" and peer:
        rate = result.case.flops[bar.role] / statistics.median(peer) / 1e6
        peer_text = f"{rate:,.0f} GFLOP/s"
    return Row(bar.name, show_times(ours) if ours else "failed", peer_text, value, unit, bar.must, bar.aim)


def _memory_row(result: Result, bar: Bar, ours, peer) -> Row:
    text = f"{ours[0]:,.0f} MB" if ours else "failed"
    if result.case.limit is not None:
        limit, what = result.case.limit
        text += f" in {result.seconds:.0f} s" if ours else ""
        return Row(bar.name, text, f"{limit:,.0f} MB: {what}", limit / ours[0] if ours else None, "×", bar.must, bar.aim)
    value = peer[0] / ours[0] if ours and peer else None
    return Row(bar.name, text, f"{peer[0]:,.0f} MB" if peer else "failed", value, "×", bar.must, bar.aim)


def result_rows(results: Sequence[Result]) -> list[Row]:
    """Returns the rows of all results."""
    return [bar_row(result, bar) for result in results for bar in result.case.bars]


def text_table(rows: Sequence[Row]) -> str:
    """Returns the rows in aligned columns."""
    return aligned([HEADER, *(row.cells() for row in rows)])


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Returns lines of texts, the heading first, in columns: the first and the seventh to the left."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]

    def line(texts):
        first, *rest = (t.ljust(w) if i in (0, 6) else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths)))
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns the rows as a markdown table."""
    return _markdown([HEADER, ("---", *["---:"] * 5, "---"), *(row.cells() for row in rows)])


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def alone_cells(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Returns a heading, and a line of texts for each case whose products were also run alone."""
    lines = [("", "products alone", "value, were there nothing else", "must")]
    for result in results:
        alone, peer = result.values.get(ALONE), result.values.get(PEER)
        bars = [bar for bar in result.case.bars if bar.kind == "ratio"]
        if alone and peer and bars:
            most = statistics.median(peer) / statistics.median(alone)
            lines.append((bars[0].name, show_times(alone), _bound(most, "×"), _bound(bars[0].must, "×")))
    return lines


def mode_lines(results: Sequence[Result]) -> list[str]:
    """Says, for each case with a peer, which mode of it was measured, and what its other modes gave."""
    lines = []
    for result in results:
        for role, trials in result.trials.items():
            if role in (OURS, PRODUCT, ALONE) and not any(t.error for t in trials):
                continue
            unit = "MB" if result.case.memory else "ms"
            tried = [
                f"{t.label}: " + (f"failed ({t.error})" if t.error else f"{show_number(t.value)} {unit}")
                for t in trials
                if t.error or (t.value is not None and t.label != result.chosen.get(role))
            ]
            best = result.chosen.get(role, "none works")
            lines.append(f"{result.case.name}, {role}: {best}" + (f". Also tried: {'; '.join(tried)}" if tried else ""))
    return lines


def notes(results: Sequence[Result]) -> list[str]:
    """Returns each case's note once."""
    return list(dict.fromkeys(result.case.note for result in results if result.case.note))


def machine() -> dict[str, str]:
    """Describes this machine without its name: processor, cores that this process may use, instruction sets, memory."""
    facts = {"processor": platform.processor() or platform.machine(), "cores": str(os.cpu_count())}
    if hasattr(os, "sched_getaffinity"):
        facts["cores"] = str(len(os.sched_getaffinity(0)))
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text()
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            facts["processor"] = found.group(1).strip()
        flags = set(text.partition("\nflags")[2].partition("\n")[0].split())
        facts["instructions"] = ", ".join(name for name in ISA if name in flags) or "none of " + ", ".join(ISA)
    facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return facts | {"system": platform.system()}


def page(results: Sequence[Result], *, command: str, versions: Mapping[str, str], checks: Sequence[str]) -> str:
    """Returns docs/benchmark.md.

    Args:
      results: of all cases.
      command: what was run.
      versions: name → version.
      checks: sentences on what was verified before measuring.
    """
    heading, *alone = alone_cells(results)
    lines = [
        "# dsv3 beside transformers",
        "",
        "Written by the benchmark itself; run it again rather than quote it:",
        "",
        f"```\n{command}\n```",
        "",
        "Machine: " + "; ".join(f"{name} {value}" for name, value in machine().items()) + ".",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
        "",
        _METHOD,
        "",
        markdown_table(result_rows(results)),
        "",
        "## Products alone",
        "",
        _ALONE,
        "",
        _markdown([heading, ("---", *["---:"] * 3), *alone]),
        "",
        "## What was compared",
        "",
        *[f"- {text}" for text in (*checks, *notes(results))],
        "",
        "## Modes of the peers",
        "",
        *[f"- {line}" for line in mode_lines(results)],
        "",
    ]
    return "\n".join(lines)
