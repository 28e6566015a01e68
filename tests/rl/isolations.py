"""The isolations of the sandbox that this machine allows. A test that needs another one is skipped, with the reason.

`DSV3_ISOLATIONS`, words among "namespaces" and "seccomp", says which have to be there: without one of them tests fail.
"""

import os
import sys

import pytest

from dsv3.rl import sandbox

KINDS = ("namespaces", "seccomp")


def trouble(kind):
    """Why the isolation cannot be had; None: it can."""
    return sandbox._trouble(kind) if sys.platform == "linux" else "no Linux"


def need(*kinds):
    """Goes on where one of the isolations can be had."""
    why = {kind: trouble(kind) for kind in kinds}
    if None in why.values():
        return
    wanted = set(kinds) & set(os.environ.get("DSV3_ISOLATIONS", "").split())
    (pytest.fail if wanted else pytest.skip)(f"this machine allows no sandbox: {why}")


def need_a_bound_on_processes():
    """Goes on where the kernel counts what a program in namespaces starts."""
    need("namespaces")
    if sandbox.sandbox_isolation("namespaces").user == 0:
        pytest.skip("the kernel counts no processes of root, who can be nobody else here")
