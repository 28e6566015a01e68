"""Problems and rewards of `grpo.py`, `solve.py` and `distill.py`: what the model reads, what an answer is worth."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from absl import flags
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.data import ChatCodec, chat_codec, encode_next, encode_prompt, find_chat_template
from dsv3.data.chat import THINK
from dsv3.rl import problems as files
from dsv3.rl.countdown import make_countdown_reward
from dsv3.rl.explore import Task
from dsv3.rl.reward import Reward, RewardFn, make_reward
from dsv3.rl.reward_code import make_code_reward
from dsv3.rl.reward_math import make_math_reward
from dsv3.rl.reward_text import (
    make_format_reward,
    make_language_reward,
    make_overlong_penalty,
    make_repetition_penalty,
)

FLAGS = flags.FLAGS
LANGUAGE = ("language", "language_measure", "language_unit", "language_among", "language_empty")


def define_language_flags() -> None:
    """Defines the flags of the reward `language`, once in a program."""
    flags.DEFINE_string("language", "en", "Language that the reward `language` is for, by its code of ISO 639.")
    flags.DEFINE_enum(
        "language_measure", "script", ["script", "identify"],
        "Share of what is written in its script; or by sentences that py3langid takes for it (pip install 'dsv3[data]').",
    )  # fmt: skip
    flags.DEFINE_enum("language_unit", "words", ["words", "characters"], "What is counted.")
    flags.DEFINE_list("language_among", ["en", "zh"], "With --language_measure identify: what the text may be in.")
    flags.DEFINE_float("language_empty", 0.0, "What an answer without any word is worth.")


class Question(NamedTuple):
    """What is asked, turn by turn, what the answer is judged by, what messages call it, and what questions like it share."""

    turns: tuple[str, ...]
    reference: Any
    name: str
    alike: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """The same for questions of which none may be held out while another one is trained on."""
        return self.turns if self.alike is None else (self.alike,)


def made_up_sums(count: int, digits: int, seed: int) -> list[Question]:
    """Returns different sums of two numbers, in an order that the seed decides; fewer if there are no more."""
    rng, highest = random.Random(seed), 10**digits - 1
    every = (highest + 1) ** 2
    pairs = (divmod(number, highest + 1) for number in rng.sample(range(every), min(count, every)))
    return [
        Question((f"{a}+{b}=",), str(a + b), f"the made-up sum {a}+{b}", f"{min(a, b)}+{max(a, b)}=") for a, b in pairs
    ]


def read_questions(path: str, kind: str) -> list[Question]:
    """Reads a file of problems; `kind` is the value of --problems_format.

    Raises:
      ValueError, OSError: a file or a row that cannot be used, by its line.
    """
    read = {"rows": files.read_rows, "gsm8k": files.read_gsm8k, "math": files.read_math, "code": files.read_humaneval}[kind]
    found = read(path)
    return [Question((problem.question, *problem.turns), problem.reference, problem.name) for problem in found]


def make_tasks(
    questions: Sequence[Question], tokenizer: Tokenizer, template: str, turn_template: str, chat: str | None = None,
    time: datetime | None = None,
) -> list[Task]:  # fmt: skip
    """Returns what the loop needs of each question.

    Args:
      questions: see `Question`.
      tokenizer: the model's. What it puts first, as the begin-of-sentence token, comes before the first turn alone.
      template, turn_template: text around the first turn and later ones, with `{question}`.
      chat: a checkpoint directory, whose chat template asks instead. time: the moment that it is told; None: the present.
    """
    if chat is not None:
        found = dataclasses.replace(find_chat_template(chat, tokenizer), time=time)
        return chat_tasks(questions, chat_codec(tokenizer, found))
    for name, value in (("template", template), ("turn_template", turn_template)):
        check("{question}" in value, f"--{name} is {value!r}, want a text with {{question}} in it")
    tasks = []
    for question in questions:
        texts = [template.replace("{question}", question.turns[0])]
        texts += [turn_template.replace("{question}", turn) for turn in question.turns[1:]]
        first, *later = [tokenizer.encode(text, add_special_tokens=not i).ids for i, text in enumerate(texts)]
        tasks.append(Task(first, "".join(texts), question.reference, tuple(later), name=question.name))
    return tasks


def chat_tasks(questions: Sequence[Question], codec: ChatCodec) -> list[Task]:
    """Returns what the loop needs of questions that a chat template asks.

    Raises:
      ValueError: the template fails, or cannot put several turns into one sequence; by the question's name.
    """
    tasks = []
    for question in questions:
        try:
            first, *later = chat_turns(question.turns, codec)
            stops = later and "stop" in FLAGS and FLAGS.stop
            check(not stops, "--stop leaves out what the template ends an answer with, want questions of one turn for it")
        except ValueError as error:
            raise ValueError(f"{question.name}: {error}") from None
        opening = opening_of(codec.tokenizer.decode(first, skip_special_tokens=False))
        one = not (opening and later)
        check(one, f"{question.name}: {codec.template.where} begins answers with {THINK}, want questions of one turn for it")
        tasks.append(Task(first, "\n".join(question.turns), question.reference, tuple(later), opening, question.name))
    return tasks


def chat_turns(turns: Sequence[str], codec: ChatCodec) -> list[list[int]]:
    """The tokens of a chat template before the first answer, between that and the second, and so on."""
    messages = [{"role": "user", "content": turns[0]}]
    found = [encode_prompt(codec, messages)]
    for turn in turns[1:]:
        messages += [{"role": "assistant", "content": "An answer."}, {"role": "user", "content": turn}]
        found.append(encode_next(codec, messages))
    return found


def opening_of(prompt: str) -> str:
    """What a prompt has already said of the answer: `<think>` and blanks behind it, where it ends with that."""
    return prompt[prompt.rindex(THINK) :] if prompt.rstrip().endswith(THINK) else ""


def answer_ends(eos_ids: Sequence[int], tokenizer: Tokenizer, chat: str | None) -> tuple[int, ...] | None:
    """Tokens that end an answer: under a chat template its own, too; `None`: those of the model's configuration alone."""
    if chat is None:
        return None
    eos = tokenizer.token_to_id(find_chat_template(chat, tokenizer).eos)
    return tuple(sorted({*eos_ids} | ({eos} - {None})))


def read_rewards(
    named: Sequence[str], *, tokenizer: Tokenizer, max_new_tokens: int, threads: int = 1
) -> Callable[[str, str, Any], Reward]:
    """Returns the weighted reward of names and weights, such as `["accuracy:1", "format:0.5"]`; of `language` see the flags.

    Args:
      named: see above.
      tokenizer, max_new_tokens: what counts an answer's tokens, and how many there may be.
      threads: that will call it.

    Raises:
      ValueError: an unknown name, or a weight that is no number.
    """
    makers: Mapping[str, Callable[[], RewardFn]] = {
        "accuracy": lambda: make_math_reward(workers=threads),
        "code": lambda: make_code_reward(),
        "countdown": make_countdown_reward,
        "format": lambda: make_format_reward(),
        "language": lambda: make_language_reward(
            FLAGS.language, measure=FLAGS.language_measure, unit=FLAGS.language_unit, among=tuple(FLAGS.language_among),
            empty=FLAGS.language_empty,
        ),
        "number": lambda: make_math_reward(rules=("number",), workers=threads),
        "overlong": lambda: make_overlong_penalty(
            max_length=max_new_tokens, buffer=max(1, max_new_tokens // 4), count=lambda text: len(tokenizer.encode(text).ids)
        ),
        "repetition": lambda: make_repetition_penalty(),
    }
    parts: dict[str, tuple[RewardFn, float]] = {}
    for item in named:
        name, _, weight = item.partition(":")
        check(name in makers, f"--reward has {name!r}, want some of {', '.join(makers)}")
        check(name not in parts, f"--reward has {name!r} twice, want each once")
        try:
            parts[name] = makers[name](), float(weight or 1)
        except ValueError as error:
            raise ValueError(f"--reward {item!r}: {error}") from None
    for flag in LANGUAGE:
        check("language" in parts or not FLAGS[flag].present, f"--{flag} is given, but --reward has no `language`")
    return make_reward(parts)


def check_references(tasks: Sequence[Task], reward: Callable[[str, str, Any], Reward]) -> None:
    """Raises `ValueError` for a problem whose reference the rewards cannot use: an empty answer asks them in no time."""
    for task in tasks:
        try:
            found = reward(task.text, "", task.reference)
        except ValueError as error:
            raise ValueError(f"{task.name}, {task.text!r:.60}: {error}") from None
        one = not (task.turns and "overlong" in found.parts)
        check(one, f"{task.name}: the reward `overlong` counts the tokens of one answer, want problems of one turn for it")


def digest(tasks: Sequence[Task]) -> str:
    """A hash of problems, with the tokens that the model reads."""
    rows = [[list(task.ids), [list(turn) for turn in task.turns], task.text, str(task.reference)] for task in tasks]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def unescaped(text: str) -> str:
    """Line breaks and tabs as they are written on a command line."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
