"""From text to batches, in NumPy: corpora, a tokenizer, packed rows, and a compressor's bits per byte.

    train, held = split_documents(embedded_corpus())
    tokenizer = train_tokenizer((document.text for document in train), vocab_size=4096)
    packed = pack_sequences(encode_documents(tokenizer, train), length=256)
    batch = batch_at(packed, step=0, batch_size=8, seed=0)  # tokens [8, 257], weights [8, 256]

and of prepared folders, whose shards no memory holds:

    sources = open_shards("prepared")
    mixture = make_mixture(sources, weights={"code": 0.7, "prose": 0.3})
    batches = read_batches(sources, mixture, input_init(mixture), shape=lambda tokens: (64, 4096))
    for batch, state, tokens in prefetch_batches(batches):  # state: a few numbers, from which a run goes on exactly
        ...

Everything is deterministic: the same corpus, seed and step give the same batch.
"""

from __future__ import annotations

import importlib
from typing import Any

from dsv3.data.chat import (
    ChatCodec,
    EncodedChat,
    chat_codec,
    encode_chat,
    encode_next,
    encode_prompt,
    encode_turns,
    find_chat_template,
)
from dsv3.data.chat_template import ChatTemplate, load_chat_template, render_chat
from dsv3.data.clean import clean_text
from dsv3.data.compression import compression_bits_per_byte
from dsv3.data.corpus import (
    CorpusStats,
    Document,
    chunk_documents,
    corpus_stats,
    heldout_place,
    split_documents,
)
from dsv3.data.dedup import (
    Match,
    document_hash,
    exact_key,
    find_duplicates,
    lsh_bands,
    lsh_probability,
    minhash_signature,
)
from dsv3.data.embedded import embedded_corpus
from dsv3.data.filters import first_reason, make_filters, parse_filters
from dsv3.data.fim import FimIds, FimParts, encode_fim, fim_ids, fim_split
from dsv3.data.instructions import embedded_conversations
from dsv3.data.manifest import Manifest, manifest_digest, read_manifest, tokenizer_fingerprint, write_manifest
from dsv3.data.messages import Conversation, Message, check_messages, read_conversations, split_conversations
from dsv3.data.mixture import (
    InputState,
    Mixture,
    MixtureUse,
    RowPlan,
    check_mixture,
    input_init,
    input_state,
    make_mixture,
    next_rows,
)
from dsv3.data.packing import (
    Batch,
    BatchPlan,
    Packed,
    PackedDocuments,
    batch_at,
    batch_rows,
    heldout_batches,
    pack_documents,
    pack_sequences,
    take_rows,
)
from dsv3.data.settings import SourceSettings, check_sources, mixture_settings, read_sources
from dsv3.data.shard_writer import write_shard
from dsv3.data.shards import (
    Shard,
    ShardSource,
    Windows,
    memory_source,
    open_shards,
    read_shard,
    read_window,
    verify_source,
)
from dsv3.data.sources import Part, Piece, list_parts, read_corpus, read_part
from dsv3.data.stream import host_rows, read_rows
from dsv3.data.tokenizer import (
    SpecialIds,
    TokenStream,
    check_tokenizer,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)

__all__ = [
    "Batch",
    "BatchPlan",
    "ChatCodec",
    "ChatTemplate",
    "Conversation",
    "CorpusStats",
    "Document",
    "EncodedChat",
    "FimIds",
    "FimParts",
    "InputBatch",
    "InputState",
    "Manifest",
    "Match",
    "Message",
    "Mixture",
    "MixtureUse",
    "Packed",
    "PackedDocuments",
    "Part",
    "Piece",
    "RowPlan",
    "Shard",
    "ShardSource",
    "SourceSettings",
    "SpecialIds",
    "TokenStream",
    "Windows",
    "batch_at",
    "batch_rows",
    "chat_codec",
    "check_messages",
    "check_mixture",
    "check_sources",
    "check_tokenizer",
    "chunk_documents",
    "clean_text",
    "compression_bits_per_byte",
    "corpus_stats",
    "document_hash",
    "embedded_conversations",
    "embedded_corpus",
    "encode_chat",
    "encode_documents",
    "encode_fim",
    "encode_next",
    "encode_prompt",
    "encode_turns",
    "exact_key",
    "fim_ids",
    "fim_split",
    "find_chat_template",
    "find_duplicates",
    "first_reason",
    "heldout_batches",
    "heldout_place",
    "host_rows",
    "input_init",
    "input_state",
    "list_parts",
    "load_chat_template",
    "load_tokenizer",
    "lsh_bands",
    "lsh_probability",
    "make_filters",
    "make_mixture",
    "manifest_digest",
    "memory_source",
    "minhash_signature",
    "mixture_settings",
    "next_rows",
    "open_shards",
    "pack_documents",
    "pack_sequences",
    "parse_filters",
    "prefetch_batches",
    "read_batches",
    "read_conversations",
    "read_corpus",
    "read_manifest",
    "read_part",
    "read_rows",
    "read_shard",
    "read_sources",
    "read_window",
    "render_chat",
    "save_tokenizer",
    "special_ids",
    "split_conversations",
    "split_documents",
    "take_rows",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "verify_source",
    "write_manifest",
    "write_shard",
]

_PREFETCH = frozenset(("InputBatch", "prefetch_batches", "read_batches"))


def __getattr__(name: str) -> Any:
    """Loads `prefetch.py`, which needs TensorFlow, when it is asked for: processes that prepare data do without."""
    if name in _PREFETCH:
        return getattr(importlib.import_module("dsv3.data.prefetch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
