"""The data of `pretrain.py`: a prepared folder, or a corpus that is tokenised here; sources, mixture, held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from command import PIECE, cut_corpus
from tokenizers import Tokenizer

from dsv3.checks import check, check_token_ids
from dsv3.data import (
    Document,
    Mixture,
    ShardSource,
    TokenStream,
    check_tokenizer,
    chunk_documents,
    corpus_stats,
    embedded_corpus,
    encode_documents,
    load_tokenizer,
    make_mixture,
    manifest_digest,
    memory_source,
    open_shards,
    read_corpus,
    read_manifest,
    read_shard,
    split_documents,
    tokenizer_fingerprint,
    train_tokenizer,
)
from dsv3.data.mixture import GROUP_TOKENS

FLAGS = flags.FLAGS
TOKENIZER_CHARS = 20_000_000  # text that a tokenizer is trained on, at most
CURVE_CHARS = 32768  # held-out text that the losses during the training are measured on; the report takes all
HELDOUT_TOKENS = 500_000  # of a prepared folder's held-out documents that are taken, at most


class Data(NamedTuple):
    """What is trained on, and what is not.

    Attributes:
      sources, mixture: of the training text. tokenizer: of all.
      heldout: tokens of the held-out documents; documents: the same as text.
      curve: of the first of each source, for the losses during the training.
      digest: names the data.
    """

    sources: Mapping[str, ShardSource]
    mixture: Mixture
    tokenizer: Tokenizer
    heldout: TokenStream
    documents: list[Document]
    curve: TokenStream
    digest: str


def check_data_flags(vocab_size: int) -> None:
    """Checks the flags of the data, before any of it is read."""
    if FLAGS.data is None:
        for name in ("mixture", "epochs"):
            check(not FLAGS[name].value, f"--{name} is given, but no --data with several sources")
        if given_tokenizer() is None:
            want = "want --vocab_size 266 or more"
            check(vocab_size >= 266, f"the vocabulary has {vocab_size} ids, too few for a trained tokenizer: {want}")
        return
    for name in ("corpus", "tokenizer"):
        check(FLAGS[name].value is None, f"--data and --{name} are both given; a prepared folder has its own {name}")
    check(not FLAGS["heldout"].present, "--data and --heldout are both given; a prepared folder has its own held-out part")
    manifest = read_manifest(FLAGS.data)
    if FLAGS.init is not None and (Path(FLAGS.init) / "tokenizer.json").exists():
        same = tokenizer_fingerprint(load_tokenizer(FLAGS.init)) == manifest.tokenizer
        check(same, f"--data {FLAGS.data!r} was made with another tokenizer than --init {FLAGS.init!r} has")
    check(manifest.vocab_size <= vocab_size, f"--data has {manifest.vocab_size} ids, the model's vocabulary {vocab_size}")
    check(bool(manifest.splits.get("heldout")), f"--data {FLAGS.data!r} holds nothing out, want a part to measure on")
    for flag in ("mixture", "epochs"):
        for name in numbers_by_name(flag):
            known = ", ".join(manifest.splits["train"])
            check(name in manifest.splits["train"], f"--{flag} names source {name!r}, --data has {known}")


def numbers_by_name(flag: str) -> dict[str, float]:
    """Reads a flag such as `code:2,prose:1`."""
    found: dict[str, float] = {}
    for part in FLAGS[flag].value or ():
        name, _, number = part.rpartition(":")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise ValueError(f"--{flag} has {part!r}, want source:number") from None
        check(bool(name), f"--{flag} has {part!r}, want source:number")
    return found


def read_prepared(vocab_size: int) -> Data:
    """Opens the prepared folder of --data."""
    root = Path(FLAGS.data)
    manifest, tokenizer = read_manifest(root), load_tokenizer(root / "tokenizer")
    check_tokenizer(tokenizer, vocab_size)
    name = tokenizer_fingerprint(tokenizer)
    sources = open_shards(root, tokenizer=name)
    shares = dict(manifest.settings.get("mixture") or {})
    if FLAGS.mixture:
        shares |= {"weights": numbers_by_name("mixture"), "repeats": None}
    if FLAGS.epochs:
        shares["epochs"] = numbers_by_name("epochs")
    group = group_tokens([sources[name].tokens for name in shares.get("epochs") or () if name in sources])
    mixture = make_mixture(sources, **shares, seed=FLAGS.seed, group_tokens=group)
    heldout = join_sources(open_shards(root, "heldout", tokenizer=name), HELDOUT_TOKENS)
    bounds = zip(heldout.starts[:-1], heldout.starts[1:])
    documents = [Document(str(i), tokenizer.decode(heldout.tokens[a:b].tolist())) for i, (a, b) in enumerate(bounds)]
    few = join_sources(open_shards(root, "heldout", tokenizer=name), CURVE_CHARS // 4)
    return Data(sources, mixture, tokenizer, heldout, documents, few, manifest_digest(manifest))


def join_sources(sources: Mapping[str, ShardSource], most: int) -> TokenStream:
    """The first documents of each source, in one stream of about `most` tokens."""
    tokens, sizes, text_bytes = [], [], []
    for source in sources.values():
        room = most // len(sources)
        for index in range(len(source.entries)):
            shard = read_shard(source, index)
            count = max(1, int(np.searchsorted(shard.starts, room, side="right")) - 1)
            stop = int(shard.starts[count])
            tokens.append(np.asarray(shard.tokens[:stop], np.int32))
            sizes.append(np.diff(shard.starts[: count + 1]))
            text_bytes.append(np.asarray(shard.text_bytes[:count]))
            room -= stop
            if room <= 0 or count < len(shard.text_bytes):
                break
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return TokenStream(np.concatenate(tokens), starts, np.concatenate(text_bytes))


def read_text() -> tuple[list[Document], list[Document], str]:
    """Training documents, held-out documents, and a digest of all; see `cut_corpus`."""
    documents = cut_corpus(embedded_corpus() if FLAGS.corpus is None else read_corpus(FLAGS.corpus))
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        text = document.text.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    train, heldout = split_documents(documents, FLAGS.heldout, FLAGS.seed)
    size = corpus_stats(train).bytes
    check(bool(heldout), f"the corpus has {size} bytes, too short to hold out a part and train on another")
    train, heldout = (list(chunk_documents(side, PIECE)) for side in (train, heldout))
    return train, heldout, digest.hexdigest()


def encode_text(
    train: Sequence[Document], heldout: list[Document], tokenizer: Tokenizer, vocab_size: int, digest: str
) -> Data:
    """Tokenises a corpus that was read: one source, in memory."""
    streams = [encode_documents(tokenizer, documents) for documents in (train, heldout, up_to(heldout, CURVE_CHARS))]
    for stream in streams:
        check_token_ids("corpus", "tokens", stream.tokens, vocab_size)
    name = "embedded" if FLAGS.corpus is None else "corpus"
    sources = {name: memory_source(name, streams[0], vocab_size=vocab_size)}
    mixture = make_mixture(sources, seed=FLAGS.seed)
    return Data(sources, mixture, tokenizer, streams[1], heldout, streams[2], digest)


def group_tokens(limited: Sequence[int]) -> int:
    """Within how many tokens of a source rows are shuffled; `limited`: tokens of those sources that may give so many epochs.

    The rest of a group is skipped when the length of sequences changes. Where that counts, a group has at most an eighth of
    the smallest source whose epochs are limited.
    """
    if FLAGS.plan == "cosine" or not limited:
        return GROUP_TOKENS
    return max(1, min(GROUP_TOKENS, min(limited) // 8))


def corpus_tokenizer(folder: Path, train: Sequence[Document], vocab_size: int, *, kept: bool) -> tuple[Tokenizer, str]:
    """The tokenizer of --tokenizer, the one in `folder` if it is `kept`, or a new one; and where it comes from."""
    given = given_tokenizer()
    if given is not None:
        return load_tokenizer(given), f"the tokenizer of {given}"
    if folder.exists() and kept:
        tokenizer = load_tokenizer(folder)
        check_tokenizer(tokenizer, vocab_size)
        return tokenizer, "the run's tokenizer"
    texts = (document.text for document in up_to(train, TOKENIZER_CHARS))
    return train_tokenizer(texts, vocab_size), f"a tokenizer of {vocab_size:,} ids, trained on the corpus"


def given_tokenizer() -> str | None:
    """The folder of the tokenizer for text that is tokenised here: of --tokenizer or --init; `None`: one is trained."""
    return FLAGS.tokenizer or FLAGS.init


def up_to(documents: Sequence[Document], characters: int) -> Iterator[Document]:
    """The first documents, until they have so many characters."""
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document.text)
        yield document
