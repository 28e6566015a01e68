"""Passkey retrieval: a number, or some words, are told somewhere in a text and asked for at its end.

    bos filler... | The pass key is 81753. Remember it. | ...filler | What is the pass key? The pass key is | 81753.

`passkey_problem` makes one, to measure how far back a model finds something; `passkey_rows` writes them, and passages that
come again, into a share of the rows that a model is trained on, with the rows' own text as filler. A large model learns to
retrieve from text alone; a small one that sees little text needs to be shown what is asked of it.

Pieces are encoded apart, so that the key has the same tokens where it is told and where it is asked for, and a problem can
be cut to length by tokens. Digits are the usual keys. A small vocabulary has them one by one, ten tokens that follow each
other in all texts; words are then a clearer test of finding something again.

References:
  Mohtashami, Jaggi, Landmark Attention (arXiv:2305.16300), section 4.2: the passkey task.
  DeepSeek-V3 (arXiv:2412.19437), section 4.3, figure 8: retrieval by length and depth after the context is extended.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dsv3.checks import check, check_choice
from dsv3.data.packing import Batch
from dsv3.data.tokenizer import special_ids

KEYS = ("digits", "words")
DIGITS, WORDS = 5, 4
_PASSAGE = 8  # tokens of a passage that comes again, at least
_TOLD, _REMEMBER, _ASKED, _END = "\nThe pass key is", ". Remember it.\n", "\nWhat is the pass key? The pass key is", "."


class PasskeyForm(NamedTuple):
    """The fixed parts of a problem as token ids, and how numbers are encoded.

    Attributes:
      told, remember: around the number where it is told. asked, end: around it at the end.
      bos, eos: of a document.
      words: [n] ids of single-token words that keys are made of; none: keys are numbers.
      tokenizer: for the numbers.
    """

    told: tuple[int, ...]
    remember: tuple[int, ...]
    asked: tuple[int, ...]
    end: tuple[int, ...]
    bos: int
    eos: int
    words: tuple[int, ...]
    tokenizer: Tokenizer

    @property
    def count(self) -> int:
        """How many keys there are."""
        return len(self.words) ** WORDS if self.words else 10**DIGITS

    def key(self, number: int) -> tuple[int, ...]:
        """Tokens of a key by its number: `DIGITS` digits with a space before them, or `WORDS` words."""
        if self.words:
            return tuple(self.words[number // len(self.words) ** i % len(self.words)] for i in range(WORDS))
        return tuple(self.tokenizer.encode(f" {number:0{DIGITS}d}", add_special_tokens=False).ids)

    @property
    def least(self) -> int:
        """Tokens of the longest problem without filler: bos and eos included."""
        return sum(map(len, self[:4])) + 2 * (2 * DIGITS) + 2


class PasskeyProblem(NamedTuple):
    """A prompt and what is to come.

    Attributes:
      prompt: [length] int32, ends with the question. answer: [n] int32, the key's tokens. number: which key it is.
    """

    prompt: np.ndarray
    answer: np.ndarray
    number: int


def passkey_form(tokenizer: Tokenizer, keys: str = "digits") -> PasskeyForm:
    """Encodes the fixed parts.

    Args:
      tokenizer: one that has bos and eos.
      keys: `"digits"`, or `"words"`: four of the words of a space and three small letters or more that are tokens.

    Returns:
      `PasskeyForm`.

    Raises:
      ValueError: other `keys`, or a vocabulary with less than 16 such words.
    """
    check_choice("passkey_form", "keys", keys, KEYS)
    ids = special_ids(tokenizer)
    words = ()
    if keys == "words":
        texts = ((i, tokenizer.decode([i])) for i in range(tokenizer.get_vocab_size()))
        words = tuple(i for i, text in texts if re.fullmatch(" [a-z]{3,}", text))
        check(len(words) >= 16, f"passkey_form: the vocabulary has {len(words)} words as tokens, want at least 16")
    parts = (tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in (_TOLD, _REMEMBER, _ASKED, _END))
    return PasskeyForm(*parts, ids.bos, ids.eos, words, tokenizer)


def passkey_problem(form: PasskeyForm, filler: np.ndarray, *, length: int, depth: float, number: int) -> PasskeyProblem:
    """Makes one problem.

    Args:
      form: of the tokenizer.
      filler: [N] token ids of text, at least `length`; its beginning is used.
      length: tokens of the prompt, bos and question included.
      depth: where the number is told, 0 at the beginning to 1 right before the question.
      number: of the key, below `form.count`.

    Returns:
      `PasskeyProblem`, its prompt of exactly `length` tokens.

    Raises:
      ValueError: a length without room for told and asked, too little filler, a depth outside 0 to 1.
    """
    check(0 <= depth <= 1, f"passkey_problem: `depth` is {depth}, want 0 to 1")
    check(0 <= number < form.count, f"passkey_problem: `number` is {number}, want 0 to {form.count - 1}")
    key = form.key(number)
    room = length - 1 - len(form.told) - len(key) - len(form.remember) - len(form.asked)
    check(room >= 0, f"passkey_problem: `length` is {length}, want at least {length - room} tokens")
    check(len(filler) >= room, f"passkey_problem: `filler` has {len(filler)} tokens, want at least {room}")
    before = round(depth * room)
    parts = ((form.bos,), filler[:before], form.told, key, form.remember, filler[before:room], form.asked)
    prompt = np.concatenate([np.asarray(part, np.int32) for part in parts])
    return PasskeyProblem(prompt, np.array(key, np.int32), number)


def passkey_rows(
    form: PasskeyForm, tokens: np.ndarray, *, share: float, seed: int = 0, key_weight: float = 1.0
) -> Batch:
    """Turns a share of rows into exercises in retrieval, with the rows' own tokens as filler.

    Such a row is cut at random into documents, from the shortest that a problem fits into to the whole row, evenly in the
    logarithm of the length. Half of them are passkey problems with the key at a random depth, half are a passage of 8 of
    the row's tokens or more (where it has so many different ones), all different and in an order drawn at random, that
    comes again until the document is full: all but its first time can be told from it and from nothing else, which teaches
    copying in fewer tokens. Which rows, cuts and keys follow from a hash of the row's tokens and the seed: nothing else is
    to be remembered, and a training that goes on sees the same rows.

    Args:
      form: of the tokenizer.
      tokens: [B, T+1] int32 rows of text.
      share: of the rows, 0 to 1.
      seed: another seed, other rows and numbers.
      key_weight: of a key's tokens behind its question, which are few: of a problem's tokens all others are its text.

    Returns:
      `Batch` of tokens `[B, T+1]` int32 and weights `[B, T]` float32, 1 but for the keys.

    Raises:
      ValueError: rows shorter than a problem, a share outside 0 to 1, a weight below 0 or not finite.
    """
    check(0 <= share <= 1, f"passkey_rows: `share` is {share}, want 0 to 1")
    check(0 <= key_weight < math.inf, f"passkey_rows: `key_weight` is {key_weight}, want a finite number from 0")
    width = tokens.shape[-1]
    check(not share or width > form.least, f"passkey_rows: rows have {width} tokens, want more than {form.least}")
    rows, weights = np.array(tokens, np.int32), np.ones(tokens.shape, np.float32)
    for row, weight in zip(rows.reshape(-1, width), weights.reshape(-1, width)):
        salt = (seed % 2**64).to_bytes(8, "little")
        digest = hashlib.blake2b(row.tobytes(), digest_size=16, salt=salt, person=b"dsv3 passkey").digest()
        draw = np.random.default_rng(int.from_bytes(digest, "little"))
        if draw.random() < share:
            row[:], keys = _exercises(form, row.copy(), draw)
            weight[keys] = key_weight
    return Batch(rows, weights[..., 1:])


def _exercises(form: PasskeyForm, filler: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """A row full of exercises, and where the keys are that it asks for."""
    width, row, keys, at = len(filler), [], [], 0
    ordinary = np.setdiff1d(filler, [form.bos, form.eos])
    while at < width:
        left = width - at
        length = left
        if left >= 2 * form.least:
            length = int(form.least * (left / form.least) ** draw.random())
            length = left if left - length < form.least else length
        if draw.random() < 0.5 and len(ordinary) >= _PASSAGE:
            passage = draw.permutation(ordinary)[: int(draw.integers(_PASSAGE, length // 2 + 1))]
            row += [np.array([form.bos], np.int32), np.resize(passage, length - 2), np.array([form.eos], np.int32)]
            at += length
            continue
        number, depth = int(draw.integers(form.count)), draw.random()
        key = form.key(number)
        prompt = length - len(key) - len(form.end) - 1
        problem = passkey_problem(form, filler[at : at + length], length=prompt, depth=depth, number=number)
        row += [problem.prompt, problem.answer, np.array([*form.end, form.eos], np.int32)]
        keys += range(at + prompt, at + prompt + len(key))
        at += length
    return np.concatenate(row), keys
