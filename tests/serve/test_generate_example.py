"""`examples/generate.py`: what can be seen to be wrong is refused in one line, before the model is loaded."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from dsv3.data import save_tokenizer
from dsv3.pretrained import save_pretrained
from tests.io.checkpoints import edit_config
from tests.serve.model import model
from tests.serve.test_text import VOCAB, tokenizer

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

# Flags are the process's own, and another example's have the same names: so it is a process of its own, one for all cases.
DRIVER = """
import contextlib, io, json, sys
import generate
from absl.testing import flagsaver

def load(*arguments, **options):
    raise AssertionError("loaded")

real, generate.load_pretrained = generate.load_pretrained, load
cases = json.loads(sys.argv[1])
for arguments in cases:
    if arguments is cases[-1]:
        generate.load_pretrained = real
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(io.StringIO()), flagsaver.flagsaver():
        try:
            code = generate.main(generate.parse_flags(["generate.py", *arguments]))
        except BaseException as error:
            code = repr(error)
    print(json.dumps([code, stream.getvalue().splitlines()]))
"""

PROMPT = "--prompt=the cat"
CASES = {
    "negative drafts": (["{whole}", PROMPT, "--speculative=-1"], "`speculative` is -1, want at least 0"),
    "no MTP": (["{plain}", PROMPT, "--speculative=1"], "`speculative` is 1, but the model has no MTP module"),
    "nothing to compare": (["{whole}", PROMPT, "--compare"], "--compare wants --speculative"),
    "too long": (["{whole}", PROMPT, "--max_length=97"], "`max_length` is 97, want at most the model's, which is 96"),
    "a surrogate": (["{whole}", "--prompt=a\udcff"], "`prompt` has a lone surrogate at 1"),
    "a file": (["{whole}", "--prompt_file={bytes}"], "bytes.txt' is not UTF-8 (byte 2)"),
    "standard input": (["{whole}"], "standard input is not UTF-8 (byte 1)"),
    "a good one": (["{whole}", PROMPT, "--speculative=1", "--max_length=96"], "loaded"),
}
COMPARE = ["{whole}", PROMPT, "--max_new_tokens=8", "--speculative=1", "--compare", "--dtype=float32"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    places = {name: str(folder / name) for name in ("whole", "plain")} | {"bytes": str(folder / "bytes.txt")}
    for name in ("whole", "plain"):
        save_pretrained(places[name], *model(VOCAB))
        save_tokenizer(tokenizer(), places[name])
    edit_config(folder / "plain", num_nextn_predict_layers=0)
    (folder / "bytes.txt").write_bytes(b"ab\xff")
    wanted = [*(arguments for arguments, _ in CASES.values()), COMPARE]
    cases = [[argument.format(**places) for argument in arguments] for arguments in wanted]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)], input=b"a\xff\n", capture_output=True, timeout=240, cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip([*CASES, "compare"], map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_one_line_before_loading(results, what):
    (code, lines), message = results[what], CASES[what][1]
    if what == "a good one":
        assert code == "AssertionError('loaded')"
    else:
        assert code == 2 and len(lines) == 1 and lines[0].startswith("generate: ") and message in lines[0], (code, lines)


def test_the_speed_up_of_drafts_is_told(results):
    code, lines = results["compare"]
    told = "\n".join(lines)
    assert code == 0, told
    assert re.search(r"speed-up \d+\.\d\d: [\d.]+ tokens/s with drafts, [\d.]+ without", told)
    assert "1 of 1 greedy texts are the same" in told
