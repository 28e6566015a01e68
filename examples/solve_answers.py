"""Answers of `solve.py`: the file to which they are added as they come, rows of right ones, what they are worth together."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from command import write_text
from grpo_problems import Question

from dsv3.checks import check
from dsv3.rl.countdown import count_tries
from dsv3.rl.explore import Task
from dsv3.train.checkpoint import check_settings

FLAGS = flags.FLAGS
PART = "answers.part.jsonl"


class Answer(NamedTuple):
    """An answer of the model.

    Attributes:
      problem, sample: of which problem it is, and which of the answers to it.
      texts: of each turn. tokens: of them all. ended: whether the last one ended by itself.
      total, parts: its rewards.
    """

    problem: int
    sample: int
    texts: Sequence[str]
    tokens: int
    ended: bool
    total: float
    parts: dict[str, float]

    @property
    def text(self) -> str:
        """What was judged."""
        return "\n".join(self.texts)

    @property
    def right(self) -> bool:
        """Whether the first reward is whole, which decides accuracy in every program."""
        return next(iter(self.parts.values())) >= 1


def begun_at(out: Path) -> str | None:
    """When the answers were begun with which a run goes on; without such, the present."""
    head = None
    with contextlib.suppress(OSError), open(out / PART, encoding="utf-8", errors="replace") as lines:
        head = None if FLAGS.fresh else _parsed(lines.readline())
    return head["settings"].get("time") if _is_head(head) else datetime.now().isoformat()


def open_part(out: Path, settings: dict[str, Any]) -> list[Answer]:
    """Begins the file of answers as they come, or goes on with it; returns the answers to problems that have them all.

    What else is in it, as a line that was cut off, is drawn again, and put out of the file.

    Raises:
      ValueError: it was begun with other settings, or cannot be read.
    """
    file, found = out / PART, []
    if FLAGS.fresh:
        file.unlink(missing_ok=True)
    if file.exists():
        head, *lines = map(_parsed, file.read_text(encoding="utf-8", errors="replace").split("\n"))
        check(_is_head(head), f"{str(file)!r} does not begin with settings, want it moved away, or --fresh")
        try:
            check_settings(head["settings"], settings, where=f"the answers in {str(file)!r}")
        except ValueError as error:
            raise ValueError(f"{error}; another --out keeps both, --fresh starts anew") from None
        by_problem: dict[int, list[Answer]] = {}
        for line in filter(None, lines):
            by_problem.setdefault(line["problem"], []).append(Answer(**line))
        found = [answer for each in by_problem.values() if len(each) == FLAGS.samples for answer in each]
    write_text(file, json.dumps({"settings": settings}) + "\n" + _lines(found))
    return found


def add_to_part(out: Path, answers: Sequence[Answer]) -> None:
    """Adds answers to the file that `open_part` has begun, for good."""
    with open(out / PART, "a", encoding="utf-8") as file:
        file.write(_lines(answers))
        file.flush()
        os.fsync(file.fileno())


def _lines(answers: Sequence[Answer]) -> str:
    return "".join(json.dumps(answer._asdict()) + "\n" for answer in answers)


def _is_head(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("settings"), dict)


def _parsed(line: str) -> Any:
    """A line's value; None: it is empty or not whole."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def row(answer: Answer, task: Task) -> dict[str, Any]:
    """An answer as a line of answers.jsonl."""
    fields = answer._asdict()
    texts = fields.pop("texts")
    several = {"texts": texts} if task.turns else {}
    asked = {"prompt": task.text, "reference": plain(task.reference)}
    head = {name: fields.pop(name) for name in ("problem", "sample")}
    return {**asked, **head, "name": task.name, "text": answer.text, **several, **fields}


def plain(reference: Any) -> Any:
    """A reference as JSON has it."""
    return reference if isinstance(reference, (str, int, float, dict, list)) else str(reference)


def kept_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Right answers that have ended, at most --keep different ones a problem: those with the most reward, then the first."""
    kept: dict[int, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: (answer.problem, -answer.total, answer.sample)):
        enough = FLAGS.keep_total is None or answer.total >= FLAGS.keep_total
        same = kept.setdefault(answer.problem, [])
        new = answer.texts not in [other.texts for other in same]
        if answer.right and answer.ended and enough and new and len(same) < FLAGS.keep:
            same.append(answer)
    return [answer for same in kept.values() for answer in same]


def conversation(answer: Answer, question: Question) -> dict[str, Any]:
    """An answer as a row to learn from, with the question as it was put: whoever learns it has a template of its own."""
    pairs = zip(question.turns, answer.texts, strict=True)
    return {"messages": [
        {"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)
    ]}  # fmt: skip


def summary(answers: Sequence[Answer], tasks: Sequence[Task]) -> dict[str, Any]:
    """Accuracy and its standard error over problems, rewards, lengths, and for countdown problems what the thinking has."""
    correct = np.array([answer.right for answer in answers], float).reshape(-1, FLAGS.samples)
    mean = correct.mean(1)
    found = {
        "problems": len(mean), "samples": FLAGS.samples, "accuracy": float(mean.mean()),
        "standard_error": float(mean.std() / max(1, len(mean) - 1) ** 0.5),
        "any_right": float(correct.max(1).mean()), "all_right": float(correct.min(1).mean()),
        "tokens": float(np.mean([answer.tokens for answer in answers])),
        "ended": float(np.mean([answer.ended for answer in answers])),
        "rewards": {name: float(np.mean([answer.parts[name] for answer in answers])) for name in answers[0].parts},
    }  # fmt: skip
    return found | (checking(answers, tasks) if "countdown" in answers[0].parts else {})


def checking(answers: Sequence[Answer], tasks: Sequence[Task]) -> dict[str, float]:
    """Whether answers to countdown problems check themselves, and whether that corrects them."""
    counts = [count_tries(answer.text, tasks[answer.problem].reference) for answer in answers]
    again = [answer.right for answer, count in zip(answers, counts) if count.rejected]
    tries = sum(count.tries for count in counts)
    return {
        "tries": tries / len(counts),
        "checked": float(np.mean([count.tries > 0 for count in counts])),
        "tried_again": len(again) / len(counts),
        "right_after_rejecting": float(np.mean(again)) if again else 0.0,
        "corrected": sum(again) / len(counts),
        "misjudged": sum(count.misjudged for count in counts) / max(1, tries),
        "wrong_steps": sum(count.wrong_steps for count in counts) / max(1, sum(count.steps for count in counts)),
    }
