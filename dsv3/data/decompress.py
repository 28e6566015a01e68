"""Opening files by their suffix: plain, or compressed with gzip, bzip2, xz or zstd, decompressed as they are read."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from dsv3.data.extra import load_extra

# Suffix → what such a file is called.
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_WINDOW = 1 << 31  # bytes that zstd may look back, as after `zstd --long=31`; a file has in memory what it was made with
_BLOCK = 1 << 13  # compressed bytes that are read at a time: what they hold is in memory at once


def plain_suffix(name: str) -> str:
    """Returns the suffix in small letters; of `a.jsonl.gz` that is `.jsonl`.

    >>> plain_suffix("A.JSONL.zst"), plain_suffix("notes.txt")
    ('.jsonl', '.txt')
    """
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_binary(file: str | os.PathLike, function: str = "open_binary") -> BinaryIO:
    """Opens a file for reading its bytes, decompressed where its suffix says so.

    Args:
      file: the file.
      function: who reads it, for messages.

    Returns:
      A stream. What was cut off or changed raises `EOFError` when it is read, with the format's own message.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the format's package is not installed.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in COMPRESSED:
        return open(file, "rb")
    make = _decompressor(suffix, function)
    return io.BufferedReader(_Decompressed(open(file, "rb"), make), 1 << 20)  # noqa: SIM115


def _decompressor(suffix: str, function: str):
    """Returns what makes a decompressor of one stream: `decompress(data)`, `eof`, `unused_data`."""
    if suffix == ".gz":
        zlib = load_extra(function, "zlib")
        return lambda: zlib.decompressobj(wbits=31)
    if suffix == ".bz2":
        return load_extra(function, "bz2").BZ2Decompressor
    if suffix == ".xz":
        return load_extra(function, "lzma").LZMADecompressor
    return load_extra(function, "zstandard").ZstdDecompressor(max_window_size=_WINDOW).decompressobj


class _Decompressed(io.RawIOBase):
    """The bytes of compressed streams, one behind the other in a file; zero bytes between them are padding."""

    def __init__(self, file: BinaryIO, make: Any):
        self._file, self._make, self._one, self._ready = file, make, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = b""
        while not self._ready:
            data = data or self._file.read(_BLOCK)
            if not data:
                if self._one is not None:
                    raise EOFError("the file ends within a compressed stream")
                return 0
            data = self._feed(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        if data:  # belongs to the next stream
            self._file.seek(-len(data), os.SEEK_CUR)
        return count

    def _feed(self, data: bytes) -> bytes:
        """Decompresses `data` up to the end of a stream, and returns what is behind it."""
        if self._one is None:
            data = data.lstrip(b"\0")
            if not data:
                return b""
            self._one = self._make()
        try:
            self._ready = memoryview(self._one.decompress(data))
        except MemoryError:  # says nothing of the file
            raise
        except Exception as error:  # OSError, ValueError and the modules' own
            raise EOFError(str(error)) from None
        if not self._one.eof:
            return b""
        rest, self._one = self._one.unused_data, None
        return rest

    def close(self) -> None:
        self._file.close()
        super().close()
