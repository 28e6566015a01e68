"""`examples/solve.py` as its user runs it: answers, their rewards, rows of right ones, and bad input."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import dsv3
from dsv3.data import load_tokenizer, read_conversations, save_tokenizer, special_ids, train_tokenizer
from dsv3.pretrained import save_pretrained
from dsv3.rl.countdown import count_tries
from tests.more import LONG
from tests.small import model_config, random_params

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

# A model of random parameters is never right, so what it says is replaced, problem by problem and sample by sample: by the
# seed of each request. `@n` interrupts when answers are drawn for the n-th time, `~` cuts a line of the folder torn off.
DRIVER = """
import contextlib, dataclasses, io, json, sys
import solve
from absl.testing import flagsaver
from dsv3.rl.rollout import sample_seed

def thought(answer, *lines):
    return "<think>\\n" + "\\n".join(lines) + f"\\n</think>\\n<answer>{answer}</answer>"

calls = []
SAID = [
    thought("1+2", "1+2=3 3? yes"), thought("2+1", "2-1=1 3? no", "1+2=3 3? yes"), "<answer>1+2</answer>",
    thought("1+2", "1+2=3 3? yes"), thought("5-4", "5-4=1 1? yes"), "what", "what", thought("5+4", "5+4=9 1? no"),
]
generate = solve.Engine.generate
# Of two turns the last answer counts.
WHICH = {sample_seed(0, 0, i // 4, i % 4): text for i, text in enumerate(SAID)}
LATER = {sample_seed(0, 0, 0, i, 1): text for i, text in enumerate(SAID[:4])}

def say(engine, requests):
    if f"@{len(calls)}" in arguments:
        raise KeyboardInterrupt
    calls.append([list(request.prompt) for request in requests])
    ends.append(requests[0].stop_tokens)
    done = generate(engine, requests)
    assert len({tuple(one.tokens) for one in done}) > 1, "samples differ"
    texts = [LATER.get(one.seed, "Wait." if turns else WHICH.get(one.seed)).removeprefix(opened) for one in requests]
    return [dataclasses.replace(one, text=text, finish_reason="stop") for one, text in zip(done, texts)]

solve.Engine.generate = say
for arguments in json.loads(sys.argv[1]):
    opened = "<think>\\n" if "--model=opening" in arguments else ""
    turns = "--problems=turns.jsonl" in arguments
    calls, ends = [], []
    if "~" in arguments:
        with open("torn/answers.part.jsonl", "a") as file:
            file.write('{"problem": 1, "sample": 0, "te')
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            given = [argument for argument in arguments if argument[0] not in "@~"]
            code = solve.main(solve.parse_flags(["solve.py", *given]))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), ends[-1] if ends else None, calls]), flush=True)
"""

RUN = [
    "--model=model", "--problems=problems.jsonl", "--chat", "--samples=4", "--keep=2", "--reward=countdown:1,format:0.5",
    "--max_new_tokens=4", "--out=answers",
]  # fmt: skip
BAD = {
    "no model": (["--model=nowhere"], "nowhere"),
    "no problems": (["--problems=nowhere.jsonl"], "nowhere.jsonl"),
    "turns after an opened thought": (
        ["--problems=turns.jsonl", "--model=opening"], "turns.jsonl:1: encode_turns: the chat template of 'opening' "
    ),
    "no room": (["--max_new_tokens=60"], "rollout: problems.jsonl:1 has"),
    "a reward": (["--reward=honesty"], "--reward has 'honesty', want some of accuracy, code, countdown"),
    "a reference": (
        ["--problems=other.jsonl"],
        "other.jsonl:3, '1+2': countdown: the reference is 3, want a mapping with `numbers` and `target`",
    ),
    "no reference": (["--problems=null.jsonl"], "read_rows: 'null.jsonl' line 2: 'reference' is None, want what an answer"),
    "a template that fails": (
        ["--model=failing"], "problems.jsonl:2: render_chat: the chat template of 'failing' refuses the messages: no nines",
    ),
    "a template that breaks out": (
        ["--model=breaking"], "problems.jsonl:1: render_chat: the chat template of 'breaking' tries what its sandbox",
    ),
    "a language": (["--reward=language:1", "--language=xx"], "--reward 'language:1': make_language_reward: `language` is"),
    "a total without keeping": (["--keep=0", "--keep_total=1"], "--keep_total is 1.0, but no --keep is given"),
    "a number": (["--samples=0"], "flag --samples=0"),
}  # fmt: skip
TORN = [*RUN, "--out=torn", "--max_batch=1"]


PLAIN = [*(flag for flag in RUN if flag != "--chat"), "--template=Say: {question}", "--out=plain"]
GRADED = [*RUN, "--reward=countdown:1,format:-0.5"]
GOOD = {
    "kept": RUN, "measured": [*RUN, "--keep=0", "--out=other"], "plain": PLAIN,
    "opening": [*RUN, "--model=opening", "--out=opened"],
    "stopped": [*TORN, "@1"], "others": [*TORN, "--temperature=0.5"], "gone on": [*TORN, "~"],
    "clock stopped": [*TORN, "--model=clock", "--out=timed", "@1"], "clock": [*TORN, "--model=clock", "--out=timed"],
    "stopped again": [*TORN, "--out=anew", "@1"], "fresh": [*TORN, "--out=anew", "--temperature=0.5", "--fresh"],
    "best": [*GRADED, "--keep=1", "--out=best"], "enough": [*GRADED, "--keep=3", "--keep_total=1", "--out=enough"],
    "three": [*RUN, "--keep=3", "--out=three"],
    "turns": [*RUN, "--problems=turns.jsonl", "--out=turns"],
    "plain turns": [*PLAIN, "--problems=turns.jsonl", "--turn_template=And: {question}", "--out=plain_turns"],
}  # fmt: skip


def write_inputs(folder):
    """Models, their templates, and problems."""
    tokenizer = train_tokenizer(["Make 3 from 1 2."], 270)
    ids = special_ids(tokenizer)
    cfg = model_config(vocab_size=270, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0,
                       max_position_embeddings=64).replace(bos_id=ids.bos, eos_ids=(ids.eos,), pad_id=ids.pad)  # fmt: skip
    save_pretrained(folder / "model", cfg, random_params(dsv3.model_specs(cfg), std=0.1), dsv3.router_init(cfg))
    save_tokenizer(tokenizer, folder / "model")
    rows = [{"prompt": "Make 3 from 1 2.", "reference": {"numbers": [1, 2], "target": 3}},
            {"prompt": "Make 9 from 5 4.", "reference": {"numbers": [5, 4], "target": 9}}]  # fmt: skip
    shutil.copytree(folder / "model", folder / "opening")
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    (folder / "opening" / "chat_template.jinja").write_text(template)
    described = json.loads((folder / "opening" / "tokenizer_config.json").read_text())
    (folder / "opening" / "tokenizer_config.json").write_text(json.dumps(described | {"eos_token": "<｜User｜>"}))
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, source in (
        ("failing", "{% if '9' in messages[0].content %}{{ raise_exception('no nines') }}{% endif %}"),
        ("breaking", "{{ messages.__class__ }}"),
        ("clock", "{{ bos_token }}{{ strftime_now('%f') }}{% for m in messages %}{{ m.content }}{% endfor %}"),
    ):
        shutil.copytree(folder / "model", folder / name)
        (folder / name / "chat_template.jinja").write_text(source)
    (folder / "other.jsonl").write_text(json.dumps(rows[0]) + "\n\n" + json.dumps({"prompt": "1+2", "reference": 3}))
    (folder / "null.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | {"reference": None}))
    (folder / "turns.jsonl").write_text(json.dumps(rows[0] | {"prompt": ["1 2?", "3?"]}))
    (folder / "other").mkdir()
    (folder / "other" / "rows.jsonl").write_text("of an earlier run")


def run_all(folder, cases):
    """What each call gives, in one process."""
    write_inputs(folder)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(list(cases.values()))], capture_output=True, text=True, timeout=400,
        cwd=folder, env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """One run, and bad input."""
    bad = {case: [*RUN, *flags, "--out=bad"] for case, (flags, _) in BAD.items()}
    return run_all(tmp_path_factory.mktemp("few"), {"kept": RUN} | bad)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("solve"), GOOD)


def test_answers_are_judged_and_right_ones_kept(few):
    folder, found = few
    code, out, err, *_ = found["kept"]
    assert code == 0, err
    numbers = json.loads((folder / "answers" / "results.json").read_text())
    # Problem 1: all four are right, one has not the form. Problem 2: of four one is right.
    assert (numbers["problems"], numbers["samples"], numbers["kept"]) == (2, 4, 3)
    assert numbers["accuracy"] == (4 + 1) / 8 and numbers["any_right"] == 1 and numbers["all_right"] == 0.5
    assert numbers["standard_error"] == pytest.approx(0.375)  # of 1 and 0.25
    assert numbers["rewards"] == {"countdown": 5 / 8, "format": 5 / 8}
    assert "62.5% ± 37.5% of 2 problems" in out
    assert "answers/rows.jsonl: 3 conversations; 0 problems have no answer to keep" in out and "for 8 answers" in out
    answers = [json.loads(line) for line in (folder / "answers" / "answers.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in answers] == [(i, j) for i in range(2) for j in range(4)]
    assert answers[0]["prompt"] == "Make 3 from 1 2." and answers[0]["total"] == 1.5
    counts = [count_tries(row["text"], row["reference"]) for row in answers]
    assert numbers["tries"] == sum(count.tries for count in counts) / 8 and numbers["tried_again"] == 2 / 8
    assert numbers["right_after_rejecting"] == 1 and numbers["corrected"] == 2 / 8
    assert numbers["misjudged"] == 2 / sum(count.tries for count in counts) and numbers["wrong_steps"] == 0
    # Five of eight answers have a try; of the two that rejected one, both went on to be right.
    assert numbers["checked"] == 5 / 8
    lines = {line.partition("  ")[0]: line.rsplit("  ")[-1] for line in map(str.strip, out.splitlines())}
    assert lines["answers that check a try"] == "62.5%" and lines["answers that reject a try"] == "25.0%"
    assert lines["right after it"] == "100.0%, which are 25.0% of all"
    rows = read_conversations(folder / "answers" / "rows.jsonl")
    asked = [[message["content"] for message in row.messages] for row in rows]
    assert [question for question, _ in asked] == ["Make 3 from 1 2."] * 2 + ["Make 9 from 5 4."]
    assert [answer for _, answer in asked] == [answers[i]["text"] for i in (0, 1, 7)], "different ones, with all rewards"


def kept(folder, name):
    rows = read_conversations(folder / name / "rows.jsonl")
    return [tuple(message["content"] for message in row.messages) for row in rows]


@LONG
def test_right_answers_are_kept_whatever_else_they_are_worth_and_those_with_most_first(results):
    folder, found = results
    said = [json.loads(line)["text"] for line in (folder / "answers" / "answers.jsonl").read_text().splitlines()]
    one, two = "Make 3 from 1 2.", "Make 9 from 5 4."
    # Of the first problem's right answers one has no form, and is worth 1 instead of 1.5; of the second's one is right.
    assert kept(folder, "three") == [(one, said[0]), (one, said[1]), (one, said[2]), (two, said[7])]
    # With the form as a malus it is the best one, and the second problem still has its own, of less.
    assert kept(folder, "best") == [(one, said[2]), (two, said[7])]
    assert kept(folder, "enough") == [(one, said[2])]
    assert "enough/rows.jsonl: 1 conversations; 1 problems have no answer to keep" in found["enough"][1]
    numbers = json.loads((folder / "enough" / "results.json").read_text())
    assert (numbers["kept"], numbers["kept_problems"], numbers["problems"]) == (1, 1, 2)


@LONG
def test_an_interrupted_run_goes_on_with_what_is_left(results):
    folder, found = results
    code, _, err, *_ = found["stopped"]
    assert code == 130 and err == "solve: interrupted; the same command goes on\n"
    code, _, err, _, calls = found["others"]
    assert code == 2 and calls == [] and err.count("\n") == 1
    assert "`temperature` is 0.5 here, 1.0 there; another --out keeps both, --fresh starts anew" in err
    code, out, err, _, calls = found["gone on"]
    assert code == 0 and len(calls) == 1 and len(calls[0]) == 4, err
    assert "4 answers are there" in out and "for 4 answers" in out
    for name in ("answers.jsonl", "rows.jsonl"):
        assert (folder / "torn" / name).read_bytes() == (folder / "answers" / name).read_bytes()
    whole, torn = (json.loads((folder / name / "results.json").read_text()) for name in ("answers", "torn"))
    assert (whole.pop("drawn"), torn.pop("drawn")) == (8, 4) and whole.pop("seconds") > 0 < torn.pop("seconds")
    assert whole == torn and not (folder / "torn" / "answers.part.jsonl").exists()
    code, _, _, _, calls = found["fresh"]
    assert found["stopped again"][0] == 130 and code == 0 and len(calls) == 2, "--fresh draws all anew"


@LONG
def test_a_template_that_tells_the_time_is_told_when_the_run_was_begun(results):
    _, found = results
    (*_, stopped), (code, _, err, _, gone_on) = found["clock stopped"], found["clock"]
    assert code == 0, err
    (first,), (second,) = ({tuple(prompt) for prompt in calls[0]} for calls in (stopped, gone_on))
    assert first[:7] == second[:7] and first != second, "begin-of-sentence and six digits"


@LONG
def test_problems_of_several_turns(results):
    folder, found = results
    tokenizer = load_tokenizer(folder / "model")
    code, out, err, _, (first, second) = found["turns"]
    assert code == 0 and len(first) == len(second) == 4, err
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in (first[0], second[0])]
    assert texts[0] == "<｜begin▁of▁sentence｜><｜User｜>1 2?<｜Assistant｜>"
    assert texts[1].startswith(texts[0]) and texts[1].endswith("<｜User｜>3?<｜Assistant｜>")
    answers = [json.loads(line) for line in (folder / "turns" / "answers.jsonl").read_text().splitlines()]
    assert [len(row["texts"]) for row in answers] == [2] * 4 and answers[0]["name"] == "turns.jsonl:1"
    assert answers[0]["text"] == "\n".join(answers[0]["texts"]) and answers[0]["total"] == 1
    assert kept(folder, "turns")[0] == ("1 2?", "Wait.", "3?", answers[0]["texts"][1])
    code, _, err, _, (first, second) = found["plain turns"]
    assert code == 0 and tokenizer.decode(second[0]).endswith("And: 3?"), err


@LONG
def test_rows_have_the_question_without_the_template(results):
    folder, found = results
    assert found["plain"][0] == 0 and found["plain"][3] is None, found["plain"]
    answers, rows = ((folder / "plain" / name).read_text().splitlines() for name in ("answers.jsonl", "rows.jsonl"))
    assert json.loads(answers[0])["prompt"] == "Say: Make 3 from 1 2."
    assert json.loads(rows[0])["messages"][0]["content"] == "Make 3 from 1 2."


@LONG
def test_a_template_that_opens_the_thinking(results):
    folder, found = results
    code, _, err, ends, _ = found["opening"]
    assert code == 0 and len(ends) == 2, "the template's own token ends an answer, too"
    assert (folder / "opened" / "rows.jsonl").read_bytes() == (folder / "answers" / "rows.jsonl").read_bytes()
    answers = [json.loads(line) for line in (folder / "opened" / "answers.jsonl").read_text().splitlines()]
    assert all(row["text"].startswith("<think>\n") for row in answers) and answers[0]["total"] == 1.5


@LONG
def test_without_keep_there_are_no_rows(results):
    folder, found = results
    assert found["measured"][0] == 0 and not (folder / "other" / "rows.jsonl").exists()
    assert (folder / "other" / "answers.jsonl").read_bytes() == (folder / "answers" / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(few, case):
    folder, found = few
    code, out, err, *_ = found[case]
    assert code == 2, (out, err)
    assert err.startswith("solve: ") and err.count("\n") == 1 and BAD[case][1] in err, err
    assert not (folder / "bad").exists()
