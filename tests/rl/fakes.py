"""A worker, a step and a score that take no time: what the loop makes of them is looked at."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from dsv3 import RouterState, tree
from dsv3.rl.grpo import GrpoStats
from dsv3.rl.logprobs import TokenLogprobs
from dsv3.rl.rollout import Prompt, Rollouts, sample_seed
from dsv3.rl.step import GrpoMetrics, GrpoParts
from dsv3.train.optim import OptimStats
from dsv3.train.state import TrainState

LENGTH = 8


class FakeWorker:
    """Answers of one to four tokens below 10, whose text is their sum; it notes what it was asked and given."""

    def __init__(self):
        self.asked: list[tuple[list[int], dict]] = []
        self.given: list[float] = []

    def update(self, params, router):
        self.given.append(float(tree.flatten(params)[0]))

    def rollout(self, prompts: list[Prompt], **how) -> Rollouts:
        self.asked.append(([prompt.number for prompt in prompts], how))
        rows = [(prompt, sample) for prompt in prompts for sample in range(how["group_size"])]
        tokens, mask = np.zeros([len(rows), LENGTH + 1], np.int32), np.zeros([len(rows), LENGTH], np.float32)
        finish = []
        for i, (prompt, sample) in enumerate(rows):
            rng = np.random.default_rng(sample_seed(how.get("seed", 0), how.get("step", 0), prompt.number, sample))
            size, begin = int(rng.integers(1, 5)), len(prompt.ids)
            tokens[i, :begin], tokens[i, begin : begin + size] = prompt.ids, rng.integers(0, 10, size)
            mask[i, begin - 1 : begin - 1 + size] = 1
            finish.append("length" if size == 4 else "stop_token")
        count = np.ones([len(rows)], np.int32)
        sums = (tokens[:, 1:] * mask).sum(1)
        return Rollouts(
            tokens, mask, -mask, np.zeros([1, len(rows), LENGTH, 2], np.int16),
            np.array([p.number for p, _ in rows], np.int32), np.array([s for _, s in rows], np.int32), 3 * count, 2 * count,
            count, tuple(finish), tuple((str(int(total)),) for total in sums),
        )  # fmt: skip


def fake_state(step: int = 0, value: float = 1.0) -> TrainState:
    return TrainState(tf.constant(step, tf.int64), tf.constant(0, tf.int64), {"w": tf.constant(value)}, (), ())


class FakeStep:
    """Adds the advantages' size to the only parameter; notes its batches. Steps named in `bad` are not taken; without a
    `reference` they tell no divergence."""

    def __init__(self, bad=(), idle=False, reference=True):
        self.batches, self._bad, self.idle, self._reference = [], bad, idle, reference

    def __call__(self, state, batch, limits=None):
        self.batches.append(batch)
        taken = len(self.batches) not in self._bad
        number = tf.constant(float(len(self.batches)))
        parts = GrpoParts(number, number, number, GrpoStats(*[number] * 7), number, number, tf.constant([0.5]), ())
        if not self._reference:
            parts = parts._replace(penalty=(), stats=parts.stats._replace(kl=()))
        moved = float(np.abs(np.asarray(batch.advantages)).sum()) if taken else 0.0
        state = state._replace(step=state.step + int(taken), params={"w": state.params["w"] + moved})
        return state, GrpoMetrics(parts, OptimStats(number, tf.constant(0.1)), tf.constant(taken), tf.zeros([1]))


class FakeScore:
    """Log-probabilities that are the parameter itself; notes its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, params, router, tokens, mask=None, experts=None):
        value = float(tree.flatten(params)[0])
        self.calls.append((value, experts is not None))
        shape = [len(tokens), tokens.shape[1] - 1]
        chosen = np.ones([1, *shape, 2], np.int32)
        zero = np.zeros([])
        return TokenLogprobs(np.full(shape, -value), np.zeros(shape), chosen, zero, np.zeros([0]), RouterState(zero, zero))
