"""What `sft.py` does before it trains: checks the flags and the model, reads, encodes and packs the conversations.

`distill.py` and `distill_store.py` do the same, with checks of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from command import read_time
from pretrain_setup import RUN_FILE, agree, claim_folder, delete_run, say, write_run
from tokenizers import Tokenizer

import dsv3
from dsv3.checks import check
from dsv3.data import (
    ChatCodec,
    ChatTemplate,
    Conversation,
    EncodedChat,
    PackedDocuments,
    TokenStream,
    chat_codec,
    check_tokenizer,
    embedded_conversations,
    encode_turns,
    find_chat_template,
    load_chat_template,
    load_tokenizer,
    pack_documents,
    read_conversations,
    save_tokenizer,
    split_conversations,
    tokenizer_fingerprint,
)

FLAGS = flags.FLAGS
# Flags that decide the numbers of a run; the others may change from one part of it to the next.
DECIDING = (
    "heldout epochs batch_size accumulate max_length skip_long seed lr lr_end warmup_steps weight_decay clip mtp_weight "
    "balance_weight bias_rate dtype"
).split()
EDGE = 1 << 16  # bytes at both ends of a weights file that tell it from another one of the same size


class Setup(NamedTuple):
    """Everything that the training needs.

    Attributes:
      cfg: the model's configuration. out: the run's folder. settings: what must be the same to go on with the run.
      codec: the tokenizer with its chat template.
      rows, held: packed conversations, to train on and to score. questions: the conversations of `held`.
      steps: of the whole run.
    """

    cfg: dsv3.ModelConfig
    out: Path
    settings: dict[str, Any]
    codec: ChatCodec
    rows: PackedDocuments
    held: PackedDocuments
    questions: list[Conversation]
    steps: int

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, padding included."""
        return FLAGS.batch_size * FLAGS.max_length


class Rows(NamedTuple):
    """Conversations in rows: `train` and `held`, packed; the `samples` of both as they were encoded; `questions`, the
    conversations of `held`."""

    train: PackedDocuments
    held: PackedDocuments
    samples: tuple[list[EncodedChat], list[EncodedChat]]
    questions: list[Conversation]


class Program(NamedTuple):
    """What programs that learn from conversations do not have in common.

    Attributes:
      name: as of the program's file. deciding: flags that decide the numbers of a run. inputs: flags that name what is read.
      check: from the model's configuration and the codec to further settings of a run, after checks that are cheap.
      look: more checks of rows and settings, before anything is deleted or written.
    """

    name: str = "sft"
    deciding: Sequence[str] = DECIDING
    inputs: Sequence[str] = ("model", "data", "chat_template")
    check: Callable[[dsv3.ModelConfig, ChatCodec], dict[str, Any]] = lambda cfg, codec: {}
    look: Callable[[Rows, dict[str, Any]], None] = lambda rows, settings: None


SFT = Program()


def prepare(argv: Sequence[str], program: Program = SFT) -> Setup:
    """Checks everything that can be wrong, cheapest first, and prepares the data.

    Raises:
      ValueError, OSError: bad input; the message is one line.
    """
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    model = Path(FLAGS.model)
    made = FLAGS["model"].present or model.is_dir()
    check(made, f"no model in {FLAGS.model}: `make demo` makes one, or name a checkpoint's folder with --model")
    cfg = dsv3.ModelConfig.from_hf(model)
    check_flags(cfg)
    codec = read_codec(model, cfg)
    more = program.check(cfg, codec)
    conversations = embedded_conversations() if FLAGS.data is None else read_conversations(FLAGS.data)
    settings = {
        "program": program.name, **{name: FLAGS[name].value for name in program.deciding}, "model": model_digest(model),
        **rows_settings(codec, conversations), "config": cfg.to_hf(), **more,
    }  # fmt: skip
    out = Path(FLAGS.out)
    saved = claim_folder(out, settings, {name: FLAGS[name].value for name in program.inputs})
    settings.setdefault("time", datetime.now().isoformat() if saved is None else saved.get("time"))
    codec = timed(codec, settings["time"], RUN_FILE)
    rows = make_rows(codec, conversations)
    count = len(rows.train.tokens)
    want = "want more conversations, a smaller --batch_size or a smaller --max_length"
    check(count >= FLAGS.batch_size, f"--data makes {count} packed rows, fewer than --batch_size {FLAGS.batch_size}; {want}")
    steps = math.ceil(FLAGS.epochs * count / FLAGS.batch_size)
    check(
        FLAGS.warmup_steps < steps,
        f"--warmup_steps is {FLAGS.warmup_steps}, want fewer than the {steps} steps of {FLAGS.epochs:g} epochs",
    )
    settings["encoded"] = rows_digest(rows.train, rows.held)
    agree(saved, settings, out)
    program.look(rows, settings)
    if FLAGS.fresh:
        delete_run(out)
    if saved is None:
        write_run(out, settings)
    write_tokenizer(model, codec, out / "tokenizer")  # whole, whatever an interruption has left of it
    setup = Setup(cfg, out, settings, codec, rows.train, rows.held, rows.questions, steps)
    describe_rows(rows)
    describe_model(setup, f"{steps:,} steps of {FLAGS.batch_size} rows")
    return setup


def read_codec(model: Path, cfg: dsv3.ModelConfig) -> ChatCodec:
    """The tokenizer of a checkpoint with the chat template that is to be used."""
    tokenizer = load_tokenizer(model)
    check_tokenizer(tokenizer, cfg.vocab_size)
    codec = chat_codec(tokenizer, read_template(model, tokenizer))
    check_end(codec, cfg, model)
    return codec


def rows_settings(codec: ChatCodec, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """What decides the tokens of rows, beside flags."""
    return {
        "data": digest([[c.messages, c.tools] for c in conversations]), "template": digest(codec.template.source),
        "special_tokens": dict(codec.template.tokens), "tokenizer": tokenizer_fingerprint(codec.tokenizer),
    }  # fmt: skip


def timed(codec: ChatCodec, time: str | None, where: str) -> ChatCodec:
    """The codec whose template is told this moment."""
    return dataclasses.replace(codec, template=dataclasses.replace(codec.template, time=read_time(time, where)))


def make_rows(codec: ChatCodec, conversations: Sequence[Conversation]) -> Rows:
    """Splits, encodes and packs conversations."""
    parts = split_conversations(conversations, FLAGS.heldout, FLAGS.seed)
    samples, kept = zip(*(encode(codec, part) for part in parts))
    for side, found in zip(("--data", "the held-out part of --data"), samples):
        check(bool(found), f"no conversation of {side} is as short as --max_length {FLAGS.max_length}")
    return Rows(*map(pack, samples), samples, kept[1])


def check_flags(cfg: dsv3.ModelConfig) -> None:
    """Checks the flags' values against each other and the model; their signs are checked as they are parsed."""
    check_rates()
    check(math.isfinite(FLAGS.epochs), f"--epochs is {FLAGS.epochs}, want a number")
    check(FLAGS.epochs > 0, f"--epochs is {FLAGS.epochs}, want above 0")
    check(
        FLAGS.batch_size % FLAGS.accumulate == 0,
        f"--batch_size {FLAGS.batch_size} is not divisible by --accumulate {FLAGS.accumulate}",
    )
    check_rows_flags(cfg)


def check_rates() -> None:
    """Checks the flags of the optimiser and the loss, and those that say what becomes of a run that is there."""
    for name in ("lr", "lr_end", "weight_decay", "clip", "mtp_weight", "balance_weight", "bias_rate"):
        check(math.isfinite(FLAGS[name].value), f"--{name} is {FLAGS[name].value}, want a number")
    rates = f"--lr is {FLAGS.lr:g} and --lr_end {FLAGS.lr_end:g}"
    check(0 <= FLAGS.lr_end <= FLAGS.lr > 0, f"{rates}, want 0 <= lr_end <= lr and lr > 0")
    check(not FLAGS.fresh or FLAGS.resume, "--fresh and --noresume are both given, want one of them")
    check(0 < FLAGS.heldout < 1, f"--heldout is {FLAGS.heldout}, want a share above 0 and below 1")


def check_rows_flags(cfg: dsv3.ModelConfig) -> None:
    """Checks the flags that rows are made by."""
    check(0 < FLAGS.heldout < 1, f"--heldout is {FLAGS.heldout}, want a share above 0 and below 1")
    check(
        FLAGS.max_length <= cfg.max_length,
        f"--max_length is {FLAGS.max_length}, want at most the model's context, {cfg.max_length}",
    )


def check_end(codec: ChatCodec, cfg: dsv3.ModelConfig, model: Path) -> None:
    """Refuses a template that ends answers with a token at which nothing that serves the model would stop."""
    end = codec.controls[codec.template.eos]
    learned = f"{codec.template.where} ends answers with {codec.template.eos!r}, the token {end}"
    want = f"want it in `eos_token_id` of {str(model / 'config.json')!r}"
    check(end in cfg.eos_ids, f"{learned}, at which the model does not stop; {want}")


def read_template(model: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of --chat_template, of the model, or dsv3's."""
    if FLAGS.chat_template is None:
        found = find_chat_template(model, tokenizer)
        if load_chat_template(model) is None:
            say(f"{model} has no chat template: dsv3's is taken, which has DeepSeek's format")
        return found
    try:
        source = Path(FLAGS.chat_template).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat_template {FLAGS.chat_template!r} is not UTF-8 (byte {error.start})") from None
    tokens = (load_chat_template(model) or ChatTemplate()).tokens
    return ChatTemplate(source, tokens, f"--chat_template {FLAGS.chat_template!r}")


def encode(codec: ChatCodec, conversations: Sequence[Conversation]) -> tuple[list[EncodedChat], list[Conversation]]:
    """Encodes conversations; one that is too long is refused by name, or left out and counted. Returns those kept, too."""
    samples, kept = [], []
    for conversation in conversations:
        try:
            found = encode_turns(codec, conversation.messages, tools=conversation.tools)
        except ValueError as error:
            raise ValueError(f"{conversation.name}: {error}") from None
        longest = max(len(sample.ids) for sample in found)
        if longest > FLAGS.max_length + 1:
            want = f"--max_length is {FLAGS.max_length} (--skip_long leaves such rows out)"
            check(FLAGS.skip_long, f"{conversation.name}: the conversation has {longest - 1} tokens, {want}")
            continue
        samples += found
        kept.append(conversation)
    long = len(conversations) - len(kept)
    if long:
        say(f"left out {long:,} of {len(conversations):,} conversations, which are longer than {FLAGS.max_length} tokens")
    return samples, kept


def pack(samples: Sequence[EncodedChat]) -> PackedDocuments:
    """Packs sequences into rows of --max_length."""
    ids, loss = (np.concatenate(parts) for parts in zip(*samples))
    sizes = np.array([len(sample.ids) for sample in samples], np.int64)
    stream = TokenStream(ids, np.concatenate([[0], np.cumsum(sizes)]), np.zeros_like(sizes))
    return pack_documents(stream, FLAGS.max_length, learned=loss)


def write_tokenizer(model: Path, codec: ChatCodec, folder: Path) -> None:
    """The model's tokenizer, with the template that was used in its config."""
    save_tokenizer(codec.tokenizer, folder, chat_template=codec.template.source)
    given = model / "tokenizer_config.json"
    if given.is_file():  # what else it says stays
        config = json.loads(given.read_text(encoding="utf-8")) | {"chat_template": codec.template.source}
        part = folder / ".tokenizer_config.json.part"
        part.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        shutil.move(part, folder / "tokenizer_config.json")


def model_digest(model: Path) -> str:
    """Names the weights of a checkpoint by names, sizes and both ends of its files: reading all of it may take hours."""
    name = hashlib.blake2b(digest_size=16)
    for file in sorted(model.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            ends = stream.read(EDGE) + (stream.read() if size <= 2 * EDGE else _last(stream, size))
        name.update(f"{file.name} {size} ".encode() + ends)
    return name.hexdigest()


def rows_digest(*parts: PackedDocuments) -> str:
    """Names what the model is shown and what is learned of it, whatever has made it so."""
    name = hashlib.blake2b(digest_size=16)
    for array in (array for part in parts for array in (part.tokens, part.weights, part.segments)):
        name.update(f"{array.shape} {array.dtype} ".encode() + np.ascontiguousarray(array).tobytes())
    return name.hexdigest()


def _last(stream: Any, size: int) -> bytes:
    stream.seek(size - EDGE)
    return stream.read()


def digest(value: Any) -> str:
    """Names a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def describe_rows(made: Rows) -> None:
    """Says what there is to learn from."""
    for what, found, rows in zip(("training", "held out"), made.samples, (made.train, made.held)):
        tokens, learned = sum(len(s.ids) for s in found), int(rows.weights.sum())
        full = (rows.segments > 0).mean()
        packed = f"{len(rows.tokens):,} rows of {FLAGS.max_length}, {full:.0%} full"
        say(f"{what}: {len(found):,} sequences, {tokens:,} tokens of which {learned:,} are learned; {packed}")


def describe_model(setup: Any, steps: str) -> None:
    """Says what will be trained, and how long."""
    count = dsv3.count_params(dsv3.model_specs(setup.cfg))
    rate = f"learning rate {FLAGS.lr:g} to {FLAGS.lr_end:g}"
    say(f"model: {count:,} parameters of {FLAGS.model}, {setup.cfg.num_mtp_layers} MTP; {steps}, {rate}")
