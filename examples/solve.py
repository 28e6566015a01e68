"""Lets a model solve problems, judges its answers by rules, and keeps right ones to fine-tune on.

It measures a model on held-out problems, and it is the sampling half of rejection sampling and of distillation by traces:
the rows that it keeps are what `sft.py --data` reads.

An answer is right if its first reward is at least 1, as accuracy is counted in every program. With --keep n a problem's
right answers become rows, if they ended by themselves: at most n different ones, those with the highest sum of all rewards
first. So further rewards (format, language, overlong, ...) choose among right answers, and their weights say how; with
--keep_total they also refuse some. Problems of which nothing was kept are counted.

In --out are answers.jsonl (each answer with its rewards), rows.jsonl (conversations of right answers, with --keep) and
results.json. Until all is answered, answers.part.jsonl has what is done: after an interruption the same command goes on.
Results of a run that has ended are replaced.

Problems and rewards are those of `grpo.py`, whose --help describes them.

Examples:

  python examples/solve.py --model runs/sft/export --problems heldout.jsonl --chat --out runs/measured
  python examples/solve.py --model runs/grpo/export --problems train.jsonl --chat --samples 8 --keep 2 --out runs/traces
  python examples/solve.py --model model --problems train.jsonl --chat --samples 16 --keep 4 --keep_total 1.5 \\
      --reward accuracy:1,format:0.5,language:0.1 --max_new_tokens 4096 --out runs/traces
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

import grpo_problems
from absl import app, flags, logging
from command import aligned, failure_line, flag_parser, lock_folder, read_time, say, what_failed, write_text
from grpo_problems import (
    LANGUAGE,
    Question,
    answer_ends,
    check_references,
    define_language_flags,
    digest,
    make_tasks,
    read_questions,
    read_rewards,
    unescaped,
)
from pretrain_setup import checkpoint_digest
from solve_answers import PART, Answer, add_to_part, begun_at, conversation, kept_answers, open_part, row, summary
from tqdm import tqdm

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data import check_tokenizer, load_tokenizer
from dsv3.policy import default_policy
from dsv3.pretrained import load_pretrained
from dsv3.rl.explore import RewardOf, Task, grade_answers
from dsv3.rl.rollout import check_prompts, draw_samples
from dsv3.serve import Engine

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "Checkpoint directory.", required=True)
flags.DEFINE_string("problems", None, "File of problems.", required=True)
flags.DEFINE_enum("problems_format", "rows", ["rows", "gsm8k", "math", "code"], "What the file's rows are, see grpo.py.")
flags.DEFINE_integer("limit", 0, "How many of them, the first; 0: all.", 0)
flags.DEFINE_string("out", None, "Folder of the answers.", required=True)
flags.DEFINE_bool("fresh", False, "Delete the answers of a run that was interrupted, and start anew.")
flags.DEFINE_bool("chat", False, "Ask by the model's chat template, instead of --template and --turn_template.")
flags.DEFINE_string("template", "{question}\\n", "What the model reads; \\n and \\t are understood.")
flags.DEFINE_string("turn_template", "\\n{question}\\n", "The same for later turns.")
flags.DEFINE_list("reward", ["accuracy:1"], "As accuracy:1,format:0.5. The first one says which answers are right.")
flags.DEFINE_integer("reward_threads", 1, "Threads that compute rewards; for code and mathematics, which have processes.", 1)
define_language_flags()
flags.adopt_module_key_flags(grpo_problems)
flags.DEFINE_integer("samples", 1, "Answers to each problem.", 1)
flags.DEFINE_float("temperature", 1.0, "Of the sampling; 0: the best token each time.", 0.0)
flags.DEFINE_integer("max_new_tokens", 64, "Tokens of an answer at most.", 1)
flags.DEFINE_multi_string("stop", [], "String that ends an answer (\\n and \\t are understood); repeat for several.")
flags.DEFINE_integer("keep", 0, "Right answers to each problem that become rows, those with most reward; 0: none.", 0)
flags.DEFINE_float("keep_total", None, "With --keep: the least sum of rewards. Default: being right is enough.")
flags.DEFINE_integer("seed", 0, "Of the sampling.", 0)
flags.DEFINE_integer("speculative", None, "Tokens that the MTP modules draft. Default: 1, if there are any.", 0)
flags.DEFINE_integer("max_batch", 64, "Answers that are drawn at the same time.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and products.")


# Flags that decide the answers and their rewards.
DECIDING = "problems_format chat template turn_template reward samples temperature max_new_tokens stop seed dtype".split()


class Setup(NamedTuple):
    """Everything that the answers need; `done` are those that an interrupted run has left."""

    engine: Engine
    questions: list[Question]
    tasks: list[Task]
    reward: RewardOf
    done: list[Answer]


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input, 1 for what fails later."""
    logging.set_verbosity(logging.WARNING)
    try:
        setup = prepare(argv)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    again = f"the same command{' without --fresh' * FLAGS.fresh} goes on"
    try:
        begin = time.monotonic()
        answers = answer_all(setup)
        results = write_results(answers, setup) | {"seconds": time.monotonic() - begin}
        write_text(Path(FLAGS.out) / "results.json", json.dumps(results, indent=1) + "\n")
        (Path(FLAGS.out) / PART).unlink()
    except (ValueError, OSError) as error:
        return fail(f"{what_failed(error, FLAGS.out)}; once that is put right, {again}", 1)
    except KeyboardInterrupt:
        return fail(f"interrupted; {again}", 130)
    show(results, Path(FLAGS.out))
    return 0


def prepare(argv: Sequence[str]) -> Setup:
    """Checks everything that can be wrong, cheapest first."""
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    check(FLAGS.keep_total is None or FLAGS.keep, f"--keep_total is {FLAGS.keep_total}, but no --keep is given")
    cfg = ModelConfig.from_hf(FLAGS.model)
    tokenizer = load_tokenizer(FLAGS.model)
    check_tokenizer(tokenizer, cfg.vocab_size)
    how = {"max_new_tokens": FLAGS.max_new_tokens, "threads": FLAGS.reward_threads}
    reward = read_rewards(FLAGS.reward, tokenizer=tokenizer, **how)
    questions = read_questions(FLAGS.problems, FLAGS.problems_format)[: FLAGS.limit or None]
    templates = unescaped(FLAGS.template), unescaped(FLAGS.turn_template)
    out = Path(FLAGS.out)
    begun = begun_at(out)
    moment = read_time(begun, out / PART)
    tasks = make_tasks(questions, tokenizer, *templates, FLAGS.model if FLAGS.chat else None, moment)
    prompts = [task.prompt(number) for number, task in enumerate(tasks)]
    check_prompts(prompts, max_new_tokens=FLAGS.max_new_tokens, max_length=cfg.max_length)
    check_references(tasks, reward)
    lock_folder(out)
    speculative = min(1, cfg.num_mtp_layers) if FLAGS.speculative is None else FLAGS.speculative
    settings = {name: FLAGS[name].value for name in (*DECIDING, *LANGUAGE)} | {"speculative": speculative}
    settings |= {"program": "solve", "time": begun, "model": checkpoint_digest(FLAGS.model), "problems": digest(tasks)}
    done = open_part(out, settings)
    cfg, params, router = load_pretrained(FLAGS.model, dtype=FLAGS.dtype)
    how = {"policy": default_policy().replace(dtype=FLAGS.dtype), "tokenizer": tokenizer, "max_batch": FLAGS.max_batch}
    engine = Engine(cfg, params, router, speculative=speculative, chunk_sizes=(32, 128), smallest_cache=64, **how)
    return Setup(engine, questions, tasks, reward, done)


def answer_all(setup: Setup) -> list[Answer]:
    """All answers in order; each follows from --seed, its problem and its number, so those that are there stay."""
    done = list(setup.done)
    if done:
        say(f"{len(done):,} answers are there")
    left = sorted(set(range(len(setup.tasks))) - {answer.problem for answer in done})
    size = max(1, 4 * FLAGS.max_batch // FLAGS.samples)
    total = len(setup.tasks) * FLAGS.samples
    with tqdm(total=total, initial=len(done), unit="answer", desc="answers", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(left), size):
            found = judged(setup, left[first : first + size])
            add_to_part(Path(FLAGS.out), found)
            done += found
            bar.update(len(found))
    return sorted(done, key=lambda answer: (answer.problem, answer.sample))


def judged(setup: Setup, numbers: Sequence[int]) -> list[Answer]:
    """Answers to some problems, with their rewards."""
    engine, tasks = setup.engine, setup.tasks
    ends = answer_ends(engine.cfg.eos_ids, engine.tokenizer, FLAGS.model if FLAGS.chat else None)
    rows = draw_samples(
        engine, [tasks[number].prompt(number) for number in numbers], group_size=FLAGS.samples, seed=FLAGS.seed,
        max_new_tokens=FLAGS.max_new_tokens, temperature=FLAGS.temperature, stop_tokens=ends,
        stop=[unescaped(text) for text in FLAGS.stop],
    )  # fmt: skip
    places, said = zip(*[((row.prompt.number, row.sample), "\n".join(row.texts)) for row in rows])
    scores = grade_answers(tasks, *zip(*places), said, setup.reward, threads=FLAGS.reward_threads)
    return [
        Answer(*place, [tasks[place[0]].opening + row.texts[0], *row.texts[1:]], row.length, row.finish != "length", *score)
        for place, row, score in zip(places, rows, scores)
    ]


def write_results(answers: Sequence[Answer], setup: Setup) -> dict[str, Any]:
    """Writes answers and rows; returns what they are worth together."""
    out = Path(FLAGS.out)
    for name in ("results.json", "rows.jsonl"):  # of answers that were there before
        (out / name).unlink(missing_ok=True)
    write_lines(out / "answers.jsonl", [row(answer, setup.tasks[answer.problem]) for answer in answers])
    kept = kept_answers(answers)
    if FLAGS.keep:
        write_lines(out / "rows.jsonl", [conversation(answer, setup.questions[answer.problem]) for answer in kept])
    counts = {"kept": len(kept), "kept_problems": len({answer.problem for answer in kept})}
    return summary(answers, setup.tasks) | counts | {"drawn": len(answers) - len(setup.done)}


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
            ("answers that check a try", f"{results['checked']:.1%}"),
            ("tries of an answer", f"{results['tries']:.2f}, of which {results['misjudged']:.1%} are misjudged"),
            ("answers that reject a try", f"{results['tried_again']:.1%}"),
            ("  right after it", f"{results['right_after_rejecting']:.1%}, which are {results['corrected']:.1%} of all"),
            ("wrong steps", f"{results['wrong_steps']:.2%}"),
        ]
    print(aligned(rows, left=2))
    print(out / "answers.jsonl")
    if FLAGS.keep:
        without = results["problems"] - results["kept_problems"]
        print(f"{out / 'rows.jsonl'}: {results['kept']:,} conversations; {without:,} problems have no answer to keep")
    print(f"{results['seconds']:.0f} s for {results['drawn']:,} answers")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


parse_flags, fail = flag_parser("solve"), failure_line("solve")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
