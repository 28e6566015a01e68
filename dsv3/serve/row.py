"""One request on its way: its tokens so far, its text, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.serve.request import Completion, Event, Request
from dsv3.serve.text import TextStream


class Row:
    """The host's side of one row of a batch.

    Args:
      index: the request's place in the sequence that the engine was given.
      request, prompt: what is asked for, and its prompt as token ids.
      budget: tokens to generate at most.
      eos_ids: stop tokens of a request that names none.
      tokenizer: makes the text, if given.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        prompt: tuple[int, ...],
        budget: int,
        eos_ids: Sequence[int],
        tokenizer: Tokenizer | None,
    ):
        self.index, self.request, self.prompt = index, request, prompt
        self.ended: str | None = None
        self._budget = budget
        self._stops = frozenset(eos_ids if request.stop_tokens is None else request.stop_tokens)
        self._text = None if tokenizer is None else TextStream(tokenizer, request.stop)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[tuple] = []
        self._steps = self._drafted = self._accepted = 0
        self._sampled: list[np.ndarray] | None = None
        self._experts: list[np.ndarray] = []

    @property
    def held(self) -> int:
        """Tokens of the row that are in the cache: all but the last."""
        return len(self.prompt) - 1 + len(self._tokens)

    def begin(self, experts: list[np.ndarray]) -> None:
        """Begins a record: the experts `[X, T, K]` of each chunk in which the prompt was read, all but its last token."""
        self._sampled, left = [], len(self.prompt) - 1
        for chunk in experts:
            self._experts.append(chunk[:, :left])
            left -= self._experts[-1].shape[1]

    def note(self, logprobs: np.ndarray, experts: np.ndarray) -> None:
        """Adds to the record what one step drew: `[T]`, and `[X, T, K]` of the positions that drew it."""
        self._sampled.append(logprobs)
        self._experts.append(experts)

    def push(self, tokens: list[int], logprobs: list[float], top: list[list], drafted: int) -> Event:
        """Adds the tokens of one step, up to where the row ends.

        Args:
          tokens, logprobs, top: what the step drew; the last token is the model's own, those before are accepted drafts.
          drafted: drafts that the step tried.

        Raises:
          ValueError: a log-probability that is not finite.
        """
        self._steps += 1
        self._drafted += drafted
        self._accepted += len(tokens) - 1
        before = len(self._tokens)
        for token, logprob, best in zip(tokens, logprobs, top):
            place = len(self._tokens)
            check(
                math.isfinite(logprob),
                f"Engine: request {self.index}: new token {place} has log-probability {logprob}, want finite logits",
            )
            self._tokens.append(token)
            self._logprobs.append(logprob)
            self._top.append(tuple(best[: self.request.top_logprobs]))
            self.ended = self._reason(token)
            if self.ended:
                break
        text = "" if self._text is None else self._text.take(last=bool(self.ended))
        new = tuple(self._tokens[before:]), tuple(self._logprobs[before:])
        return Event(self.index, *new, text, self._completion() if self.ended else None)

    def _reason(self, token: int) -> str | None:
        """Why the row ends with this token, or `None`."""
        stops = token in self._stops
        full = len(self._tokens) == self._budget
        found = False
        if self._text is not None:
            found = not stops and self._text.push(token)
            if not found and (stops or full):
                found = self._text.finish()
        return "stop_string" if found else "stop_token" if stops else "length" if full else None

    def _completion(self) -> Completion:
        return Completion(
            prompt_tokens=len(self.prompt),
            tokens=tuple(self._tokens),
            text=None if self._text is None else self._text.text,
            logprobs=tuple(self._logprobs),
            top_logprobs=tuple(self._top),
            finish_reason=self.ended,
            steps=self._steps,
            drafted=self._drafted,
            accepted=self._accepted,
            **self._recorded(),
        )

    def _recorded(self) -> dict[str, object]:
        """The record up to the row's end: its last step may have drawn more than it keeps."""
        if self._sampled is None:
            return {}
        new = len(self._tokens)
        experts = np.concatenate(self._experts, 1)[:, : len(self.prompt) - 1 + new]
        return {"sampled_logprobs": tuple(np.concatenate(self._sampled)[:new].tolist()), "experts": experts}
