"""Prepares text for pretraining: from files to tokenised shards with a manifest and a report.

A text is read, cleaned, filtered, compared with all others, held out or not, and tokenised. Without flags this is done with
the sources and the language reference of the running Python, in a minute; everything is left in runs/prepared:

  manifest.json   what there is: shards with digests, counts, licences, the tokenizer's fingerprint; written last
  train/, heldout/   by source the shards, which `dsv3.data.open_shards` opens
  tokenizer/      the given tokenizer, or one that was trained on a sample of the training text
  report.html     tables and plots of it all in one file; report.json has the same numbers, and the speed of each stage
  run.json        what decides the content; work/ is there until the folder is whole

After an interruption, of whatever kind, the same command goes on from there, to the same bytes. --processes does not
decide the content.

A source is a text file, a JSON-lines or Parquet file with a text field, or a folder of such files; text and JSON lines may
be compressed (.gz, .bz2, .xz, .zst). The flags that describe a source begin with its name, or hold for all. --sources is a
JSON file with the same by source: {"books": {"path": "books/", "licence": "CC0-1.0", "languages": "en"}, ...}.

Examples:

  python examples/prepare_data.py
  python examples/prepare_data.py --source=books=books/ --source=code=rows.jsonl.zst --kind=code=code \\
      --licence=books=CC0-1.0 --licence=code=MIT --text_field=code=content --languages=books=en --out=runs/mine
  python examples/prepare_data.py --sources=sources.json --tokenizer=model --processes=32 --out=runs/mine
  python examples/prepare_data.py --source=all=texts/ --filters=prose,-stop_words,word_count:min_words=20 --near=0.7
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys

from absl import app, flags
from command import flag_parser
from prepare_pool import Stopped
from prepare_report import tables
from prepare_setup import PER_SOURCE, Setup, prepare, say
from prepare_steps import run

from dsv3.data import open_shards
from dsv3.data.clean import KINDS
from dsv3.data.dedup import UNITS
from dsv3.data.fim import FIM_RATE
from dsv3.data.manifest import read_manifest
from dsv3.data.shards import WINDOW_TOKENS
from dsv3.data.work import read_json
from dsv3.train.progress import stop_on_signals

FLAGS = flags.FLAGS
WHAT = {
    "licence": "Licence, as the source states it.", "kind": f"One of {', '.join(KINDS)}: how it is cleaned and filtered.",
    "filters": "Filters instead of the kind's, see dsv3/data/filters.py.", "languages": "Languages to keep, as en+de.",
    "text_field": "Field or column with the text.", "chunk": "Most characters of a document; longer ones are cut.",
    "weight": "Share of the mixture.", "repeats": "Epochs, relative to other sources'; instead of weights.",
    "epochs": "Most epochs of a source.",
}  # fmt: skip
BAD_ROWS = "A row without text, or a compressed or Parquet file that is not whole, ends the run, or is counted and left out."

flags.DEFINE_multi_string("source", [], "A source, name=path; repeat for several.")
flags.DEFINE_string("sources", None, "JSON file of sources, instead of --source.")
for field in PER_SOURCE:
    flags.DEFINE_multi_string(field, [], f"{WHAT[field]} For one source name=value, or for all.")
flags.DEFINE_string("out", "runs/prepared", "Folder to prepare.")
flags.DEFINE_bool("fresh", False, "Delete what is in --out and start anew.")
flags.DEFINE_integer("processes", None, "Processes to work in. Default: one for each core that there is for this.", 1)
flags.DEFINE_string("tokenizer", None, "Folder with a tokenizer.json. Default: train one on the training text.")
flags.DEFINE_integer("vocab_size", 4096, "Vocabulary of the tokenizer that is trained.", 1)
flags.DEFINE_integer("tokenizer_bytes", 20_000_000, "Bytes of text that it is trained on, at most.", 1)
flags.DEFINE_float("heldout", 0.02, "Share of the documents that is held out; 0: none.")
flags.DEFINE_integer("seed", 0, "Decides what is held out and where holes are.", 0)
flags.DEFINE_float("near", 0.8, "Similarity from which on documents are near duplicates; 0: only exact ones are dropped.")
flags.DEFINE_integer("permutations", 128, "Numbers of a MinHash signature.", 2)
flags.DEFINE_integer("shingle", 5, "Words of the runs that documents are compared by.", 1)
flags.DEFINE_enum("shingle_unit", "words", UNITS, "Units of the runs; characters for languages that do not part words.")
flags.DEFINE_float("fim", FIM_RATE, "Share of the training documents that is written for filling in the middle.")
flags.DEFINE_integer("part_bytes", 2**26, "Input bytes of a part, which one process does at a time; and of a shard.", 1)
flags.DEFINE_integer("window_tokens", WINDOW_TOKENS, "Tokens within which documents are shuffled later.", 1)
flags.DEFINE_enum("bad_rows", "raise", ["raise", "skip"], BAD_ROWS)
flags.DEFINE_bool("keep_work", False, "Leave work/ when the folder is whole.")


def main(argv: list[str]) -> int:
    """Runs everything; returns the exit code: 2 for bad input, 1 for what fails later, 128 + n after signal n."""
    with stop_on_signals() as stop:
        try:
            setup = prepare(argv)
        except (ValueError, OSError) as error:
            return fail(error, 2)
        again = f"to go on, run the same command again: {same_command()}"
        try:
            if setup.whole:
                return show_whole(setup)
            run(setup, stop)
        except Stopped as stopped:
            return fail(f"{stopped}; {again}", 128 + stopped.signal)
        except KeyboardInterrupt:
            return fail(f"interrupted; {again}", 130)
        except ValueError as error:
            return fail(error, 1)
        except MemoryError as error:  # often without a word
            return fail(str(error) or "memory is short: try fewer --processes", 1)
        except OSError as error:
            return fail(error, 1, f"; once that is put right, {again.removeprefix('to go on, ')}")
    return 0


def fail(error: object, code: int, more: str = "") -> int:
    """Says what is wrong, in one line, and returns the exit code."""
    told = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else error
    print(f"prepare_data: {' '.join(f'{told}{more}'.split())}", file=sys.stderr)
    return code


def same_command() -> str:
    """How to go on."""
    same = [arg for arg in sys.argv if arg.lstrip("-").partition("=")[0] != "fresh"]
    return shlex.join([os.path.basename(sys.executable), *same])


def show_whole(setup: Setup) -> int:
    """Tells that there is nothing to do, after a look at the sizes of all files."""
    for split, sources in read_manifest(setup.out).splits.items():
        if sources:
            open_shards(setup.out, split, verify="sizes")
    if not FLAGS.keep_work:
        shutil.rmtree(setup.work, ignore_errors=True)
    print(tables(read_json(setup.out / "report.json")))
    say(f"{str(setup.out)!r} is whole already")
    return 0


parse_flags = flag_parser("prepare_data")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
