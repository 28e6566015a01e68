"""The data half of a plan as aligned text: what `examples/data_plan.py` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dsv3.plan.data import (
    DataPlan,
    StageRate,
    data_reading,
    data_saving,
    data_storage,
    data_work,
    prepare_hosts,
)
from dsv3.plan.report import text_table

TB = 1e12


def inputs_report(plan: DataPlan, origins: Mapping[str, str]) -> str:
    """Returns the table of what goes into a plan.

    Args:
      plan: the plan.
      origins: field to where its number comes from, for those that are not the default.

    Returns:
      Lines.
    """
    rows = []
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        text = f"{value:,.0f}" if value == int(value) and value < 1e15 else f"{value:,.4g}"
        rows.append((field.name, field.metadata["what"], text, origins.get(field.name, field.metadata["origin"])))
    table = [(name, what, value.rjust(max(len(r[2]) for r in rows)), origin) for name, what, value, origin in rows]
    return text_table(("what goes in", "", "", "from"), table, left=4)


def storage_report(plan: DataPlan) -> str:
    """Returns the table of what is stored for `plan`, and how many shards and windows that are."""
    found = data_storage(plan)
    hosts = plan.hosts
    rows = [
        ("text as it comes, compressed", f"{found.raw / TB:,.2f}", "while it is prepared"),
        ("signatures", f"{found.signatures / TB:,.2f}", "while it is prepared"),
        ("tokens", f"{found.tokens / TB:,.2f}", f"{plan.token_bytes} bytes each"),
        ("index of documents", f"{found.index / TB:,.2f}", f"{found.documents:,.3g} documents"),
    ]
    size = (found.tokens + found.index) / found.shards
    lines = [
        f"{found.shards:,} shards of {size / 1e9:.2f} GB, {found.shards / hosts:,.0f} for each of {hosts} hosts; "
        f"{found.windows:,} windows of {plan.window_tokens * plan.token_bytes / 1e6:.1f} MB",
        f"the text that stays is {found.text / TB:,.2f} TB; it need not be kept",
    ]
    return text_table(("stored, one copy", "TB", ""), rows, left=1) + "\n" + "\n".join(lines)


def work_report(plan: DataPlan, rates: Mapping[str, StageRate], origins: Mapping[str, str]) -> str:
    """Returns the table of what preparing the text of a plan costs.

    Args:
      plan: the plan.
      rates: of one core, by stage.
      origins: by stage, where its rate comes from.

    Returns:
      Lines.
    """
    if not rates:
        return "no rate is given, so that the cost of preparing is not known"
    work = data_work(plan, rates)
    total = sum(each.core_hours for each in work)
    rows = [
        (each.stage, f"{rates[each.stage].bytes_per_second / 1e6:,.2f}", f"{each.bytes / TB:,.2f}",
         f"{each.core_hours:,.0f}", f"{each.core_hours / total:.1%}", origins[each.stage])
        for each in work
    ]  # fmt: skip
    rows.append(("all", "", "", f"{total:,.0f}", "", ""))
    hosts = prepare_hosts(plan, total)
    head = ("preparing", "MB/s a core", "TB in", "core hours", "share", "rate from")
    days = total / (hosts * plan.prepare_cores * 24)
    bandwidth = (data_storage(plan).raw + data_storage(plan).tokens) / (days * 86400)
    return text_table(head, rows) + (
        f"\nhosts of {plan.prepare_cores} cores that do it within {plan.prepare_days:g} days: {hosts:,}, in {days:.1f} "
        f"days; {bandwidth / 1e9:.2f} GB/s of text in and tokens out"
    )


def reading_report(plan: DataPlan) -> str:
    """Returns what the training by `plan` reads, of all hosts and of one."""
    found, tokens = data_reading(plan), data_storage(plan).tokens
    rows = [
        ("tokens/s", f"{found.tokens_per_second:,.0f}", f"{found.tokens_per_second / plan.hosts:,.0f}"),
        ("MB/s, used", f"{found.bytes_per_second / 1e6:.3f}", f"{found.host_bytes / 1e6:.4f}"),
        ("MB/s, at most read", f"{found.bytes_per_second * plan.hosts / 1e6:,.1f}", f"{found.bytes_per_second / 1e6:.3f}"),
        ("sequences/s", f"{found.rows:.1f}", f"{found.rows / plan.hosts:.3f}"),
        ("windows/s", f"{found.windows:.3f}", f"{found.windows / plan.hosts:.5f}"),
    ]
    part = tokens * plan.repeats / plan.hosts
    text = f"a host uses {part / 1e9:,.0f} GB in {plan.seconds / 86400:.1f} days"
    return text_table(("read while it trains", f"{plan.hosts} hosts", "one host"), rows) + "\n" + text


def saving_report(plan: DataPlan, params: int) -> str:
    """Returns what checkpoints of a model of `params` scalars cost with `plan`."""
    found = data_saving(plan, params)
    rows = [
        ("bytes of one, TB", f"{found.bytes / TB:.3f}"),
        ("of a host, GB", f"{found.host_bytes / 1e9:.2f}"),
        (f"{plan.keep} that stay, TB", f"{plan.keep * found.bytes / TB:.2f}"),
        ("written in, s", f"{found.seconds:.1f}"),
        ("least bandwidth of all hosts, GB/s", f"{found.bandwidth / 1e9:.2f}"),
        ("waiting for writes, if it waits", f"{found.blocked:.2%}"),
        ("done again after failures", f"{found.lost:.2%}"),
        ("best interval if it waits, minutes", f"{found.best_minutes:.1f}"),
    ]
    head = (f"checkpoints of {params:,} parameters, every {plan.save_minutes:g} minutes", "")
    return text_table(head, rows)
