"""Lets a model solve problems, judges its answers by rules, and keeps right ones to fine-tune on.

It measures a model on held-out problems, and it is the sampling half of rejection sampling and of distillation by traces:
the rows that it keeps are what `sft.py --data` reads.

In --out are answers.jsonl (each answer with its rewards), rows.jsonl (conversations of right answers, with --keep) and
results.json. Problems and rewards are those of `grpo.py`, whose --help describes them.

Examples:

  python examples/solve.py --model runs/sft/export --problems heldout.jsonl --chat --out runs/measured
  python examples/solve.py --model runs/grpo/export --problems train.jsonl --chat --samples 8 --keep 2 --out runs/traces
  python examples/solve.py --model model --problems gsm8k/test.jsonl --problems_format gsm8k --chat --temperature 0 \\
      --reward accuracy:1,format:0 --max_new_tokens 1024 --dtype bfloat16 --out runs/gsm8k
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from command import aligned, failure_line, flag_parser, lock_folder, write_text
from grpo_problems import (
    Question,
    answer_ends,
    check_references,
    make_tasks,
    read_questions,
    read_rewards,
    unescaped,
)
from tqdm import tqdm

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data import check_tokenizer, load_tokenizer
from dsv3.policy import default_policy
from dsv3.pretrained import load_pretrained
from dsv3.rl.countdown import count_tries
from dsv3.rl.explore import Task
from dsv3.rl.reward import score_completions
from dsv3.rl.rollout import sample_seed
from dsv3.serve import Completion, Engine, Request

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "Checkpoint directory.", required=True)
flags.DEFINE_string("problems", None, "File of problems.", required=True)
flags.DEFINE_enum("problems_format", "rows", ["rows", "gsm8k", "math", "code"], "What the file's rows are, see grpo.py.")
flags.DEFINE_integer("limit", 0, "How many of them, the first; 0: all.", 0)
flags.DEFINE_string("out", None, "Folder of the answers.", required=True)
flags.DEFINE_bool("chat", False, "Ask by the model's chat template, instead of --template.")
flags.DEFINE_string("template", "{question}\\n", "What the model reads; \\n and \\t are understood.")
flags.DEFINE_list("reward", ["accuracy:1"], "As accuracy:1,format:0.5. The first one says which answers are right.")
flags.DEFINE_integer("reward_threads", 1, "Threads that compute rewards; for code and mathematics, which have processes.", 1)
flags.DEFINE_integer("samples", 1, "Answers to each problem.", 1)
flags.DEFINE_float("temperature", 1.0, "Of the sampling; 0: the best token each time.", 0.0)
flags.DEFINE_integer("max_new_tokens", 64, "Tokens of an answer at most.", 1)
flags.DEFINE_multi_string("stop", [], "String that ends an answer (\\n and \\t are understood); repeat for several.")
flags.DEFINE_integer("keep", 0, "Right answers to each problem that become rows: different ones, as they come; 0: none.", 0)
flags.DEFINE_integer("seed", 0, "Of the sampling.", 0)
flags.DEFINE_integer("speculative", None, "Tokens that the MTP modules draft. Default: 1, if there are any.", 0)
flags.DEFINE_integer("max_batch", 64, "Answers that are drawn at the same time.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and products.")


class Answer(NamedTuple):
    """An answer of the model: of which problem, which sample, its text, tokens, whether it ended by itself, its rewards."""

    problem: int
    sample: int
    text: str
    tokens: int
    ended: bool
    total: float
    parts: dict[str, float]


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input, 1 for what fails later."""
    logging.set_verbosity(logging.WARNING)
    try:
        engine, questions, tasks, reward = prepare(argv)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    try:
        begin = time.monotonic()
        answers = judged(draw(engine, tasks), tasks, reward)
        seconds = time.monotonic() - begin
        rows = kept_rows(answers, questions) if FLAGS.keep else []
        out = Path(FLAGS.out)
        for name in ("results.json", "rows.jsonl"):  # of answers that were there before
            (out / name).unlink(missing_ok=True)
        write_lines(out / "answers.jsonl", [row(answer, tasks) for answer in answers])
        if FLAGS.keep:
            write_lines(out / "rows.jsonl", rows)
        results = summary(answers, tasks) | {"seconds": seconds, "kept": len(rows)}
        write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    except (ValueError, OSError) as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", 130)
    show(results, out)
    return 0


def prepare(argv: Sequence[str]):
    """Checks everything that can be wrong, cheapest first; returns the engine, the questions, the problems, the reward."""
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    cfg = ModelConfig.from_hf(FLAGS.model)
    tokenizer = load_tokenizer(FLAGS.model)
    check_tokenizer(tokenizer, cfg.vocab_size)
    how = {"max_new_tokens": FLAGS.max_new_tokens, "threads": FLAGS.reward_threads}
    reward = read_rewards(FLAGS.reward, tokenizer=tokenizer, **how)
    questions = read_questions(FLAGS.problems, FLAGS.problems_format)[: FLAGS.limit or None]
    check(all(len(question.turns) == 1 for question in questions), "--problems has a prompt of several turns, want one")
    tasks = make_tasks(questions, tokenizer, unescaped(FLAGS.template), "{question}", FLAGS.model if FLAGS.chat else None)
    longest = max(range(len(tasks)), key=lambda i: len(tasks[i].ids))
    size = len(tasks[longest].ids)
    check(
        size + FLAGS.max_new_tokens <= cfg.max_length,
        f"problem {longest + 1} has {size} tokens, with --max_new_tokens more than the model's {cfg.max_length}",
    )
    check_references(tasks, reward)
    lock_folder(Path(FLAGS.out))
    cfg, params, router = load_pretrained(FLAGS.model, dtype=FLAGS.dtype)
    speculative = min(1, cfg.num_mtp_layers) if FLAGS.speculative is None else FLAGS.speculative
    how = {"policy": default_policy().replace(dtype=FLAGS.dtype), "tokenizer": tokenizer, "max_batch": FLAGS.max_batch}
    engine = Engine(cfg, params, router, speculative=speculative, chunk_sizes=(32, 128), smallest_cache=64, **how)
    return engine, questions, tasks, reward


def draw(engine: Engine, tasks: Sequence[Task]) -> list[Completion]:
    """All answers, those of a problem one after the other; each follows from --seed, its problem and its number."""
    stop = [unescaped(text) for text in FLAGS.stop]
    how = {"max_new_tokens": FLAGS.max_new_tokens, "temperature": FLAGS.temperature, "stop": stop}
    how["stop_tokens"] = answer_ends(engine.cfg.eos_ids, engine.tokenizer, FLAGS.model if FLAGS.chat else None)
    requests = [
        Request(task.ids, seed=sample_seed(FLAGS.seed, 0, number, sample), **how)
        for number, task in enumerate(tasks) for sample in range(FLAGS.samples)
    ]  # fmt: skip
    found = []
    with tqdm(total=len(requests), unit="answer", desc="answers", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(requests), 4 * FLAGS.max_batch):
            found += engine.generate(requests[first : first + 4 * FLAGS.max_batch])
            bar.update(len(found) - bar.n)
    return found


def judged(done: Sequence[Completion], tasks: Sequence[Task], reward) -> list[Answer]:
    """The answers with their rewards."""
    places = [divmod(i, FLAGS.samples) for i in range(len(done))]
    texts = [tasks[number].opening + completion.text for completion, (number, _) in zip(done, places)]
    asked = [(tasks[number].text, tasks[number].reference) for number, _ in places]
    scores = score_completions(reward, *[[a for a, _ in asked], texts, [b for _, b in asked]], workers=FLAGS.reward_threads)
    return [
        Answer(number, sample, text, len(completion.tokens), completion.finish_reason != "length", *score)
        for (number, sample), text, completion, score in zip(places, texts, done, scores)
    ]


def right(answer: Answer) -> bool:
    """Whether the first reward is whole."""
    return next(iter(answer.parts.values())) >= 1


def row(answer: Answer, tasks: Sequence[Task]) -> dict[str, Any]:
    """An answer as a line of answers.jsonl."""
    return {"prompt": tasks[answer.problem].text, "reference": plain(tasks[answer.problem].reference), **answer._asdict()}


def plain(reference: Any) -> Any:
    """A reference as JSON has it."""
    return reference if isinstance(reference, (str, int, float, dict, list)) else str(reference)


def kept_rows(answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Conversations of right answers with all of the reward, at most --keep different ones a problem, as it was asked first:
    whoever learns from them has a template of its own."""
    best = max(answer.total for answer in answers)
    kept: dict[int, list[str]] = {}
    for answer in answers:
        texts = kept.setdefault(answer.problem, [])
        if right(answer) and answer.ended and answer.total >= best and answer.text not in texts and len(texts) < FLAGS.keep:
            texts.append(answer.text)
    asked = [(questions[number].turns[0], text) for number, texts in kept.items() for text in texts]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}
        for question, text in asked
    ]  # fmt: skip


def summary(answers: Sequence[Answer], tasks: Sequence[Task]) -> dict[str, Any]:
    """Accuracy and its standard error over problems, rewards, lengths, and for countdown problems what the thinking has."""
    correct = np.array([right(answer) for answer in answers], float).reshape(-1, FLAGS.samples)
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
    again = [right(answer) for answer, count in zip(answers, counts) if count.rejected]
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


def show(results: dict[str, Any], out: Path) -> None:
    """Prints the results as a table, and where the files are."""
    rows = [
        ("accuracy", f"{results['accuracy']:.1%} ± {results['standard_error']:.1%} of {results['problems']:,} problems"),
        (f"  any, all of {results['samples']} samples right", f"{results['any_right']:.1%}, {results['all_right']:.1%}"),
        ("tokens of an answer", f"{results['tokens']:.1f}, {results['ended']:.1%} ended by themselves"),
        *((f"reward {name}", f"{value:.4f}") for name, value in results["rewards"].items()),
    ]
    if "tries" in results:
        rows += [
            ("tries of an answer", f"{results['tries']:.2f}, of which {results['misjudged']:.1%} are misjudged"),
            ("answers that reject a try", f"{results['tried_again']:.1%}"),
            ("  right after it", f"{results['right_after_rejecting']:.1%}"),
            ("wrong steps", f"{results['wrong_steps']:.2%}"),
        ]
    print(aligned(rows, left=2))
    print(f"{out / 'answers.jsonl'}" + (f"; {results['kept']} conversations in {out / 'rows.jsonl'}" if FLAGS.keep else ""))
    print(f"{results['seconds']:.0f} s")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


parse_flags, fail = flag_parser("solve"), failure_line("solve")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
