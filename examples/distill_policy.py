"""Distillation on the student's own answers: problems, what is drawn, held-out answers, the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from command import write_text
from distill_setup import LOSS, check_length, check_loss, check_source, check_teacher
from distill_train import full_parts, load_teacher, make_divergence, make_step, micro
from grpo_problems import LANGUAGE, Question, chat_tasks, check_references, read_questions, read_rewards
from grpo_problems import digest as tasks_digest
from pretrain_setup import RUN_FILE, agree, checkpoint_digest, claim_folder, delete_run, say, write_run
from sft_report import BEFORE, NAMES, finish, format_samples, score_rows
from sft_setup import check_rates, describe_model, model_digest, read_codec, rows_settings, timed, write_tokenizer
from sft_train import Begun, run

from dsv3.checks import check
from dsv3.compiled import snapshot
from dsv3.config import ModelConfig
from dsv3.data import ChatCodec
from dsv3.parallel.mesh import whole
from dsv3.policy import ComputePolicy
from dsv3.rl.explore import Task, grade, task_number
from dsv3.rl.reward import Reward
from dsv3.rl.rollout import Rollouts, check_prompts, fit_rollouts, prompt_room
from dsv3.rl.workers import EngineOptions, LocalWorker
from dsv3.train.distill import DistillBatch
from dsv3.train.loop import LoopResult
from dsv3.train.state import TrainState

FLAGS = flags.FLAGS
DECIDING = (
    *"heldout accumulate seed lr lr_end warmup_steps weight_decay clip mtp_weight balance_weight bias_rate dtype on_policy "
    "problems_format reward explorations prompts group_size max_new_tokens sample_temperature".split(),
    *LOSS, *LANGUAGE,
)  # fmt: skip
INPUTS = ("model", "teacher", "problems", "chat_template")
SHOWN = {
    "divergence": NAMES["divergence"], "accuracy": "right answers", "truncated": "answers without an end",
}  # fmt: skip


class Run(NamedTuple):
    """What the loop knows of a run: see `sft_setup.Setup`; `step_tokens` are those of a step, padding included."""

    cfg: ModelConfig
    out: Path
    settings: dict[str, Any]
    codec: ChatCodec
    steps: int
    step_tokens: int


class PolicySetup(NamedTuple):
    """Everything that the training needs: problems to learn from and to measure on, and the `reward`, if there is one."""

    run: Run
    teacher_cfg: ModelConfig
    tasks: list[Task]
    heldout: list[Task]
    reward: Callable[[str, str, Any], Reward] | None

    @property
    def size(self) -> int:
        """T of all rows: the longest problem with the longest answers."""
        return self.run.step_tokens // (FLAGS.prompts * FLAGS.group_size)


class PolicyParts(NamedTuple):
    """What a run is made of: the `step`; who draws answers; `look`, held-out numbers of a state, with all the answers."""

    step: Callable[..., Any]
    worker: LocalWorker
    look: Callable[[TrainState], tuple[dict[str, Any], list[str]]]


def prepare(argv: Sequence[str]) -> PolicySetup:
    """Checks everything that can be wrong, cheapest first.

    Raises:
      ValueError, OSError: bad input; the message is one line.
    """
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    check_source()
    check_loss()
    model = Path(FLAGS.model)
    cfg = ModelConfig.from_hf(model)
    check_rates()
    count, parts, steps = FLAGS.prompts * FLAGS.group_size, FLAGS.accumulate, FLAGS.explorations
    check(count % parts == 0, f"{count} answers, --prompts times --group_size, are not divisible by --accumulate {parts}")
    check(FLAGS.warmup_steps < steps, f"--warmup_steps is {FLAGS.warmup_steps}, want fewer than --explorations {steps}")
    codec = read_codec(model, cfg)
    teacher_cfg = check_teacher(cfg, codec)
    reward = read_reward(codec)
    questions = read_questions(FLAGS.problems, FLAGS.problems_format)
    settings = {
        "program": "distill", **{name: FLAGS[name].value for name in DECIDING}, "model": model_digest(model),
        "teacher": checkpoint_digest(FLAGS.teacher), **rows_settings(codec, []), "config": cfg.to_hf(),
    }  # fmt: skip
    del settings["data"]  # it is the problems' below
    saved = claim_folder(Path(FLAGS.out), settings, {name: FLAGS[name].value for name in INPUTS})
    settings["time"] = datetime.now().isoformat() if saved is None else saved.get("time")
    codec = timed(codec, settings["time"], RUN_FILE)
    tasks, heldout = make_tasks(codec, questions, reward)
    prompts = [task.prompt(i) for i, task in enumerate([*tasks, *heldout])]
    check_prompts(prompts, max_new_tokens=FLAGS.max_new_tokens, max_length=cfg.max_length)
    size = max(prompt_room(prompt, FLAGS.max_new_tokens) for prompt in prompts) - 1
    check_length(teacher_cfg, size)
    settings["data"] = tasks_digest([*tasks, *heldout])
    agree(saved, settings, Path(FLAGS.out))
    setup = PolicySetup(
        Run(cfg, Path(FLAGS.out), settings, codec, steps, count * size), teacher_cfg, tasks, heldout, reward
    )
    if FLAGS.fresh:
        delete_run(setup.run.out)
    if saved is None:
        write_run(setup.run.out, settings)
    write_tokenizer(model, codec, setup.run.out / "tokenizer")
    say(f"problems: {len(tasks):,} to train on, {len(heldout):,} held out; rows of {size} tokens")
    describe_model(setup.run, f"{steps:,} steps of {count} answers")
    return setup


def read_reward(codec: ChatCodec) -> Callable[[str, str, Any], Reward] | None:
    """The reward of the flags."""
    if FLAGS.reward is None:
        return None
    how = {"tokenizer": codec.tokenizer, "max_new_tokens": FLAGS.max_new_tokens, "threads": FLAGS.reward_threads}
    return read_rewards(FLAGS.reward, **how)


def make_tasks(codec: ChatCodec, questions: Sequence[Question], reward: Any) -> tuple[list[Task], list[Task]]:
    """Problems to train on and to measure on: a hash of a question, or of what it has in common with others, decides."""
    places = [
        int.from_bytes(hashlib.blake2b(json.dumps([FLAGS.seed, *q.key]).encode(), digest_size=8).digest()) / 2**64
        for q in questions
    ]
    tasks = chat_tasks(questions, codec)
    if reward is not None:
        check_references(tasks, reward)
    sides = [[task for task, place in zip(tasks, places) if (place < FLAGS.heldout) == held] for held in (False, True)]
    train, held = sides
    sizes = f"{len(train)} problems to train on and {len(held)} that are held out"
    check(bool(train and held), f"--problems has {sizes}, want at least one of each")
    return train, held


def make_parts(setup: PolicySetup, begun: Begun, policy: ComputePolicy) -> PolicyParts:
    """Loads the teacher and makes what the loop calls."""
    cfg, teacher = setup.run.cfg, load_teacher(policy)
    apart = make_divergence(cfg, setup.teacher_cfg, teacher, policy)
    worker = LocalWorker(EngineOptions(
        cfg, setup.run.codec.tokenizer, policy.replace(remat="none"), min(1, cfg.num_mtp_layers), FLAGS.max_batch,
        chunk_sizes=(32, 128), smallest_cache=64,
    ))  # fmt: skip
    step = make_step(cfg, begun.optimizer, setup.teacher_cfg, teacher, policy)
    last: dict[int, tuple[dict[str, Any], list[str]]] = {}  # of the step that was looked at last

    def look(state: TrainState) -> tuple[dict[str, Any], list[str]]:
        done = int(whole(state.step))
        if done not in last:
            last.clear()
            last[done] = look_heldout(setup, worker, apart, state)
        return last[done]

    return PolicyParts(step, worker, look)


def look_heldout(
    setup: PolicySetup, worker: LocalWorker, apart: Callable[..., float], state: TrainState
) -> tuple[dict[str, Any], list[str]]:
    """Answers to held-out problems, with the best token each time: divergence, lengths, rewards; and their texts."""
    worker.update(*snapshot((state.params, state.router)))
    prompts = [task.prompt(i) for i, task in enumerate(setup.heldout)]
    rollouts = worker.rollout(prompts, group_size=1, max_new_tokens=FLAGS.max_new_tokens, temperature=0.0)
    found = {"divergence": apart(state, parts_of(rows_of(rollouts, setup.size), min(8, len(prompts))))}
    found |= {"length": float(rollouts.lengths.mean()), "truncated": float(rollouts.truncated.mean())}
    if setup.reward is not None:
        graded = grade(rollouts, setup.heldout, setup.reward, threads=FLAGS.reward_threads)
        found |= {"accuracy": float((next(iter(graded.parts.values())) >= 1).mean()), "reward": float(graded.total.mean())}
        found["parts"] = {name: float(values.mean()) for name, values in graded.parts.items()}
    ends = ["" if ended else " [...]" for ended in ~rollouts.truncated]
    return found, [task.opening + rollouts.answer(i) + ends[i] for i, task in enumerate(setup.heldout)]


def rows_of(rollouts: Rollouts, size: int) -> DistillBatch:
    """Answers as rows of `size` targets, of which those count that were drawn; padding is in no document."""
    fitted = fit_rollouts(rollouts, size)
    ends = size + 1 - np.argmax(fitted.mask[:, ::-1] > 0, 1)
    return DistillBatch(fitted.tokens, fitted.mask, (np.arange(size + 1) < ends[:, None]).astype(np.int32))


def parts_of(rows: DistillBatch, size: int) -> Iterator[DistillBatch]:
    """Rows in order, `size` at a time; the last part is filled up with rows of weight 0."""
    for here, there in full_parts(len(rows.tokens), size):
        yield DistillBatch(rows.tokens[here], rows.weights[here] * there, rows.segments[here])


def show_before(setup: PolicySetup, begun: Begun, parts: PolicyParts, policy: ComputePolicy) -> None:
    """Answers held-out problems with the student as it comes, once in a run."""
    if begun.saved is not None:
        return
    say("answering held-out problems with the student as it is")
    found, texts = parts.look(begun.state)
    count = min(FLAGS.samples, len(texts))
    asked = [i * len(texts) // count for i in range(count)]
    kept = {"heldout": found, "questions": asked, "answers": [texts[i] for i in asked]}
    write_text(setup.run.out / BEFORE, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


def train(setup: PolicySetup, begun: Begun, parts: PolicyParts, policy: ComputePolicy) -> LoopResult:
    """Explores and learns, to the last step or to a signal."""
    state = begun.state  # of variables, which the steps change in place: it is the student as it has become

    def explore(number: int) -> tuple[DistillBatch, None]:
        parts.worker.update(*snapshot((state.params, state.router)))
        first = number * FLAGS.prompts
        asked = [task_number(first + i, len(setup.tasks), FLAGS.seed) for i in range(FLAGS.prompts)]
        rollouts = parts.worker.rollout(
            [setup.tasks[i].prompt(first + place) for place, i in enumerate(asked)], group_size=FLAGS.group_size,
            max_new_tokens=FLAGS.max_new_tokens, temperature=FLAGS.sample_temperature, seed=FLAGS.seed, step=number,
        )  # fmt: skip
        return micro(rows_of(rollouts, setup.size)), None

    return run(setup.run, begun, parts.step, explore, lambda state: parts.look(state)[0])


def report(setup: PolicySetup, state: TrainState, parts: PolicyParts, policy: ComputePolicy) -> None:
    """Measures, answers, plots and exports."""
    say("\nanswering held-out problems with the student as it has become")
    before = json.loads((setup.run.out / BEFORE).read_text(encoding="utf-8"))
    after, texts = parts.look(state)
    asked = [setup.heldout[i] for i in before["questions"]]
    questions = [(None, [{"role": "user", "content": task.text}], str(task.reference)) for task in asked]
    samples = format_samples(questions, before["answers"], [texts[i] for i in before["questions"]])
    table = score_rows(f"answers to {len(setup.heldout):,} held-out problems", before["heldout"], after, SHOWN)
    finish(setup.run, state, before["heldout"], after, samples, table, "On-policy distillation")
