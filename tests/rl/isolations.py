"""The isolations of the sandbox that this machine allows; tests of the others are skipped, with the reason."""

import sys

import pytest

from dsv3.rl import sandbox

TROUBLE = {kind: sandbox._trouble(kind) if sys.platform == "linux" else "no Linux" for kind in ("namespaces", "seccomp")}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(why is not None, reason=f"this machine allows no {kind}: {why}"))
    for kind, why in TROUBLE.items()
]
