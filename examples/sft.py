"""Fine-tunes a model on conversations: it learns the assistant's answers, and to end them.

Without flags it takes the model that `make demo` leaves in runs/demo/export, small tasks that dsv3 makes itself (sums with
their steps, words, Python), and the paper's schedule, and leaves everything in runs/sft:

  run.json        what decides the numbers of this run
  tokenizer/      the model's, with the chat template that was used
  log.jsonl       one line a step; tensorboard/ has the same
  checkpoints/    the last ones; after an interruption the same command goes on from there, to the same losses
  report.html     held-out loss and answers before and after, plots, settings; samples.txt, results.json: the same to read on
  export/         opened by AutoModelForCausalLM.from_pretrained, dsv3.load_pretrained and `generate.py --chat`

--data is a JSON file (an array) or JSON lines, perhaps compressed, with rows of either kind:

  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"instruction": "...", "input": "...", "output": "..."}

An assistant's reasoning is <think>...</think> before the answer, or a field `reasoning_content`. The checkpoint's own chat
template turns them into text.

The paper's learning rate is for a model of 671B parameters. A small one learns next to nothing from it: see the examples.

Examples:

  python examples/sft.py --epochs 8 --lr 1e-3 --lr_end 1e-4 --batch_size 4
  python examples/sft.py --data rows.json --epochs 4 --lr 1e-3 --lr_end 1e-4 --out runs/mine
  python examples/sft.py --model deepseek-dir --data chats.jsonl.gz --max_length 4096 --batch_size 32 --accumulate 8 \\
      --dtype bfloat16 --remat block --out runs/real
  python examples/generate.py runs/sft/export --chat --prompt 'Write apple backwards.'
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
from collections.abc import Callable

from absl import app, flags
from command import failure_line, flag_parser
from sft_report import report, show_before
from sft_setup import Setup, prepare
from sft_train import run_program, start, train

from dsv3.policy import ComputePolicy
from dsv3.train.loop import LoopResult
from dsv3.train.schedule_paper import PAPER_SFT
from dsv3.train.state import TrainState

FLAGS = flags.FLAGS

flags.DEFINE_string("model", "runs/demo/export", "Checkpoint directory to begin with; its tokenizer is taken, too.")
flags.DEFINE_string("data", None, "Conversations: a .json or .jsonl file. Default: small tasks that dsv3 makes itself.")
flags.DEFINE_string("chat_template", None, "A Jinja file to use instead of the model's chat template.")
flags.DEFINE_float("heldout", 0.1, "Share of the questions, by a hash, that is never trained on.")
flags.DEFINE_string("out", "runs/sft", "Folder of the run.")
flags.DEFINE_bool("resume", True, "Go on with the run that is in --out. --noresume refuses instead.")
flags.DEFINE_bool("fresh", False, "Delete the run that is in --out and start anew.")

flags.DEFINE_float("epochs", PAPER_SFT.epochs, "How many times the conversations are learned; 2: as in the paper.")
flags.DEFINE_integer("batch_size", 8, "Packed rows of a step, all micro-batches together.", 1)
flags.DEFINE_integer("accumulate", 1, "Micro-batches of --batch_size, which it must divide. Less memory, same result.", 1)
flags.DEFINE_integer("max_length", 256, "Tokens of a packed row: a conversation must fit into one.", 1)
flags.DEFINE_bool("skip_long", False, "Leave out conversations that are longer than --max_length, instead of refusing them.")
flags.DEFINE_integer("seed", 0, "Decides the order of the data and what is held out.", 0)

flags.DEFINE_float("lr", PAPER_SFT.first, "Learning rate at first, as in the paper; small models want more, such as 1e-3.")
flags.DEFINE_float("lr_end", PAPER_SFT.last, "Learning rate at the end of a cosine in tokens.")
flags.DEFINE_integer("warmup_steps", 0, "Steps of linear warm-up before --lr.", 0)
flags.DEFINE_float("weight_decay", 0.1, "Decoupled weight decay; norms and biases have none.", 0.0)
flags.DEFINE_float("clip", 1.0, "Largest norm of the gradient; 0: do not clip.", 0.0)
flags.DEFINE_float("mtp_weight", 0.1, "Weight of the multi-token prediction loss, with which drafts stay good.", 0.0)
flags.DEFINE_float("balance_weight", 1e-4, "Weight of the balance loss, of each conversation by itself.", 0.0)
flags.DEFINE_float("bias_rate", 0.0, "How far a step moves the router's selection bias; 0: as pretraining has left it.", 0.0)

flags.DEFINE_integer("eval_every", None, "Steps between held-out losses; 0: none. Default: a tenth of all.", 0)
flags.DEFINE_integer("save_every", 100, "Steps between checkpoints; 0: only at the end and when interrupted.", 0)
flags.DEFINE_integer("keep", 2, "Checkpoints that stay, the last ones.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype; parameters are float32.")
flags.DEFINE_enum("remat", "none", ["none", "block"], "Recompute each block in the backward pass: less memory.")
flags.DEFINE_integer("samples", 4, "Held-out questions that are answered before and after; as the run was begun.", 0)


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code, see `run_program`."""
    return run_program(fail, lambda: prepare(argv), learn)


def learn(setup: Setup, policy: ComputePolicy) -> tuple[LoopResult, Callable[[TrainState], None]]:
    """Answers held-out questions with the model as it is, and trains it; returns what reports on the result, too."""
    begun = start(setup)
    show_before(setup, begun, policy)
    return train(setup, begun, policy), lambda state: report(setup, state, policy)


parse_flags, fail = flag_parser("sft"), failure_line("sft")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
