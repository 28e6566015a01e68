"""`examples/prepare_data.py` as its user runs it: whole, killed and gone on with, and given bad input."""

import gzip
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3.data import (
    exact_key,
    heldout_place,
    load_tokenizer,
    open_shards,
    read_corpus,
    read_manifest,
    read_window,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from dsv3.data.clean import clean_text
from tests.more import MORE

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "examples" / "prepare_data.py"
SMALL = "--vocab_size=300 --part_bytes=3000 --window_tokens=500 --heldout=0.2 --fim=0.3"
SMALL += " --filters=prose=prose,word_count:min_words=20,-repeated_ngrams"
WORDS = "the be to of and that have with cat dog house tree river mountain green blue quick slow over café naïve".split()


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources: a folder of four formats with duplicates, empty and broken files; and JSON lines of code."""
    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    prose = root / "prose"
    prose.mkdir()
    texts = [sentence(rng, 60) for _ in range(80)]
    rows = [{"text": text, "name": f"row {i}"} for i, text in enumerate(texts)]
    rows += [{"text": "too few words"}, {"text": " "}, {"text": "\1"}]
    (prose / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (prose / "b.txt.gz").write_bytes(gzip.compress(f"{texts[3].upper()}\r\n".encode()))
    near = texts[5].split()
    near[30] = "elsewhere"
    pq.write_table(pa.table({"text": [" ".join(near), sentence(rng, 60)]}), prose / "c.parquet")
    (prose / "empty.txt").write_text("\n")
    pathlib.Path(os.fsdecode(os.fsencode(prose / "na") + b"\xefve.txt")).write_text("a name that is not UTF-8")
    (prose / "binary.txt").write_bytes(b"a\0b")
    code = [f"def f{i}(x):\r\n    '''{sentence(rng, 12)}'''\r\n    return x + {i}\r\n" for i in range(40)]
    (root / "code.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in [*code, code[7]]))
    return root


def command(corpus, out, *flags):
    sources = [f"--source=prose={corpus}/prose", f"--source=code={corpus}/code.jsonl", "--text_field=code=content"]
    kinds = ["--kind=code=code", "--licence=prose=CC0-1.0", "--weight=prose=3", "--weight=code=1"]
    return [sys.executable, str(PROGRAM), *sources, *kinds, *SMALL.split(), f"--out={out}", *flags]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def call(arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment()} | options
    return subprocess.run(arguments, **options)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A folder that was prepared without interruption, in one process, and what the program printed."""
    out = tmp_path_factory.mktemp("whole") / "prepared"
    done = call(command(corpus, out, "--processes=1"))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def contents(out):
    """Digest of each file that is the same in every run; of the report its counts."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found = {path.relative_to(out).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}
    report = json.loads((out / "report.json").read_text())
    del found["report.html"]
    found["report.json"] = {key: value for key, value in report.items() if key not in ("rates", "run")}
    return found


def documents(out, split):
    """source → decoded documents, in the shards' order."""
    tokenizer, found = load_tokenizer(out / "tokenizer"), {}
    for name, source in open_shards(out, split, verify="all").items():
        windows = [read_window(source, i) for i in range(len(source.windows.tokens))]
        found[name] = [
            tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=True)
            for tokens, starts in windows
            for a, b in zip(starts[:-1], starts[1:])
        ]
    return found


# What is there in the end


def test_every_document_is_somewhere(corpus, whole):
    out, _ = whole
    manifest, report = read_manifest(out), json.loads((out / "report.json").read_text())
    assert manifest.tokenizer == tokenizer_fingerprint(load_tokenizer(out / "tokenizer")) and manifest.vocab_size == 300
    assert manifest.settings["mixture"] == {"weights": {"prose": 3.0, "code": 1.0}, "repeats": None, "epochs": None}
    prose, code = manifest.sources["prose"], manifest.sources["code"]
    assert (prose["licence"], code["licence"]) == ("CC0-1.0", "unknown")
    assert prose["dropped"] == {
        "is empty": 3, "exact duplicate": 1, "is binary (a zero byte at 1)": 1, "near duplicate": 1, "too few words": 2
    }  # fmt: skip
    assert code["dropped"] == {"exact duplicate": 1}
    assert prose["documents"] == 81 and code["documents"] == 40
    for source in report["sources"].values():
        assert source["read"]["documents"] == source["documents"] + sum(source["dropped"].values())
    shards = [entry for split in manifest.splits.values() for entries in split.values() for entry in entries]
    assert sum(entry["documents"] for entry in shards) == 121 and len(manifest.splits["train"]["prose"]) > 3
    assert not (out / "work").exists()


def test_texts_are_cleaned_and_held_out_by_their_hash(corpus, whole):
    out, _ = whole
    texts = {
        "prose": [clean_text(d.text) for d in read_corpus(corpus / "prose", on_skip=lambda *skip: None)],
        "code": [clean_text(d.text, "code") for d in read_corpus(corpus / "code.jsonl", text_field="content")],
    }
    heldout, train = documents(out, "heldout"), documents(out, "train")
    for name, found in heldout.items():
        unique = {exact_key(text): text for text in reversed(texts[name])}  # the first of equal ones
        assert set(found) <= {text for text in unique.values() if heldout_place(text) < 0.2} and len(found) > 3
        assert not set(map(exact_key, found)) & set(map(exact_key, train[name]))
        whole_ones = [text for text in train[name] if "<｜fim▁begin｜>" not in text]
        assert set(whole_ones) <= {text for text in unique.values() if heldout_place(text) >= 0.2}
        assert 0.1 < 1 - len(whole_ones) / len(train[name]) < 0.5  # a rate of 0.3


def test_report_is_one_file_with_everything(whole):
    out, printed = whole
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and not re.search(r'(src|href)="(?!data:)', page)
    for shown in ("CC0-1.0", "near duplicate", "elsewhere", "tokenising", "too few words"):
        assert shown in page
    report = json.loads((out / "report.json").read_text())
    assert {e["kind"] for e in report["duplicates"]["examples"]} == {"exact", "near"}
    assert set(report["rates"]) == {
        "read", "clean", "filter", "sign", "store", "scan", "duplicates", "tokenise", "shard"
    }  # fmt: skip
    for rate in report["rates"].values():
        assert rate["mb_per_second"] == pytest.approx(rate["bytes"] / 1e6 / rate["seconds"])
    kept = sum(source["bytes"] for source in report["sources"].values())
    assert report["rates"]["tokenise"]["bytes"] == kept < report["rates"]["scan"]["bytes"]
    for line in ("source 'code' has no licence: the manifest will say 'unknown' (--licence=code=...)", "is whole"):
        assert line in printed
    assert (out / "plots" / "sources.png").stat().st_size > 5000


# Interruptions


def wait_until(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.005)


def start(arguments, errors=subprocess.DEVNULL):
    return subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=errors, text=True)


def interrupted(arguments, condition, number):
    """Starts the program, sends it a signal when `condition` holds, and returns its exit code and last line."""
    with start(arguments, subprocess.PIPE) as process:
        wait_until(condition, process)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
    return process.returncode, errors.strip().splitlines()[-1] if errors.strip() else ""


def test_killed_and_gone_on_with_it_is_the_same_to_the_byte(corpus, whole, tmp_path):
    """SIGKILL while scanning and while tokenising, in two processes; then one does the rest."""
    out = tmp_path / "prepared"
    two = command(corpus, out, "--processes=2")

    def scanned():
        return list((out / "work" / "scan").glob("*/[0-9]*"))

    code, _ = interrupted(two, lambda: len(scanned()) >= 3, signal.SIGKILL)
    before = {path: path.stat().st_ino for path in scanned()}
    assert code == -signal.SIGKILL
    code, _ = interrupted(two, lambda: len(list((out / "work" / "shards").rglob("*.json"))) >= 1, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (out / "manifest.json").exists()
    assert before == {path: path.stat().st_ino for path in before}, "what was done is not done again"
    done = call(command(corpus, out, "--processes=1"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"scan: (\d+) of \1 parts were done before", done.stderr)
    assert contents(out) == contents(whole[0])


@pytest.mark.skipif(not MORE, reason="a longer case (tests/more.py)")
def test_killed_at_random_moments(corpus, whole, tmp_path):
    rng, out, kills = random.Random(0), tmp_path / "prepared", 0
    while kills < 40:
        with start(command(corpus, out, "--processes=2")) as process:
            try:
                process.wait(rng.uniform(0.5, 4.0))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    assert call(command(corpus, out, "--processes=2")).returncode == 0
    assert contents(out) == contents(whole[0])


def test_full_disk_is_one_line_and_leaves_nothing_half_written(corpus, tmp_path):
    """A limit for the size of files stands in for the end of the disk."""
    out = tmp_path / "prepared"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    done = call(command(corpus, out, "--processes=2"), preexec_fn=limit)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"prepare_data: \w+: cannot write to '.*' \(File too large\); once that is put right, run .*", last)
    assert "Traceback" not in done.stderr and not (out / "manifest.json").exists()
    hidden = [path for path in out.rglob(".*") if path.name not in (".lock", ".workers")]
    assert not hidden


# Bad input

DRIVER = """
import contextlib, io, json, sys
import prepare_data
from absl.testing import flagsaver

assert "tensorflow" not in sys.modules
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = prepare_data.main(prepare_data.parse_flags(["prepare_data.py", *arguments]))
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

BAD = {
    "an argument": (["x"], 2, "unexpected argument ['x'], want flags only"),
    "a flag": (["--permutations=1"], 2, "flag --permutations=1"),
    "a path": (["--source=a={tmp}/none"], 2, "read_corpus: '{tmp}/none' does not exist"),
    "a source without a path": (["--source=a"], 2, "--source=a, want name=path"),
    "a name": (["--source=a/b={corpus}"], 2, "source 'a/b': want a name of letters, digits, _ . - for its folder"),
    "a name twice": (["--source=a={corpus}", "--source=A={corpus}"], 2, "sources a, A have one name, want different ones"),
    "both": (["--source=a={corpus}", "--sources=x.json"], 2, "--sources and --source are both given"),
    "no file of sources": (["--sources={tmp}/x.json"], 2, "read_sources: '{tmp}/x.json' does not exist"),
    "a wrong file of sources": (["--sources={tmp}/list.json"], 2, "'{tmp}/list.json' has no sources, want"),
    "a field": (["--sources={tmp}/field.json"], 2, "source 'a' has 'license', want fields among name, path, licence"),
    "an empty file": (["--source=a={tmp}/empty.jsonl"], 2, "source 'a' is empty: '{tmp}/empty.jsonl' has no bytes"),
    "an empty folder": (["--source=a={tmp}/folder"], 2, "read_corpus: empty corpus: '{tmp}/folder' has no text file"),
    "a kind": (["--source=a={corpus}", "--kind=poem"], 2, "source 'a': `kind` is 'poem', want one of prose, code"),
    "a filter": (["--source=a={corpus}", "--filters=good"], 2, "parse_filters: `text` has 'good', want names among none"),
    "a source's flag": (["--source=a={corpus}", "--kind=b=code"], 2, "--kind=b=code names no source, want one of a"),
    "a language": (["--source=a={corpus}", "--languages=klingon"], 2, "`language` has 'klingon', want codes such as en"),
    "weights": (["--source=a={corpus}", "--weight=0"], 2, "the weights sum to zero, want one above it"),
    "a weight": (["--source=a={corpus}", "--weight=much"], 2, "source 'a': `weight` is 'much', want a number"),
    "weights of some": (
        ["--source=a={corpus}", "--source=b={corpus}", "--weight=a=1"], 2, "source ['b'] has no weight, want one for each"
    ),
    "a share": (["--heldout=1"], 2, "--heldout is 1.0, want a share of at least 0 and below 1"),
    "few permutations": (["--near=0.1", "--permutations=4"], 2, "`permutations` is 4, too few to find pairs of"),
    "a vocabulary": (["--vocab_size=9"], 2, "--vocab_size is 9, want at least 266 for a trained tokenizer"),
    "two tokenizers": (["--tokenizer={tmp}", "--vocab_size=300"], 2, "--tokenizer is given, and --vocab_size"),
    "no tokenizer": (["--tokenizer={tmp}"], 2, "load_tokenizer: no tokenizer.json or tokenizer.json.gz in '{tmp}'"),
    "another folder": (["--source=a={corpus}", "--out={tmp}"], 2, "--out '{tmp}' holds ['empty.jsonl'] but nothing that"),
    "a file as folder": (["--source=a={corpus}", "--out={tmp}/list.json"], 2, "cannot write to --out '{tmp}/list.json'"),
    "a bad row": (["--source=a={tmp}/rows.jsonl"], 1, "rows.jsonl' line 2: `text` is a int, want a string"),
    "nothing stays": (
        ["--source=a={corpus}/prose", "--filters=letters:min_share=1.0"], 1,
        "source 'a': no document stays (85 few letters, 3 is empty, 1 is binary (a zero byte at 1)); other --filters=a=..."
    ),
    "all is held out": (
        ["--source=a={corpus}/prose", "--heldout=0.9999", "--filters=none"], 1, "no source has anything to train on"
    ),
}  # fmt: skip
SETTINGS = {
    "a share": (["--heldout=0.3"], "heldout is 0.3, was 0.2; --out '{out}' was begun otherwise: another --out keeps both"),
    "a source's": (["--filters=prose=none"], "source 'prose': filters is [], was [['word_count', {{'min_words': 20"),
    "a source": (["--source=more={corpus}/code.jsonl", "--weight=more=1"], "source 'more' is {{'path': '{corpus}/code.js"),
    "a tokenizer": (["--vocab_size=301"], "vocab_size is 301, was 300"),
}


@pytest.fixture(scope="module")
def results(corpus, whole, tmp_path_factory):
    """(exit code, output, errors) of every bad command, which one process has run."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "folder").mkdir()
    (tmp / "empty.jsonl").write_text("")
    (tmp / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp / "list.json").write_text("[]")
    (tmp / "field.json").write_text(json.dumps({"a": {"path": ".", "license": "MIT"}}))
    places = {"tmp": tmp, "corpus": corpus, "out": whole[0]}
    fresh = (f"--out={tmp_path_factory.mktemp('out') / 'new'}" for _ in BAD)
    commands = [
        [*(["--processes=1", out] if "--out" not in str(flags) else ["--processes=1"]), *(f.format(**places) for f in flags)]
        for out, (flags, _, _) in zip(fresh, BAD.values())
    ]
    known = command(corpus, whole[0], "--processes=1")[2:]
    commands += [[*known, *(f.format(**places) for f in flags)] for flags, _ in SETTINGS.values()] + [known]
    done = call([sys.executable, "-c", DRIVER], input=json.dumps(commands), cwd=ROOT / "examples")
    assert done.returncode == 0, done.stderr
    names = [*BAD, *(f"other {name}" for name in SETTINGS), "same"]
    return dict(zip(names, map(json.loads, done.stdout.splitlines()))), places


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(results, case):
    found, places = results
    _, want, message = BAD[case]
    code, _, errors = found[case]
    lines = [line for line in errors.splitlines() if not re.match(r"(scan|duplicates): ", line)]
    assert code == want and len(lines) == 1 and lines[0].startswith("prepare_data: "), errors
    assert message.format(**places) in lines[0]


@pytest.mark.parametrize("case", SETTINGS)
def test_other_settings_are_refused_by_name(results, case):
    found, places = results
    code, _, errors = found[f"other {case}"]
    assert code == 2 and SETTINGS[case][1].format(**places) in errors and errors.count("\n") == 1, errors


def test_the_same_command_again_has_nothing_to_do(results, whole):
    code, printed, errors = results[0]["same"]
    assert code == 0 and "is whole already" in printed and "too few words" in printed and not errors
    assert (whole[0] / "manifest.json").exists()


def test_changed_input_a_second_run_and_a_fresh_start(corpus, tmp_path):
    """A stopped run is not gone on with when a file has changed or another process is at work; --fresh starts anew."""
    out, file = tmp_path / "prepared", corpus / "code.jsonl"
    begun = out / "work" / "scan" / "prose"
    code, line = interrupted(command(corpus, out, "--processes=2"), begun.exists, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "SIGTERM; to go on, run the same command again" in line
    data, stat = file.read_bytes(), file.stat()
    try:
        file.write_bytes(data + b'{"content": "def another_function(argument):\\n    return argument.something_else()"}\n')
        done = call(command(corpus, out, "--processes=1"))
        got = f"source 'code' has changed: 'code.jsonl' has {file.stat().st_size:,} bytes, had {len(data):,}"
        assert done.returncode == 2 and got in done.stderr and done.stderr.count("\n") == 1
        (out / "notes.txt").write_text("mine")
        done = call(command(corpus, out, "--processes=1", "--fresh"))
        assert done.returncode == 2 and "holds ['notes.txt'], which is no part of a prepared folder" in done.stderr
        (out / "notes.txt").unlink()
        with start(command(corpus, out, "--processes=1", "--fresh")) as one:
            wait_until(lambda: (out / "work" / "scan" / "code").exists(), one)
            other = call(command(corpus, out, "--processes=1"))
            assert one.wait(timeout=120) == 0
        assert other.returncode == 2 and "is in use by another process" in other.stderr
        assert read_manifest(out).sources["code"]["documents"] == 41
    finally:
        file.write_bytes(data)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_given_tokenizer_is_kept_and_other_flags_may_come_from_a_file(corpus, tmp_path):
    tokenizer = train_tokenizer([" ".join(WORDS)] * 9, 320)
    save_tokenizer(tokenizer, tmp_path / "mine")
    sources = {
        "prose": {"path": str(corpus / "prose"), "languages": "en", "chunk": 200, "filters": "none", "repeats": 2},
        "copy": {"path": str(corpus / "prose"), "filters": "none"},
    }
    (tmp_path / "sources.json").write_text(json.dumps(sources))
    flags = [f"--sources={tmp_path}/sources.json", f"--tokenizer={tmp_path}/mine", f"--out={tmp_path}/out", "--near=0"]
    done = call([sys.executable, str(PROGRAM), *flags, "--processes=1", "--heldout=0", "--keep_work", "--fim=0"])
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tokenizer == tokenizer_fingerprint(load_tokenizer(tmp_path / "mine"))
    assert manifest.settings["mixture"]["repeats"] == {"prose": 2.0} and manifest.splits["heldout"] == {}
    assert "near duplicate" not in manifest.sources["prose"]["dropped"]
    assert max(np.diff(read_window(open_shards(tmp_path / "out")["prose"], 0)[1])) < 202
    assert (tmp_path / "out" / "work" / "scan").is_dir()
