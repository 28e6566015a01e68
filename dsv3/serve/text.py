"""Text from tokens as they come: whole characters only, and stop strings wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes one sequence token by token.

    A character whose bytes are spread over tokens appears when its last byte has come. Text that may be the beginning of a
    stop string is held back until that is decided; a stop string itself never appears. At any time what was taken, joined,
    is a prefix of the final `text`.

    Args:
      tokenizer: decodes ids; byte-level, so that text is the same whether it is decoded in one piece or several.
      stops: stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []  # since the last token that ended on a character's border
        self._seen = 0  # characters of theirs that are in `text`
        self._taken = 0
        self._searched = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Adds a token; returns whether the text has met a stop string."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids)
        # An incomplete character decodes to one replacement character, at the end.
        whole = not decoded.endswith(_REPLACEMENT)
        self._extend(decoded[self._seen :] if whole else decoded[self._seen : -1])
        if whole:
            self._ids, self._seen = [], 0
        else:
            self._seen = len(decoded) - 1
        return self.stopped

    def finish(self) -> bool:
        """Ends the text, with whatever bytes are left; returns whether it has met a stop string."""
        if self._ids:
            self._extend(self._tokenizer.decode(self._ids)[self._seen :])
            self._ids, self._seen = [], 0
        return self.stopped

    def take(self, *, last: bool = False) -> str:
        """Returns the text that is new since the last call and certain; with `last`, all that is new."""
        end = len(self.text) - (0 if last or self.stopped else self._open())
        new = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return new

    def _extend(self, new: str) -> None:
        if self.stopped:
            return
        self.text += new
        longest = max(map(len, self._stops), default=0)
        start = max(self._searched - longest + 1, 0)
        found = [at for at in (self.text.find(stop, start) for stop in self._stops) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        self._searched = len(self.text)

    def _open(self) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        sizes = [size for stop in self._stops for size in range(1, len(stop)) if self.text.endswith(stop[:size])]
        return max(sizes, default=0)
