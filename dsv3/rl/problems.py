"""Reads problems with a known answer: rows of (question, reference) for rewards. Every path is an argument.

    problems = read_gsm8k("gsm8k/train.jsonl") + read_math("math500/test.jsonl")
    reward(problems[0].question, completion, problems[0].reference)

A row that cannot be used is an error that names file and line, not a row less.

References:
  GSM8K: arXiv:2110.14168, github.com/openai/grade-school-math. MATH: arXiv:2103.03874. HumanEval: arXiv:2107.03374.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.checks import check
from dsv3.data.decompress import open_binary
from dsv3.rl.answers import find_answer
from dsv3.rl.reward_code import CallTests, read_tests


class Problem(NamedTuple):
    """A question and what its answer is judged by.

    Args:
      question: the text that the model is asked.
      reference: what the reward gets.
      name: file and line, for messages.
      solution: the dataset's own solution, whole; None where it has none.
      turns: what is asked after the first answer, after the second, and so on.
    """

    question: str
    reference: Any
    name: str
    solution: str | None = None
    turns: tuple[str, ...] = ()


def read_rows(path: str | os.PathLike, *, prompt: str = "prompt", reference: str = "reference") -> list[Problem]:
    """Reads JSON lines with a prompt, a text or a list of several turns' texts, and a reference of a kind that rewards take.

    Args:
      path: as in `read_gsm8k`.
      prompt, reference: names of the fields.

    Raises:
      OSError: it cannot be read.
      ValueError: a row without a prompt, or whose reference is null, a blank text or an empty list or object; no row at all.
    """

    def problem(row: dict[str, Any], where: str, name: str) -> Problem:
        for field in (prompt, reference):
            check(field in row, f"{where}: there is no {field!r}, want one among {_fields(row)}")
        turns, judged = row[prompt] if isinstance(row[prompt], list) else [row[prompt]], row[reference]
        good = bool(turns) and all(isinstance(turn, str) and turn.strip() for turn in turns)
        check(good, f"{where}: {prompt!r} is {row[prompt]!r:.60}, want a text or a list of texts")
        said = judged.strip() if isinstance(judged, str) else judged
        empty = said is None or isinstance(said, (str, list, dict)) and not said
        check(not empty, f"{where}: {reference!r} is {judged!r}, want what an answer is judged by")
        return Problem(turns[0], judged, name, turns=tuple(turns[1:]))

    return _read("read_rows", path, problem)


def read_gsm8k(path: str | os.PathLike, *, question: str = "question", answer: str = "answer") -> list[Problem]:
    """Reads GSM8K: JSON lines with a solution that ends in `#### answer`; the reference is the answer alone.

    Args:
      path: a `.jsonl` file, which may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`).
      question, answer: names of the fields.

    Raises:
      OSError: it cannot be read.
      ValueError: a row without a question, or without something behind `####`; no row at all.
    """

    def reference(row: dict[str, Any], where: str) -> str:
        solution = _text(row, answer, where)
        found = find_answer(solution, ("hash",))
        check(bool(found), f"{where}: {answer!r} ends with {solution[-40:]!r}, want an answer behind '####'")
        return found

    return _read("read_gsm8k", path, _asked(question, reference, answer))


def read_math(
    path: str | os.PathLike, *, question: str = "problem", answer: str = "answer", solution: str = "solution"
) -> list[Problem]:
    r"""Reads MATH or MATH-500: rows with an answer, or with a solution that has the answer in its last `\boxed`.

    Args:
      path: as in `read_gsm8k`; or a folder with a `.json` file of each problem, in folders of their own or not, as MATH is
        published: they come in the order of their paths, by which they are named.
      question, answer, solution: names of the fields; `solution` is looked at in rows that have no field `answer`.

    Raises:
      OSError: it cannot be read.
      ValueError: a row without a question or an answer; no row at all.
    """

    def reference(row: dict[str, Any], where: str) -> str:
        if answer in row or solution not in row:
            return _text(row, answer, where).strip()
        found = find_answer(_text(row, solution, where), ("boxed",))
        check(bool(found), f"{where}: {solution!r} has no box, want the answer in \\boxed{{...}}")
        return found

    return _read("read_math", path, _asked(question, reference, solution), folder=os.path.isdir(path))


def read_humaneval(path: str | os.PathLike) -> list[Problem]:
    """Reads HumanEval: JSON lines with `prompt`, `test`, `entry_point`; the reference is a `CallTests`.

    Args:
      path: as in `read_gsm8k`.

    Raises:
      OSError: it cannot be read.
      ValueError: a row without one of the fields; no row at all.
    """

    def reference(row: dict[str, Any], where: str) -> CallTests:
        for name in ("test", "entry_point"):
            _text(row, name, where)
        return read_tests({name: row[name] for name in ("test", "entry_point", "prompt")})

    return _read("read_humaneval", path, _asked("prompt", reference, "canonical_solution"))


def _asked(
    question: str, reference: Callable[[dict[str, Any], str], Any], solution: str
) -> Callable[[dict[str, Any], str, str], Problem]:
    """What makes a problem of a row with these fields, and with what makes its reference."""
    return lambda row, where, name: Problem(_text(row, question, where), reference(row, where), name, row.get(solution))


def _read(
    function: str, path: str | os.PathLike, problem: Callable[[dict[str, Any], str, str], Problem], *, folder: bool = False
) -> list[Problem]:
    """The problems of a file, or of a folder's files: what `problem` makes of a row, its place for messages, its name."""
    name, problems = os.fspath(path), []
    try:
        for where, title, text in (_files if folder else _lines)(function, name):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON ({error})") from None
            check(isinstance(row, dict), f"{where} is of type {type(row).__name__}, want an object")
            problems.append(problem(row, where, title))
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{function}: {name!r} is cut off or damaged ({error})") from None
    check(bool(problems), f"{function}: {name!r} is empty, want rows")
    return problems


def _lines(function: str, path: str) -> Iterator[tuple[str, str, bytes]]:
    """Yields of each line its place, its name, and itself."""
    with open_binary(path, function) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{function}: {path!r} line {number}", f"{path}:{number}", line


def _files(function: str, folder: str) -> Iterator[tuple[str, str, bytes]]:
    """The same of each file in a folder and in those below it."""
    files = sorted(Path(folder).rglob("*.json"))
    check(bool(files), f"{function}: the folder {folder!r} holds no .json file, want one for each problem")
    for file in files:
        yield f"{function}: {str(file)!r}", str(file), file.read_bytes()


def _fields(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "its fields"


def _text(row: dict[str, Any], field: str, where: str) -> str:
    """A field that is a text; a whole number will do, too."""
    value = row.get(field)
    if type(value) in (int, float):
        value = str(value)
    check(field in row, f"{where}: there is no {field!r}, want one among {_fields(row)}")
    check(isinstance(value, str) and bool(value.strip()), f"{where}: {field!r} is {value!r:.40}, want a text")
    return value
