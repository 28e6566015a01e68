"""The small model that these tests train, the engines that sample from it, and how to compare with them."""

from __future__ import annotations

import functools
import pathlib

import numpy as np

import dsv3
from dsv3.data import save_tokenizer, special_ids, train_tokenizer
from dsv3.pretrained import save_pretrained
from dsv3.serve import Engine
from tests import small
from tests.compare import PLAIN

FREE = {"stop_tokens": ()}
BFLOAT16 = PLAIN.replace(dtype="bfloat16")


@functools.cache
def model(modules: int = 1, **fields):
    """Returns (cfg, params, router): a dense layer and two mixtures of six experts, so that choices can differ."""
    cfg = small.model_config(vocab_size=16, num_nextn_predict_layers=modules, max_position_embeddings=64, **fields)
    return cfg, small.random_params(dsv3.model_specs(cfg), std=0.25), small.random_router(cfg)


@functools.cache
def engine(modules: int = 1, **options) -> Engine:
    """Returns a recording engine of that model; tests share it, as each shape is traced once."""
    options = {"policy": PLAIN, "chunk_sizes": (8,), "smallest_cache": 64, "max_batch": 4, "record": True} | options
    return Engine(*model(modules), **options)


def save_sums_model(folder: pathlib.Path, template: str, *, modules: int, length: int):
    """Writes a model of one mixture, with a chat template and a tokenizer that knows sums."""
    tokenizer = train_tokenizer([f"{a}+{b}={a + b}\n" for a in range(10) for b in range(10)], 270)
    ids = special_ids(tokenizer)
    cfg = small.model_config(vocab_size=270, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=modules,
                             max_position_embeddings=length)  # fmt: skip
    cfg = cfg.replace(bos_id=ids.bos, eos_ids=(ids.eos,), pad_id=ids.pad)
    save_pretrained(folder, cfg, small.random_params(dsv3.model_specs(cfg), std=0.1), dsv3.router_init(cfg))
    save_tokenizer(tokenizer, folder)
    (folder / "chat_template.jinja").write_text(template)


def prompts(*lengths: int, vocab: int = 16) -> list[list[int]]:
    return [np.random.default_rng([n, i]).integers(2, vocab, n).tolist() for i, n in enumerate(lengths)]


def together(pairs) -> np.ndarray:
    """Prompts and completions as rows of tokens, padded on the right with a token that means something."""
    rows = [[*prompt, *done.tokens] for prompt, done in pairs]
    longest = max(map(len, rows))
    return np.array([row + [5] * (longest - len(row)) for row in rows], np.int32)
