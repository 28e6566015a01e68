"""Runs example programs one after the other in one process, which loads TensorFlow once; each has absl's flags to itself."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"

_DRIVER = """
import contextlib, importlib, io, json, sys
import hush
from absl import flags
from absl.testing import flagsaver

for program, calls in json.loads(sys.argv[1]):
    others = set(flags.FLAGS)
    module = importlib.import_module(program)
    for arguments in calls:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
            try:
                code = module.main(module.parse_flags([f"{program}.py", *arguments]))
            except SystemExit as end:
                code = end.code
        print(json.dumps([code, out.getvalue(), err.getvalue()]))
    for name in set(flags.FLAGS) - others:
        delattr(flags.FLAGS, name)
"""


class Done(NamedTuple):
    """Exit code and output of a call of a program."""

    code: int
    out: str
    err: str


def run_programs(*programs: tuple[str, Sequence[Sequence[object]]], folder: pathlib.Path, seconds: int = 240) -> list[Done]:
    """Calls each program (a name, and a list of arguments for each call) in `folder`; returns what came of each call."""
    wanted = [(name, [list(map(str, arguments)) for arguments in calls]) for name, calls in programs]
    env = os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps(wanted)], env=env, cwd=folder, capture_output=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr.decode()
    return [Done(*json.loads(line)) for line in done.stdout.decode().splitlines()]
