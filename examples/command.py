"""What the programs' command lines have in common."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from absl import flags

from dsv3.checks import check
from dsv3.data import Document, chunk_documents

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the largest size of a file
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


def failure_line(program: str) -> Callable[[object, int], int]:
    """Returns what says what is wrong, in one line of standard error, and returns the exit code."""

    def fail(error: object, code: int) -> int:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return code

    return fail


def what_failed(error: ValueError | OSError, out: str | os.PathLike) -> str:
    """What an error says; where a disk is full and the system names no file, it is told with the folder of the output."""
    full = isinstance(error, OSError) and error.errno in FULL and error.filename is None
    return f"cannot write in {str(out)!r} ({error.strerror})" if full else str(error)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table as text in aligned columns, of which the first `left` begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[f"{cell:{'<' if i < left else '>'}{w}}" for i, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


_silent = False  # whether `silence` was called


def say(line: str) -> None:
    """Prints a line at once, unless this process is to be silent."""
    if not _silent:
        print(line, flush=True)


def silence() -> None:
    """Makes `say` print nothing in this process: of several processes of a run one speaks."""
    global _silent
    _silent = True


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


_lock: TextIO | None = None  # the open lock file: it is held as long as the process lives, or until it locks another folder


def lock_folder(out: Path) -> None:
    """Makes the folder of --out and locks it for this process.

    Raises:
      ValueError: another process has locked it.
      OSError: it cannot be written.
    """
    global _lock
    try:
        out.mkdir(parents=True, exist_ok=True)
        _lock = open(out / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"cannot write to --out {str(out)!r} ({error.strerror})") from None
    try:
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"--out {str(out)!r} is in use by another process") from None


def check_fresh(out: Path, saved: Any, program: str, inputs: Mapping[str, str | None]) -> None:
    """Refuses to delete the run in --out where it is another program's, or holds what this one reads.

    Args:
      out: the folder of --out.
      saved: the settings of the run in it; no dict: they cannot be read, and whose they are is not known.
      program: "pretrain", "sft" or "grpo".
      inputs: files and folders by the flag that names them.

    Raises:
      ValueError: so it is; nothing has been deleted.
    """
    if isinstance(saved, dict):
        found = saved.get("program", "pretrain")
        check(found == program, f"--fresh: --out {str(out)!r} holds a run of {found}.py, want another --out")
    home = out.resolve()
    for flag, value in inputs.items():
        if value is None:
            continue
        path = Path(value)
        files = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else []  # which may be links
        inside = any(one.resolve().is_relative_to(home) for one in (path, *files))
        check(not inside, f"--fresh would delete --{flag} {value!r}, which lies in --out {str(out)!r}; want another --out")


def read_time(text: str | None, where: object) -> datetime | None:
    """The moment that a chat template is told, the same in all parts of a run: when the run was begun."""
    try:
        return None if text is None else datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(f"the `time` of {where} is {text!r}, want one such as 2025-01-31T12:00:00") from None


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
