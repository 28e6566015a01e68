"""What `long_context.py` makes of its numbers: tables, lines through the peaks of memory, a plot, a page of docs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from command import aligned
from long_context_parts import Job

from dsv3.config import ModelConfig
from dsv3.eval.growth import Line, fit_line
from dsv3.nn.cache import cache_bytes

# Largest difference between log-probabilities of the two ways. They add up the same terms in another order: in float32 of up
# to 2^17 terms that is some 1e-5, in bfloat16 some 1e-1, and a token whose experts all but tie may meet others.
EQUAL = {"float32": 1e-3, "bfloat16": 0.5}
HEADINGS = {
    "runs": "Run", "memory": "Memory", "caches": "Caches of the model",
    "wide": "Caches of one layer of the published widths",
}  # fmt: skip
PEAKS = {"engine": "reading in chunks and decoding", "whole": "one forward pass"}


class Results(NamedTuple):
    """`cfg` of the model, what was found for each job, and the seconds of all."""

    cfg: ModelConfig
    found: Sequence[tuple[Job, dict[str, Any]]]
    seconds: float

    def part(self, name: str) -> dict[int, dict[str, Any]]:
        """The numbers of one part, by length."""
        return {job.length: numbers for job, numbers in self.found if job.part == name}

    @property
    def job(self) -> Job:
        """The settings that all jobs share."""
        return self.found[0][0]


Rows = list[tuple[str, ...]]


def is_equal(results: Results) -> bool:
    """Whether decoding after a read prompt gave what a whole forward pass gives, at each length."""
    return all(numbers["apart"] <= EQUAL[results.job.dtype] for numbers in results.part("whole").values())


def run_rows(results: Results) -> Rows:
    """Times, peaks and differences by length."""
    engine, whole = results.part("engine"), results.part("whole")
    rows = [(
        "tokens", "read, s", "tokens/s", "a token, ms", "peak, MB", "of it cache", "whole, s", "tokens/s", "peak, MB",
        "apart", "same best",
    )]  # fmt: skip
    for length, e in engine.items():
        row = (f"{length:,}", f"{e['read_seconds']:.1f}", f"{e['read_rate']:,.0f}", f"{1e3 * e['step_seconds']:.1f}",
               megabytes(e["peak"]), megabytes(e["cache"]))  # fmt: skip
        w = whole.get(length)
        if w is not None:
            row += (f"{w['seconds']:.1f}", f"{(length - 1) / w['seconds']:,.0f}", megabytes(w["peak"]), f"{w['apart']:.1e}",
                    f"{w['same']} of {results.job.new_tokens}")  # fmt: skip
        rows.append(row + ("",) * (len(rows[0]) - len(row)))
    return rows


def lines(results: Results) -> dict[str, Line]:
    """The line through the peaks of each part that has three lengths or more."""
    found = {}
    for part in PEAKS:
        peaks = {length: numbers["peak"] for length, numbers in results.part(part).items()}
        if len(peaks) > 2:
            found[part] = fit_line(list(peaks), list(peaks.values()))
    return found


def line_rows(results: Results) -> Rows:
    """What the lines say."""
    rows = [("peak memory", "bytes a token", "at 0, MB", "furthest off", "linear")]
    for part, line in lines(results).items():
        rows.append((
            PEAKS[part], f"{line.slope:,.0f}", f"{line.start / 1e6:.0f}", f"{line.deviation:.1%}",
            "yes" if line.linear else "NO",
        ))  # fmt: skip
    job = results.job
    rows.append(("the latent cache, computed", f"{cache_bytes(results.cfg, 1, dtype=job.cache or job.dtype):,}", "", "", ""))
    return rows


def cache_rows(results: Results, part: str) -> Rows:
    """Sizes, times and differences of caches."""
    rows = [("tokens", "cache", "bytes a token", "computed, MB", "measured, MB", "to plain", "a step, ms", "apart")]
    for length, numbers in results.part(part).items():
        for row in numbers["caches"]:
            # Beside plain attention's in the same dtype, for FP8 in bfloat16.
            peer = next(r for r in numbers["caches"] if r["kind"] == "plain" and r["dtype"] in (row["dtype"], "bfloat16"))
            rows.append((
                f"{length:,}", f"{row['kind']}, {row['dtype']}", f"{row['token_bytes'] * row['layers']:,}",
                f"{row['computed'] / 1e6:,.1f}", f"{row['measured'] / 1e6:,.1f}",
                f"{row['measured'] / peer['measured']:.1%}", f"{1e3 * row['step_seconds']:.1f}", f"{row['apart']:.1e}",
            ))  # fmt: skip
    return rows


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def tables(results: Results) -> list[tuple[str, Rows]]:
    """Heading and rows of each table that there are numbers for."""
    found = []
    if results.part("engine"):
        found += [(HEADINGS["runs"], run_rows(results)), (HEADINGS["memory"], line_rows(results))]
    for part, heading in (("caches", HEADINGS["caches"]), ("wide", HEADINGS["wide"])):
        if results.part(part):
            found.append((heading, cache_rows(results, part)))
    return found


def text_report(results: Results) -> str:
    """All tables as aligned text, and what they mean."""
    parts = [f"{heading}\n{aligned(rows)}" for heading, rows in tables(results)]
    return "\n\n".join([*parts, "\n".join(verdicts(results))])


def verdicts(results: Results) -> list[str]:
    """One sentence for each claim."""
    found = []
    whole = results.part("whole")
    if whole:
        worst, longest = max(n["apart"] for n in whole.values()), max(whole)
        what = "gives the log-probabilities of" if is_equal(results) else "DIFFERS from"
        found.append(
            f"Decoding after a read prompt {what} one forward pass: {worst:.1e} apart at most, at most "
            f"{EQUAL[results.job.dtype]:g} is allowed; {whole[longest]['apart_last']:.1e} at the last of {longest:,} tokens."
        )
    for part, line in lines(results).items():
        grows = "grows linearly" if line.linear else "does NOT grow linearly"
        found.append(
            f"Peak memory of {PEAKS[part]} {grows}: {line.slope:,.0f} bytes a token, no length further from the line than "
            f"{line.deviation:.1%} of the growth."
        )
    return [*found, f"All of it took {results.seconds / 60:.1f} minutes."]
