"""Rollouts: groups of samples of each prompt, with what the sampling pass knew of them.

A sample is a row of tokens: a prompt, what was drawn, and for a prompt of several turns the later turns' texts and what was
drawn after each of them. Nothing is ever cut off: what does not fit is an error before anything is drawn.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3.checks import check
from dsv3.serve import Completion, Engine, Request
from dsv3.serve.batch import slot_bucket


class Prompt(NamedTuple):
    """What is asked.

    Attributes:
      ids: tokens of the whole conversation up to where the model goes on.
      number: which problem it is; with the sample's it decides what is drawn, whatever else is in the batch.
      turns: of a prompt of several turns, the tokens that follow the model's first answer (the user's next words and
        whatever the template has around them), its second, and so on. An answer that has not ended by itself is the last.
      name: what messages call it; without one its place in the batch and `number`.
    """

    ids: Sequence[int]
    number: int = 0
    turns: Sequence[Sequence[int]] = ()
    name: str = ""


class Rollouts(NamedTuple):
    """N samples; those of a prompt stand together, G of them.

    Attributes:
      tokens: `[N, T+1]` int32, padded on the right.
      mask: `[N, T]` float32, 1 where the next token was drawn: from the first to the one that ended it.
      logprobs: `[N, T]` float32, of the drawn tokens at the temperature, as the sampling pass computed them; else 0.
      experts: `[X, N, T, K]` int16, the experts of each position in the sampling pass; padding has some, which are evenly
        spread.
      numbers, samples: `[N]` int32, which problem and which of its samples.
      steps, drafted, accepted: `[N]` int32, forward passes, and drafts of the MTP modules.
      finish: why each ended (see `Completion`): `"length"` is a truncated one.
      texts: the answers of each, one a turn; without a tokenizer ids with blanks between them.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    experts: np.ndarray
    numbers: np.ndarray
    samples: np.ndarray
    steps: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    finish: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    @property
    def truncated(self) -> np.ndarray:
        """`[N]` bool, which samples ended because there was no more room."""
        return np.array([reason == "length" for reason in self.finish], bool)

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` int64, how many tokens were drawn."""
        return self.mask.sum(1).astype(np.int64)

    def answer(self, row: int) -> str:
        """What a reward judges: a sample's answers, with line breaks between turns."""
        return "\n".join(self.texts[row])


def sample_seed(seed: int, step: int, number: int, sample: int, turn: int = 0) -> int:
    """Returns the 64-bit seed of one sample: a hash of run, step, problem, sample and turn.

    >>> sample_seed(0, 1, 2, 3) == sample_seed(0, 1, 2, 3), sample_seed(0, 1, 2, 3) == sample_seed(0, 1, 3, 2)
    (True, False)
    """
    words = struct.pack("<5q", seed, step, number, sample, turn)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def rollout(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    stop_tokens: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    bucket: int = 64,
) -> Rollouts:
    """Draws `group_size` samples of each prompt, from the whole distribution: top-k and top-p would make it another one than
    training computes.

    Args:
      engine: one with `record=True`; the model's parameters are those that it was last given.
      prompts: see `Prompt`.
      group_size: G, samples of each prompt.
      max_new_tokens: of an answer, the stop token included.
      temperature: of the sampling; 0 takes the best token each time.
      seed, step: of the run and of this exploration. A sample follows from these, its prompt and its number alone.
      stop_tokens, stop: what ends an answer, see `Request`.
      bucket: T is this times a power of two, so that few shapes are compiled.

    Returns:
      `Rollouts` of N = prompts·G samples.

    Raises:
      ValueError: no prompt, a prompt that does not fit, by its name; an engine without a record; as `Engine.generate`.
    """
    check(engine.record, "rollout: `engine` keeps no record, want Engine(..., record=True)")
    check(bucket > 0, f"rollout: `bucket` is {bucket}, want > 0")
    rows = draw_samples(
        engine, prompts, group_size=group_size, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, step=step,
        stop_tokens=stop_tokens, stop=stop,
    )  # fmt: skip
    longest = max(len(row.tokens) for row in rows) - 1
    size = slot_bucket(longest, bucket, engine.max_length - 1)
    return _padded(rows, size, engine.cfg.moe.router.num_experts)


def draw_samples(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    stop_tokens: Sequence[int] | None = None,
    stop: Sequence[str] = (),
) -> list[Sample]:
    """Draws what `rollout` does, from any engine, for whoever wants the answers and no arrays to train on.

    Args:
      engine: one with a record has the samples keep experts.
      prompts, group_size, max_new_tokens, temperature, seed, step, stop_tokens, stop: as of `rollout`.

    Returns:
      The samples, those of a prompt together.

    Raises:
      ValueError: as `rollout`.
    """
    check(group_size > 0, f"rollout: `group_size` is {group_size}, want > 0")
    check_prompts(prompts, max_new_tokens=max_new_tokens, max_length=engine.max_length)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "stop_tokens": stop_tokens, "stop": stop}
    rows = [Sample(prompt, sample) for prompt in prompts for sample in range(group_size)]
    for turn in range(1 + max(len(prompt.turns) for prompt in prompts)):
        waiting = [row for row in rows if row.goes_on(turn)]
        seeds = [sample_seed(seed, step, row.prompt.number, row.sample, turn) for row in waiting]
        requests = [Request(row.tokens, seed=number, **how) for row, number in zip(waiting, seeds)]
        for row, done in zip(waiting, engine.generate(requests)):
            row.add(done)
    return rows


def check_prompts(prompts: Sequence[Prompt], *, max_new_tokens: int, max_length: int) -> None:
    """Raises `ValueError` for a prompt that does not fit with its answers, which names it; prompts are never cut off.

    Args:
      prompts: see `Prompt`.
      max_new_tokens: of each answer.
      max_length: tokens of prompt, turns and answers together at most.
    """
    check(len(prompts) > 0, "rollout: `prompts` is empty, want at least one prompt")
    check(max_new_tokens > 0, f"rollout: `max_new_tokens` is {max_new_tokens}, want > 0")
    for row, prompt in enumerate(prompts):
        answers, room = 1 + len(prompt.turns), prompt_room(prompt, max_new_tokens)
        size = room - answers * max_new_tokens
        where = f"rollout: {prompt.name or f'prompt {row} (problem {prompt.number})'}"
        check(len(prompt.ids) > 0, f"{where} is empty, want at least one token")
        check(
            room <= max_length,
            f"{where} has {size} tokens and wants room for {answers} answer{'s' * (answers > 1)} of {max_new_tokens}, that "
            f"is {room}, want at most max_length, which is {max_length}: no prompt is cut off",
        )


def prompt_room(prompt: Prompt, max_new_tokens: int) -> int:
    """Returns the tokens of a prompt and its turns with the longest answers to all of them.

    >>> prompt_room(Prompt([1, 2], turns=([3],)), 10)
    23
    """
    return len(prompt.ids) + sum(map(len, prompt.turns)) + (1 + len(prompt.turns)) * max_new_tokens


class Sample:
    """One sample as it grows.

    Attributes:
      prompt: see `Prompt`. sample: its number among the prompt's.
      tokens: all so far. texts: the answers, one a turn; without a tokenizer ids with blanks between them.
      finish: why the last one ended, see `Completion`. length: tokens that were drawn.
    """

    def __init__(self, prompt: Prompt, sample: int):
        self.prompt, self.sample = prompt, sample
        self.tokens: list[int] = [int(token) for token in prompt.ids]
        self.drawn: list[tuple[int, tuple[float, ...]]] = []  # where each answer begins, and its log-probabilities
        self.experts: np.ndarray | None = None
        self.texts: list[str] = []
        self.finish = ""
        self.length = self.steps = self.drafted = self.accepted = 0

    def goes_on(self, turn: int) -> bool:
        """Appends what comes before the answer of a turn; returns whether there is one."""
        if turn == 0:
            return True
        if turn > len(self.prompt.turns) or len(self.texts) < turn or self.finish == "length":
            return False
        self.tokens += [int(token) for token in self.prompt.turns[turn - 1]]
        return True

    def add(self, done: Completion) -> None:
        """Appends an answer. What the sampling pass has chosen for earlier answers stays, though all is read again."""
        self.drawn.append((len(self.tokens), done.sampled_logprobs))
        self.tokens += done.tokens
        self.length += len(done.tokens)
        if done.experts is not None:
            old = done.experts[:, :0] if self.experts is None else self.experts
            self.experts = np.concatenate([old, done.experts[:, old.shape[1] :]], 1)
        self.texts.append(" ".join(map(str, done.tokens)) if done.text is None else done.text)
        self.finish = done.finish_reason
        self.steps, self.drafted = self.steps + done.steps, self.drafted + done.drafted
        self.accepted += done.accepted


def _padded(rows: Sequence[Sample], size: int, experts_total: int) -> Rollouts:
    layers, _, top_k = rows[0].experts.shape
    tokens = np.zeros([len(rows), size + 1], np.int32)
    mask, logprobs = (np.zeros([len(rows), size], np.float32) for _ in range(2))
    experts = _filler(layers, len(rows), size, top_k, experts_total)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        experts[:, i, : row.experts.shape[1]] = row.experts
        for begin, values in row.drawn:
            mask[i, begin - 1 : begin - 1 + len(values)] = 1.0
            logprobs[i, begin - 1 : begin - 1 + len(values)] = values

    def numbers(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], np.int32)

    return Rollouts(
        tokens, mask, logprobs, experts, np.array([row.prompt.number for row in rows], np.int32), numbers("sample"),
        numbers("steps"), numbers("drafted"), numbers("accepted"), tuple(row.finish for row in rows),
        tuple(tuple(row.texts) for row in rows),
    )  # fmt: skip


def _filler(layers: int, rows: int, size: int, top_k: int, experts_total: int) -> np.ndarray:
    """Experts for padding: each position's are unlike, and all experts get their share."""
    even = np.arange(size * top_k, dtype=np.int32).reshape(size, top_k) % experts_total
    return np.broadcast_to(even.astype(np.int16), [layers, rows, size, top_k]).copy()


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Returns the samples of several rollouts, one after the other, with the length of the longest."""
    check(len(parts) > 0, "join_rollouts: `parts` is empty, want at least one")
    size = max(part.mask.shape[1] for part in parts)
    fitted = [fit_rollouts(part, size) for part in parts]
    fields: dict[str, Any] = {}
    for name in Rollouts._fields:
        values = [getattr(part, name) for part in fitted]
        if isinstance(values[0], tuple):
            fields[name] = tuple(item for value in values for item in value)
        else:
            fields[name] = np.concatenate(values, 1 if name == "experts" else 0)
    return Rollouts(**fields)


def fit_rollouts(rollouts: Rollouts, size: int) -> Rollouts:
    """Returns rollouts of length T = `size`, with more or less padding.

    Raises:
      ValueError: a sample is longer.
    """
    used = rollouts.mask.nonzero()[1].max(initial=-1) + 1
    check(used <= size, f"fit_rollouts: `size` is {size}, want at least {used}, the longest sample's")
    more = size - rollouts.mask.shape[1]
    if more <= 0:
        cut = {name: getattr(rollouts, name)[:, :size] for name in ("mask", "logprobs")}
        return rollouts._replace(tokens=rollouts.tokens[:, : size + 1], experts=rollouts.experts[:, :, :size], **cut)
    wider = {name: np.pad(getattr(rollouts, name), [[0, 0], [0, more]]) for name in ("tokens", "mask", "logprobs")}
    layers, rows, _, top_k = rollouts.experts.shape
    filler = _filler(layers, rows, more, top_k, int(rollouts.experts.max(initial=top_k - 1)) + 1)
    return rollouts._replace(experts=np.concatenate([rollouts.experts, filler], 2), **wider)


def take_rollouts(rollouts: Rollouts, rows: Sequence[int]) -> Rollouts:
    """Returns the samples of some rows, in their order and at the same length."""
    fields = {}
    for name, value in rollouts._asdict().items():
        if isinstance(value, tuple):
            fields[name] = tuple(value[row] for row in rows)
        else:
            fields[name] = np.take(value, rows, 1 if name == "experts" else 0)
    return Rollouts(**fields)
