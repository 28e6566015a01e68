"""The memory of this process, and what the machine has left, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")
_PROC, _GROUP = Path("/proc"), Path("/sys/fs/cgroup")


class Growth(NamedTuple):
    """Bytes above what a process had before a call: `peak`, the most while it ran, and `kept`, what is left afterwards."""

    peak: int
    kept: int


def measure_growth(function: Callable[[], Result]) -> tuple[Result, Growth]:
    """Calls a function and measures the memory that it takes in this process.

    TensorFlow keeps memory that was given up and takes it again before it asks for more: where a call finds such memory, it
    seems to need less. So measure in a fresh process, and before other work.

    Returns:
      What the function returns, and `Growth`.
    """
    before = reset_peak()
    result = function()
    peak = peak_bytes()
    return result, Growth(max(peak - before, 0), max(reset_peak() - before, 0))


def resident_bytes() -> int:
    """Returns what this process has in memory now."""
    return _field(_PROC / "self/status", "VmRSS")


def peak_bytes() -> int:
    """Returns the most that this process had in memory since `reset_peak`, or since it began."""
    return _field(_PROC / "self/status", "VmHWM")


def reset_peak() -> int:
    """Makes the highest be now, and returns it.

    What is free goes back to the system first, so that leftovers of what was done before are not counted.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    (_PROC / "self/clear_refs").write_text("5")
    return resident_bytes()


def available_bytes() -> int:
    """Returns what can be had without swapping: of the machine, or of the control group that limits this process."""
    left = _field(_PROC / "meminfo", "MemAvailable")
    limit, used = _GROUP / "memory.max", _GROUP / "memory.current"
    if limit.exists() and limit.read_text().strip().isdecimal():
        left = min(left, int(limit.read_text()) - int(used.read_text()))
    return max(left, 0)


def _field(file: Path, name: str) -> int:
    """A line such as `VmRSS:   123 kB`, in bytes."""
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise OSError(f"{file} has no line {name}")
