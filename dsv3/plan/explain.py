"""Where the hours go, from model FLOPs at peak down to the prediction, beside what DeepSeek has published."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dsv3.config import ModelConfig
from dsv3.plan.chunk import product_time
from dsv3.plan.count import flops_by_part
from dsv3.plan.hardware import Hardware, hardware_change
from dsv3.plan.mesh import Plan
from dsv3.plan.predict import Prediction, predict_step
from dsv3.plan.schedule import stage_count
from dsv3.train.schedule import schedule_at
from dsv3.train.schedule_paper import PAPER_SCHEDULE
from dsv3.typing import Tree


class Published(NamedTuple):
    """What DeepSeek states of DeepSeek-V3's pretraining; times are seconds of a step.

    Attributes:
      hours: device hours of pretraining. tokens: how many it read. devices: H800s.
      batch: sequences of a step at full batch size. length: tokens of a sequence.
      step: time of a step, in which `forward`, `backward` and `weight` are chunks without a partner, `pairs` overlapped
        ones, `bubble` is waiting and `optimizer` the rest.
      mfu: model FLOPs utilisation of the bf16 peak with causal attention.
    """

    hours: float
    tokens: int
    devices: int
    batch: int
    length: int
    step: float
    forward: float
    backward: float
    weight: float
    pairs: float
    bubble: float
    optimizer: float
    mfu: float


_PRETRAINING = PAPER_SCHEDULE.stages[0]
_LAST = schedule_at(PAPER_SCHEDULE, _PRETRAINING.until - 1)

# Hours, devices: DeepSeek-V3 (arXiv:2412.19437) table 1 and section 3.1; tokens, batch and length: section 4.2. Times and
# MFU: arXiv:2505.09343 table 4, the multi-plane network. Its 272.80B tokens a day are 15,360 · 4,096 tokens every 19.926 s.
PUBLISHED = Published(
    hours=2.664e6, tokens=_PRETRAINING.until, devices=2048, batch=_LAST.batch_size, length=_LAST.seq_len, step=19.926,
    forward=1.13, backward=1.99, weight=0.48, pairs=13.95, bubble=2.06, optimizer=0.29, mfu=0.3894,
)  # fmt: skip


def is_published(cfg: ModelConfig, plan: Plan, hardware: Hardware) -> bool:
    """Whether `cfg`, `plan` and `hardware` are the published run: 2,048 H800s, 16 pipeline and 64 expert ranks, DualPipe."""
    size = (cfg.num_layers, cfg.hidden_size, cfg.vocab_size, cfg.moe.router.num_experts, cfg.num_mtp_layers)
    mesh = (plan.pipe, plan.expert, plan.devices, plan.batch, plan.length)
    p = PUBLISHED
    return (
        size == (61, 7168, 129_280, 256, 1) and mesh == (16, 64, p.devices, p.batch, p.length)
        and hardware.name == "h800" and plan.schedule == "dualpipe"
    )  # fmt: skip


class Rung(NamedTuple):
    """One line of the ladder: what is added, the hours that it adds, and the hours so far."""

    what: str
    added: float
    hours: float


def hours_ladder(cfg: ModelConfig, specs: Tree, plan: Plan, hardware: Hardware, *, tokens: float) -> list[Rung]:
    """Returns device hours, from a model whose products run at the bf16 peak up to `predict_step`, one cause at a time.

    Model FLOPs / peak; the MTP modules; FP8's peak where products are FP8; what is computed again; the rates that are
    reached; the busiest expert device; passes over memory; what communication takes, the part of the device that it uses
    and what is not hidden; the busiest pipeline rank; the bubble; gradients, parameters and optimiser.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: a possible plan.
      hardware: the device.
      tokens: of the whole training.

    Returns:
      A list of `Rung`; the last one's hours are the prediction's.
    """
    found = predict_step(cfg, specs, plan, hardware)
    a_token = tokens / 3600  # hours of one device second a token
    a_step = a_token * plan.devices / (plan.batch * plan.length)
    perfect = hardware.perfect()

    def products(on: Hardware, how: Plan, *, again: bool = True, mtp: bool = plan.mtp) -> float:
        flops = flops_by_part(cfg, specs, length=plan.length, recompute=plan.recompute, mtp=mtp)
        passes = flops if again else flops[:2]
        return a_token * sum(product_time(part, f, how, on) for parts in passes for part, f in parts.items())

    plain, balanced = plan.replace(products_dtype="bfloat16", imbalance=1.0), plan.replace(imbalance=1.0)
    compute = a_step * _mean_compute(found, plan)
    levels = [
        ("model FLOPs at the bf16 peak", products(perfect, plain, again=False, mtp=False)),
        ("MTP modules", products(perfect, plain, again=False)),
        (f"products in {plan.products_dtype}, at its peak", products(perfect, balanced, again=False)),
        ("what the backward pass computes again", products(perfect, balanced)),
        ("rates that products and attention reach", products(hardware, balanced)),
        ("busiest expert device", products(hardware, plan)),
        ("passes over memory", compute),
        ("communication: its multiprocessors, what is not hidden", a_step * found.mean_busy),
        ("busiest pipeline rank", a_step * found.busy),
        ("pipeline bubble", a_step * (found.busy + found.bubble)),
        ("gradients, parameters, optimiser", a_step * found.step),
    ]
    before = [0.0] + [hours for _, hours in levels]
    return [Rung(what, hours - last, hours) for (what, hours), last in zip(levels, before)]


def _mean_compute(found: Prediction, plan: Plan) -> float:
    """Seconds of a step that the mean rank computes, alone on its device."""
    chunks = plan.micro_batches * stage_count(plan.schedule, plan.pipe) / plan.pipe
    return chunks * found.compute


class StepPart(NamedTuple):
    """A part of a step in seconds, predicted for the mean rank and as published."""

    what: str
    predicted: float
    published: float


def step_parts(found: Prediction, plan: Plan) -> list[StepPart]:
    """Returns the published breakdown of a step beside the predicted one, for a plan that `is_published`.

    Args:
      found: the prediction.
      plan: its plan.

    Returns:
      A list of `StepPart` that ends with the whole step. The published chunks are of one rank or a mean, the table does not
      say; its two backward lines are one here, as it does not say which backward passes were split.
    """
    alone = stage_count(plan.schedule, plan.pipe)
    pairs = (plan.micro_batches - alone) * found.pair
    exposed = found.mean_busy - pairs
    forward = exposed * found.forward / (found.forward + found.backward)
    p = PUBLISHED
    rows = [
        ("overlapped pairs", pairs, p.pairs),
        ("forward without a partner", forward, p.forward),
        ("backward without a partner", exposed - forward, p.backward + p.weight),
        ("bubble", found.bubble + found.busy - found.mean_busy, p.bubble),
        ("gradients, parameters, optimiser", found.sync + found.optimizer, p.optimizer),
    ]
    rows.append(("step", found.step, p.step))
    return [StepPart(*row) for row in rows]


def implied_scale(cfg: ModelConfig, specs: Tree, plan: Plan, hardware: Hardware, *, step: float, rounds: int = 40) -> float:
    """Returns by which factor computation would have to be faster or slower for a step to take `step` seconds.

    The factor scales the fractions of FP8, bf16, attention and memory bandwidth together; links and schedule stay. It is
    found by bisection between 0.05 and what brings a fraction to 1.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: a possible plan.
      hardware: the device.
      step: seconds that were measured.
      rounds: halvings.

    Returns:
      The factor; an end of the interval if `step` lies outside of what it can explain.
    """
    names = ("fp8_fraction", "bf16_fraction", "attention_fraction", "hbm_fraction")
    now = {name: getattr(hardware, name) for name in names}

    def time(scale: float) -> float:
        changed = hardware_change(hardware, {name: min(1.0, scale * value) for name, value in now.items()})
        return predict_step(cfg, specs, plan, changed).step

    return _bisect(time, step, 0.05, 1 / max(now.values()), rounds)


def _bisect(falling: Callable[[float], float], goal: float, low: float, high: float, rounds: int) -> float:
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > goal else (low, middle)
    return (low + high) / 2
