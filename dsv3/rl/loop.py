"""The loop: explorations, steps on their samples, the reference, held-out problems, rows and transcripts of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dsv3 import tree
from dsv3.checks import check
from dsv3.compiled import snapshot
from dsv3.config import ModelConfig
from dsv3.nn.model import ModelParams, RouterState, cast_params
from dsv3.policy import ComputePolicy, default_policy
from dsv3.rl.advantage import group_advantages
from dsv3.rl.explore import Explored, RewardOf, Task, Worker, evaluate, explore
from dsv3.rl.report import exploration_numbers, learning_numbers, transcript
from dsv3.rl.rollout import Rollouts
from dsv3.rl.score import Score, mismatch_numbers, router_agreement
from dsv3.rl.settings import GrpoSettings
from dsv3.rl.step import GrpoBatch, GrpoMetrics, micro_batches
from dsv3.train.optim import Optimizer
from dsv3.train.state import TrainState
from dsv3.train.step import train_init

Row = Mapping[str, Any]


class Policy(NamedTuple):
    """A model: `params` and `router`."""

    params: ModelParams
    router: RouterState


class GrpoState(NamedTuple):
    """What a run changes: `train`, the policy and its optimiser, and the `reference` policy, `()` for none."""

    train: TrainState
    reference: Policy | tuple = ()


class GrpoCursor(NamedTuple):
    """Where a run is beside its state, of JSON values: `step`, explorations done; `position`, problems drawn; `unmeasured`,
    whether the run was stopped before the held-out problems of this step, which then come first."""

    step: int = 0
    position: int = 0
    unmeasured: bool = False


class GrpoResult(NamedTuple):
    """`state` and `cursor` at the end; `stopped`: what `stop` returned, `None` when all is done."""

    state: GrpoState
    cursor: GrpoCursor
    stopped: Any


class GrpoActions(NamedTuple):
    """What the loop calls, and how often; steps are explorations, counted from the start of the run.

    Attributes:
      write: gets each row (see `dsv3.rl.report`): `grpo` after every exploration, `samples`, `heldout`, `skipped`.
      progress: gets each `grpo` row, to show it.
      eval_every: explorations between evaluations on held-out problems (0: none), before the first and after the last.
      sample_every, samples: explorations between transcripts (0: none), and of how many problems.
      save: writes a checkpoint of a state, a step and a cursor; called every `save_every` explorations (0: never), after the
        last and when stopped.
      stop: asked after each exploration, and again after an evaluation; anything but `None` ends the loop.
    """

    write: Callable[[Row], None] = lambda row: None
    progress: Callable[[Row], None] = lambda row: None
    eval_every: int = 0
    sample_every: int = 1
    samples: int = 1
    save: Callable[[GrpoState, int, GrpoCursor], None] | None = None
    save_every: int = 0
    stop: Callable[[], Any] = lambda: None


def grpo_state(train: TrainState, *, reference: bool, policy: ComputePolicy | None = None) -> GrpoState:
    """Returns the state that starts a run: the reference is the policy as it is, if there is to be one.

    Args:
      train: see `dsv3.train_state`.
      reference: whether to keep one, which a loss with a `kl_weight` wants.
      policy: how the passes compute; the reference is kept in the compute dtype, in which it is used.
    """
    return GrpoState(train, _reference(train, policy or default_policy()) if reference else ())


def grpo_specs(
    cfg: ModelConfig, optimizer: Optimizer, *, reference: bool, policy: ComputePolicy | None = None
) -> GrpoState:
    """Returns a state's shapes and dtypes, a tree of `tf.TensorSpec`, without making it: what `restore_checkpoint` wants.

    Args:
      cfg, optimizer: as of `train_init`.
      reference, policy: as of `grpo_state`.
    """
    with tf.Graph().as_default():
        state = grpo_state(train_init([0, 0], cfg, optimizer), reference=reference, policy=policy)
    return tree.map_leaves(lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), state)


def _reference(train: TrainState, policy: ComputePolicy) -> Policy:
    return snapshot(Policy(cast_params(train.params, policy), train.router))


def grpo_loop(
    step: Callable[..., tuple[TrainState, GrpoMetrics]],
    score: Score,
    state: GrpoState,
    worker: Worker,
    tasks: Sequence[Task],
    reward: RewardOf,
    *,
    settings: GrpoSettings,
    cursor: GrpoCursor = GrpoCursor(),
    heldout: Sequence[Task] = (),
    threads: int = 1,
    policy: ComputePolicy | None = None,
    actions: GrpoActions = GrpoActions(),
) -> GrpoResult:
    """Explores and learns from `cursor.step` to `settings.explorations`.

    The numbers are a function of state, cursor, tasks and settings alone: a run that goes on from a checkpoint gives those
    that it would have given without the interruption.

    Args:
      step: see `make_grpo_step`; the training state is donated to it. Its temperature is that of the settings. If its `idle`
        is true, there is no step on samples of which none has an advantage; rows count them as `idle`.
      score: see `make_score`; the same holds.
      state: see `grpo_state`.
      worker: see `Worker`; it is given the policy before each exploration.
      tasks: problems to learn from. heldout: problems to measure on.
      reward: see `RewardOf`.
      settings: see `GrpoSettings`.
      cursor: where the run is, as a checkpoint has it.
      threads: that compute rewards.
      policy: how `step` and `score` compute, for a reference that is refreshed.
      actions: what to call.

    Returns:
      `GrpoResult`.

    Raises:
      ValueError: what cannot be, before the first exploration; a reward that is not a finite number.
    """
    run = _Run(step, score, state, worker, tasks, reward, settings, cursor, heldout, threads, policy, actions)
    while run.cursor.step < settings.explorations and run.stopped is None:
        run.turn()
    return GrpoResult(run.state, run.cursor, run.stopped)


class _Run:
    """What changes while the loop runs."""

    def __init__(
        self, step, score, state, worker, tasks, reward, settings: GrpoSettings, cursor, heldout, threads, policy,
        actions: GrpoActions,
    ):  # fmt: skip
        for name in ("eval_every", "sample_every", "samples", "save_every"):
            value = getattr(actions, name)
            check(value >= 0, f"grpo_loop: `{name}` is {value}, want at least 0")
        done = cursor.step
        check(done <= settings.explorations, f"grpo_loop: the run has done {done} explorations, want at most "
              f"explorations={settings.explorations}")  # fmt: skip
        check(
            len(tasks) >= settings.prompts,
            f"grpo_loop: {len(tasks)} problems are fewer than an exploration's, which are {settings.prompts}",
        )
        self.state, self.cursor, self.stopped = state, cursor, None
        self._step, self._score, self._worker, self._tasks, self._reward = step, score, worker, tasks, reward
        self._settings, self._heldout, self._threads, self._actions = settings, heldout, threads, actions
        self._policy = policy or default_policy()
        self._update()
        if done == 0 or cursor.unmeasured:
            self.cursor = cursor._replace(unmeasured=False)
            self._evaluate()

    def turn(self) -> None:
        """One exploration, what is learnt from it, and what follows."""
        settings, number, begin = self._settings, self.cursor.step, time.perf_counter()
        explored = explore(
            self._worker, self._tasks, self._reward, settings=settings, step=number, position=self.cursor.position,
            threads=self._threads,
        )  # fmt: skip
        drawn = time.perf_counter()
        groups = explored.graded.total.reshape(-1, settings.group_size)
        advantages = group_advantages(groups, std=settings.std, eps=settings.eps).numpy().reshape(-1)
        batch, looked = self._look(explored.rollouts, advantages)
        learnt, idle = self._learn(batch)
        self.cursor = GrpoCursor(number + 1, explored.position)
        row = {"kind": "grpo", "step": self.cursor.step, **exploration_numbers(explored, settings.group_size), **looked}
        row |= learning_numbers(learnt) | {"idle": idle}
        if settings.reference_every and self.state.reference and self.cursor.step % settings.reference_every == 0:
            self.state = self.state._replace(reference=_reference(self.state.train, self._policy))
        self._update()
        end = time.perf_counter()
        row |= {"rollout_seconds": round(drawn - begin, 4), "seconds": round(end - begin, 4)}
        self._actions.progress(row)
        self._actions.write(row)
        self._after(explored, advantages)

    def _update(self) -> None:
        """Gives the worker a copy of the policy: the step overwrites its own."""
        self._worker.update(*snapshot((self.state.train.params, self.state.train.router)))

    def _look(self, rollouts: Rollouts, advantages: np.ndarray) -> tuple[GrpoBatch, dict[str, Any]]:
        """All samples as one batch `[N, ...]`, with the passes that only look; and what these have found."""
        settings, train = self._settings, self.state.train
        mask = rollouts.mask
        if settings.truncated == "mask":
            mask = mask * ~rollouts.truncated[:, None]
        experts = rollouts.experts if settings.replay else None
        found, old = {}, rollouts.logprobs
        measured = settings.measure_every and self.cursor.step % settings.measure_every == 0
        if settings.old == "recomputed" or (measured and settings.replay):
            own = self._score(train.params, train.router, rollouts.tokens, rollouts.mask, experts).logprobs
            found["mismatch"] = mismatch_numbers(own, rollouts.logprobs, rollouts.mask)
            old = own if settings.old == "recomputed" else old
        if measured:
            free = self._score(train.params, train.router, rollouts.tokens, rollouts.mask)
            at = np.cumsum(rollouts.mask[:, ::-1], 1)[:, ::-1] > 0
            found["free_mismatch"] = mismatch_numbers(free.logprobs, rollouts.logprobs, rollouts.mask)
            found["router_agreement"] = router_agreement(free.experts, rollouts.experts, at)
        ref = ()
        if self.state.reference:
            ref = self._score(*self.state.reference, rollouts.tokens, rollouts.mask, experts).logprobs
        return GrpoBatch(rollouts.tokens, mask, old, ref, advantages, () if experts is None else experts), found

    def _learn(self, batch: GrpoBatch) -> tuple[list[GrpoMetrics], int]:
        """The optimiser's steps, and how many there were none of, as nothing could be learnt."""
        settings, learnt, idle = self._settings, [], 0
        told = (batch.advantages != 0) & (batch.mask > 0).any(-1)
        for epoch in range(settings.epochs):
            mixed = np.random.default_rng([settings.seed, self.cursor.step, epoch]).permutation(len(batch.tokens))
            size = math.ceil(len(mixed) / settings.minibatches)
            for rows in np.array_split(mixed, settings.minibatches):
                if getattr(self._step, "idle", False) and not told[rows].any():
                    idle += 1
                    continue
                train, metrics = self._step(self.state.train, micro_batches(batch, rows, settings.rows, size))
                self.state = self.state._replace(train=train)
                learnt.append(metrics)
                if not bool(metrics.taken):
                    loss, norm = float(metrics.parts.loss), float(metrics.optim.grad_norm)
                    bad = {name: x if math.isfinite(x) else None for name, x in (("loss", loss), ("grad_norm", norm))}
                    reason = f"loss {loss} or gradient norm {norm} is not finite"
                    self._actions.write({"kind": "skipped", "step": self.cursor.step + 1, "reason": reason, **bad})
        return learnt, idle

    def _after(self, explored: Explored, advantages: np.ndarray) -> None:
        actions, done, last = self._actions, self.cursor.step, self.cursor.step == self._settings.explorations
        if actions.samples and actions.sample_every and (last or done == 1 or done % actions.sample_every == 0):
            found = transcript(explored, self._tasks, advantages, self._settings.group_size, actions.samples)
            actions.write({"kind": "samples", "step": done, "samples": found})
        self.stopped = actions.stop()
        if self._heldout and actions.eval_every and (last or done % actions.eval_every == 0):
            if self.stopped is None or last:
                self._evaluate()
                self.stopped = actions.stop() if self.stopped is None else self.stopped
            else:  # there may be no time for it
                self.cursor = self.cursor._replace(unmeasured=True)
        due = last or self.stopped is not None or (actions.save_every and done % actions.save_every == 0)
        if actions.save is not None and due:
            actions.save(self.state, done, self.cursor)

    def _evaluate(self) -> None:
        if self._heldout and self._actions.eval_every:
            found = evaluate(self._worker, self._heldout, self._reward, settings=self._settings, threads=self._threads)
            self._actions.write({"kind": "heldout", "step": self.cursor.step, **found})
