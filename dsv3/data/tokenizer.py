"""Byte-level BPE with DeepSeek-V3's pre-tokenisation: train, save, load, check, encode.

A tokenizer is a `tokenizers.Tokenizer`; its `encode(text).ids` begins with the begin-of-sentence token and
`decode(ids)` leaves the special tokens out.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from dsv3.data.corpus import Document
from dsv3.data.default_template import DEFAULT_CHAT_TEMPLATE

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
# Markers with the last ids; ordinary (not special) tokens, so that decoded text keeps them.
MARKERS = (
    "<think>",
    "</think>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
CHAT_TOKENS = ("<｜User｜>", "<｜Assistant｜>")  # what dsv3's chat template needs
# Digits in threes; runs of Han and kana; then words, punctuation and spaces.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_SMALLEST = 3 + 256 + len(MARKERS)
_BATCH = 256  # documents encoded at a time


class TokenStream(NamedTuple):
    """The tokens of documents, back to back.

    Args:
      tokens: [N] int32; each document is `bos ... eos`.
      starts: [documents + 1] int64; document d is `tokens[starts[d]:starts[d + 1]]`.
      text_bytes: [documents] int64; UTF-8 bytes of each document, for bits per byte.
    """

    tokens: np.ndarray
    starts: np.ndarray
    text_bytes: np.ndarray


class SpecialIds(NamedTuple):
    """Ids of begin of sentence, end of sentence and padding: 0, 1, 2 in DeepSeek's vocabulary."""

    bos: int
    eos: int
    pad: int


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE on texts, pre-tokenised as DeepSeek-V3 does it.

    Ids: 0 to 2 are bos, eos and pad, then the 256 bytes, then the merges, and last the markers (`MARKERS`).
    The same texts in the same order give the same tokenizer.

    Args:
      texts: the texts; some megabytes are enough for a small vocabulary.
      vocab_size: number of ids, at least 266; a text too small for so many merges gives fewer.

    Returns:
      The tokenizer.

    Raises:
      ValueError: `vocab_size` too small, `texts` a single string, or no text at all.

    >>> tokenizer = train_tokenizer(["low lower lowest"] * 3, 300)
    >>> tokenizer.decode(tokenizer.encode("low 猫").ids)
    'low 猫'
    """
    if vocab_size < _SMALLEST:
        kinds = f"3 special tokens, 256 bytes and {len(MARKERS)} markers"
        want = f"want at least {_SMALLEST} for {kinds}"
        raise ValueError(f"train_tokenizer: `vocab_size` is {vocab_size}, {want}")
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"train_tokenizer: `texts` is a {type(texts).__name__}, want an iterable of strings")
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise ValueError("train_tokenizer: empty corpus: no text to train on")
    tokenizer = _untrained()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_with_first(first, texts), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=True) for token in MARKERS])
    tokenizer.post_processor = _bos_processor(tokenizer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike, *, chat_template: str | None = None) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` opens.

    A new folder appears with both files or not at all; in one that is there each file is replaced as one step.

    Args:
      tokenizer: a tokenizer with DeepSeek's special tokens.
      directory: the folder; made if it is not there.
      chat_template: a Jinja program for the config. Default: dsv3's, for a tokenizer that has its tokens.

    Raises:
      ValueError: the tokenizer lacks a special token.
      OSError: the folder cannot be written.
    """
    special_ids(tokenizer)
    folder = Path(directory)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": bool(tokenizer.encode("").ids),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    if chat_template is None and None not in map(tokenizer.token_to_id, CHAT_TOKENS):
        chat_template = DEFAULT_CHAT_TEMPLATE
    if chat_template is not None:
        config["chat_template"] = chat_template
    contents = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
    fresh = folder if folder.exists() else folder.with_name(f".{folder.name}.part")
    try:
        fresh.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            part = fresh / f".{name}.part"
            part.write_text(content, encoding="utf-8", newline="\n")
            os.replace(part, fresh / name)
        if fresh != folder:
            fresh.rename(folder)
    except OSError as error:
        raise OSError(f"save_tokenizer: cannot write to {str(folder)!r} ({error.strerror})") from None


def load_tokenizer(directory: str | os.PathLike, *, add_bos: bool | None = None) -> Tokenizer:
    """Opens the tokenizer of a folder: one of ours or any DeepSeek-V3 checkpoint's.

    Reads `tokenizer.json`, plain or as `tokenizer.json.gz`. Truncation and padding are off.

    Args:
      directory: the folder.
      add_bos: whether `encode` puts the begin-of-sentence token first. None: as `add_bos_token` of
        `tokenizer_config.json` says, which for DeepSeek's own is yes (transformers 4 follows it; 5 does what
        `tokenizer.json` alone says, so that False gives its ids).

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: no such folder, or no tokenizer in it.
      ValueError: a file in it cannot be understood.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_tokenizer: {str(folder)!r} is no folder, want a tokenizer folder")
    files = [file for file in (folder / "tokenizer.json", folder / "tokenizer.json.gz") if file.is_file()]
    if not files:
        raise FileNotFoundError(f"load_tokenizer: no tokenizer.json or tokenizer.json.gz in {str(folder)!r}")
    try:
        data = files[0].read_bytes()
        tokenizer = Tokenizer.from_buffer(gzip.decompress(data) if files[0].suffix == ".gz" else data)
    except Exception as error:  # the Rust side raises a bare Exception for anything that it cannot read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"load_tokenizer: {str(files[0])!r} is no tokenizer ({reason})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    adds = bool(tokenizer.encode("").ids)
    config_adds = _config_adds_bos(folder / "tokenizer_config.json")
    wanted = (adds or config_adds) if add_bos is None else add_bos
    if wanted != adds:
        plain = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = _bos_processor(tokenizer) if wanted else plain
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose ids a model with `vocab_size` embeddings does not have.

    Args:
      tokenizer: the tokenizer.
      vocab_size: the model's vocabulary; it may be larger than the tokenizer's.

    Raises:
      ValueError: the largest id is not below `vocab_size`, or bos, eos or pad is missing.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        want = f"want below the model's vocab_size {vocab_size}"
        raise ValueError(f"check_tokenizer: the tokenizer's largest id is {largest}, {want}")
    special_ids(tokenizer)


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Ids of bos, eos and pad.

    Args:
      tokenizer: a tokenizer with DeepSeek's special tokens.

    Returns:
      `SpecialIds(bos, eos, pad)`.

    Raises:
      ValueError: the tokenizer does not have one of them.
    """
    ids = [tokenizer.token_to_id(token) for token in (BOS, EOS, PAD)]
    if None in ids:
        missing = (BOS, EOS, PAD)[ids.index(None)]
        raise ValueError(f"special_ids: the tokenizer has no token {missing}, want DeepSeek's")
    return SpecialIds(*ids)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> TokenStream:
    """Encodes documents into one stream, `bos text eos bos text eos ...`.

    A text that spells out a special token gets the bytes of the spelling, never the token: a document cannot
    forge a border. (Markers are ordinary tokens, as in DeepSeek's tokenizer.) `tokenizer.decode` of one
    document's tokens gives its text back exactly.

    Args:
      tokenizer: the tokenizer, without truncation and padding.
      documents: the documents, taken in batches.

    Returns:
      `TokenStream(tokens, starts, text_bytes)`.

    Raises:
      ValueError: no documents, or a tokenizer that truncates, pads or lacks bos or eos.
    """
    bos, eos, _ = special_ids(tokenizer)
    if tokenizer.truncation or tokenizer.padding:
        raise ValueError("encode_documents: the tokenizer truncates or pads, want neither")
    pieces, sizes = [], []
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        for texts in _batches(document.text for document in documents):
            sizes += [len(text.encode()) for text in texts]
            codes = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            pieces += [np.array([bos, *code.ids, eos], np.int32) for code in codes]
    finally:
        tokenizer.encode_special_tokens = before
    if not pieces:
        raise ValueError("encode_documents: empty corpus: no documents to encode")
    starts = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    return TokenStream(np.concatenate(pieces), starts, np.array(sizes, np.int64))


def _untrained() -> Tokenizer:
    """BPE without a vocabulary, with the normaliser, pre-tokeniser and decoder of DeepSeek-V3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bos_processor(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    bos = tokenizer.token_to_id(BOS)
    if bos is None:
        raise ValueError(f"load_tokenizer: `add_bos_token` is set, but the tokenizer has no token {BOS}")
    template = {"single": f"{BOS} $A", "pair": f"{BOS} $A {BOS}:1 $B:1"}
    return processors.TemplateProcessing(**template, special_tokens=[(BOS, bos)])


def _config_adds_bos(file: Path) -> bool:
    """Whether a `tokenizer_config.json` asks for bos in front; no file, no bos."""
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"load_tokenizer: {str(file)!r} is not JSON ({error})") from None
    return isinstance(config, dict) and bool(config.get("add_bos_token", False))


def _with_first(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, _BATCH)):
        yield batch
