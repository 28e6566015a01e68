"""The loop: steps, rows, held-out losses, checkpoints, what to do in trouble; a function of the things that it calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dsv3.checks import check
from dsv3.parallel.mesh import whole
from dsv3.train.records import load_numbers, step_numbers
from dsv3.train.state import Limits, TrainMetrics, TrainState
from dsv3.train.trouble import Cursor, Trouble, check_trouble, cursor_skipped, cursor_taken, skip_reason, spike_limits
from dsv3.typing import TensorLike

Row = Mapping[str, Any]


class Fed(NamedTuple):
    """A batch: `tokens` and `weights` as a step takes them, and where the data is after it, a JSON value."""

    tokens: TensorLike
    weights: TensorLike | None
    data: Any


Feed = Callable[[Any, int], Iterator[Fed]]
"""From where the data is (`None`: the start) and the number of tokens seen to the batches from there on, without an end. A
generator is closed when no more batches are wanted."""


class LoopResult(NamedTuple):
    """`state` after the last step; `step`, how many are done; `stopped`: what `stop` returned, `None` when all are done;
    `cursor`: where the run is beside its state."""

    state: TrainState
    step: int
    stopped: Any
    cursor: Cursor


class Actions(NamedTuple):
    """What the loop calls, and how often; steps are counted from the start of the run.

    Attributes:
      write: gets each row: `train` after every step, `load` (tokens by layer and expert over the steps since the last such
        row) at the first, the last and every `load_every` steps, `watch`, `heldout`, `skipped`, `rollback`.
      progress: gets each training row, to show it.
      evaluate: held-out numbers of a state, computed every `eval_every` steps (0: never), before the first step of all and
        after the last.
      watch: numbers of a state and a step's metrics, every `watch_every` steps (0: never).
      save: writes a checkpoint of a state, a step and a cursor; called every `save_every` steps (0: never), after the last
        step, when stopped, and after going back.
      restore: reads the latest checkpoint of a step that is a multiple of `save_every` and at most the given one, for a run
        that has to go back, and removes later ones; before the first one it may return the start. `None` where there is
        nothing to go back to. (Where a signal has stopped the run must not matter.) The state that is left is gone by then.
      rewind: told the step that the run has gone back to, after that.
      stop: asked after each step; anything but `None` ends the loop.
    """

    write: Callable[[Row], None] = lambda row: None
    progress: Callable[[Row], None] = lambda row: None
    evaluate: Callable[[TrainState], Row] | None = None
    eval_every: int = 0
    watch: Callable[[TrainState, TrainMetrics], Row] | None = None
    watch_every: int = 0
    save: Callable[[TrainState, int, Cursor], None] | None = None
    save_every: int = 0
    restore: Callable[[int], tuple[TrainState, Cursor] | None] = lambda step: None
    rewind: Callable[[int], None] = lambda step: None
    load_every: int = 20
    stop: Callable[[], Any] = lambda: None


def train_loop(
    step: Callable[..., tuple[TrainState, TrainMetrics]],
    state: TrainState,
    feed: Feed,
    *,
    steps: int,
    cursor: Cursor = Cursor(),
    trouble: Trouble | None = None,
    actions: Actions = Actions(),
) -> LoopResult:
    """Trains from `state.step` to `steps`.

    The numbers are a function of state, cursor and data alone, so a run that goes on from a checkpoint gives the losses that
    it would have given without the interruption.

    Args:
      step: the compiled step, see `make_train_step`; the state is donated to it.
      state: where to start from. Whoever keeps another reference to it keeps its memory, also when the run goes back.
      feed: see `Feed`; `index_feed` makes one of a function of the number of batches.
      steps: optimiser steps of the whole run; steps that are not taken do not count.
      cursor: where the run is beside its state: as a checkpoint has it.
      trouble: what counts as a spike. `None`: a loss that is not finite ends the run, and nothing else is looked at.
      actions: what to call.

    Returns:
      `LoopResult`.

    Raises:
      ValueError: negative periods, or a state that is beyond `steps`.
      FloatingPointError: a loss that is not finite without `trouble`; too many steps that are not taken, and no checkpoint
        or no patience left to go back. Nothing of such a step is saved.
    """
    run = _Run(step, state, feed, steps, cursor, trouble, actions)
    del state
    run.begin()
    try:
        while run.done < steps and run.stopped is None:
            run.turn()
    finally:
        run.end()
    return LoopResult(run.state, run.done, run.stopped, run.cursor)


def index_feed(batches: Callable[[int], tuple[TensorLike, TensorLike | None]]) -> Feed:
    """Returns the feed of a function from the number of batches before it to `(tokens, weights)`."""

    def feed(data: Any, tokens: int) -> Iterator[Fed]:
        number = data or 0
        while True:
            yield Fed(*batches(number), number + 1)
            number += 1

    return feed


class _Run:
    """What changes while the loop runs."""

    def __init__(self, step, state, feed, steps, cursor, trouble, actions: Actions):
        self.state, self.cursor, self.stopped = state, cursor, None
        self.done = int(whole(state.step))
        self._step, self._feed, self._steps, self._trouble, self._actions = step, feed, steps, trouble, actions
        for name in ("eval_every", "save_every", "watch_every"):
            value = getattr(actions, name)
            check(value >= 0, f"train_loop: `{name}` is {value}, want at least 0")
        check(steps >= 0, f"train_loop: `steps` is {steps}, want at least 0")
        check(actions.load_every >= 1, f"train_loop: `load_every` is {actions.load_every}, want at least 1")
        check(self.done <= steps, f"train_loop: the state has done {self.done} steps, want at most steps={steps}")
        if trouble is not None:
            check_trouble(trouble)
        self._batches, self._load, self._loads = None, None, 0

    def begin(self) -> None:
        if self.done == 0 and self.cursor.data is None:  # not a run that has left out its first batches
            self._evaluate(always=True)

    def end(self) -> None:
        """Ends the feed: it may read ahead."""
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = None

    def turn(self) -> None:
        """One step, taken or not, and what follows it."""
        begin, before = time.perf_counter(), int(whole(self.state.tokens))
        if self._batches is None:
            self._batches = self._feed(self.cursor.data, before)
        batch = next(self._batches)
        waited = time.perf_counter() - begin
        limits = Limits() if self._trouble is None else spike_limits(self._trouble, self.cursor)
        self.state, metrics = self._step(self.state, batch.tokens, batch.weights, limits)
        row, load = step_numbers(self.done + 1, metrics)
        if not bool(metrics.taken):
            self._skip(row, limits, batch)
            return
        self.done += 1
        self.cursor = cursor_taken(self.cursor, batch.data, row, self._trouble or Trouble(window=1, least=1))
        tokens, seconds = int(whole(self.state.tokens)), time.perf_counter() - begin
        speed = round((tokens - before) / seconds, 1)
        row |= {"tokens": tokens, "seconds": round(seconds, 4), "waited": round(waited, 4), "tokens_per_second": speed}
        self._actions.progress(row)
        self._actions.write(row)
        self._after(metrics, load)

    def _after(self, metrics: TrainMetrics, load: np.ndarray) -> None:
        """Rows of now and then, and the checkpoint."""
        actions, last = self._actions, self.done == self._steps
        self._load, self._loads = load if self._load is None else self._load + load, self._loads + 1
        if load.size and (last or self.done == 1 or self.done % actions.load_every == 0):
            actions.write({"kind": "load", "step": self.done, "steps": self._loads, **load_numbers(self._load)})
            self._load, self._loads = None, 0
        if actions.watch is not None and actions.watch_every and (last or self.done % actions.watch_every == 0):
            actions.write({"kind": "watch", "step": self.done, **actions.watch(self.state, metrics)})
        self._evaluate(always=last)
        self.stopped = actions.stop()
        due = last or self.stopped is not None or (actions.save_every and self.done % actions.save_every == 0)
        if actions.save is not None and due:
            actions.save(self.state, self.done, self.cursor)

    def _evaluate(self, always: bool) -> None:
        every = self._actions.eval_every
        if self._actions.evaluate is not None and every and (always or self.done % every == 0):
            self._actions.write({"kind": "heldout", "step": self.done, **self._actions.evaluate(self.state)})

    def _skip(self, row: dict[str, Any], limits: Limits, batch: Fed) -> None:
        """A step that was not taken: its batch is left out and recorded; after several the run goes back."""
        reason = skip_reason(row, limits)
        if self._trouble is None:
            raise FloatingPointError(f"step {row['step']}: {reason}")
        before, self.cursor = self.cursor.data, cursor_skipped(self.cursor, batch.data)
        numbers = ("loss", "grad_norm", "learning_rate")
        found = {name: row[name] if math.isfinite(row[name]) else None for name in numbers}
        self._actions.write(
            {"kind": "skipped", "step": self.done, "reason": reason, **found, "data": before, "data_after": batch.data}
        )
        self.end()  # what follows was fed for the tokens that this step would have added
        self.stopped = self._actions.stop()
        if self.cursor.skipped >= self._trouble.patience:
            self._go_back(reason)
        elif self.stopped is not None and self._actions.save is not None:
            self._actions.save(self.state, self.done, self.cursor)

    def _go_back(self, reason: str) -> None:
        count, limit = self.cursor.rollbacks, self._trouble.rollbacks
        what = f"step {self.done + 1}: {self.cursor.skipped} steps in a row were not taken, the last as {reason}"
        if count >= limit:
            raise FloatingPointError(f"{what}; the run has gone back {count} times, which is all that it may")
        self.state = None  # two states may be more than there is room for
        found = self._actions.restore(self.done) if self._actions.save_every else None
        if found is None:
            raise FloatingPointError(f"{what}; there is no checkpoint to go back to")
        self.state, old = found
        row = {"kind": "rollback", "step": self.done, "data": old.data, "data_after": self.cursor.data}
        self.cursor = old._replace(data=self.cursor.data, skipped=0, rollbacks=count + 1)
        self.done = int(whole(self.state.step))
        self._load, self._loads = None, 0
        self._actions.rewind(self.done)
        self._actions.write({**row, "to": self.done})
        if self._actions.save is not None:  # so that whatever comes now, the run does not go the way that it has left
            self._actions.save(self.state, self.done, self.cursor)
