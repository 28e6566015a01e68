"""`examples/distill.py` and `distill_store.py` as their user runs them: all three sources, interrupted, given bad input."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import dsv3
from dsv3.data import (
    chat_codec,
    embedded_conversations,
    encode_prompt,
    find_chat_template,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from dsv3.data.default_template import DEFAULT_CHAT_TEMPLATE
from dsv3.pretrained import load_pretrained, save_pretrained
from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from dsv3.train.records import read_rows
from tests.more import MORE
from tests.small import model_config, random_params

pytestmark = pytest.mark.skipif(not MORE, reason="long cases: the runs that most of them look at take more than a minute")
EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
VOCAB = 330

# Runs the programs in one process. `@n` sends the signal that Ctrl-C sends when batch n is asked for; `%name` copies the
# store that is whole to a folder of that name, `~name` cuts it off there as a kill does, `^name` changes a bit of it.
DRIVER = """
import contextlib, importlib, io, json, os, pathlib, shutil, signal, sys
import hush
import numpy as np
from absl import flags
from absl.testing import flagsaver

def cut(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": manifest["shards"][:2]}))
    (folder / ".shard-00002.safetensors.part").write_bytes(b"begun")
    os.truncate(folder / "shard-00001.safetensors", 100)
    (folder / "shard-00002.safetensors").unlink()

def change(folder):
    data = bytearray((folder / "shard-00001.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "shard-00001.safetensors").write_bytes(data)

for program, calls in json.loads(sys.argv[1]):
    others = set(flags.FLAGS)
    module = importlib.import_module(program)
    if program == "distill":
        import distill_train
        micro = distill_train.micro
    for arguments in calls:
        stops = [int(argument[1:]) for argument in arguments if argument[0] == "@"]
        for argument in arguments:
            if argument[0] in "%~^":
                folder = pathlib.Path(argument[1:])
                shutil.copytree("full", folder)
                {"%": lambda folder: None, "~": cut, "^": change}[argument[0]](folder)
        if program == "distill":
            seen = []

            def noted(batch):
                seen.append(batch)
                if len(seen) - 1 in stops:
                    os.kill(os.getpid(), signal.SIGINT)
                return micro(batch)

            distill_train.micro = module.distill_policy.micro = noted
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
            try:
                given = [argument for argument in arguments if argument[0] not in "@%~^"]
                code = module.main(module.parse_flags([f"{program}.py", *given]))
            except SystemExit as end:
                code = end.code
        print(json.dumps([code, out.getvalue(), err.getvalue().splitlines()]), flush=True)
        if "--out=policy" in arguments or "--out=turns" in arguments:
            names = ("tokens", "weights", "segments")
            file = "turns.npz" if "--out=turns" in arguments else "drawn.npz"
            np.savez(file, **{name: np.concatenate([getattr(batch, name) for batch in seen]) for name in names})
    for name in set(flags.FLAGS) - others:
        delattr(flags.FLAGS, name)
"""

ROWS = "--data=rows.jsonl --max_length=100".split()
STORE = ["--teacher=teacher", *ROWS, f"--k={VOCAB}", "--shard_rows=3", "--batch_size=2"]
STORES = {
    "full": [*STORE, "--out=full"],
    "gone on": [*STORE, "--out=torn", "~torn"],
    "few": [*STORE, "--k=8", "--precision=float16", "--out=few"],
}
BAD_STORES = {
    "k": ([*STORE, "--k=331", "--out=no"], "--k is 331, want at most the vocabulary of --teacher 'teacher', 330"),
    "k of none": ([*STORE, "--k=0", "--out=no"], "flag --k=0: 0 is not a positive integer"),
    "temperature": ([*STORE, "--temperature=0", "--out=no"], "--temperature is 0.0, want above 0"),
    "share": ([*STORE, "--heldout=1", "--out=no"], "--heldout is 1.0, want a share above 0 and below 1"),
    "no teacher": ([*STORE, "--teacher=nowhere", "--out=no"], "--teacher 'nowhere' is no folder, want a checkpoint's"),
    "rows": ([*STORE, "--data=other.jsonl", "--out=no"], r"'other.jsonl' line 1: the fields are \['text'\]"),
    "length": ([*STORE, "--max_length=129", "--out=no"], "--max_length is 129, want at most the model's context, 128"),
    "other settings": (
        [*STORE, "--temperature=2", "--out=full"],
        "the store in 'full', other settings: `temperature` is 2.0 here, 1.0 there; another --out keeps both",
    ),
    "other shards": ([*STORE, "--shard_rows=4", "--out=full"], "`shard_rows` is 4 here, 3 there"),
    "foreign": ([*STORE, "--out=model"], r"--out 'model' holds \['config.json'\], which is no part of a store"),
    "argument": ([*STORE, "--out=no", "rows"], r"unexpected argument \['rows'\]"),
    "fresh and wrong": ([*STORE, "--max_length=9", "--out=kept", "--fresh", "%kept"], "the conversation has .* tokens, "),
}  # fmt: skip

RUN = ["--model=model", *ROWS, "--batch_size=2", "--epochs=1", "--lr=3e-3", "--lr_end=1e-3", "--samples=0", "--eval_every=3"]
TEACHER = [*RUN, "--teacher=teacher"]
STORED = [*RUN, "--stored=full"]
POLICY = (
    "--model=model --teacher=teacher --on_policy --problems=problems.jsonl --prompts=2 --max_new_tokens=4 --lr=3e-3 "
    "--lr_end=1e-3 --samples=1 --eval_every=2 --mtp_weight=0 --heldout=0.3"
).split()
EXPLORE = [*POLICY, "--explorations=2", "--accumulate=2", "--reward=number:1,language:0"]
GOOD = {
    "teacher": [*TEACHER, "--out=teacher_run", "--samples=1"],
    "interrupted": [*STORED, "--out=stored_run", "@1"],
    "again": [*STORED, "--out=stored_run"],
    "policy": [*EXPLORE, "--out=policy"],
    "policy stopped": [*EXPLORE, "--out=broken", "@0"],
    "policy again": [*EXPLORE, "--out=broken"],
    "few tokens": [*RUN, "--stored=few", "--out=few_run"],
    "turns": [*POLICY, "--problems=turns.jsonl", "--explorations=1", "--reward=number:1", "--out=turns"],
}
BAD = {
    "no source": (RUN, "neither --teacher nor --stored is given, want one of them"),
    "two sources": ([*TEACHER, "--stored=full"], "--teacher and --stored are both given, want one of them"),
    "on policy of a store": ([*STORED, "--on_policy"], "--on_policy is given with --stored, want --teacher"),
    "another vocabulary": (
        [*RUN, "--teacher=large"],
        "--teacher 'large' and --model 'model' have vocabularies of 400 and 330 tokens, want the same",
    ),
    "another tokenizer": (
        [*RUN, "--teacher=foreign"], "--teacher 'foreign' and --model 'model' have different tokenizers, .*, want the same",
    ),
    "a short teacher": (
        [*RUN, "--teacher=short"], "rows have 100 tokens, want at most the context of --teacher 'short', 64",
    ),
    "no teacher": ([*RUN, "--teacher=nowhere"], "--teacher 'nowhere' is no folder, want a checkpoint's"),
    "no model": ([*TEACHER, "--model=nowhere"], "nowhere"),
    "another template": (
        [*STORED, "--chat_template=other.jinja"], "--stored 'full' does not fit: `template` is '.*' here, '.*' there",
    ),
    "other data": ([*STORED, "--data=others.jsonl"], "--stored 'full' does not fit: `data` is '.*' here, '.*' there"),
    "another temperature": (
        [*STORED, "--temperature=2"], "--stored 'full' does not fit: `temperature` is 2.0 here, 1.0 there",
    ),
    "another seed": ([*STORED, "--seed=1"], "--stored 'full' does not fit: `seed` is 1 here, 0 there"),
    "a student of another tokenizer": (
        [*STORED, "--model=foreign"], "--stored 'full' does not fit: .*`tokenizer` is '.*' here, '.*' there",
    ),
    "a student of another vocabulary": (
        [*STORED, "--model=large"], "--stored 'full' does not fit: `vocab_size` is 400 here, 330 there",
    ),
    "a changed shard": (
        [*RUN, "--stored=changed", "^changed"],
        "the store in 'changed': shard-00001.safetensors has another SHA-256 than its manifest says",
    ),
    "half a store": ([*RUN, "--stored=half", "~half"], "the store in 'half' is not complete, 2 of 4 shards are there"),
    "no store": ([*RUN, "--stored=model"], "--stored 'model' holds no manifest.json, want what distill_store.py writes"),
    "a temperature": ([*TEACHER, "--temperature=0"], "--temperature is 0.0, want above 0"),
    "a mixture": ([*TEACHER, "--kind=jsd", "--mix=1"], "--mix is 1.0, want above 0 and below 1"),
    "a kind": ([*TEACHER, "--kind=both"], "flag --kind=both: value should be one of <forward|reverse|jsd>"),
    "a weight": ([*TEACHER, "--nll_weight=nan"], "--nll_weight is nan, want a number"),
    "problems of rows": (
        [*TEACHER, "--problems=problems.jsonl"], "--problems is given, which is not read without --on_policy",
    ),
    "rows of problems": ([*POLICY, "--epochs=1"], "--epochs is given, which is not read with --on_policy"),
    "no problems": ([*TEACHER, "--on_policy"], "--data is given, which is not read with --on_policy"),
    "no problems at all": (
        ["--model=model", "--teacher=teacher", "--on_policy"], "--on_policy is given, but no --problems, want a file",
    ),
    "few problems": (
        [*POLICY, "--heldout=0.999999"], "--problems has 0 problems to train on and 20 that are held out, want at least one",
    ),
    "none held out": ([*POLICY, "--heldout=0"], "--heldout is 0.0, want a share above 0 and below 1"),
    "a long problem": (
        [*POLICY, "--problems=long.jsonl"], r"rollout: long.jsonl:13 has \d+ tokens and wants room for 1 answer of 4, ",
    ),
    "no reference": ([*POLICY, "--problems=null.jsonl"], "read_rows: 'null.jsonl' line 4: 'reference' is None, want what"),
    "a reference": (
        [*POLICY, "--problems=wrong.jsonl", "--reward=countdown"],
        "wrong.jsonl:5, '4\\+4=': countdown: the reference is '8', want a mapping",
    ),
    "a template that fails": (
        [*POLICY, "--chat_template=failing.jinja"],
        "problems.jsonl:8: render_chat: --chat_template 'failing.jinja' refuses the messages: no sevens",
    ),
    "a template that breaks out": (
        [*POLICY, "--chat_template=breaking.jinja"],
        "problems.jsonl:1: render_chat: --chat_template 'breaking.jinja' tries what its sandbox forbids",
    ),
    "turns that change": (
        [*POLICY, "--problems=turns.jsonl", "--chat_template=opening.jinja"],
        "turns.jsonl:1: encode_next: --chat_template 'opening.jinja' changes what came before once another question follows",
    ),
    "a language without problems": ([*TEACHER, "--language=de"], "--language is given, which is not read without --on_po"),
    "a teacher of another template": ([*RUN, "--teacher=spoken"], "want at most the context of --teacher 'spoken', 64"),
    "a reward": ([*POLICY, "--reward=honesty"], "--reward has 'honesty', want some of accuracy, code, countdown"),
    "odd parts": (
        [*POLICY, "--accumulate=3"], "2 answers, --prompts times --group_size, are not divisible by --accumulate 3",
    ),
    "a policy's vocabulary": ([*POLICY, "--teacher=large"], "have vocabularies of 400 and 330 tokens, want the same"),
    "other settings": ([*TEACHER, "--out=teacher_run", "--kind=jsd"], "`kind` is 'jsd' here, 'forward' there"),
    "another source": ([*STORED, "--out=teacher_run"], "`stored` is '.*' here, None there"),
    "another form": ([*POLICY, "--out=teacher_run"], "other settings: .*; another --out keeps both"),
    "fresh on its own teacher": (
        [*RUN, "--teacher=own/export", "--out=own", "--fresh"], "--fresh would delete --teacher 'own/export', which lies in",
    ),
    "fresh on its own store": (
        [*RUN, "--stored=own/checkpoints", "--out=own", "--fresh", "%own/checkpoints"],
        "--fresh would delete --stored 'own/checkpoints', which lies in",
    ),
    "fresh on its policy's teacher": (
        [*POLICY, "--teacher=own/export", "--out=own", "--fresh"], "--fresh would delete --teacher 'own/export', which lies",
    ),
    "fresh on another program's run": ([*TEACHER, "--out=tuned", "--fresh"], "--out 'tuned' holds a run of sft.py"),
}  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    conversations = [row for row in embedded_conversations(60) if sum(len(m["content"]) for m in row.messages) < 100]
    text = "\n".join(message["content"] for row in conversations for message in row.messages)
    tokenizer = train_tokenizer([text] * 3, VOCAB)
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    student = model_config(**sizes, vocab_size=VOCAB, max_position_embeddings=128)
    teacher = student.replace(num_hidden_layers=2, hidden_size=16)
    for name, cfg, tokens in (
        ("model", student, tokenizer), ("teacher", teacher, tokenizer),
        ("short", teacher.replace(max_position_embeddings=64), tokenizer),
        ("foreign", teacher, train_tokenizer([text[::-1]] * 3, VOCAB)),
        ("large", teacher.replace(vocab_size=400), train_tokenizer([text] * 3, 400)),
    ):  # fmt: skip
        assert tokens.get_vocab_size() == cfg.vocab_size
        params = random_params(dsv3.model_specs(cfg), seed=cfg.num_layers, std=0.2)
        save_pretrained(folder / name, cfg, params, dsv3.router_init(cfg))
        save_tokenizer(tokens, folder / name)
    write_rows(folder / "rows.jsonl", [{"messages": row.messages} for row in conversations[:24]])
    write_rows(folder / "others.jsonl", [{"messages": row.messages} for row in conversations[1:24]])
    write_rows(folder / "other.jsonl", [{"text": "Hi"}])
    write_rows(folder / "problems.jsonl", [{"prompt": f"{a}+{a}=", "reference": str(2 * a)} for a in range(20)])
    write_rows(folder / "turns.jsonl", [{"prompt": [f"{a}+1=", "2+2="], "reference": "4"} for a in range(9)])
    write_rows(folder / "long.jsonl", [{"prompt": "1" * (200 * (a == 12)) + f"{a}=", "reference": "2"} for a in range(20)])
    write_rows(folder / "null.jsonl", [{"prompt": f"{a}=", "reference": None if a == 3 else "2"} for a in range(9)])
    numbers = {"numbers": [1, 2], "target": 3}
    write_rows(folder / "wrong.jsonl", [{"prompt": f"{a}+{a}=", "reference": "8" if a == 4 else numbers} for a in range(20)])
    (folder / "failing.jinja").write_text(
        "{% if '7' in messages[0].content %}{{ raise_exception('no sevens') }}{% endif %}" + DEFAULT_CHAT_TEMPLATE
    )
    (folder / "breaking.jinja").write_text("{{ messages.__class__ }}")
    opened = DEFAULT_CHAT_TEMPLATE.replace("{{- '<｜Assistant｜>' -}}", "{{- '<｜Assistant｜><think>\\n' -}}")
    (folder / "opening.jinja").write_text(opened)
    shutil.copytree(folder / "short", folder / "spoken")
    (folder / "spoken" / "chat_template.jinja").write_text("{# another one #}" + DEFAULT_CHAT_TEMPLATE)
    (folder / "other.jinja").write_text("{# another one #}" + DEFAULT_CHAT_TEMPLATE)
    shutil.copytree(folder / "teacher", folder / "own" / "export")
    (folder / "own" / "run.json").write_text('{"program": "distill"}')
    (folder / "tuned").mkdir()
    (folder / "tuned" / "run.json").write_text('{"program": "sft"}')
    return folder


@pytest.fixture(scope="module")
def results(folder):
    stores = STORES | {f"store: {what}": arguments for what, (arguments, _) in BAD_STORES.items()}
    runs = GOOD | {what: arguments for what, (arguments, _) in BAD.items()}
    calls = [("distill_store", list(stores.values())), ("distill", list(runs.values()))]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(calls)], capture_output=True, text=True, timeout=600, cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip([*stores, *runs], map(json.loads, done.stdout.splitlines()), strict=True))


def rows_of(folder, kind):
    return [row for row in read_rows(folder / "log.jsonl") if row["kind"] == kind]


@pytest.mark.parametrize("what", BAD_STORES)
def test_bad_input_of_the_store_is_one_line(results, what):
    code, _, lines = results[f"store: {what}"]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("distill_store: "), lines
    assert re.search(BAD_STORES[what][1], lines[0]), lines[0]


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(results, what):
    code, _, lines = results[what]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("distill: "), lines
    assert re.search(BAD[what][1], lines[0]), lines[0]


def test_a_teacher_of_another_template_is_told(results):
    said = "the chat template is the student's; spoken has another one, and may not know this one's format"
    assert said in results["a teacher of another template"][1] and "template" not in results["a short teacher"][1]


def test_a_store_says_its_size_and_its_share_of_probability(folder, results):
    code, printed, lines = results["full"]
    assert code == 0 and "330 tokens each: 100.00% of the probability" in printed, lines
    assert re.search(r"row (\d+)/\1  [\d,]+ tokens/s  ETA 0:00", lines[-1])
    code, printed, _ = results["few"]
    share = float(re.search(r"8 tokens each: ([\d.]+)% of the probability", printed)[1])
    size = float(re.search(r"bytes in 4 shards, ([\d.]+) a place", printed)[1])
    assert code == 0 and 8 / 330 < share / 100 < 0.9
    assert 8 * 6 + 4 < size < 8 * 6 + 4 + 20, "headers, and nothing but the places that count"


def test_a_store_that_was_killed_goes_on_to_the_same_bytes(folder, results):
    code, printed, _ = results["gone on"]
    assert code == 0 and printed.count(" is there") == 1 and "shard-00000.safetensors is there" in printed
    whole, torn = ({p.name: p.read_bytes() for p in (folder / name).glob("[a-z]*")} for name in ("full", "torn"))
    assert whole == torn and len(whole) == 5


def test_fresh_deletes_no_store_before_all_else_is_right(folder, results):
    kept, whole = ({path.name for path in (folder / name).glob("[a-z]*")} for name in ("kept", "full"))
    assert kept == whole and len(whole) == 5


def test_a_run_leaves_what_it_promises(folder, results):
    code, printed, lines = results["teacher"]
    assert code == 0, lines
    out = folder / "teacher_run"
    scores = json.loads((out / "results.json").read_text())
    held = rows_of(out, "heldout")
    assert held[0]["step"] == 0 and held[-1]["divergence"] == pytest.approx(scores["after"]["divergence"])
    assert scores["after"]["divergence"] < 0.95 * scores["before"]["divergence"]
    assert all(0 < row["divergence"] < row["nll"] + 6 for row in rows_of(out, "train"))
    for name in ("loss", "divergence", "learning_rate", "expert_load"):
        assert (out / "plots" / f"{name}.png").stat().st_size > 5000
    page, samples = (out / "report.html").read_text(), (out / "samples.txt").read_text()
    assert "Distillation run" in page and "divergence from the teacher, nats a token" in page
    assert "--- 1, after" in printed and samples.count(", before\n") == samples.count(", after\n") == 1
    cfg, params, _ = load_pretrained(out / "export", dtype="float32")
    template = find_chat_template(out / "export", load_tokenizer(out / "export"))
    assert cfg.num_layers == 1 and cfg.hidden_size == 12 and template.source == DEFAULT_CHAT_TEMPLATE
    before = load_pretrained(folder / "model", dtype="float32")[1]
    assert float(abs(params.embed - before.embed).numpy().max()) > 0
    assert load_pretrained(folder / "teacher", dtype="float32")[0].num_layers == 2


def test_whole_stored_distributions_are_the_running_teacher_also_after_an_interruption(folder, results):
    """Log-probabilities of size 10 in float32 are known to 1e-6; steps of 3e-3 hardly make more of it."""
    code, printed, _ = results["interrupted"]
    assert code == 130 and "SIGINT: saved at step 2 of" in printed
    code, printed, _ = results["again"]
    assert code == 0 and "going on from step 2" in printed
    want, got = (rows_of(folder / name, "train") for name in ("teacher_run", "stored_run"))
    assert len(want) >= 4 and [row["step"] for row in got] == list(range(1, len(want) + 1))
    for name, close in (("loss", 1e-4), ("divergence", 1e-4), ("nll", 1e-5), ("learning_rate", 1e-6)):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=close, err_msg=name)
    np.testing.assert_allclose(got[0]["divergence"], want[0]["divergence"], rtol=1e-5)
    assert [checkpoint_step(path) for path in list_checkpoints(folder / "stored_run" / "checkpoints")] == [2, len(want)]


def test_the_students_own_answers_are_learned_from(folder, results):
    code, printed, lines = results["policy"]
    assert code == 0, lines
    out = folder / "policy"
    train, held = rows_of(out, "train"), rows_of(out, "heldout")
    assert [row["step"] for row in train] == [1, 2] and [row["step"] for row in held] == [0, 2]
    assert all(0 < row["divergence"] < 20 for row in (*train, *held))
    assert set(held[0]["parts"]) == {"number", "language"} and 0 <= held[0]["accuracy"] <= 1
    scores = json.loads((out / "results.json").read_text())
    assert scores["after"]["divergence"] == pytest.approx(held[-1]["divergence"])
    assert scores["after"]["divergence"] != scores["before"]["divergence"]
    assert "right answers" in printed and "divergence from the teacher" in printed
    assert (out / "samples.txt").read_text().count(", after\n") == 1
    assert "On-policy distillation run" in (out / "report.html").read_text()
    assert load_pretrained(out / "export", dtype="float32")[0].num_layers == 1


def test_rows_are_problems_and_what_was_drawn_alone_counts(folder, results):
    tokenizer = load_tokenizer(folder / "model")
    codec = chat_codec(tokenizer, find_chat_template(folder / "model", tokenizer))
    asked = [encode_prompt(codec, [{"role": "user", "content": f"{a}+{a}="}]) for a in range(20)]
    drawn, seen = np.load(folder / "drawn.npz"), []
    assert len(drawn["tokens"]) == 4 and drawn["tokens"].shape[1] == max(map(len, asked)) + 4
    for tokens, weights, segments in zip(drawn["tokens"], drawn["weights"], drawn["segments"]):
        (number,) = [i for i, prompt in enumerate(asked) if tokens[: len(prompt)].tolist() == prompt]
        end, first = int(segments.sum()), len(asked[number])
        assert first < end <= first + 4 and segments[:end].all() and not tokens[end:].any()
        assert weights.nonzero()[0].tolist() == list(range(first - 1, end - 1)) and set(weights) == {0.0, 1.0}
        assert end == first + 4 or tokens[end - 1] == tokenizer.token_to_id(codec.template.eos)
        seen.append(number)
    assert len(set(seen)) == 4


def test_answers_to_every_turn_are_learned_from(folder, results):
    code, _, lines = results["turns"]
    assert code == 0 and [row["step"] for row in rows_of(folder / "turns", "train")] == [1], lines
    tokenizer, drawn = load_tokenizer(folder / "model"), np.load(folder / "turns.npz")
    for tokens, weights, segments in zip(drawn["tokens"], drawn["weights"], drawn["segments"]):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]]))).reshape(-1, 2)
        text = tokenizer.decode(tokens[: int(segments.sum())], skip_special_tokens=False)
        assert text.count("<｜User｜>") == len(edges) in (1, 2), "each answer counts, and a truncated one is the last"
        assert segments[: edges[-1, 1] + 1].all() and not segments[edges[-1, 1] + 1 :].any()


def test_explorations_go_on_to_the_same_numbers(folder, results):
    """The second exploration is drawn from the student as the first has made it."""
    assert results["policy stopped"][0] == 130 and results["policy again"][0] == 0
    want, got = (rows_of(folder / name, "train") for name in ("policy", "broken"))
    assert [row["step"] for row in got] == [1, 2]
    for name in ("loss", "divergence", "nll", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want], rtol=1e-4, err_msg=name)


def test_few_stored_tokens_bound_the_divergence_from_below(folder, results):
    code, printed, lines = results["few tokens"]
    assert code == 0 and "stored: 8 tokens of each place" in printed, lines
    few, every = (rows_of(folder / name, "train")[0]["divergence"] for name in ("few_run", "teacher_run"))
    assert 0 < few < every
