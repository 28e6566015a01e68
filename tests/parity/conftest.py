"""The table of errors: gathered while the parity tests run, printed at the end, and written with `--parity-table=FILE`."""

from __future__ import annotations

import gzip
import importlib.metadata
import pathlib
import shutil
from typing import NamedTuple

import pytest

from tests.real_data import DATA


class Row(NamedTuple):
    """One measured error and its bound."""

    config: str
    quantity: str
    error: float
    tolerance: float


class ParityTable:
    """Collects errors and compares each with its tolerance."""

    def __init__(self):
        self.rows: list[Row] = []

    def check(self, config: str, quantity: str, error: float, tolerance: float) -> None:
        """Notes an error and raises when it is over its tolerance, or not a number."""
        self.rows.append(Row(config, quantity, float(error), tolerance))
        assert error <= tolerance, f"{config}: {quantity}: error {error:.3g} is over {tolerance:.3g}"

    def worst(self) -> list[Row]:
        """Returns the row with the largest error for each quantity, in the order they first came."""
        found: dict[str, Row] = {}
        for row in self.rows:
            if row.quantity not in found or not row.error <= found[row.quantity].error:
                found[row.quantity] = row
        return list(found.values())


_KEY = pytest.StashKey[ParityTable]()


def pytest_addoption(parser):
    parser.addoption("--parity-table", metavar="FILE", help="write the table of errors to a Markdown file")


def pytest_configure(config):
    config.stash[_KEY] = ParityTable()


@pytest.fixture(scope="session")
def table(request) -> ParityTable:
    return request.config.stash[_KEY]


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """DeepSeek's tokenizer as transformers opens it: the folder with tokenizer.json unpacked."""
    transformers, real = pytest.importorskip("transformers"), DATA / "deepseek_v3_tokenizer"
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((real / "tokenizer.json.gz").read_bytes()))
    shutil.copy(real / "tokenizer_config.json", folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash[_KEY]
    if not found.rows:
        return
    terminalreporter.section("parity with transformers", sep="-")
    for line in align([("config", "quantity", "max error", "tolerance"), *map(_cells, found.rows)]):
        terminalreporter.write_line(line)
    target = config.getoption("--parity-table")
    if target and not terminalreporter.stats.get("failed"):
        pathlib.Path(target).write_text(markdown(found), encoding="utf-8")
        terminalreporter.write_line(f"written: {target}")


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Pads the cells of a table to columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def markdown(found: ParityTable) -> str:
    """The largest error of each quantity, then all errors with a line for each config."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "tensorflow"))
    worst = found.worst()
    summary = [("quantity", "largest error", "tolerance", "in the config")]
    summary += [(row.quantity, *_cells(row)[2:], row.config) for row in worst]
    cells = {(row.config, row.quantity): _cells(row)[2] for row in found.rows}
    matrix = [("config", *(row.quantity for row in worst))]
    for config in dict.fromkeys(row.config for row in found.rows):
        matrix.append((config, *(cells.get((config, row.quantity), "") for row in worst)))
    return f"""# Parity with Hugging Face transformers

`make parity ARGS=--parity-table=docs/parity.md` wrote this with {versions}, on a CPU.
Both sides read the same `config.json` and get the same random parameters. `tests/parity/test_parity.py` says what is
compared and where the tolerances come from.

## The largest error of each quantity

{_pipes(summary)}

## All errors

{_pipes(matrix)}
"""


def _cells(row: Row) -> tuple[str, ...]:
    tolerance = "exact" if row.tolerance == 0 else f"{row.tolerance:.1e}"
    return row.config, row.quantity, f"{row.error:.1e}" if row.error else "0", tolerance


def _pipes(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
