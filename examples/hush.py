"""Imported first, this loads TensorFlow: without the lines that its libraries write before any log level applies, and with
one operation more at a time than there are cores, as one that waits for its compiled kernel counts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(_cores + 1))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Sends the process's standard error nowhere; an exception is shown as ever, after the context."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with hushed():
    import tensorflow as tf

    tf.config.list_physical_devices()
