"""Problems and rewards of `grpo.py`: where they come from, what the model reads, what an answer is worth."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.data import ChatCodec, chat_codec, encode_prompt, find_chat_template
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


class Question(NamedTuple):
    """What is asked, turn by turn, what the answer is judged by, and what it has in common with questions like it."""

    turns: tuple[str, ...]
    reference: Any
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
    return [Question((f"{a}+{b}=",), str(a + b), f"{min(a, b)}+{max(a, b)}=") for a, b in pairs]


def read_questions(path: str, kind: str) -> list[Question]:
    """Reads a file of problems; `kind` is the value of --problems_format.

    Raises:
      ValueError, OSError: a file or a row that cannot be used, by its line.
    """
    if kind == "rows":
        return _read_rows(Path(path))
    read = {"gsm8k": files.read_gsm8k, "math": files.read_math, "code": files.read_humaneval}[kind]
    return [Question((problem.question,), problem.reference) for problem in read(path)]


def _read_rows(path: Path) -> list[Question]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"--problems {str(path)!r} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error})") from None
        check(isinstance(row, dict) and {"prompt", "reference"} <= set(row), f"{where} has no `prompt` and `reference`")
        turns = row["prompt"] if isinstance(row["prompt"], list) else [row["prompt"]]
        good = bool(turns) and all(isinstance(turn, str) and turn for turn in turns)
        check(good, f"{where}: `prompt` is {row['prompt']!r:.60}, want a text or a list of texts")
        found.append(Question(tuple(turns), row["reference"]))
    check(bool(found), f"--problems {str(path)!r} is empty, want rows")
    return found


def make_tasks(
    questions: Sequence[Question], tokenizer: Tokenizer, template: str, turn_template: str, chat: str | None = None
) -> list[Task]:
    """Returns what the loop needs of each question.

    Args:
      questions: see `Question`.
      tokenizer: the model's. What it puts first, as the begin-of-sentence token, comes before the first turn alone.
      template, turn_template: text around the first turn and later ones, with `{question}`.
      chat: a checkpoint directory, whose chat template asks instead; a question then has one turn.
    """
    if chat is not None:
        for number, question in enumerate(questions, 1):
            one = len(question.turns) == 1
            check(one, f"--chat: problem {number} has several turns, want --template and --turn_template for them")
        return chat_tasks(questions, chat_codec(tokenizer, find_chat_template(chat, tokenizer)))
    for name, value in (("template", template), ("turn_template", turn_template)):
        check("{question}" in value, f"--{name} is {value!r}, want a text with {{question}} in it")
    tasks = []
    for question in questions:
        texts = [template.replace("{question}", question.turns[0])]
        texts += [turn_template.replace("{question}", turn) for turn in question.turns[1:]]
        first, *later = [tokenizer.encode(text, add_special_tokens=not i).ids for i, text in enumerate(texts)]
        tasks.append(Task(first, "".join(texts), question.reference, tuple(later)))
    return tasks


def chat_tasks(questions: Sequence[Question], codec: ChatCodec) -> list[Task]:
    """Returns what the loop needs of questions of one turn, asked by a chat template."""
    asked = [encode_prompt(codec, [{"role": "user", "content": question.turns[0]}]) for question in questions]
    begun = [opening_of(text) for text in codec.tokenizer.decode_batch(asked, skip_special_tokens=False)]
    return [
        Task(ids, question.turns[0], question.reference, opening=opening)
        for ids, question, opening in zip(asked, questions, begun)
    ]


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
    """Returns the weighted reward of names and weights, such as `["accuracy:1", "format:0.5"]`.

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
        "language": lambda: make_language_reward("en"),
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
    return make_reward(parts)


def check_references(tasks: Sequence[Task], reward: Callable[[str, str, Any], Reward]) -> None:
    """Raises `ValueError` for a problem whose reference the rewards cannot use: an empty answer asks them in no time."""
    for number, task in enumerate(tasks):
        try:
            reward(task.text, "", task.reference)
        except ValueError as error:
            raise ValueError(f"problem {number}, {task.text!r:.60}: {error}") from None


def unescaped(text: str) -> str:
    """Line breaks and tabs as they are written on a command line."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
