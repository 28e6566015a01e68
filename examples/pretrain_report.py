"""What `pretrain.py` does after the training: held-out scores, plots, sample completions, the export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from command import aligned, write_text
from pretrain_setup import Setup, on_host, say
from pretrain_speed import training_flops

from dsv3.compiled import snapshot
from dsv3.data import compression_bits_per_byte
from dsv3.eval import make_evaluator
from dsv3.page import Table, write_page
from dsv3.policy import ComputePolicy
from dsv3.pretrained import save_pretrained
from dsv3.serve import Completion, Engine, Request
from dsv3.train.checkpoint import flat_settings
from dsv3.train.plots import plot_run
from dsv3.train.records import read_rows
from dsv3.train.state import TrainState

FLAGS = flags.FLAGS
SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 3, 48, 64


def report(setup: Setup, state: TrainState, policy: ComputePolicy, more: Sequence = ()) -> None:
    """Evaluates, plots, samples and exports; prints what came out and where it is. `more`: sections of the page."""
    out, cfg = setup.out, setup.cfg
    params, router, averages = on_host(setup, (state.params, state.router, state.ema))
    if not setup.leads:
        return
    params, router, averages = snapshot((params, router, averages))
    rows = read_rows(out / "log.jsonl")
    say("\nscoring the held-out text")
    evaluate = make_evaluator(cfg, length=FLAGS.seq_len, overlap=FLAGS.seq_len // 2, policy=policy)
    score = evaluate(params, router, setup.data.heldout)._asdict()
    text = "".join(document.text for document in setup.data.documents).encode()
    if averages:
        score["ema_bits_per_byte"] = evaluate(averages, router, setup.data.heldout).bits_per_byte
    training = training_numbers(rows)
    training |= {"product_flops": setup.product_flops, "mfu": training_flops(setup, rows) / setup.product_flops}
    results = {"heldout": score, "compressors": compression_bits_per_byte(text), "training": training}

    say("completing held-out text")
    samples = draw_samples(setup, params, router, policy)
    results["samples"] = {"mtp_accepted": accepted_share([done for _, pair in samples for done in pair])}
    write_text(out / "samples.txt", format_samples(samples))
    write_text(out / "results.json", json.dumps(_without_nan(results), indent=1) + "\n")
    plots = plot_run(rows, out / "plots", mtp_layers=cfg.num_mtp_layers)
    export = out / "export"
    tokenizer_files = [out / "tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    save_pretrained(export, cfg, params, router, extra_files=tokenizer_files)
    if averages:
        save_pretrained(out / "export_ema", cfg, averages, router, extra_files=tokenizer_files)

    parts = [*more, *sections(setup, results, rows, plots, samples)]
    page = write_page(out / "report.html", f"Pretraining run {out}", parts)

    say("\n" + format_samples(samples))
    say(aligned(result_rows(results), left=2))
    say(f"\nreport       {page}")
    say(f"plots        {', '.join(map(str, plots))}")
    say(f"log          {out / 'log.jsonl'}, tensorboard --logdir {out}")
    say(f"checkpoints  {out / 'checkpoints'}")
    say(f"export       {export}: AutoModelForCausalLM.from_pretrained({str(export)!r}), AutoTokenizer the same,")
    say(f"             dsv3.load_pretrained({str(export)!r})")
    if averages:
        say(f"             {out / 'export_ema'}: the average of the parameters, with the selection biases of the end")


def sections(setup: Setup, results: dict[str, Any], rows, plots: Sequence[Path], samples) -> list:
    """What the report in HTML shows: results, plots, what went wrong, settings, samples."""
    trouble = read_rows(setup.out / "trouble.jsonl")
    lines = [(row["kind"], row["step"], row.get("reason") or f"to step {row['to']}") for row in trouble]
    found = Table([("what", "step", "why"), *lines], left=3) if lines else "Nothing: no step was left out."
    settings = [(name, value) for name, value in flat_settings(setup.settings).items()]
    balance, layers = [row for row in rows if row["kind"] == "load"], setup.cfg.num_moe_layers
    return [
        ("Results", [Table([("", ""), *result_rows(results)], left=2)]),
        ("Training", list(plots)),
        ("Load of the experts", [Table(balance_table(balance, layers)) if balance else "No mixture layer."]),
        ("Trouble", [found]),
        ("Samples", [format_samples(samples)]),
        ("Settings", [Table([("setting", "value"), *settings], left=2)]),
    ]


def balance_table(rows: Sequence[dict[str, Any]], layers: int) -> list[tuple[object, ...]]:
    """How even the load was over the last window of steps, by layer."""
    last = rows[-1]
    head = ("layer", "busiest", "idlest", "variance", "entropy", "unused")
    columns = zip(*(last[name] for name in ("max_load", "min_load", "load_variance", "load_entropy", "unused")))
    names = [f"MoE {i + 1}" if i < layers else f"MTP {i - layers + 1}" for i in range(len(last["load"]))]
    numbers = [(f"{a:.2f}", f"{b:.2f}", f"{v:.3f}", f"{e:.3f}", u) for a, b, v, e, u in columns]
    return [head, *((name, *line) for name, line in zip(names, numbers))]


def training_numbers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Loss parts, speed and load, each over the last twentieth of the run (speed: the median step)."""
    train = [row for row in rows if row["kind"] == "train"]
    last = train[-max(1, len(train) // 20) :]
    speeds = [row["tokens_per_second"] for row in train]

    def mean(name: str) -> Any:
        value = np.mean([row[name] for row in last], 0)
        return value.tolist() if np.ndim(value) else float(value)

    numbers = {name: mean(name) for name in ("loss", "nll", "mtp", "balance", "grad_norm", "load_violation")}
    return {
        "steps": train[-1]["step"],
        "tokens": train[-1]["tokens"],
        **numbers,
        "tokens_per_second": float(np.median(speeds)),
        "step_seconds": sum(row["seconds"] for row in train),
        "waited": float(np.median([row["waited"] / row["seconds"] for row in train])),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows if row["kind"] == "watch"), default=None),
    }


def draw_samples(setup: Setup, params, router, policy: ComputePolicy) -> list[tuple[str, list[Completion]]]:
    """A greedy and a random completion of the beginning of a few held-out documents, drafted by MTP where there is one."""
    stream, cfg = setup.data.heldout, setup.cfg
    length = min(cfg.max_length, PROMPT_TOKENS + NEW_TOKENS)
    long = [d for d in range(len(stream.starts) - 1) if stream.starts[d + 1] - stream.starts[d] > PROMPT_TOKENS]
    chosen = (long or [0])[:: max(1, len(long) // SAMPLES)][:SAMPLES]
    prompts = [stream.tokens[stream.starts[d] : stream.starts[d + 1] - 1][: min(PROMPT_TOKENS, length - 1)] for d in chosen]
    engine = Engine(
        cfg, params, router, tokenizer=setup.data.tokenizer, policy=policy, speculative=min(1, cfg.num_mtp_layers),
        max_length=length, chunk_sizes=(PROMPT_TOKENS,), smallest_cache=length,
    )  # fmt: skip
    requests = [
        Request(prompt.tolist(), max_new_tokens=NEW_TOKENS, temperature=temperature, top_p=0.95, seed=FLAGS.seed)
        for temperature in (0.0, 0.8)
        for prompt in prompts
    ]
    done = engine.generate(requests)
    texts = [setup.data.tokenizer.decode(prompt.tolist()) for prompt in prompts]
    return [(text, [done[i], done[i + len(prompts)]]) for i, text in enumerate(texts)]


def accepted_share(done: Sequence[Completion]) -> float:
    """Accepted drafts of all drafted tokens; NaN without drafts."""
    drafted = sum(completion.drafted for completion in done)
    return sum(completion.accepted for completion in done) / drafted if drafted else float("nan")


def format_samples(samples: list[tuple[str, list[Completion]]]) -> str:
    """Prompts and completions as text."""
    parts = []
    for number, (prompt, completions) in enumerate(samples, 1):
        parts.append(f"--- sample {number}: held-out text\n{prompt}\n")
        for name, completion in zip(("greedy", "temperature 0.8"), completions):
            parts.append(f"--- sample {number}: {name}\n{completion.text}\n")
    return "\n".join(parts)


def result_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The results as names and values."""
    held, train = results["heldout"], results["training"]
    bits = {"this model": held["bits_per_byte"], **{f"{k} (best)": v for k, v in results["compressors"].items()}}
    rows = [("held-out text", f"{held['bytes']:,} bytes, {held['tokens']:,} tokens")]
    rows += [(f"  bits per byte, {name}", f"{value:.3f}") for name, value in bits.items()]
    if "ema_bits_per_byte" in held:
        rows.insert(2, ("  bits per byte, averaged parameters", f"{held['ema_bits_per_byte']:.3f}"))
    rows += [
        ("  cross-entropy, nats a token", f"{held['nll']:.4f}"),
        ("  next token right", f"{held['top1']:.1%}"),
    ]
    if train["mtp"]:
        accepted = results["samples"]["mtp_accepted"]
        rows += [
            ("  MTP cross-entropy, nats a token", f"{held['mtp_nll']:.4f}"),
            ("  MTP guess agrees with the model", f"{held['mtp_agreement']:.1%}; accepted in the samples {accepted:.1%}"),
        ]
    rows += [
        ("training", f"{train['steps']:,} steps, {train['tokens']:,} tokens, {train['step_seconds']:,.0f} s"),
        ("  loss at the end", f"{train['loss']:.4f}"),
        ("  next token, MTP, balance", " ".join(f"{v:.4f}" for v in (train["nll"], *train["mtp"], train["balance"]))),
        ("  tokens a second", f"{train['tokens_per_second']:,.0f}"),
        ("  model FLOPs utilisation", f"{train['mfu']:.1%} of the {train['product_flops'] / 1e9:,.0f} GFLOP/s of a product"),
        ("  waiting for the data", f"{train['waited']:.2%} of a step"),
    ]
    if train["peak_memory_bytes"] is not None:
        rows.append(("  peak memory of the process", f"{train['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    if train["load_violation"]:
        ratios = " ".join(f"{1 + v:.2f}" for v in train["load_violation"])
        rows.append(("  busiest expert / fair share", f"{ratios} (by layer)"))
    return rows


def _without_nan(value: Any) -> Any:
    """Numbers that are not there become null, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and value != value else value
