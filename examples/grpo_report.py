"""What `grpo.py` does after the training: plots, one page of report, the export."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from command import aligned, write_text
from grpo_setup import Setup, say

from dsv3.compiled import snapshot
from dsv3.data import find_chat_template, load_chat_template
from dsv3.data.chat_template import TEMPLATE_FILE
from dsv3.page import Table, write_page
from dsv3.pretrained import save_pretrained
from dsv3.rl.loop import GrpoState
from dsv3.rl.plots import plot_grpo
from dsv3.train.checkpoint import flat_settings
from dsv3.train.records import read_rows

FLAGS = flags.FLAGS
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
Rows = Sequence[dict[str, Any]]
NUMBERS = (
    "reward", "spread", "saturated", "length", "truncated", "kl", "entropy", "clip_low", "clip_high", "ratio_max",
    "grad_norm", "acceptance", "router_agreement", "rollout_seconds", "seconds",
)  # fmt: skip


def report(setup: Setup, state: GrpoState) -> None:
    """Exports and plots; prints what came out and where it is."""
    export = export_model(setup, state)
    rows = read_rows(setup.out / "log.jsonl")
    plots = plot_grpo(rows, setup.out / "plots")
    results = result_rows(rows)
    settings = [("setting", "value"), *flat_settings(setup.agreed).items()]
    page = write_page(
        setup.out / "report.html", f"GRPO run {setup.out}",
        [("Results", [Table(results)]), ("Training", list(plots)), ("Transcripts", [transcripts(rows)]),
         ("Settings", [Table(settings, left=2)])],
    )  # fmt: skip
    say("\n" + aligned(results))
    say(f"\nreport  {page}\nlog     {setup.out / 'log.jsonl'}, tensorboard --logdir {setup.out}\nexport  {export}")


def export_model(setup: Setup, state: GrpoState) -> Path:
    """Writes the model with its tokenizer and with the chat template that has asked, if one has."""
    files = [file for name in TOKENIZER if (file := Path(FLAGS.model) / name).exists()]
    params, router = snapshot((state.train.params, state.train.router))
    with tempfile.TemporaryDirectory() as folder:
        if FLAGS.chat and load_chat_template(FLAGS.model) is None:  # dsv3's has
            files.append(Path(folder) / TEMPLATE_FILE)
            write_text(files[-1], find_chat_template(FLAGS.model, setup.tokenizer).source)
        save_pretrained(setup.out / "export", setup.cfg, params, router, extra_files=files)
    return setup.out / "export"


def result_rows(rows: Rows) -> list[tuple[str, str, str]]:
    """Numbers at the beginning and at the end: means of a tenth of the explorations each, of those that have them."""
    found = [row for row in rows if row["kind"] == "grpo"]
    part = max(1, len(found) // 10)
    table = [("", f"first {part}", f"last {part}")]
    held = [row for row in rows if row["kind"] == "heldout"]
    if held:
        table.append(("accuracy, held-out problems", *(f"{row['accuracy']:.4f}" for row in (held[0], held[-1]))))
    flat = [row | {f"reward: {name}": value for name, value in row["parts"].items()} for row in found]
    for name in (*NUMBERS, *(name for name in flat[-1] if name.startswith("reward: "))):
        found = [row[name] for row in flat if name in row]  # some are not measured each time
        if found:
            table.append((name, *(f"{statistics.fmean(end):.4f}" for end in (found[:part], found[-part:]))))
    return table


def transcripts(rows: Rows, count: int = 5) -> str:
    """Samples from the beginning to the end, for people."""
    found = [row for row in rows if row["kind"] == "samples"]
    chosen = found[:: max(1, len(found) // count)][:count] + found[-1:]
    lines = []
    for row in chosen:
        for sample in row["samples"]:
            worth = f"reward {sample['reward']:.3f}, {sample['finish']}"
            lines += [f"--- exploration {row['step']}, problem {sample['problem']}: {worth}", sample["prompt"]]
            lines += [f">>> {sample['answer']}", ""]
    return "\n".join(lines) if lines else "None were written."
