"""`examples/grpo_setup.py` and `grpo_problems.py`: which problems are held out, what a run's problems are known by."""

import json
import os
import pathlib
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

# Flags are the process's own.
DRIVER = r"""
import json, pathlib, sys
import grpo, grpo_setup, grpo_train
from absl.testing import flagsaver
from grpo_problems import made_up_sums, opening_of, read_questions, read_rewards
from dsv3.rl.explore import Task
from dsv3.rl.settings import GrpoSettings
from dsv3.train.schedule import curve_at

def split(count, keys):
    grpo.parse_flags(["grpo.py", "--model=model", f"--heldout={count}"])
    tasks = [Task([i], str(i), i) for i in range(len(keys))]
    found = grpo_setup.split_tasks(tasks, keys, GrpoSettings(prompts=1))
    return [[task.reference for task in side] for side in found]

sums = made_up_sums(100, 1, 3)
train, held = split(41, [question.key for question in sums])
sides = [{tuple(sorted(sums[i].turns[0][:-1].split("+"))) for i in side} for side in (train, held)]
rows = '{"prompt": "a\u2028b\x85c", "reference": 1}\n\n{"prompt": "d", "reference": 2}'
pathlib.Path("rows.jsonl").write_text(rows, "utf-8")
one = Task([1], "a", 1)

def recipe(*flags):
    names = ("prompts", "group_size", "minibatches", "epochs", "reference_every", "kl_weight", "clip_high")
    with flagsaver.flagsaver():
        grpo.parse_flags(["grpo.py", "--model=model", "--recipe=r1", *flags])
        grpo_setup.take_recipe()
        return [getattr(grpo_setup.FLAGS, name) for name in names]

def language(text, *flags):
    with flagsaver.flagsaver():
        grpo.parse_flags(["grpo.py", "--model=model", *flags])
        return read_rewards(["language"], tokenizer=None, max_new_tokens=8)("", text, None).total

def rates(*flags):
    with flagsaver.flagsaver():
        grpo.parse_flags(["grpo.py", "--model=model", "--lr=0.1", "--warmup_steps=4", *flags])
        return [round(curve_at(grpo_train.rate_curve(12), step), 9) for step in (0, 2, 4, 8, 12)]

print(json.dumps({
    "rates": [rates(), rates("--lr_end=0.01")],
    "languages": [
        language("Wir wissen doch \u5f88"), language("Wir wissen doch \u5f88", "--language=zh"),
        language("Wir wissen doch \u5f88", "--language=de", "--language_unit=characters"), language("12"),
        language("12", "--language_empty=0.25"),
    ],
    "names": [question.name for question in (*sums[:1], *read_questions("rows.jsonl", "rows"))],
    "sums": [len(train), len(held), len(sides[0] & sides[1])],
    "twice": split(2, list("abcdcb")), "none": split(0, list("aab")),
    "rows": [question.turns[0] for question in read_questions("rows.jsonl", "rows")],
    "digests": len({grpo_setup.digest([task]) for task in (one, one._replace(ids=[2]), one._replace(turns=([3],)))}),
    "recipes": [recipe(), recipe("--minibatches=4", "--kl_weight=0")],
    "openings": [opening_of(text) for text in ("a<think>\n", "<think>a", "<think>b<think>")],
}))
"""


def test_problems(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], capture_output=True, text=True, timeout=200, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sums"] == [59, 41, 0], "a+b and b+a are on one side"
    assert found["twice"] == [[0, 2, 3, 4], [1, 5]] and found["none"] == [[0, 1, 2], []]
    assert found["rows"] == ["a\u2028b\x85c", "d"], "line separators in a text end no row"
    assert found["languages"] == [3 / 4, 1 / 4, 13 / 14, 0, 0.25]
    assert found["names"][0].startswith("the made-up sum ") and found["names"][1:] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert found["rates"] == [[0, 0.05, 0.1, 0.1, 0.1], [0, 0.05, 0.1, 0.055, 0.01]]
    assert found["digests"] == 3, "tokens of prompts and turns count"
    assert found["recipes"] == [[8, 16, 16, 1, 25, 0.001, 10.0], [8, 16, 4, 1, 0, 0.0, 10.0]]
    assert found["openings"] == ["<think>\n", "", "<think>"]
