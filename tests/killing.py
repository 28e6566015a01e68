"""Processes that are killed before a call that is counted, for tests of what a kill leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any


def count_calls(calls: Sequence[tuple[Any, str]], stop: int | None, where: list[str]) -> None:
    """Wraps functions `(owner, name)`: notes each call in `where`, and kills the process before call number `stop`."""

    def wrap(owner, name):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            if len(where) == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            where.append(name)
            return inner(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in calls:
        wrap(owner, name)


def in_child(action) -> int:
    """Forks, runs `action` in the child, and returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid
