"""Carries out a pipeline schedule: forward and backward passes of stages in the order of a table.

A rank is the devices of one place on the axis `pipe`. What a stage's forward pass keeps for its backward lives on that
stage's tape, from its F to its B, or to its W where the table splits the backward: the table bounds the memory. An entry
of two tasks runs them in turns, their pieces in the order of `pipeline.expand_pieces`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.nn.model import RouterState
from dsv3.parallel.collectives import Mail
from dsv3.parallel.mesh import on_device
from dsv3.parallel.tape import Gradients, Tape, Turn, Value, backward
from dsv3.pipeline import Schedule, Task, schedule_order
from dsv3.train.pieces import ModelPieces, StageBatch, StageOutput, stage_forward
from dsv3.train.stages import StageCut
from dsv3.typing import Tree


class Rank(NamedTuple):
    """What one pipeline rank works with.

    Attributes:
      devices: its local devices.
      params: for each direction, the devices' trees (see `stage_forward`).
      router: biases as `Value`s.
      batch: from a micro-batch's number to its `StageBatch` on these devices.
      answer: answers the requests of its programs.
    """

    devices: tuple[str, ...]
    params: Sequence[Sequence[Tree]]
    router: RouterState
    batch: Callable[[int], StageBatch]
    answer: Callable[[Any], Any]


class Seeds(NamedTuple):
    """Gradients of the total loss with respect to its parts: `main`, each module's `mtp`, each layer's `balance`."""

    main: float
    mtp: float
    balance: float


Sums = dict[tuple[str, int], list[tf.Tensor]]
"""By (`"main"`, 0), (`"mtp"`, module), (`"balance"` or `"load"`, mixture layer): the devices' sums over micro-batches."""


@dataclasses.dataclass(eq=False)
class RankResult:
    """What a rank has when the schedule is done: gradients and sums by device, and the most stages × micro-batches held."""

    grads: Gradients = dataclasses.field(default_factory=dict)
    sums: Sums = dataclasses.field(default_factory=dict)
    held: int = 0


@dataclasses.dataclass(eq=False)
class _Kept:
    """A forward pass whose backward is still to come: its tape, the keys of its input and output, its losses."""

    tape: Tape
    source: object
    result: object = None
    losses: list[tuple[object, float]] = dataclasses.field(default_factory=list)
    deferred: list = dataclasses.field(default_factory=list)


class _Executor:
    def __init__(
        self, schedule: Schedule, cut: StageCut, pieces: ModelPieces, ranks, mail: Mail, seeds: Seeds, cfg: ModelConfig
    ):
        self._schedule, self._cut, self._pieces, self._ranks, self._mail = schedule, cut, pieces, ranks, mail
        self._seeds, self._cfg = seeds, cfg
        self._kept: list[dict[tuple[int, int], _Kept]] = [{} for _ in ranks]
        self.results = [RankResult() for _ in ranks]

    def run(self) -> None:
        # All processes follow one order, so that whoever waits for another waits for something that comes before it there.
        for rank, position in schedule_order(self._schedule).steps:
            if self._ranks[rank] is None:
                continue
            programs = [self._program(rank, task) for task in self._schedule.rows[rank][position]]
            take_turns([p for p in programs if p is not None], self._ranks[rank].answer)
        self._mail.finish()

    def _program(self, rank: int, task: Task) -> Generator | None:
        if task.kind == "F":
            return self._forward(rank, task)
        if task.kind == "W":
            kept = self._kept[rank].pop((task.stage, task.micro_batch))
            for weights in kept.deferred:
                weights()
            return None
        return self._backward(rank, task)

    def _forward(self, rank: int, task: Task) -> Generator:
        r, key = self._ranks[rank], (task.stage, task.micro_batch)
        x = self._receive(task, task._replace(stage=task.stage - 1)) if task.stage else None
        tape = Tape(r.devices)
        kept = self._kept[rank]
        last = task.stage == self._schedule.stages - 1
        kept[key] = _Kept(tape, None if x is None else x.key)
        self.results[rank].held = max(self.results[rank].held, len(kept))
        yield Turn()  # the backward pass of a pair begins
        out = yield from stage_forward(
            tape, self._pieces, r.params[task.direction], r.router, x, r.batch(task.micro_batch),
            layers=self._cut.layers(task.stage), last=last, cfg=self._cfg,
        )  # fmt: skip
        kept[key].result, kept[key].losses = None if last else out.x.key, self._loss_seeds(out)
        self._add(rank, out)
        if not last:
            self._send(out.x.parts, task, task._replace(stage=task.stage + 1))

    def _backward(self, rank: int, task: Task) -> Generator:
        key = (task.stage, task.micro_batch)
        kept = self._kept[rank][key]
        seeds = {}
        if kept.result is not None:
            seeds[kept.result] = self._receive(task, task._replace(stage=task.stage + 1)).parts
        count = len(self._ranks[rank].devices)
        for loss, seed in kept.losses:
            seeds[loss] = [tf.constant(seed, tf.float32)] * count
        deferred = kept.deferred if task.kind == "I" else None
        grads = self.results[rank].grads
        found = yield from backward(kept.tape, seeds, grads, deferred=deferred)
        if kept.source is not None:
            self._send(found[kept.source], task, task._replace(stage=task.stage - 1))
        if task.kind == "B":
            del self._kept[rank][key]

    def _loss_seeds(self, out: StageOutput) -> list[tuple[object, float]]:
        main = [] if out.main is None else [(out.main.key, self._seeds.main)]
        mtp = [(value.key, self._seeds.mtp) for value in out.mtp]
        return main + mtp + [(value.key, self._seeds.balance) for value in out.balance.values()]

    def _send(self, parts: Sequence[tf.Tensor], task: Task, to: Task) -> None:
        """Brings what a stage has made to the devices of its neighbour."""
        self._mail.send(parts, self._schedule.rank_of(task), self._schedule.rank_of(to), self._tag(task, to))

    def _receive(self, task: Task, source: Task) -> Value:
        ranks = self._schedule.rank_of(source), self._schedule.rank_of(task)
        return Value(tuple(self._mail.receive(*ranks, self._tag(source, task))))

    def _tag(self, source: Task, target: Task) -> int:
        forward = target.stage > source.stage
        return (target.micro_batch * self._schedule.stages + target.stage) * 2 + forward

    def _add(self, rank: int, out: StageOutput) -> None:
        found = {("mtp", k): value for k, value in enumerate(out.mtp)}
        found |= {(name, layer): v for name in ("balance", "load") for layer, v in getattr(out, name).items()}
        if out.main is not None:
            found["main", 0] = out.main
        sums = self.results[rank].sums
        for key, value in found.items():
            for i, (device, part) in enumerate(zip(self._ranks[rank].devices, value.parts)):
                with on_device(device):
                    sums.setdefault(key, [tf.constant(0.0)] * len(value.parts))[i] += part


def run_schedule(
    schedule: Schedule,
    cut: StageCut,
    pieces: ModelPieces,
    ranks: Sequence[Rank | None],
    mail: Mail,
    seeds: Seeds,
    cfg: ModelConfig,
) -> list[RankResult]:
    """Runs all micro-batches of a step through all stages, forward and backward.

    Args:
      schedule: the table.
      cut: the layers of its stages.
      pieces: from `model_pieces`.
      ranks: its ranks; `None` for those without devices of this process.
      mail: brings activations and their gradients from rank to rank.
      seeds: see `Seeds`.
      cfg: the model's configuration.

    Returns:
      A `RankResult` for each rank, with nothing in it where the rank is `None`.

    Raises:
      ValueError: stages or ranks that do not fit the table.
    """
    check(len(ranks) == schedule.ranks, f"run_schedule: `ranks` are {len(ranks)}, want {schedule.ranks} of {schedule.name}")
    stages = len(cut.starts) - 1
    check(stages == schedule.stages, f"run_schedule: `cut` has {stages} stages, want {schedule.stages} of {schedule.name}")
    executor = _Executor(schedule, cut, pieces, ranks, mail, seeds, cfg)
    executor.run()
    return executor.results


def take_turns(programs: Sequence[Generator], answer: Callable[[Any], Any]) -> None:
    """Runs generators of requests to their ends, changing from one to the next where one yields a `Turn`."""
    waiting = list(programs)
    while waiting:
        program, reply = waiting.pop(0), None
        try:
            while not isinstance(request := program.send(reply), Turn):
                reply = answer(request)
            waiting.append(program)
        except StopIteration:
            pass
