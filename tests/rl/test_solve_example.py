"""`examples/solve.py` as its user runs it: answers, their rewards, rows of right ones, and bad input."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import dsv3
from dsv3.data import read_conversations, save_tokenizer, special_ids, train_tokenizer
from dsv3.pretrained import save_pretrained
from dsv3.rl.countdown import count_tries
from tests.small import model_config, random_params

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

# A model of random parameters is never right, so what it says is replaced: problem by problem, sample by sample.
DRIVER = """
import contextlib, dataclasses, io, json, sys
import solve
from absl.testing import flagsaver

def thought(answer, *lines):
    return "<think>\\n" + "\\n".join(lines) + f"\\n</think>\\n<answer>{answer}</answer>"

ends = []
SAID = [
    thought("1+2", "1+2=3 3? yes"), thought("2+1", "2-1=1 3? no", "1+2=3 3? yes"), "<answer>1+2</answer>",
    thought("1+2", "1+2=3 3? yes"), thought("5-4", "5-4=1 1? yes"), "what", "what", thought("5+4", "5+4=9 1? no"),
]
generate = solve.Engine.generate

def say(engine, requests):
    ends.append(requests[0].stop_tokens)
    done = generate(engine, requests)
    assert len({tuple(one.tokens) for one in done}) > 1, "samples differ"
    return [dataclasses.replace(one, text=text.removeprefix(opened), finish_reason="stop") for one, text in zip(done, SAID)]

solve.Engine.generate = say
for arguments in json.loads(sys.argv[1]):
    opened = "<think>\\n" if "--model=opening" in arguments else ""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = solve.main(solve.parse_flags(["solve.py", *arguments]))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), ends.pop() if ends else None]), flush=True)
"""

RUN = [
    "--model=model", "--problems=problems.jsonl", "--chat", "--samples=4", "--keep=2", "--reward=countdown:1,format:0.5",
    "--max_new_tokens=4", "--out=answers",
]  # fmt: skip
BAD = {
    "no model": (["--model=nowhere"], "nowhere"),
    "no problems": (["--problems=nowhere.jsonl"], "nowhere.jsonl"),
    "several turns": (["--problems=turns.jsonl"], "--problems has a prompt of several turns, want one"),
    "no room": (["--max_new_tokens=60"], "with --max_new_tokens more than the model's 64"),
    "a reward": (["--reward=honesty"], "--reward has 'honesty', want some of accuracy, code, countdown"),
    "a reference": (["--problems=other.jsonl"], "countdown: the reference is 3, want a mapping with `numbers` and `target`"),
    "a number": (["--samples=0"], "flag --samples=0"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solve")
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
    (folder / "other.jsonl").write_text(json.dumps({"prompt": "1+2", "reference": 3}))
    (folder / "turns.jsonl").write_text(json.dumps({"prompt": ["1+2", "2+2"], "reference": 3}))
    (folder / "other").mkdir()
    (folder / "other" / "rows.jsonl").write_text("of an earlier run")
    plain = [*(flag for flag in RUN if flag != "--chat"), "--template=Say: {question}", "--out=plain"]
    opening = [*RUN, "--model=opening", "--out=opened"]
    good = {"kept": RUN, "measured": [*RUN, "--keep=0", "--out=other"], "plain": plain, "opening": opening}
    cases = [*good.values(), *([*RUN, *flags, "--out=bad"] for flags, _ in BAD.values())]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)], capture_output=True, text=True, timeout=200, cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, dict(zip([*good, *BAD], map(json.loads, done.stdout.splitlines()), strict=True))


def test_answers_are_judged_and_right_ones_kept(results):
    folder, found = results
    code, out, err, _ = found["kept"]
    assert code == 0, err
    numbers = json.loads((folder / "answers" / "results.json").read_text())
    # Problem 1: all four are right, one has not the form. Problem 2: of four one is right.
    assert (numbers["problems"], numbers["samples"], numbers["kept"]) == (2, 4, 3)
    assert numbers["accuracy"] == (4 + 1) / 8 and numbers["any_right"] == 1 and numbers["all_right"] == 0.5
    assert numbers["standard_error"] == pytest.approx(0.375)  # of 1 and 0.25
    assert numbers["rewards"] == {"countdown": 5 / 8, "format": 5 / 8}
    assert "62.5% ± 37.5% of 2 problems" in out and "3 conversations in answers/rows.jsonl" in out
    answers = [json.loads(line) for line in (folder / "answers" / "answers.jsonl").read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in answers] == [(i, j) for i in range(2) for j in range(4)]
    assert answers[0]["prompt"] == "Make 3 from 1 2." and answers[0]["total"] == 1.5
    counts = [count_tries(row["text"], row["reference"]) for row in answers]
    assert numbers["tries"] == sum(count.tries for count in counts) / 8 and numbers["tried_again"] == 2 / 8
    assert numbers["right_after_rejecting"] == 1 and numbers["corrected"] == 2 / 8
    assert numbers["misjudged"] == 2 / sum(count.tries for count in counts) and numbers["wrong_steps"] == 0
    rows = read_conversations(folder / "answers" / "rows.jsonl")
    asked = [[message["content"] for message in row.messages] for row in rows]
    assert [question for question, _ in asked] == ["Make 3 from 1 2."] * 2 + ["Make 9 from 5 4."]
    assert [answer for _, answer in asked] == [answers[i]["text"] for i in (0, 1, 7)], "different ones, with all rewards"


def test_rows_have_the_question_without_the_template(results):
    folder, found = results
    assert found["plain"][0] == 0 and found["plain"][3] is None, found["plain"]
    answers, rows = ((folder / "plain" / name).read_text().splitlines() for name in ("answers.jsonl", "rows.jsonl"))
    assert json.loads(answers[0])["prompt"] == "Say: Make 3 from 1 2."
    assert json.loads(rows[0])["messages"][0]["content"] == "Make 3 from 1 2."


def test_a_template_that_opens_the_thinking(results):
    folder, found = results
    code, _, err, ends = found["opening"]
    assert code == 0 and len(ends) == 2, "the template's own token ends an answer, too"
    assert (folder / "opened" / "rows.jsonl").read_bytes() == (folder / "answers" / "rows.jsonl").read_bytes()
    answers = [json.loads(line) for line in (folder / "opened" / "answers.jsonl").read_text().splitlines()]
    assert all(row["text"].startswith("<think>\n") for row in answers) and answers[0]["total"] == 1.5


def test_without_keep_there_are_no_rows(results):
    folder, found = results
    assert found["measured"][0] == 0 and not (folder / "other" / "rows.jsonl").exists()
    assert (folder / "other" / "answers.jsonl").read_bytes() == (folder / "answers" / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(results, case):
    folder, found = results
    code, out, err, _ = found[case]
    assert code == 2, (out, err)
    assert err.startswith("solve: ") and err.count("\n") == 1 and BAD[case][1] in err, err
    assert not (folder / "bad").exists()
