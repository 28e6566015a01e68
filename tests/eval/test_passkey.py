"""The passkey grid: what counts as found, the same problems for all models, its plot and its file."""

import numpy as np
import pytest

import dsv3
from dsv3.data import train_tokenizer
from dsv3.data.passkey import passkey_form
from dsv3.eval import passkey
from dsv3.eval.passkey import PasskeyGrid, load_grid, passkey_grid, passkey_problems, plot_grids, save_grid
from dsv3.serve import Completion

FILLER = np.arange(2000, dtype=np.int32) % 200 + 20


@pytest.fixture(scope="module")
def form():
    return passkey_form(train_tokenizer(["The pass key is 12345. Remember it. What is the pass key?"], 290))


class Oracle:
    """An engine that knows the answers of prompts below a length, and of longer ones all tokens but the last."""

    answers: dict = {}
    seen: list = []

    def __init__(self, cfg, params, router, **options):
        assert options["max_length"] <= cfg.max_length

    def generate(self, requests):
        done = []
        for request in requests:
            Oracle.seen.append(tuple(request.prompt))
            told = self.answers[tuple(request.prompt)]
            assert request.max_new_tokens == len(told)
            tokens = told if len(request.prompt) < 200 else (*told[:-1], told[-1] + 1)
            done.append(Completion(len(request.prompt), tokens, None, (), (), "length", 1, 0, 0))
        return done


def test_a_number_is_found_when_all_its_tokens_come(form, monkeypatch):
    cfg = dsv3.preset("tiny").replace(max_length=400)
    lengths, depths, made = (120, 300), (0.0, 0.5, 1.0), passkey_problems

    def remember(*args, **options):
        problems = made(*args, **options)
        Oracle.answers |= {tuple(p.prompt.tolist()): tuple(p.answer.tolist()) for p in problems}
        return problems

    monkeypatch.setattr(passkey, "passkey_problems", remember)
    monkeypatch.setattr(passkey, "Engine", Oracle)
    read = []
    grid = passkey_grid(
        cfg, None, None, form, FILLER, lengths=lengths, depths=depths, trials=3, seed=1, progress=read.append
    )  # fmt: skip
    assert grid.lengths == [120, 300] and grid.depths == [0.0, 0.5, 1.0] and grid.trials == 3
    assert grid.found == [[1.0] * 3, [0.0] * 3]
    assert grid.tokens[0] == [1.0] * 3 and all(0.5 < share < 1 for share in grid.tokens[1])
    assert read == [120 * 9, 300 * 9]
    first, Oracle.seen = Oracle.seen, []
    passkey_grid(cfg, None, None, form, FILLER, lengths=lengths, depths=depths, trials=3, seed=1)
    assert Oracle.seen == first and len(set(first)) == 18
    Oracle.seen = []
    passkey_grid(cfg, None, None, form, FILLER, lengths=lengths, depths=depths, trials=3, seed=2)
    assert not set(Oracle.seen) & set(first)


def test_a_real_model_reads_the_prompts(form, monkeypatch):
    """Against greedy decoding by whole forward passes."""
    cfg = dsv3.preset("tiny").replace(max_length=400, vocab_size=300)
    params, router = dsv3.model_init([0, 3], cfg), dsv3.router_init(cfg)
    told, score = [], passkey._score
    monkeypatch.setattr(passkey, "_score", lambda tokens, problem: (told.append(list(tokens)), score(tokens, problem))[1])
    grid = passkey_grid(cfg, params, router, form, FILLER, lengths=(110,), depths=(0.5,), trials=1)
    hits = []
    for problem, said in zip( passkey_problems(form, FILLER, length=110, depth=0.5, trials=1), told, strict=True):
        tokens = problem.prompt.tolist()
        for _ in problem.answer:
            logits = dsv3.model_apply(params, router, [tokens], cfg=cfg).logits
            tokens.append(int(np.argmax(logits[0, -1])))
        assert tokens[110:] == said
        hits.append(np.mean(np.array(tokens[110:]) == problem.answer))
    assert grid.tokens == [[pytest.approx(np.mean(hits))]] and grid.found == [[np.mean([hit == 1 for hit in hits])]]


def test_grids_are_kept_and_drawn(tmp_path):
    grid = PasskeyGrid([128, 1024], [0.0, 1.0], 4, [[1.0, 0.75], [0.25, 0.0]], [[1.0, 0.9], [0.5, 0.2]])
    save_grid(tmp_path / "grid.json", grid)
    assert load_grid(tmp_path / "grid.json") == grid
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
    plot = plot_grids(tmp_path / "grid.png", {"before": grid, "after": grid}, {"before": 128})
    assert plot.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="`grids` is empty"):
        plot_grids(tmp_path / "none.png", {})


def test_bad_input_is_named(form):
    cfg = dsv3.preset("tiny")
    for options, words in (
        ({"trials": 0}, "`trials` is 0, want at least 1"),
        ({"depths": ()}, "`depths` is empty"),
        ({"lengths": ()}, "`lengths` is empty"),
        ({"lengths": (100, 90)}, "`lengths` is \\(100, 90\\), want each longer"),
        ({"lengths": (120,)}, "`lengths` has 120, want at most 118, max_length=128"),
    ):
        with pytest.raises(ValueError, match=words):
            passkey_grid(cfg, None, None, form, FILLER, **({"lengths": (100,), "depths": (0.5,)} | options))
    with pytest.raises(ValueError, match="`filler` has 90 tokens, want at least 100"):
        passkey_grid(cfg, None, None, form, FILLER[:90], lengths=(100,), depths=(0.5,))
