"""What `reasoning.py` shows at its end: the table of stages over seeds, plots, the page, and the page of the docs."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from command import aligned, write_text

from dsv3.page import Table, write_page
from dsv3.train.records import read_rows

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHOWN = {
    "pretrain": "pretrained", "sft": "cold start", "grpo": "GRPO", "sft2": "second fine-tuning",
    "zero": "GRPO, no cold start", "student": "student, pretrained", "student_sft": "student, cold start",
    "student_grpo": "student, GRPO", "student_traces": "student, teacher's answers",
    "student_logits": "student, teacher's logits", "student_policy": "student, logits, on-policy",
    "student_both": "student, logits, GRPO",
}  # fmt: skip
PATH = ("pretrain", "sft", "grpo", "sft2")
COLUMNS = {
    "accuracy": "accuracy", "tokens": "tokens", "checked": "checks", "tries": "tries", "tried_again": "rejects a try",
    "right_after_rejecting": "then right", "corrected": "corrected", "misjudged": "misjudged", "wrong_steps": "wrong steps",
    "seconds": "seconds",
}  # fmt: skip
COUNTS = {"tokens": 1, "tries": 1, "seconds": 0}  # with so many decimals; the others are shares


def report(out: Path, plan: Mapping[int, Sequence[Any]], facts: Mapping[str, Any], *, docs: bool) -> None:
    """Writes and prints what came out. `plan`: each seed's stages; `facts`: how it was run, and for how long."""
    found = measurements(plan)
    rows = table(found)
    text = aligned(rows)
    write_text(out / "table.txt", text + "\n")
    write_text(out / "results.json", json.dumps(found, indent=1) + "\n")
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    plot = draw(plan, found, plots / "reasoning.png")
    example = transcript(plan, found)
    commands = "\n".join(shlex.join(stage.command) for stage in next(iter(plan.values())))
    page = write_page(
        out / "report.html", "Reasoning about countdown problems",
        [
            ("Held-out problems", [Table(rows), plot]), ("An answer that corrects itself", [example]),
            ("Commands", [commands]),
        ],
    )
    work = {f"{part}_work": minutes(plan, students=part == "students") for part in ("path", "students")}
    print(f"\n{text}\n\n{example}\n\n{duration(facts | work)}\n{page}")
    if docs:
        write_docs(plan, rows, plot, example, commands, facts | work | {"measured": found["sft2"][0]["problems"]})


def duration(facts: Mapping[str, Any]) -> str:
    """How long it took, as far as that is known, in sentences."""
    jobs, cores = facts["jobs"], facts["cores"]
    work = facts["path_work"] + facts["students_work"]
    where = f"{cores} core{'s' * (cores > 1)}"
    machine = f"with whatever else the machine did; {jobs} run at a time, on {where}."
    parts = [f"The times of its stages add up to {work} minutes, {machine}"]
    if facts["path"] is not None:
        parts.append(f"All took {facts['path']} minutes.")
    if facts["students_work"] and facts["students"] is not None:
        parts.append(f"The students took {facts['students']} minutes more.")
    return " ".join(parts)


def minutes(plan: Mapping[int, Sequence[Any]], *, students: bool) -> int:
    """Minutes of all stages of the path, or of the students, added up."""
    every = [stage for stages in plan.values() for stage in stages]
    wanted = [stage for stage in every if stage.name.startswith("student") == students]
    return round(sum(json.loads(stage.done.read_text())["seconds"] for stage in wanted) / 60)


def measurements(plan: Mapping[int, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
    """Stage → what was measured and the seconds that its training took, a seed each."""
    found: dict[str, list[dict[str, Any]]] = {}
    for stages in plan.values():
        took = {stage.name: json.loads(stage.done.read_text())["seconds"] for stage in stages}
        for stage in stages:
            if stage.measures is not None:
                results = json.loads((stage.folder / "results.json").read_text())
                found.setdefault(stage.measures, []).append(results | {"seconds": took[stage.measures]})
    return found


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """A line for each stage: means over seeds, and accuracies of each."""
    rows = [("held-out problems", *COLUMNS.values(), "accuracy by seed")]
    for stage, results in found.items():
        means = {column: statistics.fmean(result[column] for result in results) for column in COLUMNS}
        cells = (f"{value:.{COUNTS[name]}f}" if name in COUNTS else f"{value:.1%}" for name, value in means.items())
        rows.append((SHOWN[stage], *cells, " ".join(f"{result['accuracy']:.1%}" for result in results)))
    return rows


def draw(plan: Mapping[int, Sequence[Any]], found: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> Path:
    """Plots accuracy by stage, and of the explorations the rewards and lengths of answers."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    names = [name for name in SHOWN if name in found]
    for seed in range(len(plan)):
        (line,) = axes[0].plot([SHOWN[name] for name in PATH], [found[name][seed]["accuracy"] for name in PATH], "o-")
        others = [name for name in names if name not in PATH and seed < len(found[name])]
        heights = [found[name][seed]["accuracy"] for name in others]
        axes[0].plot([SHOWN[name] for name in others], heights, "s", color=line.get_color())
    axes[0].set(ylim=(0, 1), title="held-out accuracy, a colour a seed")
    axes[0].set_xticks(range(len(names)), [SHOWN[name] for name in names], rotation=30, ha="right", fontsize=8)
    for stages in plan.values():
        for stage in stages:
            if stage.name in ("grpo", "zero"):
                rows = [row for row in read_rows(stage.folder / "log.jsonl") if row["kind"] == "grpo"]
                style = {"linestyle": "--", "color": "C1"} if stage.name == "zero" else {"linestyle": "-", "color": "C0"}
                label = SHOWN[stage.name] if stages is next(iter(plan.values())) else None
                steps = [row["step"] for row in rows]
                axes[1].plot(steps, [row["parts"]["countdown"] for row in rows], label=label, **style)
                axes[2].plot(steps, [row["length"] for row in rows], **style)
    axes[1].set(ylim=(0, 1), title="right answers while learning", xlabel="exploration")
    axes[2].set(title="tokens of an answer", xlabel="exploration")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=90, metadata={"Software": None})
    plt.close(figure)
    return file


def transcript(plan: Mapping[int, Sequence[Any]], found: Mapping[str, Any]) -> str:
    """The first right answer of the last stage that has rejected a try, with its question."""
    folder = next(stage.folder for stage in next(iter(plan.values())) if stage.measures == "sft2")
    for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["parts"]["countdown"] == 1 and "? no\n" in row["text"]:
            return f"{row['prompt']}\n{row['text']}"
    return "None: no right answer has rejected a try."


def write_docs(
    plan: Mapping[int, Sequence[Any]], rows: Sequence[Sequence[str]], plot: Path, example: str, commands: str,
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Writes docs/reasoning.md and its plot."""
    target = DOCS / "reasoning.png"
    target.write_bytes(plot.read_bytes())
    command = shlex.join(["python", "examples/reasoning.py", *(arg for arg in sys.argv[1:] if "fresh" not in arg)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]))
    text = TEXT.format(
        **facts, took=textwrap.fill(duration(facts), 125), table=table, example=example, command=command,
        commands=commands, seeds=len(plan),
    )  # fmt: skip
    write_text(DOCS / "reasoning.md", text)


TEXT = """# Reasoning that improves, on one machine

`examples/reasoning.py` takes a small DeepSeek-V3 (`--preset {preset}`, with latent attention, routed and shared experts,
and multi-token prediction) along the R1 path, on countdown problems that it makes itself: reach a target with
numbers, each used once. This page was written by

```
{command}
```

for {seeds} seeds: other models, data and samples each.
{took}

## Held-out problems

Which problems are held out is decided by a hash of their numbers: no worked solution, no text and no problem to learn from
has one of these sets of numbers, all of which are from the same range. Four answers to each of {measured} held-out problems
are drawn at temperature 0.6, that of DeepSeek-R1's evaluation; those to learn from are drawn at temperature 1.

{table}

`checks`: share of answers whose thinking has a try, a line that ends in `yes` or `no`; `tries`: how many an answer has.
`rejects a try`: share of answers with a `no`; `then right`: of those, the share that ends with a right answer; `corrected`:
share of all answers that reject a try and end right. `misjudged`: tries whose last value is the target and that say `no`, or
the reverse. `wrong steps`: sums of two numbers that are wrong. `seconds`: of this stage's training, with the start of its
program.

![accuracy, rewards and lengths](reasoning.png)

An answer that corrects itself:

```
{example}
```

## What is done

1. **Pretraining** on text that the project makes: conversations that think about a problem, may end after any try, and
   answer, right or not; answers without thinking; expressions; sums. Sums and checks are right, conclusions often are not.
2. **Cold start**: supervised fine-tuning on a few worked solutions, which try in random order until a check says `yes`.
3. **GRPO** on two rules: whether the answer is right (weight 1), and its form (0.1). No solution is shown.
4. **Rejection sampling**: the model answers the problems that it learns from; different right answers are kept.
5. **A second fine-tuning** on those.
6. **Without a cold start**: GRPO from the pretrained model, asked as conversations are written in its text (R1-Zero).

With `--students` a **student** of two thirds of the width and a layer less is pretrained on the same text. It learns from
the worked solutions (cold start) and then from rewards alone (GRPO), as the teacher did. Or the pretrained student learns
what the teacher's second fine-tuning has learned, as DeepSeek-R1's students did: the teacher's right answers as text
(`sft.py`), or the distribution of each token of them that the teacher has after that fine-tuning (`distill.py`). The second
goes on with half as many explorations as GRPO by itself has: with the teacher's distributions on the student's own answers
(`distill.py --on_policy`), or with rewards (GRPO). See `docs/distillation.md`.

The commands of the first seed:

```
{commands}
```
"""
