"""What `sft.py` and `distill.py` show: answers before and after, the held-out loss, plots, and the export."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from command import aligned, write_text
from sft_setup import Setup, say
from sft_train import Begun, make_score

from dsv3.compiled import snapshot
from dsv3.data import encode_prompt
from dsv3.page import Table, write_page
from dsv3.policy import ComputePolicy
from dsv3.pretrained import save_pretrained
from dsv3.serve import Engine, Request
from dsv3.train.checkpoint import flat_settings
from dsv3.train.plots import plot_run
from dsv3.train.records import read_rows
from dsv3.train.state import TrainState

FLAGS = flags.FLAGS
NEW_TOKENS = 64
BEFORE = "before.json"
NAMES = {
    "nll": "cross-entropy, nats a token", "top1": "next token right", "mtp_nll": "MTP cross-entropy, nats a token",
    "mtp_agreement": "MTP guess agrees with the model", "divergence": "divergence from the teacher, nats a token",
    "mtp_accepted": "drafts accepted in the samples",
}  # fmt: skip
Look = Callable[[TrainState], dict[str, float]]
"""Further held-out numbers of a state, of those in `NAMES`."""


def show_before(setup: Setup, begun: Begun, policy: ComputePolicy, look: Look = lambda state: {}) -> None:
    """Answers and scores held-out conversations with the model as it comes, once in a run."""
    if begun.saved is not None:
        return
    say("answering held-out questions with the model as it is")
    count = min(FLAGS.samples, len(setup.questions))
    asked = [i * len(setup.questions) // count for i in range(count)]  # spread evenly
    found = measure(setup, asked, begun.state, policy, look) | {"questions": asked}
    write_text(setup.out / BEFORE, json.dumps(found, ensure_ascii=False, indent=1) + "\n")


def measure(setup: Setup, asked: Sequence[int], state: TrainState, policy: ComputePolicy, look: Look) -> dict[str, Any]:
    """Scores of the held-out answers, and greedy answers to the questions that are asked, by their numbers."""
    params, router = snapshot((state.params, state.router))
    score = make_score(setup.cfg, min(8, len(setup.held.tokens)), policy)
    found = score(params, router, setup.held)._asdict() | look(state)
    answers, drafted, accepted = [], 0, 0
    prompts = [encode_prompt(setup.codec, question, tools=c.tools) for c, question, _ in chosen(setup, asked)]
    if prompts:
        length = min(setup.cfg.max_length, max(map(len, prompts)) + NEW_TOKENS)
        engine = Engine(
            setup.cfg, params, router, tokenizer=setup.codec.tokenizer, policy=policy, max_length=length,
            speculative=min(1, setup.cfg.num_mtp_layers), smallest_cache=length, chunk_sizes=(max(map(len, prompts)),),
        )  # fmt: skip
        for done in engine.generate([Request(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]):
            answers.append(done.text + ("" if done.finish_reason == "stop_token" else " [...]"))
            drafted, accepted = drafted + done.drafted, accepted + done.accepted
    found["mtp_accepted"] = accepted / drafted if drafted else float("nan")
    return {"heldout": {k: None if v != v else v for k, v in found.items()}, "answers": answers}


def chosen(setup: Setup, asked: Sequence[int]) -> list[tuple[Any, list[dict[str, Any]], str]]:
    """Held-out conversations by their numbers: the conversation, its first question as messages, the answer to it."""
    found = []
    for conversation in (setup.questions[number] for number in asked):
        first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
        answer = conversation.messages[first]
        thought = f"<think>\n{answer['reasoning_content']}\n</think>\n\n" if answer.get("reasoning_content") else ""
        found.append((conversation, list(conversation.messages[:first]), thought + (answer.get("content") or "")))
    return found


def report(
    setup: Setup, state: TrainState, policy: ComputePolicy, look: Look = lambda state: {}, title: str = "Fine-tuning"
) -> None:
    """Evaluates, answers, plots and exports; prints what came out and where it is."""
    say("\nanswering held-out questions with the model as it has become")
    before = json.loads((setup.out / BEFORE).read_text(encoding="utf-8"))
    asked = before["questions"]
    if len(asked) != min(FLAGS.samples, len(setup.questions)):
        say(f"the run was begun with {len(asked)} questions: they are the ones that are asked again")
    after = measure(setup, asked, state, policy, look)
    samples = format_samples(chosen(setup, asked), before["answers"], after["answers"])
    sides = before["heldout"], after["heldout"]
    table = score_rows(f"held-out answers, {sides[1]['tokens']:,} tokens", *sides)
    finish(setup, state, *sides, samples, table, title)


def finish(
    setup: Any, state: TrainState, before: dict[str, Any], after: dict[str, Any], samples: str, table: list, title: str
) -> None:
    """Writes results, samples, plots, export and the page; prints what came out and where it is."""
    out = setup.out
    rows = read_rows(out / "log.jsonl")
    last = [row for row in rows if row["kind"] == "train"][-1]
    training = {name: last[name] for name in ("step", "tokens", "loss")}
    results = {"before": before, "after": after, "training": training}
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "samples.txt", samples)
    plots = plot_run(rows, out / "plots", mtp_layers=setup.cfg.num_mtp_layers)
    params, router = snapshot((state.params, state.router))
    files = [out / "tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    save_pretrained(out / "export", setup.cfg, params, router, extra_files=files)
    page = write_page(out / "report.html", f"{title} run {out}", sections(setup, table, plots, samples))
    say("\n" + samples)
    say(aligned(table))
    say(f"\nreport       {page}")
    say(f"log          {out / 'log.jsonl'}, tensorboard --logdir {out}")
    say(f"checkpoints  {out / 'checkpoints'}")
    say(f"export       {out / 'export'}: python examples/generate.py {out / 'export'} --chat --prompt '...'")


def score_rows(
    head: str, before: dict[str, Any], after: dict[str, Any], names: dict[str, str] = NAMES
) -> list[tuple[str, str, str]]:
    """The held-out scores side by side."""
    rows = [(head, "before", "after")]
    for name, what in names.items():
        if after.get(name) is not None:
            form = "{:.4f}" if name.endswith(("nll", "divergence")) else "{:.1%}"
            rows.append((what, *("-" if side[name] is None else form.format(side[name]) for side in (before, after))))
    return rows


def format_samples(asked: Sequence[tuple], before: Sequence[str], after: Sequence[str]) -> str:
    """Questions and answers as text."""
    parts = []
    for number, ((_, question, wanted), was, now) in enumerate(zip(asked, before, after), 1):
        asked = "\n".join(f"[{message['role']}] {message['content']}" for message in question)
        named = (("asked", asked), ("in the data", wanted), ("before", was), ("after", now))
        parts += [f"--- {number}, {name}\n{text}\n" for name, text in named]
    return "\n".join(parts)


def sections(setup: Any, table: list, plots: Sequence[Path], samples: str) -> list:
    """What the report in HTML shows."""
    settings = [(name, value) for name, value in flat_settings(setup.settings).items()]
    return [
        ("Results", [Table(table)]),
        ("Answers", [samples or "None was asked for."]),
        ("Training", list(plots)),
        ("Settings", [Table([("setting", "value"), *settings], left=2)]),
    ]
