"""What general-purpose compressors need for a text: the yardstick for a language model's bits per byte."""

from __future__ import annotations

import gzip


def compression_bits_per_byte(text_bytes: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9e` on the same bytes, each starting from nothing.

    8 * len(compressed) / len(text_bytes)

    Args:
      text_bytes: the text, for instance all held-out documents joined, in UTF-8.

    Returns:
      `{"gzip": bits, "xz": bits}`, headers included; without "xz" where the interpreter was built
      without liblzma.

    Raises:
      ValueError: not bytes, or none.

    >>> sorted(compression_bits_per_byte(b"to be or not to be " * 50))[0]
    'gzip'
    """
    if not isinstance(text_bytes, (bytes, bytearray, memoryview)):
        got = type(text_bytes).__name__
        raise ValueError(f"compression_bits_per_byte: `text_bytes` is a {got}, want bytes")
    if not len(text_bytes):
        raise ValueError("compression_bits_per_byte: `text_bytes` is empty, want at least one byte")
    sizes = {"gzip": len(gzip.compress(text_bytes, compresslevel=9, mtime=0))}
    try:
        import lzma

        sizes["xz"] = len(lzma.compress(text_bytes, preset=9 | lzma.PRESET_EXTREME))
    except ImportError:
        pass
    return {name: 8.0 * size / len(text_bytes) for name, size in sizes.items()}
