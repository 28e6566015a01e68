"""What `eval.compression` measures, and `examples/compare_compressed.py` on a small model."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import dsv3
from dsv3.data import save_tokenizer
from dsv3.eval.compression import (
    Variant,
    common_prefix,
    compare_logits,
    generate_greedy,
    measure_speed,
    tree_bytes,
    variant_cache_bytes,
)
from dsv3.pretrained import save_pretrained
from dsv3.serve import Engine
from tests.compare import PLAIN
from tests.more import MORE
from tests.serve.model import POLICY, model
from tests.serve.test_text import VOCAB, tokenizer

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def test_logit_differences_are_the_formula():
    cfg, params, router = model(VOCAB)
    other = params._replace(head=params.head + 0.1 * np.sin(np.arange(VOCAB, dtype=np.float32)))
    rows = np.random.default_rng(0).integers(0, VOCAB, (3, 5)).astype(np.int32)
    variants = [Variant("a", params, PLAIN), Variant("b", other, PLAIN)]
    (same, _), (_, zero) = compare_logits(variants, router, rows, cfg=cfg, references=[0, 1])
    assert same == zero == (0.0, 1.0)
    found = compare_logits(variants, router, rows, cfg=cfg, references=[0])[1][0]
    a, b = (dsv3.model_apply(v.params, router, rows, cfg=cfg, policy=PLAIN).logits.numpy() for v in variants)
    assert found.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert found.agreement == np.mean(a.argmax(-1) == b.argmax(-1)) < 1


def test_bytes_of_parameters_and_caches():
    cfg, params, _ = model()
    assert tree_bytes(params) == 4 * dsv3.count_params(dsv3.model_specs(cfg))
    plain, packed = Variant("a", params, PLAIN), Variant("b", params, PLAIN.replace(cache="float8"))
    width = cfg.mla.cache_width
    assert variant_cache_bytes(plain, cfg) == 4 * width * cfg.num_layers
    assert variant_cache_bytes(packed, cfg) == (cfg.mla.kv_latent + 4 + 2 * cfg.mla.rope_dim) * cfg.num_layers


def test_prefix():
    assert [common_prefix(*pair) for pair in (([], [1]), ([1, 2], [1, 2]), ([1, 2], [3]))] == [0, 2, 0]


def test_speeds_are_of_tokens_a_second(monkeypatch):
    """With a clock that goes on by a second for each request of one token, and by four for one of four."""
    now = [0.0]

    class Clocked:
        def generate(self, requests):
            now[0] += requests[0].max_new_tokens

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    (speed,) = measure_speed([Clocked()], [[1, 2, 3], [4, 5, 6]], new_tokens=4, turns=2)
    assert speed == (6.0, 2 * 3 / 3.0)


def test_refusals_are_one_line():
    cfg, params, router = model()
    variants = [Variant("a", params, PLAIN)]
    cases = {
        "compare_logits: `rows` has shape (3,), want [N, T]": lambda: compare_logits(
            variants, router, np.zeros(3, np.int32), cfg=cfg, references=[0]
        ),
        "compare_logits: `references` is [1], want numbers below 1": lambda: compare_logits(
            variants, router, np.zeros((1, 3), np.int32), cfg=cfg, references=[1]
        ),
        "measure_speed: `new_tokens` is 1, want at least 2": lambda: measure_speed([], [], new_tokens=1, turns=1),
        "measure_speed: `turns` is 0, want at least 1": lambda: measure_speed([], [], new_tokens=2, turns=0),
    }
    for wanted, call in cases.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert wanted in str(caught.value)


def test_generate_greedy_goes_on_behind_an_end():
    done = generate_greedy(Engine(*model(), policy=POLICY, chunk_sizes=(8,), smallest_cache=48), [[1, 2, 3]], 7)
    assert len(done[0].tokens) == 7


# The program

DRIVER = """
import contextlib, io, json, sys
import compare_compressed
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = compare_compressed.main(compare_compressed.parse_flags(["compare_compressed.py", *arguments]))
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

# What the program prints and writes is for the longer run; what it refuses is always tested.
SMALL = ["--text={text}", "--length=16", "--windows=2", "--prompts=2", "--new_tokens=4", "--turns=1", "--score_tokens=40"]
CASES = {
    "good": (["{whole}", *SMALL, "--variants=float8+cache8", "--json={json}"], ""),
    "no directory": ([], "0 arguments, want one: the checkpoint directory"),
    "a variant": (["{whole}", "--variants=int4"], "--variants has 'int4', want names among bfloat16, float8"),
    "a length": (["{whole}", "--length=999"], "--length is 999, want at most the model's 96"),
    "a short text": (["{whole}", "--text={text}", "--length=90", "--score_tokens=2"], "want at least --length, which is 90"),
    "a flag": (["{whole}", "--turns=0"], "flag --turns=0"),
    "a place": (["{whole}", "--json={whole}/nowhere/x.json"], "--json: there is no directory"),
    "a file": (["{whole}", "--text={whole}/nowhere.txt", "--length=16"], "nowhere.txt"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compression")
    places = {name: str(folder / name) for name in ("whole", "json", "text")}
    save_pretrained(places["whole"], *model(VOCAB))
    save_tokenizer(tokenizer(), places["whole"])
    pathlib.Path(places["text"]).write_text("the cat sat on the mat. " * 4)
    names = [name for name in CASES if MORE or name != "good"]
    cases = [[argument.format(**places) for argument in CASES[name][0]] for name in names]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)], capture_output=True, timeout=240, cwd=EXAMPLES,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True)) | {"rows": places["json"]}


@pytest.mark.skipif(not MORE, reason="a long case")
def test_program(results):
    code, out, _ = results["good"]
    assert code == 0
    lines = out.splitlines()
    names = ["bfloat16", "float8+cache8", "float32"]
    assert [line.split()[0] for line in lines] == ["variant", *names]
    rows = json.loads(pathlib.Path(results["rows"]).read_text())
    assert [row["variant"] for row in rows] == names
    reference, both, full = rows
    assert reference["error_bfloat16"] == 0 and full["error_float32"] == 0 and reference["greedy_agreement"] == 1
    assert 0 < reference["error_float32"] < both["error_float32"] < 0.3
    assert reference["free_running"] == reference["new_tokens"] == 4
    cfg = model(VOCAB)[0]
    assert both["cache_bytes_per_token"] == (cfg.mla.kv_latent + 4 + 2 * cfg.mla.rope_dim) * cfg.num_layers
    assert full["weight_bytes"] == 4 * dsv3.count_params(dsv3.model_specs(cfg))
    assert all(np.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))


@pytest.mark.parametrize("case", [name for name in CASES if name != "good"])
def test_bad_input_is_one_line(results, case):
    code, out, err = results[case]
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("compare_compressed: ") and CASES[case][1] in err


