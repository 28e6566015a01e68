"""`Plan`: a mesh, a schedule, a batch and number formats; which plans are impossible, and how layers are cut into stages.

Tokens are sharded over `data`·`expert`, routed experts over `expert` (and replicated over `data`), everything else of a
stage is replicated over both. Devices are numbered with `expert` innermost, then `data`, then `pipe`: a node of 8 holds 8
neighbours on the expert axis, and only with a smaller expert axis several data or pipe ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from dsv3.checks import check, check_choice
from dsv3.config import ModelConfig
from dsv3.plan.count import RECOMPUTE
from dsv3.plan.schedule import OVERLAPPING, SCHEDULES, rank_stages, schedule_problem, stage_copies, stage_count

AXES = ("pipe", "expert", "data")
HEAD_LAYERS = 3  # head and MTP weigh about so many blocks each; it only decides where a rank's two stages are cut


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is trained; the defaults are the paper's settings on one device.

    Attributes:
      pipe, expert, data: sizes of the mesh axes.
      schedule: one of `SCHEDULES`.
      batch: sequences of a step, all devices together. length: tokens of a sequence. micro_batch: sequences of a chunk.
      recompute: see `count.unit_flops`.
      weights_dtype: of the working weights, `"bfloat16"` or `"fp8"` (then embedding, head and MTP projection stay bfloat16).
      products_dtype: of the blocks' linear layers, `"fp8"` or `"bfloat16"`; their inputs are kept in it for the backward
        pass.
      dispatch_dtype: of a token on its way to its experts. combine_dtype: on its way back.
      moments_dtype: of AdamW's moments. Master weights and gradients are float32.
      zero: shard master weights and moments over the ranks that hold the same parameter (ZeRO-1).
      mtp: train the MTP modules.
      routing: how many nodes and devices a token goes to: `"limit"`, the most that the router allows, or `"uniform"`, the
        mean over uniformly drawn experts.
      imbalance: load of the busiest device of an expert group, relative to the mean.
      loss_chunk: tokens whose logits exist at one time.
      devices_per_node: devices that NVLink joins.
      stages: layers of each stage, or `()` for `stage_layers`'s choice.
    """

    pipe: int = 1
    expert: int = 1
    data: int = 1
    schedule: str = "one_f_one_b"
    batch: int = 1
    length: int = 4096
    micro_batch: int = 1
    recompute: str = "paper"
    weights_dtype: str = "bfloat16"
    products_dtype: str = "fp8"
    dispatch_dtype: str = "fp8"
    combine_dtype: str = "bfloat16"
    moments_dtype: str = "bfloat16"
    zero: bool = True
    mtp: bool = True
    routing: str = "limit"
    imbalance: float = 1.1
    loss_chunk: int = 1024
    devices_per_node: int = 8
    stages: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("pipe", "expert", "data", "batch", "length", "micro_batch", "loss_chunk", "devices_per_node"):
            check(getattr(self, name) > 0, f"Plan: `{name}` is {getattr(self, name)}, want > 0")
        check_choice("Plan", "schedule", self.schedule, SCHEDULES)
        check_choice("Plan", "recompute", self.recompute, RECOMPUTE)
        check_choice("Plan", "routing", self.routing, ("limit", "uniform"))
        for name, choices in (
            ("weights_dtype", ("bfloat16", "fp8", "float32")), ("products_dtype", ("bfloat16", "fp8")),
            ("dispatch_dtype", ("bfloat16", "fp8")), ("combine_dtype", ("bfloat16", "fp8")),
            ("moments_dtype", ("bfloat16", "float32")),
        ):  # fmt: skip
            check_choice("Plan", name, getattr(self, name), choices)
        check(self.imbalance >= 1, f"Plan: `imbalance` is {self.imbalance}, want at least 1")

    def replace(self, **fields) -> Plan:
        """Returns a copy with fields changed."""
        return dataclasses.replace(self, **fields)

    @property
    def devices(self) -> int:
        """All devices of the mesh."""
        return self.pipe * self.expert * self.data

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each data-parallel rank computes in a step."""
        return self.batch // (self.data * self.expert * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens of a chunk: one micro-batch on one device."""
        return self.micro_batch * self.length

    @property
    def overlap(self) -> bool:
        """Whether the schedule hides the all-to-all of most chunks behind computation."""
        return self.schedule in OVERLAPPING

    @property
    def copies(self) -> int:
        """Pipeline ranks that hold the same stage."""
        return stage_copies(self.schedule)

    @property
    def experts_in_node(self) -> int:
        """Devices of one expert group that share a node."""
        return min(self.devices_per_node, self.expert)

    @property
    def data_in_node(self) -> int:
        """Data ranks that share a node."""
        return max(1, min(self.data, self.devices_per_node // self.expert))


def parse_mesh(text: str) -> dict[str, int]:
    """Reads a mesh such as `"pipe:16,expert:64,data:2"`; axes that are left out have size 1.

    Args:
      text: axes of `AXES` with their sizes, in any order.

    Returns:
      Axis to size, for all three.

    Raises:
      ValueError: an unknown or repeated axis, or a size that is no positive whole number.

    >>> parse_mesh("data:2,pipe:4")
    {'pipe': 4, 'expert': 1, 'data': 2}
    """
    sizes: dict[str, int] = {}
    for item in text.split(",") if text else []:
        axis, colon, size = item.strip().partition(":")
        want = f"parse_mesh: `text` has {item.strip()!r}, want axis:size with an axis of {', '.join(AXES)}"
        check(bool(colon) and axis in AXES and size.isdecimal() and int(size) > 0, f"{want} and a size above 0")
        check(axis not in sizes, f"parse_mesh: `text` names the axis {axis!r} twice, want it once")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def plan_problem(cfg: ModelConfig, plan: Plan) -> str | None:
    """Returns why `plan` cannot run the model `cfg`, in one clause, or `None` if it can. Memory is not looked at."""
    e, g = cfg.moe.router.num_experts, cfg.moe.router.num_groups
    ranks = plan.data * plan.expert
    if plan.expert > 1 and not cfg.num_moe_layers:
        return f"expert:{plan.expert}, but the model has no mixture of experts"
    if e % plan.expert:
        return f"{e} experts are not divisible by expert:{plan.expert}"
    if plan.expert % plan.devices_per_node and plan.devices_per_node % plan.expert:
        return f"expert:{plan.expert} and nodes of {plan.devices_per_node} devices do not divide each other"
    for what, parts in (("devices", plan.expert), ("nodes", plan.expert // plan.experts_in_node)):
        if parts % g and g % parts:
            return f"{g} expert groups and the {parts} {what} of expert:{plan.expert} do not divide each other"
    if plan.batch % (ranks * plan.micro_batch):
        what = f"data·expert = {ranks} ranks with micro-batches of {plan.micro_batch}"
        return f"{plan.batch} sequences are not divisible by {what}"
    if plan.length > cfg.max_length:
        return f"{plan.length} tokens are more than the model's {cfg.max_length}"
    stages = stage_count(plan.schedule, plan.pipe)
    if stages - 1 > cfg.num_layers:
        return f"{stages} stages are too many for {cfg.num_layers} layers"
    if plan.stages and (len(plan.stages) != stages or sum(plan.stages) != cfg.num_layers or min(plan.stages) < 0):
        return f"stages {list(plan.stages)} are not {cfg.num_layers} layers in {stages} stages"
    return schedule_problem(plan.schedule, plan.pipe, plan.micro_batches)


def check_plan(cfg: ModelConfig, plan: Plan) -> None:
    """Raises `ValueError` with the reason unless `plan` can run the model `cfg`."""
    problem = plan_problem(cfg, plan)
    check(problem is None, f"check_plan: `plan` is impossible: {problem}")


class Stage(NamedTuple):
    """A stage: `dense` and `moe` blocks, `mtp` modules, and whether it has the `embed`ding and the `head`."""

    dense: int
    moe: int
    mtp: int
    embed: bool
    head: bool

    @property
    def units(self) -> dict[str, int]:
        """How often each unit of `count.UNITS` is computed."""
        return {"dense": self.dense, "moe": self.moe, "head": int(self.head), "mtp": self.mtp}


def stage_choices(cfg: ModelConfig, plan: Plan) -> list[tuple[int, ...]]:
    """Returns sensible numbers of layers for each stage, the one that needs least memory first.

    The rank with the head (and MTP) has more to do, so it gets fewer layers. All other ranks get at most c layers, where c
    is the least that suffices, or one or two more; the head's rank gets what is left. Within a rank the later stage, which
    keeps fewer micro-batches, gets the odd layer.

    Args:
      cfg: the configuration.
      plan: its mesh and schedule.

    Returns:
      Tuples of layers, one number a stage. DeepSeek-V3 on 16 ranks with DualPipe: (5, 4, 4, .., 4, 0), where a chunk has the
      four blocks of DeepSeek's published profile.
    """
    layers, stages = cfg.num_layers, stage_count(plan.schedule, plan.pipe)
    groups = sorted({tuple(sorted(group)) for group in rank_stages(plan.schedule, plan.pipe)})
    last = next(i for i, group in enumerate(groups) if stages - 1 in group)
    if len(groups) == 1:
        return [_fill(groups, [layers], stages, plan)]
    found = []
    least = -(-layers // len(groups))
    for cap in range(least, least + 3):
        left = max(0, layers - cap * (len(groups) - 1))
        each, more = divmod(layers - left, len(groups) - 1)
        others = [each + (i >= len(groups) - 1 - more) for i in range(len(groups) - 1)]
        choice = _fill(groups, others[:last] + [left] + others[last:], stages, plan)
        if choice not in found and each > 0:
            found.append(choice)
    return found


def _fill(groups: list[tuple[int, ...]], counts: list[int], stages: int, plan: Plan) -> tuple[int, ...]:
    layers = [0] * stages
    for group, count in zip(groups, counts):
        if len(group) == 1:
            layers[group[0]] = count
            continue
        early, late = group
        extra = HEAD_LAYERS * (1 + plan.mtp) if late == stages - 1 else 0
        layers[late] = max(0, (count + 1 - extra) // 2)
        layers[early] = count - layers[late]
    return tuple(layers)


def plan_stages(cfg: ModelConfig, plan: Plan) -> list[Stage]:
    """Returns what each stage of `plan` holds of `cfg`: layers as in `plan.stages`, else the first of `stage_choices`."""
    counts = plan.stages or stage_choices(cfg, plan)[0]
    stages, start = [], 0
    for i, count in enumerate(counts):
        dense = max(0, min(start + count, cfg.num_dense_layers) - start)
        head = i == len(counts) - 1
        mtp = cfg.num_mtp_layers if head and plan.mtp else 0
        stages.append(Stage(dense, count - dense, mtp, embed=i == 0, head=head))
        start += count
    return stages


@functools.lru_cache(maxsize=256)
def rank_contents(cfg: ModelConfig, plan: Plan) -> tuple[tuple[tuple[int, Stage], ...], ...]:
    """Returns the stages of each pipeline rank of `plan` for the model `cfg`, with their numbers."""
    stages = plan_stages(cfg, plan)
    return tuple(tuple((s, stages[s]) for s in held) for held in rank_stages(plan.schedule, plan.pipe))
