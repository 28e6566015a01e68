"""Continues text with a model from a checkpoint directory.

The directory is one that dsv3.save_pretrained wrote or any DeepSeek-V3 checkpoint: config.json, safetensors and
tokenizer.json. `make demo` leaves one in runs/demo/export.

A prompt is --prompt (repeat it for a batch), all of --prompt_file, or standard input without its last line break. With
--chat each is what a user says, by the directory's chat template, and what is printed is the assistant's answer.
Text goes to standard output, figures and errors to standard error.

Examples:

  python examples/generate.py runs/demo/export --prompt 'def main(' --max_new_tokens 64 --stream
  python examples/generate.py runs/demo/export --prompt 'import os' --prompt 'class ' --temperature 0.8 --top_p 0.95
  python examples/generate.py runs/demo/export --prompt 'for i in' --speculative 1      # draft with the MTP module
  python examples/generate.py runs/demo/export --prompt 'for i in' --speculative 1 --compare    # and time it without
  python examples/generate.py runs/demo/export --prompt 'for i in' --stop '\\n\\n' --logprobs 3
  python examples/generate.py model --prompt 'for i in' --weights float8 --cache float8  # see compare_compressed.py
  python examples/generate.py runs/sft/export --chat --system 'Answer with a number.' --prompt '3 plus 4?'
  cat notes.txt | python examples/generate.py model --dtype bfloat16 --temperature 0.6 --top_k 40 --seed 7

Greedy text is the same with and without --speculative; sampled text has the same distribution. In bfloat16 two tokens that
are almost equally likely may change places between the two, as products of other sizes round otherwise.
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import dataclasses
import io
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags
from command import flag_parser
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data import chat_codec, check_tokenizer, encode_prompt, find_chat_template, load_tokenizer
from dsv3.policy import default_policy
from dsv3.pretrained import load_pretrained
from dsv3.serve import Completion, Engine, Request, check_requests
from dsv3.serve.engine import check_engine

FLAGS = flags.FLAGS
TURNS = 5  # of each side of --compare

flags.DEFINE_multi_string("prompt", None, "Text to continue; repeat the flag for several.")
flags.DEFINE_string("prompt_file", None, "File whose whole text is one more prompt.")
flags.DEFINE_bool("chat", False, "Take prompts for a user's messages, by the chat template, and print the answers.")
flags.DEFINE_string("system", None, "With --chat: a system message in front of each.")
flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate at most.")
flags.DEFINE_float("temperature", 0.0, "0 takes the best token each time; 1 samples from the model's distribution.")
flags.DEFINE_integer("top_k", 0, "Sample among so many best tokens only; 0: all.")
flags.DEFINE_float("top_p", 1.0, "Sample among the best tokens that together have this probability; 1: all.")
flags.DEFINE_integer("seed", 0, "Decides what is sampled: the same seed gives the same text.")
flags.DEFINE_multi_string("stop", [], "String that ends the text (\\n and \\t are understood); repeat for several.")
flags.DEFINE_integer("speculative", 0, "Tokens that the MTP modules draft in each step; 0: none.")
flags.DEFINE_bool("compare", False, "After --speculative, generate again with and without it, and tell the speed-up.")
flags.DEFINE_integer("logprobs", None, "List each token's log-probability, and those of so many best tokens.", 0)
flags.DEFINE_bool("stream", False, "Print text as it comes.")
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of parameters and products.")
flags.DEFINE_enum("weights", None, ["float8", "int8"], "Keep matrices in this in memory. Default: as --dtype.")
flags.DEFINE_enum("cache", None, ["float8"], "Keep the latent cache in this. Default: as --dtype.")
flags.DEFINE_integer("max_length", None, "Tokens of prompt and text together at most. Default: the model's.", 1)
flags.DEFINE_integer("max_batch", 8, "Prompts that run together at most.", 1)


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input."""
    try:
        directory, requests = read_flags(argv)
        engine, plain = load_engines(directory, requests)
        done = show(engine, requests)
        if plain is not None:
            compare(engine, plain, requests, done)
    except (ValueError, OSError) as error:
        print(f"generate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngenerate: interrupted", file=sys.stderr)
        return 130
    if FLAGS.logprobs is not None:
        for i, completion in enumerate(done):
            list_logprobs(engine, i, completion)
    return 0


def read_flags(argv: Sequence[str]) -> tuple[Path, list[Request]]:
    """Returns the checkpoint directory and what is asked of it."""
    check(len(argv) == 2, f"{len(argv) - 1} arguments, want one: the checkpoint directory (--help shows examples)")
    prompts = list(FLAGS.prompt or ())
    if FLAGS.prompt_file is not None:
        prompts.append(read_text(f"--prompt_file {FLAGS.prompt_file!r}", Path(FLAGS.prompt_file).read_bytes()))
    if not prompts:
        check(not sys.stdin.isatty(), "no prompt, want --prompt, --prompt_file or text on standard input")
        prompts.append(read_text("standard input", sys.stdin.buffer.read()).removesuffix("\n"))
        check(prompts[-1] != "", "standard input is empty, want text there, --prompt or --prompt_file")
    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in FLAGS.stop]
    settings = {name: FLAGS[name].value for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    settings |= {"stop": stops, "top_logprobs": FLAGS.logprobs or 0}
    check(FLAGS.system is None or FLAGS.chat, "--system is given, but no --chat")
    check(not FLAGS.compare or FLAGS.speculative, "--compare wants --speculative, which it compares with plain decoding")
    return Path(argv[1]), [Request(prompt, **settings) for prompt in prompts]


def read_text(where: str, data: bytes) -> str:
    """Decodes UTF-8; line breaks become those of Python."""
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start})") from None


def load_engines(directory: Path, requests: list[Request]) -> tuple[Engine, Engine | None]:
    """Loads the model, after everything that is small and may be wrong; the second engine is for --compare."""
    cfg = ModelConfig.from_hf(directory)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, cfg.vocab_size)
    if FLAGS.chat:
        requests[:] = chat_requests(directory, tokenizer, requests)
    max_length = FLAGS.max_length or cfg.max_length
    check_engine(cfg, speculative=FLAGS.speculative, max_length=max_length)
    check_requests(requests, cfg=cfg, tokenizer=tokenizer, max_length=max_length)
    start = time.monotonic()
    cfg, params, router = load_pretrained(directory, dtype=FLAGS.weights or FLAGS.dtype)
    policy = default_policy().replace(dtype=FLAGS.dtype, cache=FLAGS.cache)
    how = {"policy": policy, "tokenizer": tokenizer, "max_batch": FLAGS.max_batch, "max_length": max_length}
    engine = Engine(cfg, params, router, speculative=FLAGS.speculative, **how)
    note(f"loaded {directory} in {time.monotonic() - start:.1f} s")
    return engine, Engine(cfg, params, router, **how) if FLAGS.compare else None


def chat_requests(directory: Path, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Request]:
    """The requests with their prompts as a user's messages."""
    codec = chat_codec(tokenizer, find_chat_template(directory, tokenizer))
    system = [] if FLAGS.system is None else [{"role": "system", "content": FLAGS.system}]
    asked = ([*system, {"role": "user", "content": request.prompt}] for request in requests)
    return [dataclasses.replace(r, prompt=encode_prompt(codec, said)) for r, said in zip(requests, asked)]


def show(engine: Engine, requests: list[Request]) -> list[Completion]:
    """Generates and prints; with several prompts the texts come one after the other, in order."""
    done: dict[int, Completion] = {}
    texts = [""] * len(requests)
    meter = Meter()
    printer = print_in_order(requests)
    next(printer)
    for event in engine.stream(requests):
        meter.add(event.index, len(event.tokens), engine.traces())
        texts[event.index] += event.text
        if event.completion:
            done[event.index] = event.completion
        if FLAGS.stream or event.completion:
            printer.send((texts, done))
    completions = [done[i] for i in range(len(requests))]
    figures(completions, meter)
    return completions


class Meter:
    """Times events. The rate is that of the steps after the last one that had to be compiled first."""

    def __init__(self):
        self.start = self.since = self.last = time.monotonic()
        self.first: float | None = None
        self.tokens = 0
        self._traces = 0
        self._rows: set[int] = set()  # that had their event of the compiled step

    def add(self, row: int, tokens: int, traces: int) -> None:
        """Takes note of an event that has just come."""
        self.last = time.monotonic()
        self.first = self.first or self.last - self.start
        if traces != self._traces:
            self._traces, self.since, self.tokens, self._rows = traces, self.last, 0, {row}
        elif self.tokens or row in self._rows:
            self.tokens += tokens
        else:
            self._rows.add(row)

    @property
    def rate(self) -> float:
        """Tokens a second; 0 if every step had to be compiled."""
        return self.tokens / (self.last - self.since) if self.tokens else 0.0


def print_in_order(requests: list[Request]) -> Iterator[None]:
    """Prints as much of the first unfinished text as there is, then goes on to the next."""
    texts, done = yield
    for i, request in enumerate(requests):
        if len(requests) > 1:
            print(f"--- {i + 1} of {len(requests)}")
        print("" if FLAGS.chat else request.prompt, end="", flush=True)
        shown = 0
        while True:
            if FLAGS.stream or i in done:
                print(texts[i][shown:], end="", flush=True)
                shown = len(texts[i])
            if i in done:
                break
            texts, done = yield
        print(flush=True)
    yield


def figures(done: list[Completion], meter: Meter) -> None:
    """Tells what was generated, how fast, and how often drafts were right."""
    tokens, steps = sum(len(c.tokens) for c in done), sum(c.steps for c in done)
    reasons = ", ".join(sorted({c.finish_reason for c in done}))
    note(f"{tokens} tokens after prompts of {sum(c.prompt_tokens for c in done)}; ended by {reasons}")
    seconds = meter.last - meter.start
    warm = f"; once compiled {meter.rate:.1f} tokens/s" if meter.rate else ""
    note(f"first token after {meter.first:.2f} s with compiling, all after {seconds:.2f} s{warm}")
    drafted, accepted = sum(c.drafted for c in done), sum(c.accepted for c in done)
    if drafted:
        share = f"{accepted} of {drafted} accepted ({accepted / drafted:.0%})"
        note(f"drafts: {share}, {tokens / steps:.2f} tokens a step")


def compare(engine: Engine, plain: Engine, requests: list[Request], done: list[Completion]) -> None:
    """Times both engines in turns, compiled before, prompts included, and says how much drafting is worth."""
    first = plain.generate(requests)
    times: dict[Engine, list[float]] = {engine: [], plain: []}
    for _ in range(TURNS):
        for each, taken in times.items():
            start = time.monotonic()
            each.generate(requests)
            taken.append(time.monotonic() - start)
    drafting, plainly = (
        sum(len(c.tokens) for c in completions) / statistics.median(times[each])
        for each, completions in ((engine, done), (plain, first))
    )
    note(
        f"speed-up {drafting / plainly:.2f}: {drafting:.1f} tokens/s with drafts, {plainly:.1f} without "
        f"(compiled, prompts included, medians of {TURNS} turns each)"
    )
    if all(request.temperature == 0 for request in requests):
        same = sum(a.tokens == b.tokens for a, b in zip(done, first))
        note(f"{same} of {len(done)} greedy texts are the same with and without drafts")


def list_logprobs(engine: Engine, index: int, completion: Completion) -> None:
    """Prints one line for each token: its text, its log-probability, and the best tokens'."""
    print(f"--- log-probabilities of {index + 1}")
    for token, logprob, best in zip(completion.tokens, completion.logprobs, completion.top_logprobs):
        others = "".join(f"  {piece(engine, i)} {value:.3f}" for i, value in best)
        print(f"{logprob:9.3f}  {piece(engine, token):<16}{others}")


def piece(engine: Engine, token: int) -> str:
    return repr(engine.tokenizer.decode([token], skip_special_tokens=False))


def note(text: str) -> None:
    """Writes a line to standard error."""
    print(f"generate: {text}", file=sys.stderr, flush=True)


parse_flags = flag_parser("generate")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
