"""Drives the workers: chooses the peer's best mode, then lets the contenders take turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

from benchmarks.cases import OURS, Case, Contender
from benchmarks.protocol import Worker, WorkerDied, WorkerError

PAUSE = 0.02  # seconds between turns, in which the other process's threads come to rest
LIMIT = 600.0  # seconds for one build


@dataclasses.dataclass
class Trial:
    """A candidate that was tried: its `label`, seconds to `build`, and milliseconds (or megabytes), or an `error`."""

    label: str
    build: float = 0.0
    value: float | None = None
    error: str = ""


@dataclasses.dataclass
class Result:
    """What a case gave.

    Attributes:
      case: the case.
      values: role → milliseconds of each turn, or megabytes; no entry for a role without a candidate that works.
      chosen: role → label of the measured candidate.
      trials: role → all its candidates.
      seconds: dsv3's time of the measured run in a memory case.
    """

    case: Case
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    chosen: dict[str, str] = dataclasses.field(default_factory=dict)
    trials: dict[str, list[Trial]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


class Workers:
    """The workers by side, started when first needed and again after one died.

    Args:
      start: `start(side) -> Worker`: a process that is set up.
    """

    def __init__(self, start: Callable[[str], Worker]):
        self.start = start
        self._running: dict[str, Worker] = {}

    def __getitem__(self, side: str) -> Worker:
        if side not in self._running:
            self._running[side] = self.start(side)
        return self._running[side]

    def forget(self, side: str) -> None:
        """Closes a worker."""
        if side in self._running:
            self._running.pop(side).close()

    def drop(self) -> None:
        """Makes all workers forget their contenders."""
        for side in list(self._running):
            try:
                self[side].drop()
            except (WorkerDied, WorkerError):
                self.forget(side)

    def close(self) -> None:
        """Closes all workers."""
        for side in list(self._running):
            self.forget(side)


def measure(case: Case, workers: Workers, *, repeats: int, say: Callable[[str], None] = lambda text: None) -> Result:
    """Measures one case.

    Args:
      case: see `Case`.
      workers: the processes.
      repeats: turns of each contender.
      say: is told what goes on.

    Returns:
      `Result`. A contender that fails is reported there, and the next candidate takes its place.
    """
    result = Result(case)
    if case.memory:
        for role, candidates in case.roles.items():
            _measure_memory(case, role, candidates, workers, result, say)
        return result
    for role, candidates in case.roles.items():
        _choose(case, role, candidates, workers, result, say)
    for turn in range(repeats):
        for role in list(result.chosen):
            if role not in result.values and turn:
                continue
            _take_turn(case, role, turn, workers, result)
    workers.drop()
    return result


def _take_turn(case: Case, role: str, turn: int, workers: Workers, result: Result) -> None:
    contender = next(c for c in case.roles[role] if c.label == result.chosen[role])
    time.sleep(PAUSE)
    try:
        times = workers[contender.side].run(_key(role, contender), turn, burst=case.burst, skip=case.skip)
    except (WorkerDied, WorkerError) as error:
        if isinstance(error, WorkerDied):
            workers.forget(contender.side)
        result.values.pop(role, None)
        result.trials[role].append(Trial(contender.label, error=str(error)))
        return
    result.values.setdefault(role, []).append(statistics.median(times))


def _key(role: str, contender: Contender) -> str:
    return f"{role}: {contender.label}"


def _choose(case, role, candidates, workers: Workers, result: Result, say) -> None:
    """Builds the candidates; of several, a short trial keeps the fastest."""
    trials = result.trials.setdefault(role, [])
    for contender in candidates:
        trial = Trial(contender.label)
        trials.append(trial)
        try:
            _try(case, role, contender, workers, trial, timed=len(candidates) > 1)
        except (WorkerDied, WorkerError) as error:
            trial.error = str(error)
            if isinstance(error, WorkerDied):
                workers.forget(contender.side)
        say(f"  {role}: {trial.label}: {_outcome(trial)}")
    working = [t for t in trials if not t.error]
    if not working:
        return
    best = min(working, key=lambda t: t.value or 0.0)
    result.chosen[role] = best.label
    if any(t.error for t in trials[trials.index(best) + 1 :]):  # a later one may have taken the process with it
        contender = next(c for c in candidates if c.label == best.label)
        try:
            _try(case, role, contender, workers, best, timed=False)
        except (WorkerDied, WorkerError) as error:
            best.error = str(error)
            result.chosen.pop(role)


def _try(case, role, contender: Contender, workers: Workers, trial: Trial, *, timed: bool) -> None:
    worker, key = workers[contender.side], _key(role, contender)
    trial.build = worker.build(key, contender.build, contender.options, warmup=2, timeout=LIMIT)
    if timed:
        turns = range(2 if case.burst - case.skip == 1 else 1)
        times = [worker.run(key, 500_000 + i, burst=case.burst, skip=case.skip) for i in turns]
        trial.value = statistics.median(sum(times, []))


def _outcome(trial: Trial) -> str:
    if trial.error:
        return f"failed: {trial.error}"
    return f"ready after {trial.build:.1f} s" + (f", {trial.value:.1f} ms" if trial.value is not None else "")


def _measure_memory(case, role, candidates, workers: Workers, result: Result, say) -> None:
    """Each candidate in a fresh process: the highest resident memory over that after the imports; the least counts."""
    trials = result.trials.setdefault(role, [])
    for contender in candidates:
        trial, worker = Trial(contender.label), None
        trials.append(trial)
        try:
            worker = workers.start(contender.side)
            warmup = 0 if case.limit else 2
            trial.build = worker.build("memory", contender.build, contender.options, warmup=warmup, timeout=LIMIT)
            worker.memory(reset=True)
            times = worker.run("memory", 0, burst=case.burst, timeout=LIMIT)
            trial.value = worker.memory()["peak"] - worker.baseline
            if role == OURS:
                result.seconds = statistics.median(times) / 1e3
        except (WorkerDied, WorkerError) as error:
            trial.error = str(error)
        finally:
            if worker is not None:
                worker.close()
        say(f"  {role}: {trial.label}: {f'failed: {trial.error}' if trial.error else f'{trial.value:.0f} MB'}")
    working = [t for t in trials if not t.error]
    if working:
        best = min(working, key=lambda t: t.value)
        result.values[role], result.chosen[role] = [best.value], best.label


def collect_versions(workers: Workers, sides: Mapping[str, str] | tuple[str, ...]) -> dict[str, str]:
    """Returns the versions that the workers run with."""
    versions: dict[str, str] = {}
    for side in sides:
        versions |= workers[side].versions
    return versions
