"""Distils a teacher into a student: the student learns the teacher's distribution of each next token, not only one token.

The student, --model, is a checkpoint's folder, as is the teacher; they may differ in layers and widths, and must have the
same tokenizer. Where the teacher's distribution comes from, one of:

  --teacher DIR              the teacher runs in the step, on the rows of --data
  --stored DIR               the likeliest tokens of each place, which distill_store.py has stored
  --on_policy --teacher DIR  the student answers --problems, and the teacher says what it thinks of each token of the answers

Traces need no program of their own: solve.py --keep writes right answers of a teacher as rows for sft.py, and for this one.
Rows of --data, the chat template, held-out rows and what is left in --out are those of sft.py (its --help describes them).
Problems and rewards are those of grpo.py; they are asked by the chat template. docs/distillation.md has the formulas.

Examples:

  python examples/distill.py --model student --teacher runs/sft/export --data rows.jsonl --epochs 2 --lr 1e-3 --lr_end 1e-4
  python examples/distill_store.py --teacher runs/sft/export --data rows.jsonl --k 64 --out runs/stored
  python examples/distill.py --model student --stored runs/stored --data rows.jsonl --epochs 2 --lr 1e-3 --lr_end 1e-4
  python examples/distill.py --model student --teacher teacher --data rows.jsonl --kind jsd --mix 0.5 --temperature 2
  python examples/distill.py --model student --teacher teacher --on_policy --problems train.jsonl --explorations 100 \\
      --reward countdown:1 --max_new_tokens 128 --lr 3e-4 --lr_end 3e-5 --out runs/on_policy
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
from collections.abc import Callable
from typing import Any

import distill_policy
import distill_setup
import distill_train
import grpo_problems
from absl import app, flags, logging
from command import failure_line, flag_parser
from distill_setup import KINDS
from grpo_problems import define_language_flags
from sft_train import run_program, start

from dsv3.policy import ComputePolicy
from dsv3.train.loop import LoopResult
from dsv3.train.state import TrainState

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "Checkpoint directory of the student; its tokenizer is taken, too.", required=True)
flags.DEFINE_string("teacher", None, "Checkpoint directory of a teacher that runs in the step.")
flags.DEFINE_string("stored", None, "Folder of what a teacher has said of the rows, as of distill_store.py.")
flags.DEFINE_bool("on_policy", False, "Learn from the student's own answers to --problems, of which --teacher judges.")
flags.DEFINE_string("chat_template", None, "A Jinja file to use instead of the student's chat template.")
flags.DEFINE_float("heldout", 0.1, "Share of the questions, by a hash, that is never trained on.")
flags.DEFINE_string("out", "runs/distill", "Folder of the run.")
flags.DEFINE_bool("resume", True, "Go on with the run that is in --out. --noresume refuses instead.")
flags.DEFINE_bool("fresh", False, "Delete the run that is in --out and start anew.")

flags.DEFINE_enum("kind", None, KINDS, "Divergence. Default: forward, or with --on_policy reverse.")
flags.DEFINE_float("mix", 0.5, "Share of the teacher in the mixture of --kind jsd.")
flags.DEFINE_float("temperature", 1.0, "Of both distributions; the loss is multiplied by its square.")
flags.DEFINE_float("nll_weight", 0.0, "Weight of the cross-entropy on the tokens themselves.", 0.0)
flags.DEFINE_float("mtp_weight", 0.1, "Weight of the multi-token prediction loss, with which drafts stay good.", 0.0)
flags.DEFINE_float("balance_weight", 1e-4, "Weight of the balance loss, of each conversation by itself.", 0.0)
flags.DEFINE_float("bias_rate", 0.0, "How far a step moves the router's selection bias; 0: it stays.", 0.0)

flags.DEFINE_string("data", None, "Conversations: a .json or .jsonl file. Default: small tasks that dsv3 makes itself.")
flags.DEFINE_float("epochs", 2.0, "How many times the conversations are learned.")
flags.DEFINE_integer("batch_size", 8, "Packed rows of a step, all micro-batches together.", 1)
flags.DEFINE_integer("max_length", 256, "Tokens of a packed row: a conversation must fit into one.", 1)
flags.DEFINE_bool("skip_long", False, "Leave out conversations that are longer than --max_length, instead of refusing them.")

flags.DEFINE_string("problems", None, "With --on_policy: a file of problems.")
flags.DEFINE_enum("problems_format", "rows", ["rows", "gsm8k", "math", "code"], "What the file's rows are, see grpo.py.")
flags.DEFINE_list("reward", None, "As countdown:1,format:0.5, measured on held-out problems; the first decides accuracy.")
flags.DEFINE_integer("reward_threads", 1, "Threads that compute rewards; for code and mathematics, which have processes.", 1)
define_language_flags()
flags.adopt_module_key_flags(grpo_problems)
flags.DEFINE_integer("explorations", 100, "Steps; each draws answers from the student as it is.", 1)
flags.DEFINE_integer("prompts", 8, "Problems of an exploration.", 1)
flags.DEFINE_integer("group_size", 1, "Answers to each problem.", 1)
flags.DEFINE_integer("max_new_tokens", 64, "Tokens of an answer at most.", 1)
flags.DEFINE_float("sample_temperature", 1.0, "Of the sampling.")
flags.DEFINE_integer("max_batch", 32, "Answers that are drawn at the same time.", 1)

flags.DEFINE_float("lr", 1e-5, "Learning rate at the beginning; small models want more, such as 1e-3.")
flags.DEFINE_float("lr_end", 1e-6, "Learning rate at the end of a cosine in tokens.")
flags.DEFINE_integer("warmup_steps", 0, "Steps of linear warm-up before --lr.", 0)
flags.DEFINE_float("weight_decay", 0.1, "Decoupled weight decay; norms and biases have none.", 0.0)
flags.DEFINE_float("clip", 1.0, "Largest norm of the gradient; 0: do not clip.", 0.0)
flags.DEFINE_integer("accumulate", 1, "Micro-batches of a step's rows, which it must divide. Less memory, same result.", 1)
flags.DEFINE_integer("seed", 0, "Decides the order of the data, what is held out and what is drawn.", 0)

flags.DEFINE_integer("eval_every", None, "Steps between held-out numbers; 0: none. Default: a tenth of all.", 0)
flags.DEFINE_integer("save_every", 100, "Steps between checkpoints; 0: only at the end and when interrupted.", 0)
flags.DEFINE_integer("keep", 2, "Checkpoints that stay, the last ones.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype; the student's parameters are float32.")
flags.DEFINE_enum("remat", "none", ["none", "block"], "Recompute each block in the backward pass: less memory.")
flags.DEFINE_integer("samples", 4, "Held-out questions that are answered before and after; as the run was begun.", 0)


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code, see `run_program`."""
    logging.set_verbosity(logging.WARNING)
    form = distill_policy if FLAGS.on_policy else distill_train
    prepare = distill_policy.prepare if FLAGS.on_policy else distill_setup.prepare

    def learn(setup: Any, policy: ComputePolicy) -> tuple[LoopResult, Callable[[TrainState], None]]:
        begun = start(setup.run)
        parts = form.make_parts(setup, begun, policy)
        form.show_before(setup, begun, parts, policy)
        return form.train(setup, begun, parts, policy), lambda state: form.report(setup, state, parts, policy)

    return run_program(fail, lambda: prepare(argv), learn, lambda setup: setup.run)


parse_flags, fail = flag_parser("distill"), failure_line("distill")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
