"""Cases that `.ci/run` tests beside those of a plain test run, which is to stay below ten minutes."""

from __future__ import annotations

import os
from typing import Any

import pytest

MORE = "DSV3_MESH_CASES" in os.environ
# Of a test, or of a case among others, whose names then are the same in both runs.
LONG = pytest.mark.skipif(not MORE, reason="a long case")
GROWS = pytest.mark.grows  # of a test that does more there under the same name, and so is run in both


def more(*cases: Any) -> tuple[Any, ...]:
    """Returns `cases` where they are asked for, else none."""
    return cases if MORE else ()
