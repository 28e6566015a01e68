"""What `grpo.py` does before it trains: checks the flags, reads model, problems and rewards, claims the folder."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from command import check_fresh, lock_folder, read_time, say, write_text
from grpo_problems import (
    LANGUAGE,
    answer_ends,
    check_references,
    digest,
    made_up_sums,
    make_tasks,
    read_questions,
    read_rewards,
    unescaped,
)
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data import check_tokenizer, load_tokenizer
from dsv3.policy import ComputePolicy, default_policy
from dsv3.rl.explore import Task
from dsv3.rl.reward import Reward
from dsv3.rl.rollout import check_prompts
from dsv3.rl.settings import PUBLISHED, GrpoSettings
from dsv3.rl.workers import EngineOptions
from dsv3.train.checkpoint import check_settings

FLAGS = flags.FLAGS
RUN_FILE = "run.json"
PARTS = (*"checkpoints tensorboard plots export".split(), *"log.jsonl trouble.jsonl report.html".split(), RUN_FILE)
# Flags that decide the numbers of a run; the others may change from one part of it to the next.
DECIDING = (
    "model problems_format made digits heldout chat template turn_template lr lr_end warmup_steps weight_decay clip_norm "
    "mtp_weight balance_weight bias_rate dtype speculative"
).split()
EXPLORING = (
    "prompts group_size max_new_tokens temperature seed minibatches epochs rows std eps skip_saturated max_draws truncated "
    "old replay reference_every"
).split()
FREE = ("explorations", "measure_every")  # settings that a run may change when it goes on, the first without --lr_end
LOSS = ("clip_low", "clip_high", "dual_clip", "kl", "kl_weight", "average")


class Setup(NamedTuple):
    """Everything that the training needs.

    Attributes:
      cfg, tokenizer: the model's. policy: how to compute.
      out: the run's folder. settings: see `GrpoSettings`. loss: arguments of `make_grpo_step`.
      tasks, heldout: problems to train and to measure on. reward: of an answer.
      options: of engines. agreed: what must be the same to go on with the run.
    """

    cfg: ModelConfig
    tokenizer: Tokenizer
    policy: ComputePolicy
    out: Path
    settings: GrpoSettings
    loss: dict[str, Any]
    tasks: list[Task]
    heldout: list[Task]
    reward: Callable[[str, str, Any], Reward]
    options: EngineOptions
    agreed: dict[str, Any]


def prepare(argv: Sequence[str]) -> Setup:
    """Checks everything that can be wrong, cheapest first.

    Raises:
      ValueError, OSError: bad input; the message is one line.
    """
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    take_recipe()
    never = FLAGS.reference_every and not FLAGS.kl_weight
    check(not never, f"--reference_every {FLAGS.reference_every}, but with --kl_weight 0 there is no reference")
    check_rate()
    stop = [unescaped(text) for text in FLAGS.stop]
    settings = GrpoSettings(**{name: FLAGS[name].value for name in (*EXPLORING, *FREE)}, stop=stop)
    cfg = ModelConfig.from_hf(FLAGS.model)
    for name, value in (("speculative", 1), ("mtp_weight", 0.1)):
        if FLAGS[name].value is None:
            FLAGS[name].value = value if cfg.num_mtp_layers else 0
    tokenizer = load_tokenizer(FLAGS.model)
    check_tokenizer(tokenizer, cfg.vocab_size)
    policy = default_policy().replace(dtype=FLAGS.dtype, remat=FLAGS.remat)
    options = EngineOptions(
        cfg, tokenizer, policy, FLAGS.speculative, FLAGS.max_batch, chunk_sizes=(32, 128), smallest_cache=64
    )
    options.check()
    named = FLAGS.reward or ["accuracy:1" if FLAGS.problems else "number:1"]
    reward = read_rewards(named, tokenizer=tokenizer, max_new_tokens=settings.max_new_tokens, threads=FLAGS.reward_threads)
    saved = None if FLAGS.fresh else read_run(Path(FLAGS.out))
    time = saved.get("time") if isinstance(saved, dict) else datetime.now().isoformat()
    moment = read_time(time, Path(FLAGS.out) / RUN_FILE)
    tasks, heldout = split_tasks(*make_all_tasks(tokenizer, moment), settings)
    ends = answer_ends(cfg.eos_ids, tokenizer, FLAGS.model if FLAGS.chat else None)
    settings = dataclasses.replace(settings, stop_tokens=ends)
    prompts = [task.prompt(i) for i, task in enumerate([*tasks, *heldout])]
    check_prompts(prompts, max_new_tokens=settings.max_new_tokens, max_length=cfg.max_length)
    check_references([*tasks, *heldout], reward)
    loss = {name: FLAGS[name].value for name in LOSS} | {"length": loss_length(settings)}
    agreed = {name: FLAGS[name].value for name in (*DECIDING, *EXPLORING, *LOSS, *LANGUAGE, "stop")}
    if FLAGS.lr_end is not None:
        agreed["explorations"] = settings.explorations  # it decides the learning rate of each step
    agreed |= {"program": "grpo", "time": time, "reward": named, "problems": digest([*tasks, *heldout])}
    out = claim_folder(Path(FLAGS.out), agreed)
    say(f"model {FLAGS.model}: {cfg.num_layers} layers, {cfg.moe.router.num_experts} experts, {cfg.num_mtp_layers} MTP")
    first = f"{tasks[0].text!r:.70}, {tasks[0].reference!r:.40}"
    say(f"problems: {len(tasks)} to train on, {len(heldout)} held out; the first: {first}")
    return Setup(cfg, tokenizer, policy, out, settings, loss, tasks, heldout, reward, options, agreed)


def check_rate() -> None:
    """Checks the flags of the learning rate."""
    for name in ("lr", "lr_end"):
        value = FLAGS[name].value
        check(value is None or math.isfinite(value), f"--{name} is {value}, want a number")
    last = FLAGS.lr if FLAGS.lr_end is None else FLAGS.lr_end
    check(last <= FLAGS.lr, f"--lr is {FLAGS.lr:g} and --lr_end {last:g}, want --lr_end at most --lr")
    warm, steps = FLAGS.warmup_steps, optimizer_steps()
    check(warm < steps, f"--warmup_steps is {warm}, want fewer than all steps of the optimiser, which are {steps}")


def optimizer_steps() -> int:
    """Steps of the optimiser in all explorations."""
    return FLAGS.explorations * FLAGS.epochs * FLAGS.minibatches


def take_recipe() -> None:
    """Sets flags that were not given to the published values; how many problems there are is not a recipe's."""
    if FLAGS.recipe is None:
        return
    published = PUBLISHED[FLAGS.recipe]
    values = {"kl_weight": published.kl_weight, "group_size": published.group_size, "lr": published.learning_rate}
    values |= {"clip_low": published.clip, "clip_high": published.clip, "minibatches": published.minibatches}
    values |= {"epochs": published.epochs, "reference_every": published.reference_every if FLAGS.kl_weight else None}
    for name, value in values.items():
        if value is not None and FLAGS[name].using_default_value:
            FLAGS[name].value = value


def loss_length(settings: GrpoSettings) -> int | None:
    """What a fixed average divides by: the longest answer."""
    return settings.max_new_tokens if FLAGS.average == "fixed" else None


def make_all_tasks(tokenizer: Tokenizer, time: datetime | None) -> tuple[list[Task], list[Any]]:
    """The problems of the flags, in the order of the file or of the seed, asked at a moment, and their questions' keys."""
    if FLAGS.problems:
        questions = read_questions(FLAGS.problems, FLAGS.problems_format)
    else:
        questions = made_up_sums(FLAGS.made, FLAGS.digits, FLAGS.seed)
    chat = FLAGS.model if FLAGS.chat else None
    tasks = make_tasks(questions, tokenizer, unescaped(FLAGS.template), unescaped(FLAGS.turn_template), chat, time)
    return tasks, [question.key for question in questions]


def split_tasks(tasks: list[Task], keys: list[Any], settings: GrpoSettings) -> tuple[list[Task], list[Task]]:
    """Problems to train on, and the last ones, which are held out: those of a key together, where there is room for all."""
    left = len(tasks) - FLAGS.heldout
    check(
        left >= settings.prompts,
        f"{len(tasks)} problems, of which --heldout {FLAGS.heldout} are not trained on, leave fewer than --prompts, "
        f"which are {settings.prompts}",
    )
    sizes, held, room = Counter(keys), set(), FLAGS.heldout
    for key in dict.fromkeys(reversed(keys)):
        if sizes[key] <= room:
            held.add(key)
            room -= sizes[key]
    some = bool(held) or not FLAGS.heldout
    check(some, f"--heldout {FLAGS.heldout}: each question is there more often than that, want more of them")
    if room:
        say(f"{FLAGS.heldout - room} instead of {FLAGS.heldout} problems are held out: the same ones stay together")
    return tuple([task for task, key in zip(tasks, keys) if (key in held) == side] for side in (False, True))


def claim_folder(out: Path, agreed: dict[str, Any]) -> Path:
    """Makes the folder, locks it, and checks that what is in it is this run.

    Raises:
      ValueError: it is in use, holds something else, or a run with other settings.
      OSError: it cannot be written.
    """
    lock_folder(out)
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    foreign = [name for name in others if name not in PARTS]
    check(not foreign, f"--out {str(out)!r} holds {foreign[:1]}, which is no part of a run; want it moved away")
    if FLAGS.fresh:
        check_fresh(out, read_run(out), "grpo", {name: FLAGS[name].value for name in ("model", "problems")})
        for name in sorted(others, key=lambda name: name == RUN_FILE):  # the settings go last
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        others = []
    if RUN_FILE in others:
        check(FLAGS.resume, f"--noresume, but --out {str(out)!r} holds a run; --fresh starts anew")
        try:
            check_settings(json.loads((out / RUN_FILE).read_text()), agreed, where=f"the run in {str(out)!r}")
        except ValueError as error:
            raise ValueError(f"{error}; another --out keeps both, --fresh starts anew") from None
        return out
    check(not others, f"--out {str(out)!r} holds {others[:1]} but no {RUN_FILE}; want an empty folder, or --fresh")
    write_text(out / RUN_FILE, json.dumps(agreed, indent=1) + "\n")
    return out


def read_run(out: Path) -> Any:
    """What the run in the folder says of itself; `None` where there is none, or it cannot be read."""
    try:
        return json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def every(flag: int | None, total: int) -> int:
    """A period: as the flag says, else a tenth of all."""
    return math.ceil(total / 10) if flag is None else flag
