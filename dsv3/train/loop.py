"""The loop: steps, rows, held-out losses and checkpoints, as a function of the things that it calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dsv3.checks import check
from dsv3.parallel.mesh import whole
from dsv3.train.records import check_finite, step_numbers
from dsv3.train.state import TrainMetrics, TrainState
from dsv3.typing import TensorLike

Row = Mapping[str, Any]


class LoopResult(NamedTuple):
    """`state` after the last step; `step`, how many are done; `stopped`: what `stop` returned, `None` when all are done."""

    state: TrainState
    step: int
    stopped: Any


def train_loop(
    step: Callable[..., tuple[TrainState, TrainMetrics]],
    state: TrainState,
    batches: Callable[[int], tuple[TensorLike, TensorLike]],
    *,
    steps: int,
    write: Callable[[Row], None] = lambda row: None,
    progress: Callable[[Row], None] = lambda row: None,
    evaluate: Callable[[TrainState], Row] | None = None,
    eval_every: int = 0,
    save: Callable[[TrainState, int], None] | None = None,
    save_every: int = 0,
    load_every: int = 20,
    stop: Callable[[], Any] = lambda: None,
) -> LoopResult:
    """Trains from `state.step` to `steps`.

    The numbers are a function of state and batches alone, so a run that goes on from a checkpoint gives the losses that
    it would have given without the interruption.

    Args:
      step: the compiled step, see `make_train_step`; the state is donated to it.
      state: where to start from.
      batches: from the number of steps done to `(tokens, weights)`; a pure function of it.
      steps: optimiser steps of the whole run.
      write: gets each row: `train` after every step, `load` (tokens by layer and expert) at the first, the last and every
        `load_every` steps, `heldout`.
      progress: gets each training row, to show it.
      evaluate: held-out numbers of a state, computed every `eval_every` steps (0: never), before the first step of all
        and after the last.
      save: writes a checkpoint of a state and a step; called every `save_every` steps (0: never), after the last step,
        and when stopped.
      stop: asked after each step; anything but `None` ends the loop.

    Returns:
      `LoopResult`.

    Raises:
      ValueError: negative periods, or a state that is beyond `steps`.
      FloatingPointError: the loss or the gradient is not finite; nothing of that step is saved.
    """
    done = int(whole(state.step))
    for name, value in (("steps", steps), ("eval_every", eval_every), ("save_every", save_every)):
        check(value >= 0, f"train_loop: `{name}` is {value}, want at least 0")
    check(load_every >= 1, f"train_loop: `load_every` is {load_every}, want at least 1")
    check(done <= steps, f"train_loop: the state has done {done} steps, want at most steps={steps}")
    evaluates = evaluate is not None and eval_every > 0
    if evaluates and done == 0:
        write({"kind": "heldout", "step": 0, **evaluate(state)})
    stopped = None
    while done < steps and stopped is None:
        begin, before = time.perf_counter(), int(whole(state.tokens))
        state, metrics = step(state, *batches(done))
        done += 1
        row, load = step_numbers(done, metrics)
        check_finite(row)
        tokens, seconds = int(whole(state.tokens)), time.perf_counter() - begin
        row |= {"tokens": tokens, "seconds": round(seconds, 4), "tokens_per_second": round((tokens - before) / seconds, 1)}
        progress(row)
        write(row)
        if load.size and (done in (1, steps) or done % load_every == 0):
            write({"kind": "load", "step": done, "load": load.astype(int).tolist()})
        if evaluates and (done == steps or done % eval_every == 0):
            write({"kind": "heldout", "step": done, **evaluate(state)})
        stopped = stop()
        if save is not None and (done == steps or stopped is not None or (save_every and done % save_every == 0)):
            save(state, done)
    return LoopResult(state, done, stopped)
