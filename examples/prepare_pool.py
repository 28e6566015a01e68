"""What `prepare_data.py` does side by side: processes that end with the one that started them, and a line of progress."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dsv3.train.progress import format_seconds

WORKERS = ".workers"  # each worker holds this lock as long as it lives


class Stopped(Exception):
    """A signal came; its name is the message, its number `signal`."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.signal = number


@contextlib.contextmanager
def open_pool(processes: int, folder: Path) -> Iterator[Executor]:
    """Yields what runs functions in so many processes, in this one for 1; they end with the context, or with this one."""
    if processes == 1:
        yield _Here()
        return
    spawn = multiprocessing.get_context("spawn")  # no copy of this process's threads and locks
    pool = ProcessPoolExecutor(processes, spawn, initializer=_start_worker, initargs=(str(folder / WORKERS),))
    try:
        yield pool
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()
            child.join()


class Stage(NamedTuple):
    """Something that is done with each of some tasks.

    Args:
      name: of the stage. function: what is done with a task.
      tasks: all of them. size: bytes of one. is_done: whether one was done before.
    """

    name: str
    function: Callable[[Any], Any]
    tasks: Sequence[Any]
    size: Callable[[Any], int]
    is_done: Callable[[Any], bool]


def run_stage(pool: Executor, processes: int, stage: Stage, stop: Callable[[], signal.Signals | None]) -> float:
    """Does what is left of a stage, and shows how far it is; returns the seconds.

    Raises:
      Stopped: a signal came.
      MemoryError: a process died, which is what the system does when memory is short.
    """
    start, waiting = time.monotonic(), {}
    done = [task for task in stage.tasks if stage.is_done(task)]
    meter = Meter(stage.name, len(stage.tasks), sum(map(stage.size, stage.tasks)), len(done), sum(map(stage.size, done)))
    left = (task for task in stage.tasks if not stage.is_done(task))
    while True:
        while len(waiting) < 2 * processes and (task := next(left, None)) is not None:
            waiting[_unless_broken(pool.submit, stage.function, task)] = task
        if not waiting:
            return time.monotonic() - start
        ended, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        if (number := stop()) is not None:
            raise Stopped(number)
        for future in ended:
            _unless_broken(future.result)
            meter.update(stage.size(waiting.pop(future)))


def _unless_broken(function: Callable, *arguments: Any) -> Any:
    """Calls something of a pool: a process may have died at work, or while there was none for it."""
    try:
        return function(*arguments)
    except BrokenProcessPool:
        raise MemoryError("a process died, perhaps for want of memory: try fewer --processes") from None


def wait_for_workers(folder: Path, seconds: float = 10.0) -> bool:
    """Waits until the workers of a run that was killed are gone; whether they are."""
    deadline = time.monotonic() + seconds
    with open(folder / WORKERS, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)


class _Here(Executor):
    """Runs each function at once, in this process."""

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


_held: TextIO | None = None  # the open lock file of this worker


def _start_worker(lock: str) -> None:
    """Ends with the parent, whatever ends that; leaves signals of the terminal to it; uses one core."""
    global _held
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _held = open(lock, "w")  # noqa: SIM115
    fcntl.flock(_held, fcntl.LOCK_SH)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Meter:
    """Shows how far a stage is: parts, megabytes, speed and ETA; on a terminal in one line, elsewhere every few seconds.

    Args:
      stage: its name. parts, size: how many there are, and their bytes.
      done, done_size: of these, from an earlier run.
    """

    def __init__(self, stage: str, parts: int, size: int, done: int, done_size: int, *, every: float = 10.0):
        self._stage, self._parts, self._size, self._every = stage, parts, size, every
        self._done, self._now, self._before = done, done_size, done_size
        self._start = time.monotonic()
        self._shown = self._start
        self._terminal = sys.stderr.isatty()
        if done:
            self._line(f"{stage}: {done} of {parts} parts were done before")

    def update(self, size: int) -> None:
        """Counts a part."""
        self._done, self._now = self._done + 1, self._now + size
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else self._every) and self._done < self._parts:
            return
        self._shown = now
        speed = (self._now - self._before) / max(now - self._start, 1e-9)
        left = f"  ETA {format_seconds((self._size - self._now) / speed)}" if speed and self._done < self._parts else ""
        sizes = f"{self._now / 1e6:,.1f}/{self._size / 1e6:,.1f} MB  {speed / 1e6:,.2f} MB/s"
        self._line(f"{self._stage}: {self._done}/{self._parts} parts  {sizes}{left}", last=self._done == self._parts)

    def _line(self, line: str, last: bool = True) -> None:
        if self._terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
