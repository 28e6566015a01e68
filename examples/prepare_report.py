"""What `prepare_data.py` tells of its work: tables, plots, report.json and one report.html that needs no other file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command import aligned

from dsv3.data import SourceSettings
from dsv3.data.clock import add_totals
from dsv3.data.encode import BINS
from dsv3.data.manifest import write_files
from dsv3.data.work import SPLITS, write_json
from dsv3.page import Part, Table, write_page

Shards = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
STAGES = {
    "read": "reading", "clean": "cleaning", "filter": "filters", "sign": "signatures", "store": "storing",
    "scan": "all of these", "duplicates": "finding duplicates", "tokenise": "tokenising",
    "shard": "tokenising and writing",
}  # fmt: skip


def summarise(
    sources: Sequence[SourceSettings], scans: Mapping[str, Sequence[Mapping[str, Any]]], duplicates: Mapping[str, Any],
    shards: Shards, run: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Puts together the numbers of report.json.

    Args:
      sources: their settings.
      scans: by source what `scan_part` has returned for each part.
      duplicates: what `drop_duplicates` has returned.
      shards: by split and source what `encode_shard` has returned for each shard.
      run: processes, and seconds by stage.

    Returns:
      The numbers.
    """
    return {
        "format": 1,
        "sources": {s.name: _source(s, scans[s.name], duplicates["dropped"][s.name], shards) for s in sources},
        "duplicates": {key: value for key, value in duplicates.items() if key not in ("dropped", "clock")},
        "rates": _rates(scans, duplicates, shards),
        "run": dict(run),
    }


def _source(
    source: SourceSettings, scans: Sequence[Mapping[str, Any]], duplicates: Mapping[str, list[int]], shards: Shards
) -> dict[str, Any]:
    dropped: dict[str, dict[str, Any]] = {}
    for scan in scans:
        for reason, entry in scan["dropped"].items():
            total = dropped.setdefault(reason, {"documents": 0, "bytes": 0, "names": []})
            total["documents"] += entry["documents"]
            total["bytes"] += entry["bytes"]
            total["names"] = (total["names"] + entry["names"])[:3]
    for kind, (documents, size) in duplicates.items():
        dropped[f"{kind} duplicate"] = {"documents": documents, "bytes": size, "names": []}
    dropped = dict(sorted(dropped.items(), key=lambda item: (-item[1]["documents"], item[0])))
    splits, lengths = {}, [0] * BINS
    for split in SPLITS:
        rows = shards[split].get(source.name, [])
        splits[split] = {key: sum(row["entry"][key] for row in rows) for key in ("documents", "bytes", "tokens")}
        splits[split]["shards"] = len(rows)
        lengths = [a + sum(row["lengths"][i] for row in rows) for i, a in enumerate(lengths)]
    return {
        **{key: getattr(source, key) for key in ("licence", "path", "kind", "languages")},
        "read": {"documents": sum(s["read"][0] for s in scans), "bytes": sum(s["read"][1] for s in scans)},
        "dropped": {reason: entry["documents"] for reason, entry in dropped.items()},
        "dropped_bytes": {reason: entry["bytes"] for reason, entry in dropped.items()},
        "dropped_names": {reason: entry["names"] for reason, entry in dropped.items()},
        "splits": splits,
        **{key: sum(splits[split][key] for split in SPLITS) for key in ("documents", "bytes", "tokens")},
        "lengths": lengths,
    }


def _rates(
    scans: Mapping[str, Sequence[Mapping[str, Any]]], duplicates: Mapping[str, Any], shards: Shards
) -> dict[str, dict[str, float]]:
    """Bytes of text, CPU seconds and MB/s of one core by stage, and documents/s where documents count."""
    clocks = [scan["clock"] for rows in scans.values() for scan in rows]
    totals = add_totals(clocks) | add_totals([duplicates["clock"]])
    totals |= add_totals(row["clock"] for found in shards.values() for rows in found.values() for row in rows)
    totals["duplicates"]["bytes"] = totals["sign"]["bytes"] if "sign" in totals else 0
    rates = {}
    for stage in STAGES:
        if stage in totals:
            size, seconds = totals[stage]["bytes"], totals[stage]["seconds"]
            rates[stage] = {"bytes": size, "seconds": seconds, "mb_per_second": size / 1e6 / max(seconds, 1e-9)}
    rates["duplicates"]["documents_per_second"] = duplicates["documents"] / max(rates["duplicates"]["seconds"], 1e-9)
    return rates


# Tables


def tables(summary: Mapping[str, Any]) -> str:
    """Returns the tables of a run as text."""
    parts = [aligned(rows, left) for _, rows, left in _tables(summary)]
    return "\n\n".join(parts)


def _tables(summary: Mapping[str, Any]) -> list[tuple[str, list[list[str]], int]]:
    """(title, rows with a head, columns that begin at the left) of each table."""
    head = "source,licence,read,MB,left out,training,MB,tokens,held out,tokens,bytes/token".split(",")
    rows, reasons = [head], [["left out", *summary["sources"]]]
    for name, source in summary["sources"].items():
        train, held = (source["splits"][split] for split in SPLITS)
        rows.append([
            name, source["licence"], f"{source['read']['documents']:,}", f"{source['read']['bytes'] / 1e6:,.2f}",
            f"{sum(source['dropped'].values()):,}", f"{train['documents']:,}", f"{train['bytes'] / 1e6:,.2f}",
            f"{train['tokens']:,}", f"{held['documents']:,}", f"{held['tokens']:,}",
            f"{source['bytes'] / source['tokens']:.2f}" if source["tokens"] else "-",
        ])  # fmt: skip
    counts = [source["dropped"] for source in summary["sources"].values()]
    for reason in dict.fromkeys(reason for dropped in counts for reason in dropped):
        reasons.append([reason, *(f"{dropped.get(reason, 0):,}" for dropped in counts)])
    rates = [["one core", "MB", "CPU s", "MB/s"]]
    for stage, rate in summary["rates"].items():
        rates.append([
            STAGES[stage], f"{rate['bytes'] / 1e6:,.2f}", f"{rate['seconds']:,.2f}", f"{rate['mb_per_second']:,.1f}"
        ])  # fmt: skip
    return [("Sources", rows, 2), ("Left out", reasons, 1), ("Speed", rates, 1)]


# The report


def write_report(out: Path, summary: Mapping[str, Any]) -> None:
    """Writes report.json, plots/ and report.html, each in one step.

    Args:
      out: the prepared folder.
      summary: the numbers.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    plots = {name: _png(draw(summary)) for name, draw in (("sources", _draw_sources), ("lengths", _draw_lengths))}
    write_files("write_report", out / "plots", {f"{name}.png": [data] for name, data in plots.items()})
    write_json(out / "report.json", summary)
    write_page(out / "report.html", "Prepared text", _sections(summary, [out / "plots" / f"{name}.png" for name in plots]))


def _sections(summary: Mapping[str, Any], plots: Sequence[Path]) -> list[tuple[str, list[Part]]]:
    """What report.html shows."""
    found, run = summary["duplicates"], summary["run"]
    (sources, *_), (left_out, *_), (speed, *_) = tables = _tables(summary)
    shown = {title: Table(rows, left) for title, rows, left in tables}
    text = (
        f"{found['documents']:,} documents were compared; {found['groups']:,} have duplicates, which are left out"
        f" ({found['crossing']:,} of them on the other side of the held-out border). The largest groups have"
        f" {', '.join(map(str, found['largest'])) or 'no'} documents."
    )
    pairs = [["kind", "similarity", "stays", "left out"]]
    for pair in found["examples"]:
        cells = [f"{d['source']}: {d['name']} ({d['split']})\n{d['text']}" for d in (pair["kept"], pair["dropped"])]
        pairs.append([pair["kind"], f"{pair['similarity']:.2f}", *cells])
    names = [["source", "reason", "some of them"]]
    for name, source in summary["sources"].items():
        names += [[name, reason, "\n".join(few)] for reason, few in source["dropped_names"].items() if few]
    return [
        (sources, [shown[sources], *plots]),
        (left_out, [shown[left_out], *([Table(names, 3)] if len(names) > 1 else [])]),
        ("Duplicates", [text, *([Table(pairs, 4)] if len(pairs) > 1 else [])]),
        (speed, [shown[speed], f"{run['processes']} processes; CPU seconds are sums over all."]),
    ]


def _figure(height: float):
    """A figure on the Agg canvas, without pyplot's global state, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _draw_sources(summary: Mapping[str, Any]):
    """What became of each source's bytes."""
    sources = summary["sources"]
    figure, axis = _figure(1.6 + 0.5 * len(sources))
    left = [0.0] * len(sources)
    shades = {"training": "tab:blue", "held out": "tab:orange", "duplicates": "tab:gray", "filtered": "lightgray"}
    for label, shade in shades.items():
        sizes = []
        for source in sources.values():
            lost = source["dropped_bytes"]
            twice = sum(size for reason, size in lost.items() if reason.endswith(" duplicate"))
            split = {"training": "train", "held out": "heldout"}.get(label)
            rest = twice if label == "duplicates" else sum(lost.values()) - twice
            sizes.append((source["splits"][split]["bytes"] if split else rest) / 1e6)
        axis.barh(list(sources), sizes, left=left, color=shade, label=label)
        left = [a + b for a, b in zip(left, sizes)]
    axis.set(xlabel="MB of text", title="Sources")
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _draw_lengths(summary: Mapping[str, Any]):
    """Documents by length."""
    figure, axis = _figure(4)
    used = [i for source in summary["sources"].values() for i, count in enumerate(source["lengths"]) if count]
    low, high = min(used, default=0), max(used, default=0) + 1
    for name, source in summary["sources"].items():
        if source["documents"]:
            shares = [100 * count / source["documents"] for count in source["lengths"][low:high]]
            axis.stairs(shares, [2.0**i for i in range(low, high + 1)], label=name, linewidth=1.5)
    axis.set(xlabel="tokens of a document", ylabel="% of the source's documents", title="Lengths")
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    return figure
