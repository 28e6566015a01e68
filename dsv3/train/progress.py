"""Progress of a run on the terminal, and an orderly end when it is interrupted."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

WINDOW = 20  # steps that speed is averaged over


class Progress:
    """Shows step, loss, tokens/s and ETA: a tqdm bar on a terminal, a line every few seconds elsewhere.

    Args:
      steps: steps of the whole run. start: the step it goes on from.
      every: seconds between two lines (not on a terminal).
      stream: where to; default: standard error.
    """

    def __init__(self, steps: int, *, start: int = 0, every: float = 10.0, stream: TextIO | None = None):
        self._steps, self._every, self._stream = steps, every, stream or sys.stderr
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._first, self._shown = True, float("-inf")
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, file=self._stream, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a training row. Speed and ETA come from the last steps, without the first, which compiles."""
        if self._first:
            self._first = False
        else:
            self._times.append(row["seconds"])
        pace = sum(self._times) / len(self._times) if self._times else None
        speed = f"{row['tokens_per_second'] * row['seconds'] / pace:,.0f} tokens/s" if pace else "compiled"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed}")
            self._bar.n = row["step"]  # a run may go back
            self._bar.refresh()
        elif time.monotonic() - self._shown >= self._every or row["step"] == self._steps:
            self._shown = time.monotonic()
            left = f"  ETA {format_seconds((self._steps - row['step']) * pace)}" if pace else ""
            head = f"step {row['step']}/{self._steps}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}"
            self.say(f"{head}  {speed}{left}")

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """Returns a duration as `m:ss` or `h:mm:ss`.

    >>> format_seconds(75), format_seconds(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextlib.contextmanager
def stop_on_signals(
    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
) -> Iterator[Callable[[], signal.Signals | None]]:
    """Within the context the first of `signals` is noted instead of ending the process; the second acts as ever.

    Yields:
      A function that returns the signal that came, or `None`. Outside the main thread it is always `None`, since Python
      delivers signals to the main thread only.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number))
        restore()

    before = {number: signal.signal(number, note) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield lambda: caught[0] if caught else None
    finally:
        restore()
