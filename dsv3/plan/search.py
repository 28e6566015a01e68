"""Search: every mesh of a number of devices, which of them are possible, which fit, and which is fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.plan.hardware import Hardware
from dsv3.plan.memory import plan_memory
from dsv3.plan.mesh import Plan, plan_problem, stage_choices
from dsv3.plan.predict import Prediction, predict_step
from dsv3.plan.schedule import SCHEDULES
from dsv3.typing import Tree


class Candidate(NamedTuple):
    """A plan with the bytes that its fullest rank needs and, if that fits, its prediction."""

    plan: Plan
    memory: int
    prediction: Prediction | None


class Refused(NamedTuple):
    """A plan that cannot run, and why."""

    plan: Plan
    reason: str


class Found(NamedTuple):
    """What a search found: `fitting`, fastest first; `too_large`, smallest first; `refused`, in the order of the search."""

    fitting: list[Candidate]
    too_large: list[Candidate]
    refused: list[Refused]


def divisors(number: int) -> list[int]:
    """Returns the divisors of `number`, from 1 upwards."""
    return [d for d in range(1, number + 1) if number % d == 0]


def mesh_sizes(devices: int) -> Iterator[dict[str, int]]:
    """Yields every (pipe, expert, data) whose product is `devices`, as fields of a `Plan`; returns nothing else."""
    for pipe in divisors(devices):
        for expert in divisors(devices // pipe):
            yield {"pipe": pipe, "expert": expert, "data": devices // pipe // expert}


def search_plans(
    cfg: ModelConfig,
    specs: Tree,
    base: Plan,
    hardware: Hardware,
    *,
    devices: int,
    schedules: Sequence[str] = SCHEDULES,
    micro_batches: Sequence[int] = (1, 2, 4),
) -> Found:
    """Tries all meshes of `devices`, with each schedule and micro-batch; everything else is as in `base`.

    A plan that cannot run is refused with its reason and costs nothing more; one that fits no device, whichever way its
    layers are cut, is not timed. With one pipeline rank schedules are alike, and only the first of `schedules` that runs
    there is kept.

    Args:
      cfg: the configuration.
      specs: its specs.
      base: batch, length, number formats and so on. Its `stages` are ignored.
      hardware: the device.
      devices: size of the mesh.
      schedules: some of `SCHEDULES`.
      micro_batches: sequences of a chunk.

    Returns:
      `Found`.

    Raises:
      ValueError: `devices` is not positive.
    """
    check(devices > 0, f"search_plans: `devices` is {devices}, want > 0")
    found = Found([], [], [])
    for sizes in mesh_sizes(devices):
        for micro_batch in micro_batches:
            for schedule in schedules:
                plan = base.replace(**sizes, schedule=schedule, micro_batch=micro_batch, stages=())
                problem = plan_problem(cfg, plan)
                if problem is not None:
                    found.refused.append(Refused(plan, problem))
                    continue
                candidate = _try_stages(cfg, specs, plan, hardware)
                (found.fitting if candidate.prediction else found.too_large).append(candidate)
                if plan.pipe == 1:
                    break
    found.fitting.sort(key=lambda c: c.prediction.step)
    found.too_large.sort(key=lambda c: c.memory)
    return found


def _try_stages(cfg: ModelConfig, specs: Tree, plan: Plan, hardware: Hardware) -> Candidate:
    """The fastest way to cut the layers that fits, else the smallest."""
    best: list[Candidate] = []
    for stages in stage_choices(cfg, plan):
        cut = plan.replace(stages=stages)
        memory = max(m.total for m in plan_memory(cfg, specs, cut))
        fits = memory <= hardware.usable_memory
        best.append(Candidate(cut, memory, predict_step(cfg, specs, cut, hardware) if fits else None))
    fitting = [c for c in best if c.prediction]
    return min(fitting, key=lambda c: c.prediction.step) if fitting else min(best, key=lambda c: c.memory)
