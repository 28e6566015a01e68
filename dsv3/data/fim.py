"""Fill in the middle: a part of the documents is written so that a model learns to fill a hole.

    bos <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle eos

The order is prefix, suffix, middle (PSM). It is decided for whole documents, before they are packed into rows. Whether a
document is taken, and where it is cut, are hashes of its text and a seed: nothing depends on other documents or their order.

References:
  DeepSeek-V3 (arXiv:2412.19437), section 4.1: the format, PSM, rate 0.1, at document level before packing.
  Bavarian et al. (arXiv:2207.14255), section 3: two cuts at places drawn evenly among a document's characters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.data.tokenizer import MARKERS, special_ids

FIM_RATE = 0.1
FIM_HOLE, FIM_BEGIN, FIM_END = MARKERS[2:5]


class FimIds(NamedTuple):
    """Ids of the three markers: 128801, 128800 and 128802 in DeepSeek's vocabulary."""

    begin: int
    hole: int
    end: int


class FimParts(NamedTuple):
    """A document in three parts, which joined are its text."""

    prefix: str
    middle: str
    suffix: str


def fim_split(text: str, seed: int = 0, rate: float = FIM_RATE) -> FimParts | None:
    """Cuts a document for filling in the middle, if it is one of those that are taken for it.

    With three hashes h of 64 bits of (seed, text): it is taken when h₀ < rate · 2⁶⁴, and the cuts are the two numbers
    ⌊(n + 1) h / 2⁶⁴⌋ in order, n the number of characters. A part may be empty.

    Args:
      text: the document.
      seed: another seed, other documents and cuts.
      rate: share of the documents that is taken, 0 to 1.

    Returns:
      The parts; `None`: the document stays as it is, as does one without text or one that spells out a marker, since its
      parts could not be told apart.

    Raises:
      ValueError: `rate` is no share.

    >>> fim_split("def f(x):", rate=0) is None
    True
    >>> "".join(fim_split("def f(x):", rate=1))
    'def f(x):'
    """
    check(0 <= rate <= 1, f"fim_split: `rate` is {rate}, want 0 to 1")
    salt = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=24, salt=salt, person=b"dsv3 fim").digest()
    chosen, *cuts = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if chosen >= rate * 2**64 or not text or any(marker in text for marker in (FIM_BEGIN, FIM_HOLE, FIM_END)):
        return None
    first, second = sorted((len(text) + 1) * cut >> 64 for cut in cuts)
    return FimParts(text[:first], text[first:second], text[second:])


def fim_ids(tokenizer: Tokenizer) -> FimIds:
    """Ids of the markers.

    Args:
      tokenizer: one with DeepSeek's markers.

    Returns:
      `FimIds(begin, hole, end)`.

    Raises:
      ValueError: the tokenizer does not have one of them.
    """
    ids = [tokenizer.token_to_id(marker) for marker in (FIM_BEGIN, FIM_HOLE, FIM_END)]
    if None in ids:
        missing = (FIM_BEGIN, FIM_HOLE, FIM_END)[ids.index(None)]
        raise ValueError(f"fim_ids: the tokenizer has no token {missing}, want DeepSeek's markers")
    return FimIds(*ids)


def encode_fim(
    tokenizer: Tokenizer, texts: Sequence[str], *, seed: int = 0, rate: float = FIM_RATE
) -> list[np.ndarray]:
    """Encodes documents, a share of them for filling in the middle, the others as `bos text eos`.

    Parts are encoded one by one, so that a cut is a border of tokens. A text that spells out a special token gets the bytes
    of the spelling, as with `encode_documents`.

    Args:
      tokenizer: the tokenizer, without truncation and padding.
      texts: the documents' texts; some hundreds at a time are fastest.
      seed: see `fim_split`.
      rate: share that is taken; 0: none, and then the markers need not be there.

    Returns:
      By document [n] int32.

    Raises:
      ValueError: a tokenizer that truncates, pads, or lacks bos, eos or a marker; `rate` is no share.
    """
    check(0 <= rate <= 1, f"encode_fim: `rate` is {rate}, want 0 to 1")
    bos, eos, _ = special_ids(tokenizer)
    check(not (tokenizer.truncation or tokenizer.padding), "encode_fim: the tokenizer truncates or pads, want neither")
    ids = fim_ids(tokenizer) if rate else None
    splits = [fim_split(text, seed, rate) if rate else None for text in texts]
    pieces = [part for text, split in zip(texts, splits) for part in ([text] if split is None else split)]
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        codes = iter([code.ids for code in tokenizer.encode_batch_fast(pieces, add_special_tokens=False)])
    finally:
        tokenizer.encode_special_tokens = before
    documents = []
    for split in splits:
        if split is None:
            document = [bos, *next(codes), eos]
        else:
            prefix, middle, suffix = next(codes), next(codes), next(codes)
            document = [bos, ids.begin, *prefix, ids.hole, *suffix, ids.end, *middle, eos]
        documents.append(np.array(document, np.int32))
    return documents
