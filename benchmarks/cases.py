"""What is measured: each case's contenders, sizes and bars. Plain data, so that the driving process loads no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

DSV3 = "dsv3"
TORCH = "torch"
OURS = "dsv3"  # the role whose time every ratio is of
PEER = "peer"
PRODUCT = "product"  # a large product in dsv3's process: the machine's warm rate
ALONE = "products alone"  # the case's products and nothing else, in dsv3's process


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
      side: the worker that runs it, `"dsv3"` or `"torch"`.
      build: name of a builder of that side's module.
      options: the builder's keyword arguments, as JSON has them.
      label: how reports call it.
    """

    side: str
    build: str
    options: Mapping[str, Any]
    label: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row of the report: what is compared, and what must be reached.

    Attributes:
      name: the row's name.
      kind: `"ratio"` of times (role's / dsv3's), `"rate"` (percent of the product's FLOP/s), or `"memory"` (ratio of peaks).
      role: whom dsv3 is compared with.
      must, aim: bounds of the value.
    """

    name: str
    kind: str
    role: str
    must: float
    aim: float


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
      name: what `--cases` takes. group: several names at once.
      roles: role → its candidates, the preferred one first. Of several the fastest in a short trial is measured.
      bars: the rows of the report.
      burst: runs in a row of one contender at its turn; skip: how many of them, at first, are not counted (the other
        process has just used the caches).
      flops: role → multiplications and additions of one run, for bars of kind `"rate"`.
      memory: measure peak memory in a fresh process for each candidate instead of times.
      limit: for a case that only dsv3 runs: megabytes that its peak must stay below, and what they are.
      note: what a reader must know about precision and work.
    """

    name: str
    group: str
    roles: Mapping[str, Sequence[Contender]]
    bars: Sequence[Bar]
    burst: int = 1
    skip: int = 0
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    memory: bool = False
    limit: tuple[float, str] | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all cases; the defaults are those of the documented benchmark.

    Attributes:
      overrides: changes of the preset `bench`.
      train: (batch, tokens). prefill: (batch, tokens). decode: (batch, context) of each decode case.
      expert_tokens: tokens of the expert layers. attention: their lengths. product: n of an n×n×n product.
      long: tokens of the long prefill.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train: tuple[int, int] = (4, 512)
    prefill: tuple[int, int] = (8, 512)
    decode: tuple[tuple[int, int], ...] = ((1, 512), (8, 512), (8, 4096), (1, 32_768))
    expert_tokens: int = 2048
    attention: tuple[int, ...] = (512, 2048)
    product: int = 4096
    long: int = 32_768


FULL = Sizes()
QUICK = Sizes(
    overrides={"num_hidden_layers": 2},
    train=(2, 32), prefill=(2, 32), decode=((1, 64), (2, 64), (2, 128), (1, 256)), expert_tokens=128, attention=(32, 64),
    product=256, long=512,
)  # fmt: skip

DTYPES = ("bfloat16", "float32")
SHORT = {"bfloat16": "bf16", "float32": "f32"}

_TRAIN_NOTE = (
    "Training step: float32 parameters and moments. In bf16 dsv3 computes all products in bf16, those of the experts too; "
    "transformers runs under autocast, which leaves its routed experts' products in float32. dsv3's step also has the "
    "balance loss, the router's bias update and gradient statistics, which transformers has not. No side clips gradients."
)
_PREFILL_NOTE = (
    "Prefill: prompts to their first new token and their cache; parameters in the named dtype. dsv3 runs the steps of its "
    "engine: a prefill, which leaves out the last layer's outputs as nothing reads them, then a decode step for the "
    "prompt's last token. transformers computes the last position's logits only (logits_to_keep=1)."
)
_DECODE_NOTE = (
    "Decode: one new token a row after a cache of random latents; parameters and cache in bf16; the likeliest is chosen."
)
_EXPERTS_NOTE = (
    "Experts: forward and backward of the routed experts alone, {} tokens, hidden {}, expert {}; all tensors in the named "
    "dtype. The product rate is that of a warm product of {}³ in dsv3's process."
)
_MEMORY_NOTE = (
    "Memory: each in a fresh process: the highest resident memory of training steps after the first two, less the resident "
    "memory after the imports; parameters, gradients and moments are in it. The peer is the mode that needs least."
)


def _modes(*modes: tuple[str, str, bool]) -> list[dict[str, Any]]:
    return [{"attention": a, "experts": e, "compiled": c} for a, e, c in modes]


def _torch(build: str, modes: Sequence[Mapping[str, Any]], **options: Any) -> tuple[Contender, ...]:
    """One candidate for each mode of transformers."""

    def label(mode: Mapping[str, Any]) -> str:
        how = "torch.compile" if mode["compiled"] else "not compiled"
        cache = {True: ", static cache", False: ", dynamic cache"}[mode["compiled"]] if build == "decode" else ""
        return f"{how}, {mode['attention']} attention, {mode['experts']} experts{cache}"

    return tuple(Contender(TORCH, build, {**options, **mode}, label(mode)) for mode in modes)


def _both(build: str, modes: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, tuple[Contender, ...]]:
    return {OURS: (Contender(DSV3, build, options, "default policy"),), PEER: _torch(build, modes, **options)}


def _whole_modes(all_modes: bool) -> list[dict[str, Any]]:
    """Modes of a training step or a prefill. Experts as an eager loop cannot be compiled, and are slowest without."""
    short = [("eager", "grouped_mm", True), ("eager", "grouped_mm", False), ("sdpa", "grouped_mm", False)]
    return _modes(*short, *([("sdpa", "grouped_mm", True), ("eager", "eager", False)] if all_modes else []))


def _decode_modes(all_modes: bool, batch: int) -> list[dict[str, Any]]:
    """Modes of a decode step: batched_mm gathers weights for each token, which pays for few tokens only."""
    few, many = ("batched_mm", "grouped_mm") if batch == 1 else ("grouped_mm", "batched_mm")
    short = [("eager", few, True), ("eager", "grouped_mm", False), ("eager", "batched_mm", False)]
    short.append(("sdpa", "grouped_mm", False))
    more = [("eager", many, True), ("sdpa", few, True), ("sdpa", "batched_mm", False), ("eager", "eager", False)]
    return _modes(*short, *(more if all_modes else []))


def _alone(build: str, **options: Any) -> dict[str, tuple[Contender, ...]]:
    return {ALONE: (Contender(DSV3, build, options, ALONE),)}


def _train(sizes: Sizes, all_modes: bool) -> list[Case]:
    batch, length = sizes.train
    goals = {"bfloat16": (1.5, 2.0), "float32": (1.05, 1.3)}
    return [
        Case(
            f"train_{SHORT[dtype]}", "train",
            _both("train", _whole_modes(all_modes), batch=batch, length=length, dtype=dtype)
            | _alone("train_products", batch=batch, length=length, dtype=dtype),
            [Bar(f"training step B{batch} × {length}, {SHORT[dtype]}", "ratio", PEER, *goals[dtype])],
            burst=2, skip=1,
            note=_TRAIN_NOTE,
        )
        for dtype in DTYPES
    ]  # fmt: skip


def _prefill(sizes: Sizes, all_modes: bool) -> list[Case]:
    batch, length = sizes.prefill
    goals = {"bfloat16": (1.6, 2.2), "float32": (1.3, 1.6)}
    return [
        Case(
            f"prefill_{SHORT[dtype]}", "prefill",
            _both("prefill", _whole_modes(all_modes), batch=batch, length=length, dtype=dtype)
            | _alone("prefill_products", batch=batch, length=length, dtype=dtype),
            [Bar(f"prefill B{batch} × {length}, {SHORT[dtype]}", "ratio", PEER, *goals[dtype])],
            burst=2, skip=1,
            note=_PREFILL_NOTE,
        )
        for dtype in DTYPES
    ]  # fmt: skip


def _decode(sizes: Sizes, all_modes: bool) -> list[Case]:
    names = ("decode_b1_512", "decode_b8_512", "decode_b8_4k", "decode_b1_32k")
    goals = ((1.1, 1.5), (1.3, 2.0), (7.0, 12.0), (8.0, 12.0))
    return [
        Case(
            name, "decode",
            _both("decode", _decode_modes(all_modes, batch), batch=batch, context=context, dtype="bfloat16"),
            [Bar(f"decode step B{batch} at {context}, bf16", "ratio", PEER, *goal)],
            burst=5, skip=2,
            note=_DECODE_NOTE,
        )
        for name, (batch, context), goal in zip(names, sizes.decode, goals)
    ]  # fmt: skip


def _experts(sizes: Sizes) -> list[Case]:
    """The routed experts alone: dsv3's kernel, transformers' grouped_mm and a loop of products in torch."""
    cases, width, inner = [], 512, 256
    for num_experts, top_k in ((32, 4), (256, 8)):
        for dtype in ("float32", "bfloat16"):
            options = {"tokens": sizes.expert_tokens, "width": width, "inner": inner, "dtype": dtype}
            options |= {"num_experts": num_experts, "top_k": top_k}
            grouped = Contender(TORCH, "experts", {**options, "kernel": "grouped_mm"}, "transformers grouped_mm")
            loop = Contender(TORCH, "experts", {**options, "kernel": "loop"}, "torch, loop of products")
            roles = {OURS: (Contender(DSV3, "experts", options, "default policy"),)} | _alone("expert_products", **options)
            title = f"experts E{num_experts} k{top_k}, {SHORT[dtype]}"
            if num_experts == 32:
                rate, grouped_goal, loop_goal = {
                    "float32": ((60, 75), (1.4, 2.0), None),
                    "bfloat16": ((30, 50), None, (1.8, 2.5)),
                }[dtype]
                roles[PRODUCT] = (Contender(DSV3, "product", {"size": sizes.product, "dtype": dtype}, "product"),)
                bars = [Bar(f"{title}: of the product rate", "rate", PRODUCT, *rate)]
                if grouped_goal:
                    roles[PEER] = (grouped,)
                    bars.append(Bar(f"{title}: against grouped_mm", "ratio", PEER, *grouped_goal))
                else:
                    roles[PEER] = (loop,)
                    bars.append(Bar(f"{title}: against a loop of products", "ratio", PEER, *loop_goal))
            else:
                roles[PEER] = (grouped, loop)
                bars = [Bar(f"{title}: against torch's best", "ratio", PEER, 1.6, 2.0)]
            # Forward and backward: three products for each of gate, up and down.
            flops = 3 * 2 * sizes.expert_tokens * top_k * 3 * width * inner
            cases.append(
                Case(
                    f"experts_e{num_experts}_{SHORT[dtype]}", "experts", roles, bars, burst=3, skip=1,
                    flops={OURS: flops, PRODUCT: 2 * sizes.product**3},
                    note=_EXPERTS_NOTE.format(sizes.expert_tokens, width, inner, sizes.product),
                )
            )  # fmt: skip
    return cases


def _attention(sizes: Sizes) -> list[Case]:
    cases = []
    for length in sizes.attention:
        for dtype in ("float32", "bfloat16"):
            options = {"batch": 4, "heads": 8, "length": length, "qk": 96, "v": 64, "dtype": dtype}
            roles = {
                OURS: (Contender(DSV3, "attention", options, "default policy"),),
                PEER: (Contender(TORCH, "attention", options, "torch flash SDPA, v padded"),),
            }
            bar = Bar(f"attention B4 × {length}, {SHORT[dtype]}", "ratio", PEER, 0.9, 1.0)
            note = "Attention: forward and backward, 8 heads, qk 96, v 64; torch's flash kernel gets v padded to 96."
            name = f"attention_{length}_{SHORT[dtype]}"
            cases.append(Case(name, "attention", roles, [bar], burst=3, skip=1, note=note))
    return cases


def _memory(sizes: Sizes) -> list[Case]:
    batch, length = sizes.train
    modes = _modes(("eager", "grouped_mm", True), ("sdpa", "grouped_mm", False), ("eager", "grouped_mm", False))
    roles = _both("train", modes, batch=batch, length=length, dtype="bfloat16")
    bar = Bar(f"peak memory of a training step B{batch} × {length}, bf16", "memory", PEER, 1.0, 2.0)
    long = {OURS: (Contender(DSV3, "prefill", {"batch": 1, "length": sizes.long, "dtype": "bfloat16"}, "default policy"),)}
    scores = 2 * sizes.long**2 / 1e6
    what = f"one head's [{sizes.long}, {sizes.long}] scores in bf16"
    long_bar = Bar(f"prefill B1 × {sizes.long}, bf16: peak memory", "memory", PEER, 1.0, 2.0)
    return [
        Case("memory", "memory", roles, [bar], memory=True, burst=3, note=_MEMORY_NOTE),
        Case("prefill_32k", "prefill_32k", long, [long_bar], memory=True, limit=(scores, what)),
    ]


def all_cases(*, quick: bool = False, all_modes: bool = False) -> list[Case]:
    """Returns every case, in the order of the report.

    Args:
      quick: tiny sizes, to try the program; the numbers then mean nothing.
      all_modes: more candidates of transformers' modes: known to be slower, and long to compile.
    """
    sizes = QUICK if quick else FULL
    whole = [*_train(sizes, all_modes), *_prefill(sizes, all_modes), *_decode(sizes, all_modes)]
    return [*whole, *_experts(sizes), *_attention(sizes), *_memory(sizes)]


def without_compile(case: Case) -> Case:
    """Returns a case without the candidates that torch.compile makes."""
    kept = {role: [c for c in found if not c.options.get("compiled")] for role, found in case.roles.items()}
    return dataclasses.replace(case, roles=kept)


def select_cases(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Returns the cases that `names` (names of cases or groups, or `"all"`) ask for, in their own order.

    Raises:
      ValueError: a name that is neither.
    """
    known = {case.name for case in cases} | {case.group for case in cases} | {"all"}
    for name in names:
        if name not in known:
            raise ValueError(f"benchmark: --cases has {name!r}, want some of {', '.join(sorted(known))}")
    return [case for case in cases if {"all", case.name, case.group} & set(names)]
