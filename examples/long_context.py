"""Runs contexts of up to 128K tokens for real, and measures time, memory, and the latent cache beside plain attention's.

At each of --lengths, in processes of their own:

  engine   an Engine reads a prompt in chunks into its latent cache and draws --new_tokens greedy tokens; with the prompt
           they make up the length
  whole    one forward pass over the same tokens without a cache; its log-probabilities at the places of the new tokens
           must be those that the engine found
  caches   the latent cache, in float32, bfloat16 and FP8, and the keys and values that plain attention with the same heads
           would keep, are allocated, filled from the same hidden states, and attended over by one new token

At --wide_lengths the caches again, of one layer of attention with the published widths: 128 heads, latents of 512.

The model is narrow, but has all parts of the published one: latent attention, experts, a module for the token after the
next, and YaRN by 40 beyond 4,096 tokens, up to 163,840. Its parameters are random. --model takes one from a checkpoint
directory instead. Memory is the resident memory of the process at its highest, above what it was with the model loaded.

Attention over T tokens is T²/2 pairs for each head and layer, so the longest length takes most of the time. By default
about 10 minutes on two cores. What a part needs is estimated before anything starts, and compared with the free memory.

Examples:

  python examples/long_context.py
  python examples/long_context.py --lengths=4K,8K,16K --parts=engine,whole --dtype=bfloat16
  python examples/long_context.py --model=runs/demo/export --lengths=512,768,1024 --wide_lengths=
  python examples/long_context.py --write_docs        # and docs/long_context.md anew
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from absl import app, flags
from command import flag_parser
from long_context_docs import write_docs
from long_context_parts import PARTS, Job, job_bytes, job_config, job_of, job_text, run_job
from long_context_report import Results, is_equal, text_report

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.resident import available_bytes
from dsv3.train.progress import format_seconds

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import machine  # noqa: E402

FLAGS = flags.FLAGS
DOCS = ROOT / "docs"
GROWS = {"engine": 1.7, "whole": 1.7, "caches": 1.0, "wide": 1.0}  # with which power of the length a part's time grows
LENGTHS = ["16K", "32K", "64K", "128K"]

flags.DEFINE_list("lengths", LENGTHS, "Tokens of a context; K is 1,024. From three on, memory is compared with a line.")
flags.DEFINE_list("wide_lengths", ["16K", "32K"], "Lengths at which caches of the published widths are measured.")
flags.DEFINE_list("parts", list(PARTS), f"What to measure at --lengths: of {', '.join(PARTS)}.")
flags.DEFINE_integer("new_tokens", 32, "Tokens to draw at the end of each context.", 2)
flags.DEFINE_integer("chunk", 512, "Tokens of a chunk of prompt.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and products.")
flags.DEFINE_enum("cache", None, ["float8"], "Of the engine's cache. Default: as --dtype.")
flags.DEFINE_string("model", None, "Checkpoint directory. Default: the narrow model.")
flags.DEFINE_integer("layers", None, "Layers of the narrow model, of which one is dense. Default: 2.", 2)
flags.DEFINE_integer("heads", None, "Heads of the narrow model. Default: 4.", 1)
flags.DEFINE_integer("hidden_size", None, "Width of the narrow model. Default: 64.", 1)
flags.DEFINE_integer("seed", 0, "Of parameters and prompts.", 0)
flags.DEFINE_string("json", None, "File for the numbers.")
flags.DEFINE_bool("write_docs", False, "Write docs/long_context.md and its plot.")
flags.DEFINE_string("job", None, "What the program starts itself with: one part at one length.")


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input, 1 if engine and forward pass disagree."""
    try:
        if FLAGS.job is not None:
            job = job_of(FLAGS.job)
            (Path(job.scratch) / "result.json").write_text(json.dumps(run_job(job)), encoding="utf-8")
            return 0
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            cfg, jobs = plan(argv, scratch)
            if (load := os.getloadavg()[0]) > 1:
                print(f"long_context: this machine is busy (load {load:.1f}); times mean little now", file=sys.stderr)
            found = run_all(jobs)
        results = Results(cfg, found, time.monotonic() - start)
        print(text_report(results))
        if FLAGS.json is not None:
            rows = [{"part": job.part, "length": job.length, **numbers} for job, numbers in found]
            Path(FLAGS.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if FLAGS.write_docs:
            key = FLAGS.get_key_flags_for_module(sys.argv[0])
            given = [flag.serialize() for flag in key if flag.present and flag.name != "json"]
            command = shlex.join(["python", "examples/long_context.py", *given])
            facts = "; ".join(f"{name} {value}" for name, value in machine().items())
            write_docs(results, DOCS, command=command, machine=facts)
            print("wrote docs/long_context.md", file=sys.stderr)
        return 0 if is_equal(results) else 1
    except (ValueError, OSError) as error:
        print(f"long_context: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except tf.errors.ResourceExhaustedError as error:
        print(f"long_context: out of memory: {error.message.splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("long_context: interrupted", file=sys.stderr)
        return 130


def plan(argv: Sequence[str], scratch: str) -> tuple[ModelConfig, list[Job]]:
    """Looks at all flags, and at the memory that parts will need; returns the model's config and what to do, in order."""
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    lengths, wide = (read_lengths(name) for name in ("lengths", "wide_lengths"))
    for part in FLAGS.parts:
        check(part in PARTS, f"--parts has {part!r}, want some of {', '.join(PARTS)}")
    check("whole" not in FLAGS.parts or "engine" in FLAGS.parts, "--parts has 'whole', which wants 'engine' to compare with")
    check(bool(lengths) or bool(wide), "--lengths and --wide_lengths are empty, want a length at least")
    sizes = {"num_hidden_layers": FLAGS.layers, "num_attention_heads": FLAGS.heads, "hidden_size": FLAGS.hidden_size}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    check(not (sizes and FLAGS.model), "--layers, --heads and --hidden_size are of the narrow model, --model has its own")
    settings = {name: FLAGS[name].value for name in ("new_tokens", "chunk", "dtype", "cache", "seed")}
    common = settings | {"model": FLAGS.model or "", "sizes": sizes, "scratch": scratch}
    jobs = [Job(part, length, **common) for length in lengths for part in PARTS if part in FLAGS.parts]
    jobs += [Job("wide", length, **common) for length in wide]
    cfg = job_config(Job("engine", 0, **common))
    for length in lengths:
        least = FLAGS.new_tokens + 2
        check(length >= least, f"--lengths has {length:,}, want at least {least:,}, as --new_tokens is {FLAGS.new_tokens:,}")
        check(length <= cfg.max_length, f"--lengths has {length:,}, the model's maximum is {cfg.max_length:,} tokens")
    if FLAGS.json is not None:
        check(Path(FLAGS.json).parent.is_dir(), f"--json: there is no directory {Path(FLAGS.json).parent}")
    if FLAGS.write_docs:
        check(
            len(lengths) > 2 and bool(wide) and set(FLAGS.parts) == set(PARTS) and not FLAGS.model,
            "--write_docs wants all parts of the narrow model, three lengths or more, and a wide one",
        )
        check(os.access(DOCS, os.W_OK), "--write_docs: the folder docs/ cannot be written")
    check_memory(jobs)
    total = len(jobs)
    return cfg, [dataclasses.replace(job, note=note(job, i + 1, total)) for i, job in enumerate(jobs)]


def read_lengths(name: str) -> list[int]:
    """The numbers of a flag, in order."""
    found = set()
    for text in filter(None, FLAGS[name].value):
        digits = text.removesuffix("K")
        check(digits.isdecimal() and int(digits) > 0, f"--{name} has {text!r}, want tokens, such as 4000 or 16K")
        found.add(int(digits) * (1024 if digits != text else 1))
    return sorted(found)


def check_memory(jobs: Sequence[Job]) -> None:
    """Refuses what would not fit, before anything is started."""
    free = available_bytes()
    for job in jobs:
        need = job_bytes(job, job_config(job))
        what = "of the published widths " if job.part == "wide" else ""
        where = f"{'caches' if job.part == 'wide' else job.part} {what}at {job.length:,} tokens"
        check(need <= free, f"{where} would need about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def note(job: Job, number: int, total: int) -> str:
    """What tells of a job's progress begins with."""
    part = "caches of the published widths" if job.part == "wide" else job.part
    return f"[{number} of {total}] {job.length:,} tokens, {part}"


def run_all(jobs: Sequence[Job]) -> list[tuple[Job, dict[str, Any]]]:
    """Runs all jobs, and says before each about how long it will take, from what the last of its part took."""
    found, last = [], {}
    for job in jobs:
        guess = ""
        if job.part in last:
            length, seconds = last[job.part]
            guess = f": about {format_seconds(seconds * (job.length / length) ** GROWS[job.part])}"
        print(f"{job.note}{guess}", file=sys.stderr, flush=True)
        start = time.monotonic()
        found.append((job, run_child(job)))
        last[job.part] = job.length, time.monotonic() - start
        print(f"{job.note}: done in {format_seconds(last[job.part][1])}", file=sys.stderr, flush=True)
    return found


def run_child(job: Job) -> dict[str, Any]:
    """Runs one part in a fresh process, whose memory is nobody else's."""
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}  # at 2 oneDNN reports, as an error, what it leaves to others in FP8
    done = subprocess.run([sys.executable, __file__, f"--job={job_text(job)}"], stdout=subprocess.DEVNULL, env=quiet)
    check(done.returncode == 0, f"{job.note}: the process ended with status {done.returncode}")
    return json.loads((Path(job.scratch) / "result.json").read_text(encoding="utf-8"))


parse_flags = flag_parser("long_context")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
