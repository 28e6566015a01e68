"""What generation is asked for and what it gives: requests, events, completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes:
      prompt: text, or token ids. Text is encoded as the tokenizer does it, usually with the begin-of-sentence token first.
      max_new_tokens: tokens to generate at most.
      temperature: 0 is greedy. top_k: 0 keeps all tokens. top_p: 1 keeps all (see `ops.sampling.sampling_probs`).
      seed: a row's tokens depend on it and on nothing else; equal requests with equal seeds get equal tokens.
      stop_tokens: ids that end the sequence; `None` for the config's end-of-sentence ids.
      stop: strings that end the sequence.
      top_logprobs: how many of the best tokens' log-probabilities to return at each place.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Sequence[int] | None = None
    stop: Sequence[str] = ()
    top_logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for a request.

    Attributes:
      prompt_tokens: length of the prompt in tokens.
      tokens: the new tokens, with the stop token, or those that a stop string consists of, at their end.
      text: their text without the stop token and from a stop string on; `None` without a tokenizer.
      logprobs: for each token its log-probability under the model, before temperature, top-k and top-p.
      top_logprobs: for each token the best `(id, log-probability)` pairs, best first.
      finish_reason: `"stop_token"`, `"stop_string"`, or `"length"` (`max_new_tokens`, or the engine's `max_length`).
      steps: forward passes of the model that the new tokens took.
      drafted, accepted: tokens that the MTP modules proposed, and those of them that the model accepted.
      sampled_logprobs: with `Engine(record=True)` for each token its log-probability at the request's temperature (at 0:
        as `logprobs`), before top-k and top-p; else empty.
      experts: with `Engine(record=True)` `[X, T, K]` int16, the experts of each mixture layer at every position but the last
        token's: T is the length of prompt and tokens less one. Else `None`.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str | None
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: str
    steps: int
    drafted: int = 0
    accepted: int = 0
    sampled_logprobs: tuple[float, ...] = ()
    experts: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def acceptance_rate(self) -> float:
        """`accepted / drafted`; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each forward pass of the model; 1 without drafts."""
        return len(self.tokens) / self.steps


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of one request.

    Attributes:
      index: the request's place in the sequence that the engine was given.
      tokens, logprobs: the new tokens.
      text: new text. It comes in whole characters, and not before it is certain that it belongs to no stop string: so it may
        be empty, and belong to earlier tokens. Joined over a request's events it is the completion's text.
      completion: the whole result, at a request's last event; before, `None`.
    """

    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    completion: Completion | None = None


def check_requests(
    requests: Sequence[Request], *, cfg: ModelConfig, tokenizer: Tokenizer | None, max_length: int
) -> list[tuple[int, ...]]:
    """Returns the prompts of requests as token ids.

    Args:
      requests: the requests.
      cfg, tokenizer: the model's.
      max_length: tokens of prompt and completion at most.

    Raises:
      ValueError: the first thing that cannot be done, with the request's place.
    """
    kind = type(requests).__name__
    check(isinstance(requests, Sequence) and not isinstance(requests, str), f"Engine: `requests` is a {kind}, want a list")
    prompts = []
    for i, request in enumerate(requests):
        where = f"Engine: request {i}"
        check(isinstance(request, Request), f"{where} is a {type(request).__name__}, want a Request")
        ids = _prompt_ids(where, request.prompt, tokenizer)
        for name, tokens in (("prompt", ids), ("stop_tokens", request.stop_tokens or ())):
            bad = [token for token in tokens if not 0 <= token < cfg.vocab_size]
            check(not bad, f"{where}: `{name}` holds token id {bad[:1]}, want ids in [0, {cfg.vocab_size}) [V]")
        check(
            len(ids) < max_length,
            f"{where}: `prompt` has {len(ids)} tokens, want fewer than max_length, which is {max_length}",
        )
        _check_settings(where, request, cfg, tokenizer)
        prompts.append(ids)
    return prompts


def _prompt_ids(where: str, prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    check(len(prompt) > 0, f"{where}: `prompt` is empty, want at least one token")
    if not isinstance(prompt, str):
        bad = [token for token in prompt if not isinstance(token, int | np.integer)]
        check(not bad, f"{where}: `prompt` holds {bad[:1]}, want text or integer token ids")
        return tuple(int(token) for token in prompt)
    check(tokenizer is not None, f"{where}: `prompt` is text, but the engine has no tokenizer")
    _check_text(where, "prompt", prompt)
    ids = tuple(tokenizer.encode(prompt).ids)
    check(len(ids) > 0, f"{where}: `prompt` has no tokens, want at least one")
    return ids


def _check_settings(where: str, request: Request, cfg: ModelConfig, tokenizer: Tokenizer | None) -> None:
    r = request
    check(r.max_new_tokens > 0, f"{where}: `max_new_tokens` is {r.max_new_tokens}, want > 0")
    check(r.temperature >= 0, f"{where}: `temperature` is {r.temperature}, want at least 0")
    check(r.top_k >= 0, f"{where}: `top_k` is {r.top_k}, want at least 0")
    check(0 < r.top_p <= 1, f"{where}: `top_p` is {r.top_p}, want above 0 and at most 1")
    check(0 <= r.seed < 2**64, f"{where}: `seed` is {r.seed}, want 0 to 2^64 - 1")
    check(
        0 <= r.top_logprobs <= cfg.vocab_size,
        f"{where}: `top_logprobs` is {r.top_logprobs}, want 0 to vocab_size, which is {cfg.vocab_size}",
    )
    check(not isinstance(r.stop, str), f"{where}: `stop` is the string {r.stop!r}, want a sequence of strings")
    check(all(r.stop), f"{where}: `stop` holds an empty string")
    for stop in r.stop:
        _check_text(where, "stop", stop)
    check(not r.stop or tokenizer is not None, f"{where}: `stop` holds strings, but the engine has no tokenizer")


def _check_text(where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: `{name}` has a lone surrogate at {error.start}, want Unicode text") from None


def key_words(seed: int) -> tuple[int, int]:
    """Returns a seed of 64 bits as the two int32 numbers of a random key."""
    low, high = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
    return int(low), int(high)
