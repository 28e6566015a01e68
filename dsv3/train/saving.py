"""Saving while the training goes on: the state is copied, and a thread writes the copy."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow.experimental import dtensor

from dsv3.train.checkpoint import Keep, SaveJob, begin_save
from dsv3.train.checkpoint_files import block_values
from dsv3.typing import Tree


class BackgroundSaver:
    """Writes checkpoints in a thread; a context manager that waits for the last one.

    `save` copies what this process holds of the state, which takes as much memory again until it is written. The checkpoint
    appears, whole, at the first `poll` after that, at the next `save`, or at `finish`: then all processes are at the same
    place, and agree.

    Args:
      directory, settings, keep: as of `save_checkpoint`.
      agree: from whether this process has written its part to whether all have, called by all processes at the same time;
        default: there is only this one.
    """

    def __init__(
        self, directory: str | os.PathLike, settings: Mapping[str, Any], *, keep: Keep = Keep(),
        agree: Callable[[bool], bool] = lambda done: done,
    ):  # fmt: skip
        self._directory, self._settings, self._keep, self._agree = Path(directory), settings, keep, agree
        self._job: SaveJob | None = None
        self._thread: threading.Thread | None = None
        self._error: list[BaseException] = []

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self.finish()
        elif dtensor.num_clients() == 1:  # what went wrong with the training is not to cost the checkpoint before it
            with contextlib.suppress(OSError):
                self.finish()
        elif self._thread is not None:  # the others may not come any more; what was written stays hidden and is removed
            self._thread.join()

    def save(self, state: Tree, step: int, cursor: Any = None) -> None:
        """Begins to write a checkpoint, after the one before it has been ended.

        Raises:
          ValueError, OSError: as `save_checkpoint`, also for the checkpoint before it.
        """
        self.finish()
        job = begin_save(self._directory, state, self._settings, step=step, cursor=cursor, keep=self._keep)
        copies = [np.array(values) for values in block_values(job.blocks, state)]

        def write() -> None:
            try:
                job.write(copies)
            except BaseException as error:  # told by whoever ends the job
                self._error.append(error)
            copies.clear()

        self._job, self._thread = job, threading.Thread(target=write, name="save", daemon=True)
        self._thread.start()

    def poll(self) -> Path | None:
        """Ends a checkpoint whose parts all processes have written; returns its folder, or `None`."""
        if self._job is None or not self._agree(not self._thread.is_alive()):
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Waits for the checkpoint that is being written and ends it; returns its folder, `None` if there is none.

        Raises:
          OSError: it cannot be written.
        """
        if self._job is None:
            return None
        self._thread.join()
        job, self._job, self._thread = self._job, None, None
        with job.failing():
            job.agree(self._error)
            return job.commit()
