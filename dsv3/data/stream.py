"""Rows of a mixture: each source is an endless token stream of which any part can be read at once.

An epoch of a source is all its windows in a random order, and the documents of each window in a random order. Both orders
are hashes of seed, source and epoch, so the place of any token is found by a search in the windows' sums, and reading it
needs the one window that it is in. Rows of T + 1 tokens overlap by one and go on across the borders of documents, windows
and epochs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from dsv3.checks import check
from dsv3.data.mixture import Mixture, RowPlan
from dsv3.data.packing import Batch
from dsv3.data.shards import ShardSource, read_window
from dsv3.data.shuffle import mix_keys, permute

_FEW = 64  # documents of fewer tokens on average are gathered by index, others copied one by one
_EPOCHS = 3  # whose orders are kept


def read_rows(
    sources: Mapping[str, ShardSource], mixture: Mixture, plan: RowPlan, rows: slice | np.ndarray = slice(None)
) -> Batch:
    """Reads rows of a step, for instance those of one host.

    Windows that were read last are kept in the sources, as many as `mixture.group_tokens` needs.

    Args:
      sources: those that the mixture was made of.
      mixture: the mixture.
      plan: the step, from `next_rows`.
      rows: which of its rows.

    Returns:
      `Batch` of tokens [B, T + 1] int32 and weights [B, T] float32, all 1.

    Raises:
      ValueError: sources that are not the mixture's; a window that has changed since it was written.
      OSError: a file cannot be read.

    References:
      DeepSeek-V3 (arXiv:2412.19437), section 4.1: packing without a cross-document mask.
    """
    _check_sources(sources, mixture)
    chosen, first = plan.source[rows], plan.position[rows] - 1
    tokens = np.empty([len(chosen), plan.seq_len + 1], np.int32)
    for index in np.unique(chosen).tolist():
        here = np.flatnonzero(chosen == index)
        here = here[np.argsort(first[here], kind="stable")]
        name = mixture.names[index]
        room = max(mixture.group_tokens, plan.seq_len)
        _fill_rows(sources[name], mix_keys(mixture.seed, name, "epochs"), room, tokens, here, first[here])
    return Batch(tokens, np.ones([len(chosen), plan.seq_len], np.float32))


def host_rows(batch_size: int, host: int, hosts: int) -> slice:
    """Which rows of a step are one host's: an equal part of those that follow one another.

    Args:
      batch_size: rows of the step.
      host: which, from 0.
      hosts: how many there are.

    Returns:
      The slice.

    Raises:
      ValueError: `batch_size` is not a multiple of `hosts`, or there is no such host.

    >>> host_rows(8, 1, 4)
    slice(2, 4, None)
    """
    check(0 <= host < hosts, f"host_rows: `host` is {host}, want 0 to {hosts - 1}")
    check(batch_size % hosts == 0, f"host_rows: `batch_size` is {batch_size}, want a multiple of the {hosts} hosts")
    share = batch_size // hosts
    return slice(host * share, (host + 1) * share)


def _check_sources(sources: Mapping[str, ShardSource], mixture: Mixture) -> None:
    for name, tokens in zip(mixture.names, mixture.tokens):
        check(name in sources, f"read_rows: `sources` has no source {name!r}, want that of the mixture")
        got = sources[name].tokens
        check(got == tokens, f"read_rows: source {name!r} has {got:,} tokens, want the mixture's {tokens:,}: other data")


def _fill_rows(source: ShardSource, key: int, room: int, out: np.ndarray, rows: np.ndarray, first: np.ndarray) -> None:
    """Copies the tokens from `first` on, ascending places of the stream, into rows of `out`."""
    length = out.shape[1]
    room += 2 * int(source.windows.tokens.max())
    done = 0
    while done < len(rows):
        window, begin = _find(source, key, int(first[done]), room)
        last = first[done] + len(window) - begin - length  # place of the last row that is wholly in this window
        whole = int(first.searchsorted(last, side="right")) - done
        if whole > 0:
            views = np.lib.stride_tricks.sliding_window_view(window, length)
            out[rows[done : done + whole]] = views[first[done : done + whole] - first[done] + begin]
            done += whole
        else:
            out[rows[done]] = _join(source, key, room, int(first[done]), length)
            done += 1


def _join(source: ShardSource, key: int, room: int, first: int, length: int) -> np.ndarray:
    """`length` tokens from a place of the stream, of several windows."""
    parts, found = [], 0
    while found < length:
        window, begin = _find(source, key, first + found, room)
        parts.append(window[begin : begin + length - found])
        found += len(parts[-1])
    return np.concatenate(parts)


def _find(source: ShardSource, key: int, place: int, room: int) -> tuple[np.ndarray, int]:
    """The window that a place of the stream is in, and where in it."""
    epoch, offset = divmod(place, source.tokens)
    order, ends = _epoch_order(source, key, epoch)
    at = int(ends.searchsorted(offset, side="right"))
    window = _assemble(source, key, epoch, int(order[at]), room)
    return window, offset - (int(ends[at]) - len(window))


def _epoch_order(source: ShardSource, key: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows of an epoch in order, and where in the epoch each ends."""
    kept = source.recent.setdefault("epochs", OrderedDict())
    found = kept.get((key, epoch))
    if found is None:
        order = permute(len(source.windows.tokens), mix_keys(key, epoch))
        found = order, np.cumsum(source.windows.tokens[order])
        kept[key, epoch] = found
        while len(kept) > _EPOCHS:
            kept.popitem(last=False)
    return found


def _assemble(source: ShardSource, key: int, epoch: int, window: int, room: int) -> np.ndarray:
    """The tokens of a window with its documents in the order of an epoch, kept while there is room for it."""
    kept = source.recent.setdefault("windows", OrderedDict())
    name = (key, epoch, window)
    found = kept.get(name)
    if found is not None:
        kept.move_to_end(name)
        return found
    tokens, starts = read_window(source, window)
    found = kept[name] = shuffle_documents(tokens, starts, mix_keys(key, epoch, window))
    total = sum(map(len, kept.values()))
    while total > room and len(kept) > 1:
        total -= len(kept.popitem(last=False)[1])
    return found


def shuffle_documents(tokens: np.ndarray, starts: np.ndarray, key: int) -> np.ndarray:
    """Puts documents into the order that a key gives.

    Args:
      tokens: [N] integers, documents back to back.
      starts: [documents + 1] int64, from 0 to N.
      key: a hash, from `mix_keys`.

    Returns:
      [N], the same tokens.
    """
    sizes = np.diff(starts)
    order = permute(len(sizes), key)
    if len(tokens) >= _FEW * len(sizes):
        begins, stops = starts[order].tolist(), starts[order + 1].tolist()
        return np.concatenate([tokens[a:b] for a, b in zip(begins, stops)])
    shift = starts[order] - (np.cumsum(sizes[order]) - sizes[order])  # from a document's new place to its old one
    return tokens[np.arange(len(tokens)) + np.repeat(shift, sizes[order])]
