"""Starts programs of several processes for tests, and leaves none of them behind."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_clients(clients: int, program: str, arguments: Sequence[object], *, seconds: int = 120) -> None:
    """Runs `program`, a file of this repository, as several clients; fails with what they print if one fails.

    Clients that hang are asked to end through the launcher, which alone knows them, before the test fails.
    """
    command = [sys.executable, str(ROOT / "examples/launch.py"), f"--num_clients={clients}", str(ROOT / program)]
    env = os.environ | {"DSV3_JOIN_SECONDS": str(seconds // 2), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), 9)
        printed, _ = process.communicate(timeout=30)
        raise AssertionError(f"{program} has not ended after {seconds} s:\n{printed}") from None
    assert process.returncode == 0, printed
