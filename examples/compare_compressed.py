"""Compares compressed weights and caches with bfloat16: bytes, accuracy and speed of one model on one text.

The variants: bfloat16; matrices in FP8 and in INT8; the latent cache in FP8; matrices and cache in FP8. The model is in a
directory that dsv3.save_pretrained wrote or any DeepSeek-V3 checkpoint: config.json, safetensors and tokenizer.json. `make
demo` leaves one in runs/demo/export.

The columns: MB of all parameters; bytes of the cache for a token; relative error of the logits, beside bfloat16 and beside
float32; bits per byte of the text; share of next tokens that are the same as with bfloat16, after the same text; tokens
until greedy texts part, on average and of so many; speed of decoding and of reading prompts, beside bfloat16, in turns.

The text is --text, a file or a folder as pretrain.py takes, or without it the documents that pretrain.py holds out of the
sources of the running Python. FP8 tensors of the checkpoint are used as they are.

Examples:

  python examples/compare_compressed.py runs/demo/export
  python examples/compare_compressed.py runs/demo/export --text notes.txt --score_tokens 20000 --json runs/compression.json
  python examples/compare_compressed.py model --variants bfloat16,float8 --windows 4 --turns 3
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags
from command import PIECE, aligned, flag_parser

import dsv3
from dsv3.checks import check
from dsv3.data import (
    Document,
    TokenStream,
    check_tokenizer,
    chunk_documents,
    embedded_corpus,
    encode_documents,
    load_tokenizer,
    read_corpus,
    split_documents,
)  # fmt: skip
from dsv3.eval import make_evaluator
from dsv3.eval.compression import (
    Variant,
    common_prefix,
    compare_logits,
    generate_greedy,
    measure_speed,
    tree_bytes,
    variant_cache_bytes,
)  # fmt: skip
from dsv3.policy import default_policy
from dsv3.serve import Engine

FLAGS = flags.FLAGS
# Name: dtype of `load_pretrained`, dtype of products, cache.
VARIANTS = {
    "bfloat16": ("bfloat16", "bfloat16", None),
    "float8": ("float8", "bfloat16", None),
    "int8": ("int8", "bfloat16", None),
    "cache8": ("bfloat16", "bfloat16", "float8"),
    "float8+cache8": ("float8", "bfloat16", "float8"),
}
FULL = ("float32", "float32", None)

flags.DEFINE_string("text", None, "File or folder to measure on. Default: what pretrain.py holds out.")
flags.DEFINE_list("variants", list(VARIANTS), f"What to compare with bfloat16, among {', '.join(VARIANTS)}.")
flags.DEFINE_integer("score_tokens", 20_000, "Tokens that bits per byte are of, at most.", 2)
flags.DEFINE_integer("length", 256, "Tokens of a window of text.", 2)
flags.DEFINE_integer("windows", 16, "Windows whose logits are compared.", 1)
flags.DEFINE_integer("prompts", 4, "Prompts, of half a window each.", 1)
flags.DEFINE_integer("new_tokens", 48, "Tokens to generate after each.", 2)
flags.DEFINE_integer("turns", 5, "Of each variant when speed is measured.", 1)
flags.DEFINE_string("json", None, "File for the numbers.")


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input."""
    try:
        tf.get_logger().setLevel("ERROR")  # it warns of functions that are traced alike for each variant
        directory, names = read_flags(argv)
        cfg = dsv3.ModelConfig.from_hf(directory)
        tokenizer = load_tokenizer(directory)
        check_tokenizer(tokenizer, cfg.vocab_size)
        check(FLAGS.length <= cfg.max_length, f"--length is {FLAGS.length}, want at most the model's {cfg.max_length}")
        rows = measure(directory, names, encode(tokenizer, read_text()))
        if FLAGS.json is not None:
            Path(FLAGS.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"compare_compressed: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(format_table(rows))
    return 0


def read_flags(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """Returns the checkpoint directory and the variants, bfloat16 first."""
    check(len(argv) == 2, f"{len(argv) - 1} arguments, want one: the checkpoint directory (--help shows examples)")
    for name in FLAGS.variants:
        check(name in VARIANTS, f"--variants has {name!r}, want names among {', '.join(VARIANTS)}")
    where = Path(FLAGS.json).parent if FLAGS.json is not None else Path()
    check(where.is_dir(), f"--json: there is no directory {where}")
    return Path(argv[1]), ["bfloat16", *(name for name in VARIANTS if name in FLAGS.variants and name != "bfloat16")]


def read_text() -> list[Document]:
    """The documents to measure on."""
    if FLAGS.text is not None:
        documents = list(chunk_documents(read_corpus(FLAGS.text), PIECE))
        check(bool(documents), f"--text {FLAGS.text} holds no text")
        return documents
    _, held = split_documents(list(embedded_corpus()))
    return list(chunk_documents(held, PIECE))


def encode(tokenizer: Any, documents: list[Document]) -> TokenStream:
    """The tokens of as many documents from the beginning as hold what is wanted."""
    want = max(FLAGS.score_tokens, FLAGS.windows * FLAGS.length)
    sizes = np.cumsum([len(document.text) for document in documents])
    stream = encode_documents(tokenizer, documents[: int(np.searchsorted(sizes, 8 * want)) + 1])  # few tokens are longer
    check(
        len(stream.tokens) >= FLAGS.length,
        f"the text has {len(stream.tokens)} tokens, want at least --length, which is {FLAGS.length}",
    )
    return stream


def shorten(stream: TokenStream, tokens: int) -> TokenStream:
    """The first documents that hold so many tokens."""
    count = min(int(np.searchsorted(stream.starts, tokens)), len(stream.text_bytes))
    return TokenStream(stream.tokens[: stream.starts[count]], stream.starts[: count + 1], stream.text_bytes[:count])


def measure(directory: Path, names: Sequence[str], stream: TokenStream) -> list[dict[str, Any]]:
    """One row of numbers for each variant, float32 behind them."""
    loaded: dict[str, tuple] = {}
    variants = []
    for name, (weights, products, cache) in [*((n, VARIANTS[n]) for n in names), ("float32", FULL)]:
        if weights not in loaded:
            loaded[weights] = dsv3.load_pretrained(directory, dtype=weights)
        policy = default_policy().replace(dtype=products, cache=cache)
        variants.append(Variant(name, loaded[weights][1], policy))
    cfg, _, router = loaded["bfloat16"]
    size = FLAGS.length
    count = min(FLAGS.windows, len(stream.tokens) // size)
    windows = np.reshape(stream.tokens[: count * size], [count, size])
    differences = compare_logits(variants, router, windows, cfg=cfg, references=[0, len(variants) - 1])
    prompts = [window[: max(size // 2, 2)].tolist() for window in windows[: FLAGS.prompts]]
    new = min(FLAGS.new_tokens, cfg.max_length - len(prompts[0]))
    how = {"max_batch": len(prompts)}
    engines = [Engine(cfg, v.params, router, policy=v.policy, **how) for v in variants]
    texts = [[done.tokens for done in generate_greedy(engine, prompts, new)] for engine in engines]
    speeds = measure_speed(engines, prompts, new_tokens=new, turns=FLAGS.turns)
    short = shorten(stream, FLAGS.score_tokens)
    rows = []
    for i, variant in enumerate(variants):
        evaluate = make_evaluator(cfg, length=size, overlap=size // 2, batch_size=4, policy=variant.policy)
        same = [common_prefix(*pair) for pair in zip(texts[i], texts[0])]
        rows.append({
            "variant": variant.name, "weight_bytes": tree_bytes(variant.params),
            "cache_bytes_per_token": variant_cache_bytes(variant, cfg),
            "error_bfloat16": differences[i][0].error, "error_float32": differences[i][1].error,
            "bits_per_byte": evaluate(variant.params, router, short).bits_per_byte,
            "greedy_agreement": differences[i][0].agreement, "free_running": sum(same) / len(same), "new_tokens": new,
            "decode_ratio": speeds[i].decode / speeds[0].decode, "prefill_ratio": speeds[i].prefill / speeds[0].prefill,
            "decode_tokens_per_second": speeds[i].decode, "prefill_tokens_per_second": speeds[i].prefill,
            "positions": windows.size, "scored_bytes": int(short.text_bytes.sum()),
        })  # fmt: skip
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table, columns aligned."""
    head = ["variant", "weights MB", "cache B/token", "error bf16", "error f32", "bits/byte", "same next", "same text",
            "decode", "prefill"]  # fmt: skip
    lines = [head]
    for row in rows:
        lines.append([
            row["variant"], f"{row['weight_bytes'] / 1e6:.2f}", str(row["cache_bytes_per_token"]),
            f"{row['error_bfloat16']:.2%}", f"{row['error_float32']:.2%}", f"{row['bits_per_byte']:.4f}",
            f"{row['greedy_agreement']:.2%}", f"{row['free_running']:.1f} of {row['new_tokens']}",
            f"{row['decode_ratio']:.2f}", f"{row['prefill_ratio']:.2f}",
        ])  # fmt: skip
    return aligned(lines)


parse_flags = flag_parser("compare_compressed")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
