"""Plans as aligned text: what `examples/plan.py` prints."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.config import ModelConfig
from dsv3.plan.count import flops_by_part, params_active, params_by_part, router_biases
from dsv3.plan.explain import PUBLISHED, hours_ladder, implied_scale, is_published, step_parts
from dsv3.plan.hardware import Hardware
from dsv3.plan.memory import Memory, cache_bytes, serving_memory
from dsv3.plan.mesh import Plan, rank_contents
from dsv3.plan.predict import Prediction
from dsv3.plan.search import Candidate, Found
from dsv3.plan.trace import Products, StepTrace, sum_products
from dsv3.plan.trace_check import (
    PADDING,
    Rank,
    formula_products,
    kept_bytes,
    model_calls,
    rank_checks,
    step_differences,
    traced_params,
    unexplained,
)
from dsv3.plan.traffic import step_traffic, token_copies, total_links
from dsv3.typing import Tree

GB = 1e9


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Returns rows under a head, columns aligned and two spaces apart.

    Args:
      head: a title for each column.
      rows: cells.
      left: how many columns are flush left; the others are flush right.

    Returns:
      Lines without a line break at the end.
    """
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(table[0]), line(["-" * w for w in widths]), *map(line, table[1:])])


def params_report(cfg: ModelConfig, specs: Tree) -> str:
    """Returns the parameters of `cfg` with `specs` by part, and totals with and without biases and MTP modules."""
    model, mtp = params_by_part(cfg, specs), params_by_part(cfg, specs, mtp=True)
    parts = [*model, *(part for part in mtp if part not in model)]
    rows = [(part, f"{model.get(part, 0):,}", f"{mtp.get(part, 0):,}") for part in parts]
    rows.append(("parameters", f"{sum(model.values()):,}", f"{sum(mtp.values()):,}"))
    biases = router_biases(cfg), router_biases(cfg, mtp=True)
    rows.append(("router biases (state)", *(f"{n:,}" for n in biases)))
    rows.append(("both", f"{sum(model.values()) + biases[0]:,}", f"{sum(mtp.values()) + biases[1]:,}"))
    active = params_active(cfg, specs), params_active(cfg, specs, embedding=False)
    lines = f"active for a token: {active[0]:,}, without the embedding table {active[1]:,}"
    return text_table(("parameters", "model", "MTP modules, own"), rows) + "\n" + lines


def flops_report(cfg: ModelConfig, specs: Tree, plan: Plan) -> str:
    """Returns the table of one token's GFLOPs by part, for the model `cfg` with `specs` as `plan` trains it."""
    flops = flops_by_part(cfg, specs, length=plan.length, recompute=plan.recompute, mtp=plan.mtp)
    rows = [
        (part, *(f"{passes.get(part, 0) / 1e9:.3f}" for passes in flops)) for part in flops.forward
    ]  # fmt: skip
    rows.append(("all", *(f"{sum(passes.values()) / 1e9:.3f}" for passes in flops)))
    head = (f"GFLOPs a token, length {plan.length}", "forward", "backward", "computed again")
    without = flops_by_part(cfg, specs, length=plan.length, recompute=plan.recompute, mtp=False).model
    text = f"forward and backward: {flops.model / 1e9:.1f}, of the model without MTP modules {without / 1e9:.1f}"
    return text_table(head, rows) + "\n" + text


def memory_report(cfg: ModelConfig, plan: Plan, memory: Sequence[Memory], hardware: Hardware) -> str:
    """Returns the table of gigabytes for each pipeline rank, and whether they fit.

    Args:
      cfg: the configuration.
      plan: the plan.
      memory: of each rank, as `plan_memory` returns it.
      hardware: the device.

    Returns:
      Lines. Neighbouring ranks that need the same share one.
    """
    rows: list[tuple[str, ...]] = []
    contents = rank_contents(cfg, plan)
    start = 0
    for rank, each in enumerate(memory):
        layers = [stage.dense + stage.moe for _, stage in contents[rank]]
        if rank + 1 < len(memory) and memory[rank + 1] == each:
            continue
        name = str(rank) if rank == start else f"{start}-{rank}"
        cells = [f"{value / GB:.2f}" for value in (*each, each.total)]
        rows.append((name, "+".join(map(str, layers)), *cells))
        start = rank + 1
    head = ("rank", "layers", "weights", "grads", "master", "moments", "activ.", "working", "dispatch", "loss", "all")
    most = max(m.total for m in memory)
    verdict = "fits" if most <= hardware.usable_memory else "DOES NOT FIT"
    usable = f"{hardware.usable_memory / GB:.1f} of {hardware.memory / GB:.1f} GB that an {hardware.name.upper()} has"
    text = f"fullest rank: {most / GB:.1f} GB; {verdict} into {usable}"
    return "GB on each device of a pipeline rank\n" + text_table(head, rows) + "\n" + text


def traffic_report(cfg: ModelConfig, specs: Tree, plan: Plan) -> str:
    """Returns the gigabytes that a device sends in a step of `plan`, on the rank that sends most, for `cfg` with `specs`."""
    ranks = [step_traffic(cfg, specs, plan, rank) for rank in range(plan.pipe)]
    rank, most = max(enumerate(ranks), key=lambda pair: sum(total_links(pair[1])))
    rows = [(name, f"{links.ib / GB:.2f}", f"{links.nvlink / GB:.2f}") for name, links in most.items()]
    rows.append(("all", *(f"{value / GB:.2f}" for value in total_links(most))))
    copies = token_copies(cfg, plan)
    text = f"copies of a token in a dispatch: {copies.ib:.2f} over InfiniBand, {copies.nvlink:.2f} over NVLink"
    head = (f"GB a step, sent by a device of rank {rank}", "InfiniBand", "NVLink")
    return text_table(head, rows) + "\n" + text


def time_report(plan: Plan, found: Prediction, hardware: Hardware, tokens: float) -> str:
    """Returns the lines that say how long a step and the whole training take.

    Args:
      plan: the plan.
      found: its prediction.
      hardware: the device.
      tokens: of the whole training.

    Returns:
      Lines.
    """
    ms = [f"{name} {1e3 * t:.1f} ms" for name, t in
          zip(("F", "B", "W", "F&B"), (found.forward, found.backward, found.weight, found.pair))]  # fmt: skip
    hours = found.device_hours(plan, tokens)
    return "\n".join([
        f"a chunk of {plan.tokens:,} tokens, mean: {', '.join(ms)}; {plan.micro_batches} micro-batches",
        f"step {found.step:.3f} s: busiest rank {found.busy:.3f} (mean {found.mean_busy:.3f}), bubble {found.bubble:.3f}, "
        f"gradients and parameters {found.sync:.3f}, optimiser {found.optimizer:.3f}",
        f"communication of a rank's chunks, hidden or not: at most {found.comm:.3f} s",
        f"{found.tokens_per_second:,.0f} tokens/s; "
        f"MFU {found.mfu:.1%} of the bf16 peak, {found.mfu_mtp:.1%} with MTP modules counted",
        f"{tokens:.3g} tokens: {hours / 1e6:.3f}M {hardware.name.upper()} hours, {hours / plan.devices / 24:.1f} days",
    ])  # fmt: skip


def hours_report(cfg: ModelConfig, specs: Tree, plan: Plan, hardware: Hardware, found: Prediction, tokens: float) -> str:
    """Returns where the hours go and, for the published run, the comparison with what DeepSeek states.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      hardware: the device.
      found: its prediction.
      tokens: of the whole training.

    Returns:
      Lines.
    """
    ladder = hours_ladder(cfg, specs, plan, hardware, tokens=tokens)
    rows = [(r.what, f"{r.added / 1e6:+.3f}", f"{r.hours / 1e6:.3f}") for r in ladder]
    text = text_table((f"million {hardware.name.upper()} hours", "adds", "so far"), rows)
    if not is_published(cfg, plan, hardware) or tokens != PUBLISHED.tokens:
        return text
    p = PUBLISHED
    hours = ladder[-1].hours
    parts = [
        (part.what, f"{part.predicted:.2f}", f"{part.published:.2f}", f"{part.predicted - part.published:+.2f}")
        for part in step_parts(found, plan)
    ]
    scale = implied_scale(cfg, specs, plan, hardware, step=p.step)
    peak, steps = ladder[0].hours / p.hours, p.tokens / (p.batch * p.length)
    return "\n".join([
        text, "",
        f"published: {p.hours / 1e6:.3f}M hours; predicted {hours / 1e6:.3f}M, {hours / p.hours - 1:+.1%}",
        f"the published step of {p.step} s is {p.step * steps * p.devices / 3600 / 1e6:.3f}M hours for all tokens",
        f"at 100% of the bf16 peak the model's FLOPs are {ladder[0].hours / 1e6:.3f}M hours: "
        f"the published hours are {peak:.1%} of that peak, {p.mfu:.1%} is stated",
        f"at each format's peak, MTP and recomputation included, {ladder[3].hours / 1e6:.3f}M hours: "
        f"the published hours are {ladder[3].hours / p.hours:.1%} of those peaks",
        f"for the published step of {p.step} s computation would have to run at {scale:.2f} of the assumed rates, "
        f"FP8 products at {scale * hardware.fp8_fraction:.2f} of their peak instead of {hardware.fp8_fraction:.2f}",
        "", text_table(("seconds of a step", "predicted", "published", "difference"), parts),
    ])  # fmt: skip


def serving_report(cfg: ModelConfig, specs: Tree, plan: Plan, hardware: Hardware, sequences: int) -> str:
    """Returns what a server of `cfg` with `specs` holds on `plan.expert` devices for `sequences` of `plan.length` tokens."""
    held = serving_memory(
        cfg, specs, devices=plan.expert, sequences=sequences, length=plan.length, memory=hardware.usable_memory,
        mtp=plan.mtp, dtype=plan.weights_dtype,
    )  # fmt: skip
    a_token = cache_bytes(cfg, mtp=plan.mtp)
    return "\n".join([
        f"latent cache: {a_token:,} bytes a token, {a_token * plan.length / GB:.3f} GB for {plan.length:,} tokens",
        f"{sequences:,} sequences of {plan.length:,} tokens on {plan.expert} devices, weights in {plan.weights_dtype}: "
        f"weights {held.weights / GB:.2f} GB and cache {held.cache / GB:.2f} GB on each",
        f"{held.fitting:,} such sequences fit into {hardware.usable_memory / GB:.1f} GB a device",
    ])  # fmt: skip


def trace_report(cfg: ModelConfig, specs: Tree, plan: Plan, trace: StepTrace) -> str:
    """Returns a traced step beside the formulas: its pieces, why they differ, ranks, totals, and what is kept.

    Args:
      cfg: the configuration.
      specs: its specs.
      plan: the plan.
      trace: of its step, from `trace_step`.

    Returns:
      Lines. A piece that formulas and differences do not explain is named with the word NOT.
    """
    formula, calls = formula_products(cfg, specs, plan), model_calls(trace)
    rows = [
        (name, str(calls[name]), *_compared(piece.flops, formula.get(name, Products()), plan.tokens))
        for name, piece in trace.pieces.items()
    ]
    passes = [cell for name in ("forward", "inputs", "weights") for cell in (name, "formula", "ratio")]
    why = step_differences(cfg, specs, plan, trace)
    reasons = [(d.piece, d.reason, *(f"{flops / plan.tokens / 1e9:+.6f}" for flops in d.flops)) for d in why]
    left = unexplained(cfg, specs, plan, trace)
    verdict = "formulas and differences add up to what was traced, to the unit"
    if left:
        verdict = f"NOT explained, FLOPs of a call: {'; '.join(f'{name} {tuple(flops)}' for name, flops in left.items())}"
    blocks = [
        _trace_lines(cfg, plan, trace),
        text_table(("GFLOPs a token", "calls", *passes), rows),
        text_table(("differences, GFLOPs a token", "", "forward", "inputs", "weights"), reasons, left=2) + "\n" + verdict,
        _rank_lines(cfg, specs, plan, trace),
        _kept_lines(cfg, plan, trace),
    ]
    return "\n\n".join(blocks)


def trace_agrees(cfg: ModelConfig, specs: Tree, plan: Plan, trace: StepTrace) -> bool:
    """Returns whether a `trace` of `plan` for `cfg` with `specs` has the formulas' parameters, and explained products."""
    sides = (False, True) if plan.mtp else (False,)
    same = all(traced_params(specs, plan, trace, mtp=s) == sum(params_by_part(cfg, specs, mtp=s).values()) for s in sides)
    ranks = all(rank.params == rank.params_formula for rank in rank_checks(cfg, specs, plan, trace))
    return same and ranks and not unexplained(cfg, specs, plan, trace)


def _compared(traced: Products, formula: Products, tokens: int) -> list[str]:
    cells = []
    for flops, want in zip(traced, formula):
        ratio = f"{flops / want:.4f}" if want else "-" if not flops else "inf"
        cells += [f"{flops / tokens / 1e9:.4f}", f"{want / tokens / 1e9:.4f}", ratio]
    return cells


def _trace_lines(cfg: ModelConfig, plan: Plan, trace: StepTrace) -> str:
    policy = trace.policy
    lines = [
        f"traced from shapes: one device of each stage, a chunk of {plan.tokens:,} tokens; products in {policy.dtype}, "
        f"experts by {policy.experts!r}, remat {policy.remat!r}",
    ]
    if trace.capacity:
        router = cfg.moe.router
        sends = "sender" if not trace.first else "forwarding device"
        node = f", {trace.first:,} for a node" if trace.first else ""
        lines.append(
            f"load taken as balanced: {plan.tokens * router.top_k / router.num_experts:g} tokens of a device for each of "
            f"{router.num_experts} experts; room for {trace.capacity:,} from a {sends}{node}"
        )
    return "\n".join(lines)


def _rank_lines(cfg: ModelConfig, specs: Tree, plan: Plan, trace: StepTrace) -> str:
    ranks = rank_checks(cfg, specs, plan, trace)
    rows: list[tuple[str, ...]] = []
    start = 0
    for rank, each in enumerate(ranks):
        if rank + 1 < len(ranks) and ranks[rank + 1] == each:
            continue
        name, traced, want = str(rank) if rank == start else f"{start}-{rank}", sum(each.flops), sum(each.flops_formula)
        rows.append(
            (name, f"{each.params:,}", f"{each.params_formula:,}", f"{traced / 1e15:.3f}", f"{want / 1e15:.3f}",
             f"{traced / want:.4f}")
        )  # fmt: skip
        start = rank + 1
    head = ("a device of rank", "parameters", "formula", "PFLOPs a step", "formula", "ratio")
    return text_table(head, rows) + "\n" + "\n".join(_total_lines(cfg, specs, plan, trace, ranks))


def _total_lines(cfg: ModelConfig, specs: Tree, plan: Plan, trace: StepTrace, ranks: Sequence[Rank]) -> list[str]:
    lines = []
    for what, mtp in (("model", False), ("MTP modules", True))[: 1 + (plan.mtp and cfg.num_mtp_layers > 0)]:
        traced, want = traced_params(specs, plan, trace, mtp=mtp), sum(params_by_part(cfg, specs, mtp=mtp).values())
        equal = "equal to the formula" if traced == want else f"NOT equal to the formula's {want:,}"
        lines.append(f"parameters of the {what}, over all ranks: {traced:,}, {equal}")
    flops = flops_by_part(cfg, specs, length=plan.length, recompute=plan.recompute, mtp=plan.mtp)
    tokens, calls = plan.batch * plan.length, model_calls(trace)
    traced = sum(sum(each.flops) for each in ranks) * plan.data * plan.expert
    padding = sum_products(
        d.flops.times(calls[d.piece]) for d in step_differences(cfg, specs, plan, trace) if d.reason in PADDING
    )
    padded = sum(padding) * tokens // plan.tokens
    again = flops.hardware - flops.model
    lines.append(
        f"a step of {tokens:,} tokens on {plan.devices:,} devices: {traced / 1e18:.4f} EFLOPs traced; by formula "
        f"{flops.model * tokens / 1e18:.4f} and {again * tokens / 1e18:.4f} computed again: "
        f"ratio {traced / (flops.hardware * tokens):.4f}"
    )
    lines.append(f"rows that belong to no token: {padded / 1e18:.4f} EFLOPs, {padded / traced:.2%} of what was traced")
    return lines


def _kept_lines(cfg: ModelConfig, plan: Plan, trace: StepTrace) -> str:
    found = kept_bytes(cfg, plan, trace)
    rows = []
    for unit, (kept, gathered, planned) in found.items():
        values = [f"{value:,.0f}" for value in (kept, gathered, planned)]
        ratios = [f"{value / planned:.2f}" for value in (kept - gathered, kept)]
        rows.append((unit, *values, *ratios, f"{kept * plan.tokens / GB:.2f}"))
    head = ("kept, bytes a token", "traced", "of it weights", "plan", "ratio without", "ratio", "GB a chunk")
    return text_table(head, rows)


def describe(plan: Plan) -> str:
    """Returns `plan`'s mesh, schedule and micro-batch in a few words."""
    mesh = ",".join(f"{axis}:{getattr(plan, axis)}" for axis in ("pipe", "expert", "data"))
    return f"{mesh} {plan.schedule} micro-batch {plan.micro_batch}"


def search_report(found: Found, hardware: Hardware, tokens: float, *, top: int = 12) -> str:
    """Returns the fastest plans that fit, the smallest that do not, and why others cannot run.

    Args:
      found: of `search_plans`.
      hardware: the device.
      tokens: of the whole training, for the hours.
      top: how many plans to list.

    Returns:
      Lines.
    """
    head = ("mesh", "schedule", "micro", "stages", "GB", "step s", "MFU", "M hours")
    rows = [_candidate_row(c, tokens) for c in found.fitting[:top]]
    counts = [len(plans) for plans in found]
    lines = ["{} plans fit an {}, {} do not, {} cannot run".format(counts[0], hardware.name.upper(), *counts[1:])]
    lines.append(text_table(head, rows, left=2) if rows else "no plan fits")
    if found.too_large:
        least = found.too_large[0]
        lines.append(f"smallest that does not fit: {describe(least.plan)}, {least.memory / GB:.1f} GB")
    reasons: dict[str, list[Plan]] = {}
    for refused in found.refused:
        reasons.setdefault(refused.reason, []).append(refused.plan)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))
    lines += [f"cannot run: {reason} ({len(plans)} plans)" for reason, plans in most[:top]]
    if len(most) > top:
        lines.append(f"cannot run: {len(most) - top} other reasons ({sum(len(plans) for _, plans in most[top:])} plans)")
    return "\n".join(lines)


def _candidate_row(c: Candidate, tokens: float) -> tuple[str, ...]:
    plan, p = c.plan, c.prediction
    mesh = ",".join(f"{axis}:{getattr(plan, axis)}" for axis in ("pipe", "expert", "data"))
    spread = f"{min(p.stages)}-{max(p.stages)}" if len(p.stages) > 1 else str(p.stages[0])
    return (
        mesh, plan.schedule, str(plan.micro_batch), spread, f"{c.memory / GB:.1f}", f"{p.step:.3f}", f"{p.mfu:.1%}",
        f"{p.device_hours(plan, tokens) / 1e6:.3f}",
    )  # fmt: skip
