"""Trains a model by GRPO on problems whose answers can be checked, from a checkpoint directory to another one.

The model is one that dsv3.save_pretrained wrote or any DeepSeek-V3 checkpoint, with its tokenizer.json. Problems are sums
that are made up here, or those of --problems:

  --problems_format gsm8k   JSON lines with `question` and `answer`, which ends in #### and the number
  --problems_format math    JSON lines with `problem` and `answer`, or a `solution` with its answer in a box; or, as MATH is
                            published, a folder with a file of each problem
  --problems_format code    those of HumanEval; reward code
  --problems_format rows    JSON lines with `prompt` and `reference`. A prompt that is a list has several turns: the model
                            answers each before it reads the next; its answers are judged together

Rewards by name, each with its weight: accuracy (the answer in <answer>, in a box or behind ####), format (<think> and
<answer>), language (see --language), repetition, overlong, code, countdown; number (accuracy of the last number) is for
small models. With a weight of 0 a reward is measured only. docs/rewards.md describes them, docs/grpo.md the training. A
problem that cannot be used is named by file and line before anything is drawn.

In --out are log.jsonl (a row an exploration, with transcripts and held-out accuracy: how often the first reward is 1 or
more), tensorboard/, checkpoints/ from which the same command goes on, and at the end plots/, report.html and export/, the
trained model.

Examples:

  python examples/grpo.py --model runs/demo/export --explorations 20
  python examples/grpo.py --model model --problems gsm8k/train.jsonl --problems_format gsm8k --heldout 200 \\
      --reward accuracy:1,format:0.2 --template 'Question: {question}\\nAnswer:' --dtype bfloat16 --recipe r1
  python examples/grpo.py --model model --skip_saturated --average token --clip_high 0.28 --kl_weight 0    # as DAPO
  python examples/grpo.py --model model --std none --average fixed                                         # as Dr. GRPO
  python examples/grpo.py --model model --worker process --workers 2     # samples from other processes
  python examples/grpo.py --model model --worker ray --workers 8 --ray_address auto   # from other machines
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split

import grpo_problems
from absl import app, flags, logging
from command import failure_line, flag_parser, what_failed
from grpo_problems import define_language_flags
from grpo_report import report
from grpo_setup import prepare, say
from grpo_train import train

from dsv3.rl.advantage import STDS
from dsv3.rl.grpo import AVERAGES, KL_ESTIMATORS
from dsv3.rl.settings import PUBLISHED

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "Checkpoint directory to start from.", required=True)
flags.DEFINE_string("out", "runs/grpo", "Folder of the run.")
flags.DEFINE_bool("resume", True, "Go on with the run that is in --out. --noresume refuses instead.")
flags.DEFINE_bool("fresh", False, "Delete the run that is in --out and start anew.")

flags.DEFINE_string("problems", None, "File of problems. Default: sums, made up here.")
flags.DEFINE_enum("problems_format", "rows", ["rows", "gsm8k", "math", "code"], "What the file's rows are.")
flags.DEFINE_integer("made", 1000, "How many sums are made up without --problems.", 2)
flags.DEFINE_integer("digits", 1, "Digits of their numbers.", 1, 9)
flags.DEFINE_integer("heldout", 64, "Problems that are never trained on and measured on; 0: none.", 0)
flags.DEFINE_bool("chat", False, "Ask by the model's chat template, instead of --template and --turn_template.")
flags.DEFINE_string("template", "{question}\\n", "What the model reads; \\n and \\t are understood.")
flags.DEFINE_string("turn_template", "\\n{question}\\n", "The same for later turns.")
flags.DEFINE_list("reward", None, "As accuracy:1,format:0.5; the first decides accuracy. Default: number:1 or accuracy:1.")
flags.DEFINE_integer("reward_threads", 1, "Threads that compute rewards; for code and mathematics, which have processes.", 1)

define_language_flags()
flags.adopt_module_key_flags(grpo_problems)

flags.DEFINE_enum(
    "recipe", None, sorted(PUBLISHED),
    "Published settings, but --prompts and --max_new_tokens, where flags do not say otherwise.",
)  # fmt: skip
flags.DEFINE_integer("explorations", 100, "How many.", 1)
flags.DEFINE_integer("prompts", 8, "Problems of an exploration.", 1)
flags.DEFINE_integer("group_size", 8, "Samples of each problem; with --recipe the published number.", 2)
flags.DEFINE_integer("max_new_tokens", 64, "Tokens of an answer at most.", 1)
flags.DEFINE_float("temperature", 1.0, "Of the sampling.")
flags.DEFINE_multi_string("stop", [], "String that ends an answer (\\n and \\t are understood); repeat for several.")
flags.DEFINE_integer("seed", 0, "Decides problems, samples and mini-batches.", 0)
flags.DEFINE_integer("minibatches", 1, "Optimiser steps of each epoch over an exploration.", 1)
flags.DEFINE_integer("epochs", 1, "Epochs over the samples of an exploration.", 1)
flags.DEFINE_integer("rows", 8, "Samples of a micro-batch, and of a pass that only looks.", 1)
flags.DEFINE_enum("std", "population", STDS, "What divides advantages: a deviation with ddof 0, with ddof 1, nothing.")
flags.DEFINE_float("eps", 1e-6, "Added to that deviation.", 0.0)
flags.DEFINE_bool("skip_saturated", False, "Draw other problems for those whose samples all got the same reward.")
flags.DEFINE_integer("max_draws", 4, "How often in an exploration at most.", 1)
flags.DEFINE_enum("truncated", "count", ["count", "mask"], "Answers without an end: samples as others, or in no loss.")
flags.DEFINE_enum("old", "sampler", ["sampler", "recomputed"], "Log-probabilities of the policy that sampled.")
flags.DEFINE_bool("replay", True, "Train with the experts that sampled.")

flags.DEFINE_float("lr", 1e-6, "Learning rate.", 0.0)
flags.DEFINE_float("lr_end", None, "Learning rate to which --lr falls by a cosine, over all steps. Default: --lr.", 0.0)
flags.DEFINE_integer("warmup_steps", 0, "Optimiser steps of linear warm-up before --lr.", 0)
flags.DEFINE_float("weight_decay", 0.0, "Decoupled weight decay.", 0.0)
flags.DEFINE_float("clip_norm", 1.0, "Largest norm of the gradient; 0: do not clip.", 0.0)
flags.DEFINE_float("clip_low", 0.2, "Lower limit of the ratio: 1 less this.", 0.0)
flags.DEFINE_float("clip_high", 0.2, "Upper limit of the ratio: 1 and this.", 0.0)
flags.DEFINE_float("dual_clip", None, "Limit of the ratio for negative advantages, above 1.")
flags.DEFINE_enum("kl", "k3", KL_ESTIMATORS, "Estimator of the divergence from the reference.")
flags.DEFINE_float("kl_weight", 0.001, "Its weight; 0: no reference is kept.", 0.0)
flags.DEFINE_enum("average", "sequence", AVERAGES, "Mean over sequences, over all tokens, or over a fixed length.")
flags.DEFINE_integer("reference_every", 0, "Explorations until the reference becomes the policy; 0: never.", 0)
flags.DEFINE_float("mtp_weight", None, "Weight of the MTP modules' own loss. Default: 0.1, if there are any.")
flags.DEFINE_float("balance_weight", 0.0, "Weight of the balance loss.", 0.0)
flags.DEFINE_float("bias_rate", 0.0, "How far a step moves the router's selection bias; 0: it stays.", 0.0)

flags.DEFINE_integer("speculative", None, "Tokens that the MTP modules draft. Default: 1, if there are any.", 0)
flags.DEFINE_integer("max_batch", 32, "Samples that are drawn at the same time.", 1)
flags.DEFINE_enum("worker", "local", ["local", "process", "ray"], "Who draws samples: this process, others, Ray actors.")
flags.DEFINE_integer("workers", 1, "How many of these.", 1)
flags.DEFINE_string("ray_address", None, "Of a running Ray cluster. Default: one on this machine alone.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of products; parameters are trained in float32.")
flags.DEFINE_enum("remat", "none", ["none", "block"], "Recompute each block in the backward pass: less memory.")

flags.DEFINE_integer("eval_every", None, "Explorations between held-out accuracies; 0: none. Default: a tenth of all.", 0)
flags.DEFINE_integer("measure_every", 1, "Explorations between measurements of sampling against training; 0: none.", 0)
flags.DEFINE_integer("sample_every", 1, "Explorations between transcripts; 0: none.", 0)
flags.DEFINE_integer("samples", 1, "Problems of a transcript: the best and the worst answer to each.", 1)
flags.DEFINE_integer("save_every", 10, "Explorations between checkpoints; 0: only at the end and when interrupted.", 0)
flags.DEFINE_integer("keep", 2, "Checkpoints that stay.", 1)


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input, 1 for what fails later, 128 + n when signal n has come."""
    logging.set_verbosity(logging.WARNING)
    try:
        setup = prepare(argv)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    try:
        result = train(setup)
        if result.cursor.step < setup.settings.explorations:
            done = f"{result.cursor.step} of {setup.settings.explorations} explorations"
            say(f"{result.stopped.name}: saved after {done}; the same command goes on")
            return 128 + result.stopped
        report(setup, result.state)
    except (ValueError, OSError) as error:
        return fail(f"{what_failed(error, FLAGS.out)}; once that is put right, the same command goes on", 1)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on", 130)
    return 0


parse_flags, fail = flag_parser("grpo"), failure_line("grpo")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
