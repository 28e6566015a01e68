"""Plans the data of a training: storage, shards, hosts, the cost of preparing text, bandwidth, checkpoints.

Without flags it is the data of DeepSeek-V3, 14.8T tokens read by 256 hosts of eight H800s. Everything that goes into the
plan is listed with where it comes from: published, measured, assumed, chosen or given; the tables below it are computed from
that. --set changes a number. What preparing costs follows from measured rates of one core: of the report.json that
examples/prepare_data.py leaves (--report), of a flag (--rate), or of this machine (--measure, for the tokenizer).

A report also has bytes a token, tokens a document and the share of the text that stays. Core hours grow as the bytes of a
stage do; finding duplicates among more documents than fit into a machine's memory may cost more.

Examples:

  python examples/data_plan.py
  python examples/data_plan.py --report=runs/prepared/report.json --set=kept=0.2 --set=prepare_days=7
  python examples/data_plan.py --measure --tokenizer=model --corpus=texts
  python examples/data_plan.py --rate=clean=30e6 --rate=tokenise=3e6 --set=bytes_per_token=4.1
  python examples/data_plan.py --set=tokens=1e12 --set=devices=512 --set=hours=50e3

Fields of --set are listed in the first table.
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a rate is of one core

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import math
import sys
import time
from collections.abc import Iterator

from absl import app, flags
from command import flag_parser

import dsv3
from dsv3.checks import check
from dsv3.data import Document, embedded_corpus, encode_documents, load_tokenizer, read_corpus
from dsv3.plan import DataPlan, StageRate, change_kept, params_by_part, read_rates, stage_share
from dsv3.plan.data_report import inputs_report, reading_report, saving_report, storage_report, work_report

FLAGS = flags.FLAGS
CHUNK = 2**20  # bytes of text that are encoded at a time
REPORT, HERE = "measured, report", "measured here"

flags.DEFINE_enum("preset", "deepseek-v3-pretrain", list(dsv3.PRESETS), "Model, for its vocabulary and its checkpoints.")
flags.DEFINE_string("config", None, "A config.json or its folder, instead of --preset.")
flags.DEFINE_string("report", None, "report.json of examples/prepare_data.py, with measured rates.")
flags.DEFINE_multi_string("rate", [], "Rate of a core, stage=bytes/s; repeat for several. It replaces the report's.")
flags.DEFINE_multi_string("set", [], "A number of the plan, field=value; repeat for several.")
flags.DEFINE_bool("measure", False, "Measure the rate of --tokenizer here.")
flags.DEFINE_string("tokenizer", None, "Folder with a tokenizer.json, for --measure.")
flags.DEFINE_string("corpus", None, "Text for --measure: a file or a folder. Default: the running Python's own.")
flags.DEFINE_float("seconds", 10.0, "CPU seconds that --measure takes, at most.", 0.1)


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code: 2 for bad input."""
    try:
        check(len(argv) == 1, f"argument {argv[1:2]}, want flags only (--help shows examples)")
        check(FLAGS.measure or not (FLAGS.tokenizer or FLAGS.corpus), "--tokenizer and --corpus want --measure")
        check(not FLAGS.measure or FLAGS.tokenizer, "--measure wants --tokenizer, a folder with a tokenizer.json")
        cfg = dsv3.ModelConfig.from_hf(FLAGS.config) if FLAGS.config else dsv3.preset(FLAGS.preset)
        plan, rates, fields, stages = read_plan(cfg)
        specs = dsv3.model_specs(cfg)
        params = sum(sum(params_by_part(cfg, specs, mtp=mtp).values()) for mtp in (False, True))
        blocks = [
            inputs_report(plan, fields), storage_report(plan), work_report(plan, rates, stages), reading_report(plan),
            saving_report(plan, params),
        ]  # fmt: skip
        print("\n\n".join(blocks))
    except (ValueError, OSError) as error:
        print(f"data_plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def read_plan(cfg: dsv3.ModelConfig) -> tuple[DataPlan, dict[str, StageRate], dict[str, str], dict[str, str]]:
    """The plan of the flags, the rates by stage, and where each field that is no default and each rate comes from."""
    plan = DataPlan(vocab_size=cfg.vocab_size)
    origins = {} if cfg.vocab_size == DataPlan().vocab_size else {"vocab_size": "the model"}
    stages: dict[str, str] = {}
    given, changes = read_pairs("rate"), read_pairs("set")
    plan.replace(**changes)  # refuses what cannot be, before anything is measured
    rates: dict[str, StageRate] = {}
    if FLAGS.report is not None:
        found = read_rates(FLAGS.report)
        plan, rates = plan.replace(**found.fields), found.rates
        origins, stages = origins | dict.fromkeys(found.fields, REPORT), dict.fromkeys(rates, REPORT)
        print(f"report: {FLAGS.report}, {found.tokens:,} tokens\n")
    if FLAGS.measure:
        rate, fields, told = measure_tokenizer()
        print(f"{told}\n")
        given, stages = {"tokenise": rate} | given, stages | {"tokenise": HERE}
        fields = {name: value for name, value in fields.items() if origins.get(name) != REPORT}
        plan, origins = plan.replace(**fields), origins | dict.fromkeys(fields, HERE)
    stages |= dict.fromkeys(read_pairs("rate"), "given")
    if "kept" in changes:
        rates = change_kept(rates, plan.kept, changes["kept"])
    plan = plan.replace(**changes)
    origins |= dict.fromkeys(changes, "given")
    rates |= {stage: StageRate(rate, stage_share(stage, plan.kept)) for stage, rate in given.items()}
    return plan, rates, origins, stages


def read_pairs(name: str) -> dict[str, float]:
    """The numbers of a flag whose items are name=value."""
    found = {}
    for item in FLAGS[name].value:
        key, equals, value = item.partition("=")
        try:
            found[key.strip()] = float(value)
        except ValueError:
            equals = ""
        what = "clean=30e6" if name == "rate" else "kept=0.2"
        check(equals == "=" and key.strip() != "", f"--{name}={item}, want name=number, such as {what}")
        fine = name != "rate" or (math.isfinite(found[key.strip()]) and found[key.strip()] > 0)
        check(fine, f"--{name}={item}, want a rate above 0")
    return found


def measure_tokenizer() -> tuple[float, dict[str, float], str]:
    """Encodes text on one core for some CPU seconds.

    Returns:
      Bytes/s; bytes a token and tokens a document; a line that tells of it.
    """
    tokenizer = load_tokenizer(FLAGS.tokenizer)
    source = embedded_corpus() if FLAGS.corpus is None else read_corpus(FLAGS.corpus, on_skip=lambda *_: None)
    seconds = size = tokens = documents = 0
    for chunk in chunks(iter(source)):
        start = time.process_time()
        stream = encode_documents(tokenizer, chunk)
        seconds += time.process_time() - start
        size, tokens = size + int(stream.text_bytes.sum()), tokens + len(stream.tokens)
        documents += len(chunk)
        if seconds >= FLAGS.seconds:
            break
    check(size > 0 and seconds > 0, "--corpus has no text to measure the tokenizer with")
    told = (
        f"measured here: {size / 1e6:.2f} MB in {documents:,} documents, {tokens:,} tokens, {seconds:.2f} CPU s: "
        f"{size / seconds / 1e6:.2f} MB/s, {size / tokens:.3f} bytes a token"
    )
    return size / seconds, {"bytes_per_token": size / tokens, "document_tokens": tokens / documents}, told


def chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about `CHUNK` bytes."""
    held, size = [], 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        if size >= CHUNK:
            yield held
            held, size = [], 0
    if held:
        yield held


parse_flags = flag_parser("data_plan")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
