"""What `reasoning.py` runs: its data, and the commands of all stages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from command import write_text

import dsv3
from dsv3.rl.countdown import (
    countdown_conversation,
    countdown_problems,
    countdown_question,
    countdown_texts,
    worked_solution,
)

FLAGS = flags.FLAGS
PLAIN = {"template": "User: {question}\\nAssistant: ", "stop": "\\n\\n"}  # how the text to pretrain on has conversations
CHAT = {"chat": True}
# The same as a chat template: what the model has learned of conversations goes on to hold. Tokens of a usual template would
# be new to it, and a small model forgets a lot when it has to learn them from little.
TEMPLATE = Path(__file__).with_name("plain_chat.jinja")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command whose results are in `folder`; `measures`: the stage that it measures, if it does."""

    name: str
    folder: Path
    program: str
    flags: dict[str, Any]
    measures: str | None = None

    @property
    def command(self) -> list[str]:
        """The command as it is run, from the root of the project."""
        given = []
        for name, value in (*self.flags.items(), ("out", self.folder)):
            given.append(f"--{'' if value is not False else 'no'}{name}{'' if isinstance(value, bool) else f'={value}'}")
        return ["python", f"examples/{self.program}.py", *given]

    @property
    def done(self) -> Path:
        """The file that says that it has been done."""
        return self.folder / ".done"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def spent(self) -> Path:
        """How many seconds it had run when it was interrupted."""
        return self.folder.with_name(f"{self.folder.name}.seconds")

    def reads(self) -> set[Path]:
        """Folders of other stages that its flags name, which have to be done before."""
        named = [value for value in self.flags.values() if isinstance(value, Path)]
        return {parent for value in named for parent in value.parents} - {self.folder}


def write_problems(folder: Path, seed: int) -> None:
    """Makes the data of a seed: texts, worked solutions, problems to learn from and held-out ones; the student's config."""
    level, rng = FLAGS.level, random.Random(f"{seed} worked")
    folder.mkdir(parents=True, exist_ok=True)
    texts = itertools.islice(countdown_texts(level, seed=seed), FLAGS.texts)
    write_lines(folder / "texts.jsonl", ({"text": text} for text in texts))
    for name, heldout in (("problems", False), ("heldout", True)):
        found = countdown_problems(level, heldout=heldout, seed=0 if heldout else seed)
        rows = ({"prompt": countdown_question(each), "reference": each._asdict()} for each in found)
        write_lines(folder / f"{name}.jsonl", rows)

    def worked() -> Iterator[dict[str, Any]]:
        for problem in countdown_problems(level, heldout=False, seed=seed):
            solution = worked_solution(problem, level, rng)
            if solution is not None:
                yield countdown_conversation(countdown_question(problem), *solution)

    write_lines(folder / "worked.jsonl", itertools.islice(worked(), FLAGS.worked))
    write_text(folder / "template.jinja", TEMPLATE.read_text(encoding="utf-8"))
    if FLAGS.students:
        fields = dsv3.preset(FLAGS.preset).to_hf()
        fields |= {"hidden_size": fields["hidden_size"] * 2 // 3, "num_hidden_layers": fields["num_hidden_layers"] - 1}
        write_text(folder / "student.json", json.dumps(dsv3.ModelConfig.from_hf(fields).to_hf(), indent=1) + "\n")


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Writes JSON lines, unless they are there."""
    if not path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def make_stages(folder: Path, seed: int) -> list[Stage]:
    """The stages of a seed in their order, from pretraining to the second fine-tuning, and learning without a cold start."""
    make = Maker(folder, seed)
    made = [
        make.stage("pretrain", "pretrain", make.pretrain | {"preset": FLAGS.preset}),
        make.measured("pretrain", PLAIN),
        make.stage("sft", "sft", make.model("pretrain") | make.cold | make.template),
        make.measured("sft"),
        make.stage("grpo", "grpo", make.model("sft") | make.learn | CHAT),
        make.measured("grpo"),
        make.stage("traces", "solve", make.model("grpo") | make.kept),
        make.stage("sft2", "sft", make.model("grpo") | make.traced),
        make.measured("sft2"),
    ]
    if FLAGS.zero:
        made += [make.stage("zero", "grpo", make.model("pretrain") | make.learn | PLAIN), make.measured("zero", PLAIN)]
    return made


def make_student_stages(folder: Path, seed: int) -> list[Stage]:
    """What a smaller student learns from worked solutions, by itself, and in four ways from the end of `make_stages`."""
    make = Maker(folder, seed)
    teacher = {"teacher": folder / "sft2" / "export"}
    small = {"config": folder / "student.json", "tokenizer": folder / "pretrain" / "tokenizer"}
    copied = make.traced | make.template | {"epochs": FLAGS.student_epochs, "lr": 1e-3, "lr_end": 5e-5}
    half = {"explorations": max(1, FLAGS.explorations // 2)}  # of those that GRPO has, which begins from less
    own = {"on_policy": True, "problems": folder / "problems.jsonl", "prompts": 256, "max_batch": 256,
           "max_new_tokens": FLAGS.max_new_tokens, "lr": FLAGS.rl_lr, "lr_end": FLAGS.rl_lr_end, "heldout": 0.1,
           "eval_every": 0, "samples": 0, "save_every": 0, "seed": seed}  # fmt: skip
    return [
        make.stage("student", "pretrain", make.pretrain | small),
        make.measured("student", PLAIN),
        make.stage("student_sft", "sft", make.model("student") | make.cold | make.template),
        make.measured("student_sft"),
        make.stage("student_grpo", "grpo", make.model("student_sft") | make.learn | CHAT),
        make.measured("student_grpo"),
        make.stage("student_traces", "sft", make.model("student") | copied),
        make.measured("student_traces"),
        make.stage("student_logits", "distill", make.model("student") | teacher | copied),
        make.measured("student_logits"),
        make.stage("student_policy", "distill", make.model("student_logits") | teacher | own | half),
        make.measured("student_policy"),
        make.stage("student_both", "grpo", make.model("student_logits") | make.learn | CHAT | half),
        make.measured("student_both"),
    ]


class Maker:
    """Makes the stages of a seed, whose results are in `folder`, with settings that several of them have."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.template = {"chat_template": folder / "template.jinja"}
        self.judged = {"reward": "countdown:1,format:0.1", "max_new_tokens": FLAGS.max_new_tokens, "max_batch": 256,
                       "seed": seed}  # fmt: skip
        self.pretrain = {"corpus": folder / "texts.jsonl", "vocab_size": 384, "steps": FLAGS.pretrain_steps,
                         "batch_size": 8, "seq_len": 256, "lr": 3e-3, "save_every": 0, "seed": seed}  # fmt: skip
        tune = {"lr": 2e-4, "lr_end": 1e-5, "warmup_steps": 8, "batch_size": 4, "max_length": 256, "heldout": 0.1,
                "samples": 0, "save_every": 0, "seed": seed}  # fmt: skip
        self.cold = tune | {"data": folder / "worked.jsonl", "epochs": FLAGS.cold_epochs, "lr": 1e-3, "lr_end": 1e-4}
        self.traced = {"data": folder / "traces" / "rows.jsonl", "epochs": FLAGS.trace_epochs} | tune
        self.learn = {"problems": folder / "problems.jsonl", "explorations": FLAGS.explorations, "prompts": 16,
                      "group_size": 16, "rows": 32, "lr": FLAGS.rl_lr, "lr_end": FLAGS.rl_lr_end,
                      "kl_weight": FLAGS.kl_weight, "heldout": 0,
                      "save_every": 0, "measure_every": 10} | self.judged  # fmt: skip
        self.kept = {"problems": folder / "problems.jsonl", "limit": FLAGS.asked, "samples": 2 * FLAGS.traces,
                     "keep": FLAGS.traces}  # fmt: skip
        self.kept |= CHAT | self.judged

    def model(self, name: str) -> dict[str, Any]:
        """The flag that begins with the model of another stage."""
        return {"model": self.folder / name / "export"}

    def stage(self, name: str, program: str, given: dict[str, Any]) -> Stage:
        """A stage by its name."""
        return Stage(name, self.folder / name, program, given)

    def measured(self, name: str, how: dict[str, Any] = CHAT) -> Stage:
        """The measurement of a stage's model on held-out problems."""
        asked = {"problems": self.folder / "heldout.jsonl", "limit": FLAGS.measured}
        drawn = {"samples": 4, "temperature": 0.6}  # that of DeepSeek-R1's evaluation
        given = self.model(name) | asked | drawn | how | self.judged
        return Stage(f"{name}, measured", self.folder / f"{name}-measured", "solve", given, name)
