"""Imported first, this loads TensorFlow without the lines that its libraries write before any log level applies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


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
