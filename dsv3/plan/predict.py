"""Time of a step: the ranks' chunks, the schedule's bubble, and what follows once the gradients are complete."""

from __future__ import annotations

from typing import NamedTuple

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.plan.chunk import Chunk, stage_time
from dsv3.plan.count import Flops, flops_by_part
from dsv3.plan.hardware import Hardware
from dsv3.plan.memory import Memory, plan_memory
from dsv3.plan.mesh import Plan, check_plan, rank_contents, stage_choices
from dsv3.plan.schedule import bubble_time, stage_count
from dsv3.plan.traffic import sync_traffic, total_links
from dsv3.typing import Tree


class Prediction(NamedTuple):
    """A step of a plan, in seconds, and what follows from it.

    Attributes:
      step: the whole step: busy + bubble + sync + optimizer.
      busy: computing and exposed communication of the busiest pipeline rank; `mean_busy` is the ranks' mean.
      bubble: waiting of the pipeline. sync: gradients and parameters between replicas. optimizer: reading and writing
        states.
      forward, backward, weight, pair: mean chunk times F, B, W and F&B that the bubble was computed from.
      compute: mean computing time of a chunk, forward and backward, on a device of its own.
      comm: the most that a rank's chunks communicate in a step, hidden or not.
      tokens_per_second: of all devices.
      mfu: model FLOPs without MTP modules, of the bf16 peak, as DeepSeek states it; `mfu_mtp`: with them.
      fits: whether every rank's memory does.
      memory: of each pipeline rank.
      stages: layers of each stage.
    """

    step: float
    busy: float
    mean_busy: float
    bubble: float
    sync: float
    optimizer: float
    forward: float
    backward: float
    weight: float
    pair: float
    compute: float
    comm: float
    tokens_per_second: float
    mfu: float
    mfu_mtp: float
    fits: bool
    memory: list[Memory]
    stages: tuple[int, ...]

    def device_hours(self, plan: Plan, tokens: float) -> float:
        """Returns the device hours that `tokens` take with `plan`, which was predicted."""
        return tokens / self.tokens_per_second * plan.devices / 3600


def rank_time(chunks: list[Chunk], plan: Plan, hardware: Hardware) -> tuple[Chunk, float, float]:
    """Returns one rank's mean chunk, its F&B, and its busy seconds in a step.

    Without overlap F&B is the sum of everything. With it, a pair of chunks takes `max(compute / share, communication)`,
    where `share` of the device computes while the rest moves data. Of n chunks S run without a partner, forward at the
    beginning and backward at the end, and expose their communication: busy = (n − S)·F&B + S·(F + B).

    Args:
      chunks: of the rank's stages.
      plan: the schedule.
      hardware: the device.

    Returns:
      (mean chunk, F&B, busy).

    References: DeepSeek-V3 section 3.2.1; how many chunks are unpaired is the number of the middle ranks, others have
    fewer pairs.
    """
    mean = Chunk(*(sum(values) / len(chunks) for values in zip(*chunks)))
    alone = mean.compute + mean.comm
    number = plan.micro_batches * len(chunks) // plan.copies
    if not plan.overlap:
        return mean, alone, number * alone
    # A rank without all-to-all lends no multiprocessors, and overlapping is never worse than not to.
    pair = min(alone, max(mean.compute / hardware.compute_share, mean.comm))
    unpaired = min(number, stage_count(plan.schedule, plan.pipe))
    return mean, pair, (number - unpaired) * pair + unpaired * alone


def predict_step(cfg: ModelConfig, specs: Tree, plan: Plan, hardware: Hardware) -> Prediction:
    """Predicts a step: the busiest rank's chunks, the schedule's bubble, and what follows once the gradients are complete.

    step = max over ranks of busy + bubble + sync + optimiser. Gradients and parameters are exchanged after the last chunk,
    over InfiniBand and NVLink at the same time, hidden by nothing; the optimiser reads and writes its states and gradients
    once.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: a possible plan; it need not fit the memory.
      hardware: the device.

    Returns:
      `Prediction`.

    Raises:
      ValueError: an impossible plan.
    """
    check_plan(cfg, plan)
    contents = rank_contents(cfg, plan)
    times = {stage: stage_time(cfg, specs, plan, stage, hardware) for held in contents for _, stage in held}
    ranks = [rank_time([times[stage] for _, stage in held], plan, hardware) for held in contents]
    busy = max(rank[2] for rank in ranks)
    mean = Chunk(*(sum(values) / len(ranks) for values in zip(*(rank[0] for rank in ranks))))
    pair = sum(rank[1] for rank in ranks) / len(ranks)
    forward, backward = mean.forward + mean.comm_forward, mean.inputs + mean.weights + mean.comm_backward
    bubble = bubble_time(
        plan.schedule,
        stage_count(plan.schedule, plan.pipe),
        forward=forward,
        backward=backward,
        weight=mean.weights,
        pair=pair,
    )
    memory = plan_memory(cfg, specs, plan)
    sync = max(sync_time(cfg, specs, plan, rank, hardware) for rank in range(plan.pipe))
    optimizer = max(
        (2 * (m.master + m.moments) + m.gradients + m.weights) / (hardware.hbm_bandwidth * hardware.hbm_fraction)
        for m in memory
    )
    step = busy + bubble + sync + optimizer
    rate = plan.batch * plan.length / step
    peak = plan.devices * hardware.bf16_flops
    chunks = plan.micro_batches * len(contents[0]) / plan.copies
    return Prediction(
        step=step, busy=busy, mean_busy=sum(rank[2] for rank in ranks) / len(ranks), bubble=bubble, sync=sync,
        optimizer=optimizer, forward=forward, backward=backward, weight=mean.weights, pair=pair,
        compute=mean.compute, comm=max(rank[0].comm for rank in ranks) * chunks,
        tokens_per_second=rate, mfu=_model_flops(cfg, specs, plan, mtp=False).model * rate / peak,
        mfu_mtp=_model_flops(cfg, specs, plan, mtp=plan.mtp).model * rate / peak,
        fits=max(m.total for m in memory) <= hardware.usable_memory, memory=memory,
        stages=plan.stages or stage_choices(cfg, plan)[0],
    )  # fmt: skip


def _model_flops(cfg: ModelConfig, specs: Tree, plan: Plan, *, mtp: bool) -> Flops:
    return flops_by_part(cfg, specs, length=plan.length, recompute=plan.recompute, mtp=mtp)


def sync_time(cfg: ModelConfig, specs: Tree, plan: Plan, rank: int, hardware: Hardware) -> float:
    """Returns the seconds in which a device of `rank` exchanges gradients and parameters: the slower link's.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      rank: the pipeline rank.
      hardware: the links.

    Returns:
      Seconds.
    """
    links = total_links(sync_traffic(cfg, specs, plan, rank))
    return max(
        links.ib / (hardware.ib_bandwidth * hardware.ib_fraction),
        links.nvlink / (hardware.nvlink_bandwidth * hardware.nvlink_fraction),
    )


def choose_stages(cfg: ModelConfig, specs: Tree, plan: Plan, hardware: Hardware) -> Plan:
    """Returns `plan` with the fastest of `mesh.stage_choices` that fits the memory, else with the one that needs least.

    A plan whose `stages` are given is returned as it is.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: a possible plan.
      hardware: the device.

    Returns:
      `Plan` with `stages`.
    """
    check(plan.micro_batches > 0, f"choose_stages: `plan` has {plan.batch} sequences, want one for each rank at least")
    if plan.stages:
        return plan
    plans = [plan.replace(stages=stages) for stages in stage_choices(cfg, plan)]
    found = [(predict_step(cfg, specs, each, hardware), each) for each in plans]
    fitting = [pair for pair in found if pair[0].fits]
    if fitting:
        return min(fitting, key=lambda pair: pair[0].step)[1]
    return min(found, key=lambda pair: max(m.total for m in pair[0].memory))[1]
