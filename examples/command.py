"""What the programs' command lines have in common."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence

from absl import flags

import dsv3
from dsv3 import pipeline
from dsv3.checks import check
from dsv3.data import Document, chunk_documents
from dsv3.parallel.mesh import parse_axes

MANY, PIECE = 100, 65536  # documents that are held out whole; characters of a piece of a long one


def flag_parser(program: str) -> Callable[[list[str]], list[str]]:
    """Returns a parser of the command line, for which a wrong flag is one line, as is all bad input."""

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            print(f"{program}: {' '.join(str(error).split())} (--help shows all flags)", file=sys.stderr)
            sys.exit(2)

    return parse_flags


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table as text in aligned columns, of which the first `left` begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[f"{cell:{'<' if i < left else '>'}{w}}" for i, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def cut_corpus(source: Iterable[Document]) -> list[Document]:
    """Returns documents that some can be held out of.

    Of `MANY` documents or more each is held out whole or not at all; long ones are cut after that, so that what is encoded
    and scored at a time is small. Fewer, as a single book, are cut first, into so many pieces that some can be held out.
    """
    documents = list(source)
    if len(documents) < MANY:
        characters = sum(len(document.text) for document in documents)
        documents = list(chunk_documents(documents, min(PIECE, max(64, characters // 200))))
    return documents


def check_axes(
    mesh: str, cfg: dsv3.ModelConfig, *, rows: int, micro_batches: int, schedule: str, nodes: int, processes: int, what: str
) -> None:
    """Checks a mesh, as `data:2,expert:2`, before any work.

    Args:
      mesh: its axes.
      cfg: the model that is to be trained on it.
      rows: of a micro-batch; `what` says where they come from.
      micro_batches: of a step.
      schedule: name of a pipeline schedule.
      nodes: that the axis `expert` is cut into.
      processes: that share its devices.
      what: the flags that give `rows`.

    Raises:
      ValueError: the mesh does not fit one of them.
    """
    sizes = parse_axes(mesh)
    devices, experts, ways = math.prod(sizes.values()), cfg.moe.router.num_experts, sizes.get("expert", 1)
    check(devices % processes == 0, f"--mesh {mesh} has {devices} devices, want a multiple of the {processes} processes")
    pipeline.SCHEDULES[schedule](sizes.get("pipe", 1), micro_batches)  # refuses numbers that it cannot order
    shards = sizes.get("data", 1) * ways
    check(
        rows % shards == 0,
        f"{what} has {rows} rows in a micro-batch, want a multiple of {shards}, the devices on data and expert of {mesh}",
    )
    check(experts % ways == 0, f"the model has {experts} experts, want a multiple of the {ways} devices on expert of {mesh}")
    check(ways % nodes == 0, f"--expert_nodes is {nodes}, want a divisor of {ways}, the devices on expert of {mesh}")
