"""Cases that `.ci/run` tests beside those of a plain test run, which is to stay below ten minutes."""

from __future__ import annotations

import os
from typing import Any

MORE = "DSV3_MESH_CASES" in os.environ


def more(*cases: Any) -> tuple[Any, ...]:
    """Returns `cases` where they are asked for, else none."""
    return cases if MORE else ()
