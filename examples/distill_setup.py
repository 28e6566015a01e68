"""What `distill.py` checks of teachers before it trains; the rest of it is `sft_setup.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sft_setup
from absl import flags
from grpo_problems import LANGUAGE
from pretrain_setup import checkpoint_digest
from sft_setup import Program, Rows, Setup, digest, rows_settings, say

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data import ChatCodec, find_chat_template, load_tokenizer, tokenizer_fingerprint
from dsv3.ops.divergence import KINDS as ALL_KINDS
from dsv3.pretrained import pretrained_config
from dsv3.train.teacher_store import MANIFEST, TeacherStore, check_same, read_manifest

FLAGS = flags.FLAGS
KINDS = list(ALL_KINDS)
LOSS = ("kind", "mix", "temperature", "nll_weight")
DECIDING = (*sft_setup.DECIDING, *LOSS)
# Flags of one form that the other does not read.
OF_ROWS = "data stored epochs batch_size max_length skip_long".split()
OF_PROBLEMS = (
    *"problems problems_format reward reward_threads explorations prompts group_size max_new_tokens sample_temperature "
    "max_batch".split(),
    *LANGUAGE,
)
STORED = "temperature heldout seed max_length skip_long".split()  # flags with which a store is made


class Distill(NamedTuple):
    """Everything that the training needs: the `run` as fine-tuning has it, and of the teacher its configuration or what it
    has said of the rows, those that are held out behind the others."""

    run: Setup
    teacher_cfg: ModelConfig | None
    store: TeacherStore | None


def prepare(argv: Sequence[str]) -> Distill:
    """Checks everything that can be wrong, cheapest first, and prepares the data.

    Raises:
      ValueError, OSError: bad input; the message is one line.
    """
    check_source()
    check_loss()
    found: dict[str, Any] = {"teacher": None, "store": None}

    def of_teacher(cfg: ModelConfig, codec: ChatCodec) -> dict[str, Any]:
        if FLAGS.stored is None:
            found["teacher"] = check_teacher(cfg, codec)
            check_length(found["teacher"], FLAGS.max_length)
            return {"teacher": checkpoint_digest(FLAGS.teacher)}
        return check_store(cfg, codec)

    def look(rows: Rows, settings: dict[str, Any]) -> None:
        if FLAGS.stored is None:
            return
        same = {name: settings[name] for name in ("data", "encoded")}
        check_same(read_manifest(FLAGS.stored)["settings"], same, f"--stored {FLAGS.stored!r}")
        found["store"] = store = TeacherStore(FLAGS.stored, np.concatenate([rows.train.weights, rows.held.weights]))
        say(f"stored: {store.k:,} tokens of each place, with {store.held:.2%} of its probability; {store.size:,} bytes")

    program = Program("distill", DECIDING, ("model", "teacher", "stored", "data", "chat_template"), of_teacher, look)
    run = sft_setup.prepare(argv, program)
    return Distill(run, found["teacher"], found["store"])


def check_source() -> None:
    """Checks that there is one source, and that no flag is of another form than that."""
    given = [f"--{name}" for name in ("teacher", "stored") if FLAGS[name].value is not None]
    check(bool(given), "neither --teacher nor --stored is given, want one of them")
    check(len(given) == 1, f"{' and '.join(given)} are both given, want one of them")
    check(not FLAGS.on_policy or FLAGS.teacher is not None, "--on_policy is given with --stored, want --teacher: what the "
          "student is going to answer cannot have been stored")  # fmt: skip
    for name in OF_ROWS if FLAGS.on_policy else OF_PROBLEMS:
        way = "with" if FLAGS.on_policy else "without"
        check(not FLAGS[name].present, f"--{name} is given, which is not read {way} --on_policy")
    check(not FLAGS.on_policy or FLAGS.problems is not None, "--on_policy is given, but no --problems, want a file of them")


def check_loss() -> None:
    """Checks the flags of the loss; gives --kind its value."""
    if FLAGS.kind is None:
        FLAGS["kind"].value = "reverse" if FLAGS.on_policy else "forward"
    check(0 < FLAGS.mix < 1, f"--mix is {FLAGS.mix}, want above 0 and below 1")
    for name in ("temperature", "sample_temperature"):
        value = FLAGS[name].value
        check(math.isfinite(value) and value > 0, f"--{name} is {value}, want above 0")
    check(math.isfinite(FLAGS.nll_weight), f"--nll_weight is {FLAGS.nll_weight}, want a number")


def check_teacher(cfg: ModelConfig, codec: ChatCodec) -> ModelConfig:
    """Checks the teacher against the student; returns its configuration."""
    check(Path(FLAGS.teacher).is_dir(), f"--teacher {FLAGS.teacher!r} is no folder, want a checkpoint's")
    teacher = pretrained_config(FLAGS.teacher)
    both = f"--teacher {FLAGS.teacher!r} and --model {FLAGS.model!r} have"
    sizes = f"{teacher.vocab_size} and {cfg.vocab_size} tokens"
    check(teacher.vocab_size == cfg.vocab_size, f"{both} vocabularies of {sizes}, want the same")
    tokenizer = load_tokenizer(FLAGS.teacher)
    prints = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(codec.tokenizer)
    check(prints[0] == prints[1], f"{both} different tokenizers, {prints[0]:.16} and {prints[1]:.16}, want the same")
    if find_chat_template(FLAGS.teacher, tokenizer).source != codec.template.source:
        say(f"the chat template is the student's; {FLAGS.teacher} has another one, and may not know this one's format")
    return teacher


def check_length(teacher: ModelConfig, length: int) -> None:
    """Refuses rows that are longer than what the teacher can read."""
    longest = f"want at most the context of --teacher {FLAGS.teacher!r}, {teacher.max_length}"
    check(length <= teacher.max_length, f"rows have {length} tokens, {longest}")


def check_store(cfg: ModelConfig, codec: ChatCodec) -> dict[str, Any]:
    """Checks what is cheap to check of a store; returns further settings of the run."""
    manifest = read_manifest(FLAGS.stored)
    check(manifest is not None, f"--stored {FLAGS.stored!r} holds no {MANIFEST}, want what distill_store.py writes")
    stored = manifest["settings"]
    wanted = {"vocab_size": cfg.vocab_size, **{name: FLAGS[name].value for name in STORED}, **rows_settings(codec, [])}
    del wanted["data"]  # which is not read yet
    check_same(stored, wanted, f"--stored {FLAGS.stored!r}")
    return {"stored": digest(manifest), "teacher": stored["teacher"], "time": stored["time"]}
