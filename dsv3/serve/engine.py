"""The engine: requests in, tokens, text and completions out.

It keeps a batch of rows going. Rows that end make room for waiting requests; what they compute is in `serve.steps`, compiled
once for each shape (rows and cache slots come in buckets). Nothing here is learned or random: a row's tokens follow from its
request alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from tokenizers import Tokenizer

from dsv3 import tree
from dsv3.checks import check
from dsv3.compiled import compile_step, place
from dsv3.config import ModelConfig
from dsv3.data.tokenizer import check_tokenizer
from dsv3.nn.model import ModelParams, RouterState, absorb_params, cast_params
from dsv3.policy import ComputePolicy, default_policy
from dsv3.serve.batch import chunk_plan, row_bucket, rows_take, slot_bucket
from dsv3.serve.request import Completion, Event, Request, check_requests, key_words
from dsv3.serve.row import Row
from dsv3.serve.steps import Caches, Rows, Sampling, decode_step, prefill_step, speculative_step, state_init

_COMPACT_FROM = 16  # rows from which on a batch is made smaller at its end: a new shape costs a tracing


@dataclasses.dataclass
class _Batch:
    """Rows that run together: `slots` names the request of each row, `None` for a row that only fills the shape."""

    caches: Caches
    rows: Rows
    slots: list[Row | None]
    sampling: Sampling | None = None

    @property
    def size(self) -> int:
        """Cache slots of a row."""
        return self.caches.trunk.shape[2]

    def live(self) -> list[int]:
        """The rows that still want tokens."""
        return [i for i, row in enumerate(self.slots) if row is not None and not row.ended]


class Engine:
    """Generates text with one model.

        engine = Engine(cfg, params, router, tokenizer=tokenizer)
        done = engine.generate([Request("def main():", max_new_tokens=64)])

    Args:
      cfg, params, router: the model; matrices may be quantised (`dsv3.quantize_params`).
      tokenizer: for prompts given as text, for text of completions, and for stop strings.
      policy: how to compute; default: the device's. On a CPU decoding leaves element-wise chains unfused, which is faster
        for a few rows. With `cache="float8"` the caches are in FP8.
      speculative: tokens to draft with the MTP modules in each step; 0 decodes plainly. Greedy output is the same, sampled
        output has the same distribution.
      max_batch: rows that run together at most.
      max_length: tokens of prompt and completion at most; default: the config's.
      chunk_sizes: sizes of the chunks in which prompts are read.
      smallest_cache: tokens a row that a cache begins with; it doubles as rows grow.
      record: also return what training on the completions wants: `Completion.experts` and `sampled_logprobs`.
      on_chunk: is called after each chunk of prompts with the tokens of the longest that are read, and all of them.

    Raises:
      ValueError: a tokenizer that does not fit the vocabulary, `speculative` for a model without MTP modules, a `max_length`
        above the config's, or sizes that are not positive.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: ModelParams,
        router: RouterState,
        *,
        tokenizer: Tokenizer | None = None,
        policy: ComputePolicy | None = None,
        speculative: int = 0,
        max_batch: int = 8,
        max_length: int | None = None,
        chunk_sizes: Sequence[int] = (32, 128, 512),
        smallest_cache: int = 256,
        record: bool = False,
        on_chunk: Callable[[int, int], None] | None = None,
    ):
        max_length = cfg.max_length if max_length is None else max_length
        for name, value in (("max_batch", max_batch), ("smallest_cache", smallest_cache)):
            check(value > 0, f"Engine: `{name}` is {value}, want > 0")
        check(bool(chunk_sizes) and min(chunk_sizes) > 0, f"Engine: `chunk_sizes` is {chunk_sizes}, want sizes > 0")
        check_engine(cfg, speculative=speculative, max_length=max_length)
        if tokenizer is not None:
            check_tokenizer(tokenizer, cfg.vocab_size)
        self.cfg, self.tokenizer, self.max_length, self.max_batch = cfg, tokenizer, max_length, max_batch
        self.depth, self._modules = speculative, min(speculative, cfg.num_mtp_layers)
        # A step writes all that it computes behind a row, kept or not, and goes on doing so when the row has ended.
        self._margin = 2 * (self.depth + 1)
        self._chunks, self._smallest = tuple(chunk_sizes), smallest_cache
        self.record, self._on_chunk = record, on_chunk
        self._policy = policy or default_policy()
        self._decode_policy = self._policy if self._policy.jit else self._policy.replace(fuse=False)
        prefill = functools.partial(prefill_step, cfg=cfg, policy=self._policy, modules=self._modules, record=record)
        self._prefill = {
            first: compile_step(functools.partial(prefill, first=first), jit=self._policy.jit) for first in (True, False)
        }
        self._decode: dict = {}
        self.update(params, router)

    def update(self, params: ModelParams, router: RouterState) -> None:
        """Exchanges the model's parameters, as between the steps of reinforcement learning; nothing is traced again."""
        self._params, self._router = absorb_params(cast_params(params, self._policy), self.cfg), router
        self._dtype = self._policy.compute_dtype or params.embed.dtype

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Continues all requests.

        Args:
          requests: in any number; `max_batch` run at a time.

        Returns:
          The completions in the requests' order.

        Raises:
          ValueError: a request that cannot be served (all are looked at before any work), or logits that are not finite.
        """
        done = {event.index: event.completion for event in self.stream(requests) if event.completion}
        return [done[i] for i in range(len(done))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Continues all requests and yields tokens and text as they come.

        Args and errors are as of `generate`; the events of different requests are interleaved.
        """
        prompts = check_requests(requests, cfg=self.cfg, tokenizer=self.tokenizer, max_length=self.max_length)
        rows = collections.deque()
        for i, (request, ids) in enumerate(zip(requests, prompts)):
            budget = min(request.max_new_tokens, self.max_length - len(ids))
            rows.append(Row(i, request, ids, budget, self.cfg.eos_ids, self.tokenizer))
        greedy = all(row.request.temperature == 0 for row in rows)
        top = max((row.request.top_logprobs for row in rows), default=0)
        return self._run(rows, greedy, top)

    def traces(self) -> int:
        """Returns how often a step was traced: once for each shape and kind of sampling that came up."""
        return sum(step.traces() for step in (*self._prefill.values(), *self._decode.values()))

    def _run(self, waiting: collections.deque[Row], greedy: bool, top: int) -> Iterator[Event]:
        batch = None
        while waiting or (batch is not None and batch.live()):
            batch = self._fit(self._admit(batch, waiting), bool(waiting))
            yield from self._advance(batch, greedy, top)

    def _admit(self, batch: _Batch | None, waiting: collections.deque[Row]) -> _Batch:
        """Reads the prompts of waiting rows, once it is worth it, and puts them beside the rows that run."""
        live = [] if batch is None else batch.live()
        free = self.max_batch - len(live)
        if not waiting or (live and free < max(1, self.max_batch // 4)):
            return batch
        new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        read, places = self._read(new)
        if not live:
            return self._take([read], places, new)
        places = live + [len(batch.slots) + place for place in places]
        return self._take([batch, read], places, [batch.slots[i] for i in live] + new)

    def _read(self, new: list[Row]) -> tuple[_Batch, list[int]]:
        """Prefills prompts, equal ones once; returns a batch of the different ones and each row's place in it."""
        prompts = list(dict.fromkeys(row.prompt for row in new))
        places = [prompts.index(row.prompt) for row in new]
        count = row_bucket(len(prompts), self.max_batch)
        lengths = np.array([len(prompt) - 1 for prompt in prompts] + [0] * (count - len(prompts)), np.int32)
        plan = chunk_plan(int(lengths.max()), self._chunks)
        tokens = np.zeros([count, sum(plan) + self._modules + 1], np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
        size = self._slots(max(sum(plan), int(lengths.max()) + self._margin))
        caches, rows = state_init(
            self.cfg, count, size, dtype=self._dtype, cache=self._policy.cache, modules=self._modules, depth=self.depth
        )
        caches, at, experts = place(caches, owned=True), 0, []
        for chunk in plan:
            piece = tf.constant(tokens[:, at : at + chunk + self._modules])
            counts = tf.constant(np.clip(lengths - at, 0, chunk))
            caches, (rows, chosen) = self._prefill[at == 0](caches, self._params, self._router, rows, piece, counts)
            at += chunk
            if self.record:
                experts.append(chosen.numpy().astype(np.int16))
            if self._on_chunk is not None:
                self._on_chunk(min(at, int(lengths.max())), int(lengths.max()))
        for row, i in zip(new, places) if self.record else ():
            row.begin([chosen[:, i] for chosen in experts])
        rows = rows._replace(token=tf.constant(tokens[np.arange(count), lengths]))
        return _Batch(caches, rows, [None] * count), places

    def _slots(self, tokens: int) -> int:
        return slot_bucket(tokens, self._smallest, self.max_length + self._margin)

    def _fit(self, batch: _Batch, more: bool) -> _Batch:
        """Makes room in the cache, and a batch small whose rows have mostly ended."""
        live = batch.live()
        rows = len(batch.slots)
        if not more and rows >= _COMPACT_FROM and 4 * len(live) <= rows:
            return self._take([batch], live, [batch.slots[i] for i in live])
        if max(batch.slots[i].held for i in live) + self._margin > batch.size:
            return self._take([batch], list(range(rows)), batch.slots)
        return batch

    def _take(self, parts: list[_Batch], places: list[int], slots: list[Row | None]) -> _Batch:
        """Makes a batch of the rows at `places` of other batches, padded to the buckets of rows and slots."""
        count = row_bucket(len(places), self.max_batch)
        spare = count - len(places)
        places, slots = places + [places[0]] * spare, slots + [None] * spare
        size = self._slots(max(row.held for row in slots if row is not None and not row.ended) + self._margin)
        same = len(parts) == 1 and places == list(range(len(parts[0].slots))) and parts[0].size >= size
        state = parts[0].caches, parts[0].rows
        if not same:
            caches, rows = rows_take([(part.caches, part.rows) for part in parts], places, size)
            state = place(caches, owned=True), rows
        return _Batch(*state, slots, _sampling([None if row is None else row.request for row in slots]))

    def _advance(self, batch: _Batch, greedy: bool, top: int) -> Iterator[Event]:
        """One step of the model for all rows of a batch."""
        live = batch.live()
        active = np.zeros([len(batch.slots)], bool)
        active[live] = True
        batch.caches, (batch.rows, drawn) = self._step(greedy, top)(
            batch.caches, self._params, self._router, batch.rows, batch.sampling, tf.constant(active)
        )
        drawn = tree.map_leaves(lambda x: x.numpy(), drawn)
        for i in live:
            new, row = slice(0, drawn.count[i]), batch.slots[i]
            best = [list(zip(*pair)) for pair in zip(drawn.top_ids[i, new].tolist(), drawn.top_logprobs[i, new].tolist())]
            if self.record:
                row.note(drawn.record.logprobs[i, new], drawn.record.experts[:, i, new].astype(np.int16))
            yield row.push(drawn.tokens[i, new].tolist(), drawn.logprobs[i, new].tolist(), best, self.depth)

    def _step(self, greedy: bool, top: int):
        """The compiled decode step for one kind of sampling."""
        if (greedy, top) not in self._decode:
            how = {"cfg": self.cfg, "policy": self._decode_policy, "greedy": greedy, "top": top, "record": self.record}
            fn = functools.partial(decode_step, **how)
            if self.depth:
                fn = functools.partial(speculative_step, depth=self.depth, modules=self._modules, **how)
            self._decode[greedy, top] = compile_step(fn, jit=self._policy.jit)
        return self._decode[greedy, top]


def check_engine(cfg: ModelConfig, *, speculative: int, max_length: int) -> None:
    """Checks what an engine is asked to do against the model's config, which is there before the model is loaded.

    Args:
      cfg: the model's.
      speculative, max_length: as of `Engine`.

    Raises:
      ValueError: the model cannot do it.
    """
    check(max_length > 0, f"Engine: `max_length` is {max_length}, want > 0")
    check(
        max_length <= cfg.max_length,
        f"Engine: `max_length` is {max_length}, want at most the model's, which is {cfg.max_length}",
    )
    check(speculative >= 0, f"Engine: `speculative` is {speculative}, want at least 0")
    check(
        not speculative or cfg.num_mtp_layers > 0,
        f"Engine: `speculative` is {speculative}, but the model has no MTP module to draft with",
    )


def _sampling(requests: list[Request | None]) -> Sampling:
    """The settings of all rows as tensors; rows that only fill the shape are greedy."""
    rows = [Request(()) if request is None else request for request in requests]
    return Sampling(
        key=tf.constant([key_words(r.seed) for r in rows], tf.int32),
        temperature=tf.constant([r.temperature for r in rows], tf.float32),
        top_k=tf.constant([min(r.top_k, 2**31 - 1) for r in rows], tf.int32),
        top_p=tf.constant([r.top_p for r in rows], tf.float32),
    )
