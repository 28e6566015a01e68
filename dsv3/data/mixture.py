"""Which rows make up a step: a plan over several sources that is a pure function of a few numbers.

A source is an endless stream of tokens, one epoch after another (`stream.py` says in which order). It is cut into rows of
T tokens, rows are shuffled within groups of about `group_tokens`, and no group reaches over the end of an epoch by more than
its last row, which stays last. So every token of an epoch is a target once before any is a second time;
when T changes, what is left of a group is skipped until the next epoch.

The B rows of a step go to the sources by systematic sampling: with cumulative weights c and a number u in [0, 1) of the
step, source i gets ceil(B·c[i] - u) - ceil(B·c[i-1] - u) rows, which is within one row of its weight. The u of successive
steps are spread evenly, so that the sum over many steps stays within a few rows, too, with no memory of the past.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dsv3.checks import check
from dsv3.data.shards import ShardSource
from dsv3.data.shuffle import mix_keys, permute, spread

GROUP_TOKENS = 2**20

Shape = Callable[[int], tuple[int, int]]
"""(rows, tokens of a row) of the step that begins after so many tokens."""


@dataclass(frozen=True)
class Mixture:
    """Which sources are drawn from, and how much; `make_mixture` makes it.

    Attributes:
      names: of the sources.
      tokens: of an epoch, by source.
      weights: share of the tokens that a source gives; they sum to 1.
      epochs: most epochs of a source; `None`: any number.
      seed: of every order.
      group_tokens: within about so many tokens of a source rows are shuffled.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    epochs: tuple[float | None, ...]
    seed: int = 0
    group_tokens: int = GROUP_TOKENS


class InputState(NamedTuple):
    """Where the input stands between two steps; everything after it follows from it and the mixture.

    Attributes:
      steps: how many were drawn.
      seq_len: of the last one; 0 before the first.
      taken: by source, tokens of its stream before the group that is being drawn from.
      used: by source, rows of that group that were drawn.
      left_out: tokens that no row has until their next epoch, as `seq_len` changed inside of a group.
    """

    steps: int
    seq_len: int
    taken: tuple[int, ...]
    used: tuple[int, ...]
    left_out: int


class RowPlan(NamedTuple):
    """The rows of a step, in order.

    Attributes:
      seq_len: T.
      source: [B] int64, index of the source.
      position: [B] int64, place of the row's first target in its source's stream; its first input is one before that.
    """

    seq_len: int
    source: np.ndarray
    position: np.ndarray


class MixtureUse(NamedTuple):
    """What a run draws from a mixture.

    Attributes:
      steps: of the run. left_out: tokens that were skipped, see `InputState`.
      tokens: by source. epochs: by source, of its own.
    """

    steps: int
    left_out: int
    tokens: dict[str, int]
    epochs: dict[str, float]


def make_mixture(
    sources: Mapping[str, ShardSource],
    *,
    weights: Mapping[str, float] | None = None,
    repeats: Mapping[str, float] | None = None,
    epochs: Mapping[str, float] | None = None,
    seed: int = 0,
    group_tokens: int = GROUP_TOKENS,
) -> Mixture:
    """Makes a mixture of sources by weights, or by how often each is to be repeated.

    weight = weights[source] / sum, or tokens · repeats[source] / sum; with neither each source is repeated equally often.

    Args:
      sources: as `open_shards` returns them; their order is the mixture's.
      weights: source → share of the tokens, not negative, for every source.
      repeats: source → epochs relative to those of the others; a source that is not named has 1.
      epochs: source → most epochs, above 0; a source that is not named has no limit.
      seed: of every order.
      group_tokens: rows are shuffled within about so many tokens of a source. A cache holds so many for each.

    Returns:
      The mixture.

    Raises:
      ValueError: no sources; weights and repeats both; an unknown source, or one without a weight; a number that is negative
        or not finite; weights that sum to zero; `group_tokens` below 1.
    """
    check(bool(sources), "make_mixture: `sources` is empty, want at least one source")
    check(weights is None or repeats is None, "make_mixture: `weights` and `repeats` are both given, want one of them")
    check(group_tokens >= 1, f"make_mixture: `group_tokens` is {group_tokens}, want at least 1")
    for argument, given, least in (("weights", weights, ">= 0"), ("repeats", repeats, ">= 0"), ("epochs", epochs, "> 0")):
        for name, value in (given or {}).items():
            known = f"make_mixture: `{argument}` names source {name!r}, want one of {', '.join(sources)}"
            check(name in sources, known)
            fits = math.isfinite(value) and (value >= 0 if least == ">= 0" else value > 0)
            check(fits, f"make_mixture: `{argument}` of source {name!r} is {value}, want a number {least}")
    missing = [name for name in sources if weights is not None and name not in weights]
    check(not missing, f"make_mixture: `weights` has none for source {missing[:1]}, want one for each; 0 leaves it out")
    if weights is not None:
        shares = [float(weights[name]) for name in sources]
    else:
        shares = [source.tokens * float((repeats or {}).get(name, 1)) for name, source in sources.items()]
    total = math.fsum(shares)
    check(total > 0, "make_mixture: the weights of all sources sum to 0, want one above 0")
    return Mixture(
        names=tuple(sources),
        tokens=tuple(source.tokens for source in sources.values()),
        weights=tuple(share / total for share in shares),
        epochs=tuple((epochs or {}).get(name) for name in sources),
        seed=seed,
        group_tokens=group_tokens,
    )


def input_init(mixture: Mixture) -> InputState:
    """Returns the state of a run over `mixture` that has drawn nothing."""
    zeros = (0,) * len(mixture.names)
    return InputState(0, 0, zeros, zeros, 0)


def input_state(fields: Mapping[str, Any], mixture: Mixture | None = None) -> InputState:
    """Makes a state from what `json.loads(json.dumps(state._asdict()))` gives.

    Args:
      fields: of the state.
      mixture: which the state must fit; `None`: any.

    Returns:
      The state.

    Raises:
      ValueError: a field is missing, unknown or of another type, or another number of sources.
    """
    wanted = "numbers of 0 or more" if mixture is None else f"of {len(mixture.names)} sources"
    wrong = f"input_state: `fields` is {fields!r:.200}, want those of an InputState, {wanted}"
    check(isinstance(fields, Mapping) and set(fields) == set(InputState._fields), wrong)
    lists = [fields[name] for name in ("taken", "used")]
    check(all(isinstance(value, (list, tuple)) for value in lists) and len(lists[0]) == len(lists[1]), wrong)
    check(mixture is None or len(lists[0]) == len(mixture.names), wrong)
    numbers = [*itertools.chain(*lists), fields["steps"], fields["seq_len"], fields["left_out"]]
    check(all(type(number) is int and number >= 0 for number in numbers), wrong)
    check(fields["seq_len"] > 0 or not any(lists[1]), wrong)
    return InputState(**{**fields, "taken": tuple(lists[0]), "used": tuple(lists[1])})


def next_rows(mixture: Mixture, state: InputState, batch_size: int, seq_len: int) -> tuple[RowPlan, InputState]:
    """Plans the next step; reads no token.

    Args:
      mixture: the mixture.
      state: where the input stands.
      batch_size: B, rows of the step; with gradient accumulation those of all its parts, of all hosts.
      seq_len: T. When it changes, the rest of a group that was begun is left out and counted in `InputState.left_out`.

    Returns:
      (the rows of the step, the state after it).

    Raises:
      ValueError: a source would give more than its `epochs`; a size below 1; a state of another mixture.
    """
    parts, after = _advance("next_rows", mixture, state, batch_size, seq_len)
    plan = RowPlan(seq_len, np.empty(batch_size, np.int64), np.empty(batch_size, np.int64))
    slots = permute(batch_size, mix_keys(mixture.seed, "slots", state.steps))
    for source, part in enumerate(parts):
        count = sum(stop - first for *_, first, stop in part)
        mine, slots = np.sort(slots[:count]), slots[count:]  # in order, so that of two epochs' rows the earlier come first
        plan.source[mine] = source
        for group in part:
            positions = _positions(mixture, source, group, seq_len)
            plan.position[mine[: len(positions)]], mine = positions, mine[len(positions) :]
    return plan, after


def check_mixture(mixture: Mixture, shape: Shape, total_tokens: int) -> MixtureUse:
    """Goes through the steps of a whole run without reading a token, to say before it what it will draw.

    Args:
      mixture: the mixture.
      shape: tokens so far → (batch_size, seq_len) of the next step.
      total_tokens: the run ends with the step that takes it to so many.

    Returns:
      What the run draws, by source.

    Raises:
      ValueError: a source runs dry before the end; as `next_rows`.
    """
    state, tokens, drawn = input_init(mixture), 0, [0] * len(mixture.names)
    while tokens < total_tokens:
        batch_size, seq_len = shape(tokens)
        try:
            parts, state = _advance("check_mixture", mixture, state, batch_size, seq_len)
        except ValueError as error:
            raise ValueError(f"{error}; this is after {tokens:,} of {total_tokens:,} tokens") from None
        tokens += batch_size * seq_len
        drawn = [d + seq_len * sum(b - a for *_, a, b in part) for d, part in zip(drawn, parts)]
    epochs = {name: d / size for name, d, size in zip(mixture.names, drawn, mixture.tokens)}
    return MixtureUse(state.steps, state.left_out, dict(zip(mixture.names, drawn)), epochs)


def source_rows(mixture: Mixture, step: int, batch_size: int) -> list[int]:
    """Rows that each source gives to a step.

    Args:
      mixture: the mixture.
      step: from 0.
      batch_size: B.

    Returns:
      By source; they sum to B.
    """
    u = spread(mix_keys(mixture.seed, "sources"), step)
    sums = list(itertools.accumulate(mixture.weights))
    edges = [0, *(batch_size if s == sums[-1] else math.ceil(batch_size * (s / sums[-1]) - u) for s in sums)]
    return [b - a for a, b in itertools.pairwise(edges)]


Part = tuple[int, int, int, int, int]
"""Of a group: where it begins, its rows, 1 if the last is not shuffled, the first drawn row and the one after the last."""


def _advance(
    function: str, mixture: Mixture, state: InputState, batch_size: int, seq_len: int
) -> tuple[list[list[Part]], InputState]:
    """By source the parts of groups that a step draws, and the state after it."""
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        check(value >= 1, f"{function}: `{name}` is {value}, want at least 1")
    sizes = (len(state.taken), len(state.used))
    check(set(sizes) == {len(mixture.names)}, f"{function}: `state` has {sizes} sources, want {len(mixture.names)}")
    parts, taken, used, left_out = [], [], [], state.left_out
    for i, count in enumerate(source_rows(mixture, state.steps, batch_size)):
        begin, row, part = state.taken[i], state.used[i], []
        rows, _ = _group(mixture, i, begin, state.seq_len) if row else (1, 0)
        check(row < rows, f"{function}: `state` has drawn {row} rows from a group of {rows}: it is of another mixture")
        if row and seq_len != state.seq_len:
            left_out += (rows - row) * state.seq_len
            begin, row = begin + rows * state.seq_len, 0
        while count:
            rows, fixed = _group(mixture, i, begin, seq_len)
            stop = min(rows, row + count)
            part.append((begin, rows, fixed, row, stop))
            count -= stop - row
            begin, row = (begin + rows * seq_len, 0) if stop == rows else (begin, stop)
        _check_epochs(function, mixture, i, begin + row * seq_len, state.taken[i] + state.used[i] * (state.seq_len or 0))
        parts.append(part)
        taken.append(begin)
        used.append(row)
    return parts, InputState(state.steps + 1, seq_len, tuple(taken), tuple(used), left_out)


def _positions(mixture: Mixture, source: int, part: Part, seq_len: int) -> np.ndarray:
    """Where the drawn rows of a group begin in their source's stream."""
    begin, rows, fixed, first, stop = part
    order = _group_order(mixture.seed, mixture.names[source], begin, rows, fixed, seq_len)
    return begin + seq_len * order[first:stop]


@functools.lru_cache(maxsize=64)  # a group gives rows to many steps
def _group_order(seed: int, name: str, begin: int, rows: int, fixed: int, seq_len: int) -> np.ndarray:
    """A group's rows in the order in which they are drawn."""
    order = permute(rows - fixed, mix_keys(seed, name, "group", begin, seq_len))
    return np.append(order, rows - 1) if fixed else order


def _group(mixture: Mixture, source: int, begin: int, seq_len: int) -> tuple[int, int]:
    """Rows of the group that begins at a place of a source's stream, and 1 if its last reaches into the next epoch."""
    size = mixture.tokens[source]
    left = size - begin % size  # of the epoch
    rows = min(max(1, mixture.group_tokens // seq_len), -(-left // seq_len))
    return rows, int(rows * seq_len > left)


def _check_epochs(function: str, mixture: Mixture, source: int, end: int, before: int) -> None:
    """Raises `ValueError` when a source's stream is drawn from beyond its epochs."""
    most = mixture.epochs[source]
    if most is not None and end > int(most * mixture.tokens[source]):
        name, tokens = mixture.names[source], mixture.tokens[source]
        has = f"{tokens:,} tokens, may give {most:g} epochs of them, and {before:,} tokens are used up"
        raise ValueError(f"{function}: source {name!r} runs dry: it has {has}; want more data, more epochs or less weight")
