"""Small sources whose tokens say which token they are, and streams of them as plain lists."""

from __future__ import annotations

import numpy as np

from dsv3.data import TokenStream, memory_source
from dsv3.data.shuffle import mix_keys, permute


def source_of(name, sizes, window_tokens):
    """A source with documents of the given numbers of tokens; every token is its own place."""
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    stream = TokenStream(np.arange(starts[-1], dtype=np.int32), starts, np.array(sizes, np.int64))
    return memory_source(name, stream, vocab_size=int(starts[-1]), window_tokens=window_tokens)


def windows_of(sizes, window_tokens):
    """The documents of each window, as lists of tokens."""
    ends = np.cumsum([0, *sizes]).tolist()
    windows = [[]]
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        if sum(map(len, windows[-1])) >= window_tokens:
            windows.append([])
        windows[-1].append(list(range(begin, end)))
    return windows


def epoch_of(name, sizes, window_tokens, seed, epoch):
    """All tokens of an epoch in order, from the words of `stream.py`."""
    windows = windows_of(sizes, window_tokens)
    key, found = mix_keys(seed, name, "epochs"), []
    for window in permute(len(windows), mix_keys(key, epoch)).tolist():
        documents = windows[window]
        for document in permute(len(documents), mix_keys(key, epoch, window)).tolist():
            found += documents[document]
    return found


def stream_of(name, sizes, window_tokens, seed, epochs):
    """The stream from its place -1 on: the last token of the epoch before the first, then `epochs` epochs."""
    found = epoch_of(name, sizes, window_tokens, seed, -1)[-1:]
    for epoch in range(epochs):
        found += epoch_of(name, sizes, window_tokens, seed, epoch)
    return found
